"""What users of timm expect of every family: training after inference mode, sizes, strides, widths, scripts, fx."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from tolerance import close
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor
from zoo import KINDS, as_nchw, build, each_kind, gradients, is_fixed, sample

# timm still promises TorchScript, which torch announces to retire
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

POSITIONED = ("test_dependencyvit", "test_dependencyvit_lite", "test_flowformer")  # made for an img_size, take any
ANY_SIZE = [n for n in KINDS if not is_fixed(build(n, device="meta")) and n not in POSITIONED]
DILATED = ("test_ulsam", "test_ulsam_v1", "test_halonet_hybrid")


def train_step(model: nn.Module, x: Tensor) -> None:
    """One step: every parameter gets a gradient, and the classifier moves."""
    before = model.get_classifier().weight.detach().clone()
    model.train()(x.clone()).square().mean().backward()
    gradients(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.get_classifier().weight, before)


# inference mode


@each_kind
def test_trains_after_creation_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        model = build(name, num_classes=5)
        features = build(name, features_only=True)
    assert not [n for m in (model, features) for n, t in m.state_dict(keep_vars=True).items() if t.is_inference()]
    train_step(model, sample(model, batch=2))


@each_kind
def test_trains_after_a_run_in_inference_mode(name: str) -> None:
    """Nothing that a pass keeps for the next one is an inference tensor."""
    model = build(name, num_classes=5)
    x = sample(model, batch=2)
    with torch.inference_mode():
        model(x)
    train_step(model, x)


def test_oat_trains_after_inference_mode() -> None:
    image, scene = torch.rand(1, 3, 96, 128), {"target": torch.tensor([7]), "prefix": torch.tensor([[0, 1]])}
    with torch.inference_mode():
        model = timm.create_model("test_oat").eval()
        model(image, **scene)
    model.loss(model.train()(image, **scene), scene["prefix"]).backward()
    gradients(model)


# the common arguments


@each_kind
def test_output_stride(name: str) -> None:
    """It dilates the last stages where timm's model does, and is refused by name elsewhere, whatever its value."""
    for stride in (8, 16, 32):
        if name in DILATED:
            model = build(name, output_stride=stride)
            assert build(name, features_only=True, output_stride=stride).feature_info.reduction()[-1] == stride
            features = model.forward_features(sample(model))
            assert features.shape[2:] == tuple(-(-n // stride) for n in sample(model).shape[2:])
            continue
        for kwargs in ({}, {"features_only": True}):
            with pytest.raises(ValueError, match=f"output_stride={stride}, but {name} is never dilated"):
                build(name, output_stride=stride, **kwargs)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_img_size_is_a_hint(name: str) -> None:
    """The configuration follows, the model is the same one, and its last map has the size that was announced."""
    plain = build(name)
    for size, pair in ((160, (160, 160)), ((101, 135), (101, 135))):
        model = build(name, img_size=size)
        assert model.pretrained_cfg["input_size"] == (3, *pair)
        assert timm.data.resolve_model_data_config(model, use_test_size=True)["input_size"] == (3, *pair)
        assert timm.models.get_model_input_config(model)["input_size"] == (3, *pair)
        features = model.forward_features(torch.randn(1, 3, *pair))
        assert as_nchw(features, model).shape[2:] == model.pretrained_cfg["pool_size"]
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert build(name, img_size=size, features_only=True).pretrained_cfg["input_size"] == (3, *pair)
    for bad in (0, 96.5, (96,), (96, 96, 3), (96.5, 96), "large"):
        with pytest.raises(
            ValueError, match=r"got img_size=.*, need a whole number of at least 1 or 2 whole numbers of at least 1"
        ):
            build(name, img_size=bad)


def test_img_size_of_a_tag() -> None:
    """The rest of a tag's configuration stays."""
    model = timm.create_model("halo_26t.a1h_in1k", img_size=320, pretrained_cfg_overlay={"crop_pct": 0.8})
    plain = timm.create_model("halo_26t.a1h_in1k", device="meta").pretrained_cfg
    changed = {"input_size", "pool_size", "test_input_size", "crop_pct"}
    assert {k for k in plain if model.pretrained_cfg.get(k) != plain[k]} <= changed
    assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["pool_size"]) == (0.8, (10, 10))


def test_img_size_of_oat() -> None:
    """Scenes of any size: a hint too, and there is no map to announce."""
    model = timm.create_model("test_oat", img_size=(64, 80))
    assert (model.pretrained_cfg["input_size"], model.pretrained_cfg.get("pool_size")) == ((3, 64, 80), None)


@pytest.mark.parametrize("name", ["test_ninformer", "test_dependencyvit", "test_flowformer", "test_vit_tcpa"])
def test_img_size_of_fixed_models(name: str) -> None:
    model = build(name, img_size=64)
    assert model.patch_embed.img_size == (64, 64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "kwargs", "what"),
    [
        ("test_litv2", {"feature_norms": (1, 2)}, "feature_norms"),
        ("test_nat", {"feature_norms": (1, 2)}, "feature_norms"),
        ("test_overlock", {"dense": "det"}, "dense"),
    ],
)
def test_norms_need_the_getter(name: str, kwargs: dict, what: str) -> None:
    for wrapper in ("list", "hook", "fx"):
        with pytest.raises(ValueError, match=f"got feature_cls='{wrapper}', need 'getter' for features with {what}"):
            build(name, features_only=True, feature_cls=wrapper, **kwargs)
    getter = build(name, features_only=True, feature_cls="getter", **kwargs)
    assert type(getter) is type(build(name, features_only=True, **kwargs))
    getter.set_grad_checkpointing()


