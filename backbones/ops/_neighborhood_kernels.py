"""Triton kernels of neighbourhood attention: see ``neighborhood`` for the formula and for who calls them.

A program owns a tile of ``TH x TW`` queries (or keys) of one dilation group, head and image, and steps through the
region of keys (or queries) that the tile needs, ``BLOCK`` of them at once: whole rows, in ``CHUNKS`` pieces of 16
columns.  Log-sums and logits are in base 2.  Strides of ``q``, ``k`` and ``v`` are those of image, row, column and
head; all channels are dense, the other maps are dense ``[B, H, W, h, C]``, and what is one number for a query ``[B, h,
H, W]``.

Bias and mask come from a table ``[h, tiles, 2 Kh, TW, 16 CHUNKS]`` in which every tile of columns has, for each
relative row, the bias of its pairs of columns in base 2, -inf outside the windows; the last row is -inf alone.  A pair
finds its row by a few integers, the columns need no arithmetic, and the few KiB of a program's tile stay in the cache.

Additional keys come after the window, ``BLOCK`` at once, with a table ``[h, H W, P]`` of their own: ``P`` is padded by
-inf to whole tiles of ``KEYS``, and a bias that all heads or queries share is there once, with a stride of 0.  Their
gradients are those of plain attention over the tokens of the map.

The sizes of a map, its dilation and the number of heads are run-time numbers: a model compiles each kernel once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._kernels import cdiv, gradient_scale, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

TILE = 8  # rows and columns of a tile: larger ones spend more on pairs outside the windows
COLUMNS = 16  # of a step
KEYS = 64  # of a tile of additional keys: a pooled map of 7x7 is one
PROGRAMS = 1024  # of the kernel for the gradient of the bias: enough to fill a GPU


class _Choice(NamedTuple):
    """How a kernel runs: keys or queries of a step, warps, and stages of its pipeline."""

    BLOCK: int
    num_warps: int
    num_stages: int


# By compute capability; then by bytes of an element and of a head, padded, and by kernel; kernels of queries have a
# choice of their own where these see additional keys.  Chosen from the machine code for 9.0 (no spill, fewest
# instructions), not from measured times; every other capability takes the same until something is measured there.
_QUERIES, _ADDITIONAL = ("fwd_additional", "query_additional"), ("additional", "additional_bias")
_KERNELS = "fwd", "query", "key", "bias", *_QUERIES, *_ADDITIONAL
_HALF = dict.fromkeys(_KERNELS, _Choice(32, 4, 2)) | dict.fromkeys((*_QUERIES, "additional"), _Choice(32, 4, 1))
_SINGLE = dict.fromkeys(_KERNELS, _Choice(16, 8, 1))
CHOICES: dict[int, dict[tuple[int, int], dict[str, _Choice]]] = {
    90: {
        (2, 128): _HALF,
        (2, 256): _HALF | dict.fromkeys(("query", "query_additional"), _Choice(32, 8, 2)),
        (4, 128): dict.fromkeys(_KERNELS, _Choice(16, 4, 2)) | dict.fromkeys(_ADDITIONAL, _Choice(16, 4, 1)),
        (4, 256): _SINGLE,
        (4, 512): _SINGLE | dict.fromkeys(("query", *_QUERIES), _Choice(16, 16, 1)),
    }
}

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import LOG2E, index_type, load_vectors, store_vectors

    # a kernel must not be compiled again because one of these is 1 or divisible by 16
    _COUNTS = ["heads", "rows", "cols", "key_rows", "key_cols", "dilate_i", "dilate_j", "tables"]
    _TOKENS = ["images", "heads", "queries", "number", "shares"]

    @triton.jit
    def _window_start(t, n, K: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
        """First key in the window of query ``t``, in a group of ``n`` keys; outside the map where it is masked."""
        start = t // S * S + (S // 2 - K // 2)
        return start if MASKED else tl.minimum(tl.maximum(start, 0), n - K)

    @triton.jit
    def _first_key(t, n, K: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
        """First key on the map in the window of query ``t``."""
        start = _window_start(t, n, K, S, MASKED)
        return tl.maximum(start, 0) if MASKED else start

    @triton.jit
    def _end_key(t, n, K: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
        """First key after the window of query ``t``, or after the map."""
        end = _window_start(t, n, K, S, MASKED) + K
        return tl.minimum(end, n) if MASKED else end

    @triton.jit
    def _first_query(j, K: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
        """First query whose window holds key ``j``."""
        first = (j - K + K // 2 - S // 2 + S) // S * S
        return tl.maximum(first, 0) if MASKED else tl.where(j < K, 0, first)

    @triton.jit
    def _last_query(j, n, K: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
        """Last query whose window holds key ``j``, in a group of ``n`` keys."""
        last = tl.minimum((j + K // 2 - S // 2) // S * S + S - 1, n - 1)
        return last if MASKED else tl.where(j >= n - K, n - 1, last)

    @triton.jit
    def _place(rows, cols, heads, dilate_i, dilate_j, TH: tl.constexpr, TW: tl.constexpr):
        """Image, head, dilation group, first row and column in it, and tile of columns, of the program's tile."""
        pid = tl.program_id(0)
        tiles_i, tiles_j = tl.cdiv(tl.cdiv(rows, dilate_i), TH), tl.cdiv(tl.cdiv(cols, dilate_j), TW)
        columns = pid % (dilate_j * tiles_j)
        pid = pid // (dilate_j * tiles_j)
        i, pid = pid % tiles_i * TH, pid // tiles_i
        gi, pid = pid % dilate_i, pid // dilate_i
        return pid // heads, pid % heads, gi, columns // tiles_j, i, columns % tiles_j * TW, columns

    @triton.jit
    def _of_head(ptr, image, head, stride, ALIGN: tl.constexpr):
        """Where the vectors of an image and a head begin."""
        return ptr + tl.multiple_of(image * stride[0], ALIGN) + tl.multiple_of(head * stride[1], ALIGN)

    @triton.jit
    def _on_map(i, j, stride, INDEX: tl.constexpr, ALIGN: tl.constexpr):
        """Offsets of vectors in rows ``i`` and columns ``j``."""
        return tl.multiple_of(i.to(INDEX) * stride[2] + j.to(INDEX) * stride[3], ALIGN)

    @triton.jit
    def _of_tokens(n, stride, INDEX: tl.constexpr, ALIGN: tl.constexpr):
        """Offsets of the vectors of tokens."""
        return tl.multiple_of(n.to(INDEX) * stride[2], ALIGN)

    @triton.jit
    def _step(step, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
        """Rows, columns and first column of a step, counted in the region."""
        n = tl.arange(0, BLOCK)
        first = step % CHUNKS * COLUMNS
        return step // CHUNKS * (BLOCK // COLUMNS) + n // COLUMNS, first + n % COLUMNS, first

    @triton.jit
    def _bias(
        table_ptr,
        qi,
        ki,
        n_q,
        n_k,
        place,
        STRIDE: tl.constexpr,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """Bias and mask of pairs in rows ``qi`` and ``ki``; ``place`` is that of their columns in the table."""
        start = _window_start(qi, n_k, K, S, MASKED)
        inside = (ki >= start) & (ki < start + K) & (qi < n_q)
        if MASKED:
            inside &= ki < n_k
        return tl.load(table_ptr + (tl.where(inside, ki - qi + (K - 1), 2 * K - 1) * STRIDE + place))

    @triton.jit
    def _additional(
        k_ptr,
        v_ptr,
        table_ptr,
        first,
        number,
        stride_k,
        stride_v,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Some additional keys, their values, and their bias and mask, of which ``table_ptr`` holds rows of queries."""
        n = first + tl.arange(0, BLOCK)
        k = load_vectors(k_ptr, _of_tokens(n, stride_k, INDEX, ALIGN), n < number, C, CP)
        v = load_vectors(v_ptr, _of_tokens(n, stride_v, INDEX, ALIGN), n < number, CV, CVP)
        return k, v, tl.load(table_ptr[:, None] + n[None, :])

    @triton.jit
    def _attend(q, k, v, bias, factor, peak, total, acc, PRECISION: tl.constexpr):
        """Let queries see some more keys: highest logit, sum of the weights and weighted values until here."""
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        higher = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        return higher, total, acc

    @triton.jit
    def _attend_bwd(
        q,
        k,
        v,
        bias,
        dout,
        lse,
        rough,
        large,
        factor,
        dq,
        missing,
        mean,
        EXACT: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Gradient of queries by some more keys, and what it takes to correct it."""
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - rough[:, None])
        dq = tl.dot((ds * large).to(k.dtype), k, dq, input_precision=PRECISION)
        if not EXACT:
            missing += tl.sum(ds, 1)
            mean = tl.dot(p.to(k.dtype), k, mean)
        return dq, missing, mean

    @triton.jit(do_not_specialize=["by_key", "cols", "key_cols", "dilate_j"])
    def neighborhood_table_kernel(
        rpb_ptr,
        table_ptr,
        by_key,
        cols,
        key_cols,
        dilate_j,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
        TW: tl.constexpr,
        WIDTH: tl.constexpr,
        WIDTHP: tl.constexpr,
    ):
        """Table of bias and mask, for tiles of queries or of keys."""
        columns, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        tiles = tl.cdiv(tl.cdiv(tl.where(by_key != 0, key_cols, cols), dilate_j), TW)
        gj, j = columns // tiles, columns % tiles * TW
        n_q, n_k = tl.cdiv(cols - gj, dilate_j), tl.cdiv(key_cols - gj, dilate_j)
        w = tl.arange(0, WIDTHP)
        own = (j + tl.arange(0, TW))[:, None]
        first = tl.where(by_key != 0, _first_query(j, K[1], S[1], MASKED), _first_key(j, n_k, K[1], S[1], MASKED))
        other = (first + w)[None, :]
        qj, kj = tl.where(by_key != 0, other, own), tl.where(by_key != 0, own, other)
        start = _window_start(qj, n_k, K[1], S[1], MASKED)
        inside = (kj >= start) & (kj < start + K[1]) & (qj < n_q) & (row < 2 * K[0] - 1)
        if MASKED:
            inside &= kj < n_k
        place = (head * (2 * K[0] - 1) + row) * (2 * K[1] - 1) + (kj - qj + (K[1] - 1))
        bias = tl.load(rpb_ptr + place, mask=inside, other=float("-inf")) * LOG2E
        out = ((head * tl.num_programs(0) + columns) * (2 * K[0]) + row) * (TW * WIDTH)
        out += (tl.arange(0, TW) * WIDTH)[:, None] + w[None, :]
        tl.store(table_ptr + out, bias, mask=(w < WIDTH)[None, :])

    @triton.jit(do_not_specialize=[*_COUNTS, "number"])
    def neighborhood_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        add_k_ptr,
        add_v_ptr,
        add_table_ptr,
        out_ptr,
        lse_ptr,
        factor,
        heads,
        rows,
        cols,
        key_rows,
        key_cols,
        dilate_i,
        dilate_j,
        tables,
        number,
        stride_q,
        stride_k,
        stride_v,
        stride_add_k,
        stride_add_v,
        stride_add_table,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        CHUNKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        image, head, gi, gj, i, j, columns = _place(rows, cols, heads, dilate_i, dilate_j, TH, TW)
        b = image.to(tl.int64)
        ni, nj = tl.cdiv(key_rows - gi, dilate_i), tl.cdiv(key_cols - gj, dilate_j)
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * dilate_i + gi, qj * dilate_j + gj
        m_q = (yi < rows) & (yj < cols)
        place = _on_map(yi, yj, stride_q, INDEX, ALIGN)
        q = load_vectors(_of_head(q_ptr, b, head, stride_q, ALIGN), place, m_q, C, CP)
        keys, values = _of_head(k_ptr, b, head, stride_k, ALIGN), _of_head(v_ptr, b, head, stride_v, ALIGN)
        TABLE: tl.constexpr = TW * CHUNKS * COLUMNS  # of a relative row
        table = table_ptr + (head * tables + columns) * (2 * K[0] * TABLE)
        own = (m % TW * (CHUNKS * COLUMNS))[:, None]
        n_q = tl.cdiv(rows - gi, dilate_i)
        top, left = _first_key(i, ni, K[0], S[0], MASKED), _first_key(j, nj, K[1], S[1], MASKED)
        count = _end_key(i + TH - 1, ni, K[0], S[0], MASKED) - top
        peak = tl.full((TH * TW,), -1e30, tl.float32)  # finite: a step may hold no key of a query
        total = tl.zeros((TH * TW,), tl.float32)
        acc = tl.zeros((TH * TW, CVP), tl.float32)
        for step in range(0, tl.cdiv(count, BLOCK // COLUMNS) * CHUNKS):
            r, c, _ = _step(step, CHUNKS, BLOCK, COLUMNS)
            zi, zj = (top + r) * dilate_i + gi, (left + c) * dilate_j + gj
            m_k = (zi < key_rows) & (zj < key_cols)
            k = load_vectors(keys, _on_map(zi, zj, stride_k, INDEX, ALIGN), m_k, C, CP)
            v = load_vectors(values, _on_map(zi, zj, stride_v, INDEX, ALIGN), m_k, CV, CVP)
            bias = _bias(table, qi[:, None], (top + r)[None, :], n_q, ni, own + c[None, :], TABLE, K[0], S[0], MASKED)
            peak, total, acc = _attend(q, k, v, bias, factor, peak, total, acc, PRECISION)
        query = yi.to(INDEX) * cols + yj
        if add_k_ptr is not None:
            keys, values = (
                _of_head(add_k_ptr, b, head, stride_add_k, ALIGN),
                _of_head(add_v_ptr, b, head, stride_add_v, ALIGN),
            )
            table = add_table_ptr + head.to(tl.int64) * stride_add_table[0]
            table += tl.where(m_q, query, 0) * stride_add_table[1]
            for first in range(0, number, BLOCK):
                k, v, bias = _additional(
                    keys, values, table, first, number, stride_add_k, stride_add_v, C, CV, CP, CVP, INDEX, ALIGN, BLOCK
                )
                peak, total, acc = _attend(q, k, v, bias, factor, peak, total, acc, PRECISION)
        total = tl.where(m_q, total, 1.0)
        first = b * rows * cols * heads
        store_vectors(out_ptr + (first + head) * CV, query * (heads * CV), acc * (1 / total)[:, None], m_q, CV, CVP)
        tl.store(lse_ptr + first + head * rows * cols + query, peak + tl.log2(total), mask=m_q)

    @triton.jit(do_not_specialize=[*_COUNTS, "number"])
    def neighborhood_bwd_query_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        add_k_ptr,
        add_v_ptr,
        add_table_ptr,
        out_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        large_ptr,
        dq_ptr,
        factor,
        scale,
        heads,
        rows,
        cols,
        key_rows,
        key_cols,
        dilate_i,
        dilate_j,
        tables,
        number,
        stride_q,
        stride_k,
        stride_v,
        stride_add_k,
        stride_add_v,
        stride_add_table,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        CHUNKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the queries, and ``delta``, the mean gradient of the logits of each."""
        image, head, gi, gj, i, j, columns = _place(rows, cols, heads, dilate_i, dilate_j, TH, TW)
        b = image.to(tl.int64)
        ni, nj = tl.cdiv(key_rows - gi, dilate_i), tl.cdiv(key_cols - gj, dilate_j)
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * dilate_i + gi, qj * dilate_j + gj
        m_q = (yi < rows) & (yj < cols)
        place = _on_map(yi, yj, stride_q, INDEX, ALIGN)
        q = load_vectors(_of_head(q_ptr, b, head, stride_q, ALIGN), place, m_q, C, CP)
        query, first = yi.to(INDEX) * cols + yj, b * rows * cols * heads
        dout = load_vectors(dout_ptr + (first + head) * CV, query * (heads * CV), m_q, CV, CVP)
        out = load_vectors(out_ptr + (first + head) * CV, query * (heads * CV), m_q, CV, CVP)
        rough = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        scalar = first + head * rows * cols
        lse = tl.load(lse_ptr + scalar + query, mask=m_q, other=0.0)
        large = 1.0
        if q.dtype == tl.float16:
            large = tl.load(large_ptr)
        keys, values = _of_head(k_ptr, b, head, stride_k, ALIGN), _of_head(v_ptr, b, head, stride_v, ALIGN)
        TABLE: tl.constexpr = TW * CHUNKS * COLUMNS  # of a relative row
        table = table_ptr + (head * tables + columns) * (2 * K[0] * TABLE)
        own = (m % TW * (CHUNKS * COLUMNS))[:, None]
        n_q = tl.cdiv(rows - gi, dilate_i)
        top, left = _first_key(i, ni, K[0], S[0], MASKED), _first_key(j, nj, K[1], S[1], MASKED)
        count = _end_key(i + TH - 1, ni, K[0], S[0], MASKED) - top
        dq = tl.zeros((TH * TW, CP), tl.float32)
        # the output has been rounded in half precision: correct what it gives by what is missing
        EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
        missing, mean = tl.zeros((TH * TW,), tl.float32), tl.zeros((TH * TW, CP), tl.float32)
        for step in range(0, tl.cdiv(count, BLOCK // COLUMNS) * CHUNKS):
            r, c, _ = _step(step, CHUNKS, BLOCK, COLUMNS)
            zi, zj = (top + r) * dilate_i + gi, (left + c) * dilate_j + gj
            m_k = (zi < key_rows) & (zj < key_cols)
            k = load_vectors(keys, _on_map(zi, zj, stride_k, INDEX, ALIGN), m_k, C, CP)
            v = load_vectors(values, _on_map(zi, zj, stride_v, INDEX, ALIGN), m_k, CV, CVP)
            bias = _bias(table, qi[:, None], (top + r)[None, :], n_q, ni, own + c[None, :], TABLE, K[0], S[0], MASKED)
            dq, missing, mean = _attend_bwd(
                q, k, v, bias, dout, lse, rough, large, factor, dq, missing, mean, EXACT, PRECISION
            )
        if add_k_ptr is not None:
            keys, values = (
                _of_head(add_k_ptr, b, head, stride_add_k, ALIGN),
                _of_head(add_v_ptr, b, head, stride_add_v, ALIGN),
            )
            table = add_table_ptr + head.to(tl.int64) * stride_add_table[0]
            table += tl.where(m_q, query, 0) * stride_add_table[1]
            for start in range(0, number, BLOCK):
                k, v, bias = _additional(
                    keys, values, table, start, number, stride_add_k, stride_add_v, C, CV, CP, CVP, INDEX, ALIGN, BLOCK
                )
                dq, missing, mean = _attend_bwd(
                    q, k, v, bias, dout, lse, rough, large, factor, dq, missing, mean, EXACT, PRECISION
                )
        tl.store(delta_ptr + scalar + query, rough + missing, mask=m_q)
        if not EXACT:
            dq -= mean * (missing * large)[:, None]
        store_vectors(dq_ptr + (first + head) * C, query * (heads * C), dq * (scale / large), m_q, C, CP)

    @triton.jit(do_not_specialize=_COUNTS)
    def neighborhood_bwd_key_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        large_ptr,
        dk_ptr,
        dv_ptr,
        factor,
        scale,
        heads,
        rows,
        cols,
        key_rows,
        key_cols,
        dilate_i,
        dilate_j,
        tables,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        CHUNKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradients of the keys and values of a tile, from all queries whose windows reach into it."""
        image, head, gi, gj, i, j, columns = _place(key_rows, key_cols, heads, dilate_i, dilate_j, TH, TW)
        b = image.to(tl.int64)
        ni = tl.cdiv(key_rows - gi, dilate_i)
        n = tl.arange(0, TH * TW)
        ki, kj = i + n // TW, j + n % TW
        zi, zj = ki * dilate_i + gi, kj * dilate_j + gj
        m_k = (zi < key_rows) & (zj < key_cols)
        place = _on_map(zi, zj, stride_k, INDEX, ALIGN)
        k = load_vectors(_of_head(k_ptr, b, head, stride_k, ALIGN), place, m_k, C, CP)
        place = _on_map(zi, zj, stride_v, INDEX, ALIGN)
        v = load_vectors(_of_head(v_ptr, b, head, stride_v, ALIGN), place, m_k, CV, CVP)
        first = b * rows * cols * heads
        queries, grads = _of_head(q_ptr, b, head, stride_q, ALIGN), dout_ptr + (first + head) * CV
        scalar = first + head * rows * cols
        large = 1.0
        if q_ptr.dtype.element_ty == tl.float16:
            large = tl.load(large_ptr)
        TABLE: tl.constexpr = TW * CHUNKS * COLUMNS  # of a relative row
        table = table_ptr + (head * tables + columns) * (2 * K[0] * TABLE)
        own = (n % TW * (CHUNKS * COLUMNS))[:, None]
        n_q = tl.cdiv(rows - gi, dilate_i)  # a padded map has keys where there are no queries
        top, left = _first_query(i, K[0], S[0], MASKED), _first_query(j, K[1], S[1], MASKED)
        bottom = _last_query(tl.minimum(i + TH, ni) - 1, ni, K[0], S[0], MASKED)
        count = tl.maximum(tl.minimum(bottom, n_q - 1) + 1 - top, 0)
        dk = tl.zeros((TH * TW, CP), tl.float32)
        dv = tl.zeros((TH * TW, CVP), tl.float32)
        for step in range(0, tl.cdiv(count, BLOCK // COLUMNS) * CHUNKS):
            r, c, _ = _step(step, CHUNKS, BLOCK, COLUMNS)
            yi, yj = (top + r) * dilate_i + gi, (left + c) * dilate_j + gj
            m_q = (yi < rows) & (yj < cols)
            query = yi.to(INDEX) * cols + yj
            lse = tl.load(lse_ptr + scalar + query, mask=m_q, other=0.0)
            delta = tl.load(delta_ptr + scalar + query, mask=m_q, other=0.0)
            q = load_vectors(queries, _on_map(yi, yj, stride_q, INDEX, ALIGN), m_q, C, CP)
            dout = load_vectors(grads, query * (heads * CV), m_q, CV, CVP)
            bias = _bias(table, (top + r)[None, :], ki[:, None], n_q, ni, own + c[None, :], TABLE, K[0], S[0], MASKED)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor + bias
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot((ds * large).to(q.dtype), q, dk, input_precision=PRECISION)
        token = zi.to(INDEX) * key_cols + zj
        first = b * key_rows * key_cols * heads + head
        store_vectors(dk_ptr + first * C, token * (heads * C), dk * (scale / large), m_k, C, CP)
        store_vectors(dv_ptr + first * CV, token * (heads * CV), dv, m_k, CV, CVP)

    @triton.jit(do_not_specialize=["images", "shares", *_COUNTS])
    def neighborhood_bwd_bias_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        drpb_ptr,
        factor,
        images,
        shares,
        heads,
        rows,
        cols,
        key_rows,
        key_cols,
        dilate_i,
        dilate_j,
        tables,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        MASKED: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        CHUNKS: tl.constexpr,
        COLUMNS: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the bias from one step of a tile, over a share of the images.

        Programs store ``[steps, shares, h, tiles, bins]``.  Gradients of the logits are summed up pair by pair.
        Only then are pairs with the same distance added, by products with ones and zeros, which are exact
        whatever the precision of other products.
        """
        share, head, gi, gj, i, j, columns = _place(rows, cols, heads, dilate_i, dilate_j, TH, TW)
        ni, nj = tl.cdiv(key_rows - gi, dilate_i), tl.cdiv(key_cols - gj, dilate_j)
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * dilate_i + gi, qj * dilate_j + gj
        m_q = (yi < rows) & (yj < cols)
        query = yi.to(INDEX) * cols + yj
        top, left = _first_key(i, ni, K[0], S[0], MASKED), _first_key(j, nj, K[1], S[1], MASKED)
        r, c, column = _step(tl.program_id(1), CHUNKS, BLOCK, COLUMNS)
        row = tl.program_id(1) // CHUNKS * (BLOCK // COLUMNS)
        zi, zj = (top + r) * dilate_i + gi, (left + c) * dilate_j + gj
        m_k = (zi < key_rows) & (zj < key_cols)
        TABLE: tl.constexpr = TW * CHUNKS * COLUMNS  # of a relative row
        table = table_ptr + (head * tables + columns) * (2 * K[0] * TABLE)
        own, n_q = (m % TW * (CHUNKS * COLUMNS))[:, None], tl.cdiv(rows - gi, dilate_i)
        bias = _bias(table, qi[:, None], (top + r)[None, :], n_q, ni, own + c[None, :], TABLE, K[0], S[0], MASKED)
        place_q = _on_map(yi, yj, stride_q, INDEX, ALIGN)
        place_k = _on_map(zi, zj, stride_k, INDEX, ALIGN)
        place_v = _on_map(zi, zj, stride_v, INDEX, ALIGN)
        acc = tl.zeros((TH * TW, BLOCK), tl.float32)
        for b in range(share.to(tl.int64), images, shares):
            first = b * rows * cols * heads
            scalar = first + head * rows * cols
            lse = tl.load(lse_ptr + scalar + query, mask=m_q, other=0.0)
            delta = tl.load(delta_ptr + scalar + query, mask=m_q, other=0.0)
            q = load_vectors(_of_head(q_ptr, b, head, stride_q, ALIGN), place_q, m_q, C, CP)
            dout = load_vectors(dout_ptr + (first + head) * CV, query * (heads * CV), m_q, CV, CVP)
            k = load_vectors(_of_head(k_ptr, b, head, stride_k, ALIGN), place_k, m_k, C, CP)
            v = load_vectors(_of_head(v_ptr, b, head, stride_v, ALIGN), place_v, m_k, CV, CVP)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
            p = tl.exp2(s - lse[:, None])
            acc += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        BR: tl.constexpr = BLOCK // COLUMNS
        pairs = tl.permute(tl.reshape(acc, (TH, TW, BR, COLUMNS)), (0, 2, 1, 3))
        pairs = tl.reshape(pairs, (TH * BR, TW * COLUMNS))
        x, y = tl.arange(0, TW * COLUMNS), tl.arange(0, TH * BR)
        d, e = tl.arange(0, 2 * COLUMNS), tl.arange(0, 16)  # distances of columns and rows, from the smallest
        same = ((x % COLUMNS - x // COLUMNS + (TW - 1))[:, None] == d[None, :]).to(tl.float32)
        found = tl.dot(pairs, same, input_precision="ieee")
        same = ((y % BR - y // BR + (TH - 1))[None, :] == e[:, None]).to(tl.float32)
        found = tl.sum(same[:, :, None] * found[None, :, :], 1)
        e += (top + row - i) + (K[0] - TH)
        d += (left + column - j) + (K[1] - TW)
        slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = (slot * (2 * K[0] - 1) + e)[:, None] * (2 * K[1] - 1) + d[None, :]
        mask = ((e >= 0) & (e < 2 * K[0] - 1))[:, None] & ((d >= 0) & (d < 2 * K[1] - 1))[None, :]
        tl.store(drpb_ptr + place, found, mask=mask)

    @triton.jit(do_not_specialize=_TOKENS)
    def neighborhood_bwd_additional_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        large_ptr,
        dk_ptr,
        dv_ptr,
        factor,
        scale,
        heads,
        queries,
        number,
        shares,
        stride_q,
        stride_k,
        stride_v,
        stride_table,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        KEYS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradients of a tile of additional keys and values, from a share of the queries: ``[shares, B, P, h, C]``."""
        tiles = tl.cdiv(number, KEYS)
        pid = tl.program_id(0)
        tile, pid = pid % tiles, pid // tiles
        head, b = pid % heads, (pid // heads).to(tl.int64)
        share = tl.program_id(1)
        n = tile * KEYS + tl.arange(0, KEYS)
        m_k = n < number
        k = load_vectors(_of_head(k_ptr, b, head, stride_k, ALIGN), _of_tokens(n, stride_k, INDEX, ALIGN), m_k, C, CP)
        v = load_vectors(_of_head(v_ptr, b, head, stride_v, ALIGN), _of_tokens(n, stride_v, INDEX, ALIGN), m_k, CV, CVP)
        vectors = _of_head(q_ptr, b, head, stride_q, ALIGN)
        grads = dout_ptr + (b * queries * heads + head) * CV
        scalar = (b * heads + head) * queries
        table = table_ptr + head.to(tl.int64) * stride_table[0] + n[:, None]
        large = 1.0
        if q_ptr.dtype.element_ty == tl.float16:
            large = tl.load(large_ptr)
        dk = tl.zeros((KEYS, CP), tl.float32)
        dv = tl.zeros((KEYS, CVP), tl.float32)
        steps = tl.cdiv(tl.cdiv(queries, BLOCK), shares)
        for step in range(share * steps, tl.minimum((share + 1) * steps, tl.cdiv(queries, BLOCK))):
            query = step * BLOCK + tl.arange(0, BLOCK)
            m_q = query < queries
            lse = tl.load(lse_ptr + scalar + query, mask=m_q, other=float("inf"))  # no weight for a query outside
            delta = tl.load(delta_ptr + scalar + query, mask=m_q, other=0.0)
            q = load_vectors(vectors, _of_tokens(query, stride_q, INDEX, ALIGN), m_q, C, CP)
            dout = load_vectors(grads, query.to(INDEX) * (heads * CV), m_q, CV, CVP)
            bias = tl.load(table + (tl.where(m_q, query, 0).to(INDEX) * stride_table[1])[None, :])
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor + bias
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot((ds * large).to(q.dtype), q, dk, input_precision=PRECISION)
        first = (share * (tl.num_programs(0) // (tiles * heads)) + b) * number * heads + head
        store_vectors(dk_ptr + first * C, n * (heads * C), dk * (scale / large), m_k, C, CP)
        store_vectors(dv_ptr + first * CV, n * (heads * CV), dv, m_k, CV, CVP)

    @triton.jit(do_not_specialize=_TOKENS)
    def neighborhood_bwd_additional_bias_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dbias_ptr,
        factor,
        images,
        heads,
        queries,
        number,
        shares,
        stride_q,
        stride_k,
        stride_v,
        stride_table,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        ALIGN: tl.constexpr,
        KEYS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the bias of a tile of pairs, over a share of the images: ``[shares, h, H W, P]``."""
        pid = tl.program_id(0)
        tiles, blocks = tl.cdiv(number, KEYS), tl.cdiv(queries, BLOCK)
        tile, pid = pid % tiles, pid // tiles
        head, block = pid // blocks, pid % blocks
        n, query = tile * KEYS + tl.arange(0, KEYS), block * BLOCK + tl.arange(0, BLOCK)
        m_k, m_q = n < number, query < queries
        table = table_ptr + head.to(tl.int64) * stride_table[0]
        bias = tl.load(table + (tl.where(m_q, query, 0).to(INDEX) * stride_table[1])[:, None] + n[None, :])
        place_q, place_k, place_v = (
            _of_tokens(query, stride_q, INDEX, ALIGN),
            _of_tokens(n, stride_k, INDEX, ALIGN),
            _of_tokens(n, stride_v, INDEX, ALIGN),
        )
        acc = tl.zeros((BLOCK, KEYS), tl.float32)
        for b in range(tl.program_id(1).to(tl.int64), images, shares):
            scalar = (b * heads + head) * queries
            lse = tl.load(lse_ptr + scalar + query, mask=m_q, other=0.0)
            delta = tl.load(delta_ptr + scalar + query, mask=m_q, other=0.0)
            q = load_vectors(_of_head(q_ptr, b, head, stride_q, ALIGN), place_q, m_q, C, CP)
            grads = dout_ptr + (b * queries * heads + head) * CV
            dout = load_vectors(grads, query.to(INDEX) * (heads * CV), m_q, CV, CVP)
            k = load_vectors(_of_head(k_ptr, b, head, stride_k, ALIGN), place_k, m_k, C, CP)
            v = load_vectors(_of_head(v_ptr, b, head, stride_v, ALIGN), place_v, m_k, CV, CVP)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
            p = tl.exp2(s - lse[:, None])
            acc += p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        place = ((tl.program_id(1).to(tl.int64) * heads + head) * queries + query)[:, None] * number + n[None, :]
        tl.store(dbias_ptr + place, acc, mask=m_q[:, None] & m_k[None, :])


def _region(K: int, S: int) -> int:
    """Most keys on an axis that a tile of queries needs, wherever it starts."""
    return K + (TILE + S - 2) // S * S


@functools.lru_cache
def key_columns(queries: int, keys: int, K: int, S: int, R: int, masked: bool) -> int:
    """Most columns of queries whose windows reach into one tile of columns of keys."""
    most = 0
    for g in {0, (keys - 1) % R, min(keys % R, R - 1), (queries - 1) % R, min(queries % R, R - 1)}:
        n, n_q = -(-(keys - g) // R), -(-(queries - g) // R)
        for j in range(0, n, TILE):
            first = 0 if j < K and not masked else max((j - K + K // 2 - S // 2 + S) // S * S, 0)
            end = min(j + TILE, n) - 1
            last = n - 1 if end >= n - K and not masked else min((end + K // 2 - S // 2) // S * S + S - 1, n - 1)
            most = max(most, min(last, n_q - 1) + 1 - first)
    return most


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides of image, head, and row and column, or token, of heads-last vectors."""
    image, *tokens, head, _ = t.stride()
    return image, head, *tokens


class Launcher:
    """Runs the kernels on the tensors of one call; ``table`` belongs to tiles of queries, or of keys."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, window: Any, scale: float, index: Any
    ) -> None:
        self.q, self.window = q, window
        self.sizes = q.shape[1:3], k.shape[1:3]
        bins = (2 * n - 1 for n in window.kernel)
        self.rpb = q.new_zeros(1, *bins, dtype=torch.float32) if rpb is None else rpb.float().contiguous()
        self.shape = {
            "cols": q.shape[2],
            "key_cols": k.shape[2],
            "dilate_j": window.dilation[1],
            "K": window.kernel,
            "S": window.stride,
            "MASKED": window.masked,
            "TW": TILE,
        }
        self.additional: dict[str, Any] = dict.fromkeys(
            ("add_k_ptr", "add_v_ptr", "add_table_ptr", "stride_add_k", "stride_add_v", "stride_add_table")
        ) | {"number": 0}
        self.options: dict[str, Any] = self.shape | {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "factor": scale * math.log2(math.e),
            "heads": q.shape[3],
            "rows": q.shape[1],
            "key_rows": k.shape[1],
            "dilate_i": window.dilation[0],
            "stride_q": _strides(q),
            "stride_k": _strides(k),
            "stride_v": _strides(v),
            "C": q.shape[4],
            "CV": v.shape[4],
            "CP": power_of_two(q.shape[4]),
            "CVP": power_of_two(v.shape[4]),
            "COLUMNS": COLUMNS,
            "PRECISION": self.precision(max(q.shape[4], v.shape[4])),
            "INDEX": index,
            "ALIGN": self.alignment(q, k, v),
            "TH": TILE,
        }

    def alignment(self, *tensors: Tensor) -> int:
        """Elements, 16 at most, to which all vectors are aligned: Triton itself sees only whether it is 16."""
        return math.gcd(16, *(s for t in tensors for s in _strides(t)))

    def precision(self, channels: int) -> str:
        """PyTorch's setting, but heads so wide leave no registers for products in TF32."""
        return "ieee" if channels > 64 else product_precision(self.q.device)

    def reach(self, axis: int) -> int:
        """Most keys on an axis that a tile of queries needs, on this map."""
        K, S, R = (pair[axis] for pair in self.window[:3])
        return min(_region(K, S), cdiv(self.sizes[1][axis], R))

    def tiles(self, axis: int, by_key: bool) -> int:
        R = self.window.dilation[axis]
        return R * cdiv(cdiv(self.sizes[by_key][axis], R), TILE)

    def make_table(self, by_key: bool) -> None:
        K, S, R = (pair[1] for pair in self.window[:3])
        queries, keys = self.sizes[0][1], self.sizes[1][1]
        columns = key_columns(queries, keys, K, S, R, self.window.masked) if by_key else _region(K, S)
        chunks, tiles = cdiv(columns, COLUMNS), self.tiles(1, by_key)
        width = chunks * COLUMNS
        heads, rows = self.rpb.shape[0], self.rpb.shape[1] + 1
        table = self.rpb.new_empty(heads, tiles, rows, TILE, width)
        self.options |= {"table_ptr": table, "tables": 0 if heads == 1 else tiles, "CHUNKS": chunks}
        with on_device(self.q):
            neighborhood_table_kernel[(tiles, rows, heads)](
                self.rpb, table, int(by_key), **self.shape, WIDTH=width, WIDTHP=power_of_two(width)
            )

    def choice(self, name: str) -> _Choice:
        size = self.q.element_size()
        return CHOICES[90][size, max(128, size * max(self.options["CP"], self.options["CVP"]))][name]

    def run(self, kernel: Any, name: str, copies: int, by_key: bool = False, steps: int = 1, **others: Any) -> None:
        """One program for each head and tile of so many maps, and for each step where ``steps`` is given."""
        tiles = self.tiles(0, by_key) * self.tiles(1, by_key)
        with on_device(self.q):
            kernel[(copies * self.q.shape[3] * tiles, steps)](**self.options, **others, **self.choice(name)._asdict())

    def run_queries(self, kernel: Any, name: str, copies: int, **others: Any) -> None:
        """:meth:`run` for a kernel in which queries see additional keys, if there are any."""
        name += "" if self.additional["add_k_ptr"] is None else "_additional"
        self.run(kernel, name, copies, **others, **self.additional)

    def bias_gradient(self, images: int, **others: Any) -> Tensor:
        """Gradient of the bias ``[h, 2 Kh - 1, 2 Kw - 1]``: one table of each program, summed up in order."""
        tiles, heads = self.tiles(0, False) * self.tiles(1, False), self.q.shape[3]
        steps = cdiv(self.reach(0), self.choice("bias").BLOCK // COLUMNS) * self.options["CHUNKS"]
        shares = min(images, cdiv(PROGRAMS, tiles * heads * steps))
        drpb = self.rpb.new_zeros(steps, shares, heads, tiles, *self.rpb.shape[1:])
        options = {"drpb_ptr": drpb, "images": images, "shares": shares, **others}
        self.run(neighborhood_bwd_bias_kernel, "bias", shares, steps=steps, **options)
        return drpb.sum((0, 1, 3))

    def add_keys(self, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        """Let queries see additional keys, whose bias and mask become a table ``[h or 1, H W or 1, P padded]``."""
        number = k.shape[1]
        bias = k.new_zeros(1, 1, number) if bias is None else bias
        padding = cdiv(number, KEYS) * KEYS - number
        table = F.pad(bias.float() * math.log2(math.e), [0, padding], value=-math.inf).contiguous()
        if index_type(k, v, table) == tl.int64:
            self.options["INDEX"] = tl.int64
        self.options["ALIGN"] = math.gcd(self.options["ALIGN"], self.alignment(k, v))
        self.additional = {
            "add_k_ptr": k,
            "add_v_ptr": v,
            "add_table_ptr": table,
            "number": number,
            "stride_add_k": _strides(k),
            "stride_add_v": _strides(v),
            "stride_add_table": tuple(0 if table.shape[i] == 1 else table.stride(i) for i in (0, 1)),
        }

    def _run_additional(self, kernel: Any, name: str, programs: int, shares: int, **others: Any) -> None:
        q, given = self.q.flatten(1, 2), self.additional
        same = "factor", "heads", "C", "CV", "CP", "CVP", "PRECISION", "INDEX", "ALIGN"
        options = {name: self.options[name] for name in same} | {
            "q_ptr": q,
            "k_ptr": given["add_k_ptr"],
            "v_ptr": given["add_v_ptr"],
            "table_ptr": given["add_table_ptr"],
            "queries": q.shape[1],
            "number": given["number"],
            "shares": shares,
            "stride_q": _strides(q),
            "stride_k": given["stride_add_k"],
            "stride_v": given["stride_add_v"],
            "stride_table": given["stride_add_table"],
            "KEYS": KEYS,
        }
        with on_device(self.q):
            kernel[(programs, shares)](**options, **others, **self.choice(name)._asdict())

    def additional_gradients(self, **others: Any) -> tuple[Tensor, Tensor]:
        """Gradients of additional keys and values ``[B, P, h, C]``: shares of the queries, summed up in order."""
        k, v = self.additional["add_k_ptr"], self.additional["add_v_ptr"]
        programs = k.shape[0] * k.shape[2] * cdiv(k.shape[1], KEYS)
        steps = cdiv(self.q.shape[1] * self.q.shape[2], self.choice("additional").BLOCK)
        shares = min(steps, cdiv(PROGRAMS, programs))
        dk, dv = (t.new_empty(shares, *t.shape, dtype=torch.float32) for t in (k, v))
        self._run_additional(
            neighborhood_bwd_additional_kernel, "additional", programs, shares, dk_ptr=dk, dv_ptr=dv, **others
        )
        return dk.sum(0), dv.sum(0)

    def additional_bias_gradient(self, **others: Any) -> Tensor:
        """Gradient of the bias of additional keys ``[h, H W, P]``: shares of the images, summed up in order."""
        images, H, W, heads, _ = self.q.shape
        number = self.additional["number"]
        tiles = cdiv(number, KEYS) * cdiv(H * W, self.choice("additional_bias").BLOCK)
        shares = min(images, cdiv(PROGRAMS, tiles * heads))
        dbias = self.q.new_empty(shares, heads, H * W, number, dtype=torch.float32)
        kernel = neighborhood_bwd_additional_bias_kernel
        others |= {"dbias_ptr": dbias, "images": images}
        self._run_additional(kernel, "additional_bias", tiles * heads, shares, **others)
        return dbias.sum(0)


def _dense_channels(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def kernel_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    add_k: Tensor | None,
    add_v: Tensor | None,
    add_bias: Tensor | None,
    window: Any,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, h, C]``, and base-2 log-sum of each query's logits ``[B, h, H, W]``."""
    B, H, W, h, _ = q.shape
    q, k, v = (_dense_channels(t) for t in (q, k, v))
    out = q.new_empty(B, H, W, h, v.shape[4])
    lse = q.new_empty(B, h, H, W, dtype=torch.float32)
    if out.numel() > 0:
        launcher = Launcher(q, k, v, rpb, window, scale, index_type(q, k, v, out))
        launcher.make_table(by_key=False)
        if add_k is not None and add_v is not None:
            launcher.add_keys(_dense_channels(add_k), _dense_channels(add_v), add_bias)
        launcher.run_queries(neighborhood_fwd_kernel, "fwd", B, out_ptr=out, lse_ptr=lse)
    return out, lse


def kernel_backward(
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
    window: Any,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, those of bias and additional keys in float32; None where an input is None."""
    B = q.shape[0]
    dout, out, q, k, v = dout.contiguous(), out.contiguous(), *(_dense_channels(t) for t in (q, k, v))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    others = [rpb, add_k, add_v, add_bias]
    if out.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), *(None if t is None else torch.zeros_like(t) for t in others)
    delta, large = torch.empty_like(lse), gradient_scale(dout)
    launcher = Launcher(q, k, v, rpb, window, scale, index_type(q, k, v, dout, dq, dk, dv))
    launcher.make_table(by_key=False)
    if add_k is not None and add_v is not None:
        launcher.add_keys(_dense_channels(add_k), _dense_channels(add_v), add_bias)
    options: dict[str, Any] = {"dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta}
    grads = {"large_ptr": large, "scale": scale, **options}
    launcher.run_queries(neighborhood_bwd_query_kernel, "query", B, out_ptr=out, dq_ptr=dq, **grads)
    found: list[Tensor | None] = [None] * 4
    if rpb is not None:
        found[0] = launcher.bias_gradient(B, **options)
    if add_k is not None:
        found[1], found[2] = launcher.additional_gradients(**grads)
    if add_bias is not None:
        found[3] = launcher.additional_bias_gradient(**options)
    launcher.make_table(by_key=True)
    launcher.run(neighborhood_bwd_key_kernel, "key", B, by_key=True, dk_ptr=dk, dv_ptr=dv, **grads)
    return dq, dk, dv, *found
