"""Nonsense for every argument of every constructor: one line that names the argument, its value and what is allowed."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from zoo import KINDS, build, module_of

from vizoo.backbones import layers
from vizoo.backbones.layers.neighborhood import NeighborhoodBlock
from vizoo.backbones.layers.prompt_tuning import tcpa
from vizoo.backbones.medusa import medusa
from vizoo.heads.classification import AttentiveProbe, knn_probe, linear_probe
from vizoo.heads.detection import detector
from vizoo.heads.features import FeatureLevels, feature_levels
from vizoo.heads.segmentation import segmentor

NAN = math.nan
MODELS = [*KINDS, "test_oat"]
NOT_CHECKED = {"device", "dtype", "dependency", "tree", "block", "cfg", "pe_table", "feat_size", "table"}
NOT_CHECKED |= {"embed_layer", "norm_layer", "embed_norm_layer", "act_layer", "block_fn", "mlp_layer", "attn_layer"}
ZERO = {"num_classes", "final_dim", "halo_size", "head_width", "reg_tokens", "spp"}  # means something
ZERO |= {"tcpa_cls_pool", "tcpa_cls_topk", "tcpa_cls_len"}  # without a class token
ZERO |= {"random_epochs", "tcpa_random_epochs", "training_rounds"}
POSITIVE = {
    "mlp_ratio",
    "sub_mlp_ratio",
    "rv",
    "rb",
    "qk_ratio",
    "tau",
    "pe_sigma",
    "pe_norm",
    "head_dim_scale",
    "width",
}
POSITIVE |= {"sigma", "norm"}
SHARES = {"alpha", "ulsam_bn_momentum", "bn_momentum"}


def refused(call: Callable[[], Any], name: str) -> str | None:
    """What is wrong with how a call is refused, None if nothing is."""
    try:
        call()
    except ValueError as e:
        text = str(e)
        allowed = ", need " in text or ", which timm does not know; near: " in text
        good = text.startswith("got ") and f"{name}=" in text and allowed and "\n" not in text
        return None if good else f"says {text!r}"
    except Exception as e:
        return f"raises {type(e).__name__}: {e}"
    return "is accepted"


def nonsense(name: str, hint: Any) -> Iterator[Any]:
    """Values that no argument of this name and annotation can mean."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    plain = [p for p in parts if p is not type(None)]
    sequences = [p for p in plain if typing.get_origin(p) not in (None, typing.Literal)]
    yield from (NAN, object(), {"a": 1})
    if bool in plain:
        yield from ("no", 2, -1, 0.5, (True,))
    elif int in plain:
        yield from (-1, 1.5, math.inf, 10**400, "x", b"1", True, *(() if name in ZERO else (0,)))
        if not sequences:
            yield from ((1,), [2, 2], ())
    elif "drop" in name:
        yield from (2, -1, -0.01, 1.0, 1, math.inf, "x", "0.1", (0.1,), True)
    elif float in plain:
        yield from (math.inf, "x", (0.5,), True, 10**400, *((-1, 0) if name in POSITIVE else ()))
        yield from (-0.1, 1.5) if name in SHARES else ()
    elif str in plain or typing.get_origin(plain[0]) is typing.Literal:
        yield from ("no_such_choice", 7, ("avg",))
    if sequences:
        yield from ((NAN,) * 4, (0.5, -0.5, 0.5, 0.5, 0.5), ("x",) * 4, "xxxx", b"abcd", ((2, 2), (), (2, 2), (2, 2)))
        yield from ((True,) * 4, (math.inf,) * 4, (99,) * 19)


def arguments(name: str) -> Iterator[tuple[str, Any]]:
    """Names and annotations of what the constructor of a model takes."""
    model = build(name, device="meta")
    if isinstance(model, VisionTransformer):
        yield from ((f"tcpa_{k}", v) for k, v in hints_of(tcpa))
        yield from hints_of(VisionTransformer)
    else:
        yield from hints_of(type(model))


