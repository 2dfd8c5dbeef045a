"""Depthwise convolution with a large kernel: every channel has its own, and zeros around keep the map's size.

    out[c, y, x] = bias[c] + sum over i, j of weight[c, i, j] * in[c, y + d * (i - K // 2), x + d * (j - K // 2)]

for odd ``K`` and dilation ``d``: ``B * C * H * W * K^2`` multiply-accumulates.

The reference is PyTorch's own convolution.  On a GPU, for channels first, cuDNN has kernels for undilated 3x3 and 5x5
ones only; all others go to a native kernel that takes every product one by one, with its own loads and tests of the
border.  The Triton kernels make products of matrices instead, about twice as many multiplications, but for tensor
cores: see ``_depthwise_kernels.py``.  They add up in a fixed order, and keep the memory format.

On a CPU oneDNN is fast, but not at dilated kernels that reach far, nor at gradients of weights above 3x3.  So training
asks it for what it is fast at, without a multiplication more.  Positions whose row and column have the same remainders
by the dilation see only each other, so that a dilated convolution is a dense one of ``d^2`` smaller maps.  The gradient
of ``x`` is the convolution with the flipped kernel, and the other way round, whichever oneDNN has the better kernel
for.  That of weights above 3x3 is, for each image, the convolution of ``x`` with the output's gradient as a kernel as
large as the map, at every ``d``-th place, in bands of rows:

    dweight[c, i, j] = sum over y, x of dout[c, y, x] * in[c, y + d * (i - K // 2), x + d * (j - K // 2)]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import cdiv, empty_map, memory_format
from .backend import KernelModule, autocast_dtype, has_avx512, trains_by_onednn, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_depthwise_kernels")
MAX_REACH = 15  # columns left and right of a column that its result depends on, for the Triton kernels
_DILATED_REACH = 4  # the same of dilated kernels, for which oneDNN has a fast one with AVX2
_LONG_ROW = 32  # columns from which oneDNN's gradient of a map is the faster convolution
_TERMS = 320  # of one sum of a weight's gradient, about as many as in blocks of a matrix product


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


def _convolution_gradients(dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> list[Tensor]:
    """Gradients of ``x`` and ``weight`` of an undilated convolution, as oneDNN has them."""
    padding, needed = [weight.shape[2] // 2] * 2, [need_x, need_weight, False]
    return torch.ops.aten.convolution_backward(
        dout, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], needed
    )


def has_long_rows(x: Tensor, kernel_size: int) -> bool:
    """Whether an undilated convolution of float32 is faster as the operator ``depthwise_conv``, also in inference.

    Measured with AVX2 alone, on maps of 7 to 304 columns: 1.1 to 1.9 times as fast.
    """
    return kernel_size > 3 and x.shape[3] >= _LONG_ROW and x.dtype == torch.float32 and not has_avx512()


def _dense_form(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Undilated convolution of a channels-last map, where rows are long as the gradient of one with the flipped kernel.

    It is the same sum, for which oneDNN has the better kernel there: 1.2 to 1.6 times as fast at 56 columns.
    """
    if not has_long_rows(x, weight.shape[2]):
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=x.shape[1])
    out = _convolution_gradients(x, x, weight.flip(2, 3), True, False)[0]
    return out if bias is None else out.add_(bias.reshape(-1, 1, 1))


def _to_phases(x: Tensor, d: int) -> Tensor:
    """Channels-last ``[B, C, H, W]`` to ``[d * d * B, C, H / d, W / d]``, rounded up by zeros."""
    B, C, H, W = x.shape
    h, w = cdiv(H, d), cdiv(W, d)
    y = F.pad(x.permute(0, 2, 3, 1), [0, 0, 0, w * d - W, 0, h * d - H])
    y = y.reshape(B, h, d, w, d, C).permute(2, 4, 0, 1, 3, 5).reshape(d * d * B, h, w, C)
    return y.permute(0, 3, 1, 2)


def _from_phases(y: Tensor, d: int, H: int, W: int) -> Tensor:
    """Inverse of :func:`_to_phases`."""
    h, w, C = y.shape[2], y.shape[3], y.shape[1]
    y = y.permute(0, 2, 3, 1).reshape(d, d, -1, h, w, C).permute(2, 3, 0, 4, 1, 5).reshape(-1, h * d, w * d, C)
    return y[:, :H, :W].permute(0, 3, 1, 2)


