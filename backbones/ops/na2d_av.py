"""Neighbourhood weighted sum: every query adds up the values of its own ``K x K`` window (OverLoCK, Sec. 3.3).

On an axis of length ``L`` the window of position ``i`` starts at ``s(i) = min(max(i - (K - 1) / 2, 0), L - K)``: it is
shifted to stay inside the map, never padded, so a corner query sees the same ``K^2`` values as its neighbours.

    out[i, j] = sum over p, r in [0, K) of attn[i, j, p * K + r] * value[s(i) + p, s(j) + r]

With ``N = H * W`` queries and ``C`` channels per group this costs ``N K^2 C`` multiply-accumulates per group.  This is
the operator that NATTEN called ``na2d_av`` up to release 0.17.

The reference gathers the ``N K^2 C`` values of all windows.  The fast forms avoid that by batching the queries that
share values into one matrix product: those with the same window, where an axis has few distinct windows (it has
``L - K + 1``), or those of a small tile, whose weights are scattered into a matrix over the tile's whole region.
The Triton kernels store nothing but the output.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from .backend import KernelModule, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_na2d_av_kernels")
MAX_CHANNELS = 64  # of a group, for the Triton kernels: a tile of values has to fit into registers


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


def _check(attn: Tensor, value: Tensor, kernel_size: int) -> None:
    if value.dim() != 5:
        raise ValueError(f"got value of shape {list(value.shape)}, need [B, G, H, W, C]")
    check_window(value.shape[2], value.shape[3], kernel_size)
    need = [value.shape[0], value.shape[1], value.shape[2], value.shape[3], kernel_size * kernel_size]
    if list(attn.shape) != need:
        raise ValueError(f"got attn of shape {list(attn.shape)}, need {need} for value {list(value.shape)}")


def window_starts(L: int, kernel_size: int, device: torch.device) -> Tensor:
    """First position ``s(i)`` of the window of each position on an axis: ``[L]`` (int64)."""
    return (torch.arange(L, device=device) - (kernel_size - 1) // 2).clamp(0, L - kernel_size)


def _gather_form(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    B, G, H, W, C = value.shape
    offset = torch.arange(kernel_size, device=value.device)
    rows = window_starts(H, kernel_size, value.device).unsqueeze(1) + offset  # [H, K]
    cols = window_starts(W, kernel_size, value.device).unsqueeze(1) + offset  # [W, K]
    index = (rows * W).reshape(H, 1, kernel_size, 1) + cols.reshape(1, W, 1, kernel_size)  # [H, W, K, K]
    windows = value.flatten(2, 3)[:, :, index.flatten(2)]  # [B, G, H, W, K * K, C]
    return (attn.to(value.dtype).unsqueeze(4) @ windows).squeeze(4)


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
    if not torch.jit.is_scripting():
        with without_autocast(value):
            return _gather_form(attn, value, kernel_size)
    return _gather_form(attn, value, kernel_size)


def _sizes(spans: list[tuple[int, int]]) -> list[int]:
    return [last - first for first, last in spans]


def _spans(L: int, kernel_size: int) -> list[tuple[int, int]]:
    """First and last + 1 query of each distinct window on an axis; the index in the list is the window's start."""
    if kernel_size == L:
        return [(0, L)]
    half = (kernel_size - 1) // 2
    spans = [(0, half + 1)]
    for start in range(1, L - kernel_size):
        spans.append((start + half, start + half + 1))
    spans.append((L - 1 - half, L))
    return spans


