"""Modules shared by several families."""

from .contmix import ContMixBlock
from .dependency import Dependency, Tree, dependency_tree, saliency, subtrees
from .features import FeatureGetter
from .hilo import HiLo
from .reversed_attention import ReversedAttention

__all__ = [
    "ContMixBlock",
    "Dependency",
    "FeatureGetter",
    "HiLo",
    "ReversedAttention",
    "Tree",
    "dependency_tree",
    "saliency",
    "subtrees",
]
