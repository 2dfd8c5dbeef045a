"""A GPU that knows shapes, strides and dtypes only: what a model launches there, told without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vizoo.backbones.layers import plain


def _format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The layout of a convolution's output by cuDNN, which PyTorch asks only where there is a GPU."""
    last = torch.channels_last
    return last if last in map(suggest_memory_format, (x, weight)) else torch.contiguous_format


class Watch(TorchDispatchMode):
    """Every operator that runs: its name, inputs and outputs; and what all together read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self.moved = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [[t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out)]
        self.calls.append((func._schema.name, *found))  # type: ignore[arg-type]
        returns, (took, gave) = func._schema.returns, found
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if gave and not views and "empty" not in func._schema.name:
            written = [t for t in gave if not any(t is other for other in took)]
            self.moved += sum(t.numel() * t.element_size() for t in (*took, *written))
        return out


@contextlib.contextmanager
def fake_gpu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Context in which a model is on the fake GPU.

    Args:
        model: Any model; its tensors are replaced.
        monkeypatch: Undoes what lets PyTorch believe in the GPU.

    Yields:
        What runs inside.
    """
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", _format)
    monkeypatch.setattr(plain, "Tensor", FakeTensor)  # layers with fake parameters are plain

    def fake(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with FakeTensorMode(), Watch() as watch:
        for module in model.modules():
            for name, t in module._parameters.items():
                if t is not None:
                    module._parameters[name] = nn.Parameter(fake(t))
            for name, t in module._buffers.items():
                if t is not None:
                    module._buffers[name] = fake(t)
        watch.calls.clear()
        watch.moved = 0
        yield watch
