"""What every ``explain`` of a model keeps: its panels, and the model itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vizoo.backbones.layers import Panel

MOST_TITLE = 90  # characters: two lines over a panel


def explained(model: nn.Module, image: Tensor, **settings: Any) -> list[Panel]:
    """Panels of a model that trains, which are well formed, and leave mode, hooks, weights and statistics alone."""
    model.train()
    next(model.children()).eval()  # frozen
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with torch.enable_grad():
        panels: list[Panel] = model.explain(image, **settings)  # type: ignore[operator]
    assert [m.training for m in model.modules()] == modes
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert panels
    for panel in panels:
        well_formed(panel)
    return panels


def well_formed(panel: Panel) -> None:
    """Shapes, dtypes and values are those that the panel's description promises."""
    assert 0 < len(panel.title) <= MOST_TITLE, panel.title
    tensors = {k: v for k, v in vars(panel).items() if isinstance(v, Tensor)}
    assert all(v.isfinite().all() and not v.requires_grad for v in tensors.values()), panel.title
    sizes = {
        "heat": "hw",
        "parts": "hw",
        "outline": "hw",
        "boxes": "n4",
        "lines": "n22",
        "strength": "n",
        "points": "n2",
    }
    for name, value in tensors.items():
        assert value.ndim == len(sizes[name])
        assert all(not s.isdigit() or n == int(s) for s, n in zip(sizes[name], value.shape, strict=True))
        if name in ("heat", "boxes", "lines", "strength", "points"):
            assert value.dtype == torch.float32, (panel.title, name, value.dtype)
    edges = torch.tensor(panel.area) if panel.boxes is None else torch.cat([torch.tensor([panel.area]), panel.boxes])
    assert (edges[..., :2] < edges[..., 2:]).all()
