"""NAT, DiNAT, DiNAT_s and the isotropic models: recorded official outputs, a second forward pass on official keys."""

import csv
from importlib import resources

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image, load, weights
from panels import check_family_explains, explained
from timm.models import get_arch_pretrained_cfgs
from tolerance import close, golden_close
from zoo import build, gradients, overlay

import vizoo  # noqa: F401
from vizoo.backbones import nat
from vizoo.backbones.layers import NeighborhoodAttention
from vizoo.backbones.nat import _DENSE_TAGS, DILATIONS, NAT, checkpoint_filter_fn

# parameters and GMACs of the official models, each at its own size
OFFICIAL = {
    "nat_mini": (19984174, 2.69),
    "nat_tiny": (27901582, 4.30),
    "nat_small": (50743297, 7.77),
    "nat_base": (89769652, 13.68),
    "dinat_mini": (19984174, 2.69),
    "dinat_tiny": (27901582, 4.30),
    "dinat_small": (50719681, 7.77),
    "dinat_base": (89769652, 13.68),
    "dinat_large": (200943514, 30.46),
    "dinat_large_384": (200943514, 89.5),
    "dinat_large_384_11x11": (201144250, 92.1),
    "dinat_s_tiny": (28288354, 4.49),
    "dinat_s_small": (49606258, 8.74),
    "dinat_s_base": (87768224, 15.43),
    "dinat_s_large": (196532476, 34.48),
    "dinat_s_large_384": (196532476, 101.3),
}


@pytest.fixture(scope="module")
def golden_models():
    """Both recorded models, loaded strictly."""
    models = {}
    for case, name in (("nat_mini", "nat_mini"), ("dinat_mini_256x192", "dinat_mini")):
        models[case] = timm.create_model(name).eval()
        official = {"state_dict": {f"module.{k}": v for k, v in weights(load(case).keys).items()}}
        models[case].load_state_dict(checkpoint_filter_fn(official, models[case]), strict=True)
    return models


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("case", ["nat_mini", "dinat_mini_256x192"])
def test_recorded_outputs(golden_models, case, grad, fused):
    _, _, shape, outputs = load(case)
    for module in golden_models[case].modules():
        if isinstance(module, NeighborhoodAttention):
            module.fused_attn = fused
    with torch.set_grad_enabled(grad):
        golden_close(golden_models[case](image(shape)), outputs["logits"], case)


# a second implementation, written on the official keys: loops over positions, dense masks


