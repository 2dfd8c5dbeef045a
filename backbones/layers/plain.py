"""Which layers a fast path may read: the one place that decides, and the only one that reads another's parameters.

People change models: adapters wrap a layer, hooks watch it, pruning and parametrizations make its weight anew in every
pass, quantisation gives it another class, sharding another kind of tensor.  A fast path that computes with
``layer.weight`` would pass all of that by without a word.  It may therefore run only on *plain* layers, and otherwise,
as whenever a gradient is recorded, the layer itself is called; :func:`project_wide` tells how it differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..ops.backend import use_compiled_onednn, use_onednn, without_autocast
from ..ops.convolution import convolution
from ..ops.linear import onednn_linear

__all__ = [
    "convolves",
    "depthwise",
    "fold",
    "folds",
    "fuses",
    "has_bias",
    "is_plain",
    "is_watched",
    "keeps_size",
    "pointwise",
    "project",
    "project_wide",
    "tensors",
]


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody watches a module by a hook, or all modules, or replaced the ``forward`` of this one."""
    return bool(
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_plain(layer: Any, *types: type) -> bool:
    """Whether calling a layer would do what its class does with its own ordinary parameters, and nothing else.

    Args:
        layer: Module that a fast path would replace.
        types: Classes that the fast path knows; a subclass is another class.

    Returns:
        True if the layer is exactly of one of the classes, nobody watches it, and its parameters are ordinary tensors:
        neither sharded nor quantised.
    """
    if type(layer) not in types or is_watched(layer):
        return False
    # under torch.func.functional_call parameters are plain tensors
    return all(p is None or type(p) in (nn.Parameter, Tensor) for p in layer._parameters.values())


def tensors(*layers: Any) -> list[Any]:
    """Weight and bias of every layer, one after the other; only for layers that :func:`is_plain` has found plain."""
    return [t for layer in layers for t in (layer.weight, layer.bias)]


def has_bias(layer: Any) -> bool:
    """Whether a layer adds a bias."""
    return getattr(layer, "bias", None) is not None


def pointwise(layer: Any, groups: int = 1) -> bool:
    """Whether a plain convolution is linear over (a group of) the channels of every pixel, or of every ``s``-th."""
    return (
        is_plain(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride[0] == layer.stride[1]
        and layer.padding == (0, 0)
        and layer.groups == groups
    )


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, its kernel odd, its stride 1, and zeros around keep the map's size."""
    sizes = zip(conv.kernel_size, conv.dilation, strict=True)
    return (
        conv.padding == tuple(d * (k - 1) // 2 for k, d in sizes)
        and conv.padding_mode == "zeros"
        and conv.stride == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and all(k % 2 for k in conv.kernel_size)
    )


def depthwise(layer: Any, kernel_size: int, dilation: int = 1, types: tuple[type, ...] = (nn.Conv2d,)) -> bool:
    """Whether a plain convolution, of one of the classes, is depthwise with these sizes, and :func:`keeps_size`."""
    return (
        is_plain(layer, *types)
        and layer.kernel_size == (kernel_size, kernel_size)
        and layer.dilation == (dilation, dilation)
        and keeps_size(layer)
    )


def convolves(layer: Any, kind: type = nn.Conv2d) -> bool:
    """Whether a plain convolution of a class pads with zeros, as many as it says."""
    return is_plain(layer, kind) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def folds(norm: Any, *types: type) -> bool:
    """Whether a plain batch norm is a fixed factor and summand for each channel: it evaluates, and has both.

    Args:
        norm: Any module.
        types: Classes to take; none for ``nn.BatchNorm2d``.

    Returns:
        True if it is so.
    """
    return (
        is_plain(norm, *(types or (nn.BatchNorm2d,)))
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.weight is not None
    )


def fold(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Factor and summand ``[C]`` of a norm that :func:`folds`, in ``dtype`` if given."""
    found: list[Any] = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    gamma, beta, mean, variance = (t if dtype is None else t.to(dtype) for t in found)
    scale = gamma * (variance + norm.eps).rsqrt()
    return scale, beta - mean * scale


def fuses(x: Tensor, *layers: Any, types: tuple[type, ...] = (nn.Linear,), compiled: bool = True) -> bool:
    """Whether an inference operator of oneDNN may do the work of the layers.

    Args:
        x: Input of the first layer.
        layers: The layers; the first has the dtype of all.
        types: Their classes.
        compiled: Whether there is an operator of ours too that runs oneDNN inside, for ``torch.compile``.

    Returns:
        True if it may, which is never while a gradient or an fx graph is recorded.
    """
    if torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy) or not all(is_plain(layer, *types) for layer in layers):
        return False
    weight = layers[0].weight
    return use_onednn(x, weight) or (compiled and use_compiled_onednn(x, weight))


def project(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)``, by oneDNN where a plain linear layer, or a convolution of pixels, infers on a CPU.

    Other convolutions of channels-last maps are operators of ours in compiled inference (:mod:`..ops.convolution`).

    Args:
        layer: Any module that maps ``[..., C]`` to ``[..., O]``, or ``[B, C, H, W]`` to ``[B, O, H', W']`` if it is a
            convolution.
        x: Its input.

    Returns:
        Its output.
    """
    if fuses(x, layer):
        return onednn_linear(x, *tensors(layer))
    if pointwise(layer) and fuses(x, layer, types=(nn.Conv2d,)):
        (weight, bias), s = tensors(layer), layer.stride[0]
        x = x.permute(0, 2, 3, 1)
        x = x if s == 1 else x[:, ::s, ::s]
        return onednn_linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if torch.compiler.is_compiling() and convolves(layer) and fuses(x, layer, types=(nn.Conv2d,)):
        weight, bias = tensors(layer)
        return convolution(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return layer(x)


def project_wide(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)`` in float32 at least, also under autocast and where the layer holds half precision.

    Weights of half precision are widened if the layer is plain, also while a gradient is recorded, so that training and
    inference decide alike; otherwise the layer is called in its own dtype, and its output widened.

    Args:
        layer: Any module that maps ``[..., C]`` to ``[..., O]``.
        x: Its input.

    Returns:
        Its output in float32, or float64 if the input is float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    own = next((p.dtype for p in layer.parameters() if p.is_floating_point()), wide)
    with without_autocast(x):
        if own not in (torch.float16, torch.bfloat16):
            return layer(x.to(wide))
        if is_plain(layer, nn.Linear):
            weight, bias = tensors(layer)
            return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        return layer(x.to(own)).to(wide)