# widths


@each_kind
def test_widths_fit_linear_layers(name: str) -> None:
    model = build(name)
    x = sample(model, batch=2)
    features = model.forward_features(x)
    pooled = features[:, 0] if features.ndim == 3 else as_nchw(features, model).mean((2, 3))
    assert nn.Linear(model.num_features, 3)(pooled).shape == (2, 3)
    head = nn.Linear(model.head_hidden_size, 3)
    assert head(model.forward_head(features, pre_logits=True)).shape == (2, 3)
    model.reset_classifier(0)
    assert head(model(x)).shape == (2, 3)
    assert model.head_hidden_size == head.in_features


@pytest.mark.parametrize("name", ["test_ninformer", "test_dependencyvit", "test_vit_tcpa"])
def test_embed_dim(name: str) -> None:
    model = build(name)
    assert model.embed_dim == model.num_features == model.patch_embed.proj.out_channels


# scripts and graphs


class Last(nn.Module):
    """A module of somebody else around a feature net."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        features = self.net(x)
        return features[-1].mean((2, 3))


@each_kind
@pytest.mark.parametrize("wrapper", [None, "getter"], ids=["default", "getter"])
def test_features_script_inside_a_module(name: str, wrapper: str | None) -> None:
    net = Last(build(name, features_only=True, **({"feature_cls": wrapper} if wrapper else {})))
    x = sample(net.net)
    with torch.no_grad():
        close(torch.jit.script(net)(x), net(x), "graph")


def test_oat_says_why_it_does_not_script() -> None:
    model = timm.create_model("test_oat")
    for module in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"OAT cannot be scripted: .*; use torch.export"):
            torch.jit.script(module)


def tap(name: str, extract: Callable[..., nn.Module]) -> tuple[Tensor, Tensor]:
    """A level of a model by a tracing extractor, and by a hook."""
    model = build(name, **({"dense_taps": True} if "dependencyvit" in name else {}))
    x, module, seen = sample(model), model.feature_info[-2]["module"], []
    with torch.no_grad():
        handle = model.get_submodule(module).register_forward_hook(lambda _, __, out: seen.append(out))
        model(x)
        handle.remove()
        return extract(model, {module: "level"})(x)["level"], seen[0]


@each_kind
def test_fx_extractor(name: str) -> None:
    close(*tap(name, create_feature_extractor), "graph")


@each_kind
def test_torchvisions_extractor_traces_too_deep(name: str) -> None:
    """As README.md says; when this fails, drop the sentence."""
    with pytest.raises((TypeError, NotImplementedError, torch.fx.proxy.TraceError)):
        tap(name, torchvision_extractor)
