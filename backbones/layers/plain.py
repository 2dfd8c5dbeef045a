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

from ..ops._backend import use_compiled_onednn, use_onednn, without_autocast
from ..ops.linear import linear

__all__ = ["fuses", "is_plain", "pointwise", "project", "project_wide", "tensors"]


def is_plain(layer: Any, *types: type) -> bool:
    """Whether calling a layer would do what its class does with its own ordinary parameters, and nothing else.

    Args:
        layer: Module that a fast path would replace.
        types: Classes that the fast path knows; a subclass is another class.

    Returns:
        True if the layer is exactly of one of the classes, nobody watches it or all modules by a hook, its ``forward``
        was not replaced, and its parameters are ordinary tensors.
    """
    if type(layer) not in types or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return False
    if _module._global_backward_hooks or _module._global_backward_pre_hooks:
        return False
    # neither sharded nor quantised; under torch.func.functional_call parameters are plain tensors
    return all(p is None or type(p) in (nn.Parameter, Tensor) for p in layer._parameters.values())


def tensors(*layers: Any) -> list[Any]:
    """Weight and bias of every layer, one after the other; only for layers that :func:`is_plain` has found plain."""
    return [t for layer in layers for t in (layer.weight, layer.bias)]


def pointwise(layer: Any, stride: int = 1) -> bool:
    """Whether a plain convolution is a linear layer over the channels of every ``stride``-th pixel."""
    return (
        is_plain(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride == (stride, stride)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def fuses(x: Tensor, *layers: Any, types: tuple[type, ...] = (nn.Linear,)) -> bool:
    """Whether an inference operator of oneDNN, or one of ours that runs oneDNN inside, may do the work of the layers.

    Args:
        x: Input of the first layer.
        layers: The layers; the first has the dtype of all.
        types: Their classes.

    Returns:
        True if it may, which is never while a gradient is recorded.
    """
    if torch.is_grad_enabled() or not all(is_plain(layer, *types) for layer in layers):
        return False
    weight = layers[0].weight
    return use_onednn(x, weight) or use_compiled_onednn(x, weight)


def project(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)``, by oneDNN where a plain linear layer or 1x1 convolution runs for inference on a CPU.

    Args:
        layer: Any module that maps ``[..., C]`` to ``[..., O]``, or ``[B, C, H, W]`` to ``[B, O, H, W]`` if it is a
            convolution.
        x: Its input.

    Returns:
        Its output.
    """
    if fuses(x, layer):
        return linear(x, *tensors(layer))
    if type(layer) is nn.Conv2d and fuses(x, layer, types=(nn.Conv2d,)) and pointwise(layer, layer.stride[0]):
        s, (weight, bias) = layer.stride[0], tensors(layer)
        return linear(x[:, :, ::s, ::s].permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
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
