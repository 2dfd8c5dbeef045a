"""Attention in parts, as a GPU takes many windows; HiLo's tests run it on windows."""

import torch
from tolerance import op_close

from vizoo.backbones.ops import attention as module
from vizoo.backbones.ops.attention import attention
from vizoo.backbones.ops.backend import kernels_on


def test_masks_and_dropout_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    shapes = ((5, 2, 3, 4), (5, 2, 6, 4), (5, 2, 6, 7), (5, 1, 3, 6), (1, 2, 3, 6))
    q, k, v, mask, shared = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for m in (mask, shared, shared[0], None):
        with kernels_on("cpu"):
            found = attention(q, k, v, m)
        op_close(found, attention(q, k, v, m))
    with kernels_on("cpu"):
        assert attention(q, k, v, mask, drop=0.5).shape == (5, 2, 3, 7)
