"""What the tests of every family's ``explain`` share."""

from __future__ import annotations

import typing
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from zoo import REGISTERED, module_of

from vizoo.backbones.layers import Panel


def explained(model: nn.Module, image: Tensor, **settings: Any) -> list[Panel]:
    """The panels of a model that trains, with one module frozen: they fit each other, and the model stays as it was."""
    modules = dict(model.train().named_modules())
    list(modules.values())[-1].eval()
    modes = {name: module.training for name, module in modules.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    panels = model.explain(image, **settings)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for panel in panels:
        check_panel(panel)
    model.eval()
    return panels


def check_panel(panel: Panel) -> None:
    """Shapes as :class:`Panel` says, and numbers that can be drawn."""
    shapes = {"heat": (None, None), "boxes": (None, 4), "lines": (None, 2, 2), "points": (None, 2)}
    assert 0 < len(panel.title) <= 90
    for name, shape in shapes.items():
        value = getattr(panel, name)
        if value is not None:
            assert len(value.shape) == len(shape), name
            assert all(n in (None, m) for n, m in zip(shape, value.shape, strict=True)), name
            assert value.dtype == torch.float32, name
            assert value.isfinite().all(), name
            assert not value.requires_grad, name
    assert panel.points is None or len(panel.points) == len(panel.names) or not panel.names
    if panel.heat is not None and panel.limits is not None:
        low, high = panel.limits
        assert low <= panel.heat.min() <= panel.heat.max() <= high


def check_family_explains(family: ModuleType) -> None:
    """Every registered model of a family has ``explain``."""
    names = [n for n in REGISTERED if module_of(n) is family]
    assert names
    for name in names:
        assert callable(typing.get_type_hints(timm.models.model_entrypoint(name))["return"].explain), name
