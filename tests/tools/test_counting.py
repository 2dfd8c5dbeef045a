"""Counting: the published anchors, hand numbers of every construct, both engines, and a model left as it was."""

import copy
import ctypes
import dataclasses
import functools
import io
import math
import random
import threading
import warnings
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hand_counts import Call
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from zoo import each_kind, is_fixed

from vizoo.backbones.ops.cost import COSTS, Cost, register_cost
from vizoo.tools.profiling.counting import copied, count, differences, fvcore_counts, unwrap
from vizoo.tools.profiling.meta import Kernels

# model, size, parameters, multiply-accumulates, fvcore's own total, activations
ANCHORS = {
    "vit_tiny_patch16_224": (224, 5_717_416, 1_253_683_200, 1_258_411_200, 5_974_636),
    "swin_tiny_patch4_window7_224": (224, 28_288_354, 4_490_566_656, 4_509_194_496, 17_055_352),
    "halonet26t": (256, 12_480_288, 3_172_810_752, 3_193_978_880, 11_693_032),
    "resnet18": (224, 11_689_512, 1_814_073_344, 1_819_065_856, 2_484_712),
    "convnext_tiny": (224, 28_589_128, 4_455_531_264, 4_470_437_376, 13_435_624),
    "pvt_v2_b2": (224, 25_362_856, 4_026_734_592, 4_045_817_152, 27_529_592),
    "mambaout_tiny": (224, 26_545_096, 4_469_655_744, 4_486_040_064, 16_683_688),
}
ATTENDING = {"vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b2"}
"""Those that call fused attention, or not; the others are one model."""
ANCHOR_KINDS = {
    f"{name}-{'fused' if fused else 'unfused'}": (name, fused)
    for name in ANCHORS
    for fused in (True, False)
    if fused or name in ATTENDING
}
each_anchor = pytest.mark.parametrize(("name", "fused"), ANCHOR_KINDS.values(), ids=ANCHOR_KINDS)


def build(name, device="cpu", fused=True):
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(fused)
    try:
        return timm.create_model(name, device=device).eval()
    finally:
        set_fused_attn(*before)


def both(model, *inputs):
    """Multiply-accumulates on which meta, fake and real tensors and the second engine agree."""
    found = {engine: count(model, *inputs, engine=engine) for engine in ("meta", "fake", "real")}
    assert len({c.macs for c in found.values()}) == 1, found
    assert len({c.flops_other for c in found.values()}) == 1, found
    assert all(c.uncounted == {} for c in found.values()), found
    second = fvcore_counts(model, *inputs)
    assert differences(found["meta"], second) == []
    assert second.get("", 0) == found["meta"].macs
    return found["meta"]


# anchors


@each_anchor
def test_anchor_on_meta(name, fused):
    size, params, macs, _, acts = ANCHORS[name]
    model = build(name, "meta", fused)
    assert any(getattr(m, "fused_attn", None) is not None for m in model.modules()) == (name in ATTENDING)
    for batch in (1, 8):
        c = count(model, torch.empty(batch, 3, size, size, device="meta"))
        assert (c.params, c.macs, c.acts) == (params, batch * macs, batch * acts)
        assert c.uncounted == {}
        assert c.engine == "meta"


@pytest.mark.slow
@each_anchor
def test_anchor_on_cpu(name, fused):
    """Real tensors and the trace agree, and fvcore's own total is the one papers print, fused or not."""
    size, params, macs, total, acts = ANCHORS[name]
    model = build(name, fused=fused)
    x = torch.randn(1, 3, size, size)
    real, meta = count(model, x, engine="real"), count(model, x)
    assert (real.params, real.macs, real.acts, real.uncounted) == (params, macs, acts, {})
    assert (real.flops_other, real.kernels) == (meta.flops_other, meta.kernels)
    assert fvcore_counts(model, x)[""] == macs
    assert fvcore_counts(model, x, contractions=False)[""] == total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_anchor_of_fvcore_alone(name):
    """The totals and activations in the table are what fvcore says of an unfused model, without our handlers."""
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

    size, _, _, total, acts = ANCHORS[name]
    model, x = build(name, fused=False), torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total() == total
        assert ActivationCountAnalysis(model, x).unsupported_ops_warnings(False).total() == acts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "halonet26t"])
def test_anchor_in_a_batch_on_cpu(name):
    size, _, macs, _, acts = ANCHORS[name]
    c = count(build(name), torch.randn(8, 3, size, size), engine="real")
    assert (c.macs, c.acts) == (8 * macs, 8 * acts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [("swin_large_patch4_window12_384", 384, 103_919_087_616), ("convnext_large", 224, 34_361_433_600)],
)
def test_large_anchor(name, size, macs):
    assert count(build(name, "meta"), torch.empty(1, 3, size, size, device="meta")).macs == macs


def test_fused_and_unfused_cost_the_same():
    x = torch.empty(1, 3, 224, 224, device="meta")
    a, b = (count(build("vit_tiny_patch16_224", "meta", f), x) for f in (True, False))
    assert (a.macs, a.acts, a.flops_other) == (b.macs, b.acts, b.flops_other)
    assert (a.kernels, a.bytes) < (b.kernels, b.bytes)
    assert a.by_op()[1]["op"] == "aten::scaled_dot_product_attention"


def test_backward_of_fused_attention():
    """Three times the forward, and the scores recomputed: 3.048 for ViT-Tiny."""
    model = build("vit_tiny_patch16_224")
    x = torch.randn(1, 3, 224, 224)
    forward, both_ways = count(model, x), count(model, x, backward=True)
    assert round(both_ways.macs / forward.macs, 3) == 3.048
    scores = 12 * 3 * 197**2 * 64  # layers, heads, queries by keys, head size
    first = 196 * 768 * 192  # the image needs no gradient
    assert both_ways.macs == 3 * forward.macs + scores - first
    assert both_ways.uncounted == {}
    assert all(p.grad is None for p in model.parameters())


GROUPED = {
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), 8 * 5 * 7 * 9),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), 12 * 5 * 7 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, groups=2), 8 * 7 * 9 * 3 * 9),
}


@pytest.mark.parametrize(("conv", "macs"), GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("engine", ["fake", "real", "meta"])
def test_backward_of_convolutions(conv, macs, engine):
    """The gradients of input and weight cost a forward pass each, whatever the groups."""
    x = torch.randn(1, 8, 7, 9, requires_grad=True)
    found = count(conv, x, backward=True, engine=engine)
    assert (found.macs, found.uncounted) == (3 * macs, {})
    assert count(conv, x.detach(), backward=True, engine=engine).macs == 2 * macs


@each_kind
def test_backward_of_the_zoo_is_priced(name):
    model = build(name)
    c, h, w = model.pretrained_cfg["input_size"]
    x = torch.randn(2, c, h, w) if is_fixed(model) else torch.randn(2, c, 96, 128)
    both_ways, forward = count(model, x, backward=True), count(model, x)
    assert both_ways.uncounted == {}
    assert 1.5 < both_ways.macs / forward.macs < 3.2  # merging branches costs a forward pass only
    assert all(p.grad is None for p in model.parameters())


# constructs, by hand


def test_multihead_attention():
    mha, x = nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 128, 64)
    for need_weights in (True, False):
        found = both(Call(lambda m, t, n=need_weights: m.mha(t, t, t, need_weights=n)[0], mha=mha), x)
        assert found.macs == 8_388_608


