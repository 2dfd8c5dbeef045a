"""ReversedAttention: the recorded layer, its masks, messages and gates."""

import copy
import math

import pytest
import torch
from golden import image, load, weights
from tolerance import close, golden_close, op_close
from torch import nn
from zoo import spread

from vizoo.backbones.layers import ReversedAttention
from vizoo.backbones.layers.reversed_attention import MessageController
from vizoo.backbones.ops.reversed_attention import dependency_mask

GATED = load("reversed_attention_gated")


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_layer(dtype, fused, grad):
    arguments = {k: v for k, v in GATED.meta["args"].items() if k != "temperature"}
    layer = ReversedAttention(**arguments, tau=GATED.meta["args"]["temperature"]).eval()
    layer.fused_attn, layer.record = fused, True
    layer.load_state_dict(weights(GATED.keys))
    layer, x = layer.to(dtype), image(GATED.input_shape).to(dtype)
    with torch.set_grad_enabled(grad):
        out, log_message, score = layer(x)
        golden_close(out, GATED.outputs["out"], "output")
        golden_close(log_message.exp(), GATED.outputs["message"], "message")
        golden_close(layer.select(x).exp(), GATED.outputs["select"], "head selector")
        q, k, weight = layer.recorded
        mask = dependency_mask(q, k, weight)
        golden_close(mask, GATED.outputs["mask"], "mask")
    assert score is log_message
    assert (mask.sum(1) - log_message.exp()).abs().max() <= 1e-6


def test_fused_and_plain_layer_have_equal_gradients():
    layer = ReversedAttention(48, 4, score="received").double()
    layer.load_state_dict(weights(GATED.keys))
    x = image((2, 23, 48)).double().requires_grad_()
    log_message = -image((2, 23), 1).double().abs()
    wanted = []
    for layer.fused_attn in (False, True):
        out, message, score = layer(x, log_message)
        loss = (out.square().sum() + message.sum() + score.square().sum()).reshape(())
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
        wanted.append((out.detach(), score.detach(), *grads))
    for actual, expected in zip(wanted[1], wanted[0], strict=True):
        op_close(actual, expected, grad=True)


def test_received_mass_is_the_row_sum_of_the_mask():
    layer = spread(ReversedAttention(24, 3, score="received")).double()
    layer.record = True
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    op_close(layer(x)[2].detach(), dependency_mask(*layer.recorded[:2], layer.recorded[2]).sum(2))


def test_messages_multiply_over_the_layers_without_underflow():
    """24 half-closed gates are 6e-8, which float16 cannot hold; logits over 0.1 would overflow there."""
    layer = ReversedAttention(32, 4, gate_init=0.0).half()
    nn.init.zeros_(layer.message_controller.fc2.weight)
    nn.init.constant_(layer.head_selector.weight, 200.0)
    x, log_message = torch.ones(1, 5, 32).half(), None
    for _ in range(24):
        out, log_message, _ = layer(x, log_message)
    torch.testing.assert_close(log_message, torch.full((1, 5), 24 * math.log(0.5)))
    assert log_message.dtype == torch.float32
    assert out.isfinite().all()
    torch.testing.assert_close(layer.select(x).exp(), torch.full((1, 5, 4), 0.25))


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gates_are_computed_in_float32(dtype, grad):
    layer = spread(MessageController(48, init=0.0))
    x = image((2, 19, 48))
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        with torch.autocast("cpu", dtype=dtype):
            close(layer(x), expected, "same")
        half, x = copy.deepcopy(layer).to(dtype), x.to(dtype)
        wide = copy.deepcopy(half).float()
        out, expected = half(x), wide(x.float())
        close(out, expected, "same")
    if grad:
        for p, gradient in zip(half.parameters(), torch.autograd.grad(expected.sum(), wide.parameters()), strict=True):
            (found,) = torch.autograd.grad(out.sum(), p, retain_graph=True)
            close(found, gradient.to(dtype), "same")
    for child in half.children():
        child.register_forward_hook(lambda *_: None)
    off = (half(x) - wide(x.float())).abs().max()  # watched layers are called, in their own dtype
    assert 1e-6 < off < 0.1