def _phases_form(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Channels-last, in the memory format of ``x``; dilated kernels that reach far on the phases of the map."""
    H, W = x.shape[2:]
    d, half = dilation, weight.shape[2] // 2
    y = x.contiguous(memory_format=torch.channels_last)
    if d == 1:
        y = _dense_form(y, weight, bias)
    elif d * half <= _DILATED_REACH:
        y = F.conv2d(y, weight, bias, padding=d * half, dilation=d, groups=x.shape[1])
    else:
        y = _from_phases(_dense_form(_to_phases(y, d), weight, bias), d, H, W)
    return y.contiguous(memory_format=memory_format(x))


def _weight_gradient(dout: Tensor, x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """``[C, 1, K, K]``, in bands of rows: all images at once would be a copy, and long sums in float32 less exact."""
    (B, C, H, W), reach = x.shape, dilation * (kernel_size // 2)
    total = x.new_zeros(1, C, kernel_size, kernel_size)
    rows = cdiv(H, cdiv(H * W, _TERMS))
    y = x.contiguous(memory_format=torch.channels_last)
    y = F.pad(y.permute(0, 2, 3, 1), [0, 0, 0, 0, reach, reach]).permute(0, 3, 1, 2)
    for b in range(B):
        for i in range(0, H, rows):
            grad = dout[b, :, i : i + rows].unsqueeze(1)  # [C, 1, rows, W]
            band = y[b : b + 1, :, i : i + grad.shape[2] + 2 * reach]
            total += F.conv2d(band, grad, stride=dilation, padding=(0, reach), groups=C)
    return total.transpose(0, 1)


@operator
def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, triton_kernel: bool) -> Tensor:
    if triton_kernel:
        return kernels.kernel_forward(x, weight, bias, dilation)
    with without_autocast(x):
        return _phases_form(x, weight, bias, dilation)


@torch.library.register_fake("vizoo::depthwise_conv")
def _(x, weight, bias, dilation, triton_kernel):
    return empty_map(x)


@operator
def _depthwise_conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, dilation: int, need_x: bool, need_weight: bool, triton_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, empty where they are not needed."""
    dx, dweight, K = x.new_empty(0), weight.new_empty(0), weight.shape[2]
    if triton_kernel:
        if need_x:
            dx = kernels.kernel_forward(dout, weight, None, dilation, flip=True)
        if need_weight:
            dweight = kernels.kernel_weight_gradient(dout, x, K, dilation).to(weight.dtype)
        return dx, dweight
    with without_autocast(x):
        small = need_weight and K == 3  # the one kernel whose gradient oneDNN computes fast, if it is not dilated
        shared = small and dilation > _DILATED_REACH  # both gradients on the phases
        if small:
            grad, y = (_to_phases(t.contiguous(memory_format=torch.channels_last), dilation) for t in (dout, x))
            found, dweight, _ = _convolution_gradients(grad, y, weight, need_x and shared, True)
            if need_x and shared:
                dx = _from_phases(found, dilation, *x.shape[2:]).contiguous(memory_format=memory_format(dout))
        elif need_weight:
            dweight = _weight_gradient(dout, x, K, dilation)
        if need_x and not shared:
            dx = _phases_form(dout, weight.flip(2, 3), None, dilation)
    return dx, dweight.contiguous()


@torch.library.register_fake("vizoo::depthwise_conv_backward")
def _(dout, x, weight, dilation, need_x, need_weight, triton_kernel):
    dx = empty_map(dout) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.dilation, ctx.triton_kernel = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, dout):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    dbias = dout.sum((0, 2, 3), dtype=ctx.bias_dtype) if need_bias else None
    if torch.is_grad_enabled():  # create_graph=True
        with without_autocast(x):
            found = plain_gradients(
                lambda x, weight: _plain_form(x, weight, None, ctx.dilation), (x, weight), dout, (need_x, need_weight)
            )
        return *found, dbias, None, None
    dx, dweight = _depthwise_conv_backward(dout, x, weight, ctx.dilation, need_x, need_weight, ctx.triton_kernel)
    return dx if need_x else None, dweight if need_weight else None, dbias, None, None


torch.library.register_autograd("vizoo::depthwise_conv", _differentiate, setup_context=_save)


@register_cost("vizoo::depthwise_conv", torch.ops.vizoo.depthwise_conv)
def _(x, weight, bias, dilation, triton_kernel, out=None) -> Cost:
    elements = x[0] * x[1] * x[2] * x[3]
    return Cost(macs=elements * weight[2] ** 2, other=0 if bias is None else elements)


@register_cost("vizoo::depthwise_conv_backward", torch.ops.vizoo.depthwise_conv_backward)
def _(dout, x, weight, dilation, need_x, need_weight, triton_kernel, out=None) -> Cost:
    return Cost(macs=x[0] * x[1] * x[2] * x[3] * weight[2] ** 2 * (need_x + need_weight))


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str = "auto"
) -> Tensor:
    """:func:`reference_depthwise_conv` by Triton kernels on a GPU, and by oneDNN's best in training on a CPU.

    Result and errors are the same.

    Args:
        x: Map ``[B, C, H, W]``.
        weight: Kernels ``[C, 1, K, K]``, odd ``K``; one wider than ``x`` is rounded, its gradient is not.
        bias: ``[C]``, or None.
        dilation: Distance of neighbouring taps.
        backend: ``"torch"``; ``"triton"`` (no float64, taps up to 15 pixels from the centre); or ``"auto"``: Triton
            where it can run, but for undilated kernels up to 5x5, which cuDNN has; and on a CPU, while gradients are
            recorded in float32, what oneDNN is fast at, but for undilated 3x3 kernels.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: If the shapes do not fit each other, an argument is outside its range, or ``backend`` cannot run.
    """
    _check(x, weight, bias, dilation)
    trains = backend == "auto" and torch.is_grad_enabled() and (dilation > 1 or weight.shape[2] > 3)
    if backend == "auto" and dilation == 1 and weight.shape[2] <= 5:
        backend = "torch"
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)  # as a convolution
    if use_triton(backend, x, _kernel_limits(x, weight.shape[2], dilation)):
        return _depthwise_conv(x, weight, bias, dilation, True)
    if trains and trains_by_onednn(x) and weight.dtype == x.dtype:
        return _depthwise_conv(x, weight, bias, dilation, False)
    return _plain_form(x, weight, bias, dilation)


def _kernel_limits(x: Tensor, kernel_size: int, dilation: int) -> str:
    """What the kernels cannot do with this map and kernel; empty if nothing."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    reach = dilation * (kernel_size // 2)
    if reach > MAX_REACH:
        return f"the kernels reach up to {MAX_REACH} pixels from the centre, not {reach}"
    return ""