def test_transformer_encoder_layer():
    layer, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), torch.randn(2, 128, 64)
    assert both(layer, x).macs == 12_582_912
    with torch.no_grad():
        fast = FlopCounterMode(display=False)
        with fast:
            layer(x)
    assert torch.backends.mha.get_fastpath_enabled()


def test_native_attention_operators():
    """The fused fast path itself, should a model call it."""
    x = torch.randn(2, 128, 64)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu").eval()
    a = layer.self_attn

    def attend(m, t):
        a = m.a
        weights = (a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)
        return torch._native_multi_head_attention(t, t, t, 64, 4, *weights, need_weights=False)

    found = count(Call(attend, a=a), x, engine="real")
    assert (found.macs, found.uncounted) == (8_388_608, {})
    assert count(Call(attend, a=a), x, engine="real").acts == count(a, x, x, x).acts

    def encode(m, t):
        layer, a = m.layer, m.layer.self_attn
        return torch._transformer_encoder_layer_fwd(
            t, 64, 4, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias, True, False, 1e-5,
            layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
            layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        )  # fmt: skip

    found = count(Call(encode, layer=layer), x, engine="real")
    assert (found.macs, found.uncounted) == (12_582_912, {})
    assert found.acts == count(layer, x).acts


def test_deform_conv2d():
    from torchvision.ops import DeformConv2d

    offset, conv = nn.Conv2d(16, 18, 3, padding=1), DeformConv2d(16, 32, 3, padding=1)
    found = both(Call(lambda m, x: m.conv(x, m.offset(x)), offset=offset, conv=conv), torch.randn(1, 16, 32, 32))
    assert found.modules["offset"].macs == 2_654_208
    assert found.modules["conv"].macs == 4_718_592
    assert found.modules["conv"].other == 2 * 589_824 + 32 * 32 * 32  # sampling and bias
    modulated = Call(lambda m, x, mask: m.conv(x, m.offset(x), mask), offset=offset, conv=conv)
    more = both(modulated, torch.randn(1, 16, 32, 32), torch.rand(1, 9, 32, 32))
    assert more.flops_other - found.flops_other == 9 * 16 * 32 * 32


@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "gqa", "value size", "three dimensions"])
def test_attention(kind):
    q, k, v = torch.randn(2, 6, 10, 8), torch.randn(2, 6, 14, 8), torch.randn(2, 6, 14, 8)
    options, dv, masked = {}, 8, 0
    if kind == "mask":
        options, masked = {"attn_mask": torch.randn(10, 14)}, 1
    elif kind == "causal":
        options = {"is_causal": True}
    elif kind == "gqa":
        k, v, options = k[:, :2], v[:, :2], {"enable_gqa": True}
    elif kind == "value size":
        v, dv = torch.randn(2, 6, 14, 5), 5
    elif kind == "three dimensions":
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = 2 * 6 * 10 * 14  # causal attention is not halved, groups share keys but compute all scores
    model = Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    for engine in ("real",) if masked else ("meta", "fake", "real"):  # the mask of a closure is a real tensor
        found = count(model, q, k, v, engine=engine)
        assert found.macs == scores * (8 + dv), engine
        assert found.acts == scores + 2 * 6 * 10 * dv
        assert found.flops_other == q.numel() + (5 + masked) * scores
        assert found.uncounted == {}
    assert fvcore_counts(model, q, k, v)[""] == scores * (8 + dv)


