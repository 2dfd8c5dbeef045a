"""The contract of timm over every registered model: registry, construction, heads, training, weights, table."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import get_arch_pretrained_cfgs, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from tolerance import close
from torch import nn
from zoo import (
    BACKWARD,
    FORWARD,
    REGISTERED,
    SMALL,
    QuickMeta,
    all_models,
    as_nchw,
    build,
    each_kind,
    gradients,
    input_shape,
    is_fixed,
    module_of,
    names_of,
    other_models,
    overlay,
    recorded,
    sample,
)

POOLS = ("avg", "max", "avgmax", "catavgmax")


# registry and interface


@all_models
def test_registry_entry(name: str) -> None:
    """Name, entry point and every configuration are complete."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name), "not lower snake case"
    entry, module = timm.models.model_entrypoint(name), module_of(name)
    family = module.__name__.rpartition(".")[2]
    assert name in module.__all__
    assert name in timm.list_models(module=family)
    parameters = inspect.signature(entry).parameters
    assert parameters["pretrained"].default is False
    assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    cfgs = get_arch_pretrained_cfgs(name)
    assert cfgs, "no configuration: timm's own checks would skip the model"
    for key, cfg in cfgs.items():
        assert cfg.architecture == name, key
        assert cfg.input_size is not None, key
        assert len(cfg.input_size) == 3, key
        assert len(cfg.mean) == len(cfg.std) == cfg.input_size[0], key
        assert cfg.interpolation in ("bilinear", "bicubic", "nearest", "random"), key
        assert 0 < cfg.crop_pct <= 1, key
        assert cfg.pool_size, key
        assert cfg.first_conv, key
        assert cfg.classifier or not cfg.num_classes, key
        if cfg.has_weights:
            assert cfg.license, f"{key}: weights without a licence"
            assert cfg.hf_hub_id != "timm/", f"{key}: the bare organisation is timm's own"


def test_names_are_not_timms() -> None:
    """A name that timm registers would silently replace timm's model."""
    functions = (
        node
        for path in (Path(timm.__file__).parent / "models").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    )
    theirs = {f.name for f in functions if any(getattr(d, "id", "") == "register_model" for d in f.decorator_list)}
    assert len(theirs) > 1000, "the search in timm's files found too little to be right"
    assert not theirs & set(REGISTERED)


