"""Convolution of a channels-last map in compiled inference on a CPU.

PyTorch's compiler lays out every four-dimensional map before a convolution as if its second dimension were channels.
For maps ``[B, H, W, C]`` that is a transposition, in which it computes norms and sums element by element.  Behind an
operator of ours it does not see the convolution, and leaves the maps as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import Cost, register_cost
from .operators import operator


def output_sides(
    sides: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of what a convolution makes of a map; 0 or less where its kernel does not fit."""
    geometry = zip(sides, kernel_size, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]


@operator
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv2d`` as one operator, for a call that ``use_compiled_onednn`` has found to fit.

    Args:
        x: ``[B, C, H, W]``, at best channels-last.
        weight: ``[O, C / groups, h, w]``.
        bias: ``[O]`` or None.
        stride: Two numbers.
        padding: Zeros on either side of both dimensions.
        dilation: Two numbers.
        groups: Groups of channels.

    Returns:
        ``[B, O, H', W']``, channels-last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out.contiguous(memory_format=torch.channels_last)


convolution = torch.ops.vizoo.convolution


@torch.library.register_fake("vizoo::convolution")
def _(x, weight, bias, stride, padding, dilation, groups):
    sides = output_sides(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *sides)).to(memory_format=torch.channels_last)


@register_cost("vizoo::convolution")
def _cost(x: Any, weight: Any, bias: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * prod(weight[1:]), other=prod(out) * (bias is not None))