CONTRACTIONS = {
    "linear": (nn.Linear(6, 5), [(2, 7, 6)], 2 * 7 * 6 * 5),
    "convolution": (nn.Conv2d(4, 6, (3, 5), stride=2, padding=1), [(2, 4, 11, 13)], 2 * 6 * 6 * 6 * 4 * 15),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), [(1, 4, 9, 8)], 6 * 5 * 4 * 4 * 9),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), [(1, 8, 7, 9)], 12 * 5 * 7 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 7, groups=8, padding=3), [(1, 8, 7, 9)], 8 * 7 * 9 * 49),
    "one dimension": (nn.Conv1d(3, 4, 5), [(2, 3, 20)], 2 * 4 * 16 * 3 * 5),
    "three dimensions": (nn.Conv3d(3, 4, 2), [(1, 3, 4, 5, 6)], 4 * 3 * 4 * 5 * 3 * 8),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 7)], 2 * 4 * 5 * 7 * 6 * 9),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), [(1, 4, 5, 7)], 4 * 5 * 7 * 3 * 9),
    "dynamic": (
        Call(lambda x, w: F.conv2d(x.reshape(1, -1, 6, 6), w.reshape(-1, 1, 3, 3), groups=8)),
        [(2, 4, 6, 6), (2, 4, 3, 3)],
        2 * 4 * 16 * 9,
    ),
    "unfold": (
        Call(lambda x, a: torch.einsum("bckn,bkn->bcn", F.unfold(x, 3).reshape(2, 4, 9, 16), a)),
        [(2, 4, 6, 6), (2, 9, 16)],
        2 * 4 * 9 * 16,
    ),
    "same padding": (
        Call(lambda x, w: F.conv2d(x, w, padding="same", groups=2)),
        [(1, 4, 5, 7), (6, 2, 3, 4)],
        6 * 5 * 7 * 2 * 12,
    ),
    "einsum": (Call(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b)), [(2, 3, 4, 5), (2, 3, 6, 5)], 720),
    "einsum of many": (  # more than the digits that NumPy prints
        Call(lambda a, b: torch.einsum("byhwc,hkc->byhwk", a, b)),
        [(1, 3, 28, 27, 97), (28, 13, 97)],
        3 * 28 * 27 * 97 * 13,
    ),
    "einsum with dots": (Call(lambda a, b: torch.einsum("...ij,...kj", a, b)), [(2, 1, 3, 4), (5, 6, 4)], 2 * 5 * 72),
    "einsum of sums": (Call(lambda a, b: torch.einsum("bij,bjk->bi", a, b)), [(2, 3, 4), (2, 4, 5)], 24),
    "einsum broadcast": (Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)), [(1, 3, 4), (2, 4, 5)], 120),
    "einsum without a sum": (Call(lambda a, b: torch.einsum("ij,jk->ijk", a, b)), [(3, 4), (4, 5)], 0),
    "einsum of a diagonal": (Call(lambda a, b: torch.einsum("iij,jk->ik", a, b)), [(3, 3, 4), (4, 5)], 60),
    "einsum of one": (Call(lambda a: torch.einsum("ij->j", a)), [(3, 4)], 0),
    "einsum of three": (
        Call(lambda *t: torch.einsum("ij,jk,kl->il", *t)),
        [(2, 3), (3, 4), (4, 5)],
        2 * 3 * 4 + 2 * 4 * 5,
    ),
    "einsum by a path": (
        Call(lambda *t: torch._C._VariableFunctions.einsum("ij,jk,kl,l->i", list(t), path=[3, 2, 2, 1, 1, 0])),
        [(2, 3), (3, 4), (4, 5), (5,)],
        4 * 5 + 3 * 4 + 2 * 3,
    ),
    "matmul": (Call(torch.matmul), [(2, 3, 4, 5), (5, 7)], 2 * 3 * 4 * 5 * 7),
    "matmul broadcast": (Call(torch.matmul), [(3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
    "matmul of vectors": (Call(torch.matmul), [(4,), (2, 4, 5)], 2 * 4 * 5),
    "linear of a row": (Call(F.linear), [(2, 3, 4), (4,)], 2 * 3 * 4),
    "inner": (Call(torch.inner), [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
    "tensordot": (Call(lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1]))), [(2, 1, 4), (3, 4, 5)], 2 * 4 * 5),
    "multi_dot": (Call(lambda *t: torch.linalg.multi_dot(t)), [(2, 30), (30, 4), (4, 50)], 2 * 30 * 4 + 2 * 4 * 50),
    "matrix power": (Call(lambda a: torch.linalg.matrix_power(a, 5)), [(3, 3)], 3 * 27),
    "output given": (Call(lambda a, b: torch.mm(a, b, out=a.new_empty(3, 5))), [(3, 4), (4, 5)], 60),
    "baddbmm": (Call(torch.baddbmm), [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 3 * 4 * 5 * 6),
    "mv": (Call(torch.mv), [(4, 5), (5,)], 20),
    "dot": (Call(torch.dot), [(5,), (5,)], 5),
    "addmv": (Call(torch.addmv), [(4,), (4, 5), (5,)], 20),
    "cdist": (Call(torch.cdist), [(2, 30, 5), (2, 40, 5)], 2 * 30 * 40 * 5),
    "list": (Call(lambda a, b: [a @ b, {"x": a}]), [(3, 4), (4, 5)], 60),
}


@pytest.mark.parametrize(("model", "shapes", "macs"), CONTRACTIONS.values(), ids=CONTRACTIONS)
def test_contraction(model, shapes, macs):
    assert both(model, *(torch.randn(s) for s in shapes)).macs == macs


OTHER = {  # FLOPs that belong to no contraction, on [2, 4, 6, 6]
    "layer_norm": (nn.LayerNorm(6), 5),
    "group_norm": (nn.GroupNorm(2, 4), 5),
    "batch_norm": (nn.BatchNorm2d(4), 2),
    "softmax": (nn.Softmax(-1), 5),
    "gelu": (nn.GELU(), 8),
    "silu": (nn.SiLU(), 5),
    "relu": (nn.ReLU(), 1),
    "relu in place": (Call(lambda x: F.relu(x.clone(), inplace=True)), 1),
    "masked in place": (Call(lambda x: x.clone().masked_fill_(x > 0, 1.0)), 2),
    "add": (Call(lambda x: x + 1), 1),
    "exp": (Call(torch.exp), 1),
    "mean": (Call(lambda x: x.mean((2, 3))), 1),
    "sum": (Call(torch.sum), 1),
    "pool": (nn.AdaptiveAvgPool2d(1), 1),
    "reshape": (Call(lambda x: x.transpose(1, 2).reshape(-1)), 0),
    "roll and pad": (Call(lambda x: F.pad(x.roll(1, 2), (1, 1))), 0),
    "gather": (Call(lambda x: torch.gather(x, 1, torch.zeros_like(x, dtype=torch.long))), 0),
    "bilinear": (Call(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), 4 * 8),
    "nearest": (Call(lambda x: F.interpolate(x, scale_factor=2)), 0),
    "bias": (Call(lambda x: F.conv2d(x, torch.zeros(4, 4, 1, 1, device=x.device), x[0, :, 0, 0])), 1),
}


@pytest.mark.parametrize(("model", "each"), OTHER.values(), ids=OTHER)
def test_other_flops(model, each):
    x = torch.randn(2, 4, 6, 6)
    for engine in ("meta", "real"):
        found = count(model.eval(), x, engine=engine)
        assert (found.flops_other, found.uncounted) == (each * x.numel(), {}), engine


def test_fft_is_5_n_log2_n():
    x = torch.randn(3, 16, 8)
    expected = {"ab": 5 * x.numel() * (4 + 3), "b": 5 * x.numel() * 3}
    assert count(Call(lambda t: torch.fft.fft2(t)), x).flops_other == expected["ab"]
    assert count(Call(lambda t: torch.fft.rfft(t)), x).flops_other == expected["b"]
    assert count(Call(lambda t: torch.fft.irfft(torch.fft.rfft(t))), x).flops_other == 2 * expected["b"]


def test_embedding_bag_is_other():
    rows, index, weight = torch.randn(20, 6), torch.randint(0, 20, (5, 4)), torch.rand(5, 4)
    model = Call(lambda r, i, w: F.embedding_bag(i, r, mode="sum", per_sample_weights=w))
    found = both(model, rows, index, weight)
    assert (found.macs, found.flops_other) == (0, 2 * 5 * 4 * 6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch built with oneDNN")
def test_onednn_operators():
    w, b, k = torch.randn(7, 6), torch.randn(7), torch.randn(8, 2, 3, 3)
    linear = Call(lambda x: torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu", [], "none"))
    found = count(linear, torch.randn(2, 5, 6), engine="real")
    assert (found.macs, found.flops_other, found.uncounted) == (2 * 5 * 6 * 7, 2 * 5 * 7 * (1 + 8), {})
    ones = [1, 1]
    conv = Call(lambda x: torch.ops.mkldnn._convolution_pointwise(x, k, None, ones, ones, ones, 4, "relu", [], ""))
    found = count(conv, torch.randn(1, 8, 5, 6), engine="real")
    assert (found.macs, found.flops_other, found.uncounted) == (8 * 5 * 6 * 2 * 9, 8 * 5 * 6, {})


def test_fast_path_costs_what_the_plain_path_costs():
    """Fused inference operators on real tensors against plain operators on meta and in the trace."""
    model = build("litv2_s")
    x = torch.randn(2, 3, 160, 224)  # H != W
    real, meta = count(model, x, engine="real"), count(model, x)
    assert (real.macs, real.acts, real.flops_other) == (meta.macs, meta.acts, meta.flops_other)
    assert (real.uncounted, meta.uncounted) == ({}, {})
    assert fvcore_counts(model, x)[""] == real.macs


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (torch.matmul, [(3, 4), (4, 5)]),
        (F.linear, [(3, 4), (5, 4)]),
        (lambda x, a, b: torch.addmm(x, a, b), [(5,), (3, 4), (4, 5)]),
        (lambda a, b: torch.einsum("ij,jk->ik", a, b), [(3, 4), (4, 5)]),
    ],
    ids=["matmul", "linear", "addmm", "einsum"],
)
def test_second_engine_counts_complex_products(call, shapes):
    """Four real products each."""
    assert fvcore_counts(Call(call), *(torch.randn(s, dtype=torch.complex64) for s in shapes))[""] == 4 * 60


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a @ a

    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        return g @ a.T + a.T @ g


def test_autograd_function():
    found = count(Call(Square.apply), torch.randn(5, 5))
    assert (found.macs, found.uncounted) == (125, {})
    x = torch.randn(5, 5, requires_grad=True)
    assert count(Call(Square.apply), x, backward=True).macs == 3 * 125
    assert x.grad is None


def test_shared_module_counts_each_call_and_its_weights_once():
    layer = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = both(model, torch.randn(2, 6))
    assert (found.params, found.macs) == (36, 2 * 2 * 36)


def test_forward_call_counts_for_the_parent():
    layer = nn.Linear(6, 5)
    found = both(Call(lambda m, x: m.layer.forward(x), layer=layer), torch.randn(2, 6))
    assert (found.macs, found.modules["layer"].macs, found.modules["layer"].params) == (60, 0, 35)


def test_dicts_and_tuples():
    layer = nn.Linear(6, 5)

    def both_ways(m, pair, *, image, scale=2):
        return {"out": m.layer(image["x"]) * scale, "text": "ok", "pair": (m.layer(pair[0]), pair[1])}

    found = count(Call(both_ways, layer=layer), (torch.randn(3, 6), 7), image={"x": torch.randn(2, 6)})
    assert (found.macs, found.flops_other, found.uncounted) == (5 * 30, 5 * 5 + 2 * 5, {})
    assert found.modules["layer"].macs == 150


def test_data_dependent_model_falls_back_to_real_tensors():
    layer = nn.Linear(4, 3)
    model = Call(lambda m, x: m.layer(x[x[:, 0] > 0]), layer=layer)
    x = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [2, 0, 0, 0]])
    found = count(model, x)
    assert (found.engine, found.macs) == ("cpu", 2 * 12)


