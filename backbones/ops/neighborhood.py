"""Neighbourhood attention: every query attends to its own ``Kh x Kw`` window of the map (NAT and DiNAT, Sec. 3.1).

On an axis, the positions with the same remainder by the dilation form a group of ``n`` positions.  In its group the
window of position ``t`` starts at ``s(t) = min(max(l(t) - K // 2, 0), n - K)``: it is shifted at the border, never
padded, so every query sees ``K`` keys.  The leader ``l(t) = t // S * S + S // 2`` is the same for ``S`` queries, the
stride of generalised neighbourhood attention (arXiv 2504.16922, Sec. 3.1); with ``S = 1`` it is ``t`` itself.

    out[i] = sum over the window of softmax(scale * q[i] . k[j] + rpb[(j - i) / dilation + K - 1]) * v[j]

Tensors are heads-last, as in NATTEN.  The relative index is within ``[0, 2K - 2]`` for every stride.  A map smaller
than ``K * dilation`` is first padded at the bottom and right with a given key and value, as NATTEN 0.14's module does.

Two more forms serve aggregated attention (TransNeXt, arXiv 2311.17132, Sec. 3): windows that are not shifted but masked
at the border, and ``P`` additional keys that every query sees in the same softmax, with a bias of their own.
With ``N`` queries the operator costs ``N (Kh Kw + P) (d + dv)`` multiply-accumulates per head.

The reference gathers the ``N Kh Kw (d + dv)`` elements of all windows.  The fast form cuts the map into tiles of
queries, whose windows lie in a region of ``T + K - 1`` keys, and hands all tiles with the same mask to fused attention,
and the first and last of an axis with one each: masks are so small that they are made anew on each call.  The Triton
kernels store nothing but the output and the log-sum of every query; their backward pass finds the queries of a key by
the inverse of the window and adds everything up in a fixed order.  NATTEN takes CUDA tensors where its CUDA library is
installed, with a bias as more channels, but neither masked windows nor a bias of additional keys.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from .backend import (
    KernelModule,
    choose_backend,
    is_transforming,
    load_natten,
    multiplies,
    plain_only,
    without_autocast,
)
from .cost import Cost, register_cost, windows_backward_cost, windows_cost
from .operators import operator

kernels = KernelModule("_neighborhood_kernels")
MAX_CHANNELS = 128  # of a head, for the Triton kernels: a tile of queries has to fit into registers
_WORKSPACE = 4 << 20  # bytes of keys and values gathered at once on a CPU, so that they stay in the cache


class _Window(NamedTuple):
    """Shape of a neighbourhood, the first three by rows and columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    masked: bool = False  # windows keep their leader in the middle, also at the border


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (value[0], value[1])


def _window(
    kernel_size: int | tuple[int, int], stride: int | tuple[int, int], dilation: int | tuple[int, int], boundary: str
) -> _Window:
    if boundary not in ("shift", "mask"):
        raise ValueError(f"got boundary='{boundary}', need 'shift' or 'mask'")
    return _Window(_pair(kernel_size), _pair(stride), _pair(dilation), boundary == "mask")


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: _Window, rpb: Tensor | None, pad_k: Tensor | None, pad_v: Tensor | None
) -> None:
    kernel, stride, dilation = window.kernel, window.stride, window.dilation
    if q.dim() != 5:
        raise ValueError(f"got q of shape {list(q.shape)}, need [B, H, W, h, d]")
    if k.shape != q.shape:
        raise ValueError(f"got k of shape {list(k.shape)}, need that of q, {list(q.shape)}")
    if v.dim() != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(f"got v of shape {list(v.shape)}, need {list(q.shape[:4])} and one more dimension")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"got q, k and v in {q.dtype}, {k.dtype} and {v.dtype}, need one dtype")
    if kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"got kernel_size={kernel}, need at least 1")
    if stride[0] < 1 or stride[1] < 1 or stride[0] > kernel[0] or stride[1] > kernel[1]:
        raise ValueError(f"got stride={stride}, need 1 to kernel_size={kernel}")
    if dilation[0] < 1 or dilation[1] < 1:
        raise ValueError(f"got dilation={dilation}, need at least 1")
    table, key, value = [q.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1], list(k.shape[3:]), list(v.shape[3:])
    if rpb is not None and list(rpb.shape) != table:
        raise ValueError(f"got rpb of shape {list(rpb.shape)}, need {table} ([h, 2 Kh - 1, 2 Kw - 1])")
    if pad_k is not None and list(pad_k.shape) != key:
        raise ValueError(f"got pad_k of shape {list(pad_k.shape)}, need {key} ([h, d])")
    if pad_v is not None and list(pad_v.shape) != value:
        raise ValueError(f"got pad_v of shape {list(pad_v.shape)}, need {value} ([h, dv])")


def _check_additional(q: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, bias: Tensor | None) -> None:
    if keys is None or values is None:
        if keys is not None or values is not None or bias is not None:
            raise ValueError("got one of additional_keys, additional_values and additional_bias, need the first two")
        return
    key, value = list(q.shape[3:]), list(v.shape[3:])
    if keys.dim() != 4 or keys.shape[0] not in (1, q.shape[0]) or keys.shape[1] < 1 or list(keys.shape[2:]) != key:
        raise ValueError(
            f"got additional_keys of shape {list(keys.shape)}, "
            f"need [{q.shape[0]} or 1, P, {key[0]}, {key[1]}] with P of at least 1"
        )
    if values.dim() != 4 or values.shape[:2] != keys.shape[:2] or list(values.shape[2:]) != value:
        need = list(keys.shape[:2]) + value
        raise ValueError(f"got additional_values of shape {list(values.shape)}, need {need}")
    if keys.dtype != q.dtype or values.dtype != q.dtype:
        raise ValueError(
            f"got additional keys and values in {keys.dtype} and {values.dtype}, need that of q, {q.dtype}"
        )
    if bias is not None:
        N, P = q.shape[1] * q.shape[2], keys.shape[1]
        fits = bias.dim() == 3 and bias.shape[0] in (1, key[0]) and bias.shape[1] in (1, N) and bias.shape[2] == P
        if not fits:
            raise ValueError(
                f"got additional_bias of shape {list(bias.shape)}, need [{key[0]} or 1, {N} or 1, {P}] ([h, H * W, P])"
            )


