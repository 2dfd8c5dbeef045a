"""Official outputs of LITv2, reproduced through ``checkpoint_filter_fn``."""

import pytest
import timm
import torch
from golden import image, load, thin, weights
from tolerance import golden_close

import vizoo  # noqa: F401
from vizoo.backbones.litv2 import checkpoint_filter_fn


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
    for feature, (name, (c, s)) in zip(features, meta["outputs"]["feat_strides_c_s"].items(), strict=True):
        golden_close(thin(feature, (1, c, s, s)), outputs[name], name)


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
    for feature, (name, (c, s)) in zip(features, meta["outputs"]["feat_strides_c_s"].items(), strict=True):
        golden_close(thin(feature, (1, c, s, s)), outputs[name], name)


@pytest.mark.parametrize("norms", [(1, 2, 3), (0, 1, 2, 3)])
def test_litv2_dense_keys_load_strictly(norms):
    keys, _, _, _ = load("litv2_s_det" if len(norms) == 3 else "litv2_s_seg_oddsize")
    model = timm.create_model("litv2_s", num_classes=0, feature_norms=norms)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(keys)}, model), strict=True)
