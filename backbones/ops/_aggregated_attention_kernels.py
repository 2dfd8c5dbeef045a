"""Triton kernels of aggregated attention: see ``aggregated_attention`` for the formula.

One makes the vectors that the kernels of neighbourhood attention take, which do the softmax; the others do the sum of
the values of all taps with weights that are outside the softmax, and its gradients.  A program owns ``BLOCK``
neighbouring positions of one head and image and goes through the taps: a few products for each vector that it reads.
Maps are dense ``[B, H, W, h, C]``, weights ``[B, h, K * K, H * W]``, and every sum has a fixed order.

The sizes of a map and the number of heads are run-time numbers: a model compiles each kernel once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._kernels import cdiv, power_of_two
from .backend import HAS_TRITON, on_device

ELEMENTS = 2048  # of the vectors of a program: with 4 warps 16 registers of a thread for each tile of vectors

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type, load_vectors, store_vectors

    # a kernel must not be compiled again because one of these is 1 or divisible by 16
    _COUNTS = ["heads", "rows", "cols"]

    @triton.jit
    def _place(heads, rows, cols, C: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
        """Head, first element of the program's image and head in a map, and in weights of one tap; and positions."""
        tiles = tl.cdiv(rows * cols, BLOCK)
        pid = tl.program_id(0)
        n = pid % tiles * BLOCK + tl.arange(0, BLOCK)
        head, image = pid // tiles % heads, (pid // tiles // heads).to(tl.int64)
        scalar = image * heads + head
        return head, (image * rows * cols * heads + head) * C, scalar * rows * cols, n.to(INDEX)

    @triton.jit
    def _neighbor(n, tap, rows, cols, K: tl.constexpr):
        """Positions of a tap of the positions ``n``, and which of them are on the map."""
        y, x = n // cols + (tap // K - K // 2), n % cols + (tap % K - K // 2)
        return y * cols + x, (y >= 0) & (y < rows) & (x >= 0) & (x < cols) & (n < rows * cols)

    @triton.jit
    def _unit(t, EPS: tl.constexpr):
        """Unit vectors ``[n, CP]``, and the lengths by which they were divided."""
        length = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), EPS)
        return t / length[:, None], length

    @triton.jit(do_not_specialize=_COUNTS)
    def aggregated_vectors_kernel(
        q_ptr,
        kv_ptr,
        embedding_ptr,
        factor_ptr,
        log_lengths_ptr,
        qn_ptr,
        qs_ptr,
        k_ptr,
        v_ptr,
        q_length_ptr,
        k_length_ptr,
        heads,
        rows,
        cols,
        C: tl.constexpr,
        CP: tl.constexpr,
        EPS: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Unit queries, those of the logits, unit keys and values, all in float32."""
        head, vector, _, n = _place(heads, rows, cols, C, INDEX, BLOCK)
        on_map = n < rows * cols
        place, channel = n * (heads * C), tl.arange(0, CP)
        embedding = tl.load(embedding_ptr + head * C + channel, mask=channel < C, other=0.0)
        scale = tl.load(log_lengths_ptr + n, mask=on_map, other=0.0) * tl.load(factor_ptr + head)
        first, lengths = vector // C, n * heads
        qn, length = _unit(load_vectors(q_ptr + vector, place, on_map, C, CP).to(tl.float32), EPS)
        tl.store(q_length_ptr + first + lengths, length, mask=on_map)
        store_vectors(qn_ptr + vector, place, qn, on_map, C, CP)
        store_vectors(qs_ptr + vector, place, (qn + embedding[None, :]) * scale[:, None], on_map, C, CP)
        kv_ptr += 2 * vector - head * C  # keys and values of all heads lie behind each other
        k, length = _unit(load_vectors(kv_ptr, 2 * place, on_map, C, CP).to(tl.float32), EPS)
        tl.store(k_length_ptr + first + lengths, length, mask=on_map)
        store_vectors(k_ptr + vector, place, k, on_map, C, CP)
        store_vectors(v_ptr + vector, place, load_vectors(kv_ptr + heads * C, 2 * place, on_map, C, CP), on_map, C, CP)

    @triton.jit
    def _unit_gradient(grad, unit, length, EPS: tl.constexpr):
        """Gradient of the vectors from that of the unit vectors; shorter ones than ``EPS`` were only multiplied."""
        along = tl.where(length > EPS, tl.sum(grad * unit, 1), 0.0)
        return (grad - along[:, None] * unit) / length[:, None]

    @triton.jit(do_not_specialize=_COUNTS)
    def aggregated_vectors_bwd_kernel(
        dqs_ptr,
        dweights_ptr,
        dk_ptr,
        dv_ptr,
        qn_ptr,
        k_ptr,
        q_length_ptr,
        k_length_ptr,
        embedding_ptr,
        factor_ptr,
        log_lengths_ptr,
        tokens_ptr,
        dq_ptr,
        dkv_ptr,
        dembedding_ptr,
        dfactor_ptr,
        heads,
        rows,
        cols,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        EPS: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradients of queries, keys and values; of embedding and factor one share of each program."""
        head, vector, scalar, n = _place(heads, rows, cols, C, INDEX, BLOCK)
        on_map = n < rows * cols
        place, channel = n * (heads * C), tl.arange(0, CP)
        first, lengths = vector // C, n * heads
        embedding = tl.load(embedding_ptr + head * C + channel, mask=channel < C, other=0.0)
        log_length = tl.load(log_lengths_ptr + n, mask=on_map, other=0.0)
        qn = load_vectors(qn_ptr + vector, place, on_map, C, CP)
        grad = load_vectors(dqs_ptr + vector, place, on_map, C, CP) * log_length[:, None]
        pid = tl.program_id(0).to(tl.int64)
        tl.store(dfactor_ptr + pid, tl.sum(tl.sum(grad * (qn + embedding[None, :]), 1), 0))
        grad *= tl.load(factor_ptr + head)
        tl.store(dembedding_ptr + pid * C + channel, tl.sum(grad, 0), mask=channel < C)
        dweights = dweights_ptr + scalar * (K * K) + n
        tokens = tokens_ptr + head * (K * K * C) + channel
        for _ in range(K * K):
            token = tl.load(tokens, mask=channel < C, other=0.0)
            grad += tl.load(dweights, mask=on_map, other=0.0)[:, None] * token[None, :]
            dweights += rows * cols
            tokens += C
        length = tl.load(q_length_ptr + first + lengths, mask=on_map, other=1.0)
        store_vectors(dq_ptr + vector, place, _unit_gradient(grad, qn, length, EPS), on_map, C, CP)
        dkv_ptr += 2 * vector - head * C
        k, length = (
            load_vectors(k_ptr + vector, place, on_map, C, CP),
            tl.load(k_length_ptr + first + lengths, mask=on_map, other=1.0),
        )
        dk = _unit_gradient(load_vectors(dk_ptr + vector, place, on_map, C, CP), k, length, EPS)
        store_vectors(dkv_ptr, 2 * place, dk, on_map, C, CP)
        dv = load_vectors(dv_ptr + vector, place, on_map, C, CP)
        store_vectors(dkv_ptr + heads * C, 2 * place, dv, on_map, C, CP)

    @triton.jit(do_not_specialize=_COUNTS)
    def aggregated_taps_fwd_kernel(
        weights_ptr,
        v_ptr,
        base_ptr,
        out_ptr,
        heads,
        rows,
        cols,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Add the weighted values of all taps to what the softmax gave."""
        _, vector, scalar, n = _place(heads, rows, cols, C, INDEX, BLOCK)
        on_map = n < rows * cols
        weights = weights_ptr + scalar * (K * K) + n
        acc = load_vectors(base_ptr + vector, n * (heads * C), on_map, C, CP)
        for tap in range(K * K):
            there, inside = _neighbor(n, tap, rows, cols, K)
            w = tl.load(weights, mask=inside, other=0.0)
            acc += w[:, None] * load_vectors(v_ptr + vector, there * (heads * C), inside, C, CP)
            weights += rows * cols
        store_vectors(out_ptr + vector, n * (heads * C), acc, on_map, C, CP)

    @triton.jit(do_not_specialize=_COUNTS)
    def aggregated_taps_bwd_kernel(
        weights_ptr,
        v_ptr,
        dout_ptr,
        dweights_ptr,
        dv_ptr,
        heads,
        rows,
        cols,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Gradient of the weights, and that of the values, added to what the softmax gave.

        A value has its part in the query at a tap by the weight of the opposite tap.
        """
        _, vector, scalar, n = _place(heads, rows, cols, C, INDEX, BLOCK)
        on_map = n < rows * cols
        dweights = dweights_ptr + scalar * (K * K) + n
        opposite = weights_ptr + (scalar + rows * cols) * (K * K)
        dout = load_vectors(dout_ptr + vector, n * (heads * C), on_map, C, CP)
        dv = load_vectors(dv_ptr + vector, n * (heads * C), on_map, C, CP)
        for tap in range(K * K):
            there, inside = _neighbor(n, tap, rows, cols, K)
            v = load_vectors(v_ptr + vector, there * (heads * C), inside, C, CP)
            tl.store(dweights, tl.sum(dout * v, 1), mask=on_map)
            opposite -= rows * cols
            w = tl.load(opposite + there, mask=inside, other=0.0)
            dv += w[:, None] * load_vectors(dout_ptr + vector, there * (heads * C), inside, C, CP)
            dweights += rows * cols
        store_vectors(dv_ptr + vector, n * (heads * C), dv, on_map, C, CP)


def _tile(C: int) -> int:
    """Positions of a program."""
    return max(16, ELEMENTS // power_of_two(C))


def _run(kernel: Any, like: Tensor, index: Any, **others: Any) -> None:
    """One program for each tile of positions of each head and image of a map ``[B, H, W, h, C]``."""
    B, H, W, h, C = like.shape
    sizes = {"heads": h, "rows": H, "cols": W, "C": C, "CP": power_of_two(C), "BLOCK": _tile(C)}
    if like.numel() > 0:
        with on_device(like):
            kernel[(B * h * cdiv(H * W, _tile(C)),)](**sizes, **others, INDEX=index, num_warps=4)


def vectors(
    q: Tensor, kv: Tensor, embedding: Tensor, factor: Tensor, log_lengths: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """What the softmax and the sum of the taps are made of.

    Args:
        q: Queries ``[B, H, W, h, C]``.
        kv: Keys and values ``[B, H, W, 2, h, C]``.
        embedding: Summand of the unit queries ``[h, C]``.
        factor: Scale of each head's logits ``[h]``.
        log_lengths: And of each query's ``[H, W]``.
        eps: Least length by which a vector is divided.

    Returns:
        Unit queries, queries of the logits, unit keys, values, each ``[B, H, W, h, C]``; and the lengths of queries and
        of keys ``[B, H, W, h, 1]``.  All are float32.
    """
    q, kv = q.contiguous(), kv.contiguous()
    names = "qn_ptr", "qs_ptr", "k_ptr", "v_ptr"
    maps = {name: torch.empty_like(q, dtype=torch.float32) for name in names}
    lengths = {name: maps["qn_ptr"].new_empty(*q.shape[:4], 1) for name in ("q_length_ptr", "k_length_ptr")}
    given = {"embedding_ptr": embedding, "factor_ptr": factor, "log_lengths_ptr": log_lengths}
    options: dict[str, Any] = {name: t.contiguous() for name, t in given.items()} | maps | lengths
    _run(aggregated_vectors_kernel, q, index_type(kv), q_ptr=q, kv_ptr=kv, EPS=eps, **options)
    return *maps.values(), *lengths.values()


def vectors_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of what :func:`vectors` takes.

    Args:
        grads: Of the queries of the logits, of the weights of all taps ``[B, h, K * K, H * W]``, of unit keys and of
            values.
        vectors: Unit queries and keys, and the lengths of both.
        parameters: Embedding, factor, logarithms, as :func:`vectors` takes them; and tokens ``[h, K * K, C]``, whose
            products with the unit queries the weights of the taps are.
        eps: As :func:`vectors` takes it.
        dtype: Of the gradients of queries, keys and values.

    Returns:
        Gradients of the queries ``[B, H, W, h, C]``, of keys and values ``[B, H, W, 2, h, C]``, of the embedding
        ``[h, C]`` and of the factor ``[h]``, the last two in float32.
    """
    dqs = grads[0]
    B, H, W, h, C = dqs.shape
    tiles, taps = cdiv(H * W, _tile(C)), parameters[3].shape[1]
    found = {
        "dq_ptr": torch.empty_like(dqs, dtype=dtype),
        "dkv_ptr": dqs.new_empty(B, H, W, 2, h, C, dtype=dtype),
        "dembedding_ptr": dqs.new_empty(B, h, tiles, C),
        "dfactor_ptr": dqs.new_empty(B, h, tiles),
    }
    options: dict[str, Any] = dict(zip(("dqs_ptr", "dweights_ptr", "dk_ptr", "dv_ptr"), grads, strict=True))
    options |= dict(zip(("qn_ptr", "k_ptr", "q_length_ptr", "k_length_ptr"), vectors, strict=True))
    names = "embedding_ptr", "factor_ptr", "log_lengths_ptr", "tokens_ptr"
    options |= {name: t.contiguous() for name, t in zip(names, parameters, strict=True)}
    index = index_type(found["dkv_ptr"], grads[1])
    _run(aggregated_vectors_bwd_kernel, dqs, index, K=math.isqrt(taps), EPS=eps, **options, **found)
    dq, dkv, dembedding, dfactor = found.values()
    return dq, dkv, dembedding.sum((0, 2)), dfactor.sum((0, 2))


def taps_forward(weights: Tensor, v: Tensor, base: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Weighted values of all taps and ``base`` together: ``[B, H, W, h, C]``."""
    out = torch.empty_like(base, dtype=dtype)
    options = {"weights_ptr": weights, "v_ptr": v, "base_ptr": base, "out_ptr": out}
    _run(aggregated_taps_fwd_kernel, v, index_type(v, weights), K=K, **options)
    return out


def taps_backward(dout: Tensor, weights: Tensor, v: Tensor, dv: Tensor, K: int) -> Tensor:
    """Gradient of the weights; that of the values is added to ``dv``."""
    dweights = torch.empty_like(weights)
    options = {"weights_ptr": weights, "v_ptr": v, "dout_ptr": dout, "dweights_ptr": dweights, "dv_ptr": dv}
    _run(aggregated_taps_bwd_kernel, v, index_type(v, weights), K=K, **options)
    return dweights
