"""Depthwise 3x3 convolution together with what comes after it: residual and GELU.

    y = act(conv(x, weight) + bias [+ x])         zero-padded, act: identity or the exact GELU

A convolution with 9 multiply-accumulates an element is bound by the bytes that it moves, and so is all that follows.
PyTorch's operators move the map once more for a residual and for GELU; the Triton kernels read it once and write once,
and on a CPU oneDNN applies GELU while it writes.

With ``g = dy * act'(conv(x, weight) + bias [+ x])`` the gradients are sums over the same 3x3 neighbourhoods:

    dx[p] = sum over taps k of weight[-k] * g[p + k]  [+ g[p]]
    dweight[k] = sum over p of x[p + k] * g[p] = sum over p of x[p] * g[p - k],  dbias = sum over p of g[p]
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import empty_map
from .backend import KernelModule, autocast_dtype, use_compiled_onednn, use_onednn, use_triton, without_autocast
from .convolution import convolution
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_depthwise3x3_kernels")
MAX_SIZE = 65535  # of batch and channels: as many programs as the second and third axis of a launch can have


def reference_depthwise3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: bool = False, gelu: bool = False
) -> Tensor:
    """Depthwise 3x3 convolution, its input added to the result, and GELU, one after the other.

    Args:
        x: Map ``[B, C, H, W]``.
        weight: ``[C, 1, 3, 3]``.
        bias: ``[C]`` or None.
        residual: Whether to add ``x``.
        gelu: Whether to apply GELU at last.

    Returns:
        ``[B, C, H, W]``.
    """
    return _finish(F.conv2d(x, weight, bias, padding=1, groups=weight.shape[0]), x, residual, gelu)


def _finish(y: Tensor, x: Tensor, residual: bool, gelu: bool) -> Tensor:
    y = x + y if residual else y
    return F.gelu(y) if gelu else y


def _plain_form(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool) -> Tensor:
    """In the dtype of the map, whatever that of the weight."""
    return reference_depthwise3x3(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), residual, gelu)


@operator
def _depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool) -> Tensor:
    return kernels.kernel_forward(x, weight, bias, residual, gelu)


@torch.library.register_fake("vizoo::depthwise3x3")
def _(x, weight, bias, residual, gelu):
    return empty_map(x)


@operator
def _depthwise3x3_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.kernel_backward(dy, x, weight, bias, residual, gelu)


@torch.library.register_fake("vizoo::depthwise3x3_backward")
def _(dy, x, weight, bias, residual, gelu):
    return empty_map(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.residual, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        form = partial(_plain_form, residual=ctx.residual, gelu=ctx.gelu)
        with without_autocast(dy):
            return *plain_gradients(form, (x, weight, bias), dy, ctx.needs_input_grad[:3]), None, None
    dx, dweight, dbias = _depthwise3x3_backward(dy, x, weight, bias, ctx.residual, ctx.gelu)
    return dx, dweight, None if bias is None else dbias, None, None


torch.library.register_autograd("vizoo::depthwise3x3", _differentiate, setup_context=_save)


@register_cost("vizoo::depthwise3x3", torch.ops.vizoo.depthwise3x3)
def _(x, weight, bias, residual, gelu, out=None) -> Cost:
    return Cost(macs=9 * prod(x), other=prod(x) * ((bias is not None) + residual + 8 * gelu))


@register_cost("vizoo::depthwise3x3_backward", torch.ops.vizoo.depthwise3x3_backward)
def _(dy, x, weight, bias, residual, gelu, out=None) -> Cost:
    # the gradients' products; the recomputed convolution is not counted, so that no path counts more
    return Cost(macs=18 * prod(x), other=prod(x) * ((bias is not None) + residual + 8 * gelu))


def depthwise3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: bool = False,
    gelu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_depthwise3x3` in one pass over the map: same result and errors.

    Exported and traced programs, transforms of ``torch.func``, and training on a CPU see the plain operators.

    Args:
        x: Map ``[B, C, H, W]``, contiguous or channels-last.
        weight: ``[C, 1, 3, 3]``.
        bias: ``[C]`` or None.
        residual: Whether to add ``x``.
        gelu: Whether to apply GELU at last.
        backend: ``"torch"``, ``"triton"`` (no float64), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, C, H, W]``, in the memory format of ``x``.

    Raises:
        ValueError: If ``backend`` cannot run.
    """
    if not torch.jit.is_scripting():
        limits = "" if torch.jit.is_tracing() else _limits(x, weight, bias)  # traces warn of comparisons of sizes
        if use_triton(backend, x, limits):
            return _depthwise3x3(_cast(x, residual), weight, bias, residual, gelu)
        if backend == "auto" and not limits:
            if gelu and not residual and use_onednn(x, weight):
                return onednn_depthwise3x3_gelu(x, weight, bias)
            if use_compiled_onednn(x, weight):
                y = convolution(x, weight, bias, (1, 1), (1, 1), (1, 1), weight.shape[0])
                return _finish(y, x, residual, gelu)
    return reference_depthwise3x3(x, weight, bias, residual, gelu)


def onednn_depthwise3x3_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution and GELU for a call that ``use_onednn`` has found to fit."""
    geometry: Any = [1, 1], [1, 1], [1, 1], weight.shape[0]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "gelu", [], "none")


def _cast(x: Tensor, residual: bool) -> Tensor:
    """As autocast does it: convolutions are done in half precision, and a wider map that is added stays as it is."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x
    return x.to(torch.promote_types(x.dtype, dtype) if residual else dtype)


def _limits(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What the kernels cannot do with these tensors; empty if nothing."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    if x.dim() != 4 or list(weight.shape) != [x.shape[1], 1, 3, 3]:
        return f"the kernels take maps [B, C, H, W] and weights [C, 1, 3, 3], not {list(x.shape)}, {list(weight.shape)}"
    if bias is not None and list(bias.shape) != [x.shape[1]]:
        return f"the kernels take one number a channel as bias, not {list(bias.shape)}"
    for t in (weight, bias):
        if t is not None and t.dtype not in (torch.float32, x.dtype):
            return f"the kernels take weights in float32 or the dtype of the map, not {t.dtype}"
    if max(x.shape[:2]) > MAX_SIZE:
        return f"the kernels take up to {MAX_SIZE} images and channels, not {x.shape[0]} and {x.shape[1]}"
    return ""
