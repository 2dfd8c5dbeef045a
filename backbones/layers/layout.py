"""Memory format of the maps."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from ..ops._backend import is_transforming

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
    """Channels-last memory on a CPU, where convolutions are faster with it: large depthwise kernels up to 25 times."""
    return to_channels_last(x) if x.device.type == "cpu" else x
