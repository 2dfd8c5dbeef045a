"""TCPA: the official outputs, the fused form against the plain one, hosts, tuning, caching."""

import copy

import pytest
import timm
import torch
from golden import image, load, weights
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from tolerance import close, golden_close, op_close
from torch import nn

from vizoo.backbones.layers import (
    convert_tcpa,
    freeze_backbone,
    load_tcpa_state_dict,
    prompt_attention,
    reference_prompt_attention,
    tcpa,
    tcpa_parameters,
    tcpa_state_dict,
    vpt,
)
from vizoo.backbones.layers.prompt_tuning import TCPA

CASES = ["tcpa_vfpt_tiny", "tcpa_vfpt_tiny_rtcpa_iprompt", "tcpa_vpt_tiny"]
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
PLAIN = {"fused": True, "plain": False}


def small(seed=0, host="tcpa", settings=None, **kwargs):
    """A prompted transformer in evaluation mode."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**VIT, **kwargs}).eval()
    return {"tcpa": tcpa, "vpt": vpt}[host](model, **(settings or {}))


# official outputs


@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("name", CASES)
def test_golden(name, fused):
    """Logits, tokens, matching loss of every block and every choice."""
    case = load(name)
    meta = case.meta
    model = tcpa(
        VisionTransformer(**meta["vit"]).eval(),
        host=meta["host"],
        cls_pool=meta["pool_size_cls"],
        image_pool=meta["pool_size_image"],
        cls_topk=meta["topk_cls"],
        image_topk=meta["topk_image"],
        cls_len=meta["len_prompts_cls"],
        image_len=meta["len_prompts_image"],
        role_only=not meta["T_TCPA"],
        pixel_prompt=meta["IPrompt"],
        fused=fused,
    )
    model.load_state_dict(convert_tcpa(weights(case.keys)))
    chosen = []
    for block in model.blocks:
        block.tcpa.register_forward_hook(lambda _, __, out: chosen.append(out[0]))
    x = image(case.input_shape)
    with torch.no_grad():
        golden_close(model.forward_features(x), case.outputs["tokens"], "tokens")
        if meta["T_TCPA"]:
            losses = torch.stack([block.tcpa.memory.match_loss for block in model.blocks])
            golden_close(losses, case.outputs["match_loss"], "matching loss")
            close(model.match_loss, losses.sum(), "rerun")
            mask, n = torch.stack(chosen), case.outputs["mask_cls"].shape[-1]
            assert torch.equal(mask[:, :, 0, :n].float(), case.outputs["mask_cls"])
            assert torch.equal(mask[:, :, 1:, n:].float(), case.outputs["mask_image"])
            assert not mask[:, :, 0, n:].any()
            assert not mask[:, :, 1:, :n].any()
        else:
            assert model.match_loss is None
        golden_close(model(x), case.outputs["logits"], "logits")
        golden_close(model(x), case.outputs["logits"], "logits from kept prompts")


def test_golden_match():
    """The matching alone."""
    case = load("tcpa_match")
    state, topk = weights(case.keys), case.meta["args"]["topk"]
    layer = small().blocks[0].tcpa
    for i, keys in enumerate(state["keys"]):
        chosen, distance = layer.nearest(image(case.input_shape).unsqueeze(0), keys, topk)
        index = case.outputs[f"index{i}"].long()
        assert torch.equal(chosen[0], torch.zeros_like(chosen[0]).scatter(1, index, 1.0))
        golden_close(distance.reshape(1), case.outputs[f"dist{i}"], "distance")


def test_golden_vfpt():
    case = load("vfpt_tiny")
    model = vpt(VisionTransformer(**case.meta["vit"]).eval(), num_prompts=case.meta["p_len"], fourier=True)
    model.load_state_dict(convert_tcpa(weights(case.keys)))
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")
