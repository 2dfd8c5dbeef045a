"""Triton kernels of reversed attention: see ``reversed_attention.py`` for the formulas.

Up to 256 tokens in half precision, programs hold whole rows of scores in registers, with no second pass; else, tiles,
with the log-sum of each sender from a pass of its own, and ``u_i . d u_i`` from the gradient itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._kernels import cdiv, gradient_scale, in_order, power_of_two, product_precision, same_strides, tokens_first
from .backend import HAS_TRITON, on_device

ROW_TOKENS, ROW_ELEMENTS = 256, 2**13  # up to these sizes whole rows of scores and a whole head stay on the chip

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import (
        LOG2E,
        index_type,
        inner_products,
        load_gradient_scale,
        load_vectors,
        resident_products,
        store_vectors,
    )

    _COUNTS = ["h", "N"]  # one compilation serves all: nothing is faster where one is 1 or divisible by 16

    @triton.jit
    def _places(head, h, N, stride_qb, stride_qh, D: tl.constexpr, INDEX: tl.constexpr):
        """Where a head of ``q`` and ``k``, and of tensors in the order ``[B, N, h, d]``, begins."""
        image, head = (head // h).to(tl.int64), head % h
        return image * stride_qb + head.to(INDEX) * stride_qh, image * N * h * D + head * D

    @triton.jit(do_not_specialize=_COUNTS)
    def _rows_fwd_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        out_ptr,
        lse_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        NP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        pid = tl.program_id(0)
        q_head, u_head = _places(pid, h, N, stride_qb, stride_qh, D, INDEX)
        stride_un = h * D
        lse_ptr += pid.to(tl.int64) * N
        j = tl.arange(0, NP)
        k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
        beyond = tl.where(j < N, 0.0, float("-inf"))  # a term costs less than a choice
        acc = tl.zeros((NP, DP), tl.float32)
        for start in range(0, N, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
            u = load_vectors(u_ptr + u_head, i.to(INDEX) * stride_un, i < N, D, DP)
            s = inner_products(q, k, PRECISION) * (scale * LOG2E) + beyond[None, :]  # sender, receiver
            peak = tl.max(s, 1)
            p = tl.exp2(s - peak[:, None])
            total = tl.sum(p, 1)
            p = (p * (1.0 / total)[:, None]).to(u.dtype)
            acc = tl.dot(tl.trans(p), u, acc, input_precision=PRECISION)
            tl.store(lse_ptr + i, (peak + tl.log2(total)) / LOG2E, mask=i < N)
        store_vectors(out_ptr + u_head, j.to(INDEX) * stride_un, acc, j < N, D, DP)

    @triton.jit(do_not_specialize=_COUNTS)
    def _rows_bwd_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        dout_ptr,
        lse_ptr,
        grad_scale_ptr,
        dq_ptr,
        dk_ptr,
        du_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        NP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        pid = tl.program_id(0)
        q_head, u_head = _places(pid, h, N, stride_qb, stride_qh, D, INDEX)
        stride_un = h * D
        lse_ptr += pid.to(tl.int64) * N
        j = tl.arange(0, NP)
        k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
        dout = load_vectors(dout_ptr + u_head, j.to(INDEX) * stride_un, j < N, D, DP)
        dk = tl.zeros((NP, DP), tl.float32)
        grad_scale = load_gradient_scale(grad_scale_ptr, k.dtype)
        for start in range(0, N, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
            u = load_vectors(u_ptr + u_head, i.to(INDEX) * stride_un, i < N, D, DP)
            lse = tl.load(lse_ptr + i, mask=i < N, other=0.0) * LOG2E
            p = tl.exp2(inner_products(k, q, PRECISION) * (scale * LOG2E) - lse[None, :])  # receiver, sender
            p = tl.where((j < N)[:, None], p, 0.0)
            dp = inner_products(dout, u, PRECISION)
            ds = (p * (dp * grad_scale - (tl.sum(p * dp, 0) * grad_scale)[None, :])).to(k.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            du = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision=PRECISION)
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * (scale / grad_scale)
            store_vectors(du_ptr + u_head, i.to(INDEX) * stride_un, du, i < N, D, DP)
            store_vectors(dq_ptr + u_head, i.to(INDEX) * stride_un, dq, i < N, D, DP)
        store_vectors(dk_ptr + u_head, j.to(INDEX) * stride_un, dk * (scale / grad_scale), j < N, D, DP)

    @triton.jit(do_not_specialize=_COUNTS)
    def _tiles_lse_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        lse_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        tiles = tl.cdiv(N, BLOCK_I)
        head = tl.program_id(0) // tiles
        q_head, _ = _places(head, h, N, stride_qb, stride_qh, D, INDEX)
        i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
        q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
        peak = tl.full((BLOCK_I,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_I,), tl.float32)
        for start in range(0, N, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
            s = inner_products(q, k, PRECISION) * (scale * LOG2E) + tl.where(j < N, 0.0, float("-inf"))[None, :]
            higher = tl.maximum(peak, tl.max(s, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            peak = higher
        tl.store(lse_ptr + head.to(tl.int64) * N + i, (peak + tl.log2(total)) / LOG2E, mask=i < N)

    @triton.jit(do_not_specialize=_COUNTS)
    def _tiles_fwd_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        out_ptr,
        lse_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        tiles = tl.cdiv(N, BLOCK_J)
        head = tl.program_id(0) // tiles
        q_head, u_head = _places(head, h, N, stride_qb, stride_qh, D, INDEX)
        stride_un = h * D
        lse_ptr += head.to(tl.int64) * N
        j = tl.program_id(0) % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
        acc = tl.zeros((BLOCK_J, DP), tl.float32)
        for start in range(0, N, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
            u = load_vectors(u_ptr + u_head, i.to(INDEX) * stride_un, i < N, D, DP)
            lse = tl.load(lse_ptr + i, mask=i < N, other=0.0) * LOG2E
            p = tl.exp2(inner_products(k, q, PRECISION) * (scale * LOG2E) - lse[None, :])  # receiver, sender
            acc = tl.dot(p.to(u.dtype), u, acc, input_precision=PRECISION)
        store_vectors(out_ptr + u_head, j.to(INDEX) * stride_un, acc, j < N, D, DP)

    @triton.jit(do_not_specialize=_COUNTS)
    def _tiles_bwd_senders_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        dout_ptr,
        lse_ptr,
        grad_scale_ptr,
        delta_ptr,
        dq_ptr,
        du_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        tiles = tl.cdiv(N, BLOCK_I)
        head = tl.program_id(0) // tiles
        q_head, u_head = _places(head, h, N, stride_qb, stride_qh, D, INDEX)
        stride_un = h * D
        entry = head.to(tl.int64) * N
        i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
        q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
        u = load_vectors(u_ptr + u_head, i.to(INDEX) * stride_un, i < N, D, DP)
        lse = tl.load(lse_ptr + entry + i, mask=i < N, other=0.0) * LOG2E
        du = tl.zeros((BLOCK_I, DP), tl.float32)
        for start in range(0, N, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
            dout = load_vectors(dout_ptr + u_head, j.to(INDEX) * stride_un, j < N, D, DP)
            p = tl.exp2(resident_products(q, k, PRECISION) * (scale * LOG2E) - lse[:, None])  # sender, receiver
            p = tl.where((j < N)[None, :], p, 0.0)
            du = tl.dot(p.to(dout.dtype), dout, du, input_precision=PRECISION)
        delta = tl.sum(u * du, 1)
        store_vectors(du_ptr + u_head, i.to(INDEX) * stride_un, du, i < N, D, DP)
        tl.store(delta_ptr + entry + i, delta, mask=i < N)
        grad_scale = load_gradient_scale(grad_scale_ptr, q.dtype)
        dq = tl.zeros((BLOCK_I, DP), tl.float32)
        for start in range(0, N, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
            dout = load_vectors(dout_ptr + u_head, j.to(INDEX) * stride_un, j < N, D, DP)
            p = tl.exp2(resident_products(q, k, PRECISION) * (scale * LOG2E) - lse[:, None])
            p = tl.where((j < N)[None, :], p, 0.0)
            dp = resident_products(u, dout, PRECISION)
            ds = (p * (dp * grad_scale - (delta * grad_scale)[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dq *= scale / grad_scale
        store_vectors(dq_ptr + u_head, i.to(INDEX) * stride_un, dq, i < N, D, DP)

    @triton.jit(do_not_specialize=_COUNTS)
    def _tiles_bwd_receivers_kernel(
        q_ptr,
        k_ptr,
        u_ptr,
        dout_ptr,
        lse_ptr,
        grad_scale_ptr,
        delta_ptr,
        dk_ptr,
        h,
        N,
        stride_qb,
        stride_qh,
        stride_qn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        tiles = tl.cdiv(N, BLOCK_J)
        head = tl.program_id(0) // tiles
        q_head, u_head = _places(head, h, N, stride_qb, stride_qh, D, INDEX)
        stride_un = h * D
        entry = head.to(tl.int64) * N
        j = tl.program_id(0) % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        k = load_vectors(k_ptr + q_head, j.to(INDEX) * stride_qn, j < N, D, DP)
        dout = load_vectors(dout_ptr + u_head, j.to(INDEX) * stride_un, j < N, D, DP)
        grad_scale = load_gradient_scale(grad_scale_ptr, k.dtype)
        dk = tl.zeros((BLOCK_J, DP), tl.float32)
        for start in range(0, N, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            q = load_vectors(q_ptr + q_head, i.to(INDEX) * stride_qn, i < N, D, DP)
            u = load_vectors(u_ptr + u_head, i.to(INDEX) * stride_un, i < N, D, DP)
            lse = tl.load(lse_ptr + entry + i, mask=i < N, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + entry + i, mask=i < N, other=0.0)
            p = tl.exp2(inner_products(k, q, PRECISION) * (scale * LOG2E) - lse[None, :])  # receiver, sender
            dp = inner_products(dout, u, PRECISION)
            ds = (p * (dp * grad_scale - (delta * grad_scale)[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        dk *= scale / grad_scale
        store_vectors(dk_ptr + u_head, j.to(INDEX) * stride_un, dk, j < N, D, DP)


class Tile(NamedTuple):
    """What a program works on at a time, and how; the row kernels take all receivers."""

    senders: int
    receivers: int
    num_warps: int
    num_stages: int


# by compute capability, kind of product and padded channels of a head up to which an entry holds: those of least
# instructions without a spill in the machine code for sm_90, not of least measured time
CHOICES = {
    90: {
        "rows": {128: Tile(16, 0, 4, 1)},
        "half": {128: Tile(64, 64, 4, 1)},
        "tf32": {32: Tile(64, 64, 4, 1), 64: Tile(64, 64, 8, 1), 128: Tile(16, 16, 4, 1)},
        "ieee": {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
    }
}


def _rows(q: Tensor) -> bool:
    """Whether the row kernels take these queries; float32 products in three parts need more memory on the chip."""
    N, D = power_of_two(q.shape[2]), power_of_two(q.shape[3])
    return q.element_size() == 2 and N <= ROW_TOKENS and N * D <= ROW_ELEMENTS


def _tile(q: Tensor, rows: bool) -> Tile:
    half = "rows" if rows else "half"
    kind = half if q.element_size() == 2 else product_precision(q.device).removesuffix("x3")
    sizes = CHOICES[90][kind]  # other capabilities take the same until something is measured there
    return sizes[min(n for n in sizes if n >= q.shape[3])]


def _launch(kernel, pointers: tuple[Tensor, ...], scale: float) -> None:
    """A program for each head, or for each of its tiles of tokens; the pointers begin with ``q, k, u``."""
    q, _, u = pointers[:3]
    B, h, N, D = q.shape
    rows = kernel in (_rows_fwd_kernel, _rows_bwd_kernel)
    tile = _tile(q, rows)
    own = tile.senders if kernel in (_tiles_lse_kernel, _tiles_bwd_senders_kernel) else tile.receivers
    kernel[(B * h * (1 if rows else cdiv(N, own)),)](
        *pointers,
        h=h,
        N=N,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_qn=q.stride(2),
        scale=scale,
        D=D,
        DP=power_of_two(D),
        PRECISION=product_precision(q.device),
        INDEX=index_type(q, u),
        BLOCK_I=tile.senders,
        **({"NP": power_of_two(N)} if rows else {"BLOCK_J": tile.receivers}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def kernel_forward(q: Tensor, k: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum of each sender's scores ``[B, h, N]``."""
    (q, k), u = same_strides(q, k), in_order(u)
    out = tokens_first(u)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q):
        if _rows(q):
            _launch(_rows_fwd_kernel, (q, k, u, out, lse), scale)
        else:
            _launch(_tiles_lse_kernel, (q, k, u, lse), scale)
            _launch(_tiles_fwd_kernel, (q, k, u, out, lse), scale)
    return out, lse


def kernel_backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and weighted values."""
    (q, k), u, dout = same_strides(q, k), in_order(u), in_order(dout)
    dq, dk, du = (tokens_first(t) for t in (q, k, u))
    inputs = q, k, u, dout, lse, gradient_scale(dout)
    with on_device(q):
        if _rows(q):
            _launch(_rows_bwd_kernel, (*inputs, dq, dk, du), scale)
        else:
            delta = torch.empty_like(lse)
            _launch(_tiles_bwd_senders_kernel, (*inputs, delta, dq, du), scale)
            _launch(_tiles_bwd_receivers_kernel, (*inputs, delta, dk), scale)
    return dq, dk, du
