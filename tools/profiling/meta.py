"""The meta device made quick: building models there, and running their operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLERS = {  # they change numbers only, and return what they were given
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.zero_, Tensor.fill_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
}


class NoValues(TorchFunctionMode):
    """Leaves out what fills tensors on the meta device, which have no values: most of the time of a model there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLERS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **(kwargs or {}))


class Kernels:
    """Runs operators; on the meta device, whose kernels are slow Python, once for all calls that look the same.

    Attributes:
        seconds: Of the last call, where operators are timed; None elsewhere.
    """

    seconds: float | None = None

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}  # metadata of what an operator returned

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns for its arguments."""
        try:
            key = func, _metadata(args), tuple((name, _metadata(value)) for name, value in kwargs.items())
            found = self.known.get(key)
        except TypeError:  # an argument that has more to it, or no hash
            return func(*args, **kwargs)
        if found is not None:
            return _alike(found)
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and _is_pure(func, (*args, *kwargs.values()), out):
            self.known[key] = _metadata(out)
        return out


def _metadata(value: Any) -> Any:
    """All that a kernel sees of an argument on the meta device; a TypeError for a tensor that is no plain one there."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or not value.is_meta or value.layout is not torch.strided:
            raise TypeError(f"got a {type(value).__name__} on {value.device}, need a plain one on meta")
        return value.shape, value.stride(), value.dtype
    return tuple(map(_metadata, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _alike(metadata: Any) -> Any:
    """Tensors with such metadata."""
    if metadata and isinstance(metadata[0], torch.Size):
        shape, stride, dtype = metadata
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return None if metadata and metadata[0] is type(None) else tuple(map(_alike, metadata))


def _is_pure(func: Any, given: Any, out: Any) -> bool:
    """Whether an operator wrote nowhere and returned nothing but new plain tensors on the meta device."""
    if any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns)):
        return False
    made = out if isinstance(out, (list, tuple)) else [out]
    if not made or not all(t is None or (type(t) is Tensor and t.is_meta) for t in made):
        return False
    old = {_address(t) for v in given for t in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, Tensor)}
    return old.isdisjoint(_address(t) for t in made if t is not None)  # some views do not call themselves so


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata
