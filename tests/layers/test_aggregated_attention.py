"""The attentions of TransNeXt: recorded official outputs, position biases, their cache, and other networks."""

import copy
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image, load, weights
from tolerance import close, golden_close, op_close

from vizoo.backbones.layers import AggregatedAttention, LengthScaledAttention
from vizoo.backbones.ops.position_bias import BiasCache, relative_positions
from vizoo.tools.profiler import count

CASES = [f"moh_aggregated_{kind}" for kind in ("s1_r2", "s2_r1", "shared_only")] + [
    "moh_global_s0_r3",
    "moh_global_s3_r4",
]
KINDS = {"aggregated": AggregatedAttention, "global": LengthScaledAttention}


def attention(kind, dim=24, num_heads=4, **kwargs):
    """A layer whose biases and tokens count, in evaluation mode."""
    torch.manual_seed(0)
    layer = KINDS[kind](dim, num_heads, **kwargs).eval()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name not in ("temperature", "norm.weight"):
                p.normal_(0, 0.3)
    return layer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_official(name, fused):
    case = load(name)
    args, seed = case.meta["args"], int(re.findall(r"seed=(\d)", case.meta["input"])[0])
    size = args["input_resolution"]
    kwargs = {"pretrain_map": case.meta["pretrain_size"]}
    kwargs |= {"shared_heads": args["shared_head"], "routed_heads": args["routed_head"]}
    if args["window_size"] is None:
        layer = LengthScaledAttention(args["dim"], args["num_heads"], **kwargs)
    else:
        kwargs |= {k: args[k] for k in ("sr_ratio", "window_size", "fixed_pool_size")}
        layer = AggregatedAttention(args["dim"], args["num_heads"], **kwargs)
    layer.fused_attn = fused
    state = weights(case.keys)
    layer.load_state_dict({f"gates.{k}" if k.startswith("wg") else k: v for k, v in state.items()}, strict=True)
    x = image(case.input_shape, seed)
    golden_close(layer(x, size), case.outputs["out"], "autograd")
    if len(case.outputs["aux"]):
        golden_close(layer.gates.aux_loss[None], case.outputs["aux"], "aux")
    with torch.no_grad():
        golden_close(layer(x, size), case.outputs["out"], "inference in training mode")
        golden_close(layer.eval()(x, size), case.outputs["out"], "inference")


@pytest.mark.parametrize("size", [(12, 4), (7, 7), (7, 3), (5, 4), (9, 1), (2, 5), (1, 1)], ids=str)
def test_relative_positions(size):
    """As by adaptive average pooling of the positions."""
    length, regions = size
    distances, index = relative_positions(length, regions, torch.device("cpu"))
    axis = torch.arange(length, dtype=torch.float64)
    middle = F.adaptive_avg_pool1d(axis[None], regions)[0]
    op_close(distances[index].double(), axis[:, None] - middle)
    assert (distances.diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias_map", [None, (6, 4)], ids=str)
def test_position_bias(kind, bias_map):
    """The network of every pair's distance, one after the other; resized by bilinear interpolation."""
    layer = attention(kind, pretrain_map=(5, 7), bias_map=bias_map).double()
    H, W = bias_map or (7, 5)
    rows, cols = layer._regions(H, W)
    want = torch.empty(4, H, W, rows, cols, dtype=torch.float64)
    down, right = (
        (torch.arange(n)[:, None] - F.adaptive_avg_pool1d(torch.arange(n).float()[None], m)[0]) / (p - 1) * 8
        for n, m, p in ((H, rows, 5), (W, cols, 7))
    )
    for y, i in torch.cartesian_prod(torch.arange(H), torch.arange(rows)).tolist():
        for x, j in torch.cartesian_prod(torch.arange(W), torch.arange(cols)).tolist():
            pair = torch.tensor([math.copysign(math.log2(abs(t) + 1) / 3, t) for t in (down[y, i], right[x, j])])
            want[:, y, x, i, j] = layer.cpb_fc2(layer.cpb_fc1(pair.double()).relu()).detach()
    of_map = layer._regions(7, 5)
    if bias_map is not None:
        want = F.interpolate(want.flatten(1, 2), of_map, mode="bilinear").unflatten(1, (H, W))
        want = want.permute(0, 3, 4, 1, 2).flatten(1, 2)
        want = F.interpolate(want, (7, 5), mode="bilinear").unflatten(1, of_map).permute(0, 3, 4, 1, 2)
    found = layer.position_bias(torch.zeros(1, 7, 5, 24, dtype=torch.float64), *of_map)
    torch.testing.assert_close(found, want.reshape(4, 35, -1), rtol=1e-5, atol=1e-5)  # distances are in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.cpb_fc2.weight.data.mul_(1.5),
        lambda layer: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}),
        lambda layer: setattr(layer, "pretrain_map", (9, 9)),
        lambda layer: setattr(layer, "bias_map", (4, 4)),
        lambda layer: layer.cpb_fc1.register_forward_hook(lambda module, args, out: out * 1.5),
        lambda layer: setattr(layer.cpb_fc1, "bias", None),
    ],
    ids=["data", "loaded", "pretrain_map", "bias_map", "hook", "bias"],
)
def test_kept_biases_are_never_stale(kind, change):
    layer, x = attention(kind), torch.randn(1, 6, 5, 24)
    with torch.no_grad():
        before = layer(x)
        assert len(layer.cache._entries) == 1
        change(layer)
        found = layer(x)
        layer.cache = BiasCache(0)
        close(found, layer(x), "same")
        assert not torch.equal(found, before)


