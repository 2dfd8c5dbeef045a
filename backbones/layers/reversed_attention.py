"""Reversed attention as a module: head selector, message controller and the sum over senders (DependencyViT)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn

from ..ops.reversed_attention import reference_reversed_attention, reversed_attention
from .checks import Range, check_multiple, checked
from .plain import project_wide

__all__ = ["MessageController", "ReversedAttention"]

SCORES = ("message", "received")


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class MessageController(nn.Module):
    """Gate of every token's message: ``g = sigmoid(fc2(gelu(fc1(x))))``.

    It runs in float32 at least, also under autocast and with weights of half precision: the gates of many tokens are
    alike, and a Lite model chooses between them.  What half precision rounded before still moves a choice where two
    messages nearly tie: 1 in 1000 of the tokens left at the end of a fresh model in bfloat16, 1 in 5000 in float16.
    TorchScript computes in the dtype of the weights.

    Args:
        dim: Channels.
        bias: Biases of both layers; the re-implementation that is our source has none.
        init: What ``fc2.bias`` starts from: 4 opens the gate to 0.98, where 0 would leave 0.5 of it in each layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        bias: bool = True,
        init: float = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.init = init
        self.fc1 = nn.Linear(dim, dim // 2, bias=bias, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim // 2, 1, bias=bias, **dd)
        self.open_gate()

    @torch.jit.ignore
    def open_gate(self) -> None:
        """Set ``fc2.bias``, if there is one, to ``init``."""
        if self.fc2.bias is not None:
            nn.init.constant_(self.fc2.bias, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to the logarithm of their gates ``[B, N]``, in float32 at least."""
        hidden = self.act(self.fc1(x) if torch.jit.is_scripting() else project_wide(self.fc1, x))
        gate = self.fc2(hidden) if torch.jit.is_scripting() else project_wide(self.fc2, hidden)
        return F.logsigmoid(_precise(gate.squeeze(-1)))


@register_notrace_module  # picks its path by size and device of its input
class ReversedAttention(nn.Module):
    """Every token sends its value to the tokens it attends to: ``out_j = sum_i F[i, j] P_i M_i v_i``.

    ``F`` is the softmax of ordinary attention, over receivers ``j``; ``P`` shares each sender among the heads, a
    softmax over heads of ``x W_p / tau``; ``M`` is the sender's message, the product of the gates of all layers up to
    this one.  ``M`` is kept as a logarithm, and gates, shares and both softmaxes are computed in float32: a product of
    two dozen gates underflows in float16, and logits over 0.1 overflow.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        qkv_bias: Bias of the query, key and value projection.
        tau: Temperature of the head selector.
        gate_bias: Biases of the message controller.
        gate_init: What its last bias starts from.
        score: What is returned to rank tokens by: ``message`` for ``log M``, ``received`` for the mass that a token
            receives, the row sum of the soft dependency mask.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fused_attn: torch.jit.Final[bool]
    receives: torch.jit.Final[bool]

    @checked(dim=Range(2), score=SCORES)
    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = False,
        tau: float = 0.1,
        gate_bias: bool = True,
        gate_init: float = 4.0,
        score: str = "message",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.tau = tau
        self.fused_attn = use_fused_attn()
        self.receives = score == "received"
        self.record = False
        self.recorded: tuple[Tensor, Tensor, Tensor] | None = None  # q, k and weight of the last pass
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **dd)
        self.message_controller = MessageController(dim, bias=gate_bias, init=gate_init, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def select(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to the logarithm of their shares of the heads ``[B, N, h]``, in float32 at least."""
        logits = self.head_selector(x) if torch.jit.is_scripting() else project_wide(self.head_selector, x)
        return F.log_softmax(_precise(logits) / self.tau, dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        if self.fused_attn:
            return reversed_attention(q, k, v, weight)
        return reference_reversed_attention(q, k, v, weight)

    def forward(self, x: Tensor, log_message: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Send and collect.

        Args:
            x: Tokens ``[B, N, C]``.
            log_message: Logarithm of the messages after the layer before ``[B, N]``; None for a first layer.

        Returns:
            Tokens ``[B, N, C]``; logarithm of the messages after this layer ``[B, N]``; the score of every token
            ``[B, N]``.  The last two are float32 at least.
        """
        B, N, C = x.shape
        gate = self.message_controller(x)
        log_message = gate if log_message is None else log_message + gate
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        weight = (self.select(x) + log_message.unsqueeze(-1)).exp().transpose(1, 2)  # [B, h, N]
        if self.record and not torch.jit.is_scripting():
            self.recorded = (q.detach(), k.detach(), weight.detach())
        out = self._attend(q, k, v, weight).transpose(1, 2).reshape(B, N, C)
        score = log_message
        if self.receives:
            score = self._attend(q, k, torch.ones_like(_precise(v)), weight)[..., 0].sum(1)
        return self.proj(out), log_message, score
