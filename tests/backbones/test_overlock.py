"""Official outputs of OverLoCK: the whole net in both forms, its dense backbone, its focus blocks."""

import copy
import re

import pytest
import timm
import torch
from golden import image, load, weights
from panels import check_family_explains, explained
from timm.utils.model import reparameterize_model
from tolerance import close, golden_close, golden_gradients
from zoo import build

import vizoo  # noqa: F401
from vizoo.backbones import overlock
from vizoo.backbones.overlock import FocusBlock, checkpoint_filter_fn
from vizoo.tools.profiler import count

# parameters with the auxiliary head and without, GMACs: training form, then merged form
OFFICIAL = {
    "overlock_xt": ((17307272, 16969600, 2.863), (16791384, 16453712, 2.701)),
    "overlock_t": ((34990472, 34476448, 5.993), (33981064, 33467040, 5.646)),
    "overlock_s": ((58309772, 57795748, 10.437), (56670476, 56156452, 9.894)),
    "overlock_b": ((98012968, 97434816, 17.963), (95520680, 94942528, 17.096)),
}
TRAINED = ("rpb1", "rpb2", "weight_proj.weight", "weight_proj.bias")  # with recorded gradients
FOCUS = {"use_prior": False, "kernel_size": 13}, {"use_prior": True, "kernel_size": 7}


def overlock_t(official, **kwargs):
    """OverLoCK-T that took an official checkpoint strictly."""
    model = timm.create_model("overlock_t", **kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(official, model), strict=True)
    return model


@pytest.fixture(scope="module")
def classifier():
    """The classification case in training form."""
    return overlock_t({"state_dict": weights(load("overlock_t").keys)}, aux_head=True)


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_classification(classifier, grad):
    case = load("overlock_t")
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        for name, module in classifier.named_children()
    ]
    with torch.set_grad_enabled(grad):
        golden_close(classifier(image(case.input_shape)), case.outputs["logits"], "logits")
        golden_close(classifier.aux_head(seen["blocks4"]).flatten(1), case.outputs["aux"], "aux")
    for hook in hooks:
        hook.remove()
    focus3 = seen["sub_blocks3"]
    golden_close(seen["blocks1"][:, ::4, ::4, ::4], case.outputs["stage1"], "stage 1")
    golden_close(seen["blocks2"][:, ::8, ::2, ::2], case.outputs["stage2"], "stage 2")
    golden_close(seen["blocks3"][:, ::16], case.outputs["base3"], "Base-Net")
    golden_close(seen["blocks4"][:, ::16], case.outputs["overview"], "Overview-Net")
    golden_close(seen["high_level_proj"][:, ::4], case.outputs["prior"], "context prior")
    golden_close(focus3[:, :256][:, ::16], case.outputs["focus3_x"], "Focus-Net, stride 16")
    golden_close(focus3[:, 256:][:, ::8], case.outputs["focus3_ctx"], "context stream")
    golden_close(seen["sub_blocks4"][:, ::16], case.outputs["focus4"], "Focus-Net, stride 32")


@pytest.mark.parametrize("how", ["model", "timm", "checkpoint"])
def test_merged_by_us(classifier, how):
    """A trained model merged in place, by timm's tool, or while it is loaded answers as before."""
    case = load("overlock_t")
    if how == "model":
        model = copy.deepcopy(classifier)
        model.reparameterize()
        model.reparameterize()
        assert model._model_args["deploy"] is True
    elif how == "timm":
        model = reparameterize_model(classifier)
    else:
        model = overlock_t({"model": weights(case.keys)}, deploy=True, aux_head=True)
    official = {k: shape for k, (shape, _) in load("overlock_t_reparam").keys.items()}
    official["head.4.weight"] = [1000, 1024]  # a linear layer here
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == official
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")


def test_official_merged_weights():
    case = load("overlock_t_reparam")
    official = {f"module.{k}": v for k, v in weights(case.keys).items()}
    model = overlock_t({"model": official, "epoch": 300}, deploy=True, aux_head=True)
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")
        _, overview = model._pyramid(image(case.input_shape), 2)
        golden_close(model.aux_head(overview).flatten(1), case.outputs["aux"], "aux")
    bare = overlock_t(official, deploy=True)  # the auxiliary head is left out
    with torch.no_grad():
        golden_close(bare(image(case.input_shape)), case.outputs["logits"], "logits without auxiliary head")
    with pytest.raises(ValueError, match="deploy=True"):
        checkpoint_filter_fn(official, timm.create_model("overlock_t", device="meta"))


def test_merged_tag_builds_merged_model():
    model = timm.create_model("overlock_t.reparam_in1k", device="meta")
    assert "blocks1.0.proj.1.lk_origin.bias" in model.state_dict()
    assert model._model_args["deploy"] is True
    model = timm.create_model("overlock_t.maskrcnn_1x_coco", device="meta")
    assert "extra_norm.4.weight" in model.state_dict()
    assert model.num_classes == 0


