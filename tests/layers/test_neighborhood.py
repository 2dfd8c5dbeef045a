"""NeighborhoodAttention in other networks, and what it refuses."""

import pytest
import timm
import torch
from golden import image
from tolerance import close

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
