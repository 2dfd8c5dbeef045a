"""Mixture-of-head attention: a gate for every token and head, and into any vision transformer of timm.

"MoH: Multi-Head Attention as Mixture-of-Head Attention", P. Jin, B. Zhu, L. Yuan, S. Yan, ICML 2025,
https://arxiv.org/abs/2410.11842.  Official code, Apache-2.0: github.com/SkyworkAI/MoH 2cefd57b.

A gate of 0 drops a head for a token, and the head is computed nevertheless.  For the 7x7 and 14x14 tokens of images of
224 pixels nothing was gained on a CPU by skipping it: a gather of the tokens of each head costs what their scores save.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Optional, TypeVar

import torch
from timm.layers import Attention, AttentionRope, get_device_dtype, register_notrace_module
from timm.models import (
    beit,
    eva,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import Tensor, nn

from ..ops.backend import plain_only
from .checks import NATURAL, Range, checked, is_sequence, need
from .plain import has_bias, is_plain, tensors

__all__ = ["MixtureOfHeads", "check_gates", "load_balance", "moh"]

_Model = TypeVar("_Model", bound=nn.Module)


@register_notrace_module  # picks its path by the layers
class MixtureOfHeads(nn.Module):
    """Gates that multiply the heads of an attention before its projection, of each query token (Sec. 3).

    The first ``s = shared`` heads work for all tokens, and of the ``E`` others each token keeps the ``r = routed`` with
    the largest logits.  With softmaxes over heads in float32 at least::

        shared heads  w_0 * s * softmax(wg_1 x)            w = 2 * softmax(wg_0 x)
        kept heads    w_1 * r * softmax(wg x over the kept)
        other heads   0

    A single shared head has no ``wg_1`` and a softmax of 1.  Without shared heads, or without routed ones, there is no
    ``wg_0`` and no ``w``.  The gates of a token sum to ``s * w_0 + r * w_1``; where all weights are 0, they are 1 or 0.

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
        """Outputs ``[O, T]`` of ``wg``, ``wg_0`` and ``wg_1``, those that exist, below each other, for all tokens."""
        if not torch.jit.is_scripting():
            layers = list(self.children())
            plain = all(is_plain(m, nn.Linear) and not has_bias(m) for m in layers)
            if plain and not (torch.is_grad_enabled() or plain_only()):
                return torch.cat(tensors(*layers)[::2]) @ x.reshape(-1, x.shape[-1]).t()
        out: list[Tensor] = []
        if self.wg is not None:
            out.append(self.wg(x))
        if self.wg_0 is not None:
            out.append(self.wg_0(x))
        if self.wg_1 is not None:
            out.append(self.wg_1(x))
        return torch.cat([logits.reshape(-1, logits.shape[-1]).t() for logits in out])

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[..., dim]`` to the gates of their heads ``[..., num_heads]``, in the dtype of ``x``."""
        logits = self._logits(x)  # tokens last: softmaxes over a few neighbours in memory take three times as long
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        s, r = self.shared, self.routed
        if r == 0:
            gates = logits.softmax(0) * s
        else:
            rest = self.num_heads - s
            heads, others = logits[:rest], logits[rest:]
            top, kept = heads.topk(r, 0, sorted=False)
            # all of softmax, divided by its sum over the kept, is the softmax over them; the sum is at least r / E
            gates = torch.zeros_like(heads).scatter(0, kept, top.softmax(0) * r)
            if self.training:
                self._balance(heads.softmax(0), kept)
            if s > 0:
                w = others[:2].softmax(0) * 2
                shared = others[2:].softmax(0) * s if s > 1 else torch.ones_like(w[:1])
                gates = torch.cat([w[:1] * shared, w[1:] * gates])
        return gates.t().to(x.dtype).contiguous().reshape(x.shape[:-1] + (self.num_heads,))  # noqa: RUF005 - TorchScript

    def _balance(self, p: Tensor, kept: Tensor) -> None:
        """Set ``aux_loss`` of shares ``[E, T]`` and positions of the kept ``[r, T]``."""
        load = torch.zeros_like(p).scatter(0, kept, 1.0)
        value = (p.mean(1) * load.mean(1)).mean() * len(p) ** 2
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if _is_lost():
                return
        self.aux_loss = value


def _is_lost() -> bool:
    """Whether a value in training is of no use: a program drops it, or checkpointing computes it anew in backward.

    Then it would come after the loss, and keep alive what checkpointing means to free.
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
        A scalar, to be weighed with 0.01 and added to the loss; None if there is no value.
    """
    return _mean([m for m in model.modules() if isinstance(m, MixtureOfHeads)])


def _mean(gates: list[MixtureOfHeads]) -> Tensor | None:
    found = [gate.aux_loss for gate in gates if gate.aux_loss is not None]
    return torch.stack(found).mean() if found else None


class _Pass:
    """An attention during one pass: what first reads all heads, beside each other, gets them times their gates."""

    def __init__(self, attn: nn.Module, gates: Tensor) -> None:
        self._attn, self._gates = attn, gates
        self._reads = "norm" if hasattr(attn, "norm") else "proj"

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._attn, name)
        return partial(self._read, found) if name == self._reads else found

    def _read(self, layer: nn.Module, heads: Tensor) -> Tensor:
        """Heads ``[..., h * d]`` times gates ``[..., h]`` of as many tokens, through the layer."""
        gates = self._gates.to(heads.dtype).reshape(*heads.shape[:-1], -1, 1)
        return layer((heads.unflatten(-1, (gates.shape[-2], -1)) * gates).flatten(-2))


class _Gated(nn.Module):
    """Gates of an attention, whose own forward runs; mixed into its class."""

    plain: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens, and what else the attention takes, to what it gives."""
        return self.plain.forward(_Pass(self, self.gates(x)), x, *args, **kwargs)  # type: ignore[no-any-return, operator]

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.plain,), self.__dict__