def test_segmentation_backbone(tmp_path):
    case = load("overlock_t_seg_192x256")
    segmentor = {f"backbone.{k}": v for k, v in weights(case.keys).items()}
    segmentor["decode_head.conv_seg.weight"] = torch.zeros(1)
    torch.save({"meta": {}, "state_dict": segmentor}, tmp_path / "segmentor.pth")
    backbone = timm.create_model(
        "overlock_t",
        features_only=True,
        dense="seg",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "segmentor.pth")},
    ).eval()
    with torch.no_grad():
        features = backbone(image(case.input_shape))
    assert [list(f.shape) for f in features] == case.meta["full_shapes"]
    assert {k.removeprefix("model.") for k in backbone.state_dict()} == case.keys.keys()
    for i, (feature, (c, s)) in enumerate(zip(features, ((8, 4), (8, 2), (16, 1), (16, 1)), strict=True)):
        golden_close(feature[:, ::c, ::s, ::s], case.outputs[f"feat{i}"], f"level {i}")


def test_detection_backbone():
    """The detection backbone is the segmentation one, with the overview added to its last level."""
    case = load("overlock_t_seg_192x256")
    keys = {
        **case.keys,
        **{f"extra_norm.4.{leaf}": [[512], "torch.float32"] for leaf in ("weight", "bias")},
        "h_proj.0.weight": [[640, 512, 1, 1], "torch.float32"],
        "h_proj.0.bias": [[640], "torch.float32"],
        "h_proj.1.weight": [[640, 1, 1, 1], "torch.float32"],
        "h_proj.1.bias": [[640], "torch.float32"],
    }
    state = weights(keys)
    model = overlock_t({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, dense="det")
    assert model.state_dict().keys() == keys.keys()
    x = image(case.input_shape)
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
        for i, (c, s) in enumerate(((8, 4), (8, 2), (16, 1))):
            golden_close(features[i][:, ::c, ::s, ::s], case.outputs[f"feat{i}"], f"level {i}")
        _, overview = model._pyramid(x, 2)
        added = torch.nn.functional.layer_norm(
            overview.permute(0, 2, 3, 1), (512,), state["extra_norm.4.weight"], state["extra_norm.4.bias"], 1e-6
        ).permute(0, 3, 1, 2)
        added = torch.nn.functional.conv2d(added, state["h_proj.0.weight"], state["h_proj.0.bias"])
        added = added * state["h_proj.1.weight"].view(1, -1, 1, 1) + state["h_proj.1.bias"].view(1, -1, 1, 1)
        golden_close((features[3] - added)[:, ::16], case.outputs["feat3"], "level 3")


def test_classifier_becomes_dense_backbone(classifier):
    """Norms that a classification checkpoint does not have keep their initial values; classifiers drop dense norms."""
    dense = timm.create_model("overlock_t", dense="det")
    state = checkpoint_filter_fn(classifier.state_dict(), dense)
    dense.load_state_dict(state, strict=True)
    close(dense.high_level_proj.weight, classifier.high_level_proj.weight, "same")
    state = checkpoint_filter_fn(dense.state_dict(), timm.create_model("overlock_t", num_classes=0))
    assert not [k for k in state if re.match(r"extra_norm|h_proj|aux_head", k)]


@pytest.mark.parametrize("kwargs", FOCUS, ids=["first_k13", "mid_k7_small"])
def test_focus_block(kwargs):
    case = load("overlock_dynblock_mid_k7_small" if kwargs["use_prior"] else "overlock_dynblock_first_k13")
    block = FocusBlock(32, 16, num_heads=2, ls_init_value=1, **kwargs).eval()
    block.load_state_dict(weights(case.keys), strict=True)
    B, _, H, W = case.input_shape
    x = image(case.input_shape).requires_grad_()
    context, prior = image((B, 16, H, W), seed=11), image((B, 16, H, W), seed=12)
    out = block(torch.cat([x, context], dim=1), prior)
    golden_close(out, case.outputs["out"], "output")
    golden_gradients(out, {"input": x, **{n: block.get_parameter(n) for n in TRAINED}}, case.outputs, seed=7)
    with torch.no_grad():
        golden_close(block(torch.cat([x, context], dim=1), prior), case.outputs["out"], "inference")


def test_auxiliary_head():
    """In training it adds its logits, in evaluation the output is a tensor; it follows the classifier."""
    model = timm.create_model("test_overlock", aux_head=True, num_classes=7)
    out = model.train()(torch.randn(2, 3, 96, 96))
    assert {k: v.shape for k, v in out.items()} == {"main": (2, 7), "aux": (2, 7)}
    (out["main"].mean() + 0.4 * out["aux"].mean()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 96, 96))["aux"].shape == (2, 3)
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert timm.create_model("test_overlock").train()(torch.randn(2, 3, 96, 96)).shape == (2, 1000)