def official_keys(form):
    """Names and shapes of an official checkpoint."""
    dim, depths, heads, K = form["dim"], form["depths"], form["heads"], form["kernel"]
    keys, flat, merging = {}, form["root"] == "flat", form["root"] == "layers"

    def linear(name, i, o, bias=True):
        keys[f"{name}.weight"] = [o, i]
        if bias:
            keys[f"{name}.bias"] = [o]

    def norm(name, c):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = [c], [c]

    stem = [(3, dim // 2, 3, ".0"), (dim // 2, dim, 3, ".1")]
    if flat or merging:
        stem = [(3, dim, 16 if flat else 4, "")]
    for i, o, k, leaf in stem:
        keys[f"patch_embed.proj{leaf}.weight"], keys[f"patch_embed.proj{leaf}.bias"] = [o, i, k, k], [o]
    norm("patch_embed.norm", dim)
    c = dim
    for level, depth in enumerate(depths):
        c = dim if flat else dim * 2**level
        for b in range(depth):
            p = f"layers.{level}" if flat else f"{form['root']}.{level}.blocks.{b}"
            norm(f"{p}.norm1", c)
            keys[f"{p}.attn.rpb"] = [heads[level], 2 * K - 1, 2 * K - 1]
            linear(f"{p}.attn.qkv", c, 3 * c)
            linear(f"{p}.attn.proj", c, c)
            norm(f"{p}.norm2", c)
            linear(f"{p}.mlp.fc1", c, 2 * c)
            linear(f"{p}.mlp.fc2", 2 * c, c)
            if form.get("gamma"):
                keys[f"{p}.gamma1"], keys[f"{p}.gamma2"] = [c], [c]
        if not flat and level < len(depths) - 1:
            p = f"{form['root']}.{level}.downsample"
            keys[f"{p}.reduction.weight"] = [2 * c, 4 * c] if merging else [2 * c, c, 3, 3]
            norm(f"{p}.norm", 4 * c if merging else 2 * c)
        if form.get("dense"):
            norm(f"norm{level}", c)
    if not form.get("dense"):
        norm("norm", c)
        linear("head", c, 1000)
    return {k: [shape, "torch.float32"] for k, shape in keys.items()}


def window(L, K, d):
    """Positions in the window of each position of an axis: shifted inward at the border, inside a dilation group."""
    rows = []
    for i in range(L):
        group = list(range(i % d, L, d))
        start = min(max(group.index(i) - K // 2, 0), len(group) - K)
        rows.append(group[start : start + K])
    return rows


def official_attention(state, p, x, heads, K, d):
    B, H0, W0, C = x.shape
    x = F.pad(x, (0, 0, 0, max(0, K * d - W0), 0, max(0, K * d - H0)))  # before the projection
    H, W = x.shape[1:3]
    qkv = F.linear(x, state[f"{p}.qkv.weight"], state[f"{p}.qkv.bias"])
    q, k, v = qkv.reshape(B, H * W, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    mask = torch.full((heads, H * W, H * W), -torch.inf)
    rpb, cols = state[f"{p}.rpb"], window(W, K, d)
    for i, row in enumerate(window(H, K, d)):
        for j, col in enumerate(cols):
            for y in row:
                bias = rpb[:, (y - i) // d + K - 1, [(n - j) // d + K - 1 for n in col]]
                mask[:, i * W + j, [y * W + n for n in col]] = bias
    out = (q * (C // heads) ** -0.5 @ k.transpose(2, 3) + mask).softmax(-1) @ v
    out = out.transpose(1, 2).reshape(B, H, W, C)[:, :H0, :W0]
    return F.linear(out, state[f"{p}.proj.weight"], state[f"{p}.proj.bias"])


def official_forward(state, x, form):
    """Outputs of the levels before the downsampler, and the logits unless the form is dense."""
    merging, flat = form["root"] == "layers", form["root"] == "flat"

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    if merging or flat:
        patch = 16 if flat else 4
        x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
        x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    else:
        for leaf in ("0", "1"):
            w, b = (state[f"patch_embed.proj.{leaf}.{t}"] for t in ("weight", "bias"))
            x = F.conv2d(x, w, b, stride=2, padding=1)
    x = norm("patch_embed.norm", x.permute(0, 2, 3, 1))
    levels = []
    for level, depth in enumerate(form["depths"]):
        for b in range(depth):
            p = f"layers.{level}" if flat else f"{form['root']}.{level}.blocks.{b}"
            gamma1, gamma2 = (state.get(f"{p}.gamma{n}", 1.0) for n in (1, 2))
            d = form["dilations"][level][b]
            x = x + gamma1 * official_attention(
                state, f"{p}.attn", norm(f"{p}.norm1", x), form["heads"][level], form["kernel"], d
            )
            y = F.linear(norm(f"{p}.norm2", x), state[f"{p}.mlp.fc1.weight"], state[f"{p}.mlp.fc1.bias"])
            x = x + gamma2 * F.linear(F.gelu(y), state[f"{p}.mlp.fc2.weight"], state[f"{p}.mlp.fc2.bias"])
        levels.append(x)
        p = f"{form['root']}.{level}.downsample"
        if f"{p}.reduction.weight" not in state:
            continue
        w = state[f"{p}.reduction.weight"]
        if merging:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = F.linear(norm(f"{p}.norm", torch.cat(corners, -1)), w)
        else:
            x = norm(f"{p}.norm", F.conv2d(x.permute(0, 3, 1, 2), w, stride=2, padding=1).permute(0, 2, 3, 1))
    if form.get("dense"):
        return [norm(f"norm{i}", f) for i, f in enumerate(levels)], None
    return levels, F.linear(norm("norm", x).mean((1, 2)), state["head.weight"], state["head.bias"])


FORMS = {  # tiny models with the layout of each official kind; the 58x75 image makes small and odd maps
    "dinat": {"root": "levels", "dilations": [[1], [1, 4], [1, 2], [1]], "depths": [1, 2, 2, 1]},
    "gamma": {"root": "levels", "dilations": [[1], [1, 4], [1, 2], [1]], "depths": [1, 2, 2, 1], "gamma": True},
    "dense": {"root": "levels", "dilations": [[2], [1, 3], [1], [1]], "depths": [1, 2, 1, 1], "dense": True},
    "dinat_s": {"root": "layers", "dilations": [[1, 4], [1], [1, 2], [1]], "depths": [2, 1, 2, 1]},
    "dense_s": {"root": "layers", "dilations": [[1, 3], [1], [2], [1]], "depths": [2, 1, 1, 1], "dense": True},
    "isotropic": {"root": "flat", "dilations": [[1], [2], [1], [2]], "depths": [1, 1, 1, 1]},
    "even window": {"root": "flat", "dilations": [[1], [1], [1], [1]], "depths": [1, 1, 1, 1], "kernel": 4},
}


@pytest.mark.parametrize("kind", FORMS)
def test_official_checkpoint(kind):
    """Features, logits and all gradients, from an official checkpoint loaded strictly."""
    form = {"dim": 16, "heads": [1, 2, 2, 4], "kernel": 3, **FORMS[kind]}
    official = {k: v.requires_grad_() for k, v in weights(official_keys(form)).items()}
    dense = bool(form.get("dense"))
    model = NAT(
        layout={"levels": "conv", "layers": "patch", "flat": "flat"}[form["root"]],
        embed_dim=form["dim"],
        depths=form["depths"],
        num_heads=form["heads"],
        kernel_size=form["kernel"],
        dilations=form["dilations"],
        mlp_ratio=2.0,
        ls_init_value=1e-5 if form.get("gamma") else None,
        num_classes=0 if dense else 1000,
        feature_norms=(0, 1, 2, 3) if dense else (),
    ).eval()
    given = {"state_dict": {**{f"backbone.{k}": v for k, v in official.items()}, "neck.conv.weight": torch.zeros(1)}}
    model.load_state_dict(checkpoint_filter_fn(given, model), strict=True)
    x = image((2, 3, 58, 75)).requires_grad_()
    final, features = model.forward_intermediates(x, output_fmt="NHWC")
    expected, logits = official_forward(official, x, form)
    for i, (feature, level) in enumerate(zip(features, expected, strict=True)):
        golden_close(feature, level, f"level {i}")
    found, truth = [*features[:-1], features[-1] if dense else model.forward_head(final)], expected
    if not dense:
        truth = [*expected[:-1], logits]
        golden_close(found[-1], logits, "logits")
    dx, *gradients = torch.autograd.grad(sum(f.square().mean() for f in found), [x, *model.parameters()])
    true_dx, *truths = torch.autograd.grad(sum(f.square().mean() for f in truth), [x, *official.values()])
    golden_close(dx, true_dx, "gradient of the image")
    truths = checkpoint_filter_fn(dict(zip(official, truths, strict=True)), model)
    for (key, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        golden_close(gradient, truths[key], f"gradient of {key}")
    with torch.no_grad():
        found = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    for i, (feature, level) in enumerate(zip(found[:-1], expected[:-1], strict=True)):
        golden_close(feature, level, f"level {i}, inference")


# sizes, names, options


def test_published_size():
    """The recorded counts, which other tests recount, are the published ones."""
    text = resources.files("vizoo.backbones").joinpath("models.csv").read_text(encoding="utf-8")
    table = {row["name"]: row for row in csv.DictReader(text.splitlines())}
    for name, (params, gmacs) in OFFICIAL.items():
        assert int(table[name]["params"]) == params, name
        assert round(int(table[name]["macs"]) / 1e9, 1 if gmacs > 50 else 2) == gmacs, name


def dilations_of(model):
    return [[block.attn.dilation for block in stage.blocks] for stage in model.stages]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nat_mini", [[1, 1, 1], [1] * 4, [1] * 6, [1] * 5]),
        ("nat_mini.upernet_ade20k", [[1, 1, 1], [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_mini.maskrcnn_3x_coco", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]),
        ("dinat_tiny.upernet_ade20k", [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        (
            "dinat_large.upernet_r640_ade20k",
            [[1, 20, 1], [1, 5, 1, 10], [*([1, 2, 1, 3, 1, 4, 1, 5] * 2), 1, 5], [1, 2, 1, 2, 1]],
        ),
        (
            "dinat_large_384_11x11.mask2former_ade20k_semantic",
            [[1, 14, 1], [1, 4, 1, 7], [*([1, 2, 1, 3] * 4), 1, 3], [1] * 5],
        ),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_s_small.cascade_maskrcnn_3x_coco", [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]),
        ("dinat_s_base.upernet_ade20k", [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2]]),
        (
            "dinat_s_large.upernet_r640_ade20k",
            [[1, 20], [1, 10], [*([1, 2, 1, 3, 1, 4, 1, 5] * 2), 1, 5], [1, 2]],
        ),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("dinat_isotropic_small", [[1], [2]] * 6),
        ("vitrpb_small", [[1]] * 12),
    ],
)
def test_dilations(name, expected):
    model = build(name, device="meta")
    assert dilations_of(model) == expected
    dense = "." in name
    assert [bool(list(norm.parameters())) for norm in model.feature_norms] == [dense] * len(model.stages)
    assert model.num_classes == (0 if dense else 1000)
    assert {block.attn.kernel_size for stage in model.stages for block in stage.blocks} == {
        14 if "vitrpb" in name else 11 if "11x11" in name else 7
    }


def test_every_published_file_has_a_tag():
    cfgs = {key: cfg for name in timm.list_models(module="nat") for key, cfg in get_arch_pretrained_cfgs(name).items()}
    assert len({cfg.url for cfg in cfgs.values() if cfg.url}) == 67
    classifiers = {"in1k", "in22k", "in22k_ft_in1k", "untrained"}
    for key, cfg in cfgs.items():
        assert (cfg.num_classes == 0) == (cfg.tag in _DENSE_TAGS) == (cfg.tag not in classifiers), key


def test_arguments_win_over_a_tag():
    model = timm.create_model("dinat_s_tiny.maskrcnn_3x_coco", device="meta", dilations="224", feature_norms=(3,))
    assert dilations_of(model) == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]
    assert [bool(list(norm.parameters())) for norm in model.feature_norms] == [False, False, False, True]


def test_presets_are_the_arguments():
    x = image((1, 3, 96, 64))
    state = timm.create_model("test_dinat_s").state_dict()
    outputs = []
    for dilations in ("det_s", [list(p) for p in DILATIONS["det_s"]], 1):
        model = timm.create_model("test_dinat_s", dilations=dilations).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            outputs.append(model(x))
    close(outputs[0], outputs[1], "same")
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["test_nat", "test_dinat_s", "test_nat_isotropic"])
def test_other_window(name):
    """Biases of another window are resized bicubically, each head for itself; the rest is loaded as it is."""
    source = timm.create_model(name)
    model = timm.create_model(name, kernel_size=5, **overlay(source.state_dict()))
    for key, value in model.state_dict().items():
        old = source.state_dict()[key]
        if key.endswith(".rpb"):
            assert value.shape == (old.shape[0], 9, 9)
            for head in range(len(old)):
                expected = F.interpolate(old[head][None, None], (9, 9), mode="bicubic", align_corners=False)[0, 0]
                close(value[head], expected, "rerun", key)
        else:
            close(value, old, "same", key)


def test_classifier_becomes_dense_backbone():
    """Norms that a classification checkpoint does not have keep their initial values; classifiers drop dense norms."""
    classifier = timm.create_model("test_nat")
    dense = timm.create_model("test_nat", num_classes=0, feature_norms=(0, 1, 2, 3), **overlay(classifier.state_dict()))
    close(dense.stages[2].blocks[1].attn.rpb, classifier.stages[2].blocks[1].attn.rpb, "same")
    assert "norm.weight" not in dense.state_dict()
    state = checkpoint_filter_fn(dense.state_dict(), timm.create_model("test_nat", num_classes=0))
    assert not [k for k in state if k.startswith("feature_norms.")]


def test_dense_checkpoint(tmp_path):
    """The file of a detector makes the official backbone and a classifier to train; a saved folder keeps the form."""
    name = "dinat_mini.maskrcnn_3x_coco"
    source = timm.create_model(name)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "official.pth")
    loaded = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "official.pth")}}
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True)
    folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    features = timm.create_model(name, features_only=True, **loaded).model
    classifier = timm.create_model(name, num_classes=5, **loaded)
    for model in (folder, features, classifier):
        assert dilations_of(model) == dilations_of(source)
        for key, value in model.state_dict().items():
            if not key.startswith("head."):
                close(value, source.state_dict()[key], "same", key)
    assert classifier.get_classifier().weight.shape == (5, 512)


def test_dense_features():
    """Each feature has its own norm, also when the backbone is cut."""
    backbone = timm.create_model("test_dinat_s", features_only=True, feature_norms=(0, 1, 2, 3))
    for parameter in backbone.model.feature_norms.parameters():
        torch.nn.init.normal_(parameter)
    x = image((1, 3, 70, 99))
    features = backbone(x)
    assert [tuple(f.shape) for f in features] == [(1, 16, 18, 25), (1, 32, 9, 13), (1, 64, 5, 7), (1, 128, 3, 4)]
    cut = timm.create_model("test_dinat_s", features_only=True, feature_norms=(0, 1, 2, 3), out_indices=(0, 2))
    cut.load_state_dict({k: v for k, v in backbone.state_dict().items() if k in cut.state_dict()}, strict=True)
    for found, expected in zip(cut(x), (features[0], features[2]), strict=True):
        close(found, expected, "same")
    sum(f.sum() for f in cut(x)).backward()
    gradients(cut)


def test_no_weight_decay():
    model = timm.create_model("test_dinat_s")
    assert model.no_weight_decay() == {n for n, p in model.named_parameters() if p.ndim == 3}


@pytest.mark.parametrize("size", [(1, 1), (33, 200), (193, 65)], ids=str)
@pytest.mark.parametrize("name", ["test_nat", "test_dinat_s", "test_nat_isotropic"])
def test_any_size(name, size):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(torch.randn(2, 3, *size))
    assert torch.isfinite(final).all()
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape[2:] == tuple(-(-n // info["reduction"]) for n in size)


def test_attention_without_biases():
    """Without biases a padded token is zero; the bias of positions can be left out."""
    torch.manual_seed(3)
    layer = NeighborhoodAttention(16, 2, kernel_size=5, qkv_bias=False, rpb=False)
    assert sorted(layer.state_dict()) == ["proj.bias", "proj.weight", "qkv.weight"]
    x = image((1, 3, 7, 16))
    state = {f"a.{k}": v for k, v in layer.state_dict().items()}
    state |= {"a.qkv.bias": torch.zeros(48), "a.rpb": torch.zeros(2, 9, 9)}
    golden_close(layer(x), official_attention(state, "a", x, 2, 5, 1), "no biases")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layout": "swin"}, "layout='swin'"),
        ({"dilations": "large"}, "dilations='large'"),
        ({"dilations": 0}, "dilations=0"),
        ({"dilations": (1, 2, 1)}, r"dilations=\(1, 2, 1\)"),
        ({"dilations": (1, (), 1, 1)}, r"dilations=\(1, \(\), 1, 1\)"),
        ({"kernel_size": 1}, "kernel_size=1"),
        ({"num_heads": (3, 4, 8, 16)}, "embed_dim=16 and num_heads=\\(3, 4, 8, 16\\)"),
        ({"feature_norms": (4,)}, r"feature_norms=\(4,\)"),
        ({"feature_norms": (1,), "features_only": True, "feature_cls": "hook"}, "feature_cls='hook'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_nat", **kwargs)


# what it sees


def edges(panel, size):
    """Boxes of a panel in pixels, by the rows and columns that they are made of."""
    boxes = (panel.boxes * torch.tensor([*size, *size])).round().int()
    return [sorted({tuple(b) for b in boxes[:, [i, i + 2]].tolist()}) for i in (0, 1)]


def test_explain_windows():
    """Neighbourhoods of 3x3 of a 96x160 image, in pixels, by hand: shifted inwards at the border, sparse if dilated."""
    model, x = timm.create_model("test_nat"), image((1, 3, 96, 160))
    corner, middle, last = (explained(model, x, point=(p, p)) for p in (0.0, 0.5, 1.0))
    assert [p.title for p in corner] == [
        "Stage 0, block 0: 3x3 neighbourhood",
        "Stage 1, block 0: 3x3 neighbourhood",
        "Stage 1, block 1: 3x3 neighbourhood, dilation 4",
        "Stage 2, block 0: 3x3 neighbourhood",
        "Stage 2, block 1: 3x3 neighbourhood, dilation 2",
        "Stage 3, block 0: 3x3 neighbourhood",
    ]
    assert [edges(p[0], (96, 160)) for p in (corner, middle, last)] == [
        [[(0, 12)], [(0, 12)]],
        [[(44, 56)], [(76, 88)]],
        [[(84, 96)], [(148, 160)]],
    ]
    assert [edges(p[2], (96, 160)) for p in (corner, middle, last)] == [  # a map of 12x20 tokens of 8 pixels
        [[(0, 8), (32, 40), (64, 72)]] * 2,
        [[(16, 24), (48, 56), (80, 88)], [(48, 56), (80, 88), (112, 120)]],
        [[(24, 32), (56, 64), (88, 96)], [(88, 96), (120, 128), (152, 160)]],
    ]
    assert [[round(e * n) for e, n in zip(p[2].area, (96, 160) * 2)] for p in (corner, last)] == [  # noqa: B905
        [-12, -12, 84, 84],  # 12 pixels, a token and a half, more than the tokens on each side
        [12, 76, 108, 172],
    ]
    close(last[2].points[0], torch.tensor([92 / 96, 156 / 160]), "rerun")


def test_explain_chooses_blocks():
    """Six panels at most, the widest of every map among them; or those that are asked for."""
    model = timm.create_model("test_nat", depths=(2, 2, 2, 2), dilations=((1, 4), (1, 3), (1, 2), (2, 1)))
    x = image((1, 3, 64, 64))
    assert [p.title[:16] + p.title[-1] for p in explained(model, x)] == [
        "Stage 0, block 0d",
        "Stage 0, block 14",
        "Stage 1, block 0d",
        "Stage 1, block 13",
        "Stage 2, block 12",
        "Stage 3, block 02",
    ]
    assert [p.title[:16] for p in explained(model, x, blocks=[-1, 2])] == ["Stage 3, block 1", "Stage 1, block 0"]


@pytest.mark.parametrize("size", [(33, 70), (16, 16)], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_nat", {"in_chans": 1, "dtype": torch.bfloat16}),
        ("test_dinat_s", {"feature_norms": (0, 1, 2, 3), "num_classes": 0}),
        ("test_nat_isotropic", {"kernel_size": 4}),
    ],
    ids=["nat", "dinat_s", "isotropic"],
)
def test_explain_any_model(name, kwargs, size):
    model = timm.create_model(name, **kwargs)
    x = image((1, kwargs.get("in_chans", 3), *size)).to(kwargs.get("dtype", torch.float32))
    for panel in explained(model, x, point=(0.9, 0.1)):
        total = panel.heat.sum()
        close(total, torch.ones_like(total), "rerun")
        inside = (panel.boxes[:, :2] <= panel.points) & (panel.points < panel.boxes[:, 2:])
        assert inside.all(1).any()  # a token is in its own neighbourhood


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"point": (-0.5, 0.5)}, r"got point=\(-0.5, 0.5\), need 2 numbers from 0 to 1"),
        ({"point": 0.5}, "got point=0.5"),
        ({"blocks": (0, 6)}, r"got blocks=\(0, 6\), need different numbers from -6 to 5"),
        ({"blocks": ()}, r"got blocks=\(\)"),
    ],
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_nat").explain(image((1, 3, 32, 32)), **settings)


def test_explain_of_every_name():
    check_family_explains(nat)
