"""Softmax attention: PyTorch's fused operator, with the derivatives that it lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._derivative import differentiable
from .backend import is_transforming, on_kernel_device

# images in one call of PyTorch's CUDA kernels: an axis of their grids (PyTorch's issues 142228 and 146704)
MAX_BATCH = 65535


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
    if q.is_cuda:
        return _fused(q, k, v, mask, drop, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop: float,
    scale: float | None,
    limit: int = MAX_BATCH,  # a default, for TorchScript reads no globals
) -> Tensor:
    """PyTorch's fused form, on ``limit`` images at a time."""
    if q.dim() != 4 or q.shape[0] <= limit:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    parts: list[Tensor] = []
    for first in range(0, q.shape[0], limit):
        last = first + limit
        some = mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            some = mask[first:last]
        parts.append(
            F.scaled_dot_product_attention(
                q[first:last], k[first:last], v[first:last], attn_mask=some, dropout_p=drop, scale=scale
            )
        )
    return torch.cat(parts)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float, scale: float | None) -> Tensor:
    # exported programs are for any size, and sizes that nobody asks about bind them to none
    limited = on_kernel_device(q) and not torch.compiler.is_exporting()

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return _fused(q, k, v, mask, drop, scale, MAX_BATCH if limited else q.shape[0])

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)

    if is_transforming():
        return plain(q, k, v, mask)
    if drop > 0:  # what was dropped cannot be dropped again
        return fused(q, k, v, mask)
    return differentiable(fused, plain, q, k, v, *(() if mask is None else (mask,)))
