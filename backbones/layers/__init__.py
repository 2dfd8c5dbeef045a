"""Modules shared by several families."""

from .contmix import ContMixBlock
from .dependency import Dependency, Tree, dependency_tree, saliency, subtrees
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .reversed_attention import ReversedAttention
from .layout import to_fast_layout
from .ulsam import ULSAM, add_ulsam

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
__all__ = [
    "ULSAM",
    "ContMixBlock",
    "FeatureGetter",
    "HaloAttention",
    "HiLo",
    "add_ulsam",
    "swap_halo",
    "to_fast_layout",
]
