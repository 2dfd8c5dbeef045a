"""The adapter: levels, formats, freezing, weights, official dense checkpoints; layer decay; what configs are told."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden import image, load, weights
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from tolerance import close, golden_close

pytestmark = pytest.mark.mm
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")
mm = importlib.import_module("vizoo.heads.mm")

SWIN = {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
TINY = {  # name -> arguments, channels, and indices among timm's features
    "resnet18": ({}, [64, 128, 256, 512], [1, 2, 3, 4]),
    "convnext_atto": ({}, [40, 80, 160, 320], [0, 1, 2, 3]),
    "swin_tiny_patch4_window7_224": (SWIN, [8, 16, 32, 64], [0, 1, 2, 3]),
    "mobilenetv3_small_050": ({}, [8, 16, 24, 288], [1, 2, 3, 4]),
    "test_litv2": ({"feature_norms": (0, 1, 2, 3)}, None, [0, 1, 2, 3]),
    "test_overlock": ({"dense": "det"}, [16, 24, 44, 60], [0, 1, 2, 3]),
    "test_nat": ({"feature_norms": (0, 1, 2, 3)}, [16, 32, 64, 128], [0, 1, 2, 3]),
    "test_dinat_s": ({}, [16, 32, 64, 128], [0, 1, 2, 3]),
    "test_transnext": ({"bias_size": 64}, None, [0, 1, 2, 3]),
    "test_halonet": ({}, [40, 80, 160, 192], [1, 2, 3, 4]),
    "test_medusa": ({}, None, None),
    "test_ulsam": ({}, None, None),
}
ROUNDS_DOWN = ("convnext_atto", "test_litv2")  # an odd map loses its last row, in the official code too


@pytest.mark.parametrize("name", list(TINY))
def test_levels(name):
    """Strides pick the levels; maps are NCHW, ceil(H / stride) high and as wide as the attributes say."""
    kwargs, channels, indices = TINY[name]
    backbone = mm.VizooBackbone(name, **kwargs).eval()
    size = (64, 64) if "img_size" in kwargs else (64, 96) if name in ROUNDS_DOWN else (67, 90)
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, *size))
    assert isinstance(features, tuple)
    assert backbone.strides == [4, 8, 16, 32]
    assert backbone.channels == mm.channels(name, **kwargs)
    assert channels is None or backbone.channels == channels
    assert indices is None or backbone.out_indices == indices
    for f, c, s in zip(features, backbone.channels, backbone.strides, strict=True):
        assert f.shape == (2, c, *(-(-side // s) for side in size))
    by_index = mm.VizooBackbone(name, out_indices=backbone.out_indices[1:3], **kwargs)
    assert by_index.strides == [8, 16]
    assert mm.channels(name, out_indices=backbone.out_indices[1:3], **kwargs) == backbone.channels[1:3]


def test_nhwc_is_permuted():
    """timm's Swin returns NHWC."""
    backbone = mm.VizooBackbone("swin_tiny_patch4_window7_224", strides=(8, 32), **SWIN).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        raw = backbone.body(x)
        for f, r in zip(backbone(x), raw, strict=True):
            assert torch.equal(f, r.permute(0, 3, 1, 2))
    assert raw[0].shape == (1, 8, 8, 16)


