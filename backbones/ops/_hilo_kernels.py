"""Triton kernels of Hi-Fi attention on tiny windows: see ``hilo.py`` for the formula.

A window of 2x2 tokens would leave most of a fused attention's tile empty.  Here a tile holds the tokens of many windows
of an image, read in place and in the order of windows; products of all with all cost nothing beside the reading, and
those of different windows are masked.  No window reaches past a tile, so nothing is kept for the backward pass, and
each gradient has one term.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._kernels import gradient_scale, power_of_two, product_precision
from .backend import HAS_TRITON, on_device

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import LOG2E, index_type, load_gradient_scale, load_vectors, store_vectors

    def _jit(function):
        # 1 or a multiple of 16 is no reason to compile
        return triton.jit(function, do_not_specialize=["heads", "H", "W", "tiles"])

    @triton.jit
    def _tokens(heads, H, W, tiles, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
        """Image (int64), head, places in the map and which exist, and which pairs share a window, of a program."""
        pid = tl.program_id(0)
        head, rest = pid % heads, pid // heads
        i = tl.arange(0, BLOCK)
        own = i // (WINDOW * WINDOW)
        window, across = rest % tiles * (BLOCK // (WINDOW * WINDOW)) + own, W // WINDOW
        y = window // across * WINDOW + i // WINDOW % WINDOW
        x = window % across * WINDOW + i % WINDOW
        return (rest // tiles).to(tl.int64), head, y, x, window < H // WINDOW * across, own[:, None] == own[None, :]

    @triton.jit
    def _weights(q, k, same, scale, PRECISION: tl.constexpr):
        """Softmax ``[tokens, tokens]`` over the keys of a token's window, and its denominators, still to divide by."""
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(same, s * (scale * LOG2E), float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        return p, tl.sum(p, 1)

    @_jit
    def hifi_fwd_kernel(
        qkv_ptr,
        out_ptr,
        scale,
        heads,
        H,
        W,
        tiles,
        stride_b,
        stride_y,
        stride_x,
        D: tl.constexpr,
        DP: tl.constexpr,
        WINDOW: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b, head, y, x, ok, same = _tokens(heads, H, W, tiles, WINDOW, BLOCK)
        qkv_ptr += b * stride_b + head * D
        at = y.to(INDEX) * stride_y + x.to(INDEX) * stride_x
        q = load_vectors(qkv_ptr, at, ok, D, DP)
        k = load_vectors(qkv_ptr + heads * D, at, ok, D, DP)
        v = load_vectors(qkv_ptr + 2 * heads * D, at, ok, D, DP)
        p, total = _weights(q, k, same, scale, PRECISION)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        at = (y * W + x).to(INDEX) * (heads * D)
        store_vectors(out_ptr + (b * H * W * (heads * D) + head * D), at, out, ok, D, DP)

    @_jit
    def hifi_bwd_kernel(
        qkv_ptr,
        dout_ptr,
        dqkv_ptr,
        grow_ptr,
        scale,
        heads,
        H,
        W,
        tiles,
        stride_b,
        stride_y,
        stride_x,
        D: tl.constexpr,
        DP: tl.constexpr,
        WINDOW: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b, head, y, x, ok, same = _tokens(heads, H, W, tiles, WINDOW, BLOCK)
        qkv_ptr += b * stride_b + head * D
        at = y.to(INDEX) * stride_y + x.to(INDEX) * stride_x
        q = load_vectors(qkv_ptr, at, ok, D, DP)
        k = load_vectors(qkv_ptr + heads * D, at, ok, D, DP)
        v = load_vectors(qkv_ptr + 2 * heads * D, at, ok, D, DP)
        place = (y * W + x).to(INDEX) * (heads * D)
        first = b * H * W * (heads * D)
        dout = load_vectors(dout_ptr + (first + head * D), place, ok, D, DP)
        dqkv_ptr += 3 * first + head * D
        p, total = _weights(q, k, same, scale, PRECISION)
        p = p / total[:, None]
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision=PRECISION)
        store_vectors(dqkv_ptr + 2 * heads * D, 3 * place, dv, ok, D, DP)
        ds = p * tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds -= p * tl.sum(ds, 1)[:, None]
        grow = load_gradient_scale(grow_ptr, q.dtype)
        shrink = 1 / grow
        ds = (ds * (scale * grow)).to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * shrink
        store_vectors(dqkv_ptr, 3 * place, dq, ok, D, DP)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * shrink
        store_vectors(dqkv_ptr + heads * D, 3 * place, dk, ok, D, DP)


# tokens of a tile by compute capability and bytes of an element, with a warp for every 32 channels: chosen by the
# machine code for 9.0 (no spill, then the fewest instructions times warps), not by measured times
CHOICES = {90: {2: 32, 4: 16}}


def _launch(kernel, qkv: Tensor, num_heads: int, window: int, out: Tensor, **arguments: Any) -> None:
    B, H, W, C = qkv.shape
    d = C // (3 * num_heads)
    block = CHOICES[90][qkv.element_size()]  # other devices take the same until something is measured there
    tiles = -(-(H // window) * (W // window) * window**2 // block)
    with on_device(qkv):
        kernel[(B * tiles * num_heads,)](
            qkv_ptr=qkv,
            scale=d**-0.5,
            heads=num_heads,
            H=H,
            W=W,
            tiles=tiles,
            **{f"stride_{axis}": qkv.stride(i) for i, axis in enumerate("byx")},
            D=d,
            DP=power_of_two(d),
            WINDOW=window,
            # three parts in TF32 take as many instructions as float32 products on such small tiles, and spill
            PRECISION="tf32" if product_precision(qkv.device) == "tf32" else "ieee",
            INDEX=index_type(qkv, out),
            BLOCK=block,
            num_warps=max(1, power_of_two(d) // 32),
            **arguments,
        )


def _dense_channels(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride(3) == 1 else qkv.contiguous()


def kernel_forward(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """``[B, H, W, h * d]``."""
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    if out.numel() > 0:
        _launch(hifi_fwd_kernel, _dense_channels(qkv), num_heads, window, out, out_ptr=out)
    return out


def kernel_backward(dout: Tensor, qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """Gradient of ``qkv``."""
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() > 0:
        dout, qkv = dout.contiguous(), _dense_channels(qkv)
        arguments = {"dout_ptr": dout, "dqkv_ptr": dqkv, "grow_ptr": gradient_scale(dout)}
        _launch(hifi_bwd_kernel, qkv, num_heads, window, dqkv, **arguments)
    return dqkv
