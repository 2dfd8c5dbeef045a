"""LITv2: official outputs, reproduced through ``checkpoint_filter_fn``, and what it shows."""

import math
import re

import pytest
import timm
import torch
from golden import image, load, thin, weights
from panels import check_family_explains, explained
from tolerance import close, golden_close

from vizoo.backbones import litv2
from vizoo.backbones.litv2 import checkpoint_filter_fn, spectrum


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_litv2_s_classification(fused, grad):
    keys, meta, shape, outputs = load("litv2_s")
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model("litv2_s").eval()
    finally:
        timm.layers.set_fused_attn(True)
    official = {"model": weights(keys), "epoch": 300}
    model.load_state_dict(checkpoint_filter_fn(official, model))
    with torch.set_grad_enabled(grad):
        final, features = model.forward_intermediates(image(shape))
        golden_close(model.forward_head(final), outputs["logits"], "logits")
        golden_close(model.forward_head(final, pre_logits=True), outputs["pre_logits"], "pre_logits")
    for name, feature in thin(features, meta["outputs"]["feat_strides_c_s"]).items():
        golden_close(feature, outputs[name], name)


@pytest.mark.parametrize(("case", "norms"), [("litv2_s_det", (1, 2, 3)), ("litv2_s_seg_oddsize", (0, 1, 2, 3))])
def test_litv2_s_dense(case, norms, tmp_path):
    keys, meta, shape, outputs = load(case)
    detector = {f"backbone.{k}": v for k, v in weights(keys).items()}
    detector["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"meta": {}, "state_dict": detector}, tmp_path / "detector.pth")
    backbone = timm.create_model(
        "litv2_s",
        features_only=True,
        feature_norms=norms,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "detector.pth")},
    ).eval()
    with torch.no_grad():
        features = backbone(image(shape))
    for name, feature in thin(features, meta["outputs"]["feat_strides_c_s"]).items():
        golden_close(feature, outputs[name], name)


@pytest.mark.parametrize("norms", [(1, 2, 3), (0, 1, 2, 3)])
def test_litv2_dense_keys_load_strictly(norms):
    keys, _, _, _ = load("litv2_s_det" if len(norms) == 3 else "litv2_s_seg_oddsize")
    model = timm.create_model("litv2_s", num_classes=0, feature_norms=norms)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(keys)}, model), strict=True)


# explain


def test_spectrum_of_a_wave():
    """Two peaks at its frequency, of half its amplitude each, the rest rounding errors; nothing of a map of zeros."""
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    wave = 3 * torch.cos(2 * math.pi * (2 * row / 8 - 3 * column / 12))
    found = spectrum(wave[..., None].expand(-1, -1, 5))
    peaks = {(6, 3), (2, 9)}  # of rows from -4 and columns from -6
    assert {tuple(place) for place in (found > -4).nonzero().tolist()} == peaks
    close(found[[6, 2], [3, 9]], torch.full((2,), math.log10(1.5)), "rerun")
    assert spectrum(torch.zeros(3, 4, 2)).isfinite().all()


def test_explain_litv2():
    """Spectra and sizes of the last block of the first stage with both kinds of heads, recomputed."""
    model = timm.create_model("test_litv2")
    x = torch.randn(1, 3, 70, 100)
    high, low, ratio, *maps = explained(model, x)
    with torch.no_grad():
        tokens = model.stages[:2](model.patch_embed(x))
        tokens = model.stages[2].blocks[0](model.stages[2].downsample(tokens))
        block = model.stages[2].blocks[1]
        out = block.attn(block.norm1(tokens))[0]
    assert out.shape == (4, 6, 64)
    for part, spectral, spatial in zip(out.split(32, -1), (high, low), maps, strict=True):
        amplitude = torch.fft.fft2(part.double(), dim=(0, 1)).abs().mean(-1) / 24
        close(spectral.heat, amplitude.roll((2, 3), (0, 1)).log10().float(), "rerun")
        close(spatial.heat, part.square().mean(-1).sqrt(), "rerun")
        assert spatial.area == (0, 0, 64 / 70, 96 / 100)  # the last rows and columns are left out
    close(ratio.heat, high.heat - low.heat, "same")
    assert high.alone
    assert high.limits == low.limits


@pytest.mark.parametrize(
    ("kwargs", "settings", "titles"),
    [
        ({"alpha": 0.0}, {}, ["Hi-Fi (4 of 4 heads)"] * 2),
        ({"alpha": 1.0, "in_chans": 1}, {}, ["Lo-Fi (4 of 4 heads)"] * 2),
        ({}, {"stage": 3}, ["Attention (8 of 8 heads)"] * 2),
        (
            {"window_size": (0, 3, 2, 1), "alpha": 0.5},
            {"block": 0},
            ["Hi-Fi (1 of 2 heads)", "Lo-Fi (1 of 2 heads)"] * 2,
        ),
    ],
    ids=str,
)
def test_explain_litv2_shows_the_heads_there_are(kwargs, settings, titles):
    model = timm.create_model("test_litv2", **kwargs).bfloat16()
    panels = explained(model, torch.randn(1, model.in_chans, 64, 96).bfloat16(), **settings)
    assert [p.title.partition(":")[0] for p in panels if p.title.startswith(("Hi-Fi (", "Lo-Fi", "Att"))] == titles


@pytest.mark.parametrize(
    ("kwargs", "settings", "message"),
    [
        ({}, {"stage": 1}, "got stage=1, need a stage with attention: 2, 3"),
        ({}, {"block": 2}, "got block=2, need a whole number from -2 to 1"),
        ({"window_size": (0, 0, 0, 0)}, {}, "got stage=None, need a stage with attention: there is none"),
    ],
    ids=str,
)
def test_explain_litv2_refuses(kwargs, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("test_litv2", **kwargs).explain(torch.zeros(1, 3, 64, 64), **settings)


def test_every_litv2_explains():
    check_family_explains(litv2)