def test_kept_biases_are_used_for_their_map_only(monkeypatch):
    layer, made = attention("aggregated"), []
    monkeypatch.setattr(
        type(layer), "_bias_of", lambda *args, own=layer._bias_of.__func__: made.append(1) or own(*args)
    )
    maps = [torch.randn(2, 6, 5, 24), torch.randn(1, 6, 5, 24), torch.randn(1, 5, 6, 24), torch.randn(1, 6, 5, 24)]
    with torch.no_grad():
        for x, anew in zip(maps, (1, 1, 2, 3), strict=True):  # one map is kept
            layer(x)
            assert len(made) == anew
        copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert not copied.cache._entries
        layer.cache.limit = 0
        layer(maps[2])
        assert not layer.cache._entries
        count(layer, maps[3])  # sees all that a pass can take
    assert len(made) == 5
    layer(maps[3]).sum().backward()
    assert layer.cpb_fc1.weight.grad is not None
    assert len(made) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind):
    """Autocast and half precision follow float32 on scores as large as those of a trained model."""
    layer, x = attention(kind, pretrain_map=6), torch.randn(2, 7, 5, 24)
    truth = copy.deepcopy(layer).double()(x.double())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), torch.no_grad():
            assert ((layer(x).double() - truth).norm() / truth.norm()) < 8 * torch.finfo(dtype).eps
        half = copy.deepcopy(layer).to(dtype)
        assert ((half(x.to(dtype)).double() - truth).norm() / truth.norm()) < 8 * torch.finfo(dtype).eps


def test_weights_at():
    """With values of one and nothing from tokens the weights are all there is; off the window there are none."""
    layer, x = attention("aggregated"), torch.randn(1, 6, 7, 24)
    near, far = layer.weights_at(x, 0, 3)
    close(near.sum((2, 3)) + far.sum((2, 3)), torch.ones(1, 4), "rerun")
    assert near.shape == (1, 4, 6, 7)
    assert far.shape == (1, 4, 3, 3)
    assert near[:, :, :2, 2:5].all()
    assert not near[:, :, 2:].any()
    full = attention("global")
    found = full.weights_at(x, 5, 6)
    q, k, v, bias = full._parts(x)
    close(found.flatten(2), (q @ k.mT + bias).softmax(-1)[:, :, -1], "rerun")
    assert v.shape == (1, 4, 42, 6)


def test_takes_tokens_and_maps():
    layer = attention("aggregated", shared_heads=1, routed_heads=2)
    x = torch.randn(2, 3, 5, 24)
    op_close(layer(x.flatten(1, 2), (3, 5)).double(), layer(x).flatten(1, 2).double())
    with pytest.raises(ValueError, match="got 15 tokens for a 3x3 map"):
        layer(x.flatten(1, 2))
    with pytest.raises(ValueError, match="no attention mask"):
        layer(x, is_causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_replaces_the_attention_of_timm_models(kind):
    model = timm.create_model("test_vit", num_classes=4, class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn = KINDS[kind](model.embed_dim, block.attn.num_heads)
    model(torch.randn(2, 3, 160, 160)).square().mean().backward()
    assert all(p.grad is not None for block in model.blocks for p in block.attn.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, "got dim=24 and num_heads=5, need dim to be a multiple of num_heads"),
        ({"window_size": 2}, "got window_size=2, need an odd number"),
        ({"pretrain_map": 1}, "got pretrain_map=1, need a whole number of at least 2"),
        ({"sr_ratio": 0}, "got sr_ratio=0"),
        ({"fixed_pool_size": 0}, "got fixed_pool_size=0"),
        ({"routed_heads": 2}, "got routed_heads=2, need 0 without shared_heads"),
        ({"shared_heads": 3, "routed_heads": 2}, "need routed from 0 to num_heads - shared"),
    ],
    ids=str,
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AggregatedAttention(**{"dim": 24, "num_heads": 4, **kwargs})
