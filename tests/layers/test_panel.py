"""What a model does while it is watched, and where its cells lie."""

import pytest
import torch
from torch import nn

from vizoo.backbones.layers.panel import seen_by, tiled


def test_seen_by_keeps_the_last_call_and_restores_the_model():
    """Also of a model that trains with a frozen part, and of one that fails."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 2))
    model = nn.Sequential(model[0], model[1], model[0], model[2])
    model[3].eval()
    x = torch.randn(3, 4)
    modes = [module.training for module in model.modules()]
    (((second,), out), ((last,), _)) = seen_by(model, x, [model[0], model[3]])
    assert torch.equal(second, model[0](x))
    assert torch.equal(out, model[0](second))
    assert torch.equal(last, out)
    assert not out.requires_grad
    with pytest.raises(RuntimeError):
        seen_by(model, x[:, :3], [model[0]])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_tiled_ends_where_the_cells_do():
    assert tiled(torch.zeros(1, 3, 70, 100), torch.zeros(4, 7), (16, 16)) == (0, 0, 64 / 70, 112 / 100)
