"""Depthwise convolution with a large kernel: every channel has its own, and zeros around keep the map's size.

    out[c, y, x] = bias[c] + sum over i, j of weight[c, i, j] * in[c, y + d * (i - K // 2), x + d * (j - K // 2)]

for odd ``K`` and dilation ``d``: ``B * C * H * W * K^2`` multiply-accumulates.

The reference is PyTorch's own convolution.  On a GPU, for channels first, cuDNN has kernels for undilated 3x3 and 5x5
ones only; all others go to a native kernel that takes every product one by one, with its own loads and tests of the
border.  The Triton kernels make products of matrices instead, about twice as many multiplications, but for tensor
cores: see ``_depthwise_kernels.py``.  They add up in a fixed order, and keep the memory format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import empty_map
from .backend import KernelModule, autocast_dtype, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_depthwise_kernels")
MAX_REACH = 15  # columns left and right of a column that its result depends on


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"got x {list(x.shape)}, need [B, C, H, W]")
    C, K = x.shape[1], weight.shape[-1]
    if list(weight.shape) != [C, 1, K, K] or K % 2 == 0:
        raise ValueError(f"got weight {list(weight.shape)} for x {list(x.shape)}, need [{C}, 1, K, K] with an odd K")
    if bias is not None and list(bias.shape) != [C]:
        raise ValueError(f"got bias {list(bias.shape)}, need [{C}]")
    if dilation < 1:
        raise ValueError(f"got dilation={dilation}, need at least 1")


def _plain_form(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[2] // 2)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=padding, dilation=dilation, groups=x.shape[1])


def reference_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Depthwise convolution with stride 1 that keeps the map's size, in the dtype of ``x`` or that of autocast.

    Args:
        x: Map ``[B, C, H, W]``.
        weight: Kernels ``[C, 1, K, K]``, odd ``K``.
        bias: ``[C]``, or None.
        dilation: Distance of neighbouring taps.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: If the shapes do not fit each other, ``K`` is even, or ``dilation`` below 1.
    """
    _check(x, weight, bias, dilation)
    return _plain_form(x, weight, bias, dilation)


@operator
def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return kernels.kernel_forward(x, weight, bias, dilation)


@torch.library.register_fake("vizoo::depthwise_conv")
def _(x, weight, bias, dilation):
    return empty_map(x)


@operator
def _depthwise_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, empty where they are not needed."""
    dx = kernels.kernel_forward(dout, weight, None, dilation, flip=True) if need_x else x.new_empty(0)
    if not need_weight:
        return dx, weight.new_empty(0)
    return dx, kernels.kernel_weight_gradient(dout, x, weight.shape[2], dilation).to(weight.dtype)


@torch.library.register_fake("vizoo::depthwise_conv_backward")
def _(dout, x, weight, dilation, need_x, need_weight):
    dx = empty_map(dout) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, dout):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    dbias = dout.sum((0, 2, 3), dtype=ctx.bias_dtype) if need_bias else None
    if torch.is_grad_enabled():  # create_graph=True
        with without_autocast(x):
            found = plain_gradients(
                lambda x, weight: _plain_form(x, weight, None, ctx.dilation), (x, weight), dout, (need_x, need_weight)
            )
        return *found, dbias, None
    dx, dweight = _depthwise_conv_backward(dout, x, weight, ctx.dilation, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, dbias, None


torch.library.register_autograd("vizoo::depthwise_conv", _differentiate, setup_context=_save)


@register_cost("vizoo::depthwise_conv", torch.ops.vizoo.depthwise_conv)
def _(x, weight, bias, dilation, out=None) -> Cost:
    elements = x[0] * x[1] * x[2] * x[3]
    return Cost(macs=elements * weight[2] ** 2, other=0 if bias is None else elements)


@register_cost("vizoo::depthwise_conv_backward", torch.ops.vizoo.depthwise_conv_backward)
def _(dout, x, weight, dilation, need_x, need_weight, out=None) -> Cost:
    return Cost(macs=x[0] * x[1] * x[2] * x[3] * weight[2] ** 2 * (need_x + need_weight))


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str = "auto"
) -> Tensor:
    """:func:`reference_depthwise_conv` by Triton kernels on a GPU: same result and errors.

    Args:
        x: Map ``[B, C, H, W]``.
        weight: Kernels ``[C, 1, K, K]``, odd ``K``; one wider than ``x`` is rounded, its gradient is not.
        bias: ``[C]``, or None.
        dilation: Distance of neighbouring taps.
        backend: ``"torch"``; ``"triton"`` (no float64, taps up to 15 pixels from the centre); or ``"auto"``: Triton
            where it can run, but for undilated kernels up to 5x5, which cuDNN has.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: If the shapes do not fit each other, an argument is outside its range, or ``backend`` cannot run.
    """
    _check(x, weight, bias, dilation)
    if backend == "auto" and dilation == 1 and weight.shape[2] <= 5:
        backend = "torch"
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)  # as a convolution
    if use_triton(backend, x, _kernel_limits(x, weight.shape[2], dilation)):
        return _depthwise_conv(x, weight, bias, dilation)
    return _plain_form(x, weight, bias, dilation)


def _kernel_limits(x: Tensor, kernel_size: int, dilation: int) -> str:
    """What the kernels cannot do with this map and kernel; empty if nothing."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    reach = dilation * (kernel_size // 2)
    if reach > MAX_REACH:
        return f"the kernels reach up to {MAX_REACH} pixels from the centre, not {reach}"
    return ""