@all_models
def test_interface(name: str) -> None:
    """Attributes, methods and defaults that timm's wrappers and scripts rely on."""
    model = build(name, device="meta")
    for attribute in ("num_classes", "in_chans", "num_features", "head_hidden_size"):
        assert isinstance(getattr(model, attribute), int), attribute
    cfg = model.pretrained_cfg
    assert model.num_classes == cfg["num_classes"]
    assert model.in_chans == cfg["input_size"][0]

    def defaults(method) -> dict:
        return {k: p.default for k, p in inspect.signature(method).parameters.items()}

    expected = {"indices": None, "norm": False, "stop_early": False, "output_fmt": "NCHW", "intermediates_only": False}
    assert expected.items() <= defaults(model.forward_intermediates).items()
    expected = {"indices": 1, "prune_norm": False, "prune_head": True}
    assert expected.items() <= defaults(model.prune_intermediate_layers).items()
    assert defaults(model.reset_classifier)["global_pool"] is None
    assert defaults(model.forward_head)["pre_logits"] is False
    assert defaults(model.group_matcher)["coarse"] is False
    assert defaults(model.set_grad_checkpointing)["enable"] is True
    accepted = defaults(type(model).__init__)
    wanted = {"in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype"}
    assert wanted <= accepted.keys()
    assert len(model.feature_info) >= 3
    for info in model.feature_info:
        assert info["num_chs"] > 0
        model.get_submodule(info["module"])  # raises for an unknown name
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(reductions)
    state = model.state_dict()
    heads = names_of(cfg["classifier"]) if cfg["num_classes"] else ()
    for key in (*names_of(cfg["first_conv"]), *heads):
        assert f"{key}.weight" in state, f"{key} of the configuration is not in the model"
    classifier = model.get_classifier()
    assert {id(model.get_submodule(n)) for n in names_of(cfg["classifier"])} == {
        id(m) for m in (classifier if isinstance(classifier, tuple) else (classifier,))
    }
    sizes = {c.input_size: tuple(c.pool_size) for c in get_arch_pretrained_cfgs(name).values()}
    for size, pool in sizes.items():
        if not is_fixed(model) or size == cfg["input_size"]:
            with QuickMeta():
                final, taps = model.forward_intermediates(torch.empty(1, *size, device="meta"))
            assert as_nchw(final, model).shape == (1, model.num_features, *pool), size
            for tap, info in zip(taps, model.feature_info, strict=True):
                assert tap.shape[1] == info["num_chs"], info
                assert tap.shape[2:] == tuple(-(-n // info["reduction"]) for n in size[1:]), info


@each_kind
def test_unknown_argument_raises(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        build(name, device="meta", no_such_argument=1)


# construction and heads, on the meta device


@each_kind
def test_everything_is_placed(name: str) -> None:
    """``device=`` and ``dtype=`` reach every tensor, with and without a device context."""
    explicit = build(name, device="meta", dtype=torch.float64)
    with torch.device("meta"):
        ambient = build(name)
    for model, dtype in ((explicit, torch.float64), (ambient, torch.float32)):
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tensor.device.type == "meta", f"{key} on {tensor.device}"
            assert tensor.dtype == dtype or not tensor.is_floating_point(), f"{key} is {tensor.dtype}"


@each_kind
def test_shapes_at_default_size(name: str) -> None:
    """Unpooled map, pre-logits and every head-less form at the size of the configuration."""
    model = build(name, device="meta")
    cfg, width = model.pretrained_cfg, model.head_hidden_size
    x = torch.empty(2, *cfg["input_size"], device="meta")
    with QuickMeta():
        features = model.forward_features(x)
        pooled, unpooled = (2, width), (2, model.num_features, *cfg["pool_size"])
        assert as_nchw(features, model).shape == unpooled
        assert model.forward_head(features, pre_logits=True).shape == pooled
        assert model(x).shape == (2, cfg["num_classes"])
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == pooled
        model.reset_classifier(0, "")
        assert as_nchw(model(x), model).shape == unpooled
        assert build(name, device="meta", num_classes=0)(x).shape == pooled
        bare = build(name, device="meta", num_classes=0, global_pool="")
        assert as_nchw(bare(x), bare).shape == unpooled


@each_kind
def test_dtype_change_after_forward(name: str) -> None:
    """Nothing cached by a float32 pass may survive ``.to(bfloat16)``."""
    model = build(name, device="meta")
    x = torch.empty(1, *input_shape(model, SMALL), device="meta")
    assert model(x).dtype == torch.float32
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@each_kind
@pytest.mark.parametrize("pool", POOLS)
def test_head_hidden_size(name: str, pool: str) -> None:
    """The width before the classifier is announced for every pooling, or the pooling is refused."""
    try:
        model = build(name, device="meta", global_pool=pool)
    except ValueError:
        assert pool != "avg", "average pooling must be supported"
        return
    x = torch.empty(2, *input_shape(model, SMALL), device="meta")
    width = model.head_hidden_size
    with QuickMeta():
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, width)
        assert model(x).shape == (2, model.num_classes)
        model.reset_classifier(0)
        assert (model(x).shape, model.head_hidden_size) == ((2, width), width)
        model.reset_classifier(5)
        assert (model(x).shape, model.head_hidden_size) == ((2, 5), width)


@each_kind
def test_reset_classifier_inherits(name: str) -> None:
    """A rebuilt classifier takes device, dtype and mode of the model and leaves frozen weights frozen."""
    model = build(name, device="meta", dtype=torch.bfloat16, num_classes=7)
    model.requires_grad_(False)
    rebuilt = names_of(model.pretrained_cfg["classifier"])
    for training in (False, True):
        model.train(training).reset_classifier(5)
        assert model.num_classes == 5
        assert all(m.training is training for m in model.modules())
        for key, parameter in model.named_parameters():
            assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16), key
            assert not parameter.requires_grad or key.startswith(rebuilt), f"{key} was unfrozen"
        assert model.get_classifier().weight.shape == (5, model.head_hidden_size)
    if hasattr(model, "set_input_size"):
        model.requires_grad_(False)
        h, w = (2 * n for n in model.pretrained_cfg["input_size"][1:])
        model.set_input_size(img_size=(h, w))
        assert not [n for n, p in model.named_parameters() if p.requires_grad], "set_input_size unfreezes"
        x = torch.empty(1, model.in_chans, h, w, device="meta", dtype=torch.bfloat16)
        assert model(x).shape == (1, 5)


@each_kind
def test_reset_classifier_keeps_pooling(name: str) -> None:
    """Without an argument the pooling stays, and an unsupported one is refused before anything changes."""
    model = build(name)
    x = sample(model, 64)
    pools = []
    for pool in POOLS[1:]:
        try:
            model.reset_classifier(3, pool)
        except ValueError:
            continue
        pools.append(pool)
        model.reset_classifier(0)
        expected = model(x)
        model.reset_classifier(0, pool)
        close(model(x), expected, "same", pool)
    assert pools, "only average pooling: the check above never ran"
    model.reset_classifier(3, "avg")
    before, classes, expected = dict(model.named_modules()), model.num_classes, model(x)
    with pytest.raises(ValueError, match="got global_pool='no_such_pool', need"):
        model.reset_classifier(9, "no_such_pool")
    with pytest.raises(AssertionError, match="got global_pool"):  # what code for timm's models expects
        model.reset_classifier(9, "no_such_pool")
    assert dict(model.named_modules()) == before
    assert model.num_classes == classes
    close(model(x), expected, "same")


@each_kind
def test_layer_groups(name: str) -> None:
    """Layer decay sees the depth, and every name excluded from weight decay exists."""
    model = build(name, device="meta", num_classes=7)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) > 2, f"coarse={coarse}"
        assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    first, last = (groups[k] for k in (min(groups), max(groups)))
    assert {f"{n}.weight" for n in names_of(model.pretrained_cfg["first_conv"])} <= set(first)
    assert {f"{n}.weight" for n in names_of(model.pretrained_cfg["classifier"])} <= set(last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    seen = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert seen == {id(p) for p in model.parameters()}
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 2
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    names = dict(model.named_parameters())
    for pattern in listed:
        regex = re.escape(pattern).replace(r"\*", ".*")
        assert any(re.fullmatch(regex, n) for n in names), f"no parameter matches {pattern!r}"


@each_kind
def test_drop_rates(name: str) -> None:
    """Both rates arrive, and stochastic depth rises with depth."""
    model = build(name, device="meta", drop_rate=0.3, drop_path_rate=0.5)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert 0.3 in rates or getattr(model, "drop_rate", 0) == 0.3, "drop_rate is ignored"
    paths = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert paths, "drop_path_rate is ignored"
    assert max(paths) == pytest.approx(0.5)
    assert paths == sorted(paths)


# forward and backward


@each_kind
def test_forward(name: str, nan_empty: None) -> None:
    """One finite pass near the default size, which checkpointing does not change."""
    model = build(name)
    x = sample(model, FORWARD)
    with torch.no_grad():
        expected = model(x)
        close(model.forward_head(model.forward_features(x)), expected, "same")
    assert expected.shape == (1, model.num_classes)
    assert torch.isfinite(expected).all()
    model.set_grad_checkpointing()
    close(model(x).detach(), expected, "rerun")


@each_kind
def test_backward(name: str, nan_empty: None) -> None:
    """One training step at another class count gives every parameter a finite gradient."""
    model = build(name, num_classes=42).train()
    out = model(sample(model, BACKWARD, batch=2))
    assert out.shape == (2, 42)
    out.mean().backward()
    gradients(model)


@other_models
def test_inference_and_gradients(name: str, nan_empty: None) -> None:
    """At the numbers of every model, inference gives what autograd sees, and every parameter gets a gradient."""
    model = build(name, num_classes=42)
    x = sample(model)  # batches are the same code for every size: see each_kind
    out = model(x)
    with torch.no_grad():
        close(model(x), out.detach(), "layout")
    assert torch.isfinite(out).all()
    out.mean().backward()
    gradients(model)


@each_kind
def test_checkpointing_gradients(name: str) -> None:
    """Gradient checkpointing recomputes, it does not change what is learnt."""
    model = build(name, num_classes=5).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = sample(model, batch=2).requires_grad_()
    for net in (model, twin):
        net(x).square().mean().backward()
    expected = gradients(model)
    for key, gradient in gradients(twin).items():
        close(gradient, expected[key], "gradient", key)


@each_kind
def test_non_square(name: str) -> None:
    """Height and width are not mixed up anywhere."""
    model, (h, w) = build(name), (96, 160)
    if is_fixed(model):
        h, w = model.pretrained_cfg["input_size"][1], model.pretrained_cfg["input_size"][2] + 64
        model = build(name, img_size=(h, w))
    x = torch.randn(1, model.in_chans, h, w)
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
        for info, tap in zip(model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True):
            r = info["reduction"]
            assert tap.shape == (1, info["num_chs"], -(-h // r), -(-w // r)), f"reduction {r}"


@each_kind
def test_odd_size(name: str) -> None:
    """Dense prediction sends sizes that no stride divides."""
    model, size = build(name), (101, 135)
    if is_fixed(model):
        with pytest.raises(AssertionError):  # a clear refusal instead of a shape error deep inside
            model(torch.randn(1, model.in_chans, *size))
        return
    x = torch.randn(1, model.in_chans, *size)
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
        for info, tap in zip(model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True):
            for got, full in zip(tap.shape[2:], size, strict=True):
                assert abs(got - full / info["reduction"]) <= 1, f"{tuple(tap.shape)} at reduction {info['reduction']}"


@each_kind
def test_batch_consistency(name: str) -> None:
    """A sample alone equals the same sample in a batch, and a second run the first."""
    model = build(name)
    x = sample(model, BACKWARD, batch=3)
    with torch.no_grad():
        together = model(x)
        close(torch.cat([model(one) for one in x.split(1)]), together, "rerun")
        close(model(x), together, "same")


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Mixed precision trains with finite numbers."""
    model = build(name, num_classes=5).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(sample(model, batch=2))
    assert torch.isfinite(out).all()
    out.float().mean().backward()
    gradients(model)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """A model built in another dtype, or moved to it after a float32 pass, computes in it."""
    moved = build(name)
    x = sample(moved)
    with torch.no_grad():
        moved(x)
        for model in (build(name, dtype=dtype), moved.to(dtype)):
            out = model(x.to(dtype))
            assert out.dtype == dtype
            assert torch.isfinite(out).all()


@each_kind
def test_channels_last(name: str) -> None:
    """The memory format changes speed, not values."""
    model = build(name)
    x = sample(model, batch=2)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        close(model(x.contiguous(memory_format=torch.channels_last)), expected, "layout")


# weights


@each_kind
def test_copies(name: str) -> None:
    """deepcopy, pickle and a strict state-dict round trip give the same model."""
    model = build(name, num_classes=3)
    fresh = build(name, num_classes=3)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = sample(model)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            close(twin(x), expected, "same")


@each_kind
def test_weights_from_file(name: str, tmp_path: Path) -> None:
    """A local checkpoint loads as pretrained weights, also for other channels, classes and as a feature net."""
    source, path = build(name), tmp_path / "weights.pth"
    state = source.state_dict()
    torch.save({"state_dict": state}, path)
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    same = build(name, **kwargs).state_dict()
    assert list(same) == list(state)
    for key, value in same.items():
        close(value, state[key], "same", key)
    for in_chans in (1, 5):
        model = build(name, num_classes=5, in_chans=in_chans, **kwargs)
        _, h, w = input_shape(model, SMALL)
        assert model(torch.randn(1, in_chans, h, w)).shape == (1, 5)
    gray = build(name, in_chans=1, **kwargs).state_dict()
    for first in names_of(source.pretrained_cfg["first_conv"]):
        close(gray[f"{first}.weight"], state[f"{first}.weight"].sum(1, keepdim=True), "rerun", first)
    features, x = build(name, features_only=True, **kwargs), sample(source)
    taps = list(features.out_indices) if hasattr(features, "out_indices") else features.feature_info.out_indices
    with torch.no_grad():
        expected = source.forward_intermediates(x, indices=list(taps), intermediates_only=True)
        for got, tap in zip(features(x), expected, strict=True):
            close(as_nchw(got, features), tap, "graph")


@each_kind
def test_headless_checkpoint(name: str) -> None:
    """Our own state dict passes the filter unchanged: without head, and with its keys in any order."""
    model, x = build(name, num_classes=0), sample(build(name))
    state = model.state_dict()
    expected = model(x)
    for keys in (list(state), sorted(state), sorted(state, reverse=True)):
        again = build(name, num_classes=0, **overlay({k: state[k] for k in keys}))
        close(again(x), expected, "same")
    filter_fn = module_of(name).checkpoint_filter_fn
    assert filter_fn(dict(state), model).keys() == state.keys()
    assert sys.modules[type(model).__module__].checkpoint_filter_fn is filter_fn  # where timm's tools look for it


@each_kind
@pytest.mark.parametrize(("classes", "pool"), [(6, None), (3, "avg"), (0, "")], ids=["built", "reset", "bare"])
def test_saved_folder(name: str, classes: int, pool: str | None, tmp_path: Path) -> None:
    """The folder format records the head as it is now, so the model comes back from it."""
    model = build(name, num_classes=6)
    if pool is not None:
        model.reset_classifier(classes, pool)
    save_for_hf(model, tmp_path, safe_serialization=True)
    back = build(f"local-dir:{tmp_path}", pretrained=True)
    assert back.num_classes == classes
    assert list(back.state_dict()) == list(model.state_dict())
    x = sample(model)
    with torch.no_grad():
        close(back(x), model(x), "same")


@each_kind
def test_init_weights_after_to_empty(name: str) -> None:
    """Weights can be made after the memory: what ``to_empty`` left is overwritten completely."""
    model = build(name, device="meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    model.init_weights(needs_reset=True)
    fresh = dict((*build(name).named_parameters(), *build(name).named_buffers()))
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), f"{key} was not initialised"
        spread, expected = (t.float().std(correction=0).item() for t in (tensor, fresh[key]))
        rel = max(0.5, 4 * tensor.numel() ** -0.5)  # a few values alone may differ by chance
        assert spread == pytest.approx(expected, rel=rel, abs=1e-6), f"{key}: standard deviation"
    assert torch.isfinite(model(sample(model))).all()


# the recorded table


def expected_rows() -> list[str]:
    """Every architecture, and every tag whose input size is not that of its architecture."""
    rows = []
    for name in REGISTERED:
        cfgs = get_arch_pretrained_cfgs(name)
        size = timm.models.get_pretrained_cfg(name).input_size
        rows.append(name)
        rows += [key for key, cfg in cfgs.items() if cfg.input_size != size]
    return rows


def test_table_is_complete() -> None:
    """No model without a row, no row without a model, no accuracy without a source."""
    table = recorded()
    assert sorted(table) == sorted(expected_rows())
    for name, row in table.items():
        if row["paper_top1"]:
            assert 0 < float(row["paper_top1"]) < 100, name
            assert row["source"], f"{name}: an accuracy without its source"


@pytest.mark.parametrize("row", expected_rows())
def test_table_is_exact(row: str) -> None:
    """What follows from a model is what is recorded: counts, input size, tasks, licence, weights."""
    from vizoo.tools import table

    model = build(row, device="meta")
    found = table.counted_columns(row, model)
    assert int(found["params"]) == sum(p.numel() for p in model.parameters())
    recorded_row = recorded()[row]
    assert found == {column: recorded_row[column] for column in table.COUNTED}
