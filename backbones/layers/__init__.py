"""Modules shared by several families."""

from .hilo import HiLo

__all__ = ["HiLo"]
