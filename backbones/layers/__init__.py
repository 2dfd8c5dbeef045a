"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .hilo import HiLo
from .ulsam import ULSAM, add_ulsam

__all__ = ["ULSAM", "ContMixBlock", "FeatureGetter", "HiLo", "add_ulsam"]
