"""ContMix: convolution with kernels made from the context, one pair for every position and group (OverLoCK, Sec. 3.3).

The affinity of a query to the 49 pooled context regions goes through a linear map to the logits of a small (``k1``)
and a large (``k2``) kernel.  Both steps are linear, so they are one product with ``M = key @ weight_proj^T``:

    logits[n] = q[n] @ M + bias + rpb[true relative offsets]    weights = softmax over each kernel's offsets
    out[n]    = sum over the window of n of weights * v

Windows are shifted at the border, not padded (see ``na2d_av``).  The first half of the channels of ``v`` and ``out``
belongs to the small kernel, the second to the large one; each half holds ``G`` groups of ``C`` channels.  With
``N = H * W`` and ``S = k1^2 + k2^2`` the operator costs ``2 N S C`` multiply-accumulates per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .na2d_av import check_window, reference_na2d_av, window_starts


def working_size(H: int, W: int, kernel_size: int) -> tuple[int, int]:
    """Size to which a map smaller than the window is resized before ContMix: the official rule.

    The short side becomes ``kernel_size`` and the long side keeps the aspect ratio, truncated in double precision in
    the official order of operations.  Where that truncation would fall below the window (the official code then
    raises), the side is ``kernel_size``.

    Args:
        H: Rows of the map.
        W: Columns of the map.
        kernel_size: Side ``K`` of the large kernel.

    Returns:
        Rows and columns, both at least ``kernel_size``; ``(H, W)`` itself when the window fits.
    """
    if min(H, W) >= kernel_size:
        return H, W
    if H < W:
        return kernel_size, max(kernel_size, int(kernel_size / H * W))
    return max(kernel_size, int(kernel_size / W * H)), kernel_size


def _check(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> None:
    if q.dim() != 4 or M.dim() != 4:
        raise ValueError(
            f"got q {list(q.shape)} and M {list(M.shape)}, need [B, G * C, H, W] and [B, G, C, k1^2 + k2^2]"
        )
    B, G, C, S = M.shape[0], M.shape[1], M.shape[2], k1 * k1 + k2 * k2
    H, W = q.shape[2], q.shape[3]
    check_window(H, W, k1, "k1")
    check_window(H, W, k2, "k2")
    if q.shape[0] != B or q.shape[1] != G * C or M.shape[3] != S:
        raise ValueError(
            f"got M {list(M.shape)} for q {list(q.shape)}, k1={k1}, k2={k2}; need [B, G, C, {S}], q [B, G * C, H, W]"
        )
    if list(v.shape) != [B, 2 * G * C, H, W]:
        raise ValueError(f"got v {list(v.shape)}, need {[B, 2 * G * C, H, W]}, twice the channels of q")
    if list(bias.shape) != [S]:
        raise ValueError(f"got bias {list(bias.shape)}, need [{S}] (k1^2 + k2^2)")
    if list(rpb1.shape) != [G, 2 * k1 - 1, 2 * k1 - 1]:
        raise ValueError(f"got rpb1 {list(rpb1.shape)}, need {[G, 2 * k1 - 1, 2 * k1 - 1]} ([G, 2 k1 - 1, 2 k1 - 1])")
    if list(rpb2.shape) != [G, 2 * k2 - 1, 2 * k2 - 1]:
        raise ValueError(f"got rpb2 {list(rpb2.shape)}, need {[G, 2 * k2 - 1, 2 * k2 - 1]} ([G, 2 k2 - 1, 2 k2 - 1])")


def _expand_rpb(rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """Relative position bias of every query and offset: ``[G, 2K-1, 2K-1]`` -> ``[G, H*W, K*K]``.

    The index is key position minus query position plus ``K - 1``, with the window that is shifted at the border.
    """
    offset = torch.arange(kernel_size, device=rpb.device)
    rows = window_starts(H, kernel_size, rpb.device) - torch.arange(H, device=rpb.device) + kernel_size - 1
    cols = window_starts(W, kernel_size, rpb.device) - torch.arange(W, device=rpb.device) + kernel_size - 1
    t = rpb.index_select(1, (rows.unsqueeze(1) + offset).reshape(-1))
    t = t.index_select(2, (cols.unsqueeze(1) + offset).reshape(-1))  # [G, H*K, W*K]
    t = t.reshape(rpb.shape[0], H, kernel_size, W, kernel_size).permute(0, 1, 3, 2, 4)
    return t.reshape(rpb.shape[0], H * W, kernel_size * kernel_size)


def reference_contmix(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> Tensor:
    """Softmax weights from query and context, and their sum over two windows per query (OverLoCK, Sec. 3.3).

    Logits and softmax are computed in float32, or in float64 when ``q`` is float64.

    Args:
        q: Queries ``[B, G * C, H, W]``, channels laid out as ``[G, C]``.
        M: Context of every group ``[B, G, C, k1^2 + k2^2]``: pooled keys times the kernel projection, times the scale.
        bias: Bias of the kernel projection ``[k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window: odd, at least 3 and at most ``H`` and ``W``.
        k2: Side of the large window, likewise; ``working_size`` says how a smaller map is enlarged first.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the layout and dtype of ``v``.

    Raises:
        ValueError: If a window does not fit the map, or the shapes do not fit each other.
    """
    _check(q, M, bias, rpb1, rpb2, v, k1, k2)
    B, H, W = q.shape[0], q.shape[2], q.shape[3]
    G, C = M.shape[1], M.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.reshape(B, G, C, H * W).transpose(2, 3).to(dtype)
    logits = queries @ M.to(dtype) + bias.to(dtype)  # [B, G, N, k1^2 + k2^2]
    values = v.reshape(B, 2, G, C, H, W).permute(1, 0, 2, 4, 5, 3)  # [2, B, G, H, W, C]
    small = logits[..., : k1 * k1] + _expand_rpb(rpb1.to(dtype), H, W, k1)
    large = logits[..., k1 * k1 :] + _expand_rpb(rpb2.to(dtype), H, W, k2)
    out1 = reference_na2d_av(small.softmax(-1).reshape(B, G, H, W, k1 * k1), values[0], k1)
    out2 = reference_na2d_av(large.softmax(-1).reshape(B, G, H, W, k2 * k2), values[1], k2)
    return torch.stack([out1, out2], dim=1).permute(0, 1, 2, 5, 3, 4).reshape(v.shape)


def contmix(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    """:func:`reference_contmix`: same arguments, result and errors."""
    return reference_contmix(q, M, bias, rpb1, rpb2, v, k1, k2)
