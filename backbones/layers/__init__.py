"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .layout import to_fast_layout
from .neighborhood import NeighborhoodAttention
from .place_code import PlaceCode, step_code
from .ulsam import ULSAM, add_ulsam

__all__ = [
    "ULSAM",
    "ContMixBlock",
    "FeatureGetter",
    "HaloAttention",
    "HiLo",
    "NeighborhoodAttention",
    "PlaceCode",
    "add_ulsam",
    "step_code",
    "swap_halo",
    "to_fast_layout",
]