def at_least(L: int, least: int) -> int:
    """The larger of a size, perhaps a symbol of the exporter or a tensor while tracing, and a number."""
    if not torch.jit.is_scripting():
        if isinstance(L, Tensor):  # while tracing
            return L.clamp(min=least)  # type: ignore[return-value]
        return torch.sym_max(L, least)  # type: ignore[return-value]
    return max(L, least)


def _padded(t: Tensor, fill: Tensor | None, window: _Window) -> Tensor:
    """Fill a map ``[B, H, W, h, C]`` at the bottom and right up to the size of a dilated window that is shifted."""
    if window.masked:
        return t
    H, W = t.shape[1], t.shape[2]
    rows = at_least(H, window.kernel[0] * window.dilation[0])
    cols = at_least(W, window.kernel[1] * window.dilation[1])
    if isinstance(H, int) and isinstance(W, int) and rows == H and cols == W:
        return t
    y, x = torch.arange(rows, device=t.device), torch.arange(cols, device=t.device)
    outside = ((y >= H).unsqueeze(1) | (x >= W)).reshape(1, rows, cols, 1, 1)
    t = t.index_select(1, y.clamp(max=H - 1)).index_select(2, x.clamp(max=W - 1))
    one = t.new_zeros(t.shape[3], t.shape[4]) if fill is None else fill.to(t.dtype)
    return torch.where(outside, one, t)


def is_padded(H: int, W: int, kernel_size: int, dilation: int) -> bool:
    """Whether a map is, or to the exporter's knowledge may be, smaller than a dilated window."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt):
            return True
    return min(H, W) < kernel_size * dilation


def _starts(t: Tensor, last: Tensor, K: int, S: int, masked: bool) -> Tensor:
    """First key in the window of each query ``t`` of dilation groups whose last keys are ``last``."""
    start = t // S * S + (S // 2 - K // 2)
    return start if masked else torch.minimum(start.clamp(min=0), last + (1 - K))


def _window_starts(
    L: int, size: int, K: int, S: int, D: int, masked: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First key in the window of each of the first ``L`` positions on an axis of ``size`` keys.

    Returns:
        The key ``[L]``, counted inside the dilation group, and its relative index ``[L]``, 0 to ``K - 1``.
    """
    i = torch.arange(L, device=device)
    t = i // D
    start = _starts(t, (size - i % D + D - 1) // D - 1, K, S, masked)
    return start, start - t + (K - 1)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _axis_keys(L: int, size: int, K: int, S: int, D: int, masked: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys in the window of each of the first ``L`` positions on an axis, and their relative index: ``[L, K]`` each."""
    start, first = _window_starts(L, size, K, S, D, masked, device)
    p = torch.arange(K, device=device)
    return (start.unsqueeze(1) + p) * D + (torch.arange(L, device=device) % D).unsqueeze(1), first.unsqueeze(1) + p


def _window_keys(
    rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor], k: Tensor, window: _Window
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys in the windows of a grid of queries.

    Args:
        rows: Of the grid's rows, as :func:`_axis_keys` gives them ``[m, Kh]``.
        cols: Of its columns ``[n, Kw]``.
        k: Keys ``[B, H, W, h, d]``.
        window: Shape of the neighbourhood.

    Returns:
        Places in the map and in the table of biases, each ``[m * n * Kh * Kw]``; and which keys are off the map
        ``[m * n, 1, Kh * Kw]``, or None if windows are shifted into it.
    """
    (y, dy), (x, dx), (Kh, Kw) = rows, cols, window.kernel
    m, n = y.shape[0], x.shape[0]
    outside: Tensor | None = None
    if window.masked:
        row, col = (y < 0) | (y >= k.shape[1]), (x < 0) | (x >= k.shape[2])
        outside = (row.reshape(m, 1, Kh, 1) | col.reshape(1, n, 1, Kw)).reshape(m * n, 1, Kh * Kw)
        y, x = y.clamp(0, k.shape[1] - 1), x.clamp(0, k.shape[2] - 1)
    place = ((y * k.shape[2]).reshape(m, 1, Kh, 1) + x.reshape(1, n, 1, Kw)).reshape(-1)
    relative = ((dy * (2 * Kw - 1)).reshape(m, 1, Kh, 1) + dx.reshape(1, n, 1, Kw)).reshape(-1)
    return place, relative, outside


def _gather_weights(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_bias: Tensor | None,
    keys: tuple[Tensor, Tensor, Tensor | None],
    window: _Window,
    scale: float,
) -> Tensor:
    """Weights ``[B, h, m * n, Kh * Kw + P]`` of queries ``[B, m, n, h, d]`` over what :func:`_window_keys` gives."""
    B, h, d = q.shape[0], q.shape[3], q.shape[4]
    N, count, dtype = q.shape[1] * q.shape[2], window.kernel[0] * window.kernel[1], _wide(q)
    place, relative, outside = keys
    queries, seen = [t.to(dtype).permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (q, k)]  # [B, h, tokens, d]
    queries = queries * scale
    seen = seen.index_select(2, place).reshape(B, h, N, count, d)
    logits = queries.unsqueeze(3) @ seen.transpose(3, 4)  # [B, h, N, 1, Kh * Kw]
    if rpb is not None:
        logits = logits + rpb.to(dtype).flatten(1).index_select(1, relative).reshape(h, N, 1, count)
    if outside is not None:
        logits = logits.masked_fill(outside, -math.inf)
    logits = logits.squeeze(3)
    if add_k is not None:
        others = queries @ add_k.to(dtype).permute(0, 2, 3, 1)  # [B, h, N, P]
        if add_bias is not None:
            others = others + add_bias.to(dtype)
        logits = torch.cat([logits, others], -1)
    return logits.softmax(-1)


def _gather_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: _Window,
    scale: float,
) -> Tensor:
    B, H, W, h, _ = q.shape
    (Kh, Kw), (Sh, Sw), (Dh, Dw) = window.kernel, window.stride, window.dilation
    rows = _axis_keys(H, k.shape[1], Kh, Sh, Dh, window.masked, q.device)
    cols = _axis_keys(W, k.shape[2], Kw, Sw, Dw, window.masked, q.device)
    keys = _window_keys(rows, cols, k, window)
    weights = _gather_weights(q, k, rpb, add_k, add_bias, keys, window, scale)
    values = v.to(weights.dtype).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, h, tokens, dv]
    values = values.index_select(2, keys[0]).reshape(B, h, H * W, Kh * Kw, v.shape[4])
    out = weights[..., : Kh * Kw].unsqueeze(3) @ values
    if add_v is not None:
        out = out + (weights[..., Kh * Kw :] @ add_v.to(weights.dtype).transpose(1, 2)).unsqueeze(3)
    return out.reshape(B, h, H, W, v.shape[4]).permute(0, 2, 3, 1, 4).to(v.dtype).contiguous()


