"""Linear layer for channels-last maps: oneDNN for inference on a CPU, where it beats the BLAS that PyTorch calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import use_onednn


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
        if use_onednn(x, weight):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
