"""Softmax attention: PyTorch's fused operator, with the derivatives that it lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import is_transforming
from ._derivative import differentiable


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, with every score stored.

    Args:
        q: Queries ``[..., N, d]``.
        k: Keys ``[..., M, d]``.
        v: Values ``[..., M, d]``.

    Returns:
        ``[..., N, d]``.
    """
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`reference_attention` by PyTorch's fused operator, which stores no scores: same arguments and result.

    That operator has neither a second derivative nor rules for ``torch.func`` and forward-mode differentiation on
    every device; the reference stands in for it there.
    """
    if not torch.jit.is_scripting():
        if is_transforming():
            return reference_attention(q, k, v)
        return differentiable(F.scaled_dot_product_attention, reference_attention, q, k, v)
    return F.scaled_dot_product_attention(q, k, v)