def test_last_level_of_a_stride():
    """Features of one stride: the last is the one."""
    assert mm.VizooBackbone("test_nat_isotropic", strides=(16,)).out_indices == [3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_name": "resnet81"}, "model_name='resnet81', which timm does not know; near: resnet"),
        ({"strides": (4, 64)}, "no feature of stride 64; it has 2, 4, 8, 16, 32"),
        ({"strides": (8, 4)}, "strides=(8, 4), need increasing"),
        ({"strides": ()}, "strides=()"),
        ({"frozen_stages": 5}, "frozen_stages=5, need -1 to 4"),
        ({"out_norm": "batch"}, "out_norm='batch', need 'layer' or None"),
        ({"pretrained": "open-mmlab://resnet50_v1c"}, "pretrained='open-mmlab://resnet50_v1c'"),
        ({"pretrained": "/nowhere.pth"}, "pretrained='/nowhere.pth'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mm.VizooBackbone(**{"model_name": "resnet18", **kwargs})


def test_found_from_any_scope():
    """One registration in the root serves mmdet and mmseg."""
    from mmdet.registry import MODELS as DET
    from mmseg.registry import MODELS as SEG

    for registry in (DET, SEG):
        built = registry.build({"type": "VizooBackbone", "model_name": "test_nat"})
        assert type(built) is mm.VizooBackbone


# training mode


@pytest.mark.parametrize("feature_cls", [None, "getter"])
@pytest.mark.parametrize(("stages", "parts"), [(0, ["stem"]), (2, ["stem", "stages.0", "stages.1"])])
def test_frozen_stages(stages, parts, feature_cls):
    backbone = mm.VizooBackbone("convnext_atto", frozen_stages=stages, feature_cls=feature_cls, drop_path_rate=0.5)
    prefix = "model." if feature_cls else ""
    parts = [(prefix + p + ".") if feature_cls else p.replace(".", "_") + "." for p in parts]
    if not feature_cls:
        parts[0] = "stem_"  # the list wrapper takes the stem apart
    for _ in range(2):
        backbone.train()
        trained = {n for n, p in backbone.body.named_parameters() if p.requires_grad}
        everything = {n for n, _ in backbone.body.named_parameters()}
        assert everything - trained == {n for n in everything if n.startswith(tuple(parts))}
        for n, module in backbone.body.named_modules():
            if list(module.parameters()) or "drop_path" in n:
                assert module.training != f"{n}.".startswith(tuple(parts)), n
        backbone.eval()
        assert not backbone.body.training


def test_frozen_batch_norms_keep_their_statistics():
    backbone = mm.VizooBackbone("resnet18", frozen_stages=1)
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    changed = {k.split(".")[1] for k in after if "running_mean" in k and not torch.equal(after[k], before[k])}
    assert changed == {"layer2", "layer3", "layer4"}


def test_norm_eval():
    backbone = mm.VizooBackbone("resnet18", norm_eval=True).train()
    assert backbone.body.layer2.training
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20
    assert not any(m.training for m in norms)


@pytest.mark.parametrize(
    "name", ["resnet18", "test_litv2", "test_overlock", "test_nat", "test_moh_vit", "mobilenetv3_small_050"]
)
def test_with_cp_has_equal_gradients(name):
    torch.manual_seed(0)
    plain = mm.VizooBackbone(name, norm_eval=True)
    saving = mm.VizooBackbone(name, norm_eval=True, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for backbone in (plain, saving):
        sum(f.square().mean() for f in backbone(x)).backward()
    expected = dict(plain.named_parameters())
    for n, p in saving.named_parameters():
        assert p.grad is not None, n  # DDP wants no unused parameter
        close(p.grad, expected[n].grad, "gradient", n)


def test_drop_path_reaches_the_model():
    rates = [m.drop_prob for m in mm.VizooBackbone("test_nat", drop_path_rate=0.4).modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.4)


def test_out_norm():
    backbone = mm.VizooBackbone("resnet18", out_norm="layer").eval()
    with torch.no_grad():
        for f in backbone(torch.randn(1, 3, 64, 64)):
            torch.testing.assert_close(f.mean(1), torch.zeros_like(f[:, 0]), rtol=0, atol=1e-4)


# weights


@pytest.mark.parametrize("kind", ["pth", "nested", "safetensors", "detector", "path"])
@pytest.mark.parametrize("name", ["resnet18", "test_nat"])
def test_pretrained_file(name, kind, tmp_path):
    """A classifier's weights arrive with mm's call, once, and not before."""
    classifier = timm.create_model(name)
    state = classifier.state_dict()
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "detector" and name == "test_nat":
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}, "meta": {}}, file)
    else:
        torch.save({"model": state} if kind == "nested" else state, file)
    backbone = mm.VizooBackbone(name, pretrained=file if kind == "path" else str(file), frozen_stages=1)
    found = {k.removeprefix("model."): v for k, v in backbone.body.state_dict().items()}
    assert not all(torch.equal(v, state[k]) for k, v in found.items())
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    backbone.init_weights()
    for k, v in found.items():
        assert torch.equal(v, state[k]), k
    assert frozen == {n for n, p in backbone.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        next(backbone.parameters()).zero_()
    backbone.init_weights()  # once is enough
    assert not next(backbone.parameters()).any()


@pytest.mark.parametrize("source", [True, "https://example.org/w.pth"])
@pytest.mark.parametrize("name", ["resnet18", "litv2_s"])
def test_nothing_is_loaded_before_training(name, source, monkeypatch):
    """Inference builds the backbone too, and has weights of its own."""

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    backbone = mm.VizooBackbone(name, pretrained=source)
    with pytest.raises(OSError, match="no route to host"):
        backbone.init_weights()


def test_url_goes_to_timm(monkeypatch):
    backbone = importlib.import_module("vizoo.heads.features")
    seen = {}
    monkeypatch.setattr(backbone.timm, "create_model", lambda name, **kwargs: seen.update(kwargs) or {}["stop"])
    with pytest.raises(KeyError, match="stop"):
        mm.VizooBackbone("resnet18", out_indices=(1,), pretrained="https://example.org/w.pth")
    monkeypatch.undo()
    assert backbone.pretrained_arguments("https://example.org/w.pth")["pretrained_cfg_overlay"] == {
        "url": "https://example.org/w.pth",
        "hf_hub_id": None,
        "file": None,
    }
    assert backbone.pretrained_arguments(True) == {"pretrained": True}


def test_init_cfg(tmp_path):
    """mmengine's ``Pretrained`` with keys relative to the adapter."""
    source = mm.VizooBackbone("test_nat")
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "a.pth"), "prefix": "backbone."}
    backbone = mm.VizooBackbone("test_nat", init_cfg=init)
    backbone.init_weights()
    for k, v in backbone.state_dict().items():
        assert torch.equal(v, source.state_dict()[k]), k
    with torch.no_grad():
        next(backbone.parameters()).zero_()
    backbone.init_weights()  # once is enough
    assert not next(backbone.parameters()).any()


