"""Modules shared by several families."""

from .features import FeatureGetter
from .hilo import HiLo

__all__ = ["FeatureGetter", "HiLo"]
