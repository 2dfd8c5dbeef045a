"""Registered transformers with prompts: size, checkpoints, copies, changed layers."""

import copy
import pickle

import pytest
import timm
import torch
from changes import check_calls, check_script_inside
from tolerance import close
from zoo import build

from vizoo.backbones.layers import (
    freeze_backbone,
    tcpa_parameters,
)

NAMES = ["test_vit_tcpa", "test_vit_gap_tcpa"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_called(name):
    """Every layer in every mode; norm and qkv read tokens and prompts."""
    found = check_calls(build(name), lambda model: model(torch.ones(2, 3, 96, 96)))
    twice = {n for n, times in found.items() if times == 2}
    assert twice == {f"blocks.{i}.{layer}" for i in range(3) for layer in ("norm1", "attn.qkv")}
    assert set(found.values()) == {1, 2}
    attended = []
    model = build(name)
    model.blocks[0].attn.register_forward_hook(lambda _, __, out: attended.append(out.shape))
    model(torch.ones(2, 3, 96, 96))
    assert attended == [(2, 36 + model.num_prefix_tokens, 64)]


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    """Copies and pickles after a pass, whose matching loss has a graph."""
    model, x = build(name, num_classes=7), torch.randn(1, 3, 96, 96)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.match_loss is None
        close(twin(x), expected, "same")
        close(twin.match_loss, model.match_loss, "same")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_script_inside(name):
    model, x = build(name, scriptable=True), torch.randn(2, 3, 96, 96)
    scripted = check_script_inside(model, x)
    with torch.no_grad():
        assert scripted(x[:0])[1].shape == (0, 64, 6, 6)


def test_official_size():
    """The published number of trained parameters."""
    model = freeze_backbone(timm.create_model("vit_base_patch16_224_tcpa", num_classes=10, device="meta"))
    assert sum(p.numel() for p in tcpa_parameters(model)) == 671_242
    assert sum(p.numel() for n, p in model.named_parameters() if ".tcpa." in n) == 663_552


def test_backbone_checkpoint():
    """A plain checkpoint fills the backbone, an official one everything."""
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": bare.state_dict(), "num_classes": 3}}
    model = timm.create_model("vit_tiny_patch16_224_tcpa", num_classes=3, depth=1, **overlay)
    for key, value in bare.state_dict().items():
        close(model.state_dict()[key], value, "same", key)
