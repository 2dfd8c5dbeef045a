"""Triton kernels of ULSAM's logits and attention: see ``ulsam.py`` for the formulas.

For the logits a program owns some rows and columns of the map, for all channels of a group, and walks down the rows:
the maximum of three columns is taken once for each row, and those of three rows then make that of a window.  Neighbours
to the left and right are read again, from the nearest cache.  The backward pass walks in the same way: a row of windows
gives to three rows of elements, of which one is complete with each step.  For the attention a program owns a group of
an image.  No sum depends on the order of programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._kernels import all_registers, power_of_two
from .backend import HAS_TRITON, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    NONE = tl.constexpr(9)  # place of the maximum of a window that has nothing above zero
    ALL = tl.constexpr(tl.PropagateNan.ALL)

    _COUNTS = ("g", "H", "W", "N", "row_tiles", "col_tiles")  # 1 or a multiple of 16 is no reason to compile

    def _jit(function):
        return triton.jit(function, do_not_specialize=[n for n in _COUNTS if n in function.__code__.co_varnames])

    @triton.jit
    def _tile(g, row_tiles, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
        """Image (int64), group, number of the tile in its image, first row and columns of a program."""
        pid = tl.program_id(0)
        group, rest = pid % g, pid // g
        tile = rest % (row_tiles * col_tiles)
        b = (rest // (row_tiles * col_tiles)).to(tl.int64)
        return b, group, tile, tile // col_tiles * ROWS, tile % col_tiles * COLS + tl.arange(0, COLS)

    @triton.jit
    def _larger(a, place_a, b, place_b):
        """Elementwise the larger one and its place: of equals the first, and NaN over all, as in PyTorch."""
        place = tl.where((b > a) | (b != b), place_b, place_a)
        return tl.maximum(a, b, propagate_nan=ALL), place

    @triton.jit
    def _activated(p, scale, shift, m_n, m_c, AFFINE: tl.constexpr):
        """Elements ``[columns, channels]`` before the ReLU, in float32; 0, which changes no maximum, off the map."""
        m = m_n[:, None] & m_c[None, :]
        x = tl.load(p, mask=m, other=0.0).to(tl.float32)
        return tl.where(m, x * scale[None, :] + shift[None, :], 0.0) if AFFINE else x

    @_jit
    def ulsam_fwd_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        logits_ptr,
        place_ptr,
        g,
        H,
        W,
        row_tiles,
        col_tiles,
        stride_b,
        stride_c,
        stride_n,
        G: tl.constexpr,
        INDEX: tl.constexpr,
        AFFINE: tl.constexpr,
        SAVE: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Place of a maximum: 0 to 8 row by row, ``NONE`` where it is not above 0."""
        b, group, _, top, col = _tile(g, row_tiles, col_tiles, ROWS, COLS)
        c = tl.arange(0, BLOCK_C)
        m_c = c < G
        left, middle, right = (col > 0) & (col <= W), col < W, col + 1 < W
        channel = group * G + c
        weight = tl.load(weight_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
        scale, shift = weight, weight
        if AFFINE:
            scale = tl.load(scale_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + group).to(tl.float32)
        element = channel.to(INDEX)[None, :] * stride_c + col.to(INDEX)[:, None] * stride_n
        x_ptr += b * stride_b
        place_ptr += b * stride_b
        logits_ptr += (b * g + group) * H * W
        above = tl.zeros((COLS, BLOCK_C), tl.float32)
        place_above = tl.zeros((COLS, BLOCK_C), tl.int32)
        best, place_best = above, place_above
        for step in tl.static_range(ROWS + 2):
            row = top + step - 1
            m_row = (row >= 0) & (row < H)
            p = x_ptr + (row.to(INDEX) * W * stride_n + element)
            below = _activated(p - stride_n, scale, shift, left & m_row, m_c, AFFINE)
            place = tl.zeros((COLS, BLOCK_C), tl.int32)
            a = _activated(p, scale, shift, middle & m_row, m_c, AFFINE)
            below, place = _larger(below, place, a, 1)
            a = _activated(p + stride_n, scale, shift, right & m_row, m_c, AFFINE)
            below, place = _larger(below, place, a, 2)
            if step >= 2:
                peak, at = _larger(above, place_above, best, place_best + 3)
                peak, at = _larger(peak, at, below, place + 6)
                at = tl.where(peak <= 0, NONE, at)
                peak = tl.maximum(peak, 0.0, propagate_nan=ALL)
                centre = row - 1
                m = middle & (centre < H)
                logits = tl.sum(peak * weight[None, :], 1) + bias
                tl.store(logits_ptr + (centre * W + col), logits.to(logits_ptr.dtype.element_ty), mask=m)
                if SAVE:
                    p = place_ptr + (centre.to(INDEX) * W * stride_n + element)
                    tl.store(p, at.to(tl.int8), mask=m[:, None] & m_c[None, :])
            above, place_above = best, place_best
            best, place_best = below, place

    @triton.jit
    def _given(place, dlogits, K: tl.constexpr):
        """What windows with these gradients give to their neighbours in place ``K``."""
        return tl.where(place == K, dlogits[:, None], 0.0)

    @_jit
    def ulsam_bwd_kernel(
        dlogits_ptr,
        x_ptr,
        weight_ptr,
        scale_ptr,
        place_ptr,
        dx_ptr,
        sums_ptr,
        g,
        H,
        W,
        row_tiles,
        col_tiles,
        stride_b,
        stride_c,
        stride_n,
        G: tl.constexpr,
        INDEX: tl.constexpr,
        AFFINE: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Gradient ``d`` of the activated map times its factors, and sums of ``d x``, of ``d`` and of ``dlogits``."""
        b, group, tile, top, col = _tile(g, row_tiles, col_tiles, ROWS, COLS)
        c = tl.arange(0, BLOCK_C)
        m_c = c < G
        left, middle, right = (col > 0) & (col <= W), col < W, col + 1 < W
        channel = group * G + c
        factor = tl.load(weight_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
        if AFFINE:
            factor *= tl.load(scale_ptr + channel, mask=m_c, other=0.0).to(tl.float32)
        element = channel.to(INDEX)[None, :] * stride_c + col.to(INDEX)[:, None] * stride_n
        x_ptr += b * stride_b
        place_ptr += b * stride_b
        dx_ptr += b * stride_b
        dlogits_ptr += (b * g + group) * H * W
        # of the rows above the windows and of their own, those below get nothing before
        above = tl.zeros((COLS, BLOCK_C), tl.float32)
        same, total, product = above, above, above
        total_dlogits = tl.zeros((COLS,), tl.float32)
        for step in tl.static_range(ROWS + 2):
            row = top + step - 1
            m_row = (row >= 0) & (row < H)
            p = place_ptr + (row.to(INDEX) * W * stride_n + element)
            p_d = dlogits_ptr + (row * W + col)
            m = left & m_row
            place = tl.load(p - stride_n, mask=m[:, None] & m_c[None, :], other=9)
            dlogits = tl.load(p_d - 1, mask=m, other=0.0).to(tl.float32)
            above += _given(place, dlogits, 2)
            same += _given(place, dlogits, 5)
            below = _given(place, dlogits, 8)
            m = middle & m_row
            place = tl.load(p, mask=m[:, None] & m_c[None, :], other=9)
            dlogits = tl.load(p_d, mask=m, other=0.0).to(tl.float32)
            if step >= 1 and step <= ROWS:
                total_dlogits += dlogits
            above += _given(place, dlogits, 1)
            same += _given(place, dlogits, 4)
            below += _given(place, dlogits, 7)
            m = right & m_row
            place = tl.load(p + stride_n, mask=m[:, None] & m_c[None, :], other=9)
            dlogits = tl.load(p_d + 1, mask=m, other=0.0).to(tl.float32)
            above += _given(place, dlogits, 0)
            same += _given(place, dlogits, 3)
            below += _given(place, dlogits, 6)
            if step >= 2:
                centre = row - 1
                m_x = (middle & (centre < H))[:, None] & m_c[None, :]
                offset = centre.to(INDEX) * W * stride_n + element
                d = tl.where(m_x, above, 0.0)
                x = tl.load(x_ptr + offset, mask=m_x, other=0.0).to(tl.float32)
                tl.store(dx_ptr + offset, (d * factor[None, :]).to(dx_ptr.dtype.element_ty), mask=m_x)
                product += d * x
                if AFFINE:
                    total += d
            above, same = same, below
        C = g * G
        sums_ptr += (b * row_tiles * col_tiles + tile) * ((2 * C if AFFINE else C) + g)
        tl.store(sums_ptr + group, tl.sum(total_dlogits, 0))
        tl.store(sums_ptr + g + channel, tl.sum(product, 0), mask=m_c)
        if AFFINE:
            tl.store(sums_ptr + g + C + channel, tl.sum(total, 0), mask=m_c)

    @triton.jit
    def _attention(logits_ptr, m_n, BLOCK_N: tl.constexpr):
        """Logits of a whole map and their softmax after the ReLU: ``[BLOCK_N]`` each, 0 past the map."""
        logits = tl.load(logits_ptr + tl.arange(0, BLOCK_N), mask=m_n, other=0.0).to(tl.float32)
        positive = tl.maximum(logits, 0.0, propagate_nan=ALL)
        e = tl.where(m_n, tl.exp(positive - tl.max(positive, 0)), 0.0)
        return logits, e / tl.sum(e, 0)

    @_jit
    def attention_fwd_kernel(
        x_ptr,
        logits_ptr,
        out_ptr,
        g,
        N,
        stride_b,
        stride_c,
        stride_n,
        G: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One group of one image."""
        b, group = (tl.program_id(0) // g).to(tl.int64), tl.program_id(0) % g
        n = tl.arange(0, BLOCK_N)
        m_n = n < N
        _, attention = _attention(logits_ptr + (b * g + group) * N, m_n, BLOCK_N)
        for first in range(0, G, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m = m_n[:, None] & (c < G)[None, :]
            element = (group * G + c).to(INDEX)[None, :] * stride_c + n.to(INDEX)[:, None] * stride_n
            x = tl.load(x_ptr + b * stride_b + element, mask=m, other=0.0).to(tl.float32)
            out = x + attention[:, None] * x
            tl.store(out_ptr + b * stride_b + element, out.to(out_ptr.dtype.element_ty), mask=m)

    @_jit
    def attention_bwd_kernel(
        dout_ptr,
        x_ptr,
        logits_ptr,
        dx_ptr,
        dlogits_ptr,
        g,
        N,
        stride_b,
        stride_c,
        stride_n,
        G: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One group of one image: ``dx`` on the way through the channels, over which the map's gradient is summed."""
        b, group = (tl.program_id(0) // g).to(tl.int64), tl.program_id(0) % g
        n = tl.arange(0, BLOCK_N)
        m_n = n < N
        offset = (b * g + group) * N
        logits, attention = _attention(logits_ptr + offset, m_n, BLOCK_N)
        product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for first in range(0, G, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m = m_n[:, None] & (c < G)[None, :]
            element = (group * G + c).to(INDEX)[None, :] * stride_c + n.to(INDEX)[:, None] * stride_n
            x = tl.load(x_ptr + b * stride_b + element, mask=m, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + b * stride_b + element, mask=m, other=0.0).to(tl.float32)
            product += dout * x
            dx = dout + attention[:, None] * dout
            tl.store(dx_ptr + b * stride_b + element, dx.to(dx_ptr.dtype.element_ty), mask=m)
        d = tl.sum(product, 1)
        d = attention * (d - tl.sum(attention * d, 0))
        d = tl.where(logits <= 0, 0.0, d)
        tl.store(dlogits_ptr + offset + n, d.to(dlogits_ptr.dtype.element_ty), mask=m_n)


class Tiles(NamedTuple):
    """How a map is cut: rows, columns and channels of a tile, and the warps of its program."""

    rows: int
    cols: int
    channels: int
    warps: int


# most rows, most elements of a row and elements of a row for each warp, by compute capability; chosen by the machine
# code for 9.0 (no spill, then the fewest instructions times warps), not by measured times
CHOICES = {90: {"forward": (8, 1024, 256), "backward": (8, 1024, 128)}}
ATTENTION_CHOICES = {90: 4096}  # elements of a tile, chosen in the same way


def _tiles(kernel: str, G: int, H: int, W: int) -> Tiles:
    """Equal tiles of rows; columns and channels as the powers of two that hold them, but no more than fit."""
    rows, elements, elements_of_warp = CHOICES[90][kernel]  # elsewhere the same until something is measured there
    channels = power_of_two(G, 1)
    cols = min(power_of_two(W, 1), max(1, elements // channels))
    warps = max(1, cols * channels // elements_of_warp)
    return Tiles(max(1, -(-H // max(1, -(-H // rows)))), cols, channels, warps)


class _Launch:
    def __init__(self, kernel: str, x: Tensor, weight: Tensor, scale: Tensor | None):
        B, C, H, W = x.shape
        g = weight.shape[0]
        tiles = _tiles(kernel, C // g, H, W)
        self.row_tiles, self.col_tiles = -(-H // tiles.rows), -(-W // tiles.cols)
        self.programs = B * g * self.row_tiles * self.col_tiles
        self.device, self.registers = x, all_registers(tiles.warps)
        weight = weight.contiguous()
        self.arguments: dict[str, Any] = {
            "x_ptr": x,
            "weight_ptr": weight,
            "scale_ptr": weight if scale is None else scale.contiguous(),
            "g": g,
            "H": H,
            "W": W,
            "row_tiles": self.row_tiles,
            "col_tiles": self.col_tiles,
            "stride_b": x.stride(0),
            "stride_c": x.stride(1),
            "stride_n": x.stride(3),
            "G": C // g,
            "INDEX": index_type(x),
            "AFFINE": scale is not None,
            "ROWS": tiles.rows,
            "COLS": tiles.cols,
            "BLOCK_C": tiles.channels,
            "num_warps": tiles.warps,
        }

    def run(self, kernel, **arguments) -> None:
        if self.programs > 0:
            with on_device(self.device):
                kernel[(self.programs,)](**self.arguments, **arguments)


def kernel_forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, g, H, W]`` and, for the backward pass, the place of every maximum; empty unless ``save``."""
    logits = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    place = torch.empty_like(x, dtype=torch.int8) if save else x.new_empty(0, dtype=torch.int8)
    launch = _Launch("forward", x, weight, scale)
    shift_ptr = launch.arguments["scale_ptr"] if shift is None else shift.contiguous()
    launch.run(
        ulsam_fwd_kernel,
        bias_ptr=bias.contiguous(),
        shift_ptr=shift_ptr,
        logits_ptr=logits,
        place_ptr=place,
        SAVE=save,
        **launch.registers,
    )
    return logits, place


def kernel_backward(
    dlogits: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, place: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``x``, and sums over images and positions: of ``dlogits`` ``[g]``, ``d x`` and ``d`` ``[C]`` each."""
    dx = torch.empty_like(x)
    launch = _Launch("backward", x, weight, scale)
    g, C = weight.shape[0], x.shape[1]
    tiles = x.shape[0] * launch.row_tiles * launch.col_tiles
    sums = torch.empty(tiles, g + (C if scale is None else 2 * C), dtype=torch.float32, device=x.device)
    launch.run(ulsam_bwd_kernel, dlogits_ptr=dlogits.contiguous(), place_ptr=place, dx_ptr=dx, sums_ptr=sums)
    return dx, sums.sum(0)


def _launch_attention(kernel, x: Tensor, g: int, **arguments) -> None:
    B, C, H, W = x.shape
    BLOCK_N = power_of_two(H * W, 1)
    BLOCK_C = max(1, min(ATTENTION_CHOICES[90] // BLOCK_N, power_of_two(C // g, 1)))
    if x.numel() > 0:
        with on_device(x):
            kernel[(B * g,)](
                x_ptr=x,
                g=g,
                N=H * W,
                stride_b=x.stride(0),
                stride_c=x.stride(1),
                stride_n=x.stride(3),
                G=C // g,
                INDEX=index_type(x),
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                num_warps=max(1, BLOCK_N * BLOCK_C // 512),
                **arguments,
            )


def attention_forward(x: Tensor, logits: Tensor) -> Tensor:
    """``x`` and what every position and group adds to it: shape and strides of ``x``."""
    out = torch.empty_like(x)
    _launch_attention(attention_fwd_kernel, x, logits.shape[1], logits_ptr=logits.contiguous(), out_ptr=out)
    return out


def attention_backward(dout: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x``, with the strides that it shares with ``dout``, and of the logits."""
    dx, logits = torch.empty_like(x), logits.contiguous()
    dlogits = torch.empty_like(logits)
    arguments = {"dout_ptr": dout, "logits_ptr": logits, "dx_ptr": dx, "dlogits_ptr": dlogits}
    _launch_attention(attention_bwd_kernel, x, logits.shape[1], **arguments)
    return dx, dlogits
