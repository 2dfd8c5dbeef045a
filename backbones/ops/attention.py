"""Softmax attention: PyTorch's fused operator, with the derivatives that it lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0, scale: float | None = None
) -> Tensor:
    """``scaled_dot_product_attention``, with derivatives of every order and in ``torch.func``.

    PyTorch's fused forms have gradients, but no tangents and no gradients of those gradients; its plain products stand
    in for them there.

    Args:
        q: Queries ``[..., N, d]``.
        k: Keys ``[..., M, d]``.
        v: Values ``[..., M, d]``.
        mask: True where a key is seen, or a summand of the logits; broadcasts to ``[..., N, M]``.
        drop: Dropout rate of the weights.
        scale: Factor of the logits; None for ``d ** -0.5``.

    Returns:
        ``[..., N, d]``.
    """
    if not torch.jit.is_scripting():
        return _attention(q, k, v, mask, drop, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float, scale: float | None) -> Tensor:
    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return fused(q, k, v, mask)

    if is_transforming():
        return plain(q, k, v, mask)
    if drop > 0:  # what was dropped cannot be dropped again
        return fused(q, k, v, mask)
    return differentiable(fused, plain, q, k, v, *(() if mask is None else (mask,)))
