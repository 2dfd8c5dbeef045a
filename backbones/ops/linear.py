"""Linear layer for channels-last maps: oneDNN for inference on a CPU, where it beats the BLAS that PyTorch calls."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import use_compiled_onednn, use_onednn
from .cost import Cost, register_cost
from .operators import operator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: ``[..., C]``.
        weight: ``[O, C]``.
        bias: ``[O]`` or None.

    Returns:
        ``[..., O]``.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if use_onednn(x, weight) or use_compiled_onednn(x, weight):
            return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """:func:`linear`, perhaps with the exact GELU, for a call that oneDNN fits (``use_onednn``, also compiled)."""
    if torch.compiler.is_compiling():
        return torch.ops.vizoo.linear(x, weight, bias, gelu)
    # the last argument names the exact GELU
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))


@operator
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    if x.numel() == 0:
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias, gelu)


@torch.library.register_fake("vizoo::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_cost("vizoo::linear")
def _cost(x: Any, weight: Any, bias: Any, gelu: bool = False, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * weight[0], other=prod(out) * ((bias is not None) + 8 * gelu))  # GELU as in conv_ffn