LITV2_STRIDES = {"litv2_s_det": (1, 2, 3), "litv2_s_seg_oddsize": (0, 1, 2, 3)}


@pytest.mark.parametrize("case", [*LITV2_STRIDES, "overlock_t_seg_192x256", "transnext_dense_interp_96x160"])
def test_official_dense_backbones(case, tmp_path):
    """Levels of the official detection and segmentation code, from their checkpoints, through the adapter."""
    keys, meta, shape, outputs = load(case)
    task = {f"backbone.{k}": v for k, v in weights(keys).items()}
    task["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"meta": {}, "state_dict": task}, tmp_path / "task.pth")
    if case in LITV2_STRIDES:
        name, form = "litv2_s", {"feature_norms": LITV2_STRIDES[case]}
        thin = {k: (s[0], s[1]) for k, s in meta["outputs"]["feat_strides_c_s"].items()}
    elif case.startswith("transnext"):
        args = {k: meta["args"][k] for k in ("embed_dims", "num_heads", "depths", "pretrain_size")}
        name, form = "test_transnext", {**args, "bias_size": meta["args"]["img_size"]}
        thin = {f"feat{i}": (1, 1) for i in range(4)}
    else:
        name, form = "overlock_t", {"dense": "seg"}
        thin = dict(zip([f"feat{i}" for i in range(4)], ((8, 4), (8, 2), (16, 1), (16, 1)), strict=True))
    backbone = mm.VizooBackbone(name, pretrained=str(tmp_path / "task.pth"), **form).eval()
    backbone.init_weights()
    with torch.no_grad():
        features = backbone(image(shape, int(case.startswith("transnext"))))
    assert len(features) == len(thin) == 4
    for feature, (level, (c, s)) in zip(features, sorted(thin.items()), strict=True):
        golden_close(feature[:, ::c, ::s, ::s], outputs[level], level)


# what configs are told


def test_data_preprocessor():
    from mmdet.registry import MODELS as DET
    from mmseg.registry import MODELS as SEG

    data = resolve_model_data_config(timm.create_model("litv2_s"))
    found = mm.data_preprocessor("litv2_s", "instance")
    built = DET.build(found)
    assert built.pad_mask
    assert built.pad_size_divisor == 32
    assert not mm.data_preprocessor("litv2_s", "detection")["pad_mask"]
    assert built._channel_conversion
    torch.testing.assert_close(built.mean.flatten(), 255 * torch.tensor(data["mean"]))
    torch.testing.assert_close(built.std.flatten(), 255 * torch.tensor(data["std"]))
    crops = SEG.build(mm.data_preprocessor("litv2_s", "segmentation", size=(64, 96)))
    assert (crops.size, crops.pad_val, crops.seg_pad_val) == ((64, 96), 0, 255)
    assert SEG.build(mm.data_preprocessor("litv2_s", "segmentation")).size_divisor == 32
    with pytest.raises(ValueError, match="task='pose'"):
        mm.data_preprocessor("litv2_s", "pose")


def test_config_path(tmp_path):
    """A config of the zoo as base of one elsewhere."""
    from mmengine.config import Config

    found = mm.config_path("__init__.py")
    assert Path(found).is_file()
    with pytest.raises(ValueError, match=r"name='nothing\.py'"):
        mm.config_path("nothing.py")
    expression = '__import__("vizoo.heads.mm", fromlist=["mm"]).config_path("__init__.py")'
    (tmp_path / "own.py").write_text(f"_base_ = {expression}\nx = 3\n")
    assert Config.fromfile(tmp_path / "own.py").x == 3


# bases of installed packages


def test_bases_without_pkg_resources(monkeypatch, tmp_path):
    """setuptools 82 has no pkg_resources; a fork has another distribution name."""
    from mmengine.config import Config
    from mmengine.config import config as mm_config
    from mmengine.hub import get_config

    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    compat = importlib.import_module("vizoo.heads.mm.compat")
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "mmengine"]:
        for name in vars(module).keys() & {"is_installed", "get_installed_path"}:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(compat.MODULE2PACKAGE, "mmseg", "onedl-mmsegmentation-of-yesterday")
    find = importlib.util.find_spec
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda n: None if n == "pkg_resources" else find(n))
    compat.find_configs()
    assert compat.MODULE2PACKAGE["mmseg"] == "mmsegmentation"
    assert mm_config.is_installed is compat._is_installed
    assert Path(get_config("mmdet::_base_/models/mask-rcnn_r50_fpn.py").filename).is_file()
    bases = '["mmseg::_base_/models/fpn_r50.py", "mmdet::_base_/default_runtime.py"]'
    (tmp_path / "c.py").write_text(f"_base_ = {bases}\n")
    assert Config.fromfile(tmp_path / "c.py").model.decode_head.type == "FPNHead"
    assert not compat._is_installed("mm_nothing")
    with pytest.raises(ModuleNotFoundError, match="mm_nothing"):
        compat._installed_path("mm_nothing")


