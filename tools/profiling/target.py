"""What is profiled: a model by its name, as commands take it, or any module with its input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from timm.utils.model import reparameterize_model
from torch import nn

from vizoo.tools.common import UserError, build_model, resolve_model, short
from vizoo.tools.options import read_size
from vizoo.tools.profiling.counting import initialized, unwrap


class Target(NamedTuple):
    """What is profiled.

    Attributes:
        net: The module; of a name without real weights on the meta device.
        name: Of the model, or of the module's class.
        size: Height and width of the image; None for inputs that the caller gave.
        inputs: Positional inputs at batch 1.
        own: Whether it was built here; a module of the caller is neither moved nor converted.
        anew: Builds it with real weights; None for inputs that the caller gave.
    """

    net: nn.Module
    name: str
    size: tuple[int, int] | None
    inputs: Sequence[Any]
    own: bool
    anew: Callable[[], nn.Module] | None

    @property
    def record(self):
        return {
            "spec": self.name,
            "kind": "timm" if self.own else "module",
            "name": self.name,
            "size": list(self.size) if self.size else None,
            "inputs": [list(x.shape) for x in self.inputs],
            "weights": None,
            "kwargs": {},
        }


def find_target(
    model: Any,
    inputs: Any = None,
    size: Any = None,
    kwargs: dict[str, Any] | None = None,
    real: bool = False,
    reparam: bool = False,
    weights=None,
) -> Target:
    """Build a named model, or take a module.

    Args:
        model: A name of timm or the zoo, or a module.
        inputs: Positional inputs at batch 1, or the only one; None draws one image.
        size: Side, or height and width, in pixels; None is the model's own.
        kwargs: Arguments of ``timm.create_model``.
        real: Whether weights are needed; else those of a name are on the meta device.
        reparam: Merge branches where the model can, which needs weights.

    Returns:
        The target.

    Raises:
        UserError: For an unknown name, what is neither name nor module, arguments or a size that do not fit.
    """
    own, kwargs = isinstance(model, str), dict(kwargs or {})
    if not own and not isinstance(model, nn.Module):
        raise UserError(f"model {short(model)}: give a name of timm or vizoo, or an nn.Module")
    place: dict[str, Any] = {} if real or reparam else {"device": "meta"}
    name = resolve_model(model, "model") if own else ""
    net = build_model(name, **kwargs, **place) if own else unwrap(model)
    name = name or type(net).__name__
    if inputs is not None:
        alone = isinstance(inputs, torch.Tensor) or not isinstance(inputs, Sequence)
        inputs = (inputs,) if alone else inputs
        net = initialized(net, inputs, {})
        return Target(reparameterize_model(net) if reparam else net, name, None, inputs, own, None)
    config = get_model_input_config(net)
    chans, *given = config["input_size"]
    side = (given[0], given[1]) if size is None else read_size(size, "size")
    if own and config["fixed_input_size"] and side != tuple(given):
        net = build_model(name, **{**kwargs, "img_size": side}, **place)
    net = reparameterize_model(net.eval()) if reparam else net

    def anew() -> nn.Module:
        return find_target(model, None, size, kwargs, True, reparam).net.eval()

    return Target(net, name, side, (torch.empty(1, chans, *side, device="meta"),), own, anew)


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    before = {m: m.training for m in net.modules() if hasattr(m, "training")}  # frozen TorchScript has no mode
    with contextlib.suppress(NotImplementedError):  # exported programs have one for ever
        net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
