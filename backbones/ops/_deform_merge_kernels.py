"""Triton kernels of deformable sampling: see ``deform_merge.py`` for the rules.

A program owns some samples of one image, finds their four corners and walks through the channels.  The gradient of the
map is a sum over whatever samples happen to read a row: the backward kernel writes which rows and with which weights,
and PyTorch's embedding bag, which sorts them, adds up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    # 1 or a multiple of 16 is no reason to compile
    _COUNTS = ["H", "W", "tiles", "stride_ob", "stride_oy", "stride_ox", "stride_oc"]

    def _jit(function):
        return triton.jit(function, do_not_specialize=_COUNTS)

    @triton.jit
    def _neighbours(start, d, size):
        """Linear weight, whether it has a slope, and clamped index of both neighbours of ``start + d``."""
        low = tl.floor(d)
        f = d - low
        near = start + low
        far = near + 1
        # negated, so that NaN stays
        near_on = ~((near < 0) | (near > size - 1))
        far_on = ~((far < 0) | (far > size - 1) | ((far == 0) & (f == 0)))
        near_at = tl.minimum(tl.maximum(near, 0.0), size - 1.0).to(tl.int32)  # in this order NaN is a valid index
        far_at = tl.minimum(tl.maximum(far, 0.0), size - 1.0).to(tl.int32)
        return tl.where(near_on, 1 - f, 0.0), tl.where(far_on, f, 0.0), near_on, far_on, near_at, far_at

    @triton.jit
    def _samples(offset_ptr, b, t, H, W, stride_b, stride_y, stride_x, stride_c, BLOCK_M: tl.constexpr):
        """A tile of samples: which exist, and for rows and for columns what :func:`_neighbours` gives."""
        cols = W // 2 * 2
        m = t * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = m < H // 2 * 2 * cols
        y, x = m // cols, m % cols
        p = offset_ptr + b * stride_b + (y // 2 * stride_y + x // 2 * stride_x + (y % 2 * 4 + x % 2 * 2) * stride_c)
        dy = tl.load(p, mask=m_m, other=0.0).to(tl.float32)
        dx = tl.load(p + stride_c, mask=m_m, other=0.0).to(tl.float32)
        return m, m_m, _neighbours(y.to(tl.float32), dy, H), _neighbours(x.to(tl.float32), dx, W)

    @triton.jit
    def _corner(x_ptr, row, col, on, c, stride_y, stride_x, INDEX: tl.constexpr):
        """Channels ``c`` of one corner of every sample: ``[samples, channels]``."""
        offset = row.to(INDEX) * stride_y + col.to(INDEX) * stride_x
        return tl.load(x_ptr + (offset[:, None] + c[None, :]), mask=on, other=0.0).to(tl.float32)

    @_jit
    def deform_fwd_kernel(
        x_ptr,
        offset_ptr,
        out_ptr,
        H,
        W,
        C,
        tiles,
        stride_b,
        stride_y,
        stride_x,
        stride_ob,
        stride_oy,
        stride_ox,
        stride_oc,
        INDEX: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        b, t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
        m, m_m, rows, cols = _samples(offset_ptr, b, t, H, W, stride_ob, stride_oy, stride_ox, stride_oc, BLOCK_M)
        wy0, wy1, on_y0, on_y1, y0, y1 = rows
        wx0, wx1, on_x0, on_x1, x0, x1 = cols
        on00, on01, on10, on11 = m_m & on_y0 & on_x0, m_m & on_y0 & on_x1, m_m & on_y1 & on_x0, m_m & on_y1 & on_x1
        w00, w01, w10, w11 = wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1
        x_ptr += b * stride_b
        out_ptr += b * (H // 2 * 2) * (W // 2 * 2) * C
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m_c = (c < C)[None, :]
            out = w00[:, None] * _corner(x_ptr, y0, x0, on00[:, None] & m_c, c, stride_y, stride_x, INDEX)
            out += w01[:, None] * _corner(x_ptr, y0, x1, on01[:, None] & m_c, c, stride_y, stride_x, INDEX)
            out += w10[:, None] * _corner(x_ptr, y1, x0, on10[:, None] & m_c, c, stride_y, stride_x, INDEX)
            out += w11[:, None] * _corner(x_ptr, y1, x1, on11[:, None] & m_c, c, stride_y, stride_x, INDEX)
            p = out_ptr + (m.to(INDEX)[:, None] * C + c[None, :])
            tl.store(p, out.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_c)

    @triton.jit
    def _store_corner(index_ptr, bag_ptr, weight_ptr, at, k, row, weight, bag, mask):
        tl.store(index_ptr + at + k, row.to(index_ptr.dtype.element_ty), mask=mask)
        tl.store(bag_ptr + at + k, bag.to(bag_ptr.dtype.element_ty), mask=mask)
        tl.store(weight_ptr + at + k, weight.to(weight_ptr.dtype.element_ty), mask=mask)

    @_jit
    def deform_bwd_kernel(
        x_ptr,
        offset_ptr,
        dout_ptr,
        doffset_ptr,
        index_ptr,
        bag_ptr,
        weight_ptr,
        H,
        W,
        C,
        tiles,
        stride_b,
        stride_y,
        stride_x,
        stride_ob,
        stride_oy,
        stride_ox,
        stride_oc,
        INDEX: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Gradients of the offsets, and row, sample and weight of every corner."""
        b, t = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
        m, m_m, rows, cols = _samples(offset_ptr, b, t, H, W, stride_ob, stride_oy, stride_ox, stride_oc, BLOCK_M)
        wy0, wy1, on_y0, on_y1, y0, y1 = rows
        wx0, wx1, on_x0, on_x1, x0, x1 = cols
        samples = b * (H // 2 * 2) * (W // 2 * 2)
        first_row, first_at = b * H * W, samples * 4
        at = first_at + m * 4
        bag = samples + m
        _store_corner(index_ptr, bag_ptr, weight_ptr, at, 0, first_row + (y0 * W + x0), wy0 * wx0, bag, m_m)
        _store_corner(index_ptr, bag_ptr, weight_ptr, at, 1, first_row + (y0 * W + x1), wy0 * wx1, bag, m_m)
        _store_corner(index_ptr, bag_ptr, weight_ptr, at, 2, first_row + (y1 * W + x0), wy1 * wx0, bag, m_m)
        _store_corner(index_ptr, bag_ptr, weight_ptr, at, 3, first_row + (y1 * W + x1), wy1 * wx1, bag, m_m)
        on00, on01, on10, on11 = m_m & on_y0 & on_x0, m_m & on_y0 & on_x1, m_m & on_y1 & on_x0, m_m & on_y1 & on_x1
        x_ptr += b * stride_b
        dout_ptr += samples * C
        # slopes: of the sum of a row's two corners in dy, of a column's in dx
        g_y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        g_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m_c = (c < C)[None, :]
            dout = tl.load(dout_ptr + (m.to(INDEX)[:, None] * C + c[None, :]), mask=m_m[:, None] & m_c, other=0.0).to(
                tl.float32
            )
            v00 = _corner(x_ptr, y0, x0, on00[:, None] & m_c, c, stride_y, stride_x, INDEX)
            v01 = _corner(x_ptr, y0, x1, on01[:, None] & m_c, c, stride_y, stride_x, INDEX)
            v10 = _corner(x_ptr, y1, x0, on10[:, None] & m_c, c, stride_y, stride_x, INDEX)
            v11 = _corner(x_ptr, y1, x1, on11[:, None] & m_c, c, stride_y, stride_x, INDEX)
            g_y += dout * (wx0[:, None] * (v10 - v00) + wx1[:, None] * (v11 - v01))
            g_x += dout * (wy0[:, None] * (v01 - v00) + wy1[:, None] * (v11 - v10))
        cols_out = W // 2 * 2
        y, x = m // cols_out, m % cols_out
        place = ((b * (H // 2) + y // 2) * (W // 2) + x // 2) * 8 + (y % 2 * 4 + x % 2 * 2)
        tl.store(doffset_ptr + place, tl.sum(g_y, 1).to(doffset_ptr.dtype.element_ty), mask=m_m)
        tl.store(doffset_ptr + place + 1, tl.sum(g_x, 1).to(doffset_ptr.dtype.element_ty), mask=m_m)


# samples of a tile and most channels at a time, by compute capability: chosen by the machine code for 9.0 (no spill,
# then the fewest instructions times warps), not by measured times
CHOICES = {90: (32, 32)}


def _launch(kernel, x: Tensor, offset: Tensor, out: Tensor, **arguments: Any) -> None:
    B, H, W, C = x.shape
    samples, channels = CHOICES[90]  # other devices take the same until something is measured there
    tiles = -(-(H // 2 * 2) * (W // 2 * 2) // samples)
    with on_device(x):
        kernel[(B * tiles,)](
            x_ptr=x,
            offset_ptr=offset,
            H=H,
            W=W,
            tiles=tiles,
            **{f"stride_{axis}": x.stride(i) for i, axis in enumerate("byx")},
            **{f"stride_o{axis}": offset.stride(i) for i, axis in enumerate("byxc")},
            C=C,
            INDEX=index_type(x, out),
            BLOCK_M=samples,
            BLOCK_C=min(channels, max(C & -C, 16)),  # the largest power of two that divides C
            num_warps=4,
            **arguments,
        )


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def kernel_forward(x: Tensor, offset: Tensor) -> Tensor:
    """Samples ``[B, 2 * (H // 2), 2 * (W // 2), C]``."""
    B, H, W, C = x.shape
    out = x.new_empty(B, H // 2 * 2, W // 2 * 2, C)
    if out.numel() > 0:
        _launch(deform_fwd_kernel, _dense_channels(x), offset, out, out_ptr=out)
    return out


def kernel_backward(dout: Tensor, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the map and of the offsets."""
    B, H, W, C = x.shape
    doffset = offset.new_empty(offset.shape)
    samples = B * offset.shape[1] * offset.shape[2] * 4
    if samples * C == 0:
        return x.new_zeros(x.shape), doffset.zero_()
    dtype = torch.int32 if 4 * B * H * W < 2**31 else torch.int64
    index, bag = (torch.empty(4 * samples, dtype=dtype, device=x.device) for _ in range(2))
    weight, dout = x.new_empty(4 * samples), dout.contiguous()
    _launch(
        deform_bwd_kernel,
        _dense_channels(x),
        offset,
        dout,
        dout_ptr=dout,
        doffset_ptr=doffset,
        index_ptr=index,
        bag_ptr=bag,
        weight_ptr=weight,
    )
    empty = index.new_empty(0)  # for what means and maxima need
    dx = torch.ops.aten._embedding_bag_dense_backward(
        dout.view(samples, C), index, bag, empty, empty, B * H * W, False, 0, weight
    )
    return dx.view(x.shape), doffset