def hints_of(called: Callable[..., Any]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(called.__init__ if isinstance(called, type) else called)
    known = [n for n, p in inspect.signature(called).parameters.items() if p.kind is not p.VAR_KEYWORD]
    return [(n, hints[n]) for n in known if n in hints and n not in NOT_CHECKED | {"model"}]


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """Every argument of every kind of model."""
    wrong = []
    found = list(arguments(name))
    assert len(found) > 6
    for argument, hint in found:
        for value in nonsense(argument, hint):
            if problem := refused(lambda k=argument, v=value: build(name, device="meta", **{k: v}), argument):
                wrong.append(f"{argument}={value!r} {problem}")
    assert not wrong, "\n".join(wrong)


VIT = timm.create_model("test_vit", device="meta")
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ContMixBlock": (layers.ContMixBlock, {}),
    "FlowAttention": (layers.FlowAttention, {"dim": 16}),
    "FlowCrossAttention": (layers.FlowCrossAttention, {"dim": 16}),
    "HaloAttention": (layers.HaloAttention, {"dim": 16}),
    "HiLo": (layers.HiLo, {"dim": 16}),
    "MixtureOfHeads": (layers.MixtureOfHeads, {"dim": 16, "num_heads": 4, "shared": 1, "routed": 2}),
    "NeighborhoodAttention": (layers.NeighborhoodAttention, {"dim": 16}),
    "NeighborhoodBlock": (NeighborhoodBlock, {"dim": 16, "num_heads": 2}),
    "PlaceCode": (layers.PlaceCode, {"dim": 96, "grid": (3, 5)}),
    "ReversedAttention": (layers.ReversedAttention, {"dim": 24}),
    "ULSAM": (layers.ULSAM, {"dim": 16}),
    "medusa": (medusa, {"model": timm.create_model("resnet10t", device="meta")}),
    "moh": (layers.moh, {"model": VIT, "shared": 1, "routed": 1}),
    "subtrees": (layers.subtrees, {"dependency": None, "tree": None, "k": 2}),
    "tcpa": (layers.tcpa, {"model": VIT}),
    "vpt": (layers.vpt, {"model": VIT}),
    "AttentiveProbe": (AttentiveProbe, {"model": build("test_litv2", device="meta"), "num_classes": 3}),
    "FeatureLevels": (FeatureLevels, {"backbone": "resnet10t"}),
    "knn_probe": (knn_probe, {}),
    "linear_probe": (linear_probe, {}),
    "detector": (detector, {"arch": "fcos", "backbone": "test_litv2", "num_classes": 3}),
    "segmentor": (segmentor, {"arch": "upernet", "backbone": "test_litv2", "num_classes": 3}),
}
MEANINGFUL = {("PlaceCode", "alpha"): (1.5,), ("FeatureLevels", "frozen_stages"): (-1, 0)}
MEANINGFUL |= {(head, "frozen_stages"): (-1, 0) for head in ("detector", "segmentor")}
MEANINGFUL |= {("tcpa", f"cls_{name}"): (0,) for name in ("pool", "topk", "len")}  # refused with a class token
MEANINGFUL |= {(name, "shared"): (0,) for name in ("MixtureOfHeads", "moh")}
MEANINGFUL[("detector", "min_size")] = ((99,) * 19,)
PATHS = {"pretrained", "backbone", "backbone_kwargs"}  # a file, a name, and the arguments of another constructor


