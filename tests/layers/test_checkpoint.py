"""``unwrap``: containers, prefixes, whole detectors; and what families make of wrapped checkpoints."""

from __future__ import annotations

import collections
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import load, weights
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from zoo import build, module_of

from vizoo.backbones.layers.checkpoint import unwrap

CONTAINERS = ["state_dict_ema", "model_ema", "state_dict", "model"]
WRAPPERS = ["module.", "_orig_mod.", "model."]


def state(value: float = 0.0) -> dict[str, Tensor]:
    return {"conv.weight": torch.full((2, 3), value), "head.bias": torch.full((2,), value)}


def prefixed(prefix: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in given.items()}


def same(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return list(got) == list(expected) and all(got[k] is expected[k] for k in got)


def filtered(name: str, given: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
    """What the family makes of a checkpoint."""
    out: dict[str, Tensor] = module_of(name).checkpoint_filter_fn(given, build(name, **kwargs))
    return out


# containers


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CONTAINERS, 2)))
def test_order_of_containers(first: str, second: str) -> None:
    wanted = state()
    for pairs in ([(first, wanted), (second, state(1))], [(second, state(1)), (first, wanted)]):
        assert same(unwrap({**dict(pairs), "epoch": 3, "optimizer": {"state": {}}}), wanted)
    for nothing in (None, {}, "resnet", torch.zeros(2)):
        assert same(unwrap({first: nothing, second: wanted, "epoch": 3}), wanted)


@pytest.mark.parametrize(("outer", "inner"), list(itertools.permutations(CONTAINERS, 2)))
def test_nested_containers(outer: str, inner: str) -> None:
    wanted = collections.OrderedDict(state())
    assert same(unwrap({outer: {inner: wanted, "epoch": 3}}), wanted)


def test_no_container() -> None:
    wanted = state()
    got = unwrap(wanted)
    assert same(got, wanted)
    assert got is not wanted
    for given in ({}, {"model": torch.zeros(2), "bias": torch.zeros(2)}, {0: torch.zeros(2), 1: torch.zeros(2)}):
        assert unwrap(given) == given
    assert unwrap({"state_dict": {}, "model": {}}) == {}
    cycle: dict[str, Any] = {}
    cycle["model"] = cycle
    assert unwrap(cycle) == cycle


@pytest.mark.parametrize("given", [None, [1], torch.zeros(2), nn.Linear(1, 1)], ids=lambda x: type(x).__name__)
def test_no_dictionary(given: Any) -> None:
    with pytest.raises(ValueError, match=f"holds a {type(given).__name__}, need a dictionary"):
        unwrap(given)


# prefixes


def test_losses_beside_a_model_of_lightning() -> None:
    given = {**prefixed("model.", state()), "criterion.weight": torch.ones(2), "n_averaged": torch.tensor(3)}
    assert unwrap({"state_dict": given}).keys() == given.keys() - {"n_averaged"}
    assert unwrap({"state_dict": given, "pytorch-lightning_version": "2.5"}).keys() == state().keys()
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3)).state_dict()
    assert unwrap(averaged).keys() == {"weight", "bias"}


@pytest.mark.parametrize("prefixes", [p for n in (1, 2, 3) for p in itertools.permutations(WRAPPERS, n)], ids="".join)
def test_prefixes(prefixes: tuple[str, ...]) -> None:
    wanted = state()
    given = prefixed("".join(prefixes), wanted)
    assert same(unwrap({"state_dict": given}), wanted)
    assert next(iter(given)).startswith(prefixes[0])  # the argument stays


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_part_is_no_wrapper(prefix: str) -> None:
    """A prefix that some names lack belongs to the model, also below a wrapper."""
    wanted = {**prefixed(prefix, state()), "fc.weight": torch.zeros(2)}
    assert same(unwrap(wanted), wanted)
    for wrapper in WRAPPERS:
        assert same(unwrap(prefixed(wrapper, wanted)), wanted)
    inside = prefixed(f"body.{prefix}", state())
    assert same(unwrap(inside), inside)
    bare = {prefix.rstrip("."): torch.zeros(2)}
    assert same(unwrap(bare), bare)


@pytest.mark.parametrize("wrapper", ["", *WRAPPERS])
def test_dense(wrapper: str, caplog: pytest.LogCaptureFixture) -> None:
    backbone = state()
    whole = {**prefixed("backbone.", backbone), "neck.0.weight": torch.zeros(1), "decode_head.bias": torch.zeros(1)}
    with caplog.at_level(logging.INFO, logger="vizoo"):
        assert same(unwrap({"state_dict": prefixed(wrapper, whole)}, dense=True), backbone)
    assert caplog.messages == ["left out of the checkpoint: decode_head, neck"]
    caplog.clear()
    assert same(unwrap({"state_dict": prefixed(wrapper, whole)}), whole)
    assert same(unwrap(backbone, dense=True), backbone)
    assert same(unwrap(prefixed("backbone.", backbone), dense=True), backbone)
    assert not caplog.messages


# families


@pytest.mark.parametrize("how", ["file", "state_dict", "checkpoint_path"])
def test_averaged_weights_of_timms_script_win(how: str, tmp_path: Path) -> None:
    model = build("test_ulsam", num_classes=3)
    average = ModelEmaV3(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters()), model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 1.0)
    path = tmp_path / "last.pth.tar"
    source = torch.load(path, weights_only=True) if how == "state_dict" else str(path)
    given = {"pretrained": True, "pretrained_cfg_overlay": {how: source, "num_classes": 3}}
    kwargs = {how: source} if how == "checkpoint_path" else given
    loaded = timm.create_model("test_ulsam", num_classes=3, **kwargs).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in average.module.state_dict().items())
    assert not torch.equal(loaded["classifier.weight"], model.classifier.weight)


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "model._orig_mod."])
def test_official_names_under_a_wrapper(wrapper: str) -> None:
    """NiNformer's own blocks are called ``model.``."""
    official = weights(load("ninformer_small").keys)
    got = filtered("ninformer_cifar", {"state_dict": prefixed(wrapper, official)}, embed_dim=64, depth=2)
    model = build("ninformer_cifar", embed_dim=64, depth=2)
    model.load_state_dict(got, strict=True)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, official["model.1.ffn.net.0.weight"])


FAMILIES = {
    "test_dependencyvit": "backbone.",
    "test_halonet": "backbone.",
    "test_litv2": "backbone.",
    "test_medusa": "model.",
    "test_nat": "backbone.",
    "test_ninformer": "model.",
    "test_oat": "model.",
    "test_overlock": "backbone.",
    "test_ulsam": "model.",
    "test_vit_tcpa": "model.",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    """Averaged weights in a checkpoint of Lightning, or of a whole detector trained in several processes."""
    model = build(name)
    own = model.state_dict()
    whole = prefixed(FAMILIES[name], own)
    if FAMILIES[name] == "backbone.":
        whole = {**prefixed("module.", whole), "module.neck.weight": torch.zeros(1)}
    broken = {k: torch.zeros(1) for k in own}
    got = filtered(name, {"state_dict_ema": whole, "state_dict": broken, "model": broken})
    assert got.keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in got.items())
