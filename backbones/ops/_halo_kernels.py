"""Triton kernels of halo attention: see ``halo.py`` for the formula.

A forward program owns a tile of the queries of one block and one head, and walks over the keys of its window, which it
reads in place.  Its products with the two tables stay in registers; each score gathers its two terms from them.

Letters: ``i, m`` row and column of a query in its block, ``j, n`` of a key in its window, ``y, x`` in a map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import HAS_TRITON, on_device

MAX_CHANNELS = 256  # of a head: a tile of keys and one of queries have to fit into shared memory
MAX_ROWS = 128  # of a table that are read: their products with a tile of queries have to fit into registers
PROGRAMS = 4096  # of the kernel that leaves one partial gradient of the tables for each

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _place(pid, heads, nh, nw, tiles):
        """Image (int64), block row, block column, tile and head of a program: heads, which lie side by side, first."""
        head, rest = (pid % heads).to(tl.int32), pid // heads
        tile, rest = (rest % tiles).to(tl.int32), rest // tiles
        return rest // nw // nh, (rest // nw % nh).to(tl.int32), (rest % nw).to(tl.int32), tile, head

    @triton.jit
    def _load(base, y, x, mask, stride_y, stride_x, C: tl.constexpr, CP: tl.constexpr):
        """Vectors of the pixels ``y, x``: ``[pixels, CP]``, zero where masked."""
        c = tl.arange(0, CP)
        p = base + (y * stride_y + x * stride_x)[:, None] + c[None, :]
        return tl.load(p, mask=mask[:, None] & (c < C)[None, :], other=0.0)

    @triton.jit
    def _load_table(table_ptr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """Table ``[RP, DP]``."""
        t, c = tl.arange(0, RP), tl.arange(0, DP)
        return tl.load(table_ptr + t[:, None] * D + c[None, :], mask=(t < R)[:, None] & (c < D)[None, :], other=0.0)

    @triton.jit
    def _products(
        q32, table_ptr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr
    ):
        """Queries times a table ``[queries, RP]``; to load it anew each time takes less shared memory."""
        return tl.dot(q32, tl.trans(_load_table(table_ptr, R, RP, D, DP)), input_precision=PRECISION)

    @triton.jit
    def _window(start, by, bx, H, W, BLOCK: tl.constexpr, HALO: tl.constexpr, BLOCK_N: tl.constexpr):
        """A tile of keys: positions in the window and in the map, which are in the window, and which in both."""
        WIN: tl.constexpr = BLOCK + 2 * HALO
        o = start + tl.arange(0, BLOCK_N)
        j, n = o // WIN, o % WIN
        y, x = by * BLOCK - HALO + j, bx * BLOCK - HALO + n
        own = o < WIN * WIN
        return j, n, y, x, own, own & (y >= 0) & (y < H) & (x >= 0) & (x < W)

    @triton.jit
    def _scores(
        q,
        k,
        rows,
        cols,
        i,
        m,
        j,
        n,
        scale,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        R: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Logits ``[queries, keys]`` from the products ``rows, cols`` ``[queries, RP]`` with the tables."""
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        row = (SIDE - 1 - i)[:, None] * STEP + j[None, :]
        col = (SIDE - 1 - m)[:, None] * STEP + n[None, :]
        row, col = tl.minimum(tl.maximum(row, 0), R - 1), tl.minimum(tl.maximum(col, 0), R - 1)  # of masked pairs
        return s + tl.gather(rows, row, 1) + tl.gather(cols, col, 1)

    @triton.jit
    def _halo_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        out_ptr,
        lse_ptr,
        scale,
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
        BLOCK: tl.constexpr,
        HALO: tl.constexpr,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        MASK: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        DP: tl.constexpr,
        DVP: tl.constexpr,
        RP: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        tiles = tl.cdiv(SIDE * SIDE, BLOCK_M)
        b, by, bx, tile, head = _place(tl.program_id(0).to(tl.int64), heads, nh, nw, tiles)
        t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        i, m = t // SIDE, t % SIDE
        y, x = by * SIDE + i, bx * SIDE + m
        m_q = (t < SIDE * SIDE) & (y < QH) & (x < QW)
        q = _load(q_ptr + b * stride_qb + head * stride_qh, y, x, m_q, stride_qy, stride_qx, D, DP)
        q32 = q.to(tl.float32)
        rows = _products(q32, rows_ptr, R, RP, D, DP, PRECISION)
        cols = _products(q32, cols_ptr, R, RP, D, DP, PRECISION)
        k_base = k_ptr + b * stride_kb + head * stride_kh
        v_base = v_ptr + b * stride_vb + head * stride_vh
        peak = tl.full((BLOCK_M,), -1e38, tl.float32)  # finite: a whole tile of keys may be masked
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DVP), tl.float32)
        for start in range(0, WIN * WIN, BLOCK_N):
            j, n, ky, kx, own, inside = _window(start, by, bx, H, W, BLOCK, HALO, BLOCK_N)
            k = _load(k_base, ky, kx, inside, stride_ky, stride_kx, D, DP)
            v = _load(v_base, ky, kx, inside, stride_vy, stride_vx, DV, DVP)
            s = _scores(q, k, rows, cols, i, m, j, n, scale, SIDE, STEP, R, PRECISION)
            counts = inside if MASK else own
            s = tl.where(counts[None, :], s, float("-inf"))
            higher = tl.maximum(peak, tl.max(s, 1))
            shrink = tl.exp(peak - higher)
            p = tl.exp(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p, v.to(tl.float32), input_precision=PRECISION)
            peak = higher
        image, place = b * QH * QW * heads, (y * QW + x) * heads + head
        c = tl.arange(0, DVP)
        p_out = out_ptr + image * DV + place[:, None] * DV + c[None, :]
        tl.store(p_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=m_q[:, None] & (c < DV)[None, :])
        tl.store(lse_ptr + image + place, peak + tl.log(total), mask=m_q)

    @triton.jit
    def _halo_bwd_query_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        lse_ptr,
        dout_ptr,
        delta_ptr,
        dq_ptr,
        dtable_ptr,
        scale,
        programs,
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
        BLOCK: tl.constexpr,
        HALO: tl.constexpr,
        SIDE: tl.constexpr,
        STEP: tl.constexpr,
        MASK: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        DP: tl.constexpr,
        DVP: tl.constexpr,
        RP: tl.constexpr,
        WP: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """Gradient of the queries, ``delta`` for the keys' kernel, and this program's share of that of the tables."""
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        tiles = tl.cdiv(SIDE * SIDE, BLOCK_M)
        c, cv, t_r, t_w = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, RP), tl.arange(0, WP)
        d_row_table = tl.zeros((RP, DP), tl.float32)
        d_col_table = tl.zeros((RP, DP), tl.float32)
        first = tl.program_id(0).to(tl.int64)
        for pid in range(first, programs, tl.num_programs(0)):
            b, by, bx, tile, head = _place(pid, heads, nh, nw, tiles)
            t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            i, m = t // SIDE, t % SIDE
            y, x = by * SIDE + i, bx * SIDE + m
            m_q = (t < SIDE * SIDE) & (y < QH) & (x < QW)
            image, place = b * QH * QW * heads, (y * QW + x) * heads + head
            q = _load(q_ptr + b * stride_qb + head * stride_qh, y, x, m_q, stride_qy, stride_qx, D, DP)
            q32 = q.to(tl.float32)
            rows = _products(q32, rows_ptr, R, RP, D, DP, PRECISION)
            cols = _products(q32, cols_ptr, R, RP, D, DP, PRECISION)
            m_qv = m_q[:, None] & (cv < DV)[None, :]
            dout = tl.load(dout_ptr + image * DV + place[:, None] * DV + cv[None, :], mask=m_qv, other=0.0)
            lse = tl.load(lse_ptr + image + place, mask=m_q, other=0.0)
            k_base = k_ptr + b * stride_kb + head * stride_kh
            v_base = v_ptr + b * stride_vb + head * stride_vh
            # the mean gradient comes from the float32 weights: the stored output of a half precision run is rounded
            delta = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, WIN * WIN, BLOCK_N):
                j, n, ky, kx, own, inside = _window(start, by, bx, H, W, BLOCK, HALO, BLOCK_N)
                k = _load(k_base, ky, kx, inside, stride_ky, stride_kx, D, DP)
                v = _load(v_base, ky, kx, inside, stride_vy, stride_vx, DV, DVP)
                s = _scores(q, k, rows, cols, i, m, j, n, scale, SIDE, STEP, R, PRECISION)
                p = tl.where(m_q[:, None] & inside[None, :], tl.exp(s - lse[:, None]), 0.0)
                delta += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision=PRECISION), 1)
            tl.store(delta_ptr + image + place, delta, mask=m_q)
            dq = tl.zeros((BLOCK_M, DP), tl.float32)
            d_rows = tl.zeros((BLOCK_M, WP), tl.float32)
            d_cols = tl.zeros((BLOCK_M, WP), tl.float32)
            for start in range(0, WIN * WIN, BLOCK_N):
                j, n, ky, kx, own, inside = _window(start, by, bx, H, W, BLOCK, HALO, BLOCK_N)
                k = _load(k_base, ky, kx, inside, stride_ky, stride_kx, D, DP)
                v = _load(v_base, ky, kx, inside, stride_vy, stride_vx, DV, DVP)
                s = _scores(q, k, rows, cols, i, m, j, n, scale, SIDE, STEP, R, PRECISION)
                counts = inside if MASK else own
                p = tl.where(m_q[:, None] & counts[None, :], tl.exp(s - lse[:, None]), 0.0)
                ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                # weights and gradients stay float32: in float16 the products of small ones would vanish
                dq += tl.dot(ds, k.to(tl.float32), input_precision=PRECISION)
                d_rows += tl.dot(ds, (j[:, None] == t_w[None, :]).to(tl.float32), input_precision=PRECISION)
                d_cols += tl.dot(ds, (n[:, None] == t_w[None, :]).to(tl.float32), input_precision=PRECISION)
            j_r = t_r[None, :] - (SIDE - 1 - i)[:, None] * STEP  # the key's row that meets row t_r of the table
            n_r = t_r[None, :] - (SIDE - 1 - m)[:, None] * STEP
            d_rows = tl.gather(d_rows, tl.minimum(tl.maximum(j_r, 0), WP - 1), 1)
            d_cols = tl.gather(d_cols, tl.minimum(tl.maximum(n_r, 0), WP - 1), 1)
            d_rows = tl.where((j_r >= 0) & (j_r < WIN), d_rows, 0.0)
            d_cols = tl.where((n_r >= 0) & (n_r < WIN), d_cols, 0.0)
            dq = dq * scale + tl.dot(d_rows, _load_table(rows_ptr, R, RP, D, DP), input_precision=PRECISION)
            dq += tl.dot(d_cols, _load_table(cols_ptr, R, RP, D, DP), input_precision=PRECISION)
            p_dq = dq_ptr + image * D + place[:, None] * D + c[None, :]
            tl.store(p_dq, dq.to(dq_ptr.dtype.element_ty), mask=m_q[:, None] & (c < D)[None, :])
            d_row_table += tl.dot(tl.trans(d_rows), q32, input_precision=PRECISION)
            d_col_table += tl.dot(tl.trans(d_cols), q32, input_precision=PRECISION)
        p_table = dtable_ptr + first * 2 * R * D + t_r[:, None] * D + c[None, :]
        m_table = (t_r < R)[:, None] & (c < D)[None, :]
        tl.store(p_table, d_row_table, mask=m_table)
        tl.store(p_table + R * D, d_col_table, mask=m_table)

    @triton.jit
    def _halo_bwd_key_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        rows_ptr,
        cols_ptr,
        lse_ptr,
        dout_ptr,
        delta_ptr,
        dk_ptr,
        dv_ptr,
        scale,
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
        BLOCK_M: tl.constexpr,
        BLOCK_Y: tl.constexpr,
        BLOCK_X: tl.constexpr,
    ):
        """Gradients of a rectangle of keys and values: it adds up the queries of all blocks whose window covers it."""
        WIN: tl.constexpr = BLOCK + 2 * HALO
        R: tl.constexpr = (SIDE - 1) * STEP + WIN
        b, ty, tx, _, head = _place(tl.program_id(0).to(tl.int64), heads, tl.cdiv(H, BLOCK_Y), tl.cdiv(W, BLOCK_X), 1)
        o = tl.arange(0, BLOCK_Y * BLOCK_X)
        y0, x0 = ty * BLOCK_Y, tx * BLOCK_X
        ky, kx = y0 + o // BLOCK_X, x0 + o % BLOCK_X
        m_k = (ky < H) & (kx < W)
        k = _load(k_ptr + b * stride_kb + head * stride_kh, ky, kx, m_k, stride_ky, stride_kx, D, DP)
        v = _load(v_ptr + b * stride_vb + head * stride_vh, ky, kx, m_k, stride_vy, stride_vx, DV, DVP)
        q_base = q_ptr + b * stride_qb + head * stride_qh
        image = b * QH * QW * heads
        cv = tl.arange(0, DVP)
        dk = tl.zeros((BLOCK_Y * BLOCK_X, DP), tl.float32)
        dv = tl.zeros((BLOCK_Y * BLOCK_X, DVP), tl.float32)
        by0, bx0 = tl.maximum(y0 - HALO, 0) // BLOCK, tl.maximum(x0 - HALO, 0) // BLOCK
        by1 = tl.minimum((y0 + BLOCK_Y - 1 + HALO) // BLOCK, nh - 1)
        bx1 = tl.minimum((x0 + BLOCK_X - 1 + HALO) // BLOCK, nw - 1)
        for by in range(by0, by1 + 1):
            for bx in range(bx0, bx1 + 1):
                j, n = ky - by * BLOCK + HALO, kx - bx * BLOCK + HALO
                covered = m_k & (j >= 0) & (j < WIN) & (n >= 0) & (n < WIN)
                for start in range(0, SIDE * SIDE, BLOCK_M):
                    t = start + tl.arange(0, BLOCK_M)
                    i, m = t // SIDE, t % SIDE
                    y, x = by * SIDE + i, bx * SIDE + m
                    m_q = (t < SIDE * SIDE) & (y < QH) & (x < QW)
                    place = (y * QW + x) * heads + head
                    q = _load(q_base, y, x, m_q, stride_qy, stride_qx, D, DP)
                    q32 = q.to(tl.float32)
                    rows = _products(q32, rows_ptr, R, RP, D, DP, PRECISION)
                    cols = _products(q32, cols_ptr, R, RP, D, DP, PRECISION)
                    m_qv = m_q[:, None] & (cv < DV)[None, :]
                    dout = tl.load(dout_ptr + image * DV + place[:, None] * DV + cv[None, :], mask=m_qv, other=0.0)
                    lse = tl.load(lse_ptr + image + place, mask=m_q, other=0.0)
                    delta = tl.load(delta_ptr + image + place, mask=m_q, other=0.0)
                    s = _scores(q, k, rows, cols, i, m, j, n, scale, SIDE, STEP, R, PRECISION)
                    p = tl.where(m_q[:, None] & covered[None, :], tl.exp(s - lse[:, None]), 0.0)
                    dv += tl.dot(tl.trans(p), dout.to(tl.float32), input_precision=PRECISION)
                    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                    dk += tl.dot(tl.trans(ds), q32, input_precision=PRECISION)
        image, place = b * H * W * heads, (ky * W + kx) * heads + head
        c = tl.arange(0, DP)
        p_dk = dk_ptr + image * D + place[:, None] * D + c[None, :]
        p_dv = dv_ptr + image * DV + place[:, None] * DV + cv[None, :]
        tl.store(p_dk, (dk * scale).to(dk_ptr.dtype.element_ty), mask=m_k[:, None] & (c < D)[None, :])
        tl.store(p_dv, dv.to(dv_ptr.dtype.element_ty), mask=m_k[:, None] & (cv < DV)[None, :])


def kernel_limits(q: Tensor, v: Tensor, rows: int) -> str:
    """What the kernels cannot do with these queries, values and rows of a table; empty if nothing."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    if max(q.shape[4], v.shape[4]) > MAX_CHANNELS:
        return f"the kernels take up to {MAX_CHANNELS} channels per head, not {max(q.shape[4], v.shape[4])}"
    return f"the kernels take tables with up to {MAX_ROWS} rows in use, not {rows}" if rows > MAX_ROWS else ""


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _tile(width: int, half: bool) -> tuple[int, int, int]:
    """Queries, keys and warps of a program for vectors that are ``width`` wide together.

    Chosen by the registers and spills that the assembler reports for sm_90, and to need less than 100 KiB of shared
    memory; not by measured times.
    """
    if width > 128:
        return (32, 16, 8) if half else (16, 16, 8)
    return 64 if half else 32, 32, 4 if width <= 64 else 8


def _rows_last(t: Tensor) -> Tensor:
    return t if t.stride(4) == 1 else t.contiguous()


class _Launch:
    """What the three kernels share: arguments, block counts and tile sizes."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel):
        q, k, v = (t if t.stride(4) == 1 else t.contiguous() for t in (q, k, v))
        _, H, W, h, d = k.shape
        nh, nw = -(-H // block_size), -(-W // block_size)
        side, step, dv = block_size // stride, stride if pixel else 1, v.shape[4]
        self.rows = (side - 1) * step + block_size + 2 * halo_size  # those before are never read
        self.rel_scale, self.mask, self.win = rel_scale, mask, block_size + 2 * halo_size
        tables = [(t[-self.rows :].float() * rel_scale).contiguous() for t in (height_rel, width_rel)]
        DP, DVP = _power(d), _power(dv)
        half = q.dtype != torch.float32
        RP = _power(self.rows)
        block_m, self.block_n, warps = _tile(max(DP + DVP, 2 * RP), half)
        block_m = min(block_m, _power(side * side))
        self.programs = q.shape[0] * nh * nw * h * -(-(side * side) // block_m)
        named = (("q", q), ("k", k), ("v", v))
        self.arguments = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "rows_ptr": tables[0],
            "cols_ptr": tables[1],
            "scale": scale,
            "heads": h,
            "H": H,
            "W": W,
            "QH": q.shape[1],
            "QW": q.shape[2],
            "nh": nh,
            "nw": nw,
            **{f"stride_{n}{axis}": t.stride(i) for n, t in named for i, axis in enumerate("byxh")},
            "BLOCK": block_size,
            "HALO": halo_size,
            "SIDE": side,
            "STEP": step,
            "D": d,
            "DV": dv,
            "DP": DP,
            "DVP": DVP,
            "RP": RP,
            "PRECISION": "tf32" if half else "ieee",  # tf32 keeps as many bits as float16
            "BLOCK_M": block_m,
            "num_warps": warps,
        }


def kernel_forward(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Wq, h, dv]`` and log-sum of the logits ``[B, Hq, Wq, h]``."""
    out = torch.empty(*q.shape[:4], v.shape[4], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        launch = _Launch(q, k, v, *args)
        with on_device(q):
            _halo_fwd_kernel[(launch.programs,)](
                **launch.arguments, out_ptr=out, lse_ptr=lse, MASK=launch.mask, BLOCK_N=launch.block_n
            )
    return out, lse


def kernel_backward(
    dout: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and of the used rows of both tables (float32)."""
    launch = _Launch(q, k, v, *args)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    programs = min(launch.programs, PROGRAMS)
    dtables = torch.empty(programs, 2, launch.rows, q.shape[4], dtype=torch.float32, device=q.device)
    if programs > 0:
        delta = torch.empty_like(lse)
        shared = {**launch.arguments, "lse_ptr": lse, "dout_ptr": dout.contiguous(), "delta_ptr": delta}
        block_y, block_x = launch.block_n // 8, 8
        keys = k.shape[0] * k.shape[3] * -(-k.shape[1] // block_y) * -(-k.shape[2] // block_x)
        with on_device(q):
            _halo_bwd_query_kernel[(programs,)](
                **shared,
                dq_ptr=dq,
                dtable_ptr=dtables,
                programs=launch.programs,
                MASK=launch.mask,
                WP=_power(launch.win),
                BLOCK_N=launch.block_n,
            )
            _halo_bwd_key_kernel[(keys,)](**shared, dk_ptr=dk, dv_ptr=dv, BLOCK_Y=block_y, BLOCK_X=block_x)
    return dq, dk, dv, *(dtables.sum(0) * launch.rel_scale).unbind(0)
