"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .hilo import HiLo
from .neighborhood import NeighborhoodAttention

__all__ = ["ContMixBlock", "FeatureGetter", "HiLo", "NeighborhoodAttention"]
