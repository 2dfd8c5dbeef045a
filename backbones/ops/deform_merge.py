"""Deformable 2x2 stride-2 convolution, version 1, channels-last: the token merging of LITv2 (LITv1, Sec. 3.3).

Tap ``t = 2 i + j`` of output ``(oy, ox)`` samples the map bilinearly at ``(2 oy + i + dy, 2 ox + j + dx)``; neighbours
outside the map are zero.  Each sample is a weighted sum of four rows of the token matrix, so the four taps of all
outputs are one weighted row gather of ``[M * 4, C]`` and the convolution is one product with the ``[O, 4 C]`` weight.
With ``M`` output tokens this costs ``4 M C O`` multiply-accumulates plus ``32 M C`` FLOPs of sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _neighbours(start: Tensor, d: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Linear weight (0 outside the map) and index (clamped into it) of both neighbours of ``start + d``: ``[..., 2]``.

    The fraction comes from ``d`` alone, so that it is as exact on a large map as on a small one.
    """
    low = d.floor()
    low = torch.stack([low, low + 1], dim=-1)
    c = start.unsqueeze(-1) + low
    w = (1 - (d.unsqueeze(-1) - low).abs()) * ((c >= 0) & (c <= size - 1))
    return w, c.long().clamp(0, size - 1)  # in this order NaN stays a valid index


def _corners(offset: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Row index in a flattened map and bilinear weight of the four corners of every tap.

    Args:
        offset: ``[B, Ho, Wo, 8]``, channel ``2 t`` is ``dy`` and ``2 t + 1`` is ``dx`` of tap ``t``.
        H: Rows of the map.
        W: Columns of the map.

    Returns:
        Index ``[B, Ho, Wo, 4, 4]`` (int64, inside the sample's own map) and weight, same shape, float32 or float64.
    """
    B, Ho, Wo = offset.shape[0], offset.shape[1], offset.shape[2]
    dtype = torch.float64 if offset.dtype == torch.float64 else torch.float32  # half precision cannot hold coordinates
    d = offset.to(dtype).reshape(B, Ho, Wo, 2, 2, 2)  # [B, Ho, Wo, i, j, (dy, dx)]
    tap = torch.arange(2, device=offset.device, dtype=dtype)
    rows = torch.arange(Ho, device=offset.device, dtype=dtype).mul(2).reshape(Ho, 1, 1, 1) + tap.reshape(1, 1, 2, 1)
    cols = torch.arange(Wo, device=offset.device, dtype=dtype).mul(2).reshape(1, Wo, 1, 1) + tap.reshape(1, 1, 1, 2)
    wy, cy = _neighbours(rows, d[..., 0], H)  # [B, Ho, Wo, 2, 2, 2]
    wx, cx = _neighbours(cols, d[..., 1], W)
    index = cy.unsqueeze(-1) * W + cx.unsqueeze(-2)  # [B, Ho, Wo, 2, 2, 2 (y), 2 (x)]
    weight = wy.unsqueeze(-1) * wx.unsqueeze(-2)
    return index.reshape(B, Ho, Wo, 4, 4), weight.reshape(B, Ho, Wo, 4, 4)


def _check(x: Tensor, offset: Tensor, weight: Tensor) -> None:
    if offset.shape[1] != x.shape[1] // 2 or offset.shape[2] != x.shape[2] // 2 or offset.shape[3] != 8:
        raise ValueError(
            f"got offset {list(offset.shape)} for a {x.shape[1]}x{x.shape[2]} map, "
            f"need [B, {x.shape[1] // 2}, {x.shape[2] // 2}, 8]"
        )
    if weight.shape[1] != x.shape[3] or weight.shape[2] != 2 or weight.shape[3] != 2:
        raise ValueError(f"got weight {list(weight.shape)} for {x.shape[3]} channels, need [O, {x.shape[3]}, 2, 2]")


def reference_deform_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Deformable 2x2 stride-2 convolution by one gather for each bilinear corner.

    Args:
        x: Map ``[B, H, W, C]``.
        offset: Sampling offsets in pixels ``[B, H // 2, W // 2, 8]``; ``dy`` before ``dx``, taps row-major.
        weight: ``[O, C, 2, 2]``.
        bias: ``[O]`` or None.

    Returns:
        ``[B, H // 2, W // 2, O]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shapes of ``offset`` or ``weight`` do not fit ``x``.
    """
    _check(x, offset, weight)
    B, H, W, C = x.shape
    index, corner = _corners(offset, H, W)
    Ho, Wo = offset.shape[1], offset.shape[2]
    rows = x.reshape(B, H * W, C)
    index = index.reshape(B, Ho * Wo * 16, 1).expand(-1, -1, C)
    taps = torch.gather(rows, 1, index).reshape(B, Ho, Wo, 4, 4, C)
    taps = (taps * corner.unsqueeze(-1).to(x.dtype)).sum(dim=4)  # [B, Ho, Wo, tap, C]
    return F.linear(taps.reshape(B, Ho, Wo, 4 * C), weight.permute(0, 2, 3, 1).reshape(-1, 4 * C), bias)


def deform_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`reference_deform_merge` with one weighted row gather: same arguments, result and errors."""
    _check(x, offset, weight)
    B, H, W, C = x.shape
    index, corner = _corners(offset, H, W)
    Ho, Wo = offset.shape[1], offset.shape[2]
    first = torch.arange(B, device=x.device).mul(H * W).reshape(B, 1, 1, 1, 1)
    taps = F.embedding_bag(
        (index + first).reshape(-1, 4),
        x.reshape(B * H * W, C),
        mode="sum",
        per_sample_weights=corner.reshape(-1, 4).to(x.dtype),
    )  # [B*Ho*Wo*4, C]
    return F.linear(taps.reshape(B, Ho, Wo, 4 * C), weight.permute(0, 2, 3, 1).reshape(-1, 4 * C), bias)
