"""The two branches of HiLo attention (LITv2, Sec. 3.2), channels-last.

Hi-Fi: ``softmax(q k^T / sqrt(d)) v`` among the ``s * s`` tokens of each non-overlapping window.  Lo-Fi: the same
between every token and the average of each window.  With ``N = H * W`` tokens of width ``D`` per branch, Hi-Fi costs
``2 N s^2 D`` and Lo-Fi ``2 N^2 D / s^2`` multiply-accumulates.

The references store every score.  The fast forms hand strided views of the projections to PyTorch's fused attention,
which stores none of them and needs no copies for Lo-Fi.  Triton kernels read and write the tokens of small Hi-Fi
windows in place.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._derivative import plain_gradients
from .attention import attention, reference_attention
from .backend import KernelModule, use_triton
from .cost import Cost, register_cost, windows_backward_cost, windows_cost
from .operators import operator

kernels = KernelModule("_hilo_kernels")
WINDOWS = (2, 4)  # sides of windows that the kernels take
MAX_CHANNELS = 128  # of a head, for the kernels


def _check_windows(H: int, W: int, window: int) -> None:
    if H % window != 0 or W % window != 0:
        good_h, good_w = (H + window - 1) // window * window, (W + window - 1) // window * window
        raise ValueError(f"got a {H}x{W} map, need multiples of window={window}; pad it to {good_h}x{good_w}")


def _to_windows(qkv: Tensor, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C = qkv.shape
    d = C // (3 * num_heads)
    t = qkv.reshape(B, H // window, window, W // window, window, 3, num_heads, d)
    t = t.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, B, H/s, W/s, h, s, s, d]
    t = t.reshape(3, B * (H // window) * (W // window), num_heads, window * window, d)
    return t[0], t[1], t[2]


def _from_windows(out: Tensor, B: int, H: int, W: int, window: int) -> Tensor:
    num_heads, d = out.shape[1], out.shape[3]
    t = out.reshape(B, H // window, W // window, num_heads, window, window, d)
    return t.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, num_heads * d)


def reference_hifi_attention(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    """Softmax attention inside non-overlapping square windows (LITv2, Sec. 3.2).

    Args:
        qkv: Projected tokens ``[B, H, W, 3 * h * d]``, laid out as ``[3 (q, k, v), h, d]``.
        num_heads: Heads ``h``.
        window: Side ``s`` of a window; ``H`` and ``W`` must be multiples of it.

    Returns:
        ``[B, H, W, h * d]``.

    Raises:
        ValueError: If ``H`` or ``W`` is not a multiple of ``window``.
    """
    B, H, W, C = qkv.shape
    _check_windows(H, W, window)
    q, k, v = _to_windows(qkv, num_heads, window)  # [B*nW, h, s*s, d]
    return _from_windows(reference_attention(q, k, v), B, H, W, window)


@operator
def _hifi_attention(qkv: Tensor, num_heads: int, window: int) -> Tensor:
    return kernels.kernel_forward(qkv, num_heads, window)


@torch.library.register_fake("vizoo::hifi_attention")
def _(qkv, num_heads, window):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@operator
def _hifi_attention_backward(dout: Tensor, qkv: Tensor, num_heads: int, window: int) -> Tensor:
    return kernels.kernel_backward(dout, qkv, num_heads, window)


@torch.library.register_fake("vizoo::hifi_attention_backward")
def _(dout, qkv, num_heads, window):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    qkv, *ctx.arguments = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx, dout):
    (qkv,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        num_heads, window = ctx.arguments
        form = functools.partial(reference_hifi_attention, num_heads=num_heads, window=window)
        return *plain_gradients(form, (qkv,), dout, (True,)), None, None
    return _hifi_attention_backward(dout, qkv, *ctx.arguments), None, None


torch.library.register_autograd("vizoo::hifi_attention", _differentiate, setup_context=_save)


def _head(qkv, num_heads: int) -> tuple[int, ...]:
    return (*qkv[:3], num_heads, qkv[3] // (3 * num_heads))


@register_cost("vizoo::hifi_attention", torch.ops.vizoo.hifi_attention)
def _(qkv, num_heads, window, out=None) -> Cost:
    q = _head(qkv, num_heads)
    return windows_cost(math.prod(q[:4]) * window**2, q, q)


@register_cost("vizoo::hifi_attention_backward", torch.ops.vizoo.hifi_attention_backward)
def _(dout, qkv, num_heads, window, out=None) -> Cost:
    q = _head(qkv, num_heads)
    return windows_backward_cost(math.prod(q[:4]) * window**2, q, q)


def _kernel_limits(qkv: Tensor, num_heads: int, window: int) -> str:
    """What the Triton kernels cannot do with these inputs; empty if nothing."""
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {qkv.dtype}"
    if window not in WINDOWS:
        return f"the kernels take windows of {WINDOWS[0]} and {WINDOWS[1]}, not {window}"
    d = qkv.shape[3] // (3 * num_heads)
    return f"the kernels take up to {MAX_CHANNELS} channels per head, not {d}" if d > MAX_CHANNELS else ""


def hifi_attention(qkv: Tensor, num_heads: int, window: int, backend: str = "auto") -> Tensor:
    """:func:`reference_hifi_attention` by fused attention or kernels: same result and errors.

    Args:
        qkv: Projected tokens ``[B, H, W, 3 * h * d]``, laid out as ``[3 (q, k, v), h, d]``.
        num_heads: Heads ``h``.
        window: Side ``s`` of a window; ``H`` and ``W`` must be multiples of it.
        backend: ``"torch"``, ``"triton"`` (no float64, windows of 2 and 4, ``d <= 128``), or ``"auto"``: Triton where
            it can run.

    Returns:
        ``[B, H, W, h * d]``.

    Raises:
        ValueError: If ``H`` or ``W`` is not a multiple of ``window``, or ``backend`` cannot run.
    """
    B, H, W, C = qkv.shape
    _check_windows(H, W, window)
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if use_triton(backend, qkv, _kernel_limits(qkv, num_heads, window)):
            return _hifi_attention(qkv, num_heads, window)
    q, k, v = _to_windows(qkv, num_heads, window)
    return _from_windows(attention(q, k, v), B, H, W, window)


def _lofi_heads(q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, C = q.shape[0], q.shape[-1]
    d = C // num_heads
    if kv.shape[-1] != 2 * C:
        raise ValueError(f"got kv with {kv.shape[-1]} channels, need 2 * {C}, twice those of q")
    heads = q.reshape(B, q.shape[1] * q.shape[2], num_heads, d).transpose(1, 2)  # [B, h, N, d]
    pairs = kv.reshape(B, kv.shape[1] * kv.shape[2], 2, num_heads, d)
    return heads, pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2)


def reference_lofi_attention(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of every token over the pooled tokens (LITv2, Sec. 3.2).

    Args:
        q: Queries ``[B, H, W, h * d]``, laid out as ``[h, d]``.
        kv: Keys and values of the pooled map ``[B, H / s, W / s, 2 * h * d]``, laid out as ``[2 (k, v), h, d]``.
        num_heads: Heads ``h``.

    Returns:
        ``[B, H, W, h * d]``.

    Raises:
        ValueError: If ``kv`` has not twice the channels of ``q``.
    """
    heads, k, v = _lofi_heads(q, kv, num_heads)
    return reference_attention(heads, k, v).transpose(1, 2).reshape(q.shape)


def lofi_attention(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """:func:`reference_lofi_attention` by fused attention: same arguments, result and errors."""
    heads, k, v = _lofi_heads(q, kv, num_heads)
    return attention(heads, k, v).transpose(1, 2).reshape(q.shape)
