"""NeighborhoodAttention in other networks, and what it refuses."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image
from tolerance import close, op_close

from vizoo.backbones.layers import NeighborhoodAttention


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_replaces_that_of_a_vit(qkv_bias):
    vit = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", depth=2)
    for block in vit.blocks:
        block.attn = NeighborhoodAttention(192, 6, kernel_size=5, dilation=2, qkv_bias=qkv_bias)
    vit(image((1, 3, 224, 224))).square().mean().backward()
    assert torch.isfinite(vit.blocks[0].attn.rpb.grad).all()
    layer, x = vit.blocks[0].attn.eval(), image((2, 12, 9, 192))
    with torch.no_grad():
        close(layer(x.flatten(1, 2), [12, 9]), layer(x).flatten(1, 2), "same")
        layer.fused_attn = False
        close(layer(x.flatten(1, 2), [12, 9]), layer(x).flatten(1, 2), "same")


def test_attention_arguments():
    with pytest.raises(ValueError, match="dilation=0"):
        NeighborhoodAttention(16, 2, dilation=0)
    layer = NeighborhoodAttention(16, 2, kernel_size=3)
    x = image((1, 12, 16))
    with pytest.raises(ValueError, match="12 tokens for a 3x3 map"):
        layer(x)
    with pytest.raises(ValueError, match="no attention mask"):
        layer(x, [3, 4], attn_mask=torch.zeros(12, 12))


# what pictures show


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (5, 7)),
        ({"dilation": 2}, (7, 11)),
        ({"dilation": 3}, (4, 13)),  # smaller than the window: padded
        ({"kernel_size": 4}, (4, 9)),
        ({"kernel_size": 5, "rpb": False, "qkv_bias": False}, (3, 2)),
        ({"dilation": 2, "dtype": torch.bfloat16}, (7, 11)),
    ],
    ids=str,
)
def test_weights_are_the_attention(options, size):
    """At every token, corners and edges too: weights times the values of their keys give the layer's output."""
    options = {"kernel_size": 3, "dtype": torch.float64, **options}
    layer = NeighborhoodAttention(8, 2, **options)
    torch.nn.init.eye_(layer.proj.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    x = torch.randn(1, *size, 8, dtype=options["dtype"])
    beyond = [max(0, layer.kernel_size * layer.dilation - n) for n in size]
    with torch.no_grad():
        out = layer(x)
        v = layer.qkv(F.pad(x, [0, 0, 0, beyond[1], 0, beyond[0]]))[0, ..., 16:].unflatten(2, (2, 4))
        found = torch.zeros_like(out, dtype=torch.float64)
        for row, col in itertools.product(*map(range, size)):
            weights, keys = layer.weights_at(x, row, col)
            close(weights.sum((2, 3)), torch.ones_like(weights[:, :, 0, 0]), "rerun")
            values = v[keys[..., 0], keys[..., 1]].permute(2, 0, 1, 3)  # [h, K, K, d]
            found[0, row, col] = (weights[0].unsqueeze(3) * values).sum((1, 2)).flatten()
    op_close(out, found)
