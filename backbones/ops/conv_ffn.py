"""Feed-forward networks with a depthwise 3x3 convolution inside, channels-last (ConvFFN; LITv2, Sec. 3.3).

``fc2(gelu(dwconv(fc1(x))))`` with the exact GELU and a zero-padded convolution; or gated (ConvGLU; TransNeXt, Sec.
3.4), ``fc2(gelu(dwconv(a)) * b)`` with ``a, b = fc1(x)``.  Per token of width ``C`` and hidden width ``M`` this is
``2 C M + 9 M`` multiply-accumulates, gated ``3 C M + 9 M``, and the hidden map is the largest tensor of the network.
On a CPU the inference path works on a few images at a time, so that the hidden map stays in the cache and its memory is
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
from .depthwise3x3 import depthwise3x3, onednn_depthwise3x3_gelu
from .operators import operator

_CHUNK_BYTES = 6 << 20  # largest hidden map worked on at once; measured: past 8 MiB page faults dominate


def is_gated(w1: Tensor, wd: Tensor) -> bool:
    """Whether the first linear layer gives twice the channels of the convolution."""
    return w1.shape[0] == 2 * wd.shape[0]


def reference_conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    """Linear, depthwise 3x3 convolution, GELU, perhaps times a second half of the first linear layer, Linear.

    Args:
        x: Map ``[B, H, W, C]``.
        w1: First linear weight ``[M, C]``; gated if ``[2 M, C]``, the second half for what is multiplied.
        b1: ``[M]``, ``[2 M]`` or None.
        wd: Depthwise weight ``[M, 1, 3, 3]``.
        bd: ``[M]`` or None.
        w2: Second linear weight ``[O, M]``.
        b2: ``[O]`` or None.

    Returns:
        ``[B, H, W, O]``.
    """
    x = F.linear(x, w1, b1)
    hidden = wd.shape[0]
    t = x[..., :hidden].permute(0, 3, 1, 2)  # [B, H, W, M] -> [B, M, H, W], channels-last in memory
    t = F.gelu(F.conv2d(t, wd, bd, padding=1, groups=hidden).permute(0, 2, 3, 1))
    return F.linear(t * x[..., hidden:] if is_gated(w1, wd) else t, w2, b2)


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
            x, hidden = F.linear(x, w1, b1), wd.shape[0]
            t = depthwise3x3(x[..., :hidden].permute(0, 3, 1, 2), wd, bd, gelu=True).permute(0, 2, 3, 1)
            return F.linear(t * x[..., hidden:] if is_gated(w1, wd) else t, w2, b2)
    return reference_conv_ffn(x, w1, b1, wd, bd, w2, b2)


def _onednn_conv_ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, wd: Tensor, bd: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    B, H, W, C = x.shape
    size = max(1, _CHUNK_BYTES // (H * W * wd.shape[0] * x.element_size()))
    ops, hidden = torch.ops.mkldnn, wd.shape[0]
    (w1, *second), (b1, *second_bias) = w1.split(hidden), (None, None) if b1 is None else b1.split(hidden)
    out = []
    for chunk in x.split(size):
        t = ops._linear_pointwise(chunk, w1, b1, "none", [], "").permute(0, 3, 1, 2)
        t = onednn_depthwise3x3_gelu(t, wd, bd).permute(0, 2, 3, 1)
        if second:  # oneDNN's own product of two results is slower
            t.mul_(ops._linear_pointwise(chunk, second[0], second_bias[0], "none", [], ""))
        out.append(ops._linear_pointwise(t, w2, b2, "none", [], ""))
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
    biases = w1[0] * (b1 is not None) + hidden * (bd is not None)
    product = hidden * (w1[0] == 2 * hidden)
    return Cost(
        macs=tokens * (w1[0] * x[-1] + hidden * prod(wd[1:]) + w2[0] * w2[1]),
        other=tokens * (8 * hidden + biases + product + w2[0] * (b2 is not None)),  # GELU, biases
        acts=tokens * (w1[0] + hidden + w2[0]),
    )
