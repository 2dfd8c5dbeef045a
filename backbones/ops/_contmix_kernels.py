"""Triton kernels of ContMix: see ``contmix`` for the formula and for who calls them.

Where a map has few distinct windows, the queries that share one are worked on together: their logits, and their sums
over the window, are plain products of tiles.  A program loads a window once for up to ``BLOCK_N`` queries.  Where
windows are many, a kernel writes the weights, and those of ``na2d_av`` do the rest.

The bias of a query depends only on where its window begins, relative to it, so that there are ``K * K`` different rows
of biases whatever the size of the map.  They are written out once in a call, ``[G, K * K, ROW]``, with the bias of the
projection added and -inf past the last offset.  Log-sums are in base 2.

The size of a map and the number of groups are run-time numbers: a model compiles each kernel once for each ``K``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _na2d_av_kernels as sums
from ._kernels import all_registers, gradient_scale, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

PROGRAMS = 1024  # of a kernel that works on several images in turn: enough to fill a GPU


class _Choice(NamedTuple):
    """How a kernel runs: most queries and offsets of a tile, warps, and stages of its pipeline."""

    BLOCK_N: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


# By compute capability; then by kernel, bytes of an element and channels of a group, padded.  Chosen from the machine
# code for 9.0 (no spill, fewest instructions times warps), not from measured times; every other capability takes the
# same until something is measured there.
CHOICES: dict[int, dict[tuple[str, int, int], _Choice]] = {
    90: {
        ("forward", 2, 16): _Choice(64, 64, 4, 1),
        ("forward", 2, 32): _Choice(64, 32, 4, 1),
        ("forward", 2, 64): _Choice(64, 32, 4, 1),
        ("forward", 4, 16): _Choice(64, 32, 4, 1),
        ("forward", 4, 32): _Choice(32, 32, 4, 1),
        ("forward", 4, 64): _Choice(32, 32, 8, 1),
        ("weights", 2, 16): _Choice(64, 32, 2, 1),
        ("weights", 2, 32): _Choice(64, 64, 4, 1),
        ("weights", 2, 64): _Choice(64, 32, 4, 1),
        ("weights", 4, 16): _Choice(64, 32, 4, 1),
        ("weights", 4, 32): _Choice(32, 32, 4, 1),
        ("weights", 4, 64): _Choice(32, 32, 8, 1),
        ("backward", 2, 16): _Choice(64, 32, 4, 1),
        ("backward", 2, 32): _Choice(64, 32, 4, 1),
        ("backward", 2, 64): _Choice(32, 32, 8, 1),
        ("backward", 4, 16): _Choice(64, 32, 4, 1),
        ("backward", 4, 32): _Choice(32, 32, 8, 1),
        ("backward", 4, 64): _Choice(16, 16, 8, 1),
        ("bias", 2, 16): _Choice(64, 32, 4, 1),
        ("bias", 2, 32): _Choice(64, 32, 4, 1),
        ("bias", 2, 64): _Choice(32, 32, 8, 1),
        ("bias", 4, 16): _Choice(64, 32, 4, 1),
        ("bias", 4, 32): _Choice(32, 32, 4, 1),
        ("bias", 4, 64): _Choice(32, 16, 8, 1),
        ("products", 2, 16): _Choice(32, 64, 2, 1),
        ("products", 2, 32): _Choice(64, 32, 4, 1),
        ("products", 2, 64): _Choice(64, 32, 4, 1),
        ("products", 4, 16): _Choice(32, 32, 4, 1),
        ("products", 4, 32): _Choice(32, 32, 4, 1),
        ("products", 4, 64): _Choice(32, 16, 8, 1),
    }
}

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import LOG2E, index_type
    from ._na2d_av_kernels import load_channels, store_channels, window_start

    # a kernel must not be compiled again because one of these is 1 or divisible by 16
    _COUNTS = ["images", "shares", "G", "H", "W", "S", "first", "tiles"]

    @triton.jit(do_not_specialize=["first", "K", "ROW"])
    def contmix_bias_kernel(rpb_ptr, bias_ptr, table_ptr, first, K, ROW, BLOCK: tl.constexpr):
        """One row of biases: of queries of a group whose windows begin ``i - (K - 1)``, ``j - (K - 1)`` away."""
        g, row = tl.program_id(0) // (K * K), tl.program_id(0) % (K * K)
        i, j = row // K, row % K
        for start in range(0, ROW, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m_o = o < K * K
            place = (g * (2 * K - 1) + i + o // K) * (2 * K - 1) + j + o % K
            bias = tl.load(rpb_ptr + place, mask=m_o, other=float("-inf"))
            bias += tl.load(bias_ptr + first + o, mask=m_o, other=0.0)
            tl.store(table_ptr + tl.program_id(0) * ROW + o, bias, mask=o < ROW)

    @triton.jit
    def _window(step, tiles, H, W, K: tl.constexpr, BLOCK_N: tl.constexpr):
        """First row and column of a window; the queries of a tile that share it, their rows of biases, which are real.

        The others repeat the last real one.
        """
        HALF: tl.constexpr = (K - 1) // 2
        window, cols = step // tiles, W - K + 1
        si, sj = window // cols, window % cols
        i, j = tl.where(si > 0, si + HALF, 0), tl.where(sj > 0, sj + HALF, 0)
        h = tl.where(si < H - K, si + HALF + 1, H) - i
        w = tl.where(sj < W - K, sj + HALF + 1, W) - j
        m = step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = m < h * w
        m = tl.minimum(m, h * w - 1)
        y, x = i + m // w, j + m % w
        return si, sj, y * W + x, (si - y + K - 1) * K + (sj - x + K - 1), m_n

    @triton.jit
    def _logits(q, m, bias, PRECISION: tl.constexpr):
        return tl.dot(q, tl.trans(m), bias, input_precision=PRECISION)

    @triton.jit(do_not_specialize=_COUNTS)
    def contmix_fwd_kernel(
        q_ptr,
        m_ptr,
        table_ptr,
        v_ptr,
        out_ptr,
        lse_ptr,
        images,
        shares,
        G,
        H,
        W,
        S,
        first,
        tiles,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Output of up to ``BLOCK_N`` queries that share a window, in a share of the images."""
        steps = (H - K + 1) * (W - K + 1) * tiles
        share, pid = tl.program_id(0) % shares, tl.program_id(0) // shares
        g = pid // steps
        si, sj, n, row, m_n = _window(pid % steps, tiles, H, W, K, BLOCK_N)
        table = table_ptr + ((g * (K * K) + row) * ROW)[:, None]
        q_place, v_place = n.to(INDEX) * stride_qn, n.to(INDEX) * stride_vn
        for b in range(share.to(tl.int64), images, shares):
            q = load_channels(q_ptr + b * stride_qb + (g * C).to(INDEX) * stride_qc, q_place, stride_qc, C, CP, LAST)
            context = m_ptr + (b * G + g) * C * S + first
            channels = b * stride_vb + ((SECOND * G + g) * C).to(INDEX) * stride_vc
            peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            acc = tl.zeros((BLOCK_N, CP), tl.float32)
            for start in range(0, ROW, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                bias = tl.load(table + o[None, :])
                o = tl.minimum(o, K * K - 1)
                pixel = (si + o // K) * W + sj + o % K
                v = load_channels(v_ptr + channels, pixel.to(INDEX) * stride_vn, stride_vc, C, CP, LAST)
                s = _logits(q, load_channels(context, o, S, C, CP, False), bias, PRECISION)
                higher = tl.maximum(peak, tl.max(s, 1))
                shrink = tl.exp2((peak - higher) * LOG2E)
                p = tl.exp2(s * LOG2E - (higher * LOG2E)[:, None])
                total = total * shrink + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
                peak = higher
            total = tl.log2(total)
            acc = acc * tl.exp2(-total)[:, None]
            store_channels(out_ptr + channels, v_place, stride_vc, acc, m_n, C, CP, LAST)
            tl.store(lse_ptr + ((b * 2 + SECOND) * G + g) * H * W + n, peak * LOG2E + total, mask=m_n)

    @triton.jit(do_not_specialize=_COUNTS)
    def contmix_weights_kernel(
        q_ptr,
        m_ptr,
        table_ptr,
        p_ptr,
        images,
        shares,
        G,
        H,
        W,
        S,
        first,
        tiles,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Weights ``[B, G, N, ROW]`` of a tile of queries, in a share of the images."""
        share, pid = tl.program_id(0) % shares, tl.program_id(0) // shares
        g, n = pid // tiles, pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = n < H * W
        n = tl.minimum(n, H * W - 1)
        y, x = n // W, n % W
        row = (window_start(y, H, K) - y + K - 1) * K + (window_start(x, W, K) - x + K - 1)
        table = table_ptr + ((g * (K * K) + row) * ROW)[:, None]
        for b in range(share.to(tl.int64), images, shares):
            q = load_channels(
                q_ptr + b * stride_qb + (g * C).to(INDEX) * stride_qc, n.to(INDEX) * stride_qn, stride_qc, C, CP, LAST
            )
            context = m_ptr + (b * G + g) * C * S + first
            weights = p_ptr + (b * G + g) * H * W * ROW + (n.to(INDEX) * ROW)[:, None]
            peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(0, ROW, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                m = load_channels(context, tl.minimum(o, K * K - 1), S, C, CP, False)
                s = _logits(q, m, tl.load(table + o[None, :]), PRECISION)
                higher = tl.maximum(peak, tl.max(s, 1))
                p = tl.exp2(s * LOG2E - (higher * LOG2E)[:, None])
                total = total * tl.exp2((peak - higher) * LOG2E) + tl.sum(p, 1)
                peak = higher
            total = 1 / total
            for start in range(0, ROW, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                m = load_channels(context, tl.minimum(o, K * K - 1), S, C, CP, False)
                s = _logits(q, m, tl.load(table + o[None, :]), PRECISION)
                p = tl.exp2(s * LOG2E - (peak * LOG2E)[:, None]) * total[:, None]
                tl.store(weights + o[None, :], p.to(p_ptr.dtype.element_ty), mask=m_n[:, None])

    @triton.jit
    def _add(value, sum_ptr, out_ptr, place, stride_c, m, again, more, C, CP, LAST):
        """Add ``[n, CP]`` to what others left in ``sum``, and leave it there where there are more to come."""
        c = tl.arange(0, CP)
        if LAST:
            at, m_c = place[:, None] + c[None, :], (c < C)[None, :]
            m, again, more = m[:, None] & m_c, again[:, None] & m_c, more[:, None] & m_c
        else:
            at, m_c = c[:, None] * stride_c + place[None, :], (c < C)[:, None]
            m, again, more, value = m[None, :] & m_c, again[None, :] & m_c, more[None, :] & m_c, tl.trans(value)
        value += tl.load(sum_ptr + at, mask=again, other=0.0)
        tl.store(sum_ptr + at, value, mask=more)
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=m & (more == 0))

    @triton.jit
    def _store_dq(dq, dq_ptr, sum_ptr, base, place, stride_c, m_n, SECOND, C, CP, LAST):
        """Both kernel sizes add to the gradient of a query: the first one leaves its share in float32."""
        if SECOND:
            dq += load_channels(sum_ptr + base, place, stride_c, C, CP, LAST)
            store_channels(dq_ptr + base, place, stride_c, dq, m_n, C, CP, LAST)
        else:
            store_channels(sum_ptr + base, place, stride_c, dq, m_n, C, CP, LAST)

    @triton.jit(do_not_specialize=_COUNTS)
    def contmix_bwd_kernel(
        q_ptr,
        m_ptr,
        table_ptr,
        v_ptr,
        out_ptr,
        lse_ptr,
        dout_ptr,
        grow_ptr,
        delta_ptr,
        dq_ptr,
        dq_sum_ptr,
        dm_ptr,
        dm_sum_ptr,
        dv_ptr,
        dv_sum_ptr,
        images,
        shares,
        G,
        H,
        W,
        S,
        first,
        tiles,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Gradients of queries, context and values of one group of an image, and the mean gradient of the logits.

        It works on one window after the other and, in memory, adds what they have in common.
        """
        b, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
        rows, cols = H - K + 1, W - K + 1
        steps = rows * cols * tiles
        queries = b * stride_qb + (g * C).to(INDEX) * stride_qc
        channels = b * stride_vb + ((SECOND * G + g) * C).to(INDEX) * stride_vc
        context = (b * G + g) * C * S + first
        scalar = ((b * 2 + SECOND) * G + g) * H * W
        EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
        grow = 1.0
        if q_ptr.dtype.element_ty == tl.float16:
            grow = tl.load(grow_ptr)
        for step in range(0, steps):
            si, sj, n, row, m_n = _window(step, tiles, H, W, K, BLOCK_N)
            table = table_ptr + ((g * (K * K) + row) * ROW)[:, None]
            q_place, v_place = n.to(INDEX) * stride_qn, n.to(INDEX) * stride_vn
            q = load_channels(q_ptr + queries, q_place, stride_qc, C, CP, LAST)
            dout = load_channels(dout_ptr + channels, v_place, stride_vc, C, CP, LAST)
            out = load_channels(out_ptr + channels, v_place, stride_vc, C, CP, LAST)
            delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
            lse = tl.load(lse_ptr + scalar + n, mask=m_n, other=float("inf"))
            dq = tl.zeros((BLOCK_N, CP), tl.float32)
            # the output has been rounded in half precision: correct what it gives by what is missing
            missing, mean = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N, CP), tl.float32)
            for start in range(0, ROW, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                m_o = o < K * K
                bias = tl.load(table + o[None, :])
                o = tl.minimum(o, K * K - 1)
                pixel = ((si + o // K) * W + sj + o % K).to(INDEX) * stride_vn
                v = load_channels(v_ptr + channels, pixel, stride_vc, C, CP, LAST)
                m = load_channels(m_ptr + context, o, S, C, CP, False)
                p = tl.exp2(_logits(q, m, bias, PRECISION) * LOG2E - lse[:, None])
                ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                p = p.to(v.dtype)
                if not EXACT:
                    missing += tl.sum(ds, 1)
                    mean = tl.dot(p, m, mean)
                exact = ds * grow
                ds = exact.to(q.dtype)
                dq = tl.dot(ds, m, dq, input_precision=PRECISION)
                if q.dtype == tl.float16:  # whose digits would show what the rounding of the logits' gradient takes off
                    dq = tl.dot((exact - ds.to(tl.float32)).to(q.dtype), m, dq)
                dm = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * (1 / grow)
                again, more = m_o & (step > 0), m_o & (step < steps - 1)
                _add(dm, dm_sum_ptr + context, dm_ptr + context, o, S, m_o, again, more, C, CP, False)
                dv = tl.dot(tl.trans(p), dout, input_precision=PRECISION)
                tile, y, x = step % tiles, o // K, o % K
                again = m_o & (((si > 0) & (y < K - 1)) | ((sj > 0) & (x < K - 1)) | (tile > 0))
                more = m_o & (((si < rows - 1) & (y > 0)) | ((sj < cols - 1) & (x > 0)) | (tile < tiles - 1))
                _add(dv, dv_sum_ptr + channels, dv_ptr + channels, pixel, stride_vc, m_o, again, more, C, CP, LAST)
            tl.store(delta_ptr + scalar + n, delta + missing, mask=m_n)
            dq *= 1 / grow
            if not EXACT:
                dq -= mean * missing[:, None]
            _store_dq(dq, dq_ptr, dq_sum_ptr, queries, q_place, stride_qc, m_n, SECOND, C, CP, LAST)
            tl.debug_barrier()  # another thread of the program may read back what this one wrote

    @triton.jit(do_not_specialize=_COUNTS)
    def contmix_bwd_bias_kernel(
        q_ptr,
        m_ptr,
        table_ptr,
        v_ptr,
        lse_ptr,
        dout_ptr,
        delta_ptr,
        dbias_ptr,
        images,
        shares,
        G,
        H,
        W,
        S,
        first,
        tiles,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Gradient of the logits of a tile of queries and offsets, summed over a share of the images."""
        BLOCKS: tl.constexpr = ROW // BLOCK_O
        steps = (H - K + 1) * (W - K + 1) * tiles
        share, pid = tl.program_id(0) % shares, tl.program_id(0) // shares
        o, pid = pid % BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O), pid // BLOCKS
        g = pid // steps
        si, sj, n, row, m_n = _window(pid % steps, tiles, H, W, K, BLOCK_N)
        bias = tl.load(table_ptr + ((g * (K * K) + row) * ROW)[:, None] + o[None, :])
        place = dbias_ptr + ((share * G + g) * H * W + n).to(tl.int64)[:, None] * ROW + o[None, :]
        o = tl.minimum(o, K * K - 1)
        pixel = ((si + o // K) * W + sj + o % K).to(INDEX) * stride_vn
        q_place, v_place = n.to(INDEX) * stride_qn, n.to(INDEX) * stride_vn
        acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
        for b in range(share.to(tl.int64), images, shares):
            channels = b * stride_vb + ((SECOND * G + g) * C).to(INDEX) * stride_vc
            scalar = ((b * 2 + SECOND) * G + g) * H * W
            q = load_channels(q_ptr + b * stride_qb + (g * C).to(INDEX) * stride_qc, q_place, stride_qc, C, CP, LAST)
            m = load_channels(m_ptr + (b * G + g) * C * S + first, o, S, C, CP, False)
            v = load_channels(v_ptr + channels, pixel, stride_vc, C, CP, LAST)
            dout = load_channels(dout_ptr + channels, v_place, stride_vc, C, CP, LAST)
            lse = tl.load(lse_ptr + scalar + n)
            delta = tl.load(delta_ptr + scalar + n)
            p = tl.exp2(_logits(q, m, bias, PRECISION) * LOG2E - lse[:, None])
            acc += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        tl.store(place, acc, mask=m_n[:, None])

    @triton.jit(do_not_specialize=_COUNTS)
    def contmix_bwd_products_kernel(
        q_ptr,
        m_ptr,
        ds_ptr,
        grow_ptr,
        dq_ptr,
        dq_sum_ptr,
        dm_sum_ptr,
        shares,
        G,
        H,
        W,
        S,
        first,
        tiles,
        stride_qb,
        stride_qc,
        stride_qn,
        SECOND: tl.constexpr,
        K: tl.constexpr,
        ROW: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        LAST: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Gradients of a share of the queries of one group of an image, and of its context by those, from logits'."""
        share, pid = tl.program_id(0) % shares, tl.program_id(0) // shares
        b, g = (pid // G).to(tl.int64), pid % G
        queries = b * stride_qb + (g * C).to(INDEX) * stride_qc
        grow = 1.0
        if q_ptr.dtype.element_ty == tl.float16:
            grow = tl.load(grow_ptr)
        for tile in range(share, tiles, shares):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = n < H * W
            n = tl.minimum(n, H * W - 1)
            place = n.to(INDEX) * stride_qn
            q = load_channels(q_ptr + queries, place, stride_qc, C, CP, LAST)
            dq = tl.zeros((BLOCK_N, CP), tl.float32)
            for start in range(0, ROW, BLOCK_O):
                o = start + tl.arange(0, BLOCK_O)
                m_o = o < K * K
                p_ds = ds_ptr + (b * G + g) * H * W * ROW + (n.to(INDEX)[:, None] * ROW + o[None, :])
                ds = tl.load(p_ds, mask=m_n[:, None] & m_o[None, :], other=0.0)
                o = tl.minimum(o, K * K - 1)
                m = load_channels(m_ptr + (b * G + g) * C * S + first, o, S, C, CP, False)
                dq = tl.dot(ds, m, dq, input_precision=PRECISION)
                dm = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * (1 / grow)
                own = dm_sum_ptr + ((b * G + g) * shares + share) * C * K * K
                _add(dm, own, own, o, K * K, m_o, m_o & (tile > share), m_o, C, CP, False)
            _store_dq(dq * (1 / grow), dq_ptr, dq_sum_ptr, queries, place, stride_qc, m_n, SECOND, C, CP, LAST)
            tl.debug_barrier()  # another thread of the program may read back what this one wrote


def _row(K: int) -> int:
    """Length of a row of biases or weights, in whole tiles of offsets."""
    return power_of_two(K * K) if K <= 8 else -(-K * K // 64) * 64


def by_windows(H: int, W: int, K: int) -> bool:
    """Whether windows are so few that it costs less to work on their queries together than on tiles of the map.

    Counted in pairs of a query and a value or offset, of which those of a tile, picked one by one, cost four times as
    many instructions.
    """
    region, tiles = -(-(K + 3) // 8) * 8, -(-H // sums.TILE) * -(-W // sums.TILE)
    windows = (H - K + 1) * (W - K + 1) * -(-_sharing(H, W, K) // 64)
    return windows * 64 * _row(K) <= 4 * tiles * sums.TILE**2 * region**2


def _sharing(H: int, W: int, K: int) -> int:
    """Most queries that share a window."""
    return (H if H == K else (K + 1) // 2) * (W if W == K else (K + 1) // 2)


class _Size:
    """The launches for one of the two kernel sizes; ``q`` and ``v`` are dense, in the same memory format."""

    def __init__(self, q: Tensor, M: Tensor, bias: Tensor, rpb: Tensor, v: Tensor, k1: int, K: int, second: bool):
        B, G, C, S = M.shape
        H, W = q.shape[2], q.shape[3]
        self.q, self.v, self.K, self.row = q, v, K, _row(K)
        self.windows = by_windows(H, W, K)
        self.sizes = B, G, C, H, W
        self.channels = slice(second * G * C, (second + 1) * G * C)
        self.weights = q.new_empty(0 if self.windows else B * G, H * W, self.row)
        self.index = index_type(q, v, self.weights)
        table = torch.empty(G, K * K, self.row, dtype=torch.float32, device=q.device)
        first = k1 * k1 if second else 0
        with on_device(q):
            contmix_bias_kernel[(G * K * K,)](rpb, bias, table, first, K, self.row, BLOCK=64, num_warps=1)
        self.options: dict[str, Any] = {
            "q_ptr": q,
            "m_ptr": M,
            "G": G,
            "H": H,
            "W": W,
            "S": S,
            "first": first,
            **{f"stride_q{axis}": q.stride(i) for axis, i in zip("bcn", (0, 1, 3), strict=True)},
            "SECOND": second,
            "K": K,
            "ROW": self.row,
            "C": C,
            "CP": power_of_two(C),
            "LAST": v.stride(1) == 1,
            "PRECISION": product_precision(q.device),
            "INDEX": self.index,
        }
        self.values: dict[str, Any] = {
            "table_ptr": table,
            "images": B,
            **{f"stride_v{axis}": v.stride(i) for axis, i in zip("bcn", (0, 1, 3), strict=True)},
        }

    def run(self, kernel: Any, name: str, programs: int, shares: int = 1, **pointers: Any) -> None:
        choice = self.choice(name)
        sizes = {"shares": shares, "tiles": self.tiles(name), **choice._asdict()}
        if self.options["CP"] > 16:
            sizes |= all_registers(choice.num_warps)
        with on_device(self.q):
            kernel[(programs * shares,)](**self.options, **pointers, **sizes)

    def choice(self, name: str) -> _Choice:
        choice, queries = CHOICES[90][name, self.q.element_size(), self.options["CP"]], self.queries()
        return choice._replace(
            BLOCK_N=min(choice.BLOCK_N, power_of_two(queries)), BLOCK_O=min(choice.BLOCK_O, self.row)
        )

    def queries(self) -> int:
        """Most queries that are worked on together: those of a window, or all."""
        _, _, _, H, W = self.sizes
        return _sharing(H, W, self.K) if self.windows else H * W

    def tiles(self, name: str) -> int:
        return -(-self.queries() // self.choice(name).BLOCK_N)

    def programs(self, name: str) -> int:
        """Tiles of queries in the windows of all groups, or in all groups."""
        _, G, _, H, W = self.sizes
        return G * self.tiles(name) * ((H - self.K + 1) * (W - self.K + 1) if self.windows else 1)

    def sums(self) -> sums.Tiles:
        B, G, C, H, W = self.sizes
        strides = self.v.stride(0), C * self.v.stride(1), self.v.stride(1), self.v.stride(3)
        return sums.Tiles(self.v, self.sizes, strides, self.K, self.row, self.index)

    def half(self, t: Tensor) -> Tensor:
        """The channels of a map that belong to this kernel size."""
        return t[:, self.channels]

    def make_weights(self) -> None:
        programs = self.programs("weights")
        shares = min(self.sizes[0], -(-PROGRAMS // programs))
        self.run(contmix_weights_kernel, "weights", programs, shares, p_ptr=self.weights, **self.values)

    def forward(self, out: Tensor, lse: Tensor) -> None:
        if self.windows:
            programs = self.programs("forward")
            shares = min(self.sizes[0], -(-PROGRAMS // programs))
            self.run(
                contmix_fwd_kernel, "forward", programs, shares, v_ptr=self.v, out_ptr=out, lse_ptr=lse, **self.values
            )
        else:
            self.make_weights()
            self.sums().run(
                sums.na2d_av_fwd_kernel,
                "fwd",
                attn_ptr=self.weights,
                value_ptr=self.half(self.v),
                out_ptr=self.half(out),
            )

    def backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, grow: Tensor, dq: Tensor, dq_sum: Tensor, dM: Tensor, dv: Tensor
    ) -> Tensor:
        """Gradients of all but the tables; returns that of the logits, summed over the images ``[G, N, ROW]``."""
        B, G, C, H, W = self.sizes
        grads: dict[str, Any] = {"grow_ptr": grow, "dq_ptr": dq, "dq_sum_ptr": dq_sum}
        if self.windows:
            delta = torch.empty_like(lse)
            several = (H - self.K + 1) * (W - self.K + 1) * self.tiles("backward") > 1
            dM_sum, dv_sum = (
                torch.empty_like(t, dtype=torch.float32) if several else t.new_empty(0, dtype=torch.float32)
                for t in (dM, dv)
            )
            shared: dict[str, Any] = {
                **self.values,
                "v_ptr": self.v,
                "lse_ptr": lse,
                "dout_ptr": dout,
                "delta_ptr": delta,
            }
            self.run(
                contmix_bwd_kernel,
                "backward",
                B * G,
                out_ptr=out,
                dm_ptr=dM,
                dm_sum_ptr=dM_sum,
                dv_ptr=dv,
                dv_sum_ptr=dv_sum,
                **shared,
                **grads,
            )
            programs = self.programs("bias") * (self.row // self.choice("bias").BLOCK_O)
            shares = min(B, -(-PROGRAMS // programs))
            dbias = delta.new_empty(shares, G, H * W, self.row)
            self.run(contmix_bwd_bias_kernel, "bias", programs, shares, dbias_ptr=dbias, **shared)
            return dbias.sum(0)
        self.make_weights()
        tiles, ds = self.sums(), torch.empty_like(self.weights)
        halves = {"dout_ptr": self.half(dout), "attn_ptr": self.weights}
        tiles.run(
            sums.na2d_av_bwd_attn_kernel,
            "attn",
            value_ptr=self.half(self.v),
            dattn_ptr=ds,
            grow_ptr=grow,
            SOFTMAX=True,
            **halves,
        )
        tiles.run(sums.na2d_av_bwd_value_kernel, "value", dvalue_ptr=self.half(dv), **halves)
        shares = min(self.tiles("products"), -(-PROGRAMS // (B * G)))
        dM_sum = torch.empty(B, G, shares, C, self.K * self.K, dtype=torch.float32, device=self.q.device)
        self.run(contmix_bwd_products_kernel, "products", B * G, shares, ds_ptr=ds, dm_sum_ptr=dM_sum, **grads)
        first = self.options["first"]
        dM[..., first : first + self.K * self.K] = dM_sum.sum(2)
        total = ds.unflatten(0, (B, G)).sum(0, dtype=torch.float32)
        return total / grow if grow.numel() > 0 else total


def _sizes(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> tuple[_Size, _Size]:
    return _Size(q, M, bias, rpb1, v, k1, k1, False), _Size(q, M, bias, rpb2, v, k1, k2, True)


def kernel_forward(tensors: Sequence[Tensor], k1: int, k2: int) -> tuple[Tensor, Tensor]:
    """Output, and log-sum ``[B, 2, G, N]`` of the weights of those kernel sizes that are worked on by windows.

    The tensors are ``q``, ``M``, ``bias``, ``rpb1``, ``rpb2`` and ``v``, the maps dense and in one memory format.
    """
    q, M, bias, rpb1, rpb2, v = tensors
    out = torch.empty_like(v)
    lse = torch.zeros(M.shape[0], 2, M.shape[1], q.shape[2] * q.shape[3], dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        for size in _sizes(q, M, bias, rpb1, rpb2, v, k1, k2):
            size.forward(out, lse)
    return out, lse


def kernel_backward(
    dout: Tensor, out: Tensor, lse: Tensor, tensors: Sequence[Tensor], k1: int, k2: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of ``q``, ``M`` and ``v``, and those of each kernel size's logits, summed over the images."""
    q, M, bias, rpb1, rpb2, v = tensors
    dq, dM, dv = torch.empty_like(q), torch.empty_like(M), torch.empty_like(v)
    if dout.numel() == 0:
        N = q.shape[2] * q.shape[3]
        return dq, dM, dv, [bias.new_zeros(M.shape[1], N, k * k) for k in (k1, k2)]
    grow, dq_sum = gradient_scale(dout), torch.empty_like(q, dtype=torch.float32)
    sizes = _sizes(q, M, bias, rpb1, rpb2, v, k1, k2)
    dlogits = [size.backward(dout, out, lse, grow, dq, dq_sum, dM, dv)[..., : size.K**2] for size in sizes]
    return dq, dM, dv, dlogits