# layer decay


def wrapper(model, **paramwise):
    constructor = mm.TimmLayerDecay(
        {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}, paramwise
    )
    return constructor(model)


class Detector(torch.nn.Module):
    def __init__(self, name: str, **kwargs):
        super().__init__()
        self.backbone = mm.VizooBackbone(name, **kwargs)
        self.head = torch.nn.Linear(4, 4)


@pytest.mark.parametrize(("name", "feature_cls"), [("convnext_atto", None), ("convnext_atto", "getter")])
def test_layer_decay(name, feature_cls):
    """Rates fall from the head to the stem; the same parameters in either wrapper."""
    model = Detector(name, feature_cls=feature_cls, frozen_stages=0)
    optimizer = wrapper(model, layer_decay_rate=0.5).optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"] if id(p) in names}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    depth = model.backbone.layers()
    top = max(depth.values()) + 1
    assert found["head.weight"]["lr"] == 1.0
    first = next(n for n in depth if "stages" in n and depth[n] == 1)
    assert found[f"backbone.body.{first}"]["lr"] == 0.5 ** (top - 1)
    assert len({depth[n] for n in depth}) == top == 13
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert found[n]["weight_decay"] == (0.0 if p.ndim == 1 else 0.1), n
    assert len(optimizer.param_groups) <= 2 * (top + 1) + 1


def test_layer_decay_asks_the_model():
    model = Detector("test_nat")
    optimizer = wrapper(model, layer_decay_rate=0.9, custom_keys={"head": {"lr_mult": 10.0}}).optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"] if id(p) in names}
    tables = [n for n in found if n.endswith(".rpb")]
    assert tables
    assert all(found[n]["weight_decay"] == 0 for n in tables)
    assert found["head.weight"]["lr"] == 10.0
    assert found["head.weight"]["weight_decay"] == 0.1


@pytest.mark.parametrize("rate", [None, 0, 1.5, "0.9"])
def test_layer_decay_refuses(rate):
    with pytest.raises(ValueError, match="layer_decay_rate"):
        wrapper(Detector("test_nat"), layer_decay_rate=rate)
    with pytest.raises(ValueError, match="VizooBackbone"):
        wrapper(torch.nn.Linear(2, 2), layer_decay_rate=0.9)
