"""Triton kernels of aggregated attention: see ``aggregated_attention`` for the formula.

They do the sum of the values of all taps with weights that are outside the softmax, and its gradients; the softmax is
done by the kernels of neighbourhood attention.  A program owns ``BLOCK`` neighbouring positions of one head and image
and goes through the taps: a few products for each vector that it reads.  Maps are dense ``[B, H, W, h, C]``, weights
``[B, h, K * K, H * W]``, and every sum has a fixed order.

The sizes of a map and the number of heads are run-time numbers: a model compiles each kernel once.
"""

from __future__ import annotations

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
        """First element of the program's image and head in a map, and in weights of one tap; and its positions."""
        tiles = tl.cdiv(rows * cols, BLOCK)
        pid = tl.program_id(0)
        n = pid % tiles * BLOCK + tl.arange(0, BLOCK)
        head, image = pid // tiles % heads, (pid // tiles // heads).to(tl.int64)
        scalar = image * heads + head
        return (image * rows * cols * heads + head) * C, scalar * rows * cols, n.to(INDEX)

    @triton.jit
    def _neighbor(n, tap, rows, cols, K: tl.constexpr):
        """Positions of a tap of the positions ``n``, and which of them are on the map."""
        y, x = n // cols + (tap // K - K // 2), n % cols + (tap % K - K // 2)
        return y * cols + x, (y >= 0) & (y < rows) & (x >= 0) & (x < cols) & (n < rows * cols)

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
        vector, scalar, n = _place(heads, rows, cols, C, INDEX, BLOCK)
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
        vector, scalar, n = _place(heads, rows, cols, C, INDEX, BLOCK)
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


def _run(kernel: Any, v: Tensor, weights: Tensor, K: int, **pointers: Tensor) -> None:
    """One program for each tile of positions of each head and image."""
    B, H, W, h, C = v.shape
    CP = power_of_two(C)
    BLOCK = max(16, ELEMENTS // CP)
    sizes = {"heads": h, "rows": H, "cols": W, "K": K, "C": C, "CP": CP, "BLOCK": BLOCK}
    if v.numel() > 0:
        with on_device(v):
            kernel[(B * h * cdiv(H * W, BLOCK),)](
                weights_ptr=weights, v_ptr=v, INDEX=index_type(v, weights), num_warps=4, **sizes, **pointers
            )


def taps_forward(weights: Tensor, v: Tensor, base: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Weighted values of all taps and ``base`` together: ``[B, H, W, h, C]``."""
    out = torch.empty_like(base, dtype=dtype)
    _run(aggregated_taps_fwd_kernel, v, weights, K, base_ptr=base, out_ptr=out)
    return out


def taps_backward(dout: Tensor, weights: Tensor, v: Tensor, dv: Tensor, K: int) -> Tensor:
    """Gradient of the weights; that of the values is added to ``dv``."""
    dweights = torch.empty_like(weights)
    _run(aggregated_taps_bwd_kernel, v, weights, K, dout_ptr=dout, dweights_ptr=dweights, dv_ptr=dv)
    return dweights