def _windows_form(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """One matrix product for each distinct window: ``[b, H, W, K*K]`` and ``[b, H, W, C]`` -> ``[b, H, W, C]``."""
    b, H, W, C = value.shape
    K = kernel_size
    rows, cols = _sizes(_spans(H, K)), _sizes(_spans(W, K))
    out = []
    for i, band in enumerate(attn.split(rows, 1)):
        line = []
        for j, p in enumerate(band.split(cols, 2)):
            window = value[:, i : i + K, j : j + K].reshape(b, K * K, C)
            line.append((p.reshape(b, rows[i] * cols[j], K * K) @ window).reshape(b, rows[i], cols[j], C))
        out.append(torch.cat(line, 2))
    return torch.cat(out, 1)


def _windows_backward(grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    b, H, W, C = value.shape
    K = kernel_size
    dattn = torch.empty_like(attn, memory_format=torch.contiguous_format)
    dvalue = torch.zeros(value.shape, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
    for i, (i0, i1) in enumerate(_spans(H, K)):
        for j, (j0, j1) in enumerate(_spans(W, K)):
            window = value[:, i : i + K, j : j + K].reshape(b, K * K, C)
            g = grad[:, i0:i1, j0:j1].reshape(b, -1, C)
            p = attn[:, i0:i1, j0:j1].reshape(b, -1, K * K)
            dattn[:, i0:i1, j0:j1] = (g @ window.transpose(1, 2)).reshape(b, i1 - i0, j1 - j0, K * K)
            dvalue[:, i : i + K, j : j + K] += (p.transpose(1, 2) @ g).reshape(b, K, K, C)
    return dattn, dvalue.to(value.dtype)


def _axis(L: int, kernel_size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the region of every tile on an axis, and where in it each query's window starts.

    Args:
        L: Length of the axis.
        kernel_size: Side ``K`` of the window.
        tile: Queries ``T`` of a tile; surplus queries of the last tile repeat the last position.
        device: Device of the result.

    Returns:
        Positions ``[n, R]`` with ``R = min(T + K - 1, L)``, and shifts ``[n, T]``, both int64.
    """
    n, R = (L + tile - 1) // tile, min(tile + kernel_size - 1, L)
    starts = window_starts(L, kernel_size, device)
    starts = starts[torch.arange(n * tile, device=device).clamp(max=L - 1)].reshape(n, tile)
    first = starts[:, :1].clamp(max=L - R)
    return first + torch.arange(R, device=device), starts - first


def _to_tiles(t: Tensor, th: int, tw: int) -> Tensor:
    """``[b, H, W, X]`` -> ``[b, tiles, th * tw, X]``, zero where the last tiles stand out of the map."""
    b, H, W, X = t.shape
    pad_h, pad_w = (th - H % th) % th, (tw - W % tw) % tw
    if pad_h > 0 or pad_w > 0:
        t = F.pad(t, [0, 0, 0, pad_w, 0, pad_h])
    nh, nw = (H + pad_h) // th, (W + pad_w) // tw
    return t.reshape(b, nh, th, nw, tw, X).transpose(2, 3).reshape(b, nh * nw, th * tw, X)


def _from_tiles(t: Tensor, H: int, W: int, th: int, tw: int) -> Tensor:
    """Inverse of :func:`_to_tiles`."""
    nh, nw = (H + th - 1) // th, (W + tw - 1) // tw
    t = t.reshape(t.shape[0], nh, nw, th, tw, t.shape[3]).transpose(2, 3)
    return t.reshape(t.shape[0], nh * th, nw * tw, t.shape[5])[:, :H, :W]


def _tile_index(
    H: int, W: int, kernel_size: int, th: int, tw: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[nh, Rh]`` and columns ``[nw, Rw]`` of the regions, and each weight's place in its region.

    The last is ``[1, nh * nw, th * tw, K * K]`` with values below ``Rh * Rw``.
    """
    rows, shift_h = _axis(H, kernel_size, th, device)
    cols, shift_w = _axis(W, kernel_size, tw, device)
    nh, nw, K = rows.shape[0], cols.shape[0], kernel_size
    offset = torch.arange(K, device=device)
    down = (shift_h.unsqueeze(2) + offset) * cols.shape[1]  # [nh, th, K]
    right = shift_w.unsqueeze(2) + offset  # [nw, tw, K]
    index = down.reshape(nh, 1, th, 1, K, 1) + right.reshape(1, nw, 1, tw, 1, K)
    return rows, cols, index.reshape(1, nh * nw, th * tw, K * K)


def _regions(value: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Values of every tile's region: ``[b, H, W, C]`` -> ``[b, tiles, Rh * Rw, C]``."""
    b, C = value.shape[0], value.shape[3]
    nh, Rh, nw, Rw = rows.shape[0], rows.shape[1], cols.shape[0], cols.shape[1]
    t = value.index_select(1, rows.reshape(-1)).index_select(2, cols.reshape(-1))
    return t.reshape(b, nh, Rh, nw, Rw, C).transpose(2, 3).reshape(b, nh * nw, Rh * Rw, C)


def _tiles_form(attn: Tensor, value: Tensor, kernel_size: int, th: int, tw: int) -> Tensor:
    """One product per tile of queries: ``[b, H, W, K*K]`` and ``[b, H, W, C]`` -> ``[b, H, W, C]``."""
    H, W = value.shape[1], value.shape[2]
    rows, cols, index = _tile_index(H, W, kernel_size, th, tw, value.device)
    p = _to_tiles(attn, th, tw)
    dense = p.new_zeros(p.shape[0], p.shape[1], p.shape[2], rows.shape[1] * cols.shape[1])
    dense = dense.scatter(3, index.expand(p.shape), p)
    return _from_tiles(dense @ _regions(value, rows, cols), H, W, th, tw)


def _tiles_backward(
    grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int, th: int, tw: int
) -> tuple[Tensor, Tensor]:
    b, H, W, C = value.shape
    rows, cols, index = _tile_index(H, W, kernel_size, th, tw, value.device)
    nh, Rh, nw, Rw = rows.shape[0], rows.shape[1], cols.shape[0], cols.shape[1]
    g, p = _to_tiles(grad, th, tw), _to_tiles(attn, th, tw)
    index = index.expand(p.shape)
    dense = p.new_zeros(b, nh * nw, th * tw, Rh * Rw).scatter_(3, index, p)
    dattn = (g @ _regions(value, rows, cols).transpose(2, 3)).gather(3, index)
    dregions = (dense.transpose(2, 3) @ g).to(torch.promote_types(value.dtype, torch.float32))
    dregions = dregions.reshape(b, nh, nw, Rh, Rw, C).transpose(2, 3).reshape(b, nh * Rh, nw * Rw, C)
    dvalue = dregions.new_zeros(b, nh * Rh, W, C).index_add_(2, cols.reshape(-1), dregions)
    dvalue = dvalue.new_zeros(b, H, W, C).index_add_(1, rows.reshape(-1), dvalue)
    return _from_tiles(dattn, H, W, th, tw), dvalue.to(value.dtype)


def _tile_size(H: int, W: int, kernel_size: int) -> tuple[int, int]:
    """Tile of the fastest form: ``(0, 0)`` for one product per distinct window, ``(H, W)`` for one tile."""
    windows = (H - kernel_size + 1) * (W - kernel_size + 1)
    queries = H * W
    if windows == 1:
        return 0, 0
    if queries <= 128:  # a product over the whole map costs less than to cut it up
        return H, W
    if windows <= 16:
        return 0, 0
    if queries <= 2 * kernel_size * kernel_size:
        return H, W
    return 4, 4  # tiles of 6 or 8 are no faster


def matmul_na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """:func:`reference_na2d_av` by matrix products, in plain differentiable torch, without its checks and casts.

    Args:
        attn: ``[B, G, H, W, K * K]`` in the dtype of ``value``.
        value: ``[B, G, H, W, C]``.
        kernel_size: Side ``K`` of the window.

    Returns:
        ``[B, G, H, W, C]``.
    """
    B, G, H, W, C = value.shape
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt):  # tiles would bind a program to its sizes
            return _gather_form(attn, value, kernel_size)
    th, tw = _tile_size(H, W, kernel_size)
    attn, value = attn.reshape(B * G, H, W, kernel_size * kernel_size), value.reshape(B * G, H, W, C)
    if th == 0:
        return _windows_form(attn, value, kernel_size).reshape(B, G, H, W, C)
    return _tiles_form(attn, value, kernel_size, th, tw).reshape(B, G, H, W, C)


def _matmul_backward(grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    B, G, H, W, C = value.shape
    th, tw = _tile_size(H, W, kernel_size)
    grad, values = grad.reshape(B * G, H, W, C), value.reshape(B * G, H, W, C)
    weights = attn.reshape(B * G, H, W, kernel_size * kernel_size)
    if th == 0:
        dattn, dvalue = _windows_backward(grad, weights, values, kernel_size)
    else:
        dattn, dvalue = _tiles_backward(grad, weights, values, kernel_size, th, tw)
    return dattn.reshape(attn.shape), dvalue.reshape(value.shape)


@operator
def _na2d_av(attn: Tensor, value: Tensor, kernel_size: int, triton_kernel: bool) -> Tensor:
    if triton_kernel:
        return kernels.kernel_forward(attn, value, kernel_size)
    with without_autocast(value):
        return matmul_na2d_av(attn, value, kernel_size).contiguous()


@torch.library.register_fake("vizoo::na2d_av")
def _(attn: Tensor, value: Tensor, kernel_size: int, triton_kernel: bool) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@operator
def _na2d_av_backward(
    grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int, triton_kernel: bool
) -> tuple[Tensor, Tensor]:
    if triton_kernel:
        return kernels.kernel_backward(grad, attn, value, kernel_size)
    with without_autocast(value):
        dattn, dvalue = _matmul_backward(grad, attn, value, kernel_size)
        return dattn.contiguous(), dvalue.contiguous()


@torch.library.register_fake("vizoo::na2d_av_backward")
def _(grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int, triton_kernel: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(attn, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
    )


def _save(ctx, inputs, output) -> None:
    attn, value, ctx.kernel_size, ctx.triton_kernel = inputs
    ctx.save_for_backward(attn, value)


def _differentiate(ctx, grad):
    if torch.is_grad_enabled():
        form = functools.partial(matmul_na2d_av, kernel_size=ctx.kernel_size)
        return *plain_gradients(form, ctx.saved_tensors, grad, ctx.needs_input_grad[:2]), None, None
    return *_na2d_av_backward(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.triton_kernel), None, None


torch.library.register_autograd("vizoo::na2d_av", _differentiate, setup_context=_save)


@register_cost("vizoo::na2d_av", torch.ops.vizoo.na2d_av)
def _(attn, value, kernel_size, triton_kernel, out=None) -> Cost:
    B, G, H, W, C = value
    return Cost(macs=B * G * H * W * kernel_size**2 * C)


@register_cost("vizoo::na2d_av_backward", torch.ops.vizoo.na2d_av_backward)
def _(grad, attn, value, kernel_size, triton_kernel, out=None) -> Cost:
    B, G, H, W, C = value
    return Cost(macs=2 * B * G * H * W * kernel_size**2 * C)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int, backend: str = "auto") -> Tensor:
    """:func:`reference_na2d_av` by matrix products or Triton kernels: same result and errors.

    Args:
        attn: Weights ``[B, G, H, W, K * K]``.
        value: Values ``[B, G, H, W, C]``.
        kernel_size: Side ``K`` of the window.
        backend: ``"torch"``, ``"triton"`` (no float64, ``C <= 64``), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, G, H, W, C]`` in the dtype of ``value``.

    Raises:
        ValueError: If the window does not fit the map, ``attn`` does not fit ``value``, or ``backend`` cannot run.
    """
    _check(attn, value, kernel_size)
    attn = attn.to(value.dtype)
    if not torch.jit.is_scripting():
        use = use_triton(backend, value, kernel_limits(value, value.shape[4]))
        if not plain_only():
            return _na2d_av(attn, value, kernel_size, use)
    return matmul_na2d_av(attn, value, kernel_size)


def kernel_limits(x: Tensor, C: int) -> str:
    """What the Triton kernels cannot do with groups of ``C`` channels in the dtype of ``x``; empty if nothing."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    return f"the kernels take up to {MAX_CHANNELS} channels per group, not {C}" if C > MAX_CHANNELS else ""
