"""Mixture-of-head attention: a gate for every token and head, and into any vision transformer of timm.

"MoH: Multi-Head Attention as Mixture-of-Head Attention", P. Jin, B. Zhu, L. Yuan, S. Yan, ICML 2025,
https://arxiv.org/abs/2410.11842.  Official code, Apache-2.0: github.com/SkyworkAI/MoH 2cefd57b.

A gate of 0 drops a head for a token, and the head is computed nevertheless.  At the sizes of images nothing is gained
by skipping it: a gather of the tokens of each head costs what their scores save.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.backend import plain_only
from .checks import NATURAL, checked, need
from .plain import has_bias, is_plain, tensors

__all__ = ["MixtureOfHeads", "load_balance"]


@register_notrace_module  # picks its path by the layers
class MixtureOfHeads(nn.Module):
    """Gates that multiply the heads of an attention before its projection, of each query token (Eq. 5 to 8).

    The first ``s = shared`` heads work for all tokens, and of the ``E`` others each token keeps the ``r = routed`` with
    the largest logits.  With softmaxes over heads in float32 at least::

        shared heads  w_0 * s * softmax(wg_1 x)            w = 2 * softmax(wg_0 x)
        kept heads    w_1 * r * softmax(wg x over the kept)
        other heads   0

    A single shared head has no ``wg_1`` and a softmax of 1.  Without shared heads, or without routed ones, there is no
    ``wg_0`` and no ``w``.  The gates of a token sum to ``s * w_0 + r * w_1``, with weights of zero they
    are 1 and 0.

    ``aux_loss`` is the load-balance value of the last pass in training, ``E^2 * mean_e(mean(p_e) * mean(e is kept))``
    with ``p = softmax(wg x)`` and means over all tokens of the batch: ``r`` if all heads work alike.  Only ``p`` has a
    gradient.  It is None before, and stays so without routed heads, and is neither copied nor saved.  A pass that
    reentrant checkpointing runs without gradients leaves a value without a gradient.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads ``h`` of the attention.
        shared: Heads that work for all tokens.
        routed: Heads of the others that each token keeps; with 0, all heads must be shared.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    aux_loss: Optional[Tensor]  # noqa: UP045 - TorchScript

    @checked(shared=NATURAL, routed=NATURAL)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int,
        routed: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_gates(num_heads, shared, routed)
        dd: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.num_heads, self.shared, self.routed = num_heads, shared, routed
        self.wg = nn.Linear(dim, num_heads - shared, **dd) if routed else None
        self.wg_0 = nn.Linear(dim, 2, **dd) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, **dd) if shared > 1 else None
        self.aux_loss = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_loss": None}  # has a graph, which can be neither copied nor saved

    def extra_repr(self) -> str:
        """Heads for ``print(model)``."""
        return f"num_heads={self.num_heads}, shared={self.shared}, routed={self.routed}"

    def _logits(self, x: Tensor) -> Tensor:
        """Outputs of ``wg``, ``wg_0`` and ``wg_1``, those that exist, one after the other ``[..., O]``."""
        if not torch.jit.is_scripting():
            layers = list(self.children())
            plain = all(is_plain(m, nn.Linear) and not has_bias(m) for m in layers)
            if plain and not (torch.is_grad_enabled() or plain_only()):
                return F.linear(x, torch.cat(tensors(*layers)[::2]))
        out: list[Tensor] = []
        if self.wg is not None:
            out.append(self.wg(x))
        if self.wg_0 is not None:
            out.append(self.wg_0(x))
        if self.wg_1 is not None:
            out.append(self.wg_1(x))
        return torch.cat(out, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[..., dim]`` to the gates of their heads ``[..., num_heads]``, in the dtype of ``x``."""
        logits = self._logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        s, r = self.shared, self.routed
        if r == 0:
            return (logits.softmax(-1) * s).to(x.dtype)
        rest = self.num_heads - s
        heads, others = logits[..., :rest], logits[..., rest:]
        top, kept = heads.topk(r, -1)
        # all of softmax, divided by its sum over the kept, is the softmax over them; the sum is at least r / E
        gates = torch.zeros_like(heads).scatter(-1, kept, top.softmax(-1) * r)
        if self.training:
            self._balance(heads.softmax(-1), kept)
        if s > 0:
            w = others[..., :2].softmax(-1) * 2
            shared = others[..., 2:].softmax(-1) * s if s > 1 else torch.ones_like(w[..., :1])
            gates = torch.cat([w[..., :1] * shared, w[..., 1:] * gates], -1)
        return gates.to(x.dtype)

    def _balance(self, p: Tensor, kept: Tensor) -> None:
        """Set ``aux_loss`` of shares ``[..., E]`` and positions of the kept ``[..., r]``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if _passes_again():
                return
        rest = p.shape[-1]
        load = torch.zeros_like(p).scatter(-1, kept, 1.0)
        mean = p.reshape(-1, rest).mean(0) * load.reshape(-1, rest).mean(0)
        self.aux_loss = mean.mean() * (rest * rest)


def _passes_again() -> bool:
    """Whether the pass is that of checkpointing inside of the backward pass, or one whose attributes are not kept.

    Its value would come after the loss, and keep alive what checkpointing means to free.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._current_graph_task_id() != -1


def check_gates(num_heads: int, shared: int, routed: int) -> None:
    """Refuse numbers of heads that no gate has."""
    given = {"num_heads": num_heads, "shared": shared, "routed": routed}
    if routed == 0:
        need(shared == num_heads >= 2, "shared to be num_heads, at least 2, where routed is 0", **given)
    need(shared >= 0 and 0 <= routed <= num_heads - shared, "routed from 0 to num_heads - shared", **given)


def load_balance(model: nn.Module) -> Tensor | None:
    """Mean load-balance value of all gates with routed heads, in the last pass in training.

    Args:
        model: Any model with :class:`MixtureOfHeads`.

    Returns:
        A scalar, to be weighed with 0.01 and added to the loss (Eq. 9); None if there is no value.
    """
    values = [m.aux_loss for m in model.modules() if isinstance(m, MixtureOfHeads)]
    found = [value for value in values if value is not None]
    return torch.stack(found).mean() if found else None
