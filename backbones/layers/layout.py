"""Memory format of the maps."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

__all__ = ["to_fast_layout"]


@register_notrace_function
def to_fast_layout(x: Tensor) -> Tensor:
    """Channels-last memory on a CPU, where convolutions are faster with it: large depthwise kernels up to 25 times."""
    if x.device.type == "cpu":
        return x.contiguous(memory_format=torch.channels_last)
    return x
