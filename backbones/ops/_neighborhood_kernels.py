"""Triton kernels of neighbourhood attention: see ``neighborhood`` for the formula and for who calls them.

Sizes come in pairs of rows and columns: ``H`` queries, ``L`` keys, window ``K``, stride ``S``, dilation ``R``.  A
program owns a tile of ``TH x TW`` queries (or keys) of one dilation group, head and image, and steps through the region
of keys (or queries) that the tile needs.  Strides of ``q``, ``k`` and ``v`` are those of image, row, column and head;
all channels are dense, the other maps are dense ``[B, H, W, h, C]``, and what is one number for a query
``[B, h, H, W]``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._backend import HAS_TRITON, INTERPRETED, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    def _configs() -> list[triton.Config]:
        """Tiles of queries or keys, and keys or queries per step; one under the interpreter, which cannot tune."""
        choices = (
            [(4, 4, 32, 4)]
            if INTERPRETED
            else [(8, 8, 64, 8), (8, 8, 32, 4), (4, 8, 64, 4), (4, 8, 32, 4), (4, 4, 16, 4)]
        )
        return [triton.Config({"TH": th, "TW": tw, "BLOCK": n}, num_warps=w) for th, tw, n, w in choices]

    _KEY = ["K", "S", "C", "CV"]

    @triton.jit
    def _window_start(t, n, axis: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
        """First key in the window of query ``t``, in a group of ``n`` keys."""
        return tl.minimum(tl.maximum(t // S[axis] * S[axis] + (S[axis] // 2 - K[axis] // 2), 0), n - K[axis])

    @triton.jit
    def _first_query(j, axis: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
        """First query whose window holds key ``j``."""
        return tl.where(j < K[axis], 0, (j - K[axis] + K[axis] // 2 - S[axis] // 2 + S[axis]) // S[axis] * S[axis])

    @triton.jit
    def _last_query(j, n, axis: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
        """Last query whose window holds key ``j``, in a group of ``n`` keys."""
        last = (j + K[axis] // 2 - S[axis] // 2) // S[axis] * S[axis] + S[axis] - 1
        return tl.where(j >= n - K[axis], n - 1, tl.minimum(last, n - 1))

    @triton.jit
    def _place(size, heads, R: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
        """Image, head, dilation group, and first row and column in it, of the program's tile of a map."""
        pid = tl.program_id(0)
        tiles_i, tiles_j = tl.cdiv(tl.cdiv(size[0], R[0]), TH), tl.cdiv(tl.cdiv(size[1], R[1]), TW)
        j, pid = pid % tiles_j * TW, pid // tiles_j
        i, pid = pid % tiles_i * TH, pid // tiles_i
        gj, pid = pid % R[1], pid // R[1]
        gi, pid = pid % R[0], pid // R[0]
        return (pid // heads).to(tl.int64), (pid % heads).to(tl.int64), gi, gj, i, j

    @triton.jit
    def _region(i, j, ni, nj, K: tl.constexpr, S: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
        """First row and column, rows and columns of the keys that a tile of queries needs."""
        top, left = _window_start(i, ni, 0, K, S), _window_start(j, nj, 1, K, S)
        rows = _window_start(i + TH - 1, ni, 0, K, S) + K[0] - top
        return top, left, rows, _window_start(j + TW - 1, nj, 1, K, S) + K[1] - left

    @triton.jit
    def _load(ptr, i, j, stride_i, stride_j, mask, C: tl.constexpr, CP: tl.constexpr):
        """Channels of the tokens at rows ``i`` and columns ``j``: ``[tokens, CP]``."""
        c = tl.arange(0, CP)
        token = i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
        return tl.load(ptr + token[:, None] + c[None, :], mask=mask[:, None] & (c < C)[None, :], other=0.0)

    @triton.jit
    def _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K: tl.constexpr, S: tl.constexpr):
        """Row and column of each key in each query's window, and whether it is inside: ``[queries, keys]``."""
        di = ki[None, :] - _window_start(qi, ni, 0, K, S)[:, None]
        dj = kj[None, :] - _window_start(qj, nj, 1, K, S)[:, None]
        inside = (di >= 0) & (di < K[0]) & (dj >= 0) & (dj < K[1]) & m_q[:, None] & m_k[None, :]
        return di, dj, inside

    @triton.jit
    def _scores(q, k, scale, table, qi, qj, ki, kj, inside, K: tl.constexpr, BIAS: tl.constexpr):
        """Logits ``[queries, keys]``, -inf outside the windows; ``table`` is the bias of the head."""
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if BIAS:
            row, col = ki[None, :] - qi[:, None] + (K[0] - 1), kj[None, :] - qj[:, None] + (K[1] - 1)
            s += tl.load(table + row * (2 * K[1] - 1) + col, mask=inside, other=0.0)
        return tl.where(inside, s, float("-inf"))

    @triton.jit
    def _grad_dot(ds, x, PRECISION: tl.constexpr):
        """Product with gradients of logits: float16 has too small a range for them, TF32 has its precision."""
        if x.dtype == tl.bfloat16:
            return tl.dot(ds.to(tl.bfloat16), x)
        return tl.dot(ds, x.to(tl.float32), input_precision=PRECISION)

    @triton.autotune(configs=_configs(), key=_KEY)
    @triton.jit
    def neighborhood_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rpb_ptr,
        out_ptr,
        lse_ptr,
        scale,
        heads,
        H,
        L,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        BIAS: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b, head, gi, gj, i, j = _place(H, heads, R, TH, TW)
        ni, nj = tl.cdiv(L[0] - gi, R[0]), tl.cdiv(L[1] - gj, R[1])
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * R[0] + gi, qj * R[1] + gj
        m_q = (yi < H[0]) & (yj < H[1])
        q = _load(q_ptr + b * stride_q[0] + head * stride_q[3], yi, yj, stride_q[1], stride_q[2], m_q, C, CP)
        keys, values = k_ptr + b * stride_k[0] + head * stride_k[3], v_ptr + b * stride_v[0] + head * stride_v[3]
        table = rpb_ptr + head * ((2 * K[0] - 1) * (2 * K[1] - 1))
        top, left, rows, cols = _region(i, j, ni, nj, K, S, TH, TW)
        peak = tl.full((TH * TW,), -1e30, tl.float32)  # finite: a step may hold no key of a query
        total = tl.zeros((TH * TW,), tl.float32)
        acc = tl.zeros((TH * TW, CVP), tl.float32)
        for start in range(0, rows * cols, BLOCK):
            n = start + tl.arange(0, BLOCK)
            m_k = n < rows * cols
            ki, kj = top + n // cols, left + n % cols
            zi, zj = ki * R[0] + gi, kj * R[1] + gj
            _, _, inside = _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K, S)
            k = _load(keys, zi, zj, stride_k[1], stride_k[2], m_k, C, CP)
            s = _scores(q, k, scale, table, qi, qj, ki, kj, inside, K, BIAS)
            higher = tl.maximum(peak, tl.max(s, 1))
            shrink = tl.exp(peak - higher)
            p = tl.exp(s - higher[:, None])
            v = _load(values, zi, zj, stride_v[1], stride_v[2], m_k, CV, CVP)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            peak = higher
        total = tl.where(m_q, total, 1.0)
        c = tl.arange(0, CVP)
        query = yi.to(tl.int64) * H[1] + yj
        p_out = out_ptr + ((b * H[0] * H[1] + query) * heads + head)[:, None] * CV + c[None, :]
        tl.store(p_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=m_q[:, None] & (c < CV)[None, :])
        tl.store(lse_ptr + (b * heads + head) * H[0] * H[1] + query, peak + tl.log(total), mask=m_q)

    @triton.autotune(configs=_configs(), key=_KEY)
    @triton.jit
    def neighborhood_bwd_query_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rpb_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dq_ptr,
        scale,
        heads,
        H,
        L,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the queries, and ``delta``, the mean gradient of the logits of each."""
        b, head, gi, gj, i, j = _place(H, heads, R, TH, TW)
        ni, nj = tl.cdiv(L[0] - gi, R[0]), tl.cdiv(L[1] - gj, R[1])
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * R[0] + gi, qj * R[1] + gj
        m_q = (yi < H[0]) & (yj < H[1])
        q = _load(q_ptr + b * stride_q[0] + head * stride_q[3], yi, yj, stride_q[1], stride_q[2], m_q, C, CP)
        own = (b * H[0] * H[1] * heads + head) * CV
        dout = _load(dout_ptr + own, yi, yj, H[1] * heads * CV, heads * CV, m_q, CV, CVP)
        query = yi.to(tl.int64) * H[1] + yj
        scalar = (b * heads + head) * H[0] * H[1] + query
        lse = tl.load(lse_ptr + scalar, mask=m_q, other=0.0)
        keys, values = k_ptr + b * stride_k[0] + head * stride_k[3], v_ptr + b * stride_v[0] + head * stride_v[3]
        table = rpb_ptr + head * ((2 * K[0] - 1) * (2 * K[1] - 1))
        top, left, rows, cols = _region(i, j, ni, nj, K, S, TH, TW)
        # not from the output, which a half precision run has rounded
        delta = tl.zeros((TH * TW,), tl.float32)
        for start in range(0, rows * cols, BLOCK):
            n = start + tl.arange(0, BLOCK)
            m_k = n < rows * cols
            ki, kj = top + n // cols, left + n % cols
            zi, zj = ki * R[0] + gi, kj * R[1] + gj
            _, _, inside = _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K, S)
            k = _load(keys, zi, zj, stride_k[1], stride_k[2], m_k, C, CP)
            v = _load(values, zi, zj, stride_v[1], stride_v[2], m_k, CV, CVP)
            p = tl.exp(_scores(q, k, scale, table, qi, qj, ki, kj, inside, K, BIAS) - lse[:, None])
            delta += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
        tl.store(delta_ptr + scalar, delta, mask=m_q)
        dq = tl.zeros((TH * TW, CP), tl.float32)
        for start in range(0, rows * cols, BLOCK):
            n = start + tl.arange(0, BLOCK)
            m_k = n < rows * cols
            ki, kj = top + n // cols, left + n % cols
            zi, zj = ki * R[0] + gi, kj * R[1] + gj
            _, _, inside = _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K, S)
            k = _load(keys, zi, zj, stride_k[1], stride_k[2], m_k, C, CP)
            v = _load(values, zi, zj, stride_v[1], stride_v[2], m_k, CV, CVP)
            p = tl.exp(_scores(q, k, scale, table, qi, qj, ki, kj, inside, K, BIAS) - lse[:, None])
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq += _grad_dot(ds, k, PRECISION)
        c = tl.arange(0, CP)
        p_dq = dq_ptr + ((b * H[0] * H[1] + query) * heads + head)[:, None] * C + c[None, :]
        tl.store(p_dq, (dq * scale).to(dq_ptr.dtype.element_ty), mask=m_q[:, None] & (c < C)[None, :])

    @triton.autotune(configs=_configs(), key=_KEY)
    @triton.jit
    def neighborhood_bwd_key_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rpb_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dk_ptr,
        dv_ptr,
        scale,
        heads,
        H,
        L,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        BIAS: tl.constexpr,
        PRECISION: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradients of the keys and values of a tile, from all queries whose windows reach into it."""
        b, head, gi, gj, i, j = _place(L, heads, R, TH, TW)
        ni, nj = tl.cdiv(L[0] - gi, R[0]), tl.cdiv(L[1] - gj, R[1])
        n = tl.arange(0, TH * TW)
        ki, kj = i + n // TW, j + n % TW
        zi, zj = ki * R[0] + gi, kj * R[1] + gj
        m_k = (zi < L[0]) & (zj < L[1])
        k = _load(k_ptr + b * stride_k[0] + head * stride_k[3], zi, zj, stride_k[1], stride_k[2], m_k, C, CP)
        v = _load(v_ptr + b * stride_v[0] + head * stride_v[3], zi, zj, stride_v[1], stride_v[2], m_k, CV, CVP)
        table = rpb_ptr + head * ((2 * K[0] - 1) * (2 * K[1] - 1))
        top, left = _first_query(i, 0, K, S), _first_query(j, 1, K, S)
        bottom = _last_query(tl.minimum(i + TH, ni) - 1, ni, 0, K, S)
        right = _last_query(tl.minimum(j + TW, nj) - 1, nj, 1, K, S)
        # a padded map has keys where there are no queries
        rows = tl.maximum(tl.minimum(bottom, tl.cdiv(H[0] - gi, R[0]) - 1) + 1 - top, 0)
        cols = tl.maximum(tl.minimum(right, tl.cdiv(H[1] - gj, R[1]) - 1) + 1 - left, 0)
        queries, grads = q_ptr + b * stride_q[0] + head * stride_q[3], dout_ptr + (b * H[0] * H[1] * heads + head) * CV
        dk = tl.zeros((TH * TW, CP), tl.float32)
        dv = tl.zeros((TH * TW, CVP), tl.float32)
        for start in range(0, rows * cols, BLOCK):
            m = start + tl.arange(0, BLOCK)
            m_q = m < rows * cols
            qi, qj = top + m // cols, left + m % cols
            yi, yj = qi * R[0] + gi, qj * R[1] + gj
            _, _, inside = _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K, S)
            scalar = (b * heads + head) * H[0] * H[1] + yi.to(tl.int64) * H[1] + yj
            lse = tl.load(lse_ptr + scalar, mask=m_q, other=0.0)
            delta = tl.load(delta_ptr + scalar, mask=m_q, other=0.0)
            q = _load(queries, yi, yj, stride_q[1], stride_q[2], m_q, C, CP)
            dout = _load(grads, yi, yj, H[1] * heads * CV, heads * CV, m_q, CV, CVP)
            p = tl.exp(_scores(q, k, scale, table, qi, qj, ki, kj, inside, K, BIAS) - lse[:, None])
            dv += tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk += _grad_dot(tl.trans(ds), q, PRECISION)
        c, cv = tl.arange(0, CP), tl.arange(0, CVP)
        token = ((b * L[0] + zi.to(tl.int64)) * L[1] + zj) * heads + head
        p_dk, p_dv = dk_ptr + token[:, None] * C + c[None, :], dv_ptr + token[:, None] * CV + cv[None, :]
        tl.store(p_dk, (dk * scale).to(dk_ptr.dtype.element_ty), mask=m_k[:, None] & (c < C)[None, :])
        tl.store(p_dv, dv.to(dv_ptr.dtype.element_ty), mask=m_k[:, None] & (cv < CV)[None, :])

    @triton.autotune(configs=_configs(), key=_KEY)
    @triton.jit
    def neighborhood_bwd_bias_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rpb_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        ds_ptr,
        scale,
        images,
        shares,
        heads,
        H,
        L,
        stride_q,
        stride_k,
        stride_v,
        K: tl.constexpr,
        S: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
        CV: tl.constexpr,
        CP: tl.constexpr,
        CVP: tl.constexpr,
        BIAS: tl.constexpr,
        TH: tl.constexpr,
        TW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the logits, summed over each share of the images: ``[shares, h, Kh * Kw, H * W]``."""
        share, head, gi, gj, i, j = _place(H, heads, R, TH, TW)
        ni, nj = tl.cdiv(L[0] - gi, R[0]), tl.cdiv(L[1] - gj, R[1])
        m = tl.arange(0, TH * TW)
        qi, qj = i + m // TW, j + m % TW
        yi, yj = qi * R[0] + gi, qj * R[1] + gj
        m_q = (yi < H[0]) & (yj < H[1])
        query = yi.to(tl.int64) * H[1] + yj
        table = rpb_ptr + head * ((2 * K[0] - 1) * (2 * K[1] - 1))
        top, left, rows, cols = _region(i, j, ni, nj, K, S, TH, TW)
        for start in range(0, rows * cols, BLOCK):
            n = start + tl.arange(0, BLOCK)
            m_k = n < rows * cols
            ki, kj = top + n // cols, left + n % cols
            zi, zj = ki * R[0] + gi, kj * R[1] + gj
            di, dj, inside = _offsets(qi, qj, ki, kj, ni, nj, m_q, m_k, K, S)
            acc = tl.zeros((TH * TW, BLOCK), tl.float32)
            for b in range(share, images, shares):
                queries, keys = (
                    q_ptr + b * stride_q[0] + head * stride_q[3],
                    k_ptr + b * stride_k[0] + head * stride_k[3],
                )
                values, grads = (
                    v_ptr + b * stride_v[0] + head * stride_v[3],
                    dout_ptr + (b * H[0] * H[1] * heads + head) * CV,
                )
                scalar = (b * heads + head) * H[0] * H[1] + query
                lse = tl.load(lse_ptr + scalar, mask=m_q, other=0.0)
                delta = tl.load(delta_ptr + scalar, mask=m_q, other=0.0)
                q = _load(queries, yi, yj, stride_q[1], stride_q[2], m_q, C, CP)
                dout = _load(grads, yi, yj, H[1] * heads * CV, heads * CV, m_q, CV, CVP)
                k = _load(keys, zi, zj, stride_k[1], stride_k[2], m_k, C, CP)
                v = _load(values, zi, zj, stride_v[1], stride_v[2], m_k, CV, CVP)
                p = tl.exp(_scores(q, k, scale, table, qi, qj, ki, kj, inside, K, BIAS) - lse[:, None])
                acc += p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            place = ((share * heads + head) * (K[0] * K[1]) + di * K[1] + dj) * (H[0] * H[1]) + query[:, None]
            tl.store(ds_ptr + place, acc, mask=inside)

    def launch(
        kernel: Any, size: tuple[int, int], copies: int, q: Tensor, k: Tensor, v: Tensor, window: Any, **others: Any
    ) -> None:
        """Run a kernel with one program for each head and tile of so many maps of a size."""
        heads, C, CV = q.shape[3], q.shape[4], v.shape[4]

        def grid(meta: dict[str, int]) -> tuple[int]:
            rows, cols = (triton.cdiv(n, d) for n, d in zip(size, window.dilation, strict=True))
            tiles = math.prod(window.dilation) * triton.cdiv(rows, meta["TH"]) * triton.cdiv(cols, meta["TW"])
            return (copies * heads * tiles,)

        with on_device(q):
            kernel[grid](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                **others,
                heads=heads,
                H=tuple(q.shape[1:3]),
                L=tuple(k.shape[1:3]),
                stride_q=q.stride()[:4],
                stride_k=k.stride()[:4],
                stride_v=v.stride()[:4],
                K=window.kernel,
                S=window.stride,
                R=window.dilation,
                C=C,
                CV=CV,
                CP=max(16, 1 << (C - 1).bit_length()),
                CVP=max(16, 1 << (CV - 1).bit_length()),
            )
