"""Neighbourhood weighted sum: every query adds up the values of its own ``K x K`` window (OverLoCK, Sec. 3.3).

On an axis of length ``L`` the window of position ``i`` starts at ``s(i) = min(max(i - (K - 1) / 2, 0), L - K)``: it is
shifted to stay inside the map, never padded, so a corner query sees the same ``K^2`` values as its neighbours.

    out[i, j] = sum over p, r in [0, K) of attn[i, j, p * K + r] * value[s(i) + p, s(j) + r]

With ``N = H * W`` queries and ``C`` channels per group this costs ``N K^2 C`` multiply-accumulates per group.  This is
the operator that NATTEN called ``na2d_av`` up to release 0.17.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_window(H: int, W: int, kernel_size: int, name: str = "kernel_size") -> None:
    """Raise unless windows of an odd ``kernel_size`` fit into an ``H x W`` map.

    Args:
        H: Rows of the map.
        W: Columns of the map.
        kernel_size: Side ``K`` of the window.
        name: What the error calls it.

    Raises:
        ValueError: If ``kernel_size`` is even, below 3, or larger than the map.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"got {name}={kernel_size}, need an odd number of at least 3")
    if kernel_size > H or kernel_size > W:
        raise ValueError(f"got {name}={kernel_size} on a {H}x{W} map, need at most {min(H, W)}; enlarge the map first")


def window_starts(L: int, kernel_size: int, device: torch.device) -> Tensor:
    """First position ``s(i)`` of the window of each position on an axis: ``[L]`` (int64)."""
    return (torch.arange(L, device=device) - (kernel_size - 1) // 2).clamp(0, L - kernel_size)


def _check(attn: Tensor, value: Tensor, kernel_size: int) -> None:
    if value.dim() != 5:
        raise ValueError(f"got value of shape {list(value.shape)}, need [B, G, H, W, C]")
    check_window(value.shape[2], value.shape[3], kernel_size)
    need = [value.shape[0], value.shape[1], value.shape[2], value.shape[3], kernel_size * kernel_size]
    if list(attn.shape) != need:
        raise ValueError(f"got attn of shape {list(attn.shape)}, need {need} for value {list(value.shape)}")


def reference_na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weighted sum over the window of every query, by one gather of all windows.

    Args:
        attn: Weights ``[B, G, H, W, K * K]``, offsets row-major; cast to the dtype of ``value`` first.
        value: Values ``[B, G, H, W, C]``.
        kernel_size: Side ``K`` of the window: odd, at least 3 and at most ``H`` and ``W``.

    Returns:
        ``[B, G, H, W, C]`` in the dtype of ``value``.

    Raises:
        ValueError: If the window does not fit the map, or ``attn`` does not fit ``value``.
    """
    _check(attn, value, kernel_size)
    B, G, H, W, C = value.shape
    offset = torch.arange(kernel_size, device=value.device)
    rows = window_starts(H, kernel_size, value.device).unsqueeze(1) + offset  # [H, K]
    cols = window_starts(W, kernel_size, value.device).unsqueeze(1) + offset  # [W, K]
    index = (rows * W).reshape(H, 1, kernel_size, 1) + cols.reshape(1, W, 1, kernel_size)  # [H, W, K, K]
    windows = value.reshape(B, G, H * W, C).index_select(2, index.reshape(-1))
    windows = windows.reshape(B, G, H, W, kernel_size * kernel_size, C)
    return (attn.to(value.dtype).unsqueeze(4) @ windows).squeeze(4)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """:func:`reference_na2d_av`: same arguments, result and errors."""
    return reference_na2d_av(attn, value, kernel_size)
