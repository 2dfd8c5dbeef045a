"""Outputs of the official models, reproduced through each family's ``checkpoint_filter_fn``."""

from pathlib import Path

import pytest
import timm
import torch
from golden import error, image, load, weights
from tolerance import GOLDEN

import vizoo  # noqa: F401
from vizoo.backbones.layers import HiLo
from vizoo.backbones.litv2 import checkpoint_filter_fn

CASES = Path(__file__).parent / "golden"
HILO = [
    (path, case) for path in ("litv2_hilo_14x14", "litv2_hilo_pad") for case in load(CASES / f"{path}.npz")[1]["cases"]
]


def assert_golden(actual, expected, name):
    assert actual.shape == expected.shape, name
    assert error(actual, expected) <= GOLDEN, f"{name}: {error(actual, expected):.2e}"


def thin(features, strides):
    return {
        k: f[:, :: strides[k][0], :: strides[k][1], :: strides[k][1]]
        for k, f in zip(sorted(strides), features, strict=True)
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_litv2_s_classification(fused, grad):
    keys, meta, shape, outputs = load(CASES / "litv2_s.npz")
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model("litv2_s").eval()
    finally:
        timm.layers.set_fused_attn(True)
    official = {"model": weights(keys), "epoch": 300}
    model.load_state_dict(checkpoint_filter_fn(official, model))
    with torch.set_grad_enabled(grad):
        final, features = model.forward_intermediates(image(shape))
        assert_golden(model.forward_head(final), outputs["logits"], "logits")
        assert_golden(model.forward_head(final, pre_logits=True), outputs["pre_logits"], "pre_logits")
    for name, feature in thin(features, meta["outputs"]["feat_strides_c_s"]).items():
        assert_golden(feature, outputs[name], name)


@pytest.mark.parametrize(("case", "norms"), [("litv2_s_det", (1, 2, 3)), ("litv2_s_seg_oddsize", (0, 1, 2, 3))])
def test_litv2_s_dense(case, norms, tmp_path):
    keys, meta, shape, outputs = load(CASES / f"{case}.npz")
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
        assert_golden(feature, outputs[name], name)


@pytest.mark.parametrize("norms", [(1, 2, 3), (0, 1, 2, 3)])
def test_litv2_dense_keys_load_strictly(norms):
    keys, _, _, _ = load(CASES / ("litv2_s_det.npz" if len(norms) == 3 else "litv2_s_seg_oddsize.npz"))
    model = timm.create_model("litv2_s", num_classes=0, feature_norms=norms)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(keys)}, model), strict=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("path", "case"), HILO)
def test_hilo(path, case, fused):
    keys, meta, shape, outputs = load(CASES / f"{path}.npz")
    args = dict(meta["cases"][case])
    size = (args.pop("H"), args.pop("W"))
    layer = HiLo(**args)
    layer.fused_attn = fused
    state = weights(keys)
    layer.load_state_dict({k.removeprefix(f"{case}."): v for k, v in state.items() if k.startswith(f"{case}.")})
    x = image(shape)[:, : size[0] * size[1]].contiguous().requires_grad_()
    out = layer(x, size)
    assert_golden(out, outputs[case], case)
    with torch.no_grad():
        assert_golden(layer(x, size), outputs[case], f"{case} inference")
    if f"{case}_dx" in outputs:
        (dx,) = torch.autograd.grad(out, x, image(out.shape, seed=1))
        assert_golden(dx, outputs[f"{case}_dx"], f"{case} input gradient")
