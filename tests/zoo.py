"""What the model tests share: the registered names, how to build a model, how big an input it is given."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vizoo  # noqa: F401 - registers the zoo

FORWARD, BACKWARD, SMALL = 384, 128, 96  # sides in pixels: one pass, training step, everything else


def module_of(name: str) -> ModuleType:
    """The family's module that registered a model."""
    return sys.modules[timm.models.model_entrypoint(name).__module__]


def _registered() -> list[str]:
    return [n for n in timm.list_models() if module_of(n).__name__.startswith("vizoo.")]


def build(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` in evaluation mode."""
    return timm.create_model(name, **kwargs).eval()


@functools.cache
def _weight(name: str) -> tuple[bool, int]:
    """Order inside a family: ``test_*`` variants first, then by parameters."""
    if name.startswith("test_"):
        return False, 0
    return True, sum(p.numel() for p in build(name, device="meta").parameters())


def _smallest(names: list[str]) -> list[str]:
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(module_of(name).__name__, []).append(name)
    return [min(members, key=_weight) for members in families.values()]


NAMES = _registered()
assert NAMES, "vizoo registers no model, so there is nothing to test"
SMALLEST = _smallest(NAMES)

all_models = pytest.mark.parametrize("name", NAMES)
"""Every model, always: for checks on the meta device."""
smallest_models = pytest.mark.parametrize("name", SMALLEST)
"""The smallest model of each family: for what cannot differ by size."""
sized_models = pytest.mark.parametrize(
    "name", [n if n in SMALLEST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
"""The smallest of each family always, the others as slow tests."""


def is_fixed(model: nn.Module) -> bool:
    """Whether the model accepts a single input size."""
    return bool(model.pretrained_cfg.get("fixed_input_size"))


def input_shape(model: nn.Module, side: int) -> tuple[int, int, int]:
    """Channels, height and width at most ``side``, unless the configuration demands more."""
    cfg = model.pretrained_cfg
    c, h, w = cfg["input_size"]
    if is_fixed(model) or max(h, w) <= side:
        return c, h, w
    return cfg.get("min_input_size") or (c, min(h, side), min(w, side))


def sample(model: nn.Module, side: int = SMALL, batch: int = 1) -> Tensor:
    """Standard-normal images for ``model``."""
    return torch.randn(batch, *input_shape(model, side))


def as_nchw(features: Tensor, model: nn.Module) -> Tensor:
    """Bring the unpooled map of ``model`` to channels first."""
    fmt = str(getattr(model, "output_fmt", "NCHW")).rpartition(".")[2]
    assert fmt in ("NCHW", "NHWC"), f"output_fmt {fmt}"
    return features.permute(0, 3, 1, 2) if fmt == "NHWC" else features


def names_of(value: Any) -> tuple[str, ...]:
    """A configuration entry that is one name, several, or None."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter; fails when one is missing or not finite."""
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    found = {n: p.grad for n, p in model.named_parameters()}
    broken = [n for n, g in found.items() if not torch.isfinite(g).all()]
    assert not broken, f"gradient not finite for {broken}"
    return found


def overlay(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``build`` that load ``state`` the way pretrained weights are loaded."""
    copy = {k: v.clone() for k, v in state.items()}
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": copy, "source": ""}}