def neighborhood_weights(
    q: Tensor,
    k: Tensor,
    row: int,
    col: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    boundary: str = "shift",
) -> tuple[Tensor, Tensor]:
    """The softmax weights of :func:`reference_neighborhood_attention` of one query, for pictures.

    Args:
        q: Queries ``[B, H, W, h, d]``.
        k: Keys, same shape and dtype.
        row: Row of the query.
        col: Its column.
        kernel_size: Side of the window, or its rows and columns ``(Kh, Kw)``.
        stride: Queries that share a window.
        dilation: Distance between neighbouring keys of a window.
        rpb: Bias by relative position ``[h, 2 Kh - 1, 2 Kw - 1]``.
        scale: Factor of the logits; None is ``d ** -0.5``.
        pad_k: Key ``[h, d]`` that pads a map smaller than ``kernel_size * dilation``; None is zero.
        boundary: ``"shift"`` or ``"mask"``.

    Returns:
        Weights ``[B, h, Kh, Kw]`` in float32 at least; and rows and columns of their keys ``[Kh, Kw, 2]``, of which
        some lie beyond a small map, or outside a map with ``"mask"``.

    Raises:
        ValueError: If an argument is outside its range, or shapes or dtypes do not fit each other.
    """
    window = _window(kernel_size, stride, dilation, boundary)
    _check(q, k, k, window, rpb, pad_k, None)
    k = _padded(k, pad_k, window)
    axes = zip(q.shape[1:3], k.shape[1:3], *window[:3], (row, col), strict=True)

    def of_query(L: int, size: int, K: int, S: int, D: int, i: int) -> tuple[Tensor, Tensor]:
        key, relative = _axis_keys(L, size, K, S, D, window.masked, q.device)
        return key[i : i + 1], relative[i : i + 1]

    rows, cols = itertools.starmap(of_query, axes)
    keys = _window_keys(rows, cols, k, window)
    with without_autocast(q):
        query = q[:, row : row + 1, col : col + 1]
        factor = q.shape[4] ** -0.5 if scale is None else scale
        weights = _gather_weights(query, k, rpb, None, None, keys, window, factor)
    places = torch.stack(torch.meshgrid(rows[0][0], cols[0][0], indexing="ij"), -1)
    return weights.squeeze(2).unflatten(-1, window.kernel), places


def _of_every_image(t: Tensor | None, q: Tensor) -> Tensor | None:
    """Additional keys or values that may be given for all images at once: of every image of the queries."""
    return None if t is None else t.expand(q.shape[0], -1, -1, -1)


def reference_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_bias: Tensor | None = None,
    boundary: str = "shift",
) -> Tensor:
    """Softmax attention of every query over its own window, by one gather of all windows (NAT, Sec. 3.1).

    Logits, softmax and sum are computed in float32, or in float64 when ``q`` is float64.

    Args:
        q: Queries ``[B, H, W, h, d]``.
        k: Keys, same shape and dtype.
        v: Values ``[B, H, W, h, dv]``, same dtype.
        kernel_size: Side of the window, or its rows and columns ``(Kh, Kw)``: at least 1; an even side has one key more
            before the query than after it.
        stride: Queries that share a window, 1 to ``kernel_size``; the latter is attention in separate blocks.
        dilation: Distance between neighbouring keys of a window.
        rpb: Bias by relative position ``[h, 2 Kh - 1, 2 Kw - 1]``, added to the scaled logits; its index is
            ``(j - i) / dilation + K - 1`` for query ``i`` and key ``j``.
        scale: Factor of the logits; None is ``d ** -0.5``.
        pad_k: Key ``[h, d]`` with which a map smaller than ``kernel_size * dilation`` is padded to that size at the
            bottom and right; None is zero.
        pad_v: The value ``[h, dv]`` that belongs to it.
        additional_keys: Keys ``[B, P, h, d]`` that every query sees beside its window, in the same softmax: pooled
            maps, prompts, global tokens.  One image ``[1, P, h, d]`` serves all.
        additional_values: Their values ``[B, P, h, dv]``.
        additional_bias: Bias of their logits ``[h, H * W, P]``; the first two may be 1.
        boundary: At the border ``"shift"`` moves a window into the map, so that it keeps all its keys; ``"mask"``
            leaves it where it is and masks the keys outside, as in TransNeXt, so that no map is ever padded.  With
            ``"mask"``, an odd ``K`` and no stride only the ``K x K`` in the middle of ``rpb`` are read.

    Returns:
        ``[B, H, W, h, dv]`` in the dtype of ``q``.

    Raises:
        ValueError: If an argument is outside its range, or shapes or dtypes do not fit each other.
    """
    window = _window(kernel_size, stride, dilation, boundary)
    _check(q, k, v, window, rpb, pad_k, pad_v)
    _check_additional(q, v, additional_keys, additional_values, additional_bias)
    add_k, add_v = _of_every_image(additional_keys, q), _of_every_image(additional_values, q)
    k, v = _padded(k, pad_k, window), _padded(v, pad_v, window)
    factor = q.shape[4] ** -0.5 if scale is None else scale
    if not torch.jit.is_scripting():
        with without_autocast(q):
            return _gather_form(q, k, v, rpb, add_k, add_v, additional_bias, window, factor)
    return _gather_form(q, k, v, rpb, add_k, add_v, additional_bias, window, factor)


