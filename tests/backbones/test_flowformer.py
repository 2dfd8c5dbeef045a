"""Flowformer: recorded official outputs, checkpoints, other sizes, cost, and what it shows."""

import argparse

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image, load, weights
from panels import check_family_explains, explained
from tolerance import close, golden_close, op_close

from vizoo.backbones import flowformer
from vizoo.backbones.flowformer import checkpoint_filter_fn
from vizoo.backbones.layers import resampling
from vizoo.tools.profiler import count

MINI = {"img_size": 64, "embed_dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1), "num_classes": 10}


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_recorded_mini(grad):
    case = load("flowformer_mini_64")
    model = timm.create_model("flowformer_19", **MINI).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": weights(case.keys)}, model), strict=True)
    with torch.set_grad_enabled(grad):
        final, features = model.forward_intermediates(image(case.input_shape))
        golden_close(model.forward_head(final), case.outputs["logits"], "logits")
    for i, feature in enumerate(features):
        golden_close(feature.flatten(2).transpose(1, 2), case.outputs[f"feat{i}"], f"feature {i}")


def test_recorded_flowformer_19():
    case = load("flowformer_19")
    model = timm.create_model("flowformer_19").eval()
    model.load_state_dict(checkpoint_filter_fn({"model": weights(case.keys)}, model), strict=True)
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")


def test_official_file(tmp_path):
    """As the official training code writes it, with its command line; positions are resampled to another size."""
    case = load("flowformer_mini_64")
    state = weights(case.keys)
    saved = {"model": state, "epoch": 299, "scaler": {}, "args": argparse.Namespace(lr=5e-4, data_path="imagenet")}
    torch.save(saved, tmp_path / "checkpoint_best.pth")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "checkpoint_best.pth")}}
    given["pretrained_cfg_overlay"]["num_classes"] = 10
    model = timm.create_model("flowformer_19", **MINI, **given).eval()
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")
    larger = timm.create_model("flowformer_19", **{**MINI, "img_size": (96, 50)}, **given)
    grid = state["pos_embed"].transpose(1, 2).unflatten(2, (16, 16))
    expected = F.interpolate(grid, size=(24, 13), mode="bicubic", align_corners=False, antialias=True)
    close(larger.pos_embed.weight.permute(0, 3, 1, 2), expected, "rerun")
    with pytest.raises(ValueError, match="got pos_embed of 250 tokens, need a square number"):
        checkpoint_filter_fn({"pos_embed": state["pos_embed"][:, :250]}, model)


@pytest.mark.parametrize("size", [(33, 50), (96, 160), (101, 37)], ids=str)
def test_any_size(size):
    """Zeros below and to the right of the image and of every odd map, positions resampled to the padded image."""
    model = timm.create_model("test_flowformer").eval()
    torch.nn.init.normal_(model.pos_embed.weight)
    x = image((2, 3, *size))
    with torch.no_grad():
        found = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        x = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
        x = model.patch_embed.proj(x)
        positions = model.pos_embed.weight.permute(0, 3, 1, 2)
        x = x + F.interpolate(positions, size=x.shape[2:], mode="bicubic", align_corners=False, antialias=True)
        for i, stage in enumerate(model.stages):
            if i > 0:
                x = stage.downsample.proj(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
            x = stage.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            close(found[i].permute(0, 3, 1, 2), x, "rerun", f"stage {i}")
            assert x.shape[2:] == tuple(-(-n // (4 * 2**i)) for n in size)


def test_set_input_size_is_the_resampled_pass():
    """Once and for all gives what every pass would give."""
    model = timm.create_model("test_flowformer").eval()
    x = image((1, 3, 64, 130))
    with torch.no_grad():
        expected = model(x)
        model.set_input_size((64, 130))
        assert model.pos_embed.weight.shape == (1, 16, 33, 16)
        close(model(x), expected, "same")
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 64, 130)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_in_a_fixed_order(dtype, monkeypatch):
    """What stands in for a resampling without gradients of a fixed order gives the same, and the same gradient."""
    found = []
    for fixed in (False, True):
        monkeypatch.setattr(resampling, "_fixed_order", lambda x, fixed=fixed: fixed)
        positions = image((1, 7, 5, 3)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = resampling.position_map(positions, 4, 9)
        out.backward(image(out.shape, 1).to(dtype))
        assert out.dtype == dtype
        found.append((out.detach(), positions.grad))
    for actual, expected in zip(*found, strict=True):
        op_close(actual, expected.double(), grad=True)
    assert resampling.position_map(positions, 7, 5) is positions


def test_counted_cost():
    """That of the released model, and linear in the pixels: four times as many cost four times as much."""
    model = timm.create_model("flowformer_19", device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == 43_311_304
    macs = {side: count(model, torch.empty(1, 3, side, side, device="meta")).macs for side in (224, 448)}
    assert macs[224] == 6_869_661_696
    head = 768 * 1000
    assert macs[448] - head == 4 * (macs[224] - head)


def test_layer_scale_is_of_the_feed_forward_network():
    """Without it a block adds its attention, which has none."""
    block = timm.create_model("test_flowformer").stages[1].blocks[0].eval()
    x = torch.randn(1, 3, 5, 32)
    with torch.no_grad():
        block.layer_scale.gamma.zero_()
        close(block(x), x + block.attn(block.norm1(x)), "rerun")
        block.layer_scale.gamma.fill_(2.0)
        y = x + block.attn(block.norm1(x))
        close(block(x), y + 2 * block.mlp(block.norm2(y)), "rerun")


# explain


def test_explain_flowformer():
    """Competition, allocation and the weights of the token at a point, recomputed."""
    model = timm.create_model("test_flowformer")
    x = torch.randn(1, 3, 70, 100)
    panels = explained(model, x, point=(0.3, 0.9), stage=2, block=0)
    with torch.no_grad():
        tokens = model.stages[:2](model.pos_embed(model.patch_embed(x)))
        block = model.stages[2].blocks[0]
        tokens = block.norm1(model.stages[2].downsample(tokens))
        _, allocation, competition = block.attn.flows(tokens)
        assert tokens.shape == (1, 5, 7, 64)
        taken = block.attn.weights_at(tokens, 1 * 7 + 5) * 35
    for panel, flow in zip(panels, (competition, allocation, taken), strict=True):
        close(panel.heat, flow[0].mean(0).reshape(5, 7), "rerun")
        assert panel.area == (0, 0, 80 / 70, 112 / 100)
        assert panel.title.endswith("stage 2, block 0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, "got stage=4, need a whole number from 0 to 3"),
        ({"stage": -1}, "got stage=-1, need a whole number from 0 to 3"),
        ({"stage": 2, "block": 2}, "got block=2, need a whole number from -2 to 1"),
        ({"block": "x"}, "got block='x'"),
    ],
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_flowformer").explain(torch.randn(1, 3, 32, 32), **settings)


def test_explain_of_every_name():
    check_family_explains(flowformer)
