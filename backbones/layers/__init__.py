"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .neighborhood import NeighborhoodAttention
from .layout import to_fast_layout
from .ulsam import ULSAM, add_ulsam

__all__ = ["ContMixBlock", "FeatureGetter", "HiLo", "NeighborhoodAttention"]
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
