"""Modules shared by several families."""

from .contmix import ContMixBlock
from .dependency import Dependency, Tree, dependency_tree, saliency, subtrees
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .layout import to_fast_layout
from .neighborhood import NeighborhoodAttention
from .reversed_attention import ReversedAttention
from .place_code import PlaceCode, step_code
from .ulsam import ULSAM, add_ulsam

__all__ = [
    "ULSAM",
    "ContMixBlock",
    "Dependency",
    "FeatureGetter",
    "HaloAttention",
    "HiLo",
    "NeighborhoodAttention",
    "ReversedAttention",
    "Tree",
    "PlaceCode",
    "add_ulsam",
    "dependency_tree",
    "saliency",
    "subtrees",
    "step_code",
    "swap_halo",
    "to_fast_layout",
]
