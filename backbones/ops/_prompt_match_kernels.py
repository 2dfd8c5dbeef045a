"""Triton kernel of the choice of prompts: see ``prompt_match.py`` for what it finds."""

from __future__ import annotations

import torch
from torch import Tensor

from ._kernels import cdiv, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["B", "N", "prefix", "cls_pool", "cls_topk", "cls_length", "pool", "topk", "length"])
    def _prompt_match_kernel(
        x_ptr,
        cls_keys_ptr,
        keys_ptr,
        chosen_ptr,
        loss_ptr,
        B,
        N,
        prefix,
        cls_pool,
        cls_topk,
        cls_length,
        pool,
        topk,
        length,
        stride_xb,
        stride_xn,
        D: tl.constexpr,
        KP: tl.constexpr,
        OTHERS: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Choice of a tile of prefix tokens, or of patch tokens, of all images; and its share of the matching loss."""
        program, programs = tl.program_id(0), tl.cdiv(B * prefix, BLOCK_I)
        cls_columns, columns = cls_pool * cls_length, pool * length
        is_prefix = program < programs
        program -= tl.where(is_prefix, 0, programs)
        start, tokens = tl.where(is_prefix, 0, prefix), tl.where(is_prefix, prefix, N - prefix)
        first, others = tl.where(is_prefix, 0, cls_columns), tl.where(is_prefix, columns, cls_columns)
        keys_ptr = tl.where(is_prefix, cls_keys_ptr, keys_ptr)
        pool, topk = tl.where(is_prefix, cls_pool, pool), tl.where(is_prefix, cls_topk, topk)
        length = tl.where(is_prefix, cls_length, length)
        r, j, d = program * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, KP), tl.arange(0, BLOCK_D)
        seen = r < B * tokens
        image, token = (r // tokens).to(tl.int64), start + r % tokens
        x_row = x_ptr + (image * stride_xb + token.to(tl.int64) * stride_xn)[:, None]
        key_row = keys_ptr + (j * D)[:, None]
        cosine = tl.zeros((BLOCK_I, KP), tl.float32)
        norm, key_norm = tl.zeros((BLOCK_I,), tl.float32), tl.zeros((KP,), tl.float32)
        for c in range(0, D, BLOCK_D):
            inside = (c + d < D)[None, :]
            x = tl.load(x_row + (c + d)[None, :], mask=seen[:, None] & inside, other=0.0)
            key = tl.load(key_row + (c + d)[None, :], mask=(j < pool)[:, None] & inside, other=0.0)
            cosine = tl.dot(x, tl.trans(key), cosine, input_precision=PRECISION)
            norm += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            key_norm += tl.sum(key.to(tl.float32) * key.to(tl.float32), 1)
        cosine = cosine / tl.maximum(tl.sqrt(key_norm), 1e-12)[None, :] / tl.maximum(tl.sqrt(norm), 1e-12)[:, None]
        left = tl.where((j < pool)[None, :], cosine, float("-inf"))
        total = tl.zeros((BLOCK_I,), tl.float32)
        for _ in range(0, topk):
            value, at = tl.max(left, 1, return_indices=True)
            total += value
            left = tl.where(j[None, :] == at[:, None], float("-inf"), left)
        place = chosen_ptr + ((image * N + token) * (cls_columns + columns))[:, None]
        for i in range(0, length):
            own = place + (first + j * length + i)[None, :]
            tl.store(own, left == float("-inf"), mask=seen[:, None] & (j < pool)[None, :])
        o = tl.arange(0, OTHERS)
        none = tl.zeros((BLOCK_I, OTHERS), tl.int1)
        tl.store(place + (cls_columns - first + o)[None, :], none, mask=seen[:, None] & (o < others)[None, :])
        share = tl.sum(tl.where(seen, topk - total, 0.0)) / (B.to(tl.float32) * tokens * topk)
        tl.store(loss_ptr + tl.program_id(0), share)


# By compute capability: tokens and channels at a time, warps and stages; from the machine code for sm_90 (no spill,
# enough programs for every multiprocessor), not from measured times
CHOICES = {90: (64, 32, 4, 3)}


def kernel_forward(
    x: Tensor, prefix: int, cls_keys: Tensor, cls_topk: int, cls_length: int, keys: Tensor, topk: int, length: int
) -> tuple[Tensor, Tensor]:
    """What each token takes ``[B, N, P]``, and the matching loss."""
    B, N, D = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    tokens, channels, num_warps, num_stages = CHOICES[90]  # other capabilities take the same
    programs = cdiv(B * prefix, tokens) + cdiv(B * (N - prefix), tokens)
    cls_columns, columns = cls_keys.shape[0] * cls_length, keys.shape[0] * length
    chosen = torch.empty(B, N, cls_columns + columns, dtype=torch.bool, device=x.device)
    loss = torch.empty(programs, dtype=torch.float32, device=x.device)
    with on_device(x):
        _prompt_match_kernel[(programs,)](
            x,
            cls_keys.contiguous(),
            keys.contiguous(),
            chosen,
            loss,
            B,
            N,
            prefix,
            cls_keys.shape[0],
            cls_topk,
            cls_length,
            keys.shape[0],
            topk,
            length,
            x.stride(0),
            x.stride(1),
            D=D,
            KP=power_of_two(max(cls_keys.shape[0], keys.shape[0])),
            OTHERS=power_of_two(max(cls_columns, columns)),
            PRECISION=product_precision(x.device),
            BLOCK_I=tokens,
            BLOCK_D=channels,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return chosen, loss.sum()