@pytest.mark.parametrize("name", CALLS)
def test_layers_and_heads(name: str) -> None:
    """Every argument of what users put into their own models, and of the heads."""
    called, given = CALLS[name]
    wrong = []
    for argument, hint in hints_of(called):
        for value in nonsense(argument, hint) if argument not in PATHS else ():
            if any(value is m or (type(value) is type(m) and value == m) for m in MEANINGFUL.get((name, argument), ())):
                continue
            if problem := refused(lambda k=argument, v=value: called(**{**given, k: v}), argument):
                wrong.append(f"{argument}={value!r} {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_methods(name: str) -> None:
    """What changes a model later refuses the same nonsense, and changes nothing."""
    model = build(name, device="meta")
    before, classes = dict(model.named_modules()), model.num_classes
    wrong = []
    for method in ("reset_classifier", "set_input_size", "set_grad_checkpointing"):
        called = getattr(model, method, None)
        if called is None or not hasattr(called, "__wrapped__"):  # timm's own
            continue
        for argument, hint in hints_of(called):
            given = {"num_classes": classes} if method == "reset_classifier" else {}
            for value in nonsense(argument, hint) if argument != "reset_other" else ():
                if problem := refused(lambda k=argument, v=value: called(**{**given, k: v}), argument):  # noqa: B023
                    wrong.append(f"{method}: {argument}={value!r} {problem}")
    assert not wrong, "\n".join(wrong)
    assert "reset_classifier" in dir(model)
    assert hasattr(model.reset_classifier, "__wrapped__")
    assert dict(model.named_modules()) == before
    assert model.num_classes == classes


BAD_PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("test_dependencyvit", {"img_size": 8}),
    ("test_dependencyvit", {"img_size": (96, 8)}),
    ("test_dependencyvit", {"embed_dim": 41}),
    ("test_dependencyvit", {"prune_blocks": (9,)}),
    ("test_dependencyvit", {"mlp_ratio": 1e-9}),
    ("test_dependencyvit_lite", {"prune_ratio": 0.5}),
    ("test_flowformer", {"embed_dims": (16, 32, 66, 128)}),
    ("test_flowformer", {"embed_dims": (16, 32)}),
    ("test_flowformer", {"num_heads": 3}),
    ("test_flowformer", {"mlp_ratio": 1e-9}),
    ("test_halonet", {"embed_dim": 7}),
    ("test_halonet", {"rv": 0.01}),
    ("test_halonet", {"rv": 1.3}),
    ("test_halonet", {"depths": (1, 1)}),
    ("test_halonet", {"act_layer": "no_such_layer"}),
    ("test_halonet_hybrid", {"width_factor": -1}),
    ("test_halonet_hybrid", {"act_layer": "no_such_layer"}),
    *(
        ("test_halonet_hybrid", {name: "no_such_choice"})
        for name in ("stem_type", "head_type", "attn_layer", "downsample")
    ),
    ("test_halonet_hybrid", {"attn_kwargs": 3}),
    ("test_litv2", {"window_size": (0, 0, 2)}),
    ("test_litv2", {"window_size": 0}),
    ("test_litv2", {"num_heads": (1, 2, 7, 8)}),
    ("test_litv2", {"depths": (1, 1, 1)}),
    ("test_litv2", {"num_heads": (1, 2)}),
    ("test_litv2", {"feature_norms": (4,)}),
    ("test_litv2", {"mlp_ratio": 0.001}),
    ("test_medusa", {"layers": (1, 1, 1)}),
    ("test_medusa", {"channels": (8, 8, 8, 8, 8)}),
    ("test_medusa", {"body_size": 31}),
    ("test_nat", {"kernel_size": 1}),
    ("test_nat", {"depths": (1, 2)}),
    ("test_nat", {"num_heads": (2, 2)}),
    ("test_nat", {"dilations": "no_such_pattern"}),
    ("test_nat", {"embed_dim": 1}),
    ("test_ninformer", {"patch_size": 97}),
    ("test_ninformer", {"mlp_ratio": 0.01}),
    ("test_oat", {"embed_dim": 49}),
    ("test_oat", {"num_heads": 7}),
    ("test_oat", {"num_classes": 7}),
    ("test_oat", {"crop_size": (18, 20)}),
    ("test_oat", {"spp": 5}),
    ("test_oat", {"pe_sigma": 1e-9}),
    ("test_oat", {"pe_alpha": -1}),
    ("test_overlock", {"depths": (1, 1, 1)}),
    ("test_overlock", {"sub_depths": (1,)}),
    ("test_overlock", {"embed_dims": (8, 8, 8, 3)}),
    ("test_overlock", {"embed_dims": (32, 32, 33, 64)}),
    ("test_overlock", {"sub_num_heads": (3, 5)}),
    ("test_overlock", {"kernel_sizes": (17, 15, 13, 6)}),
    ("test_overlock", {"smk_size": 4}),
    ("test_overlock", {"smk_size": 21}),
    ("test_ulsam", {"stages": ("ir_r1_k3_s2_e2",)}),
    ("test_ulsam", {"stages": ("no_such_block",)}),
    ("test_ulsam", {"stages": ("cn_r1_k3_s2_c24",)}),
    ("test_ulsam", {"ulsam_replace": (99,)}),
    ("test_ulsam", {"num_splits": 7}),
    ("test_ulsam", {"output_stride": 4}),
    ("test_vit_tcpa", {"embed_dim": 63}),
    ("test_vit_tcpa", {"patch_size": 97}),
    ("test_vit_tcpa", {"class_token": False}),
    ("test_vit_tcpa", {"pos_embed": "sin"}),
    ("test_vit_tcpa", {"norm_layer": "no_such_layer"}),
    ("test_vit_tcpa", {"act_layer": "no_such_layer"}),
    ("test_vit_tcpa", {"attn_layer": "no_such_layer"}),
    ("test_vit_tcpa", {"tcpa_cls_pool": 0}),
    ("test_vit_tcpa", {"tcpa_image_topk": 6}),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_PAIRS, ids=str)
def test_models_whose_arguments_do_not_fit(name: str, arguments: dict[str, Any]) -> None:
    assert not refused(lambda: build(name, device="meta", **arguments), next(iter(arguments)))


