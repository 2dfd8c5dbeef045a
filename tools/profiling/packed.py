"""Dynamically quantised layers on tensors without numbers, for which PyTorch has no kernels: results of a shape.

Their weights are packed in objects of their own, which stay real on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def packed_weights(model: nn.Module) -> list[Any]:
    """The packed weights of a model, which nothing changes."""
    held = [v for m in model.modules() for v in _values(m) if isinstance(v, torch.ScriptObject)]
    return [v for v in held if str(v._type()).endswith("ParamsBase")]


def _values(module: nn.Module) -> list[Any]:
    held = list(vars(module).values())
    return [v for value in held for v in (value if isinstance(value, (list, tuple)) else [value])]


class PackedLayers(TorchDispatchMode):
    """Gives results without numbers in place of running such layers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        make = _RESULTS.get(func._schema.name) if isinstance(func, torch._ops.OpOverload) else None
        return func(*args, **kwargs or {}) if make is None else make(*args)


def _linear(x: Tensor, packed: Any, *args: Any) -> Tensor:
    with torch._C._DisableTorchDispatch():  # unpacking computes numbers
        rows = packed.unpack()[0].shape[0]
    return x.new_empty(*x.shape[:-1], rows)


def _layer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    at = next(i for i, value in enumerate(args) if isinstance(value, bool))  # where it says whether there are biases
    states = [args[at - 2]] if isinstance(args[at - 2], Tensor) else args[at - 2]
    out = x.new_empty(*x.shape[:-1], (1 + args[at + 4]) * states[0].shape[-1])
    return out, *(x.new_empty(h.shape) for h in states)


def _cell(x: Tensor, states: Any, *args: Any) -> Any:
    return torch.empty_like(states) if isinstance(states, Tensor) else tuple(map(torch.empty_like, states))


_RESULTS: dict[str, Callable[..., Any]] = {
    **{f"quantized::linear{act}_dynamic{half}": _linear for act in ("", "_relu") for half in ("", "_fp16")},
    **dict.fromkeys(("aten::quantized_lstm", "aten::quantized_gru"), _layer),
    **{f"quantized::quantized_{kind}_cell_dynamic": _cell for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
