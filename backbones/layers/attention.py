"""PyTorch's attention for modules that are differentiated in any way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops._backend import is_transforming

__all__ = ["attend"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0, scale: float | None = None
) -> Tensor:
    """``scaled_dot_product_attention``, by its plain products where somebody may differentiate it twice or forward.

    PyTorch's fused forms have gradients, but no tangents and no gradients of those gradients.  Not for long sequences:
    on a CPU the attention weights are kept while a gradient is recorded, as they are anyway with dropout or with a mask
    that has a gradient.  Elsewhere fused forms know both, and second gradients need ``sdpa_kernel(SDPBackend.MATH)``.

    Args:
        q: Queries ``[B, h, N, d]``.
        k: Keys ``[B, h, M, d]``.
        v: Values ``[B, h, M, d]``.
        mask: True where a key is seen, or a summand of the logits; broadcasts to ``[B, h, N, M]``.
        drop: Dropout rate of the weights.
        scale: Factor of the logits; None for ``d ** -0.5``.

    Returns:
        ``[B, h, N, d]``.
    """
    # what records the model itself sees one operator, whatever has a gradient
    recorded = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    differentiated = q.device.type == "cpu" and recorded and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_transforming() or differentiated:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
