"""Triton kernels of the neighbourhood weighted sum: see ``na2d_av`` for the formula.

A program owns a tile of ``T x T`` queries (or values) of one image, and walks through the region of values (or queries)
that belongs to any of them, ``BLOCK`` at once: pairs outside the windows have weight 0, the others are picked from the
weights in memory, so that both directions are plain products.  It does so for every group of the image.

Maps have one stride for positions and one for channels, whichever of them lies together in memory; weights are dense
``[B, G, N, ROW]`` with the offsets of a query in a row, which may be longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._kernels import all_registers, cdiv, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

TILE = 4  # side of a tile: the region of a larger one has more pairs outside the windows


class _Choice(NamedTuple):
    """How a kernel runs: values or queries of a step, warps, and stages of its pipeline."""

    BLOCK: int
    num_warps: int
    num_stages: int


# By compute capability; then by kernel, bytes of an element and channels of a group, padded.  Chosen from the machine
# code for 9.0 (no spill, fewest instructions times warps), not from measured times; every other capability takes the
# same until something is measured there.
CHOICES: dict[int, dict[tuple[str, int, int], _Choice]] = {
    90: {
        ("fwd", 2, 16): _Choice(64, 1, 1),
        ("fwd", 2, 32): _Choice(32, 1, 1),
        ("fwd", 2, 64): _Choice(32, 2, 1),
        ("attn", 2, 16): _Choice(64, 2, 1),
        ("attn", 2, 32): _Choice(32, 2, 1),
        ("attn", 2, 64): _Choice(32, 4, 1),
        ("value", 2, 16): _Choice(32, 1, 1),
        ("value", 2, 32): _Choice(32, 1, 1),
        ("value", 2, 64): _Choice(32, 4, 1),
        ("fwd", 4, 16): _Choice(32, 1, 1),
        ("fwd", 4, 32): _Choice(32, 2, 1),
        ("fwd", 4, 64): _Choice(32, 4, 1),
        ("attn", 4, 16): _Choice(64, 4, 1),
        ("attn", 4, 32): _Choice(32, 4, 1),
        ("attn", 4, 64): _Choice(32, 8, 1),
        ("value", 4, 16): _Choice(32, 1, 1),
        ("value", 4, 32): _Choice(32, 2, 1),
        ("value", 4, 64): _Choice(32, 4, 1),
    }
}

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    # a kernel must not be compiled again because one of these is 1 or divisible by 16
    _COUNTS = ["G", "H", "W"]

    @triton.jit
    def window_start(i, L, K: tl.constexpr):
        """First position of the window of position ``i`` on an axis of length ``L``."""
        return tl.minimum(tl.maximum(i - (K - 1) // 2, 0), L - K)

    @triton.jit
    def load_channels(ptr, place, stride_c, C: tl.constexpr, CP: tl.constexpr, LAST: tl.constexpr):
        """Channels of the positions ``[n]``: ``[n, CP]``, zero past ``C``; ``LAST`` says that those lie together."""
        c = tl.arange(0, CP)
        if LAST:
            p = ptr + (place[:, None] + c[None, :])
            return tl.load(p) if C == CP else tl.load(p, mask=(c < C)[None, :], other=0.0)
        p = ptr + (c[:, None] * stride_c + place[None, :])
        return tl.trans(tl.load(p) if C == CP else tl.load(p, mask=(c < C)[:, None], other=0.0))

    @triton.jit
    def store_channels(ptr, place, stride_c, value, mask, C: tl.constexpr, CP: tl.constexpr, LAST: tl.constexpr):
        """Store ``[n, CP]`` at the positions ``[n]``, in the dtype of the memory."""
        c = tl.arange(0, CP)
        value = value.to(ptr.dtype.element_ty)
        if LAST:
            tl.store(ptr + (place[:, None] + c[None, :]), value, mask=mask[:, None] & (c < C)[None, :])
        else:
            p = ptr + (c[:, None] * stride_c + place[None, :])
            tl.store(p, tl.trans(value), mask=(c < C)[:, None] & mask[None, :])

    @triton.jit
    def _own(H, W, T: tl.constexpr):
        """Image, first row and column of the program's tile, its positions, and which of them are on the map."""
        rows, cols = tl.cdiv(H, T), tl.cdiv(W, T)
        b, tile = tl.program_id(0) // (rows * cols), tl.program_id(0) % (rows * cols)
        i, j = tile // cols * T, tile % cols * T
        m = tl.arange(0, T * T)
        y, x = i + m // T, j + m % T
        return b.to(tl.int64), i, j, tl.minimum(y, H - 1), tl.minimum(x, W - 1), (y < H) & (x < W)

    @triton.jit
    def _region(step, top, left, H, W, CHUNKS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
        """Rows and columns of one step through a region, and which position to read: one on the map."""
        e = tl.arange(0, BLOCK)
        y = top + step // CHUNKS * (BLOCK // COLS) + e // COLS
        x = left + step % CHUNKS * COLS + e % COLS
        return y, x, tl.minimum(y, H - 1) * W + tl.minimum(x, W - 1)

    @triton.jit
    def _pairs(qy, qx, ky, kx, m, H, W, K: tl.constexpr, ROW: tl.constexpr, INDEX: tl.constexpr):
        """Where the weight of each pair is, and whether the value is in the window of the query."""
        p, r = ky - window_start(qy, H, K), kx - window_start(qx, W, K)
        inside = (p >= 0) & (p < K) & (r >= 0) & (r < K) & m
        return (qy * W + qx).to(INDEX) * ROW + (p * K + r), inside

    @triton.jit(do_not_specialize=_COUNTS)
    def na2d_av_fwd_kernel(
        attn_ptr,
        value_ptr,
        out_ptr,
        G,
        H,
        W,
        stride_vb,
        stride_vg,
        stride_vc,
        stride_vn,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        T: tl.constexpr,
        COLS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Output of a tile of queries; ``out`` has the strides of the values."""
        b, i, j, y, x, m_q = _own(H, W, T)
        top, left = window_start(i, H, K), window_start(j, W, K)
        place = (y * W + x).to(INDEX) * stride_vn
        CHUNKS: tl.constexpr = (K + T - 2) // COLS + 1
        STEPS: tl.constexpr = ((K + T - 2) // (BLOCK // COLS) + 1) * CHUNKS
        for g in range(0, G):
            attn = attn_ptr + (b * G + g) * H * W * ROW
            base = b * stride_vb + g * stride_vg
            acc = tl.zeros((T * T, CP), tl.float32)
            for step in range(0, STEPS):
                ky, kx, pixel = _region(step, top, left, H, W, CHUNKS, COLS, BLOCK)
                at, inside = _pairs(y[:, None], x[:, None], ky[None, :], kx[None, :], m_q[:, None], H, W, K, ROW, INDEX)
                p = tl.load(attn + at, mask=inside, other=0.0)
                v = load_channels(value_ptr + base, pixel.to(INDEX) * stride_vn, stride_vc, C, CP, LAST)
                acc = tl.dot(p, v, acc, input_precision=PRECISION)
            store_channels(out_ptr + base, place, stride_vc, acc, m_q, C, CP, LAST)

    @triton.jit(do_not_specialize=_COUNTS)
    def na2d_av_bwd_attn_kernel(
        dout_ptr,
        attn_ptr,
        value_ptr,
        grow_ptr,
        dattn_ptr,
        G,
        H,
        W,
        stride_vb,
        stride_vg,
        stride_vc,
        stride_vn,
        SOFTMAX: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        T: tl.constexpr,
        COLS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the weights or, where they are a ``SOFTMAX``, of its logits, in float16 times ``grow``.

        ``dout`` has the strides of the values.
        """
        b, i, j, y, x, m_q = _own(H, W, T)
        top, left = window_start(i, H, K), window_start(j, W, K)
        place = (y * W + x).to(INDEX) * stride_vn
        grow = 1.0
        if SOFTMAX and dattn_ptr.dtype.element_ty == tl.float16:
            grow = tl.load(grow_ptr)
        CHUNKS: tl.constexpr = (K + T - 2) // COLS + 1
        STEPS: tl.constexpr = ((K + T - 2) // (BLOCK // COLS) + 1) * CHUNKS
        for g in range(0, G):
            weights = (b * G + g) * H * W * ROW
            base = b * stride_vb + g * stride_vg
            dout = load_channels(dout_ptr + base, place, stride_vc, C, CP, LAST)
            delta = tl.zeros((T * T,), tl.float32)
            if SOFTMAX and STEPS > 1:  # all values have their share in the mean gradient
                for step in range(0, STEPS):
                    ky, kx, pixel = _region(step, top, left, H, W, CHUNKS, COLS, BLOCK)
                    at, inside = _pairs(
                        y[:, None], x[:, None], ky[None, :], kx[None, :], m_q[:, None], H, W, K, ROW, INDEX
                    )
                    v = load_channels(value_ptr + base, pixel.to(INDEX) * stride_vn, stride_vc, C, CP, LAST)
                    p = tl.load(attn_ptr + weights + at, mask=inside, other=0.0)
                    d = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                    delta += tl.sum(p.to(tl.float32) * d, 1)
            for step in range(0, STEPS):
                ky, kx, pixel = _region(step, top, left, H, W, CHUNKS, COLS, BLOCK)
                at, inside = _pairs(y[:, None], x[:, None], ky[None, :], kx[None, :], m_q[:, None], H, W, K, ROW, INDEX)
                v = load_channels(value_ptr + base, pixel.to(INDEX) * stride_vn, stride_vc, C, CP, LAST)
                d = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                if SOFTMAX:
                    p = tl.load(attn_ptr + weights + at, mask=inside, other=0.0).to(tl.float32)
                    if STEPS == 1:
                        delta = tl.sum(p * d, 1)
                    d = p * (d - delta[:, None]) * grow
                tl.store(dattn_ptr + weights + at, d.to(dattn_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=_COUNTS)
    def na2d_av_bwd_value_kernel(
        dout_ptr,
        attn_ptr,
        dvalue_ptr,
        G,
        H,
        W,
        stride_vb,
        stride_vg,
        stride_vc,
        stride_vn,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        T: tl.constexpr,
        COLS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of a tile of values, from the queries whose windows reach into it; all maps share their strides."""
        b, i, j, y, x, m_v = _own(H, W, T)
        HALF: tl.constexpr = (K - 1) // 2
        top, left = tl.where(i < K, 0, i - HALF), tl.where(j < K, 0, j - HALF)
        bottom = tl.where(i + T - 1 >= H - K, H, i + T + HALF)
        right = tl.where(j + T - 1 >= W - K, W, j + T + HALF)
        place = (y * W + x).to(INDEX) * stride_vn
        for g in range(0, G):
            attn = attn_ptr + (b * G + g) * H * W * ROW
            base = b * stride_vb + g * stride_vg
            acc = tl.zeros((T * T, CP), tl.float32)
            for row in range(top, bottom, BLOCK // COLS):
                for col in range(left, right, COLS):
                    qy, qx, pixel = _region(0, row, col, H, W, 1, COLS, BLOCK)
                    m_q = ((qy < H) & (qx < W))[None, :]
                    at, inside = _pairs(qy[None, :], qx[None, :], y[:, None], x[:, None], m_q, H, W, K, ROW, INDEX)
                    p = tl.load(attn + at, mask=inside, other=0.0)
                    dout = load_channels(dout_ptr + base, pixel.to(INDEX) * stride_vn, stride_vc, C, CP, LAST)
                    acc = tl.dot(p, dout, acc, input_precision=PRECISION)
            store_channels(dvalue_ptr + base, place, stride_vc, acc, m_v, C, CP, LAST)


class Tiles:
    """Runs the kernels on maps like ``value``, of whose axes image, group, channel and position it is told.

    Args:
        value: Map on the device of all, for its dtype.
        sizes: Images, groups, channels of a group, rows, columns.
        strides: Of images, groups, channels, positions.
        K: Side of the window.
        row: Distance of two queries' weights.
        index: Type of offsets inside a group.
    """

    def __init__(self, value: Tensor, sizes: Sequence[int], strides: Sequence[int], K: int, row: int, index: Any):
        B, G, C, H, W = sizes
        CP = power_of_two(C)
        self.value, self.programs = value, B * cdiv(H, TILE) * cdiv(W, TILE)
        self.options: dict[str, Any] = {
            "G": G,
            "H": H,
            "W": W,
            **{f"stride_v{axis}": stride for axis, stride in zip("bgcn", strides, strict=True)},
            "K": K,
            "ROW": row,
            "C": C,
            "CP": CP,
            "LAST": strides[2] == 1,
            "PRECISION": product_precision(value.device),
            "INDEX": index,
            "T": TILE,
            "COLS": 8 if K + TILE - 1 <= 8 else 16,
        }

    def run(self, kernel: Any, name: str, **pointers: Any) -> None:
        """One program for each tile of each image, which must have some elements."""
        if self.value.numel() > 0:
            choice = CHOICES[90][name, self.value.element_size(), self.options["CP"]]
            sizes = choice._asdict()
            if self.options["CP"] > 16 or self.options["COLS"] > 8:
                sizes |= all_registers(choice.num_warps)
            with on_device(self.value):
                kernel[(self.programs,)](**pointers, **self.options, **sizes)


def _tiles(attn: Tensor, value: Tensor, kernel_size: int) -> Tiles:
    B, G, H, W, C = value.shape
    index = index_type(attn.flatten(0, 1), value.flatten(0, 1))  # offsets are those in one group of one image
    return Tiles(
        value, (B, G, C, H, W), (G * H * W * C, H * W * C, 1, C), kernel_size, kernel_size * kernel_size, index
    )


def kernel_forward(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weighted sum ``[B, G, H, W, C]``."""
    attn, value = attn.contiguous(), value.contiguous()
    out = torch.empty_like(value)
    _tiles(attn, value, kernel_size).run(na2d_av_fwd_kernel, "fwd", attn_ptr=attn, value_ptr=value, out_ptr=out)
    return out


def kernel_backward(grad: Tensor, attn: Tensor, value: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Gradients of weights and values."""
    grad, attn, value = grad.contiguous(), attn.contiguous(), value.contiguous()
    dattn, dvalue = torch.empty_like(attn), torch.empty_like(value)
    tiles = _tiles(attn, value, kernel_size)
    unused = {"attn_ptr": attn, "grow_ptr": grad}
    tiles.run(
        na2d_av_bwd_attn_kernel,
        "attn",
        dout_ptr=grad,
        value_ptr=value,
        dattn_ptr=dattn,
        SOFTMAX=False,
        **unused,
    )
    tiles.run(na2d_av_bwd_value_kernel, "value", dout_ptr=grad, attn_ptr=attn, dvalue_ptr=dvalue)
    return dattn, dvalue
