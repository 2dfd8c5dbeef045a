"""Triton kernels of attention to tokens and prompts: see ``prompt_attention.py`` for the formula.

They walk over the tokens as flash attention does, then over what is left, the prompts together with the keys of the
last partial tile.  A weight that ``chosen`` drops enters the sums of the softmax and no product with values; of its
logit's gradient only the part of the normalisation is left.  Gradients are added up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._kernels import cdiv, gradient_scale, in_order, power_of_two, product_precision, same_strides, tokens_first
from .backend import HAS_TRITON, on_device

PROGRAMS = 1024  # of the kernel for the gradients of prompts that all images share: enough to fill a GPU

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

    # one compilation serves all: nothing is faster where one is 1 or divisible by 16
    _COUNTS = ("h", "N", "P", "M", "B", "W", "rows", "images")

    def _jit(function):
        return triton.jit(function, do_not_specialize=[n for n in _COUNTS if n in function.__code__.co_varnames])

    @triton.jit
    def _tile(h, N, TILE: tl.constexpr):
        """Image (int64), head, and first token of the program's tile; the tiles of a head are neighbours."""
        tiles = tl.cdiv(N, TILE)
        pid = tl.program_id(0)
        return (pid // tiles // h).to(tl.int64), pid // tiles % h, pid % tiles * TILE

    @triton.jit
    def _joint(prompt_ptr, token_ptr, prompt, token, j, P, rest, D: tl.constexpr, DP: tl.constexpr):
        """Vectors of the prompts, then of the last tokens, at these offsets."""
        return load_vectors(prompt_ptr, prompt, j < P, D, DP) + load_vectors(
            token_ptr, token, (j >= P) & (j < rest), D, DP
        )

    @triton.jit
    def _word(kept_ptr, i, first, N, W, INDEX: tl.constexpr):
        """Bits of 32 joint keys for the tokens ``i``; past the last word there are tokens, which all are kept."""
        return tl.load(kept_ptr + i.to(INDEX) * W + first // 32, mask=(i < N) & (first // 32 < W), other=-1)

    @triton.jit
    def _bits(kept_ptr, i, first, N, W, INDEX: tl.constexpr, BLOCK_J: tl.constexpr):
        """Words ``[tokens, 1]``, or ``[tokens, keys]`` where they differ, and the bit of each key ``[1, keys]``."""
        c = first + tl.arange(0, BLOCK_J)[None, :]
        word = _word(kept_ptr, i, first, N, W, INDEX)[:, None]
        if BLOCK_J > 32:
            word = tl.where(c < first + 32, word, _word(kept_ptr, i, first + 32, N, W, INDEX)[:, None])
        return word, 1 << (c % 32)

    @triton.jit
    def _online(s, unit, peak, total):
        """Weights over the new peak, what the old sums shrink by, the new peak and total of the softmax."""
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s * unit - (higher * unit)[:, None])
        shrink = tl.exp2((peak - higher) * unit)
        return p, shrink, higher, total * shrink + tl.sum(p, 1)

    @_jit
    def _prompt_pack_kernel(chosen_ptr, kept_ptr, rows, P, W, ROWS: tl.constexpr):
        """Bits of what each token keeps, 32 in a word; those past the last prompt are of tokens, and set."""
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        j = tl.program_id(1) * 32 + tl.arange(0, 32)
        place = i.to(tl.int64)[:, None] * P + j[None, :]
        chosen = tl.load(chosen_ptr + place, mask=(i < rows)[:, None] & (j < P)[None, :], other=1)
        word = tl.sum(chosen.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
        tl.store(kept_ptr + i.to(tl.int64) * W + tl.program_id(1), word, mask=i < rows)

    @_jit
    def _prompt_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        k_prompt_ptr,
        v_prompt_ptr,
        kept_ptr,
        out_ptr,
        lse_ptr,
        h,
        N,
        P,
        W,
        stride_qb,
        stride_qh,
        stride_qn,
        stride_pb,
        stride_ph,
        stride_pn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        image, head, first = _tile(h, N, BLOCK_I)
        i = first + tl.arange(0, BLOCK_I)
        place = image * stride_qb + head.to(INDEX) * stride_qh
        k_ptr += place
        v_ptr += place
        q = load_vectors(q_ptr + place, i.to(INDEX) * stride_qn, i < N, D, DP)
        unit = scale * LOG2E  # of the products: positive, so that the largest stays the largest
        peak = tl.full((BLOCK_I,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_I,), tl.float32)
        acc = tl.zeros((BLOCK_I, DP), tl.float32)
        tail = N % BLOCK_J
        for start in range(0, N - tail, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            k = load_vectors(k_ptr, j.to(INDEX) * stride_qn, None, D, DP)
            v = load_vectors(v_ptr, j.to(INDEX) * stride_qn, None, D, DP)
            p, shrink, peak, total = _online(resident_products(q, k, PRECISION), unit, peak, total)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        place = image * stride_pb + head.to(INDEX) * stride_ph
        rest = tail + P
        for start in range(0, rest, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            prompt, token = j.to(INDEX) * stride_pn, (N - rest + j).to(INDEX) * stride_qn
            k = _joint(k_prompt_ptr + place, k_ptr, prompt, token, j, P, rest, D, DP)
            v = _joint(v_prompt_ptr + place, v_ptr, prompt, token, j, P, rest, D, DP)
            s = resident_products(q, k, PRECISION) + tl.where(j < rest, 0.0, float("-inf"))[None, :]
            p, shrink, peak, total = _online(s, unit, peak, total)
            word, bit = _bits(kept_ptr + image * N * W, i, start, N, W, INDEX, BLOCK_J)
            p = tl.where((word & bit) != 0, p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        acc *= (1 / total)[:, None]
        store_vectors(out_ptr + (image * N * h + head) * D, i.to(INDEX) * (h * D), acc, i < N, D, DP)
        tl.store(lse_ptr + (image * h + head) * N + i, peak * unit + tl.log2(total), mask=i < N)

    @_jit
    def _prompt_bwd_query_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        k_prompt_ptr,
        v_prompt_ptr,
        kept_ptr,
        out_ptr,
        lse_ptr,
        dout_ptr,
        grad_scale_ptr,
        delta_ptr,
        dq_ptr,
        h,
        N,
        P,
        W,
        stride_qb,
        stride_qh,
        stride_qn,
        stride_pb,
        stride_ph,
        stride_pn,
        scale,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        """Gradient of the queries, and ``delta`` for the keys' kernel: the mean gradient of each token's logits."""
        image, head, first = _tile(h, N, BLOCK_I)
        i = first + tl.arange(0, BLOCK_I)
        place = image * stride_qb + head.to(INDEX) * stride_qh
        k_ptr += place
        v_ptr += place
        q = load_vectors(q_ptr + place, i.to(INDEX) * stride_qn, i < N, D, DP)
        out_place = (image * N * h + head) * D
        dout = load_vectors(dout_ptr + out_place, i.to(INDEX) * (h * D), i < N, D, DP)
        out = load_vectors(out_ptr + out_place, i.to(INDEX) * (h * D), i < N, D, DP)
        grad_scale = load_gradient_scale(grad_scale_ptr, q.dtype)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        scalar = (image * h + head) * N + i
        tl.store(delta_ptr + scalar, delta, mask=i < N)
        delta *= grad_scale
        lse = tl.load(lse_ptr + scalar, mask=i < N, other=0.0)
        dq = tl.zeros((BLOCK_I, DP), tl.float32)
        tail = N % BLOCK_J
        for start in range(0, N - tail, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            k = load_vectors(k_ptr, j.to(INDEX) * stride_qn, None, D, DP)
            v = load_vectors(v_ptr, j.to(INDEX) * stride_qn, None, D, DP)
            p = tl.exp2(resident_products(q, k, PRECISION) * (scale * LOG2E) - lse[:, None])
            ds = p * (resident_products(dout, v, PRECISION) * grad_scale - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        place = image * stride_pb + head.to(INDEX) * stride_ph
        rest = tail + P
        for start in range(0, rest, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            prompt, token = j.to(INDEX) * stride_pn, (N - rest + j).to(INDEX) * stride_qn
            k = _joint(k_prompt_ptr + place, k_ptr, prompt, token, j, P, rest, D, DP)
            v = _joint(v_prompt_ptr + place, v_ptr, prompt, token, j, P, rest, D, DP)
            s = resident_products(q, k, PRECISION) * (scale * LOG2E) + tl.where(j < rest, 0.0, float("-inf"))[None, :]
            p = tl.exp2(s - lse[:, None])
            word, bit = _bits(kept_ptr + image * N * W, i, start, N, W, INDEX, BLOCK_J)
            dp = tl.where((word & bit) != 0, resident_products(dout, v, PRECISION) * grad_scale, 0.0)
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
        dq *= scale / grad_scale
        store_vectors(dq_ptr + out_place, i.to(INDEX) * (h * D), dq, i < N, D, DP)

    @_jit
    def _prompt_bwd_key_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        kept_ptr,
        lse_ptr,
        dout_ptr,
        grad_scale_ptr,
        delta_ptr,
        dk_ptr,
        dv_ptr,
        B,
        h,
        N,
        M,
        W,
        images,
        stride_qb,
        stride_qh,
        stride_qn,
        stride_kb,
        stride_kh,
        stride_kn,
        scale,
        PROMPTS: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        """Gradients of a tile of ``M`` keys, tokens or prompts, and of their values, from the tokens of ``images``."""
        share, head, first = _tile(h, M, BLOCK_J)
        j = first + tl.arange(0, BLOCK_J)
        place = share * stride_kb + head.to(INDEX) * stride_kh
        k = load_vectors(k_ptr + place, j.to(INDEX) * stride_kn, j < M, D, DP)
        v = load_vectors(v_ptr + place, j.to(INDEX) * stride_kn, j < M, D, DP)
        grad_scale = load_gradient_scale(grad_scale_ptr, k.dtype)
        dk = tl.zeros((BLOCK_J, DP), tl.float32)
        dv = tl.zeros((BLOCK_J, DP), tl.float32)
        for image in range(share * images, tl.minimum(share * images + images, B)):
            queries = q_ptr + (image * stride_qb + head.to(INDEX) * stride_qh)
            grads = dout_ptr + (image * N * h + head) * D
            scalar = (image * h + head) * N
            for start in range(0, N, BLOCK_I):
                i = start + tl.arange(0, BLOCK_I)
                q = load_vectors(queries, i.to(INDEX) * stride_qn, i < N, D, DP)
                dout = load_vectors(grads, i.to(INDEX) * (h * D), i < N, D, DP)
                lse = tl.load(lse_ptr + scalar + i, mask=i < N, other=float("inf"))
                delta = tl.load(delta_ptr + scalar + i, mask=i < N, other=0.0) * grad_scale
                p = tl.exp2(inner_products(k, q, PRECISION) * (scale * LOG2E) - lse[None, :])
                dp = inner_products(v, dout, PRECISION) * grad_scale
                kept = p
                if PROMPTS:
                    word, bit = _bits(kept_ptr + image * N * W, i, first, N, W, INDEX, BLOCK_J)
                    chosen = (tl.trans(word) & tl.trans(bit)) != 0
                    kept, dp = tl.where(chosen, p, 0.0), tl.where(chosen, dp, 0.0)
                dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
        place = (share * M * h + head) * D
        store_vectors(dk_ptr + place, j.to(INDEX) * (h * D), dk * (scale / grad_scale), j < M, D, DP)
        store_vectors(dv_ptr + place, j.to(INDEX) * (h * D), dv, j < M, D, DP)


class Tile(NamedTuple):
    """What a program works on at a time, and how."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# by compute capability, kind of product and padded channels of a head up to which an entry holds: those of least
# instructions without a spill in the machine code for sm_90, not of least measured time
CHOICES = {
    90: {
        "half": {
            64: {"fwd": Tile(64, 64, 4, 2), "query": Tile(64, 64, 4, 2), "key": Tile(32, 64, 4, 2)},
            128: {"fwd": Tile(64, 32, 4, 2), "query": Tile(64, 32, 4, 2), "key": Tile(16, 64, 4, 2)},
        },
        "tf32": {
            64: {"fwd": Tile(64, 32, 4, 1), "query": Tile(64, 32, 4, 1), "key": Tile(32, 32, 4, 1)},
            128: {"fwd": Tile(32, 32, 8, 1), "query": Tile(32, 32, 8, 1), "key": Tile(16, 16, 4, 1)},
        },
        "ieee": {
            64: dict.fromkeys(("fwd", "query", "key"), Tile(32, 32, 4, 1)),
            128: dict.fromkeys(("fwd", "query", "key"), Tile(16, 16, 4, 1)),
        },
    }
}


def _choice(q: Tensor, name: str) -> Tile:
    kind = "half" if q.element_size() == 2 else product_precision(q.device).removesuffix("x3")
    sizes = CHOICES[90][kind]  # other capabilities take the same until something is measured there
    return sizes[min(n for n in sizes if n >= q.shape[3])][name]


def _launch(kernel, name: str, programs: int, tokens: int, pointers: tuple[Tensor, ...], scale: float, **rest) -> None:
    """``programs`` for each tile of ``tokens``; the pointers begin with queries and keys, ``name`` finds the tiles."""
    q, k = pointers[:2]
    tile = _choice(q, name)
    kernel[(programs * cdiv(tokens, tile.keys if name == "key" else tile.queries),)](
        *pointers,
        h=q.shape[1],
        N=q.shape[2],
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_qn=q.stride(2),
        scale=scale,
        D=q.shape[3],
        DP=power_of_two(q.shape[3]),
        PRECISION=product_precision(q.device),
        INDEX=index_type(*pointers[:3], pointers[5]),
        BLOCK_I=tile.queries,
        BLOCK_J=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **rest,
    )


def _ordered(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor
) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """The inputs as the kernels take them, and the number of prompts with their strides."""
    k_prompt, v_prompt = same_strides(k_prompt, v_prompt)
    batch, heads, tokens, _ = k_prompt.stride()
    strides = {"stride_pb": batch if k_prompt.shape[0] > 1 else 0, "stride_ph": heads, "stride_pn": tokens}
    return (*same_strides(q, k, v), k_prompt, v_prompt), {"P": k_prompt.shape[2], **strides}


def kernel_forward(*inputs: Tensor, chosen: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, base-2 log-sum of each token's logits ``[B, h, N]``, and ``chosen`` as bits ``[B, N, P / 32]``."""
    tensors, prompts = _ordered(*inputs)
    B, h, N, _ = tensors[0].shape
    out, lse, kept = empty_outputs(tensors[0], chosen)
    W = kept.shape[2]
    with on_device(out):
        rows = {"rows": B * N, "P": chosen.shape[2], "W": W, "ROWS": 64}
        _prompt_pack_kernel[cdiv(B * N, 64), W](chosen.contiguous(), kept, **rows)
        _launch(_prompt_fwd_kernel, "fwd", B * h, N, (*tensors, kept, out, lse), scale, **prompts, W=W)
    return out, lse, kept


def kernel_backward(
    dout: Tensor, out: Tensor, lse: Tensor, kept: Tensor, *inputs: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys and values of the tokens, and of those of the prompts."""
    tensors, prompts = _ordered(*inputs)
    q, k, v, k_prompt, v_prompt = tensors
    B, h, N, _ = q.shape
    P, own = k_prompt.shape[2], k_prompt.shape[0]
    dout, grad_scale, delta = in_order(dout), gradient_scale(dout), torch.empty_like(lse)
    dq, dk, dv = (tokens_first(q) for _ in range(3))
    images, dprompts = 1, [tokens_first(k_prompt) for _ in range(2)]
    if own < B:
        images = cdiv(B, cdiv(PROGRAMS, h * cdiv(P, _choice(q, "key").keys)))
        shares = k_prompt.expand(cdiv(B, images), -1, -1, -1)
        dprompts = [tokens_first(shares, torch.float32) for _ in range(2)]
    W = kept.shape[2]
    with on_device(q):
        pointers = *tensors, kept, out, lse, dout, grad_scale, delta, dq
        _launch(_prompt_bwd_query_kernel, "query", B * h, N, pointers, scale, **prompts, W=W)
        for keys, values, grads, shared, count in ((k, v, (dk, dv), 1, N), (k_prompt, v_prompt, dprompts, images, P)):
            _launch(
                _prompt_bwd_key_kernel,
                "key",
                grads[0].shape[0] * h,
                count,
                (q, keys, values, kept, lse, dout, grad_scale, delta, *grads),
                scale,
                B=B,
                M=count,
                W=W,
                images=shared,
                stride_kb=prompts["stride_pb"] if keys is k_prompt else keys.stride(0),
                stride_kh=keys.stride(1),
                stride_kn=keys.stride(2),
                PROMPTS=keys is k_prompt,
            )
    if own < B:
        dprompts = [t.transpose(1, 2).sum(0, keepdim=True).to(q.dtype).transpose(1, 2) for t in dprompts]
    return dq, dk, dv, dprompts[0], dprompts[1]


def empty_outputs(q: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`kernel_forward` returns, not written yet."""
    B, N, P = chosen.shape
    kept = q.new_empty(B, N, (P + 31) // 32, dtype=torch.int32)
    return tokens_first(q), q.new_empty(q.shape[:3], dtype=torch.float32), kept