@pytest.mark.parametrize("size", [(1, 1), (33, 200), (193, 65)], ids=str)
def test_any_size(size):
    model = timm.create_model("test_overlock").eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(torch.randn(2, 3, *size))
    assert torch.isfinite(final).all()
    h, w = size
    for level, feature in enumerate(features):
        for _ in range(1 if level else 2):
            h, w = -(-h // 2), -(-w // 2)
        assert feature.shape[2:] == (h, w)


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("merged", [False, True], ids=["training", "merged"])
def test_size_of_every_form(name, merged):
    with_aux, without, gmacs = OFFICIAL[name][merged]
    for aux, expected in ((True, with_aux), (False, without)):
        model = build(name, device="meta", deploy=merged, aux_head=aux)
        assert sum(p.numel() for p in model.parameters()) == expected
    assert round(count(model, torch.empty(1, 3, 224, 224, device="meta")).macs / 1e9, 3) == gmacs


# what it sees


def test_explain_windows():
    """Kernels of 13x13 and 5x5 at stride 16, 7x7 and 5x5 at stride 32, of a 320x256 image, in pixels, by hand."""
    model, x = timm.create_model("test_overlock"), image((1, 3, 320, 256))
    pixels = torch.tensor([320, 256, 320, 256])

    def seen(point):
        overview, *kernels = explained(model, x, point=point)
        assert overview.heat.shape == (10, 8)
        return [(p.title, *(p.boxes * pixels).round().int().tolist()) for p in kernels]

    corner, middle, last = seen((0.0, 0.0)), seen((0.5, 0.5)), seen((1.0, 1.0))
    assert corner[0] == ("Stage 3, block 1: 5x5 kernel, mean of 4 groups", [0, 0, 80, 80])
    assert corner[1] == ("Stage 3, block 1: 13x13 kernel, mean of 4 groups", [0, 0, 208, 208])
    assert corner[2][0] < corner[3][0]  # two groups
    assert corner[4] == ("Stage 4, block 0: 5x5 kernel, mean of 4 groups", [0, 0, 160, 160])
    assert [box for _, box in middle[:4]] == [[128, 96, 208, 176], *[[64, 32, 272, 240]] * 3]
    assert [box for _, box in last[4:]] == [[160, 96, 320, 256], *[[96, 32, 320, 256]] * 3]


def test_explain_groups():
    """The two groups whose large kernels differ most."""
    model = timm.create_model("test_overlock")
    block = model.sub_blocks4[0]
    with torch.no_grad():
        block.rpb2[2].normal_()
        block.rpb2[1].normal_()
    panels = explained(model, image((1, 3, 224, 224)), blocks=[-1])
    assert [p.title[-7:] for p in panels[3:]] == ["group 2", "group 3"]
    assert len(panels) == 5


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({"in_chans": 1, "aux_head": True}, (33, 200)),
        ({"deploy": True}, (200, 33)),
        ({"deploy": True, "dtype": torch.bfloat16}, (16, 16)),  # its large convolutions are slow on a CPU
        ({"dense": "seg"}, (16, 16)),
        ({"dense": "det"}, (33, 200)),
    ],
    ids=str,
)
def test_explain_any_model(kwargs, size):
    """Also on maps smaller than the kernel, which are worked on at a larger size: kernels stay in the map."""
    model = timm.create_model("test_overlock", **kwargs)
    x = image((1, kwargs.get("in_chans", 3), *size)).to(kwargs.get("dtype", torch.float32))
    _, *kernels = explained(model, x, point=(0.9, 0.1))
    for panel, stride in zip(kernels, [16] * 4 + [32] * 4, strict=True):
        total = panel.heat.sum()
        close(total, torch.ones_like(total), "rerun")
        edge = torch.tensor([-(-n // stride) * stride / n for n in size])
        assert (panel.boxes[0, 2:] <= edge + 1e-5).all()
        assert (panel.boxes[0, :2] <= panel.points[0]).all()
        assert (panel.points[0] < panel.boxes[0, 2:]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"point": (0.5, 2)}, r"got point=\(0.5, 2\), need 2 numbers from 0 to 1"),
        ({"blocks": (3,)}, r"got blocks=\(3,\), need different numbers from -3 to 2"),
    ],
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_overlock").explain(image((1, 3, 32, 32)), **settings)


def test_explain_of_what_is_left():
    """Pruned to stride 16 the model shows one stage; without Focus-Net it has nothing to show."""
    model, x = timm.create_model("test_overlock"), image((1, 3, 64, 64))
    model.prune_intermediate_layers([2])
    assert {p.title[:7] for p in explained(model, x)} == {"Overvie", "Stage 3"}
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="without Focus-Net"):
        model.explain(x)


def test_explain_of_every_name():
    check_family_explains(overlock)
