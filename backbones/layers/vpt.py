"""Prompts among the tokens: VPT, and VFPT, whose prompts pass a Fourier transform.

"Visual Prompt Tuning", M. Jia et al., ECCV 2022, https://arxiv.org/abs/2203.12119.  "Visual Fourier Prompt Tuning",
R. Zeng et al., NeurIPS 2024, https://arxiv.org/abs/2411.01327.
"""

from types import FunctionType
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from .prompt_attention import fourier_prompts, full_precision, refuse_masks

__all__ = ["VPT", "VPTBlock", "VPTResPostBlock", "alias"]


class VPT(nn.Module):
    """Prompts appended to the tokens.

    Args:
        dim: Channels ``D``.
        num_prompts: Prompts ``p``.
        fourier: Whether the prompts pass a Fourier transform (VFPT).
        prompt_drop: Dropout rate of the prompts.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_prompts: int,
        fourier: bool,
        prompt_drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.fourier, self.prompt_drop = fourier, prompt_drop
        self.prompts = nn.Parameter(torch.empty(num_prompts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompts uniformly from -1 to 1, as TCPA's code does for its hosts."""
        nn.init.uniform_(self.prompts, -1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N + p, D]``; places do not matter, as keys carry no position."""
        out = self.prompts.expand(x.shape[0], -1, -1)
        out = F.dropout(out, self.prompt_drop, self.training)
        if not self.fourier:
            return torch.cat([x, out], 1)
        if torch.jit.is_scripting():
            return torch.cat([x, fourier_prompts(out)], 1)
        with full_precision(x):
            out = fourier_prompts(out)
        return torch.cat([x, out], 1)


def alias(method: Any, name: str) -> Any:
    """A parent's method under another name: TorchScript knows no ``super()``."""
    out = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    out.__annotations__ = method.__annotations__
    return out


class _VPTBlock(nn.Module):
    """A block that takes prompts in, or lets them out; mixed into timm's blocks."""

    if TYPE_CHECKING:
        vpt: nn.Module
        leaving: int

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """``[B, N, D]`` to ``[B, N, D]``, with prompts in the sequence before and after where VPT is shallow."""
        refuse_masks(attn_mask, is_causal)
        x = self.block(self.vpt(x))  # type: ignore[operator]
        return x[:, : x.shape[1] - self.leaving]


@register_notrace_module
class VPTBlock(_VPTBlock, Block):
    """timm's ``Block`` with VPT."""

    block = alias(Block.forward, "block")


@register_notrace_module
class VPTResPostBlock(_VPTBlock, ResPostBlock):
    """timm's ``ResPostBlock`` with VPT."""

    block = alias(ResPostBlock.forward, "block")
