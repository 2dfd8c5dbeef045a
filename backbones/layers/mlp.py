"""Feed-forward network of channels-last maps."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.backend import fuses_gelu
from ..ops.linear import onednn_linear
from .plain import fuses, is_plain, project, tensors

_CHUNK_BYTES = 6 << 20  # largest hidden map worked on at once


@register_notrace_module  # picks its path by the device of its input
class Mlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels between.
        drop: Dropout rate after each of the two.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., C]`` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if x.dim() > 1 and is_plain(self.drop, nn.Dropout) and fuses(x, self.fc1, self.fc2, compiled=False):
                return self._few_at_once(x)
        x = self.hidden(x)
        return self.drop(self.fc2(x) if torch.jit.is_scripting() else project(self.fc2, x))

    @torch.jit.unused
    def _few_at_once(self, x: Tensor) -> Tensor:
        """A few images at a time, so that the hidden map stays in the cache and its memory is used again."""
        most = _CHUNK_BYTES // (x[0].numel() // x.shape[-1] * self.fc1.out_features * x.element_size())
        out = [project(self.fc2, self.hidden(part)) for part in x.split(max(1, most))]
        return self.drop(out[0] if len(out) == 1 else torch.cat(out))

    def hidden(self, x: Tensor) -> Tensor:
        """The activated and dropped first half: ``[..., C]`` to ``[..., hidden_dim]``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if fuses_gelu(x) and fuses(x, self.fc1):  # GELU while the product is written
                weight, bias = tensors(self.fc1)
                return self.drop(onednn_linear(x, weight, bias, gelu=True))
        x = self.fc1(x) if torch.jit.is_scripting() else project(self.fc1, x)
        return self.drop(F.gelu(x))