def test_model_that_asks_for_a_value(caplog):
    """Neither meta nor fake tensors have one; their complaints are not shown."""
    found = count(Call(lambda x: x @ x * float(x.sum()) if x.max().item() > -1e9 else x), torch.randn(3, 3))
    assert (found.engine, found.macs, found.uncounted) == ("cpu", 27, {})
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_broken_call_says_why():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        count(nn.Linear(4, 3), torch.randn(2, 5))
    with pytest.raises(ValueError, match="engine='gpu'"):
        count(nn.Linear(4, 3), torch.randn(2, 4), engine="gpu")


@each_kind
def test_zoo_engines_agree(name):
    model = build(name)
    side = min(224, model.pretrained_cfg["input_size"][1])
    x = torch.randn(1, 3, side, side)
    found = count(model, x)
    assert found.uncounted == {}
    assert differences(found, fvcore_counts(model, x)) == []


def hilo_macs(C, N, Np, s, low, high):
    window, pooled = s * s, Np // (s * s)
    hifi = Np * (3 * C * high + high**2) + 2 * Np * window * high
    lofi = Np * (C * low + low**2) + 2 * pooled * C * low + 2 * Np * pooled * low
    return (hifi if high else 0) + (lofi if low else 0)


@pytest.mark.parametrize("size", [(224, 224), (230, 150), (64, 96)], ids=str)
@pytest.mark.parametrize("name", ["test_litv2", "litv2_s", "litv2_s_alpha00", "litv2_m", "litv2_b"])
def test_litv2_formula(name, size):
    """Closed formula of the paper's parts, at sizes that need padding too."""
    model = build(name, "meta")
    H, W = (-(-n // 4) for n in size)
    expected = 48 * model.patch_embed.proj.out_channels * H * W
    for stage in model.stages:
        if hasattr(stage.downsample, "conv"):
            H, W = H // 2, W // 2
            C = stage.downsample.conv.in_channels
            expected += (32 * C + 8 * C * C) * H * W
        for block in stage.blocks:
            C = block.norm2.normalized_shape[0]
            expected += (8 * C * C + 36 * C) * H * W
            if block.attn is not None:
                s, d = block.attn.window_size, C // (block.attn.l_heads + block.attn.h_heads)
                padded = -(-H // s) * s * -(-W // s) * s
                expected += hilo_macs(C, H * W, padded, s, block.attn.l_heads * d, block.attn.h_heads * d)
    expected += model.num_features * 1000
    assert count(model, torch.empty(1, 3, *size, device="meta")).macs == expected


# custom operators and the registry


@functools.cache
def define():
    """A custom operator with a backward operator, both defined without a cost."""
    namespace = "vizoo_test"

    @torch.library.custom_op(f"{namespace}::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor, repeat: int = 1, *, scale: float = 1.0) -> torch.Tensor:
        return a @ b * scale * repeat

    @product.register_fake
    def _(a, b, repeat=1, *, scale=1.0):
        return a.new_empty(a.shape[0], b.shape[1])

    @torch.library.custom_op(f"{namespace}::product_backward", mutates_args=())
    def product_backward(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return g @ b.T, a.T @ g

    @product_backward.register_fake
    def _(g, a, b):
        return torch.empty_like(a), torch.empty_like(b)

    def setup(ctx, inputs, keyword_only_inputs, output):
        ctx.save_for_backward(*inputs[:2])

    def backward(ctx, g):
        return (*product_backward(g, *ctx.saved_tensors), None)

    product.register_autograd(backward, setup_context=setup)
    return product


@pytest.fixture
def scaled_product():
    """The operator, whose cost is forgotten after the test."""
    yield define()
    for short in ("product", "product_backward"):
        COSTS.pop(f"vizoo_test::{short}", None)
        flop_registry.pop(getattr(torch.ops.vizoo_test, short), None)


def brute_force(rows, inner, columns, repeat):
    return sum(1 for _ in range(repeat) for _ in range(rows) for _ in range(columns) for _ in range(inner))


def test_custom_operator(scaled_product):
    """Without a cost it is named; with one, both engines and the backward pass agree with a loop."""
    model = Call(lambda a, b: scaled_product(a, b, a.shape[0] // 2, scale=0.5))
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert count(model, a, b).uncounted == {"vizoo_test::product": 1}
    assert count(model, a, b).macs == 0

    @register_cost("vizoo_test::product")
    def product_cost(a, b, repeat=1, *, scale=1.0, out=None):
        assert out == (a[0], b[1])
        return Cost(macs=repeat * math.prod(a) * b[1], other=math.prod(out), acts=7, bytes=11)

    assert count(model, a, b, backward=True).uncounted == {"vizoo_test::product_backward": 1}

    @register_cost("vizoo_test::product_backward")
    def product_backward_cost(g, a, b, out=None):
        assert out == a  # the first of two outputs
        return Cost(macs=2 * math.prod(a) * b[1])

    found = both(model, a, b)
    assert found.macs == brute_force(4, 3, 5, repeat=2)
    assert (found.flops_other, found.acts, found.bytes, found.kernels) == (20, 7, 11, 1)
    backward = count(model, a, b, backward=True)
    assert backward.uncounted == {}
    assert backward.macs == found.macs + 2 * brute_force(4, 3, 5, repeat=1)
    plain = FlopCounterMode(display=False)
    with plain:
        model(a, b)
    assert plain.get_total_flops() == 2 * found.macs  # everybody's FlopCounterMode sees it


def test_registering_again_replaces(scaled_product):
    model, x = Call(lambda a: scaled_product(a, a)), torch.randn(3, 3)
    for n in (5, 6):
        register_cost("vizoo_test::product", torch.ops.vizoo_test.product)(lambda *a, n=n, out=None, **k: Cost(macs=n))
        assert both(model, x).macs == n


def test_cost_before_its_operator():
    """The order of imports does not matter."""
    register_cost("vizoo_test::later")(lambda x, out=None: Cost(macs=x[0]))
    try:

        @torch.library.custom_op("vizoo_test::later", mutates_args=())
        def later(x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        later.register_fake(torch.empty_like)
        assert both(Call(lambda x: later(x)), torch.randn(9, 2)).macs == 9
    finally:
        COSTS.pop("vizoo_test::later")


def test_operator_defined_while_counting():
    """As by an import inside of a model."""
    register_cost("vizoo_test::sudden")(lambda x, out=None: Cost(macs=x[0]))

    def forward(x):
        if not hasattr(torch.ops.vizoo_test, "sudden"):
            torch.library.custom_op("vizoo_test::sudden", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor")
            torch.library.register_fake("vizoo_test::sudden", torch.empty_like)
        return torch.ops.vizoo_test.sudden(x)

    try:
        assert count(Call(forward), torch.randn(9, 2)).macs == 9
    finally:
        COSTS.pop("vizoo_test::sudden")


def test_name_without_namespace_is_refused():
    with pytest.raises(ValueError, match="namespace::operator"):
        register_cost("product")


def test_engines_that_differ_name_the_module(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6)))
    found = count(model, torch.randn(1, 4))
    assert differences(found, {"": 40, "0": 16, "1": 24, "1.0": 24}) == []
    wrong = differences(found, {"": 17, "0": 16, "1": 1, "1.0": 1})
    assert wrong == ["1.0: 24 and by fvcore 1"]


# what a count must say about itself

X = torch.randn(8, 8)
WAITING = ThreadPoolExecutor(1)  # its thread runs before anything is counted
WAITING.submit(int).result()


def in_thread(m, x):
    out = []
    thread = threading.Thread(target=lambda: out.append(m.fc(x)))
    thread.start()
    thread.join()
    return out[0]


def in_new_pool(m, x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.mm, x, m.fc.weight).result()


def in_waiting_pool(m, x):
    return WAITING.submit(torch.mm, x, m.fc.weight).result() + 1


def into_zeros(m, x):
    out = torch.zeros_like(x)
    WAITING.submit(lambda: out.copy_(x @ m.fc.weight)).result()
    return out


def into_memory(m, x):
    """As an extension or a kernel does, which gets an address."""
    out = torch.empty_like(x)
    ctypes.memmove(out.data_ptr(), m.fc(x).data_ptr(), 4 * x.numel())
    return out + 1


def caught(m, x):
    try:
        return torch.from_numpy(m.fc(x).detach().numpy())
    except (NotImplementedError, RuntimeError):
        return x


PARTIAL = {  # what runs, and what the reasons say
    "thread": (in_thread, "a thread was started in the model"),
    "module in a thread": (in_thread, "fc runs in another thread"),
    "new pool": (in_new_pool, "a thread was started in the model"),
    "waiting pool": (in_waiting_pool, "aten::add in the model reads numbers that no operator wrote"),
    "returned": (lambda m, x: WAITING.submit(m.fc, x).result(), "the model returns numbers that no operator wrote"),
    "written by a thread": (into_zeros, "another thread writes into tensors"),
    "written from outside": (into_memory, "aten::add in the model reads numbers that no operator wrote"),
    "numpy": (lambda m, x: torch.from_numpy(m.fc(x).detach().numpy()), "numbers leave torch in the model"),
    "numpy in place": (lambda m, x: (np.add(m.fc(x).numpy(), 1), x)[1], "(torch.Tensor.numpy)"),
    "array": (lambda m, x: torch.as_tensor(np.asarray(m.fc(x).detach())), "numbers leave torch"),
    "list": (lambda m, x: torch.tensor(m.fc(x).tolist()), "(torch.Tensor.tolist)"),
    "dlpack": (lambda m, x: torch.from_dlpack(np.from_dlpack(m.fc(x).detach())), "numbers leave torch"),
    "text": (lambda m, x: x @ x if "nan" in str(m.fc(x)) else x, "numbers leave torch"),
    "caught error": (caught, "numbers leave torch in the model (torch.Tensor.numpy)"),
    "item": (lambda m, x: x @ x if m.fc(x).sum().item() > 1e9 else x, "_local_scalar_dense in the model asks for"),
    "truth": (lambda m, x: x @ x if m.fc(x.relu_()).sum() > 1e9 else x, "asks for numbers of the input"),
    "nonzero": (lambda m, x: m.fc(x[x[:, 0].nonzero()[:, 0]]), "aten::nonzero in the model asks"),
    "mask": (lambda m, x: m.fc(x[x[:, 0] > 0]), "aten::index in the model asks"),
    "cond": (lambda m, x: torch.cond(x.sum() > 0, lambda t: t @ t, lambda t: t, (x,)), "the dearer one is counted"),
}


@pytest.mark.parametrize("engine", ["auto", "real"])
@pytest.mark.parametrize(("forward", "reason"), PARTIAL.values(), ids=PARTIAL)
def test_partial_counts_say_why(forward, reason, engine):
    model = Call(forward, fc=nn.Linear(8, 8, bias=False))
    found = count(model, X, engine=engine)
    assert found.status == "partial"
    assert [text for text in found.reasons if reason in text], found.reasons
    assert not [text for text in found.reasons if "\n" in text]


def test_reasons_name_the_modules():
    """Nested ones, each once, and the calls of all of them."""
    block = Call(lambda m, x: torch.from_numpy(m.fc(x).numpy()), fc=nn.Linear(8, 8))
    found = count(nn.Sequential(block, nn.Sequential(nn.ReLU(), copy.deepcopy(block)), block), X)
    assert found.reasons[0].startswith("numbers leave torch in 0, 1.1 (torch.Tensor.numpy)")
    found = count(nn.Sequential(*(Call(lambda x: define()(x, x)) for _ in range(5))), X)
    assert found.reasons == ["operator vizoo_test::product has no cost formula: 5 calls in 0, 1, 2 and 2 more"]


CONSTANT = torch.randn(8, 8)


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.listed = torch.randn(8, 8), [torch.randn(8, 8)]
        self.register_buffer("buffer", torch.tensor(3.0))

    def forward(self, x):
        scale = sum(v.item() for v in torch.linspace(0, 1, 3)) + self.buffer.item()
        x = x @ self.plain @ self.listed[0] @ CONSTANT * scale
        return x[[0, 2]] + torch.tensor([[1.0] * 8] * 2) + torch.from_numpy(np.ones((2, 8), np.float32))


@functools.lru_cache
def remembered(device):
    return torch.ones(8, 8, device=device)


COMPLETE = {  # what looks like it, and is not
    "constants": (Constants(), 3 * 512),
    "remembered": (Call(lambda x: x @ remembered(x.device)), 512),
    "first term not read": (Call(lambda x: torch.addmm(torch.empty(8, 8), x, x, beta=0)), 512),
    "empty tensor": (Call(lambda x: torch.cat([torch.empty(0, 8), x @ x])), 512),
    "output given": (Call(lambda x: torch.mm(x, x, out=torch.empty(8, 8))), 512),
    "filled": (Call(lambda x: x @ x.new_empty(8, 8).fill_(1)), 512),
    "random": (Call(lambda x: x @ x * random.random() + torch.randn(8)), 512),
    "mask without a choice": (Call(lambda x: torch.where(x > 0, x @ x, 0.0)), 512),
    "numbers of a weight": (Call(lambda m, x: m.fc(x) * m.fc.weight.max().item(), fc=nn.Linear(8, 8)), 512),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 512),
    "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(), 512 + 64),
}


@pytest.mark.parametrize(("model", "macs"), COMPLETE.values(), ids=COMPLETE)
def test_complete_counts(model, macs):
    for engine in ("auto", "real"):
        found = count(model, X, engine=engine)
        assert (found.status, found.reasons) == ("complete", [])
        if model is not COMPLETE["spectral norm"][0]:
            assert found.macs == macs


def test_old_weight_norm():
    """Its weight is a result, which cannot be copied as a parameter can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.utils.weight_norm(nn.Linear(8, 8))
    model(X)
    found = count(model, X)
    assert (found.macs, found.status) == (512, "complete")


def test_copied_models():
    """With weights of their own, whatever a module holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), Restless(False))
    expected = model[0](X)
    ours = copied(model)
    assert ours[1].lock is model[1].lock
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert torch.equal(model[0](X), expected)


ASKING = {
    "is_meta": lambda x: x.is_meta,
    "type": lambda x: x.device.type == "meta",
    "device": lambda x: x.device == torch.device("meta"),
    "text": lambda x: "meta" in str(x.device),
    "not on a CPU": lambda x: not x.is_cpu,
    "index": lambda x: x.get_device() != -1 or x.device.type == "meta",
}


@pytest.mark.parametrize("asks", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("what", ["input", "weight"])
def test_branch_for_the_meta_device(asks, place, what):
    """The path of a real device is counted, whether there are weights or not."""
    model = Call(lambda m, x: x if asks(m.fc.weight if what == "weight" else x) else m.fc(x), fc=nn.Linear(8, 8))
    found = count(model.to(place), X.to(place))
    assert (found.macs, found.status, found.engine) == (512, "complete", "fake")
    found = count(model.to(place), X.to(place), engine="meta")
    assert found.reasons == ["the model asks in the model where its tensors are: counted for the meta device"]


def test_numbers_of_a_meta_model_cannot_be_had():
    """A model that goes on without them is partial; one that does not fails with its own error."""
    model = Call(PARTIAL["caught error"][0], fc=nn.Linear(8, 8)).to("meta")
    found = count(model, X.to("meta"))
    assert found.status == "partial"
    assert [r for r in found.reasons if "goes on in the model after an error of tensors without numbers" in r]
    with pytest.raises(NotImplementedError, match="a tensor without numbers"):
        count(Call(PARTIAL["numpy"][0], fc=nn.Linear(8, 8)).to("meta"), X.to("meta"), engine="meta")


def test_gradients_inside():
    """They cannot be taken in inference mode."""

    def step(m, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad((x @ m.fc.weight).square().sum(), x)
        return x - grad

    found = count(Call(step, fc=nn.Linear(8, 8)), X)
    assert (found.macs, found.status) == (2 * 512, "complete")


class Looped(nn.Module):
    """Goes round by a number and takes a dictionary, which only a script can."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: dict[str, torch.Tensor], times: int = 3):
        out = x["x"]
        for _ in range(times):
            out = self.fc(out)
        return out


def reloaded(model):
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


SCRIPTED = {  # a module of TorchScript, its input, multiply-accumulates forward, and both ways
    "script": (lambda: torch.jit.script(mlp()), X, 1024, 1024 + 512 * 3),
    "trace": (lambda: torch.jit.trace(mlp(), X), X, 1024, 1024 + 512 * 3),
    "loaded": (lambda: reloaded(torch.jit.script(mlp())), X, 1024, 1024 + 512 * 3),
    "inside": (lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(mlp())), X, 1536, 1536 + 512 * 5),
    "loop": (lambda: torch.jit.script(Looped()), {"x": X}, 1536, 1536 + 512 * 5),
    "traced dictionary": (lambda: torch.jit.trace(Looped(), ({"x": X},)), {"x": X}, 1536, 1536 + 512 * 5),
    "attention": (
        lambda: torch.jit.script(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()),
        torch.randn(4, 2, 8),
        2048 + 256 + 2048,
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("engine", ["auto", "meta", "fake", "real"])
@pytest.mark.parametrize(("make", "x", "forward", "both_ways"), SCRIPTED.values(), ids=SCRIPTED)
def test_torchscript(make, x, forward, both_ways, engine):
    model = make()
    devices = {p.device.type for p in model.parameters()}
    found = count(model, x, engine=engine)
    assert (found.macs, found.status, found.uncounted) == (forward, "complete", {}), found.reasons
    assert found.params == sum(p.numel() for p in model.parameters())
    if both_ways is not None:
        assert count(model, x, engine=engine, backward=True).macs == both_ways
    assert {p.device.type for p in model.parameters()} == devices == {"cpu"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_parts_of_torchscript():
    """Each module's own; weights that were frozen are constants of the program, and no parameters."""
    found = count(SCRIPTED["inside"][0](), X)
    assert (found.modules["0"].macs, found.modules["1"].macs) == (512, 1024)
    for optimize in (torch.jit.freeze, torch.jit.optimize_for_inference):
        found = count(optimize(torch.jit.script(mlp())), X)
        assert (found.macs, found.params, found.reasons, found.engine) == (1024, 0, [], "cpu")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_second_engine_refuses_torchscript():
    """It does not see into it, so its count would accuse the first engine."""
    with pytest.raises(ValueError, match="1 is TorchScript"):
        fvcore_counts(SCRIPTED["inside"][0](), X)
    function = torch.jit.trace(lambda t: t @ t, X)
    assert count(Call(lambda t: function(t)), X).macs == 512
    with pytest.raises(ValueError, match="calls a function of TorchScript"):
        fvcore_counts(Call(lambda t: function(t)), X)


LAZY = {
    "alone": (lambda: nn.LazyLinear(5), (8, 8), 320, 45),
    "together": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)),
        (2, 3, 6, 6),
        2 * (4 * 16 * 27 + 64 * 5),
        4 * 28 + 8 + 65 * 5,
    ),
    "beside others": (lambda: nn.Sequential(nn.Linear(8, 6), nn.LazyLinear(5)), (8, 8), 8 * (48 + 30), 54 + 35),
}


@pytest.mark.parametrize("engine", ["auto", "meta", "fake", "real"])
@pytest.mark.parametrize(("make", "shape", "macs", "params"), LAZY.values(), ids=LAZY)
def test_lazy_modules(make, shape, macs, params, engine):
    """A copy is initialised by the call; the model stays as it is."""
    model, x = make(), torch.randn(shape)
    before = [(type(m), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    state = torch.get_rng_state()
    found = count(model, x, engine=engine)
    assert (found.macs, found.params, found.status) == (macs, params, "complete")
    assert count(model, x, engine=engine, backward=True).macs > macs
    assert fvcore_counts(model, x)[""] == macs
    assert [(type(m), len(m._forward_pre_hooks), m.training) for m in model.modules()] == before
    assert any(m.has_uninitialized_params() for m in model.modules() if isinstance(m, LazyModuleMixin))
    assert torch.equal(torch.get_rng_state(), state)


def test_lazy_modules_without_numbers():
    found = count(LAZY["together"][0](), torch.empty(2, 3, 6, 6, device="meta"))
    assert (found.macs, found.engine, found.modules["4"].out) == (LAZY["together"][2], "meta", (2, 5))


TRANSFORMS = {  # of the sum over a linear layer, and how often it is multiplied
    "gradient": (lambda m, x: torch.func.grad(lambda v: m.fc(v).sum())(x), 2),
    "gradient of each": (lambda m, x: torch.func.vmap(torch.func.grad(lambda v: m.fc(v).sum()))(x), 2),
    "jacobian": (lambda m, x: torch.func.jacrev(lambda v: m.fc(v).sum(0))(x), 1 + 8),
    "mapped": (lambda m, x: torch.func.vmap(m.fc)(x), 1),
    "called": (lambda m, x: torch.func.functional_call(m.fc, dict(m.fc.named_parameters()), (x,)), 1),
}


@pytest.mark.parametrize("engine", ["auto", "meta", "fake", "real"])
@pytest.mark.parametrize(("forward", "times"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_inside(forward, times, engine):
    found = count(Call(forward, fc=nn.Linear(8, 8, bias=False)), X, engine=engine)
    assert (found.macs, found.status, found.modules["fc"].macs) == (512 * times, "complete", 512)


def test_modules_on_the_way_back():
    """The last one, one without inputs that need a gradient, hooks and lists of outputs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.table, self.last = nn.Linear(8, 8), nn.Linear(2, 8), nn.Linear(8, 8)
            self.register_buffer("places", torch.randn(4, 2))

        def forward(self, x):
            return self.last(self.first(x) + self.table(self.places).mean(0))

    for engine in ("meta", "fake", "real"):
        found = count(Model(), torch.randn(2, 8), backward=True, engine=engine)
        macs = {path: cost.macs for path, cost in found.modules.items()}
        assert macs == {"": 768, "first": 2 * 128, "table": 2 * 64, "last": 3 * 128}
    pair = Call(lambda m, x: [m.a(x), m.b(x)], a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    assert count(pair, torch.randn(2, 8), backward=True).modules[""].macs == 4 * 64
    hooked = nn.Linear(8, 4)
    hooked.register_forward_hook(lambda module, given, out: out @ out.T)
    assert count(hooked, torch.randn(2, 8)).modules[""].macs == 64 + 16


@pytest.mark.parametrize("reentrant", [False, True])
def test_recurrent_layer_in_a_checkpoint(reentrant):
    """It runs twice, and costs what it costs anywhere."""
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.LSTM(4, 4), torch.randn(2, 1, 4, requires_grad=True)
    once = count(Call(lambda m, x: m.layer(x)[0], layer=layer), x)
    plain = count(Call(lambda m, x: m.layer(x)[0], layer=layer), x, backward=True)
    model = Call(lambda m, x: checkpoint(lambda y: m.layer(y)[0], x, use_reentrant=reentrant), layer=layer)
    for engine in ("meta", "fake", "real"):
        found = count(model, x, backward=True, engine=engine)
        assert (found.macs, found.status) == (plain.macs + once.macs, "complete")


def test_backward_around_what_has_none():
    def frozen(m, x):
        with torch.no_grad():
            x = m.body(x)
        return m.head(x)

    model = Call(frozen, body=nn.Linear(8, 8), head=nn.Linear(8, 2))
    for x in (torch.randn(2, 8), torch.randn(2, 8, requires_grad=True)):
        assert count(model, x, backward=True).macs == 128 + 2 * 32
    with torch.inference_mode():
        assert count(nn.Linear(8, 2), torch.randn(2, 8), backward=True).macs == 2 * 32


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    loss: torch.Tensor | None = None


class Outputs(dict):
    pass


@pytest.mark.parametrize("wrap", [Output, lambda out: Outputs(scores=out), lambda out: [Outputs(all=(out,))]])
def test_outputs_of_other_classes(wrap):
    model = Call(lambda m, x: wrap(m.fc(x)), fc=nn.Linear(8, 2))
    found = count(model, torch.randn(2, 8), backward=True)
    assert (found.macs, found.status) == (2 * 32, "complete")


@pytest.mark.parametrize("wrap", [Output, lambda x: Outputs(scores=x), lambda x: UserDict(scores=x)])
def test_inputs_of_other_classes(wrap):
    """They are moved and copied as plain tensors are."""

    def forward(m, batch):
        x = batch.scores if isinstance(batch, Output) else batch["scores"]
        return m.fc(x.mul_(2))

    x = torch.randn(2, 8)
    before, model = x.clone(), Call(forward, fc=nn.Linear(8, 2))
    for engine in ("meta", "fake", "real"):
        found = count(model, wrap(x), engine=engine)
        assert (found.macs, found.status) == (32, "complete")
    assert torch.equal(x, before)


def test_outputs_without_a_gradient():
    found = count(Call(lambda m, x: m.fc(x).argmax(-1), fc=nn.Linear(8, 2)), torch.randn(2, 8), backward=True)
    assert found.macs == 32
    assert found.reasons == ["the model returns nothing that needs a gradient: no backward pass is counted"]


@pytest.mark.parametrize("engine", ["meta", "fake", "real"])
def test_gradients_of_gradients(engine):
    """Of a penalty: forward, the gradient of the input, and two for each of their products."""

    def penalty(m, x):
        return torch.autograd.grad(m.fc(x).square().sum(), x, create_graph=True)[0]

    model, x = Call(penalty, fc=nn.Linear(8, 2)), torch.randn(2, 8, requires_grad=True)
    found = count(model, x, backward=True, engine=engine)
    assert (found.macs, found.status) == (6 * 32, "complete")


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(8, 8)
    for engine in ("meta", "fake", "real"):
        assert count(model, X, engine=engine).macs == 512
    assert count(model, X, backward=True).macs == 1024


def test_kernels_of_the_meta_device_run_once():
    """What is no new tensor is made each time, and so is what another device or dtype makes of the call."""
    kernels, x = Kernels(), torch.empty(3, 4, device="meta")
    aten = torch.ops.aten
    first, second = (kernels.run(aten.add.Tensor, (x, x), {"alpha": 2}) for _ in range(2))
    assert len(kernels.known) == 1
    assert first.shape == second.shape == (3, 4)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    for func, args, kwargs in (
        (aten.add.Tensor, (x, x.double()), {"alpha": 2}),
        (aten.add.Tensor, (x, x), {"alpha": 2.0}),
        (aten.add.Tensor, (x, x.t().contiguous().t()), {}),
        (aten.topk.default, (x, 2), {}),
        (aten.unbind_copy.int, (x, 1), {}),
    ):
        before, expected = len(kernels.known), func(*args, **kwargs)
        for _ in range(2):
            given = tree_leaves(kernels.run(func, args, kwargs))
            assert [(t.shape, t.stride(), t.dtype) for t in given] == [
                (t.shape, t.stride(), t.dtype) for t in tree_leaves(expected)
            ]
        assert len(kernels.known) == before + 1
    before = len(kernels.known)
    kernels.run(aten.view.default, (x, [12]), {})
    kernels.run(aten._unsafe_view.default, (x, [12]), {})
    kernels.run(aten.add_.Tensor, (x, x), {})
    kernels.run(aten.add.Tensor, (torch.ones(3), torch.ones(3)), {})
    assert len(kernels.known) == before


# a model is left as it was


class Restless(nn.Module):
    """Changes whatever a forward pass can change; ``need`` makes it ask for numbers first."""

    def __init__(self, need):
        super().__init__()
        self.fc, self.other, self.need = nn.Linear(8, 8), nn.Linear(8, 8), need
        self.register_buffer("seen", torch.zeros(8))
        self.calls, self.cache, self.log = 0, {}, []
        self.lock, self.pool = threading.Lock(), WAITING  # cannot be copied

    def forward(self, x):
        if self.need and x.sum().item() > 1e9:
            return x
        self.calls += 1
        self.cache["last"] = self.fc(x)
        self.log.append(self.calls)
        self.seen += 1
        self.seen = self.seen * 2
        with torch.no_grad():
            self.fc.weight.mul_(0.5)
        self.other.weight.requires_grad_(False)
        self.other.train()
        self.other.register_forward_hook(print)
        np.random.rand()
        random.random()
        torch.rand(3)
        return self.fc(x.mul_(2))


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("engine", ["auto", "real", "fvcore"])
def test_a_restless_model_is_untouched(engine, need, nested):
    restless, x = Restless(need).eval(), X.clone()
    model = nn.Sequential(nn.Sequential(restless)).eval() if nested else restless
    before = snapshot(model)
    states = random.getstate(), np.random.get_state()[1].tolist()
    if engine == "fvcore":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            assert fvcore_counts(model, x)[""] == 512  # the trace drops what is kept and not returned
    else:
        assert count(model, x, engine=engine).macs == 2 * 512
    after = snapshot(model)
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert torch.equal(after.pop("rng"), before.pop("rng"))
    assert after == before
    assert (restless.calls, restless.cache, restless.log) == (0, {}, [])
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(x, X)
    assert threading.getprofile() is None


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "fast": torch.backends.mha.get_fastpath_enabled(),
        "trainable": [p.requires_grad for p in model.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("engine", ["auto", "meta", "fake", "real", "fvcore"])
def test_model_is_untouched(engine, backward):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    model.train()
    model[1].eval()
    before = snapshot(model)
    if engine == "fvcore":
        fvcore_counts(model, x)
    else:
        assert count(model, x, engine=engine, backward=backward).macs > 0
    after = snapshot(model)
    for key in ("training", "hooks", "fast", "trainable", "grad mode"):
        assert before[key] == after[key], key
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    torch.testing.assert_close(after["grad"], before["grad"], rtol=0, atol=0)
    assert torch.equal(before["rng"], after["rng"])
    assert x.grad is None


def test_failure_restores_too():
    model = Call(lambda m, x: 1 / 0, drop=nn.Dropout()).train()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        count(model, torch.randn(1))
    after = snapshot(model)
    assert all(before[k] == after[k] for k in ("training", "hooks", "fast", "trainable", "grad mode"))


def test_compiled_model():
    """Counts are those of the plain model, and the compiled one is neither called nor compiled again."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plain = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    expected = count(plain, x)
    outer = torch.compile(plain, backend=backend)
    inner = nn.Sequential(torch.compile(copy.deepcopy(plain), backend=backend))
    in_place = copy.deepcopy(plain)
    in_place.compile(backend=backend)
    for model in (outer, inner, in_place):
        with torch.no_grad():
            model(x)
        before = len(compilations)
        for engine in ("meta", "real"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = count(model, x, engine=engine)
            assert (found.params, found.macs, found.flops_other) == (59, expected.macs, expected.flops_other)
        assert fvcore_counts(model, x)[""] == expected.macs
        with torch.no_grad():
            model(x)
        assert len(compilations) == before
    assert unwrap(outer) is plain


def test_data_parallel_wrappers():
    plain, x = nn.Linear(6, 5), torch.randn(2, 6)
    assert count(nn.DataParallel(plain), x).macs == 60
    wrapped = SimpleNamespace(module=plain)
    assert unwrap(wrapped) is wrapped  # an attribute of that name is not a wrapper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_changes_bytes_only(dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU()), torch.randn(1, 3, 9, 8)
    a = count(model, x)
    b = count(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert (a.macs, a.flops_other, a.acts, a.kernels) == (b.macs, b.flops_other, b.acts, b.kernels)
    assert b.state_bytes[str(dtype)[6:]] == (a.params + 16) * dtype.itemsize
    assert a.state_bytes == {"float32": 4 * (a.params + 16), "int64": 8}
    assert a.buffers == 17


def test_autocast_and_memory_format_change_nothing():
    model, x = build("vit_tiny_patch16_224"), torch.randn(1, 3, 224, 224)
    plain = count(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = count(model, x)
    last = count(copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert plain.macs == mixed.macs == last.macs
    assert plain.acts == mixed.acts == last.acts
    assert plain.flops_other == mixed.flops_other == last.flops_other


def test_bytes_kernels_and_largest():
    """Views cost nothing; each operator reads its inputs and writes its output."""
    model = Call(lambda x: torch.relu(x.transpose(0, 1)).reshape(-1) + 1)
    found = count(model, torch.randn(3, 5))
    assert found.kernels == 3  # relu, the copy of reshape, add
    assert found.bytes == 3 * 2 * 15 * 4
    assert count(Call(torch.relu), torch.randn(3, 5)).bytes == 2 * 15 * 4
    assert count(Call(lambda x: x.view(15)), torch.randn(3, 5)).kernels == 0
    assert count(nn.Linear(5, 7, bias=False), torch.randn(3, 5)).bytes == 4 * (15 + 35 + 21)
    assert count(nn.Linear(5, 7), torch.randn(3, 5)).largest == 21


@pytest.mark.parametrize(
    ("call", "floats"),
    [
        (lambda x: x + torch.ones(1, 1).expand(30, 50), 1500 + 1 + 1500 + 1),  # and the 1 is written
        (lambda x: x[:2].expand(10, 2, 50) * 1, 100 + 1000),
        (lambda x: x.unfold(0, 3, 1) * 1, 1500 + 28 * 50 * 3),  # windows overlap
        (lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int32)), 100 + 100 + 2 + 2),  # of a table two rows
        (lambda x: torch.zeros_like(x), 1500),
        (lambda x: torch.empty(30, 50).copy_(x), 1500 + 1500),
        (lambda x: torch.empty(30, 50).fill_(1.0), 1500),
        (lambda x: x.relu_(), 1500 + 1500),
        (lambda x: torch.add(x, x, out=torch.empty(30, 50)), 1500 + 1500 + 1500),
    ],
    ids=["expanded", "rows", "windows", "picked", "shape", "copied", "filled", "in place", "out"],
)
def test_bytes_that_are_not_moved_do_not_count(call, floats):
    assert count(Call(call), torch.randn(30, 50)).bytes == 4 * floats


def test_bytes_of_operators():
    found = count(nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU()), torch.randn(3, 5))
    assert found.ops["aten::mm"] == (3 * 5 * 7, 0, 1, 4 * (15 + 35 + 21))
    assert sum(cost.bytes for cost in found.ops.values()) == found.bytes


def test_by_module_and_by_op():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU()))
    found = count(model, torch.randn(1, 4))
    rows = found.by_module(depth=2)
    assert [r["module"] for r in rows] == ["", "0", "1", "1.0", "1.1"]
    assert [r["macs"] for r in rows] == [72, 24, 48, 48, 0]
    assert [r["params"] for r in rows] == [72, 24, 48, 48, 0]
    assert [r["other"] for r in rows] == [8, 0, 8, 0, 8]
    assert rows[1]["share"] == 24 / 72
    assert rows[3]["out"] == (1, 8)
    assert [r["module"] for r in found.by_module(1, sort="macs")] == ["", "1", "0"]
    assert [r["module"] for r in found.by_module(2, sort="other", top=2)] == ["", "1"]
    with pytest.raises(ValueError, match="sort='size'"):
        found.by_module(sort="size")
    ops = found.by_op()
    assert ops[0] == {"op": "aten::mm", "calls": 2, "macs": 72, "share": 1.0, "other": 0, "bytes": 384}
    assert ops[1]["op"] == "aten::relu"
    assert len(found.by_op(top=1)) == 1
    assert found.flops == 2 * 72 + 8


def test_nothing_is_printed(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build("test_vit")
        count(model, torch.randn(1, 3, 160, 160))
        fvcore_counts(model, torch.randn(1, 3, 160, 160))
    assert capfd.readouterr().out == ""
