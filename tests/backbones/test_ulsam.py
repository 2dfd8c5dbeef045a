"""The paper's MobileNets with ULSAM: costs, places, weights, features."""

import csv
import inspect
from importlib import resources

import pytest
import timm
import torch
from panels import check_family_explains, explained
from tolerance import close

from vizoo.backbones import ulsam as family
from vizoo.backbones.layers import ULSAM
from vizoo.backbones.ulsam import checkpoint_filter_fn
from vizoo.tools.profiling.counting import count, fvcore_counts


def table():
    """Rows of the family's docstring by name."""
    lines = [line.split() for line in inspect.getdoc(family).splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0].startswith("mobilenetv")}


def costs(name, **kwargs):
    """Parameters, multiply-accumulates, and those of fvcore with norms, in millions."""
    model = timm.create_model(name, **kwargs).eval()
    x = torch.zeros(1, 3, 224, 224)
    found = count(model, x)
    assert found.uncounted == {}
    return found.params / 1e6, found.macs / 1e6, fvcore_counts(model, x, contractions=False)[""] / 1e6


def test_table_has_every_model():
    text = resources.files("vizoo.backbones").joinpath("models.csv").read_text(encoding="utf-8")
    recorded = {r["name"]: r["paper_top1"] or "-" for r in csv.DictReader(text.splitlines()) if "_ulsam_" in r["name"]}
    stated = {name: row[-1] for name, row in table().items() if "_ulsam_" in name}
    assert stated == {k: v for k, v in recorded.items() if not k.startswith("test_")}
    assert set(timm.list_models("mobilenet*_ulsam_*")) == stated.keys()


@pytest.mark.parametrize("name", table())
def test_costs_in_table(name):
    """Ours are exact; the paper's FLOPs differ from its plain MobileNet's by what ours differ from timm's."""
    *ours, _, flops, _ = table()[name]
    found = costs(name)
    assert [f"{found[0]:.4f}", f"{found[1]:.2f}", f"{found[2]:.2f}"] == ours
    if "_ulsam_" in name:
        paper = {"mobilenetv1_100": 569, "mobilenetv1_075": 325, "mobilenetv1_050": 149, "mobilenetv2_100": 300}
        plain = timm.create_model(name, device="meta", ulsam_replace=(), ulsam_insert=())
        assert not [m for m in plain.modules() if isinstance(m, ULSAM)]
        difference = found[1] - count(plain, torch.empty(1, 3, 224, 224, device="meta")).macs / 1e6
        assert abs(float(flops) - paper[name[:15]] - difference) < 10.0 ** -len(flops.partition(".")[2])


def test_costs_follow_the_splits():
    """Five parameters per channel and three per subspace; the specification's row is ``[12:1]`` with 4 subspaces."""
    params, _, macs = costs("mobilenetv1_100_ulsam_i12_g8", num_splits=4)
    assert (f"{params:.4f}", f"{macs:.2f}") == ("4.2345", "579.28")
    sizes = [sum(p.numel() for p in ULSAM(512, g).parameters()) for g in (1, 2, 16)]
    assert sizes == [5 * 512 + 3 * g for g in (1, 2, 16)]


def test_places():
    """Layer 1 is the stem; the numbers of the paper name these blocks of timm."""
    v1 = timm.create_model("mobilenetv1_100_ulsam_i13_g4", ulsam_replace=(11,), device="meta")
    assert [n for n, m in v1.named_modules() if isinstance(m, ULSAM)] == ["blocks.3.4", "blocks.4.ulsam0"]
    v2 = timm.create_model("mobilenetv2_100_ulsam_r13_14_16_17_g4", ulsam_insert=(2, 18), device="meta")
    at = [n for n, m in v2.named_modules() if isinstance(m, ULSAM)]
    assert at == ["blocks.0.ulsam0", *(f"blocks.{i}" for i in ("4.1", "4.2", "5.1", "5.2", "6.ulsam0"))]
    assert [m.conv_dws.in_channels for m in v2.modules() if isinstance(m, ULSAM)] == [16, 96, 96, 160, 160, 320]
    momentum = timm.create_model("test_ulsam", ulsam_bn_momentum=0.1).blocks[2].ulsam1.bn_dws.momentum
    assert momentum == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ulsam_replace": (12,)},
            r"got ulsam_replace=\(12,\), need layers with one shape in and out: \[4, 6, 7, 9",
        ),
        ({"ulsam_replace": (1,)}, r"got ulsam_replace=\(1,\)"),
        ({"ulsam_insert": (17, 19)}, r"got ulsam_insert=\(17, 19\), need layers from 2 to 18"),
        ({"num_splits": 7}, "got dim=96 and num_splits=7"),
    ],
)
def test_rejects_places(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("mobilenetv2_100_ulsam_r14_17_g4", device="meta", **arguments)


def test_weights_of_plain_mobilenets_load():
    """What both have is loaded, ULSAM starts fresh, and the maps before it are those of the plain network."""
    plain = timm.create_model("mobilenetv2_050").eval()
    plain.blocks[1][1].bn2.running_var.fill_(0.5)
    state = plain.state_dict()
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "source": ""}, "width": 0.5}
    model = timm.create_model("mobilenetv2_100_ulsam_r14_17_g4", ulsam_insert=(18,), **kwargs).eval()
    x = torch.randn(1, 3, 64, 96)
    found, expected = (m.forward_intermediates(x, intermediates_only=True) for m in (model, plain))
    for a, b in zip(found[:3], expected[:3], strict=True):
        close(a, b, "rerun")
    close(model.classifier.weight, plain.classifier.weight, "same")
    filtered = checkpoint_filter_fn({"state_dict": {f"module.{k}": v for k, v in state.items()}}, model)
    assert filtered.keys() == model.state_dict().keys()
    official = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.5.2.")}
    official |= {f"blocks.5.2.{k}": v for k, v in model.blocks[5][2].official_state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(official, model))