@pytest.mark.parametrize("name", KINDS)
def test_features_that_do_not_exist(name: str) -> None:
    """Whichever wrapper takes them, and whoever asks."""
    count = len(build(name, device="meta").feature_info)
    wrong = []
    for indices in (
        (count,),
        (-count - 1,),
        (),
        (0, 0),
        (0, -count),
        (1.5,),
        ("0",),
        (True,),
        "01",
        count + 1,
        0,
        -1,
        NAN,
    ):
        for wrapper in ({}, *({"feature_cls": w} for w in ("getter", "list", "dict", "hook", "fx"))):
            arguments = {"features_only": True, "out_indices": indices, "device": "meta", **wrapper}
            if problem := refused(lambda a=arguments: build(name, **a), "out_indices"):
                wrong.append(f"{indices} {wrapper} {problem}")
        if problem := refused(lambda i=indices: FeatureLevels(name, out_indices=i), "out_indices"):
            wrong.append(f"FeatureLevels {indices} {problem}")
    assert not wrong, "\n".join(wrong)
    assert not refused(lambda: build(name, features_only=True, feature_cls="no_such_wrapper"), "feature_cls")


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "test_efficientnet"])
def test_features_that_timm_does_not_have(name: str) -> None:
    for indices in ((99,), (-99,), (), (0, 0), (1.5,), (1, 0)):
        assert not refused(lambda i=indices: FeatureLevels(name, out_indices=i), "out_indices")
        assert not refused(lambda i=indices: feature_levels(name, out_indices=i), "out_indices")
    assert FeatureLevels(name, out_indices=(0, -1)).out_indices == [0, -1]


@pytest.mark.parametrize("name", MODELS)
def test_unknown_names_stay_type_errors(name: str) -> None:
    with pytest.raises(TypeError, match="foo"):
        build(name, device="meta", foo=1)


def test_unknown_arguments_of_detectors() -> None:
    """torchvision's classes drop them."""
    for arch in ("retinanet", "fcos", "faster_rcnn", "mask_rcnn"):
        with pytest.raises(ValueError, match=r"got argument 'foo', which arch='.*' does not take; need .*nms_thresh"):
            detector(arch, "test_litv2", 3, foo=1)
    detector("fcos", "test_litv2", 3, detections_per_img=5)


@pytest.mark.parametrize("classes", [-1, 0, 256, 300, 1.5, True, "3"])
def test_classes_of_segmentors(classes: Any) -> None:
    """255 is the id of pixels that do not count."""
    assert not refused(lambda: segmentor("semantic_fpn", "test_litv2", classes), "num_classes")


def test_most_classes_of_segmentors() -> None:
    assert segmentor("semantic_fpn", "test_litv2", 255).decode_head.conv_seg.out_channels == 255


def test_numbers_of_other_libraries() -> None:
    """NumPy's and PyTorch's numbers and sequences are numbers and sequences."""
    build("test_litv2", depths=np.array([1, 1, 2, 1]), drop_path_rate=np.float32(0.1), num_classes=np.int64(5))
    build("test_litv2", depths=torch.Size([1, 1, 2, 1]), num_heads=[1, 2, 4, 8], window_size=np.int32(2))
    build("test_halonet", num_heads=np.int64(2), rb=np.float64(2.5), zero_init_last=np.bool_(False))
    build("test_nat", dilations=np.int64(2), drop_rate=torch.tensor(0.5))
    build("test_nat", dilations=[1, np.array([1, 2]), 1, 1], qkv_bias=1)
    layers.ContMixBlock(drop_path=torch.linspace(0, 0.1, 4)[2])
    layers.HiLo(np.int64(16), alpha=0)


def test_limits_are_taken() -> None:
    """The ends of the ranges, where the text says that they belong to it."""
    assert build("test_litv2", num_classes=0, drop_rate=0, drop_path_rate=0.999, alpha=1).num_classes == 0
    assert build("test_halonet", halo_size=0, final_dim=0, drop_path_rate=0)
    assert build("test_ulsam", ulsam_bn_momentum=1, output_stride=8, head_width=0)
    assert build("test_vit_gap_tcpa", tcpa_cls_pool=0, tcpa_image_topk=5, reg_tokens=0)
    for frozen in (-1, 0, 4):
        assert segmentor("upernet", "test_litv2", 1, frozen_stages=frozen)
        assert detector("fcos", "test_litv2", 2, frozen_stages=frozen, min_size=(64, 96))
    for name in ("test_halonet", "test_halonet_hybrid", "test_vit_tcpa"):
        assert build(name, device="meta", act_layer=nn.SiLU)
    for pool in ("fast", "fastavg", "fastcatavgmax"):
        assert build("test_ulsam", device="meta", global_pool=pool)


def test_every_public_constructor_is_checked() -> None:
    """Those of all families and layers, of new ones too."""
    modules = [layers, *{module_of(name) for name in MODELS}]
    public = [getattr(module, name) for module in modules for name in module.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, nn.Module)} - {layers.FeatureGetter}
    assert len(classes) > 15
    assert [c.__name__ for c in classes if not hasattr(c.__init__, "__wrapped__")] == []
