"""Triton kernels of depthwise convolution: products with banded matrices, which tensor cores do.

A row of the map and a row of a kernel are convolved by a product ``[columns read] x [columns read, columns written]``
with a matrix that holds the kernel's row on its diagonals (Toeplitz).  A program has one channel, ``ROWS`` rows of the
output, and many images, with all tiles of their columns, as the rows of its products.  It walks over the rows of the
input, each of which meets all rows of the output at once: the matrices of ``ROWS`` kernel rows lie side by side.  They
are made once for each call, with zero matrices around, so that no row needs a mask.

The gradient of the input is the same with the kernel turned around.  That of the kernel is made of products
``[columns read, images] x [images, columns written]``, whose diagonals are added up at the end.

Dilated rows of the output that meet the same rows of the input are worked on together: rows ``phase + dilation * u``.

With channels last a program has eight channels, whose products are done at once: what it reads is then in one piece.

Letters: ``u`` row of a phase, ``j`` row of a kernel, ``s`` column read, ``t`` column written, both of a tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._kernels import empty_map, memory_format, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

PARTS = 528  # programs of the kernel's gradient that share its sums over the images: 4 for each multiprocessor

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    TAPS = tl.constexpr(32)  # that hold a row of a kernel
    # 1 or a multiple of 16 is no reason to compile, nor in strides, which count vectors
    _COUNTS = ("B", "C", "H", "W", "WV", "tiles", "blocks", "groups", "parts", "K", "reach", "dilation", "flip")
    _STRIDES = tuple(f"stride_{output}{axis}" for output in ("", "d") for axis in "bcyx")

    def _jit(function):
        names = function.__code__.co_varnames
        return triton.jit(function, do_not_specialize=[n for n in (*_COUNTS, *_STRIDES) if n in names])

    @_jit
    def _bands_kernel(
        weight_ptr,
        bands_ptr,
        K,
        reach,
        dilation,
        flip,
        ROWS: tl.constexpr,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
    ):
        """One matrix ``[READ, WRITTEN]`` of a channel: that of a row of its kernel, or zero above and below."""
        rows = K + 2 * (ROWS - 1)
        c, j = tl.program_id(0) // rows, tl.program_id(0) % rows - (ROWS - 1)
        s, t = tl.arange(0, READ)[:, None], tl.arange(0, WRITTEN)[None, :]
        offset = s - LEFT - t + reach  # of the column read in the dilated row of the kernel
        i = offset // dilation
        ok = (j >= 0) & (j < K) & (offset >= 0) & (i < K) & (i * dilation == offset)
        place = tl.where(flip != 0, K * K - 1 - (j * K + i), j * K + i)
        band = tl.load(weight_ptr + c * K * K + place, mask=ok, other=0.0)
        out = bands_ptr + tl.program_id(0).to(tl.int64) * (READ * WRITTEN)
        tl.store(out + s * WRITTEN + t, band.to(bands_ptr.dtype.element_ty))

    @triton.jit
    def _tiles(
        first, B, tiles, stride_b, WRITTEN: tl.constexpr, VEC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Tiles of columns, one a row of the products: offset of the first one's image, of theirs from it, columns."""
        m = first + tl.arange(0, BLOCK)
        b, first = m // tiles, first // tiles
        image = (b - first).to(INDEX) * stride_b * VEC
        return first.to(tl.int64) * stride_b * VEC, image, (m - b * tiles) * WRITTEN, m < B * tiles

    @_jit
    def _depthwise_fwd_kernel(
        x_ptr,
        bands_ptr,
        bias_ptr,
        out_ptr,
        B,
        C,
        H,
        WV,
        tiles,
        blocks,
        K,
        dilation,
        stride_b,
        stride_c,
        stride_y,
        stride_db,
        stride_dc,
        stride_dy,
        BIAS: tl.constexpr,
        VEC: tl.constexpr,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        pid = tl.program_id(0)
        phase, pid = pid % dilation, pid // dilation
        u0, pid = pid % blocks * ROWS, pid // blocks
        c, W = pid % C, WV * VEC
        base, image, left, ok = _tiles(pid // C * BLOCK, B, tiles, stride_b, WRITTEN, VEC, INDEX, BLOCK)
        x = left[:, None] - LEFT + tl.arange(0, READ)[None, :]
        m_x = ok[:, None] & (x >= 0) & (x < W)
        x_ptr += base + c.to(INDEX) * stride_c * VEC
        x_place = image[:, None] + x
        n = tl.arange(0, ROWS * WRITTEN)
        row, t = n // WRITTEN, n % WRITTEN
        length = (H - phase + dilation - 1) // dilation  # rows of this phase
        above = K // 2
        s = tl.arange(0, READ)
        # row u meets kernel row u - u0 + above - row; matrices are counted from the zero ones above
        j = above - u0 + ROWS - 1
        bands_base = bands_ptr + c.to(tl.int64) * (K + 2 * (ROWS - 1)) * (READ * WRITTEN)
        band = s[:, None] * WRITTEN + (t - row * (READ * WRITTEN))[None, :]
        acc = tl.zeros((BLOCK, ROWS * WRITTEN), tl.float32)
        for u in range(tl.maximum(u0 - above, 0), tl.minimum(u0 + ROWS + above, length)):
            y = (phase + u * dilation).to(INDEX)
            a = tl.load(x_ptr + y * stride_y * VEC + x_place, mask=m_x, other=0.0)
            w = tl.load(bands_base + ((j + u) * (READ * WRITTEN) + band))
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        if BIAS:
            acc += tl.load(bias_ptr + c).to(tl.float32)
        base, image, left, ok = _tiles(pid // C * BLOCK, B, tiles, stride_db, WRITTEN, VEC, INDEX, BLOCK)
        u, x = (u0 + row)[None, :], left[:, None] + t[None, :]
        place = image[:, None] + (phase + u * dilation).to(INDEX) * stride_dy * VEC + x
        out_ptr += base + c.to(INDEX) * stride_dc * VEC
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (u < length) & (x < W))

    @_jit
    def _depthwise_last_fwd_kernel(
        x_ptr,
        bands_ptr,
        bias_ptr,
        out_ptr,
        B,
        H,
        W,
        tiles,
        blocks,
        groups,
        K,
        dilation,
        stride_b,
        stride_y,
        stride_x,
        stride_db,
        stride_dy,
        stride_dx,
        BIAS: tl.constexpr,
        VEC: tl.constexpr,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """The same for channels that lie side by side: products of a few of them at once."""
        pid = tl.program_id(0)
        phase, pid = pid % dilation, pid // dilation
        u0, pid = pid % blocks * ROWS, pid // blocks
        c = pid % groups * CHANNELS + tl.arange(0, CHANNELS)
        first = pid // groups * BLOCK
        base, image, left, ok = _tiles(first, B, tiles, stride_b, WRITTEN, VEC, INDEX, BLOCK)
        x_ptr += base
        x = left[:, None] - LEFT + tl.arange(0, READ)[None, :]
        m_x = (ok[:, None] & (x >= 0) & (x < W))[:, :, None]
        x_place = (image[:, None] + x.to(INDEX) * stride_x * VEC)[:, :, None] + c[None, None, :]
        n = tl.arange(0, ROWS * WRITTEN)
        row, t = n // WRITTEN, n % WRITTEN
        length = (H - phase + dilation - 1) // dilation
        above = K // 2
        s = tl.arange(0, READ)
        j = above - u0 + ROWS - 1
        bands_base = bands_ptr + (pid % groups).to(tl.int64) * CHANNELS * (K + 2 * (ROWS - 1)) * (READ * WRITTEN)
        band = s[:, None] * WRITTEN + (t - row * (READ * WRITTEN))[None, :]
        own = tl.arange(0, CHANNELS) * ((K + 2 * (ROWS - 1)) * (READ * WRITTEN))
        band = own[:, None, None] + band[None, :, :]
        acc = tl.zeros((CHANNELS, BLOCK, ROWS * WRITTEN), tl.float32)
        for u in range(tl.maximum(u0 - above, 0), tl.minimum(u0 + ROWS + above, length)):
            y = (phase + u * dilation).to(INDEX)
            a = tl.load(x_ptr + y * stride_y * VEC + x_place, mask=m_x, other=0.0)
            w = tl.load(bands_base + (j + u) * (READ * WRITTEN) + band)
            acc = tl.dot(tl.permute(a, (2, 0, 1)), w, acc, input_precision=PRECISION)
        if BIAS:
            acc += tl.load(bias_ptr + c).to(tl.float32)[:, None, None]
        base, image, left, ok = _tiles(first, B, tiles, stride_db, WRITTEN, VEC, INDEX, BLOCK)
        u, x = (u0 + row)[None, :], left[:, None] + t[None, :]
        place = image[:, None] + ((phase + u * dilation).to(INDEX) * stride_dy + x.to(INDEX) * stride_dx) * VEC
        ok = (ok[:, None] & (u < length) & (x < W))[:, :, None]
        out = tl.permute(acc, (1, 2, 0)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + (place[:, :, None] + c[None, None, :]), out, mask=ok)

    @_jit
    def _depthwise_bwd_weight_kernel(
        x_ptr,
        dout_ptr,
        products_ptr,
        B,
        C,
        H,
        WV,
        tiles,
        blocks,
        parts,
        K,
        dilation,
        stride_b,
        stride_c,
        stride_y,
        stride_db,
        stride_dc,
        stride_dy,
        VEC: tl.constexpr,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Products of ``ROWS`` rows of the input with as many of the gradient, those of all places added up."""
        pid = tl.program_id(0)
        block, part = pid % blocks, pid // blocks // C
        c, W = pid // blocks % C, WV * VEC
        below = block * ROWS - K // 2  # the first row of the input is so far below that of the gradient
        e, n = tl.arange(0, ROWS * READ), tl.arange(0, ROWS * WRITTEN)
        x_row, s = e // READ, e % READ
        d_row, t = n // WRITTEN, n % WRITTEN
        x_ptr += c.to(INDEX) * stride_c * VEC
        dout_ptr += c.to(INDEX) * stride_dc * VEC
        start = tl.maximum((-below) // ROWS * ROWS, 0)
        acc = tl.zeros((ROWS * READ, ROWS * WRITTEN), tl.float32)
        for first in range(part * BLOCK, B * tiles, parts * BLOCK):
            base, image, left, ok = _tiles(first, B, tiles, stride_b, WRITTEN, VEC, INDEX, BLOCK)
            x_base = x_ptr + base
            x = left[:, None] - LEFT + s[None, :]
            m_x = ok[:, None] & (x >= 0) & (x < W)
            x_place = image[:, None] + (x_row * dilation).to(INDEX)[None, :] * stride_y * VEC + x
            base, image, left, ok = _tiles(first, B, tiles, stride_db, WRITTEN, VEC, INDEX, BLOCK)
            dout_base = dout_ptr + base
            x = left[:, None] + t[None, :]
            m_d = ok[:, None] & (x < W)
            d_place = image[:, None] + (d_row * dilation).to(INDEX)[None, :] * stride_dy * VEC + x
            for phase in range(0, dilation):
                length = (H - phase + dilation - 1) // dilation
                for u0 in range(start, tl.minimum(length, length - below), ROWS):
                    u = u0 + below + x_row
                    m_u = (u >= 0) & (u < length)
                    y = (phase + (u0 + below) * dilation).to(INDEX)
                    a = tl.load(x_base + y * stride_y * VEC + x_place, mask=m_x & m_u[None, :], other=0.0)
                    y = (phase + u0 * dilation).to(INDEX)
                    m_u = u0 + d_row < length
                    d = tl.load(dout_base + y * stride_dy * VEC + d_place, mask=m_d & m_u[None, :], other=0.0)
                    acc = tl.dot(tl.trans(a), d, acc, input_precision=PRECISION)
        out = products_ptr + ((part * C + c).to(tl.int64) * blocks + block) * (ROWS * ROWS * READ * WRITTEN)
        tl.store(out + e[:, None] * (ROWS * WRITTEN) + n[None, :], acc)

    @_jit
    def _depthwise_last_bwd_weight_kernel(
        x_ptr,
        dout_ptr,
        products_ptr,
        B,
        H,
        W,
        tiles,
        blocks,
        groups,
        parts,
        K,
        dilation,
        stride_b,
        stride_y,
        stride_x,
        stride_db,
        stride_dy,
        stride_dx,
        VEC: tl.constexpr,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """The same for channels that lie side by side."""
        pid = tl.program_id(0)
        block, part = pid % blocks, pid // blocks // groups
        c = pid // blocks % groups * CHANNELS + tl.arange(0, CHANNELS)
        below = block * ROWS - K // 2
        e, n = tl.arange(0, ROWS * READ), tl.arange(0, ROWS * WRITTEN)
        x_row, s = e // READ, e % READ
        d_row, t = n // WRITTEN, n % WRITTEN
        start = tl.maximum((-below) // ROWS * ROWS, 0)
        acc = tl.zeros((CHANNELS, ROWS * READ, ROWS * WRITTEN), tl.float32)
        for first in range(part * BLOCK, B * tiles, parts * BLOCK):
            base, image, left, ok = _tiles(first, B, tiles, stride_b, WRITTEN, VEC, INDEX, BLOCK)
            x_base = x_ptr + base
            x = left[:, None] - LEFT + s[None, :]
            m_x = (ok[:, None] & (x >= 0) & (x < W))[:, :, None]
            place = ((x_row * dilation).to(INDEX)[None, :] * stride_y + x.to(INDEX) * stride_x) * VEC
            x_place = (image[:, None] + place)[:, :, None] + c[None, None, :]
            base, image, left, ok = _tiles(first, B, tiles, stride_db, WRITTEN, VEC, INDEX, BLOCK)
            dout_base = dout_ptr + base
            x = left[:, None] + t[None, :]
            m_d = (ok[:, None] & (x < W))[:, :, None]
            place = ((d_row * dilation).to(INDEX)[None, :] * stride_dy + x.to(INDEX) * stride_dx) * VEC
            d_place = (image[:, None] + place)[:, :, None] + c[None, None, :]
            for phase in range(0, dilation):
                length = (H - phase + dilation - 1) // dilation
                for u0 in range(start, tl.minimum(length, length - below), ROWS):
                    u = u0 + below + x_row
                    m_u = ((u >= 0) & (u < length))[None, :, None]
                    y = (phase + (u0 + below) * dilation).to(INDEX)
                    a = tl.load(x_base + y * stride_y * VEC + x_place, mask=m_x & m_u, other=0.0)
                    y = (phase + u0 * dilation).to(INDEX)
                    m_u = (u0 + d_row < length)[None, :, None]
                    d = tl.load(dout_base + y * stride_dy * VEC + d_place, mask=m_d & m_u, other=0.0)
                    acc = tl.dot(tl.permute(a, (2, 1, 0)), tl.permute(d, (2, 0, 1)), acc, input_precision=PRECISION)
        out = products_ptr + (part * groups * CHANNELS * blocks + block).to(tl.int64) * (ROWS * ROWS * READ * WRITTEN)
        own = c.to(tl.int64) * blocks * (ROWS * ROWS * READ * WRITTEN)
        place = own[:, None, None] + (e[:, None] * (ROWS * WRITTEN) + n[None, :])[None, :, :]
        tl.store(out + place, acc)

    @_jit
    def _diagonals_kernel(
        products_ptr,
        dweight_ptr,
        C,
        blocks,
        parts,
        K,
        reach,
        dilation,
        READ: tl.constexpr,
        WRITTEN: tl.constexpr,
        LEFT: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Gradient of one row of a kernel: sums over the diagonals of the products of all its pairs of rows."""
        c, j = tl.program_id(0) // K, tl.program_id(0) % K
        i, t = tl.arange(0, TAPS)[:, None], tl.arange(0, WRITTEN)[None, :]
        s = i * dilation - reach + LEFT + t
        ok = (i < K) & (s >= 0) & (s < READ)
        acc = tl.zeros((TAPS, WRITTEN), tl.float32)
        for part in range(0, parts):
            base = products_ptr + (part * C + c).to(tl.int64) * blocks * (ROWS * ROWS * READ * WRITTEN)
            for row in range(0, ROWS):
                place = ((j + row) * READ + s) * (ROWS * WRITTEN) + row * WRITTEN + t
                acc += tl.load(base + place, mask=ok, other=0.0)
        i = tl.arange(0, TAPS)
        tl.store(dweight_ptr + (c * K + j) * K + i, tl.sum(acc, 1), mask=i < K)


class Tile(NamedTuple):
    """Rows of the products, rows of the map, warps, stages of the loads, and channels."""

    block: int
    rows: int
    warps: int
    stages: int
    channels: int = 1


# for each compute capability by kernel, half precision, and the columns that a tile reads and writes; chosen by the
# machine code for 9.0 (no spills, then the fewest instructions times warps that leave room for other programs), not by
# measured times
CHOICES = {
    90: {
        ("forward", True, 16, 16): Tile(64, 8, 8, 1),
        ("forward", True, 32, 32): Tile(128, 4, 8, 2),
        ("forward", True, 32, 16): Tile(128, 4, 4, 3),
        ("forward", True, 64, 32): Tile(64, 2, 8, 2),
        ("weight", True, 16, 16): Tile(64, 4, 8, 1),
        ("weight", True, 32, 32): Tile(32, 4, 8, 1),
        ("weight", True, 32, 16): Tile(64, 4, 8, 2),
        ("weight", True, 64, 32): Tile(32, 2, 8, 1),
        ("forward", False, 16, 16): Tile(64, 4, 4, 1),
        ("forward", False, 32, 32): Tile(64, 2, 4, 1),
        ("forward", False, 32, 16): Tile(64, 4, 4, 1),
        ("forward", False, 64, 32): Tile(32, 2, 8, 1),
        ("weight", False, 16, 16): Tile(32, 4, 8, 1),
        ("weight", False, 32, 32): Tile(32, 2, 4, 1),
        ("weight", False, 32, 16): Tile(32, 4, 8, 1),
        ("weight", False, 64, 32): Tile(32, 2, 8, 1),
        ("last forward", True, 16, 16): Tile(64, 4, 8, 1, 8),
        ("last forward", True, 32, 32): Tile(64, 2, 8, 1, 8),
        ("last forward", True, 32, 16): Tile(64, 4, 8, 1, 8),
        ("last forward", True, 64, 32): Tile(32, 1, 8, 1, 8),
        ("last weight", True, 16, 16): Tile(32, 2, 8, 1, 8),
        ("last weight", True, 32, 32): Tile(16, 2, 8, 1, 8),
        ("last weight", True, 32, 16): Tile(32, 2, 8, 1, 8),
        ("last weight", True, 64, 32): Tile(16, 1, 8, 1, 8),
    }
}


def _reads_channels(x: Tensor) -> bool:
    """Whether the kernels read channels side by side: in half precision, eight of them at once.

    Products of float32 are so slow there that a copy to the other memory format takes less time.
    """
    whole = all(n % 8 == 0 for n in (x.shape[1], x.stride(0), x.stride(2), x.stride(3)))
    return x.element_size() == 2 and memory_format(x) == torch.channels_last and whole


def _as_read(x: Tensor, last: bool) -> Tensor:
    """``x`` with its channels or its rows side by side."""
    if last:
        return x if _reads_channels(x) else x.contiguous(memory_format=torch.channels_last)
    return x if x.stride(3) == 1 else x.contiguous()


class _Launch:
    """What the kernels of a call share: tiles of columns, and arguments."""

    def __init__(self, kernel: str, x: Tensor, like: Tensor, kernel_size: int, dilation: int, last: bool):
        B, C, H, W = x.shape
        reach = dilation * (kernel_size // 2)
        if W <= 32:  # a tile holds whole rows
            read, written, left = power_of_two(W), power_of_two(W), 0
        else:  # and else as much on both sides as eight columns, or 16, reach
            left = 8 if reach <= 8 else 16
            read, written = 4 * left, 2 * left
        half = x.element_size() == 2
        choices = CHOICES[90]  # other devices take the same until something is measured there
        tile, tiles = choices[f"last {kernel}" if last else kernel, half, read, written], -(-W // written)
        # no more rows of the products than there are
        self.tile = tile._replace(block=min(tile.block, power_of_two(max(B * tiles, 1))))
        self.groups = C // tile.channels
        axes = {"b": 0, "y": 2, "x": 3} if last else {"b": 0, "c": 1, "y": 2}
        strides = {f"stride_{name}{a}": t.stride(i) for name, t in (("", x), ("d", like)) for a, i in axes.items()}
        vector = math.gcd(C if last else W, *strides.values(), 16 // x.element_size())
        images = self.tile.block // tiles + 2  # that a program may meet
        sizes = {"W": W, "groups": self.groups} if last else {"C": C, "WV": W // vector}
        self.blocks = -(-B * tiles // self.tile.block)  # of rows of the products
        self.columns: dict[str, Any] = {"READ": read, "WRITTEN": written, "LEFT": left, "ROWS": self.tile.rows}
        self.taps: dict[str, Any] = {"K": kernel_size, "dilation": dilation}
        self.arguments: dict[str, Any] = {
            **self.columns,
            **self.taps,
            **sizes,
            **({"CHANNELS": self.tile.channels} if last else {}),
            "B": B,
            "H": H,
            "tiles": tiles,
            **{name: stride // vector for name, stride in strides.items()},
            "VEC": vector,
            "PRECISION": product_precision(x.device),
            "INDEX": index_type(x[:images].unsqueeze(0), like[:images].unsqueeze(0)),
            "BLOCK": self.tile.block,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }


def kernel_forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, flip: bool = False) -> Tensor:
    """Convolution in the dtype and memory format of ``x``, with the kernel turned around by ``flip``."""
    C, H, K, last, format = x.shape[1], x.shape[2], weight.shape[2], _reads_channels(x), memory_format(x)
    x, weight = _as_read(x, last), weight.contiguous()
    out = empty_map(x)
    if out.numel() == 0:
        return out.contiguous(memory_format=format)
    launch = _Launch("forward", x, out, K, dilation, last)
    rows, columns = launch.tile.rows, launch.columns
    kernel = _depthwise_last_fwd_kernel if last else _depthwise_fwd_kernel
    taps, blocks = K + 2 * (rows - 1), -(-H // (dilation * rows))
    bands = torch.empty(C, taps, columns["READ"], columns["WRITTEN"], dtype=x.dtype, device=x.device)
    with on_device(x):
        _bands_kernel[(C * taps,)](
            weight, bands, reach=dilation * (K // 2), flip=int(flip), **columns, **launch.taps, num_warps=1
        )
        kernel[(launch.blocks * launch.groups * blocks * dilation,)](
            x,
            bands,
            bands if bias is None else bias.contiguous(),
            out,
            blocks=blocks,
            BIAS=bias is not None,
            **launch.arguments,
        )
    return out.contiguous(memory_format=format)


def kernel_weight_gradient(dout: Tensor, x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Gradient of the kernel ``[C, 1, K, K]`` in float32."""
    C, K, last = x.shape[1], kernel_size, _reads_channels(x)
    if x.numel() == 0:
        return torch.zeros(C, 1, K, K, dtype=torch.float32, device=x.device)
    dweight = torch.empty(C, 1, K, K, dtype=torch.float32, device=x.device)
    x, dout = _as_read(x, last), _as_read(dout, last)
    launch = _Launch("weight", x, dout, K, dilation, last)
    rows, columns = launch.tile.rows, launch.columns
    kernel = _depthwise_last_bwd_weight_kernel if last else _depthwise_bwd_weight_kernel
    blocks = -(-(K + rows - 1) // rows)
    parts = min(launch.blocks, -(-PARTS // (launch.groups * blocks)))
    sides = rows * columns["READ"], rows * columns["WRITTEN"]
    products = torch.empty(parts, C, blocks, *sides, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernel[(parts * launch.groups * blocks,)](x, dout, products, blocks=blocks, parts=parts, **launch.arguments)
        _diagonals_kernel[(C * K,)](
            products,
            dweight,
            C=C,
            blocks=blocks,
            parts=parts,
            reach=dilation * (K // 2),
            **columns,
            **launch.taps,
            num_warps=1,
        )
    return dweight