def test_features_at_stride_16():
    net = timm.create_model("mobilenetv2_100_ulsam_r14_17_g4", features_only=True, output_stride=16, device="meta")
    taps = net(torch.empty(1, 3, 96, 160, device="meta"))
    assert [tuple(t.shape[1:]) for t in taps][-2:] == [(96, 6, 10), (320, 6, 10)]
    net = timm.create_model("mobilenetv2_100_ulsam_r14_17_g4", features_only=True, device="meta")
    assert (net.feature_info.reduction(), net.feature_info.channels()) == ([2, 4, 8, 16, 32], [16, 24, 32, 96, 320])


# explain


@pytest.mark.parametrize(("layer", "name", "stride"), [(7, "blocks.3.1", 16), (9, "blocks.4.ulsam0", 32)])
def test_explain_maps_reproduce_the_module(layer, name, stride):
    """Each has sum 1 and multiplies its channels; pixels where the map ends are those of its cells."""
    model = timm.create_model("test_ulsam").eval()
    module, kept = model.get_submodule(name), []
    x = torch.randn(1, 3, 70, 100)
    with torch.no_grad():
        model(x)
        handle = module.register_forward_hook(lambda _, args, out: kept.append((args[0][0], out[0])))
        model(x)
    handle.remove()
    ((seen, out),) = kept
    panels = explained(model, x, layer=layer)
    maps = torch.stack([p.heat for p in panels])
    close(maps.sum((1, 2)), torch.ones(4), "rerun")
    close(seen + seen * maps.repeat_interleave(len(seen) // 4, 0), out, "rerun")
    assert [p.title for p in panels] == [f"Attention of subspace {i} of 4, layer {layer}" for i in (1, 2, 3, 4)]
    rows, columns = maps.shape[1:]
    assert (rows, columns) == (-(-70 // stride), -(-100 // stride))
    assert panels[0].area == (0, 0, rows * stride / 70, columns * stride / 100)


def test_explain_shows_the_first_layer_and_at_most_so_many_maps():
    both = {"ulsam_replace": (5,), "ulsam_insert": (5, 6), "num_splits": 4, "in_chans": 1}
    model, x = timm.create_model("test_ulsam_v1", **both).half(), torch.randn(1, 1, 64, 64).half()
    titles = [p.title for p in explained(model, x)]
    assert titles == [f"Attention of subspace {i} of 4, layer 5" for i in (1, 2, 3, 4, 1, 2)]
    assert len(explained(model, x, count=99)) == 8
    assert len(explained(model, x, layer=6)) == 4


@pytest.mark.parametrize(
    ("kwargs", "settings", "message"),
    [
        ({}, {"layer": 6}, "got layer=6, need a layer with ULSAM: 5, 7, 9"),
        ({}, {"count": 0}, "got count=0, need a whole number of at least 1"),
        ({"ulsam_replace": (), "ulsam_insert": ()}, {}, "got layer=None, need a layer with ULSAM: there is none"),
    ],
    ids=["layer", "count", "none"],
)
def test_explain_refuses(kwargs, settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_ulsam", **kwargs).explain(torch.zeros(1, 3, 64, 64), **settings)


def test_every_model_explains():
    check_family_explains(family)