def _tile_queries(n: int, S: int, most: int = 8) -> int:
    """Queries of a tile on an axis with ``n`` queries in a dilation group: whole groups of ``S``, equally many.

    Tiles of 4 to 8 are equally fast on a CPU, larger ones spend more on scores outside the windows.
    """
    most = S * max(1, most // S)
    if not isinstance(n, int):  # a size that the exporter does not know
        return most
    tiles = max(1, (n + most - 1) // most)
    return (n + tiles * S - 1) // (tiles * S) * S


def _bias_table(rpb: Tensor | None, window: _Window, q: Tensor) -> Tensor:
    """Additive mask by relative index ``[h or 1, bins + 1]``; the last entry is that of keys outside the window."""
    bins = (2 * window.kernel[0] - 1) * (2 * window.kernel[1] - 1)
    table = torch.zeros(1, bins, dtype=_wide(q), device=q.device) if rpb is None else rpb.to(_wide(q)).flatten(1)
    return F.pad(table, [0, 1], value=-math.inf)


def _index_axis(
    L: int, size: int, K: int, S: int, D: int, masked: bool, outside: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tiles of one axis as index tensors, for any size.

    Args:
        L: Queries on the axis.
        size: Keys on the axis.
        K: Side of the window.
        S: Stride.
        D: Dilation.
        masked: Whether windows keep their place at the border.
        outside: Relative index of a key outside the window.
        device: Device of the result.

    Returns:
        Positions of the queries of each tile ``[n, T]`` and of the keys ``[n, R]``, the relative index of each pair
        ``[n, T, R]``, and for each query its tile and its place in it ``[L]``.
    """
    longest = (L + D - 1) // D
    T = _tile_queries(longest, S)
    tiles = (longest + T - 1) // T
    if not isinstance(L, int):
        tiles = tiles + 1  # one tile would be a case of its own to the exporter
    group = torch.arange(D, device=device).reshape(D, 1, 1)
    last = (size - group + D - 1) // D - 1  # of the dilation group
    own = torch.arange(T, device=device)
    t = torch.minimum(torch.arange(tiles, device=device).unsqueeze(1) * T + own, last)  # [D, tiles, T]
    start = _starts(t, last, K, S, masked)
    key = start[:, :, :1] + torch.arange(T - S + K, device=device)  # [D, tiles, R]
    shift = key.unsqueeze(2) - start.unsqueeze(3)
    inside = (shift >= 0) & (shift < K) & ((key >= 0) & (key <= last)).unsqueeze(2)
    relative = torch.where(inside, key.unsqueeze(2) - t.unsqueeze(3) + (K - 1), outside)
    queries, keys = (t * D + group).clamp(max=L - 1), torch.minimum(key.clamp(min=0), last) * D + group
    i = torch.arange(L, device=device)
    tile, place = i % D * tiles + i // D // T, i // D % T
    return queries.flatten(0, 1), keys.flatten(0, 1), relative.flatten(0, 1), tile, place


def _index_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: _Window,
    scale: float,
) -> Tensor:
    """Tiles by index tensors, in plain operators: for scripts and exported programs.

    No axis is split, which would bind an exported program to the number of tiles that it was recorded with.
    """
    (Kh, Kw), (Sh, Sw), (Dh, Dw) = window.kernel, window.stride, window.dilation
    bins, masked = (2 * Kh - 1) * (2 * Kw - 1), window.masked
    q_h, k_h, relative_h, tile_h, place_h = _index_axis(q.shape[1], k.shape[1], Kh, Sh, Dh, masked, bins, q.device)
    q_w, k_w, relative_w, tile_w, place_w = _index_axis(q.shape[2], k.shape[2], Kw, Sw, Dw, masked, bins, q.device)
    h, nh, nw, Tw = q.shape[3], relative_h.shape[0], relative_w.shape[0], relative_w.shape[1]
    index = relative_h[:, None, :, None, :, None] * (2 * Kw - 1) + relative_w[None, :, None, :, None, :]
    mask = _bias_table(rpb, window, q).t()[index.clamp(max=bins)]  # [nh, nw, Th, Tw, Rh, Rw, h or 1]
    mask = mask.expand(-1, -1, -1, -1, -1, -1, h).permute(0, 1, 6, 2, 3, 4, 5).flatten(5, 6).flatten(3, 4).flatten(0, 2)
    queries, values = _take(q, q_h, q_w) * scale, _take(v, k_h, k_w)
    logits = queries @ _take(k, k_h, k_w).transpose(2, 3) + mask
    if add_k is not None and add_v is not None:
        tiles = nh * nw
        others = queries @ _of_every_tile(add_k, tiles).transpose(2, 3)
        if add_bias is not None:
            bias = add_bias.expand(h, q.shape[1] * q.shape[2], -1).transpose(0, 1)
            others = others + _take(bias.reshape(1, q.shape[1], q.shape[2], h, add_bias.shape[2]), q_h, q_w)
        logits, values = torch.cat([logits, others], -1), torch.cat([values, _of_every_tile(add_v, tiles)], 2)
    out = logits.softmax(-1) @ values  # [B, tiles * h, tokens, C]
    tile = (tile_h.unsqueeze(1) * nw + tile_w).unsqueeze(2) * h + torch.arange(h, device=q.device)
    return out[:, tile, (place_h.unsqueeze(1) * Tw + place_w).unsqueeze(2)].to(v.dtype)


def _of_every_tile(t: Tensor, tiles: int) -> Tensor:
    """Additional keys or values ``[B, P, h, C]`` -> ``[B, tiles * h, P, C]``."""
    return t.to(_wide(t)).transpose(1, 2).unsqueeze(1).expand(-1, tiles, -1, -1, -1).flatten(1, 2)


def _take(t: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Tokens of every tile and head: ``[B, H, W, h, C]`` -> ``[B, tiles * h, tokens, C]``."""
    t = t.to(_wide(t))[:, rows][:, :, :, cols]  # [B, nh, m, nw, n, h, C]
    return t.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)


class _Tiles(NamedTuple):
    """Tiles of one axis with one mask: in each of ``groups`` dilation groups ``tiles`` of them, ``step`` apart.

    Positions are counted inside the dilation group.
    """

    group: int  # first dilation group
    groups: int
    query: int  # first query of the first tile
    key: int  # first key of its region
    tiles: int
    step: int
    keys: int  # of a region
    windows: tuple[int, ...]  # first key of each query's window, in the region
    other: _Tiles | None = None  # the second of two tiles that have a mask each

    @property
    def mask(self) -> tuple[int, int, tuple[int, ...]]:
        """What the mask depends on."""
        return self.key - self.query, self.keys, self.windows

    @property
    def masks(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """The masks of the tiles, if they have one each, or of all."""
        return [self.mask] if self.other is None else [self.mask, self.other.mask]

    def to_next(self, keys: bool) -> int:
        """From one tile to the next, or from one region to the next."""
        if self.other is None:
            return self.step
        return self.other.key - self.key if keys else self.other.query - self.query


@functools.lru_cache(maxsize=1024)
def _axis(L: int, size: int, K: int, S: int, D: int, masked: bool) -> tuple[_Tiles, ...]:
    """Cut an axis of ``L`` queries and ``size`` keys into tiles, those with the same mask together."""
    found: list[_Tiles] = []
    T = _tile_queries((L + D - 1) // D, S)
    lengths = [((L - g + D - 1) // D, (size - g + D - 1) // D) for g in range(D)]
    for (queries, length), run in itertools.groupby(range(D), lengths.__getitem__):
        groups = list(run)
        for t in range(0, queries, T):
            own = range(t, min(t + T, queries))
            starts = [i // S * S + S // 2 - K // 2 for i in own]
            if not masked:
                starts = [min(max(s, 0), length - K) for s in starts]
            key, end = max(starts[0], 0), min(starts[-1] + K, length)
            tile = _Tiles(groups[0], len(groups), t, key, 1, T, end - key, tuple(s - key for s in starts))
            if t > 0 and found[-1].mask == tile.mask:
                found[-1] = found[-1]._replace(tiles=found[-1].tiles + 1)
            else:
                found.append(tile)
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _paired_axis(L: int, size: int, K: int, S: int, D: int, masked: bool) -> tuple[_Tiles, ...]:
    """:func:`_axis`, with the first and the last tile together where they differ in their masks alone."""
    first, *inner = _axis(L, size, K, S, D, masked)
    if not inner:
        return (first,)
    last = inner[-1]
    alike = len(first.windows) == len(last.windows) and first.keys == last.keys
    if first.tiles > 1 or last.tiles > 1 or (first.group, first.groups) != (last.group, last.groups) or not alike:
        return (first, *inner)
    return (first._replace(tiles=2, other=last), *inner[:-1])


@functools.lru_cache(maxsize=64)
def _mask_index(rows: tuple[int, int, tuple], cols: tuple[int, int, tuple], window: _Window, device: Any) -> Tensor:
    """Place in :func:`_bias_table` of each pair of a query and a key of a tile ``[1, queries * keys]``."""
    bins = (2 * window.kernel[0] - 1) * (2 * window.kernel[1] - 1)
    axes = []
    for (offset, keys, windows), K in zip((rows, cols), window.kernel, strict=True):
        key, query, start = torch.arange(keys), torch.arange(len(windows)), torch.tensor(windows)
        shift = key - start.unsqueeze(1)
        axes.append(torch.where((shift >= 0) & (shift < K), offset + key - query.unsqueeze(1) + K - 1, bins))
    index = (axes[0] * (2 * window.kernel[1] - 1))[:, None, :, None] + axes[1][None, :, None, :]
    return index.clamp(max=bins).reshape(1, -1).to(device)


class _Piece(NamedTuple):
    """Tiles that are worked on together: some images and rows of tiles."""

    images: slice
    rows: _Tiles
    cols: _Tiles
    dilation: tuple[int, int]

    def view(self, t: Tensor, keys: bool) -> Tensor:
        """Queries or key regions of the tiles ``[B, gh, nh, gw, nw, m, n, h, C]``; regions overlap in memory."""
        t = t[self.images]
        sb, si, sj, sh, sc = t.stride()
        shape, stride, offset = [t.shape[0]], [sb], t.storage_offset()
        for tiles, s, d in ((self.rows, si, self.dilation[0]), (self.cols, sj, self.dilation[1])):
            shape += [tiles.groups, tiles.tiles]
            stride += [s, s * d * tiles.to_next(keys)]
            offset += s * (tiles.group + d * (tiles.key if keys else tiles.query))
        m, n = ((x.keys if keys else len(x.windows)) for x in (self.rows, self.cols))
        return t.as_strided(
            (*shape, m, n, *t.shape[3:]), (*stride, si * self.dilation[0], sj * self.dilation[1], sh, sc), offset
        )

    def of_one_image(self, t: Tensor) -> Tensor:
        """The view of queries of a map of which all images have the same ``[1, H, W, h, C]``."""
        return self._replace(images=slice(0, 1)).view(t, False)

    def by_mask(self, view: Tensor) -> Tensor:
        """What :meth:`view` gives, as ``[..., tiles with a mask each, h, m, n, C]``."""
        own = [axis for axis, tiles in ((2, self.rows), (4, self.cols)) if tiles.other is not None]
        return view.permute(*(axis for axis in range(5) if axis not in own), *own, 7, 5, 6, 8)

    def add(self, map_: Tensor, regions: Tensor) -> None:
        """Add key regions, laid out as by :meth:`view`, to a map: those that overlap one after the other."""
        skip_h, skip_w = -(-self.rows.keys // self.rows.step), -(-self.cols.keys // self.cols.step)
        place = self.view(map_, True)
        for i, j in itertools.product(range(min(skip_h, self.rows.tiles)), range(min(skip_w, self.cols.tiles))):
            place[:, :, i::skip_h, :, j::skip_w].add_(regions[:, :, i::skip_h, :, j::skip_w])


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: _Window, add_bias: Tensor | None, paired: bool = False
) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
    """All tiles, with the index ``[h or 1, pairs]`` and the mask of each piece.

    The mask is ``[1, h or 1, queries, keys]``, the same for all tiles of a piece; or ``[1, tiles * h, queries, keys]``
    with ``paired``, for the tiles of a piece that have one each, and then the index has no meaning.  With additional
    keys, whose bias ``[1, H, W, h, P]`` belongs to a place on the map, it is ``[1, tiles * h, queries, keys + P]``.
    """
    budget = _WORKSPACE if q.device.type == "cpu" else 64 * _WORKSPACE
    token = q.shape[3] * (k.shape[4] + v.shape[4]) * table.element_size()  # bytes of a key and its value
    more = 0 if add_bias is None else add_bias.shape[4]
    cut = _paired_axis if paired else _axis
    axes = [cut(*a, window.masked) for a in zip(q.shape[1:3], k.shape[1:3], *window[:3], strict=True)]
    for rows, cols in itertools.product(*axes):
        pairs = itertools.product(rows.masks, cols.masks)
        index = torch.stack([_mask_index(*masks, window, q.device) for masks in pairs])  # [masks, 1, pairs]
        heads = table.shape[0] if index.shape[0] == 1 else q.shape[3]
        mask = table.expand(index.shape[0], heads, -1).gather(2, index.expand(-1, heads, -1))
        mask = mask.reshape(1, -1, len(rows.windows) * len(cols.windows), rows.keys * cols.keys)
        # bytes of one row of tiles
        line = rows.groups * cols.groups * cols.tiles * (rows.keys * cols.keys + more) * token
        images = max(1, budget // (line * rows.tiles))
        lines = rows.tiles if rows.other else max(1, budget // line)
        for b, i in itertools.product(range(0, q.shape[0], images), range(0, rows.tiles, lines)):
            some = rows._replace(
                query=rows.query + i * rows.step, key=rows.key + i * rows.step, tiles=min(lines, rows.tiles - i)
            )
            piece = _Piece(slice(b, b + images), some, cols, window.dilation)
            yield (
                piece,
                index[0].expand(table.shape[0], -1),
                mask if add_bias is None else _joined_mask(piece, mask, add_bias),
            )


def _joined_mask(piece: _Piece, mask: Tensor, add_bias: Tensor) -> Tensor:
    """The mask of a window with the bias of additional keys, which every tile has its own part of."""
    others = piece.of_one_image(add_bias)
    others = others.permute(0, 1, 2, 3, 4, 7, 5, 6, 8).flatten(6, 7).flatten(0, 4)  # [tiles, h, queries, P]
    return torch.cat([mask.expand(*others.shape[:2], -1, -1), others], -1).flatten(0, 1).unsqueeze(0)


def _joined(regions: Tensor, more: Tensor) -> Tensor:
    """Key regions ``[B * tiles, h, R, C]`` with additional ones ``[B, P, h, C]``: ``[B, tiles * h, R + P, C]``."""
    regions = regions.unflatten(0, (more.shape[0], -1))
    more = more.to(regions.dtype).transpose(1, 2).unsqueeze(1).expand(-1, regions.shape[1], -1, -1, -1)
    return torch.cat([regions, more], 3).flatten(1, 2)


def _bias_map(add_k: Tensor | None, add_bias: Tensor | None, q: Tensor) -> Tensor | None:
    """Bias of additional keys as a map ``[1, H, W, h, P]``."""
    if add_k is None:
        return None
    _, H, W, h, _ = q.shape
    bias = torch.zeros((), dtype=_wide(q), device=q.device) if add_bias is None else add_bias.to(_wide(q))
    return bias.expand(h, H * W, add_k.shape[1]).unflatten(1, (H, W)).permute(1, 2, 0, 3).unsqueeze(0)


def _tiles_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: _Window,
    scale: float,
) -> Tensor:
    table = _bias_table(rpb, window, q)
    out = q.new_empty(*q.shape[:4], v.shape[4])
    # there is no fused form for values of another width, and the other rounds its scores
    dtype = q.dtype if multiplies(q) and q.shape[4] == v.shape[4] else table.dtype
    for piece, _, mask in _pieces(q, k, v, table, window, _bias_map(add_k, add_bias, q), paired=add_k is None):
        views = piece.view(q, False), piece.view(k, True), piece.view(v, True)
        place = piece.view(out, False)
        if piece.rows.other is not None or piece.cols.other is not None:
            place = piece.by_mask(place)
            heads = (piece.by_mask(t).to(dtype) for t in views)
            queries, keys, values = (
                t.reshape(-1, mask.shape[1], t.shape[-3] * t.shape[-2], t.shape[-1]) for t in heads
            )
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            place.copy_(attended.reshape(place.shape))
            continue
        tokens = (t.to(dtype).reshape(-1, t.shape[5] * t.shape[6], *t.shape[7:]) for t in views)
        queries, keys, values = (t.transpose(1, 2) for t in tokens)  # [tiles, h, tokens, C]
        if add_k is not None and add_v is not None:
            queries = queries.reshape(-1, mask.shape[1], *queries.shape[2:])
            keys, values = _joined(keys, add_k[piece.images]), _joined(values, add_v[piece.images])
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        attended = attended.reshape(-1, q.shape[3], *attended.shape[2:])
        place.copy_(attended.transpose(1, 2).reshape(place.shape))
    return out


def _gradient_of(t: Tensor | None, found: Tensor | None, q: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input; empty where there is no input."""
    return q.new_empty(0) if t is None or found is None else found.sum_to_size(t.shape).to(t.dtype).contiguous()


def _tiles_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: _Window,
    scale: float,
) -> tuple[Tensor, ...]:
    table, bias = _bias_table(rpb, window, q), _bias_map(add_k, add_bias, q)
    # of all tensors but the output, additional ones included
    inputs = (q, k, v, table, *(() if bias is None else (add_k, add_v, bias)))
    grads = [torch.zeros(t.shape, dtype=table.dtype, device=q.device) for t in inputs if t is not None]
    dq, dk, dv, dtable = grads[:4]
    for piece, index, mask in _pieces(q, k, v, table, window, bias):
        views = piece.view(q, False), piece.view(dout, False), piece.view(k, True), piece.view(v, True)
        heads = (t.permute(0, 1, 2, 3, 4, 7, 5, 6, 8).to(table.dtype) for t in views)
        q_, dout_, k_, v_ = (t.reshape(-1, q.shape[3], t.shape[6] * t.shape[7], t.shape[8]) for t in heads)
        keys = k_.shape[2]
        if add_k is not None and add_v is not None:
            q_, dout_ = (t.reshape(-1, mask.shape[1], *t.shape[2:]) for t in (q_, dout_))
            k_, v_ = _joined(k_, add_k[piece.images]), _joined(v_, add_v[piece.images])
        q_ = q_ * scale
        p = (q_ @ k_.transpose(2, 3)).add_(mask).softmax(-1)  # [tiles, h, queries, keys]
        ds = dout_ @ v_.transpose(2, 3)
        ds = ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
        found = (ds @ k_).mul_(scale), ds.transpose(2, 3) @ q_, p.transpose(2, 3) @ dout_
        if bias is not None:
            for total, part in zip(grads[4:6], found[1:], strict=True):
                more = part[:, :, keys:].unflatten(1, (-1, q.shape[3])).sum(1)  # of all tiles
                total[piece.images] += more.transpose(1, 2)
            place = piece.of_one_image(grads[6])
            more = ds[..., keys:].sum(0).reshape(*place.shape[:5], -1, *place.shape[5:7], place.shape[8])
            place += more.permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
            found, ds = (found[0], found[1][:, :, :keys], found[2][:, :, :keys]), ds[..., :keys]
        parts = (
            g.reshape(*t.shape[:5], -1, *t.shape[5:7], t.shape[8]).permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
            for g, t in zip(found, (views[0], *views[2:]), strict=True)
        )
        piece.view(dq, False).copy_(next(parts))
        piece.add(dk, next(parts))
        piece.add(dv, next(parts))
        if rpb is not None:
            dtable.scatter_add_(1, index, ds.reshape(-1, q.shape[3], *ds.shape[2:]).sum(0).flatten(1))
    drpb = dtable[:, :-1].unflatten(1, [2 * K - 1 for K in window.kernel])
    dadd_k, dadd_v, dbias = (None, None, None) if bias is None else grads[4:]
    if dbias is not None:
        dbias = dbias[0].permute(2, 0, 1, 3).flatten(1, 2)
    pairs = (dq, q), (dk, k), (dv, v), (drpb, rpb), (dadd_k, add_k), (dadd_v, add_v), (dbias, add_bias)
    return tuple(_gradient_of(t, g, q) for g, t in pairs)


@operator
def _neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    masked: bool,
    scale: float,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor]:
    window = _as_window(kernel_size, stride, dilation, masked)
    tensors = q, k, v, rpb, add_k, add_v, add_bias
    if triton_kernel:
        return kernels.kernel_forward(*tensors, window, scale)
    with without_autocast(q):
        return _tiles_forward(*tensors, window, scale), q.new_empty(0, dtype=torch.float32)


def _as_window(kernel_size: list[int], stride: list[int], dilation: list[int], masked: bool) -> _Window:
    return _Window(*map(tuple, (kernel_size, stride, dilation)), masked)  # type: ignore[arg-type, call-arg]


@torch.library.register_fake("vizoo::neighborhood_attention")
def _(q, k, v, rpb, add_k, add_v, add_bias, kernel_size, stride, dilation, masked, scale, triton_kernel):
    B, H, W, h, _ = q.shape
    lse = q.new_empty((B, h, H, W) if triton_kernel else 0, dtype=torch.float32)
    return q.new_empty(B, H, W, h, v.shape[4]), lse


@operator
def _neighborhood_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    masked: bool,
    scale: float,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    window = _as_window(kernel_size, stride, dilation, masked)
    tensors = q, k, v, rpb, add_k, add_v, add_bias
    if triton_kernel:
        dq, dk, dv, *found = kernels.kernel_backward(dout, *tensors, out, lse, window, scale)
        others = (_gradient_of(t, g, q) for t, g in zip(tensors[3:], found, strict=True))
        return dq, dk, dv, *others  # type: ignore[return-value]
    with without_autocast(q):
        return _tiles_backward(dout, *tensors, window, scale)  # type: ignore[return-value]


@torch.library.register_fake("vizoo::neighborhood_attention_backward")
def _(dout, q, k, v, rpb, add_k, add_v, add_bias, out, lse, *arguments):
    inputs = q, k, v, rpb, add_k, add_v, add_bias
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs
    )


def _save(ctx, inputs, output) -> None:
    tensors, ctx.arguments = inputs[:7], inputs[7:]
    out, lse = output
    ctx.save_for_backward(*tensors, out if ctx.arguments[-1] else lse, lse)  # only kernels need the output
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, dout, _):
    needed = ctx.needs_input_grad[:7]
    if torch.is_grad_enabled():
        *window, scale, _ = ctx.arguments
        form = functools.partial(_gather_form, window=_as_window(*window), scale=scale)
        found = plain_gradients(form, ctx.saved_tensors[:7], dout, needed)
    else:
        found = _neighborhood_attention_backward(dout, *ctx.saved_tensors, *ctx.arguments)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), *(None for _ in ctx.arguments)


torch.library.register_autograd("vizoo::neighborhood_attention", _differentiate, setup_context=_save)


def _scores(q: Any, add_k: Any, kernel_size: Any) -> int:
    return math.prod(q[:4]) * (math.prod(kernel_size) + (0 if add_k is None else add_k[1]))


@register_cost("vizoo::neighborhood_attention", torch.ops.vizoo.neighborhood_attention)
def _(q, k, v, rpb, add_k, add_v, add_bias, kernel_size, *rest, out=None) -> Cost:
    return windows_cost(_scores(q, add_k, kernel_size), q, v)


@register_cost("vizoo::neighborhood_attention_backward", torch.ops.vizoo.neighborhood_attention_backward)
def _(dout, q, k, v, rpb, add_k, add_v, add_bias, saved, lse, kernel_size, *rest, out=None) -> Cost:
    return windows_backward_cost(_scores(q, add_k, kernel_size), q, v)


def _kernel_limits(q: Tensor, v: Tensor) -> str:
    """What the Triton kernels cannot do with these inputs; empty if nothing."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    width = max(q.shape[4], v.shape[4])
    return f"the kernels take up to {MAX_CHANNELS} channels per head, not {width}" if width > MAX_CHANNELS else ""


def _natten_widths(d: int, dv: int, device: str) -> tuple[int, int]:
    """Channels of queries and values as NATTEN takes them: FlexAttention, all there is on a CPU, powers of two."""
    if device == "cuda":
        return -(-d // 8) * 8, -(-dv // 8) * 8
    width = max(8, 1 << (max(d, dv) - 1).bit_length())
    return width, width


def _natten_limits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: _Window,
) -> str:
    """What NATTEN cannot do with these inputs; empty if nothing."""
    if window.masked:
        return "NATTEN shifts windows at the border and masks no key"
    if add_bias is not None:
        return "NATTEN takes no bias of additional keys"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"NATTEN takes float32, float16 and bfloat16, not {q.dtype}"
    if min(window.kernel) < 2:
        return f"NATTEN takes windows of at least 2, not {window.kernel}"
    if q.device.type == "cuda":
        return ""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, rpb, add_k, add_v))
    ):
        return "NATTEN takes CPU tensors only without gradients and compilation"
    d = q.shape[4] + (0 if rpb is None else math.prod(window.kernel))
    return f"NATTEN takes up to 512 channels on a CPU, not {d}" if max(d, v.shape[4]) > 512 else ""


def _bias_channels(q: Tensor, k: Tensor, rpb: Tensor, window: _Window) -> tuple[Tensor, Tensor]:
    """The bias as ``Kh * Kw`` more channels of queries and keys, for kernels that know none.

    The ``K`` keys of a window are neighbours in their dilation group, so their indices modulo ``K`` are all different.
    A key has a one in the channel of its two residues, a query the bias of its own window in the order of residues:
    their product adds the entry of the table that belongs to the pair.

    Args:
        q: Scaled queries ``[B, H, W, h, d]`` of a map of at least the dilated window's size.
        k: Keys, same shape.
        rpb: Table ``[h, 2 Kh - 1, 2 Kw - 1]``.
        window: Shape of the neighbourhood.

    Returns:
        Queries and keys ``[B, H, W, h, d + Kh * Kw]``.
    """
    B, H, W, h, _ = q.shape
    ones, places = [], []
    for L, K, S, D in zip((H, W), *window[:3], strict=True):
        start, first = _window_starts(L, L, K, S, D, False, q.device)
        ones.append(F.one_hot(torch.arange(L, device=q.device) // D % K, K))  # [L, K]
        places.append(first.unsqueeze(1) + (torch.arange(K, device=q.device) - start.unsqueeze(1)) % K)  # [L, K]
    hot = (ones[0][:, None, :, None] * ones[1][None, :, None, :]).reshape(1, H, W, 1, -1).to(k.dtype)
    index = (places[0] * rpb.shape[2])[:, None, :, None] + places[1][None, :, None, :]  # [H, W, Kh, Kw]
    bias = rpb.flatten(1).index_select(1, index.reshape(-1)).reshape(h, H, W, -1).permute(1, 2, 0, 3).to(q.dtype)
    return torch.cat([q, bias.expand(B, -1, -1, -1, -1)], -1), torch.cat([k, hot.expand(B, -1, -1, h, -1)], -1)


def _natten_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    window: _Window,
    scale: float,
) -> Tensor:
    """NATTEN's kernels, which take maps of one size and some numbers of channels; only CUTLASS takes ``dv != d``."""
    H, W, dv = q.shape[1], q.shape[2], v.shape[4]
    q = F.pad(q * scale, [0, 0, 0, 0, 0, k.shape[2] - W, 0, k.shape[1] - H])
    if rpb is not None:
        q, k = _bias_channels(q, k, rpb, window)
    width, width_v = _natten_widths(q.shape[4], dv, q.device.type)
    q, k, v = (F.pad(t, [0, n - t.shape[4]]) for t, n in ((q, width), (k, width), (v, width_v)))
    options: dict[str, Any] = {}
    if add_k is not None and add_v is not None:  # zeros in the channels of the bias, too
        options["additional_keys"] = F.pad(add_k, [0, width - add_k.shape[3]])
        options["additional_values"] = F.pad(add_v, [0, width_v - dv])
    if width != width_v:  # plain attention is for one window that is the map, and for additional keys
        options |= {"backend": "cutlass-fna", "attention_kwargs": {"backend": "cutlass-fmha"}}
    kernel_size, stride, dilation, _ = window
    out = load_natten().na2d(q, k, v, kernel_size, stride=stride, dilation=dilation, scale=1.0, **options)
    return out[:, :H, :W, :, :dv]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_bias: Tensor | None = None,
    boundary: str = "shift",
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_neighborhood_attention` by fused attention or kernels: same result and errors.

    Args:
        q: Queries ``[B, H, W, h, d]``.
        k: Keys, same shape and dtype.
        v: Values ``[B, H, W, h, dv]``, same dtype.
        kernel_size: Side of the window, or its rows and columns.
        stride: Queries that share a window.
        dilation: Distance between neighbouring keys of a window.
        rpb: Bias by relative position ``[h, 2 Kh - 1, 2 Kw - 1]``.
        scale: Factor of the logits; None is ``d ** -0.5``.
        pad_k: Key ``[h, d]`` that pads a map smaller than ``kernel_size * dilation``.
        pad_v: The value ``[h, dv]`` that belongs to it.
        additional_keys: Keys ``[B or 1, P, h, d]`` that every query sees beside its window, in the same softmax.
        additional_values: Their values ``[B or 1, P, h, dv]``.
        additional_bias: Bias of their logits ``[h or 1, H * W or 1, P]``.
        boundary: At the border ``"shift"`` moves windows into the map, ``"mask"`` masks their keys outside.
        backend: ``"torch"``, ``"triton"`` (no float64, ``d, dv <= 128``), ``"natten"`` (no float64, no window of 1, no
            mask, no bias of additional keys, on CPU tensors only without gradients), or ``"auto"``: for CUDA tensors
            NATTEN, Triton where that cannot run; otherwise PyTorch.

    Returns:
        ``[B, H, W, h, dv]`` in the dtype of ``q``.

    Raises:
        ValueError: If an argument is outside its range, shapes or dtypes do not fit each other, or ``backend`` cannot
            run.
    """
    window = _window(kernel_size, stride, dilation, boundary)
    _check(q, k, v, window, rpb, pad_k, pad_v)
    _check_additional(q, v, additional_keys, additional_values, additional_bias)
    add_k, add_v, add_bias = _of_every_image(additional_keys, q), _of_every_image(additional_values, q), additional_bias
    k, v = _padded(k, pad_k, window), _padded(v, pad_v, window)
    factor = q.shape[4] ** -0.5 if scale is None else scale
    if not torch.jit.is_scripting():
        natten = _natten_limits(q, k, v, rpb, add_k, add_v, add_bias, window)
        chosen = choose_backend(backend, q, {"natten": natten, "triton": _kernel_limits(q, v)})
        if chosen == "natten":
            return _natten_form(q, k, v, rpb, add_k, add_v, window, factor)
        tensors = q, k, v, rpb, add_k, add_v, add_bias
        if not plain_only():
            return _neighborhood_attention(*tensors, *window, factor, chosen == "triton")[0]
        form = _gather_form if is_transforming() else _index_form
        with without_autocast(q):
            return form(*tensors, window, factor)
    return _index_form(q, k, v, rpb, add_k, add_v, add_bias, window, factor)
