"""Memory format of the maps."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from ..ops.backend import is_transforming, on_kernel_device

__all__ = ["to_channels_last", "to_fast_layout"]


@register_notrace_function
def to_channels_last(x: Tensor) -> Tensor:
    """Channels-last memory, but where ``torch.vmap`` may be at work, which knows no memory formats."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if is_transforming():
            return x
    return x.contiguous(memory_format=torch.channels_last)


@register_notrace_function
def to_fast_layout(x: Tensor) -> Tensor:
    """Channels-last memory, for models whose norms or attention read all channels of a position.

    On a CPU large depthwise kernels are up to 25 times faster with it.  On a GPU every such layer would copy the map
    twice otherwise, and convolutions on tensor cores want it too.  The meta device, where profilers count, keeps its
    layout, but while kernels are compiled there.
    """
    if torch.jit.is_scripting():
        return to_channels_last(x) if x.device.type == "cpu" or x.device.type == "cuda" else x
    return to_channels_last(x) if x.device.type == "cpu" or on_kernel_device(x) else x
