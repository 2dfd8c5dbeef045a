"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .layout import to_fast_layout

__all__ = ["ContMixBlock", "FeatureGetter", "HaloAttention", "HiLo", "swap_halo", "to_fast_layout"]
