"""Triton kernels of halo attention: see ``halo.py`` for the formula.

A program owns a tile of the queries of one block and one head, and walks over the keys of its window, which it reads in
place, a few rows by a few columns at a time.  Its products with the two tables are put in the order of the window once.
The columns' terms of a tile of keys then serve all rows of the window: products of queries and keys are added to them.
The rows' terms enter by a product with a one-hot matrix, in two halves where the inputs are half: together they keep
16 bits or more.  The same halves keep gradients as exact as float32 ones but for their last rounding.

Letters: ``i, m`` row and column of a query in its block, ``j, n`` of a key in its window, ``y, x`` in a map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._kernels import all_registers, gradient_scale, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import LOG2E, index_type, load_gradient_scale, load_vectors, store_vectors

    OFF = tl.constexpr(-1e30)  # score of a key that takes no part: finite, for a whole tile may consist of such keys
    UNIT = tl.constexpr(64.0)  # entry of one-hot matrices; terms are divided by it, for the range of float16
    _COUNTS = ("heads", "H", "W", "QH", "QW", "nh", "nw")  # 1 or a multiple of 16 is no reason to compile

    def _jit(function):
        return triton.jit(function, do_not_specialize=[n for n in _COUNTS if n in function.__code__.co_varnames])

    @triton.jit
    def _place(pid, heads, nh, nw, tiles):
        """Image (int64), block row, block column, tile and head of a program: heads, which lie side by side, first."""
        head, rest = pid % heads, pid // heads
        tile, rest = rest % tiles, rest // tiles
        return (rest // nw // nh).to(tl.int64), rest // nw % nh, rest % nw, tile, head

    @triton.jit
    def _queries(start, by, bx, QH, QW, SIDE: tl.constexpr, BLOCK_M: tl.constexpr):
        """A tile of a block's queries: positions in the block and in the map, and which of them exist."""
        t = start + tl.arange(0, BLOCK_M)
        i, m = t // SIDE, t % SIDE
        y, x = by * SIDE + i, bx * SIDE + m
        return i, m, y, x, (t < SIDE * SIDE) & (y < QH) & (x < QW)

    @triton.jit
    def _load_table(table_ptr, R: tl.constexpr, RP: tl.constexpr, WIN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """The rows of a table that are read ``[RP, DP]``: its last ``R``."""
        t = tl.arange(0, RP)
        return load_vectors(table_ptr, (2 * WIN - 1 - R + t) * D, t < R, D, DP)

    @triton.jit
    def _products(q, table, PRECISION: tl.constexpr):
        """Queries times a table ``[queries, RP]``; one in float32 counts as two halves if the queries are half."""
        high = table.to(q.dtype)
        products = tl.dot(q, tl.trans(high), input_precision=PRECISION)
        if table.dtype != q.dtype:
            low = (table - high.to(table.dtype)).to(q.dtype)
            products = tl.dot(q, tl.trans(low), products, input_precision=PRECISION)
        return products

    @triton.jit
    def _dot(x, y, acc, PRECISION: tl.constexpr):
        """``acc + x @ y`` for a float32 ``x``: two products of its halves where ``y`` is half."""
        if y.dtype == tl.float32:
            return tl.dot(x, y, acc, input_precision=PRECISION)
        high = x.to(y.dtype)
        return tl.dot((x - high.to(tl.float32)).to(y.dtype), y, tl.dot(high, y, acc))

    @triton.jit
    def _terms(products, first, keys, SIDE: tl.constexpr, STEP: tl.constexpr, R: tl.constexpr):
        """Products ``[queries, RP]`` that rows (columns) ``keys`` of the window meet: ``[queries, keys]``."""
        at = (SIDE - 1 - first)[:, None] * STEP + keys[None, :]
        return tl.gather(products, tl.minimum(tl.maximum(at, 0), R - 1), 1)

    @triton.jit
    def _column_terms(
        cols,
        m,
        n,
        x_ok,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        R: tl.constexpr,
        WIN: tl.constexpr,
        COLS: tl.constexpr,
        MASK: tl.constexpr,
    ):
        """Columns' terms of a tile of keys, with ``OFF`` for keys that take no part."""
        terms = _terms(cols, m, n, SIDE, STEP, R)
        if MASK:
            return tl.where(x_ok[None, :], terms, OFF)
        return terms if WIN % COLS == 0 else tl.where((n < WIN)[None, :], terms, OFF)

    @triton.jit
    def _keys(n0, left, W, WIN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
        """A tile of keys of a window: row in the tile, column in the window and in the map, and which are in both."""
        o = tl.arange(0, ROWS * COLS)
        n = n0 + o % COLS
        x = left + n
        return o // COLS, n, x, (n < WIN) & (x >= 0) & (x < W)

    @triton.jit
    def _scores(
        q,
        k,
        column_terms,
        row_terms,
        j,
        y_ok,
        WIN: tl.constexpr,
        WP: tl.constexpr,
        ROWS: tl.constexpr,
        MASK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Logits ``[queries, keys]`` over the scale, with ``OFF`` for keys that take no part."""
        s = tl.dot(q, tl.trans(k), column_terms, input_precision=PRECISION)
        one_hot = tl.where(tl.arange(0, WP)[:, None] == j[None, :], UNIT, 0.0).to(q.dtype)
        EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"  # what is picked is not to be rounded
        s = _dot(row_terms, one_hot, s, EXACT)
        if MASK:
            s = tl.where(y_ok[None, :], s, OFF)
        elif WIN % ROWS != 0:
            s = tl.where((j < WIN)[None, :], s, OFF)
        return s

    @_jit
    def _halo_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        out_ptr,
        rest_ptr,
        lse_ptr,
        scale,
        rel_scale,
        heads,
        H,
        W,
        QH,
        QW,
        nh,
        nw,
        stride_qb,
        stride_qy,
        stride_qx,
        stride_qh,
        stride_kb,
        stride_ky,
        stride_kx,
        stride_kh,
        stride_vb,
        stride_vy,
        stride_vx,
        stride_vh,
        SIGN: tl.constexpr,
        BLOCK: tl.constexpr,
        HALO: tl.constexpr,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        MASK: tl.constexpr,
        WP: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        DP: tl.constexpr,
        DVP: tl.constexpr,
        RP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_M: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        TRAIN: tl.constexpr,
    ):
        """With ``TRAIN``, weights and output are kept to twice the bits of a half, for ``delta`` in the gradients."""
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        unit = scale * SIGN if SIGN != 0 else 1.0  # of the scores: positive, so that the largest stays the largest
        relative = rel_scale / unit
        unit *= LOG2E
        b, by, bx, tile, head = _place(tl.program_id(0), heads, nh, nw, tl.cdiv(SIDE * SIDE, BLOCK_M))
        i, m, y, x, m_q = _queries(tile * BLOCK_M, by, bx, QH, QW, SIDE, BLOCK_M)
        place = y.to(INDEX) * stride_qy + x.to(INDEX) * stride_qx
        q = load_vectors(q_ptr + b * stride_qb + head * stride_qh, place, m_q, D, DP)
        rows = _products(q, _load_table(rows_ptr, R, RP, WIN, D, DP), PRECISION)
        cols = _products(q, _load_table(cols_ptr, R, RP, WIN, D, DP), PRECISION) * relative
        row_terms = _terms(rows, i, tl.arange(0, WP), SIDE, STEP, R) * (relative / UNIT)
        if SIGN != 1:
            q = (q * SIGN).to(q.dtype)
        k_base = k_ptr + b * stride_kb + head * stride_kh
        v_base = v_ptr + b * stride_vb + head * stride_vh
        top, left = by * BLOCK - HALO, bx * BLOCK - HALO
        peak = tl.full((BLOCK_M,), -1e38, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DVP), tl.float32)
        for n0 in range(0, WIN, COLS):
            r, n, kx, x_ok = _keys(n0, left, W, WIN, ROWS, COLS)
            column_terms = _column_terms(cols, m, n, x_ok, SIDE, STEP, R, WIN, COLS, MASK)
            k_place = r.to(INDEX) * stride_ky + kx.to(INDEX) * stride_kx
            v_place = r.to(INDEX) * stride_vy + kx.to(INDEX) * stride_vx
            for j0 in range(0, WIN, ROWS):
                j = j0 + r
                y_ok = (j < WIN) & (top + j >= 0) & (top + j < H)
                first = (top + j0).to(INDEX)
                k = load_vectors(k_base, first * stride_ky + k_place, x_ok & y_ok, D, DP)
                v = load_vectors(v_base, first * stride_vy + v_place, x_ok & y_ok, DV, DVP)
                s = _scores(q, k, column_terms, row_terms, j, y_ok, WIN, WP, ROWS, MASK, PRECISION)
                higher = tl.maximum(peak, tl.max(s, 1))
                shrink = tl.exp2((peak - higher) * unit)
                p = tl.exp2(s * unit - (higher * unit)[:, None])
                total = total * shrink + tl.sum(p, 1)
                acc *= shrink[:, None]
                acc = _dot(p, v, acc, PRECISION) if TRAIN else tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                peak = higher
        image, place = b * QH * QW * heads, (y * QW + x) * heads + head
        acc = acc / total[:, None]
        store_vectors(out_ptr + image * DV, place.to(INDEX) * DV, acc, m_q, DV, DVP)
        if TRAIN and q.dtype != tl.float32:
            rest = acc - acc.to(q.dtype).to(tl.float32)
            store_vectors(rest_ptr + image * DV, place.to(INDEX) * DV, rest, m_q, DV, DVP)
        tl.store(lse_ptr + image + place, peak * unit + tl.log2(total), mask=m_q)

    @_jit
    def _halo_bwd_query_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        lse_ptr,
        dout_ptr,
        delta_ptr,
        grow_ptr,
        out_ptr,
        rest_ptr,
        dq_ptr,
        dtable_ptr,
        scale,
        rel_scale,
        heads,
        H,
        W,
        QH,
        QW,
        nh,
        nw,
        stride_qb,
        stride_qy,
        stride_qx,
        stride_qh,
        stride_kb,
        stride_ky,
        stride_kx,
        stride_kh,
        stride_vb,
        stride_vy,
        stride_vx,
        stride_vh,
        SIGN: tl.constexpr,
        BLOCK: tl.constexpr,
        HALO: tl.constexpr,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        MASK: tl.constexpr,
        WP: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        DP: tl.constexpr,
        DVP: tl.constexpr,
        RP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_M: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """Gradient of the queries, ``delta`` for the keys' kernel, and this program's share of that of the tables."""
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        unit = scale * SIGN if SIGN != 0 else 1.0
        relative = rel_scale / unit
        unit *= LOG2E
        grow = load_gradient_scale(grow_ptr, q_ptr.dtype.element_ty)
        shrink = 1 / grow
        t_r, t_w = tl.arange(0, RP), tl.arange(0, WP)
        b, by, bx, tile, head = _place(tl.program_id(0), heads, nh, nw, tl.cdiv(SIDE * SIDE, BLOCK_M))
        i, m, y, x, m_q = _queries(tile * BLOCK_M, by, bx, QH, QW, SIDE, BLOCK_M)
        image, place = b * QH * QW * heads, (y * QW + x) * heads + head
        q_place = y.to(INDEX) * stride_qy + x.to(INDEX) * stride_qx
        q = load_vectors(q_ptr + b * stride_qb + head * stride_qh, q_place, m_q, D, DP)
        dout = load_vectors(dout_ptr + image * DV, place.to(INDEX) * DV, m_q, DV, DVP)
        out = load_vectors(out_ptr + image * DV, place.to(INDEX) * DV, m_q, DV, DVP)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        if q.dtype != tl.float32:
            rest = load_vectors(rest_ptr + image * DV, place.to(INDEX) * DV, m_q, DV, DVP)
            delta += tl.sum(dout.to(tl.float32) * rest.to(tl.float32), 1)
        tl.store(delta_ptr + image + place, delta, mask=m_q)
        delta *= grow
        lse = tl.load(lse_ptr + image + place, mask=m_q, other=float("inf"))
        rows = _products(q, _load_table(rows_ptr, R, RP, WIN, D, DP), PRECISION)
        cols = _products(q, _load_table(cols_ptr, R, RP, WIN, D, DP), PRECISION) * relative
        row_terms = _terms(rows, i, tl.arange(0, WP), SIDE, STEP, R) * (relative / UNIT)
        signed = q if SIGN == 1 else (q * SIGN).to(q.dtype)
        k_base = k_ptr + b * stride_kb + head * stride_kh
        v_base = v_ptr + b * stride_vb + head * stride_vh
        top, left = by * BLOCK - HALO, bx * BLOCK - HALO
        dq = tl.zeros((BLOCK_M, DP), tl.float32)
        d_rows = tl.zeros((BLOCK_M, WP), tl.float32)
        d_cols = tl.zeros((BLOCK_M, WP), tl.float32)
        for n0 in range(0, WIN, COLS):
            r, n, kx, x_ok = _keys(n0, left, W, WIN, ROWS, COLS)
            column_terms = _column_terms(cols, m, n, x_ok, SIDE, STEP, R, WIN, COLS, MASK)
            k_place = r.to(INDEX) * stride_ky + kx.to(INDEX) * stride_kx
            v_place = r.to(INDEX) * stride_vy + kx.to(INDEX) * stride_vx
            d_column_terms = tl.zeros((BLOCK_M, ROWS * COLS), tl.float32)
            for j0 in range(0, WIN, ROWS):
                j = j0 + r
                y_ok = (j < WIN) & (top + j >= 0) & (top + j < H)
                first = (top + j0).to(INDEX)
                k = load_vectors(k_base, first * stride_ky + k_place, x_ok & y_ok, D, DP)
                v = load_vectors(v_base, first * stride_vy + v_place, x_ok & y_ok, DV, DVP)
                s = _scores(signed, k, column_terms, row_terms, j, y_ok, WIN, WP, ROWS, MASK, PRECISION)
                p = tl.exp2(s * unit - lse[:, None])
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp * grow - delta[:, None])
                d_column_terms += ds
                dq = _dot(ds, k, dq, PRECISION)
                one_hot = (j[:, None] == t_w[None, :]).to(q.dtype)
                d_rows = _dot(ds, one_hot, d_rows, PRECISION)
            one_hot = (n[:, None] == t_w[None, :]).to(q.dtype)
            d_cols = _dot(d_column_terms, one_hot, d_cols, PRECISION)
        j_r = t_r[None, :] - (SIDE - 1 - i)[:, None] * STEP  # the key's row that meets row t_r of the table
        n_r = t_r[None, :] - (SIDE - 1 - m)[:, None] * STEP
        d_rows = tl.gather(d_rows, tl.minimum(tl.maximum(j_r, 0), WP - 1), 1)
        d_cols = tl.gather(d_cols, tl.minimum(tl.maximum(n_r, 0), WP - 1), 1)
        d_rows = tl.where((j_r >= 0) & (j_r < WIN), d_rows, 0.0)
        d_cols = tl.where((n_r >= 0) & (n_r < WIN), d_cols, 0.0)
        row_table = _load_table(rows_ptr, R, RP, WIN, D, DP).to(q.dtype)
        col_table = _load_table(cols_ptr, R, RP, WIN, D, DP).to(q.dtype)
        d_terms = _dot(d_rows, row_table, tl.zeros((BLOCK_M, DP), tl.float32), PRECISION)
        d_terms = _dot(d_cols, col_table, d_terms, PRECISION)
        dq = (dq * scale + d_terms * rel_scale) * shrink
        store_vectors(dq_ptr + image * D, place.to(INDEX) * D, dq, m_q, D, DP)
        base = dtable_ptr + tl.program_id(0).to(tl.int64) * 2 * R * D
        d_table = _dot(tl.trans(d_rows), q, tl.zeros((RP, DP), tl.float32), PRECISION)
        store_vectors(base, t_r * D, d_table * (rel_scale * shrink), t_r < R, D, DP)
        d_table = _dot(tl.trans(d_cols), q, tl.zeros((RP, DP), tl.float32), PRECISION)
        store_vectors(base + R * D, t_r * D, d_table * (rel_scale * shrink), t_r < R, D, DP)

    @_jit
    def _halo_bwd_key_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        lse_ptr,
        dout_ptr,
        delta_ptr,
        grow_ptr,
        dk_ptr,
        dv_ptr,
        scale,
        rel_scale,
        heads,
        H,
        W,
        QH,
        QW,
        nh,
        nw,
        stride_qb,
        stride_qy,
        stride_qx,
        stride_qh,
        stride_kb,
        stride_ky,
        stride_kx,
        stride_kh,
        stride_vb,
        stride_vy,
        stride_vx,
        stride_vh,
        SIGN: tl.constexpr,
        BLOCK: tl.constexpr,
        HALO: tl.constexpr,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        DP: tl.constexpr,
        DVP: tl.constexpr,
        RP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_Y: tl.constexpr,
        BLOCK_X: tl.constexpr,
    ):
        """Gradients of a rectangle of keys and values: it adds up the queries of all blocks whose window covers it.

        The rectangle has up to 8 rows and 8 columns, whose terms one one-hot matrix picks, the rows' first.
        """
        EXACT: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        unit = scale * SIGN if SIGN != 0 else 1.0
        relative = rel_scale / unit
        unit *= LOG2E
        grow = load_gradient_scale(grow_ptr, q_ptr.dtype.element_ty)
        shrink = 1 / grow
        b, ty, tx, _, head = _place(tl.program_id(0), heads, tl.cdiv(H, BLOCK_Y), tl.cdiv(W, BLOCK_X), 1)
        o, e = tl.arange(0, BLOCK_Y * BLOCK_X), tl.arange(0, 16)
        y0, x0 = ty * BLOCK_Y, tx * BLOCK_X
        ky, kx = y0 + o // BLOCK_X, x0 + o % BLOCK_X
        m_k = (ky < H) & (kx < W)
        k_place = ky.to(INDEX) * stride_ky + kx.to(INDEX) * stride_kx
        v_place = ky.to(INDEX) * stride_vy + kx.to(INDEX) * stride_vx
        k = load_vectors(k_ptr + b * stride_kb + head * stride_kh, k_place, m_k, D, DP)
        v = load_vectors(v_ptr + b * stride_vb + head * stride_vh, v_place, m_k, DV, DVP)
        if SIGN != 1:
            k = (k * SIGN).to(k.dtype)
        picks = (e[None, :] == (o // BLOCK_X)[:, None]) | (e[None, :] == (8 + o % BLOCK_X)[:, None])
        one_hot = tl.where(picks, UNIT, 0.0).to(k.dtype)
        row_table = _load_table(rows_ptr, R, RP, WIN, D, DP)
        col_table = _load_table(cols_ptr, R, RP, WIN, D, DP)
        q_base = q_ptr + b * stride_qb + head * stride_qh
        image = b * QH * QW * heads
        dk = tl.zeros((BLOCK_Y * BLOCK_X, DP), tl.float32)
        dv = tl.zeros((BLOCK_Y * BLOCK_X, DVP), tl.float32)
        by0, bx0 = tl.maximum(y0 - HALO, 0) // BLOCK, tl.maximum(x0 - HALO, 0) // BLOCK
        by1 = tl.minimum((y0 + BLOCK_Y - 1 + HALO) // BLOCK, nh - 1)
        bx1 = tl.minimum((x0 + BLOCK_X - 1 + HALO) // BLOCK, nw - 1)
        for by in range(by0, by1 + 1):
            for bx in range(bx0, bx1 + 1):
                top, left = by * BLOCK - HALO, bx * BLOCK - HALO
                covered = (ky >= top) & (ky < top + WIN) & (kx >= left) & (kx < left + WIN)
                for start in range(0, SIDE * SIDE, BLOCK_M):
                    i, m, y, x, m_q = _queries(start, by, bx, QH, QW, SIDE, BLOCK_M)
                    place = (y * QW + x) * heads + head
                    q_place = y.to(INDEX) * stride_qy + x.to(INDEX) * stride_qx
                    q = load_vectors(q_base, q_place, m_q, D, DP)
                    dout = load_vectors(dout_ptr + image * DV, place.to(INDEX) * DV, m_q, DV, DVP)
                    lse = tl.load(lse_ptr + image + place, mask=m_q, other=float("inf"))
                    delta = tl.load(delta_ptr + image + place, mask=m_q, other=0.0) * grow
                    both = tl.join(_products(q, row_table, PRECISION), _products(q, col_table, PRECISION))
                    both = tl.reshape(both, (BLOCK_M, 2 * RP))
                    row = (SIDE - 1 - i)[:, None] * STEP + (y0 - top + e)[None, :]
                    col = (SIDE - 1 - m)[:, None] * STEP + (x0 - left + e - 8)[None, :]
                    at = tl.minimum(tl.maximum(tl.where(e[None, :] < 8, row, col), 0), R - 1)
                    terms = tl.gather(both, 2 * at + (e[None, :] >= 8).to(tl.int32), 1) * (relative / UNIT)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                    if q.dtype == tl.float32:
                        s = tl.dot(one_hot, tl.trans(terms), s, input_precision=EXACT)
                    else:
                        high = terms.to(q.dtype)
                        low = (terms - high.to(tl.float32)).to(q.dtype)
                        s = tl.dot(one_hot, tl.trans(low), tl.dot(one_hot, tl.trans(high), s))
                    p = tl.where(covered[:, None], tl.exp2(s * unit - lse[None, :]), 0.0)
                    dv = _dot(p, dout, dv, PRECISION)
                    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                    ds = p * (dp * grow - delta[None, :])
                    dk = _dot(ds, q, dk, PRECISION)
        image, place = b * H * W * heads, ((ky * W + kx) * heads + head).to(INDEX)
        store_vectors(dk_ptr + image * D, place * D, dk * (scale * shrink), m_k, D, DP)
        store_vectors(dv_ptr + image * DV, place * DV, dv, m_k, DV, DVP)


class Tile(NamedTuple):
    """Queries of a program, rows and columns of keys that it works on at once, warps, and stages of its loads."""

    queries: int
    rows: int
    cols: int
    warps: int
    stages: int


# for each compute capability by kernel, half precision, and up to which sum of the channels of a query and of a value;
# chosen by the machine code for 9.0 (no spills, then the fewest instructions times warps), not by measured times
CHOICES = {
    90: {
        ("forward", True, 128): Tile(64, 2, 16, 4, 1),
        ("forward", True, 320): Tile(32, 2, 16, 4, 1),
        ("forward", True, 512): Tile(16, 1, 16, 8, 1),
        ("query", True, 64): Tile(64, 2, 16, 4, 1),
        ("query", True, 160): Tile(64, 1, 16, 4, 1),
        ("query", True, 256): Tile(16, 1, 16, 8, 1),
        ("query", True, 320): Tile(16, 1, 16, 4, 1),
        ("query", True, 512): Tile(16, 1, 16, 8, 1),
        ("key", True, 64): Tile(32, 4, 8, 2, 1),
        ("key", True, 96): Tile(32, 4, 8, 4, 1),
        ("key", True, 128): Tile(32, 4, 8, 4, 2),
        ("key", True, 256): Tile(16, 4, 8, 4, 1),
        ("key", True, 512): Tile(16, 4, 4, 4, 1),
        ("forward", False, 64): Tile(32, 2, 16, 4, 1),
        ("forward", False, 512): Tile(16, 1, 16, 4, 1),
        ("query", False, 64): Tile(32, 1, 16, 4, 1),
        ("query", False, 512): Tile(16, 1, 16, 8, 1),
        ("key", False, 512): Tile(16, 4, 4, 4, 1),
    }
}


def _choice(kernel: str, half: bool, width: int, queries: int, window: int) -> Tile:
    """Tile of a kernel, with no more queries than a block fills, nor warps where these share them."""
    choices = CHOICES[90]  # other devices take the same until something is measured there
    tile = choices[kernel, half, min(w for k, f, w in choices if (k, f) == (kernel, half) and w >= width)]
    size = min(tile.queries, power_of_two(queries))
    share = {"forward": 1, "query": 2}.get(kernel, 4) * tile.warps * size // tile.queries  # fewer would spill
    warps = min(tile.warps, max(1 if kernel == "forward" and width <= 64 else 2, share))
    tile = tile._replace(queries=size, warps=warps)
    if -(-window // 8) % 2 == 1 and tile.cols == 16:  # half as many columns, twice as many rows: fewer past the window
        return tile._replace(rows=2 * tile.rows, cols=8)
    return tile


class _Launch:
    """What the three kernels share: arguments, and tile sizes of each."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel):
        q, k, v = (t if t.stride(4) == 1 else t.contiguous() for t in (q, k, v))
        _, H, W, h, d = k.shape
        nh, nw = -(-H // block_size), -(-W // block_size)
        side, step, dv = block_size // stride, stride if pixel else 1, v.shape[4]
        self.rows = (side - 1) * step + block_size + 2 * halo_size  # those before are never read
        self.window = block_size + 2 * halo_size
        self.mask = {"MASK": mask, "WP": power_of_two(self.window)}
        DP, DVP, RP = power_of_two(d), power_of_two(dv), power_of_two(self.rows)
        self.queries, self.width, self.half = side * side, max(DP + DVP, 2 * RP), q.dtype != torch.float32
        self.blocks = q.shape[0] * nh * nw * h
        named = (("q", q), ("k", k), ("v", v))
        self.arguments = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "rows_ptr": height_rel.contiguous(),
            "cols_ptr": width_rel.contiguous(),
            "scale": scale,
            "rel_scale": rel_scale,
            "heads": h,
            "H": H,
            "W": W,
            "QH": q.shape[1],
            "QW": q.shape[2],
            "nh": nh,
            "nw": nw,
            **{f"stride_{n}{axis}": t.stride(i) for n, t in named for i, axis in enumerate("byxh")},
            "SIGN": (scale > 0) - (scale < 0),
            "BLOCK": block_size,
            "HALO": halo_size,
            "SIDE": side,
            "STEP": step,
            "D": d,
            "DV": dv,
            "DP": DP,
            "DVP": DVP,
            "RP": RP,
            # three parts in TF32 take as many instructions as float32 products on such small tiles, and spill
            "PRECISION": "tf32" if product_precision(q.device) == "tf32" else "ieee",
            "INDEX": index_type(q, k, v),
        }

    def tile(self, kernel: str) -> Tile:
        return _choice(kernel, self.half, self.width, self.queries, self.window)

    def programs(self, tile: Tile) -> int:
        return self.blocks * -(-self.queries // tile.queries)


def kernel_forward(train: bool, q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, Hq, Wq, h, dv]``, what rounding to half took off it, and base-2 log-sum ``[B, Hq, Wq, h]``.

    The second is empty unless gradients are needed: those of one query add up to 0 only if they use the exact output.
    """
    out = torch.empty(*q.shape[:4], v.shape[4], dtype=v.dtype, device=v.device)
    rest = torch.empty_like(out) if train and out.dtype != torch.float32 else out.new_empty(0)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        launch = _Launch(q, k, v, *args)
        tile = launch.tile("forward")
        with on_device(q):
            _halo_fwd_kernel[(launch.programs(tile),)](
                **launch.arguments, **launch.mask, out_ptr=out, rest_ptr=rest, lse_ptr=lse, TRAIN=train, **_sizes(tile)
            )
    return out, rest, lse


def _sizes(tile: Tile) -> dict[str, int]:
    queries, rows, cols, warps, stages = tile
    return {"BLOCK_M": queries, "ROWS": rows, "COLS": cols, "num_warps": warps, "num_stages": stages}


def kernel_backward(
    dout: Tensor, out: Tensor, rest: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and of the used rows of both tables (float32)."""
    launch = _Launch(q, k, v, *args)
    tile, key_tile = launch.tile("query"), launch.tile("key")
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    programs = launch.programs(tile)
    dtables = torch.empty(programs, 2, launch.rows, q.shape[4], dtype=torch.float32, device=q.device)
    if programs > 0:
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        shared = {
            **launch.arguments,
            "lse_ptr": lse,
            "dout_ptr": dout,
            "delta_ptr": delta,
            "grow_ptr": gradient_scale(dout),
        }
        sizes = {**_sizes(key_tile), **all_registers(key_tile.warps)}
        BLOCK_Y, BLOCK_X = sizes.pop("ROWS"), sizes.pop("COLS")
        keys = k.shape[0] * k.shape[3] * -(-k.shape[1] // BLOCK_Y) * -(-k.shape[2] // BLOCK_X)
        with on_device(q):
            _halo_bwd_query_kernel[(programs,)](
                **shared,
                **launch.mask,
                out_ptr=out,
                rest_ptr=rest,
                dq_ptr=dq,
                dtable_ptr=dtables,
                **_sizes(tile),
                **(all_registers(tile.warps) if tile.queries < 64 else {}),
            )
            _halo_bwd_key_kernel[(keys,)](**shared, dk_ptr=dk, dv_ptr=dv, BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, **sizes)
    drows, dcols = dtables.sum(0).unbind(0)
    return dq, dk, dv, drows, dcols
