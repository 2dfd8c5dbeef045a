"""Grad-CAM and the effective receptive field of models whose answers are known."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vizoo.tools.common import UserError
from vizoo.tools.pictures import views
from vizoo.tools.pictures.views import grad_cam, receptive_field


class Net(nn.Module):
    """A 4x4 map in any layout, and a classifier that reads it at one place or over all."""

    num_classes = 3

    def __init__(self, layout="NCHW", prefix=0, module="maps"):
        super().__init__()
        self.maps, self.after, self.head = nn.Identity(), nn.Identity(), nn.Linear(2, 3, bias=False)
        self.embed = nn.Conv2d(3, 2, 4, 4)
        self.layout, self.num_prefix_tokens, self.output_fmt = layout, prefix, layout
        self.feature_info = [{"num_chs": 2, "reduction": 4, "module": module}] if module else []

    def forward(self, x):
        x = self.embed(x)
        if self.layout == "NCHW":
            return self.head(self.after(self.maps(x)).mean((2, 3)))
        x = x.permute(0, 2, 3, 1)
        if self.layout == "NHWC":
            return self.head(self.after(self.maps(x)).mean((1, 2)))
        tokens = torch.cat([x.new_ones(1, self.num_prefix_tokens, 2), x.flatten(1, 2)], 1)
        return self.head(self.after(self.maps(tokens))[:, self.num_prefix_tokens :].mean(1))


@pytest.mark.parametrize("module", ["maps", ""])
@pytest.mark.parametrize(("layout", "prefix"), [("NCHW", 0), ("NHWC", 0), ("NLC", 0), ("NLC", 1)])
def test_grad_cam_is_the_weighted_map(layout, prefix, module):
    """Of every layout, also where only the calls tell which modules give maps; by hand, the weights are the head's."""
    model = Net(layout, prefix, module).eval()
    x = torch.randn(1, 3, 16, 24)
    for target in (None, 1):
        panel = grad_cam(model, x, target)
        best = int(model(x).argmax()) if target is None else target
        by_hand = torch.einsum("c,chw->hw", model.head.weight[best], model.embed(x)[0]).relu().detach()
        assert panel.heat.shape == (4, 6)
        torch.testing.assert_close(panel.heat, by_hand / by_hand.max())
        assert f"class {best} (" in panel.title
    assert "class 1, dog (" in grad_cam(model, x, 1, ["cat", "dog", "fox"]).title


def test_grad_cam_leaves_places_that_do_not_count():
    """A class token reads the tokens in its last block: the map behind it has no gradients, the one before it has."""
    model = timm.create_model("test_vit").eval()
    x = torch.randn(1, 3, 160, 160)
    panel = grad_cam(model, x, 5)
    kept = []
    handle = model.blocks[-2].register_forward_hook(lambda module, args, out: kept.append(out))
    (slope,) = torch.autograd.grad(model(x)[0, 5], kept)
    handle.remove()
    tokens, weight = kept[0][0, 1:].detach(), slope[0, 1:].mean(0)
    expected = (tokens @ weight).relu().view(10, 10)
    torch.testing.assert_close(panel.heat, expected / expected.max(), rtol=1e-4, atol=1e-5)


def test_grad_cam_says_when_there_is_nothing():
    model = Net().eval()
    nn.init.zeros_(model.head.weight)
    panel = grad_cam(model, torch.randn(1, 3, 16, 16))
    assert "depends on nothing" in panel.title
    assert not panel.heat.any()


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_nat", "test_dependencyvit", "test_efficientnet"])
def test_models_of_timm_and_ours(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    for panel in (grad_cam(model, x), receptive_field(model, x, (0.2, 0.9))):
        assert panel.heat.isfinite().all()
        assert 0 <= panel.heat.min() <= panel.heat.max() <= 1
    assert not any(module._forward_hooks for module in model.modules())
    assert not x.requires_grad


def test_receptive_field_of_one_convolution():
    """One place of a 4x4 convolution depends on its 4x4 pixels, and half of that lies in a square around it."""
    model = Net().eval()
    nn.init.ones_(model.embed.weight)
    panel = receptive_field(model, torch.randn(1, 3, 16, 24), (0.6, 0.1))
    expected = torch.zeros(16, 24)
    expected[8:12, 0:4] = 1
    torch.testing.assert_close(panel.heat, expected)
    assert panel.points.tolist() == [[pytest.approx(10 / 16), pytest.approx(2 / 24)]]
    assert "4x6 map: half of it within 3x3 pixels" in panel.title
    top, left, bottom, right = panel.boxes[0].tolist()
    assert round((bottom - top) * 16) == round((right - left) * 24) == 3


def test_tokens_in_an_order_of_their_own_are_left_out():
    """Hiera's blocks have theirs unit by unit, but for the last stage: a map of them would be shuffled."""
    model = timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 224, 224)
    (last,) = views._levels(model, x)[1]
    mine = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(last.to_map(last.value), mine)


@pytest.mark.parametrize("view", [grad_cam, receptive_field])
def test_models_without_maps(view):
    class Flat(nn.Module):
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 2)

        def forward(self, x):
            return self.fc(x.flatten(1))

    with pytest.raises(UserError, match="Flat has no maps"):
        view(Flat(), torch.randn(1, 3, 2, 2))