GATED: dict[type[nn.Module], type[nn.Module]] = {
    plain: type(f"Gated{plain.__name__}", (_Gated, plain), {"plain": plain, "__doc__": f"{plain.__name__} with gates."})
    for plain in (
        Attention,
        AttentionRope,
        beit.Attention,
        eva.EvaAttention,
        swin_transformer.WindowAttention,
        swin_transformer_v2.WindowAttention,
        vision_transformer_relpos.RelPosAttention,
        vision_transformer_sam.Attention,
    )
}
"""timm's attentions -> with gates: those that give all heads, beside each other, to ``norm`` if any, else ``proj``."""


def _new(plain: type[nn.Module]) -> nn.Module:
    """An empty one, for copies and pickles."""
    return GATED[plain].__new__(GATED[plain])


class _ExtraLoss:
    """The hook ``extra_loss()`` of a model; it knows the gates and not the model, which would never be freed."""

    def __init__(self, gates: list[MixtureOfHeads], weight: float) -> None:
        self.gates, self.weight = gates, weight

    def __call__(self) -> Tensor | None:
        value = _mean(self.gates)
        return None if value is None else self.weight * value


@checked(shared=NATURAL, routed=NATURAL, aux_weight=Range(0))
def moh(model: _Model, shared: int | Sequence[int], routed: int | Sequence[int], *, aux_weight: float = 0.01) -> _Model:
    """Give every attention of a vision transformer of timm a gate, in place; all its parameter names stay.

    The new :class:`MixtureOfHeads` are ``gates`` of the attentions, in the state dict as well.  Their weights are zero,
    so that all gates are 1 and a model with pretrained weights begins as itself, bit for bit, where no head is dropped:
    with ``routed = num_heads - shared``, or with 0 and all heads shared (up to 40 of them: in float32 41 times a 41st
    is not 1).  With fewer, every token begins without the same heads.  The authors continued from weights without gates
    for a language model; models of images they trained from the start::

        model = moh(timm.create_model("deit_small_patch16_224", pretrained=True), shared=2, routed=3)
        loss = criterion(model(images), targets) + 0.01 * load_balance(model)

    The model also gets the hook ``extra_loss``, by which ``vizoo train`` adds that term.  All heads are computed: the
    gates cost time and save none.  The model compiles, exports and traces; TorchScript cannot compile it.

    Args:
        model: Any model with attentions of timm's vision transformers: ``Attention``, ``AttentionRope``,
            ``EvaAttention``, and those of BEiT, Swin (also V2), SAM and of relative positions.
        shared: Heads that work for all tokens; a number, or one for each attention.
        routed: Heads of the others that each token keeps, likewise.
        aux_weight: Weight of the load-balance value in ``extra_loss``; with 0 the model gets no such hook.

    Returns:
        ``model``.

    Raises:
        ValueError: If numbers of heads do not fit, or the model has no such attention, gates or a hook already.
    """
    found: list[Any] = [m for m in model.modules() if type(m) in GATED]
    if any(isinstance(m, _Gated) for m in model.modules()):
        raise ValueError("model has gates already")
    if not found:
        known = ", ".join(sorted(f"{c.__module__}.{c.__name__}" for c in GATED))
        raise ValueError(f"got model={type(model).__name__} without an attention that takes gates, need one of {known}")
    if aux_weight and hasattr(model, "extra_loss"):
        raise ValueError(f"got aux_weight={aux_weight} for a model with an extra_loss of its own, need 0")
    counts = [_counts(len(found), **{name: value}) for name, value in (("shared", shared), ("routed", routed))]
    for attn, s, r in zip(found, *counts, strict=True):
        check_gates(attn.num_heads, s, r)
    for attn, s, r in zip(found, *counts, strict=True):
        reads = attn.qkv if attn.qkv is not None else attn.q_proj
        attn.gates = MixtureOfHeads(reads.in_features, attn.num_heads, s, r, **get_device_dtype(attn))
        for parameter in attn.gates.parameters():
            nn.init.zeros_(parameter)
        attn.gates.train(attn.training)
        attn.__class__ = GATED[type(attn)]
    if aux_weight:
        model.extra_loss = _ExtraLoss([attn.gates for attn in found], aux_weight)  # type: ignore[assignment]
    return model


def _counts(count: int, **values: Any) -> Sequence[int]:
    """A number, or one for each of ``count`` attentions, as a sequence."""
    ((name, value),) = values.items()
    if not is_sequence(value):
        return [value] * count
    need(len(value) == count, f"a number, or {count}, one for each attention", **{name: value})
    return value  # type: ignore[no-any-return]
