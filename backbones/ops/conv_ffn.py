"""Feed-forward network with a depthwise 3x3 convolution inside (ConvFFN; LITv2, Sec. 3.3), channels-last.

``fc2(gelu(dwconv(fc1(x))))`` with the exact GELU and a zero-padded convolution.  Per token of width ``C`` and hidden
width ``M`` this is ``2 C M + 9 M`` multiply-accumulates, and the hidden map is the largest tensor of the network.  On
a CPU the inference path works on a few images at a time, so that the hidden map stays in the cache and its memory is
used again, and lets oneDNN apply bias and GELU while it writes the convolution's result.  On a GPU one kernel does the
same (:mod:`.depthwise`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import on_kernel_device, use_compiled_onednn, use_onednn
from .cost import Cost, register_cost
from .depthwise3x3 import depthwise3x3
from .operators import operator

_CHUNK_BYTES = 6 << 20  # largest hidden map worked on at once; measured: past 8 MiB page faults dominate


def reference_conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    """Linear, depthwise 3x3 convolution, GELU, Linear.

    Args:
        x: Map ``[B, H, W, C]``.
        w1: First linear weight ``[M, C]``.
        b1: ``[M]`` or None.
        wd: Depthwise weight ``[M, 1, 3, 3]``.
        bd: ``[M]`` or None.
        w2: Second linear weight ``[O, M]``.
        b2: ``[O]`` or None.

    Returns:
        ``[B, H, W, O]``.
    """
    x = F.linear(x, w1, b1).permute(0, 3, 1, 2)  # [B, H, W, M] -> [B, M, H, W], channels-last in memory
    x = F.conv2d(x, wd, bd, padding=1, groups=wd.shape[0])
    return F.linear(F.gelu(x.permute(0, 2, 3, 1)), w2, b2)


def conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    """:func:`reference_conv_ffn`, by oneDNN for inference on a CPU and with :func:`depthwise3x3` on a GPU."""
    if not torch.jit.is_scripting():
        if use_onednn(x, w1):
            return _onednn_conv_ffn(x, w1, b1, wd, bd, w2, b2)
        if use_compiled_onednn(x, w1):
            return torch.ops.vizoo.conv_ffn(x, w1, b1, wd, bd, w2, b2)
        if on_kernel_device(x):
            x = depthwise3x3(F.linear(x, w1, b1).permute(0, 3, 1, 2), wd, bd, gelu=True)
            return F.linear(x.permute(0, 2, 3, 1), w2, b2)
    return reference_conv_ffn(x, w1, b1, wd, bd, w2, b2)


def _onednn_conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    B, H, W, C = x.shape
    size = max(1, _CHUNK_BYTES // (H * W * wd.shape[0] * x.element_size()))
    ops = torch.ops.mkldnn
    out = []
    for chunk in x.split(size):
        t = ops._linear_pointwise(chunk, w1, b1, "none", [], "").permute(0, 3, 1, 2)
        t = ops._convolution_pointwise(t, wd, bd, [1, 1], [1, 1], [1, 1], wd.shape[0], "gelu", [], "none")
        out.append(ops._linear_pointwise(t.permute(0, 2, 3, 1), w2, b2, "none", [], ""))
    return out[0] if len(out) == 1 else torch.cat(out)


@operator
def _conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    fn = reference_conv_ffn if x.numel() == 0 else _onednn_conv_ffn
    return fn(x, w1, b1, wd, bd, w2, b2)


@torch.library.register_fake("vizoo::conv_ffn")
def _(x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.shape[0]))


@register_cost("vizoo::conv_ffn")
def _cost(x: Any, w1: Any, b1: Any, wd: Any, bd: Any, w2: Any, b2: Any, out: Any = None, **kwargs: Any) -> Cost:
    tokens, hidden = prod(x[:-1]), wd[0]
    biases = (b1 is not None) + (bd is not None)
    return Cost(
        macs=tokens * (hidden * (x[-1] + prod(wd[1:])) + w2[0] * w2[1]),
        other=tokens * (hidden * (8 + biases) + w2[0] * (b2 is not None)),  # GELU, biases
        acts=tokens * (2 * hidden + w2[0]),
    )
