"""Whole models against a count by hand, and the hand's formulas against the multiplications that a definition makes."""

import itertools

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hand_counts import TIMM, hand_count
from timm.layers import set_fused_attn
from torch import nn
from zoo import REGISTERED, build, input_shape, recorded

from vizoo.backbones.ops.aggregated_attention import aggregated_attention
from vizoo.backbones.ops.halo import halo_attention
from vizoo.backbones.ops.na2d_av import na2d_av
from vizoo.backbones.ops.neighborhood import neighborhood_attention
from vizoo.tools.profiling.counting import count, differences, fvcore_counts

QUICK = {
    *("test_vit", "test_vit_relpos", "test_convnext", "test_coatnet", "levit_128s", "mvitv2_tiny", "halonet_h1"),
    *("xcit_nano_12_p8_224", "test_halonet", "test_nat", "test_overlock", "test_oat"),
}
LARGE = {  # slow to build, without an operator that the others lack
    *("beit_base_patch16_224", "deepseek_vit_412m", "halonet_h1", "inception_resnet_v2", "nasnetalarge"),
    *("pnasnet5large", "qwen3_vit_88m", "samvit_base_patch16_224", "vgg11"),
}
TORCHVISION = {  # shapes of the inputs
    "resnet18": [(3, 224, 224)],
    "vit_b_16": [(3, 224, 224)],
    "swin_t": [(3, 224, 224)],
    "swin_v2_t": [(3, 256, 256)],
    "maxvit_t": [(3, 224, 224)],
    "convnext_tiny": [(3, 224, 224)],
    "efficientnet_b0": [(3, 224, 224)],
    "mobilenet_v3_large": [(3, 224, 224)],
    "fcn_resnet50": [(3, 224, 224)],
    "r3d_18": [(3, 16, 112, 112)],
    "mvit_v1_b": [(3, 16, 224, 224)],
    "raft_small": [(3, 128, 128), (3, 128, 128)],
}
DETECTORS = ["fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"]


def check(model, *inputs):
    found = count(model, *inputs)
    assert (found.status, found.uncounted) == ("complete", {}), found.reasons
    assert found.macs == hand_count(model, *inputs).total() > 0
    return found


def test_models_by_hand_cover_timm():
    """One of every module of timm that registers models."""
    modules = {n: timm.models.model_entrypoint(n).__module__ for n in timm.list_models()}
    listed = {modules[name] for name in TIMM.split() if name in modules}
    ours = {m for m in modules.values() if m.startswith("timm.models.")}
    newer = tuple(map(int, timm.__version__.split(".")[:3])) > (1, 0, 31)
    assert listed == ours or newer, ours - listed


def slow_but_quick(names):
    """Those of QUICK hold most kinds of contractions that models have."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but_quick(TIMM.split()))
def test_timm_by_hand(name):
    """Families of timm: convolution, attention of all kinds, mixing, recurrent, re-parameterised; by both engines."""
    model = build(name, device="meta" if name in LARGE else "cpu")
    if name in LARGE:
        check(model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    else:
        x = torch.randn(1, *input_shape(model, 224))
        assert differences(check(model, x), fvcore_counts(model, x)) == []


@pytest.mark.parametrize("name", slow_but_quick(REGISTERED))
def test_zoo_by_hand(name):
    """The number in ``backbones/models.csv``, which test_models counts anew."""
    model = build(name, device="meta")
    x = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    assert hand_count(model, x).total() == int(recorded()[name]["macs"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shapes"), TORCHVISION.items(), ids=TORCHVISION)
def test_torchvision_by_hand(name, shapes):
    import torchvision

    backbone = {"weights_backbone": None} if name.startswith("fcn") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **backbone).eval()
    macs = check(model, *(torch.empty(1, *shape, device="meta") for shape in shapes)).macs
    assert macs == {"vit_b_16": 17_563_828_224, "resnet18": 1_814_073_344}.get(name, macs)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_by_hand(name):
    """Their boxes are numbers of the image, which the count says; nothing else is missing."""
    import torchvision

    sides = {"min_size": 160, "max_size": 200}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sides).eval()
    images = [torch.rand(3, 200, 160)]
    found = count(model, images)
    assert found.macs == hand_count(model, images).total() > 0
    assert found.uncounted == {}
    assert not [text for text in found.reasons if "asks for numbers of the input" not in text]


# the formulas of the hand


class Number:
    """A number of a brute-force loop, which counts its products."""

    products = 0

    def __mul__(self, other):
        Number.products += 1
        return self

    def __add__(self, other):
        return self


def numbers(*shape):
    out = np.empty(shape, object)
    out[...] = Number()
    return out


def conv(x, w, groups=1):
    """Over ``[C, L]``; with further sides as one."""
    per = x.shape[0] // groups
    for o in range(w.shape[0]):
        first = o // (w.shape[0] // groups) * per
        for left in range(x.shape[1] - w.shape[2] + 1):
            (x[first : first + per, left : left + w.shape[2]] * w[o]).sum()


def conv2d(x, w, groups=1):
    for top in range(x.shape[1] - w.shape[2] + 1):
        rows = x[:, top : top + w.shape[2]]
        conv(rows.swapaxes(1, 2).reshape(-1, x.shape[2]), w.swapaxes(2, 3).reshape(w.shape[0], -1, w.shape[3]), groups)


def conv_transpose(x, w):
    """Every position of ``[C, L]`` is spread over the taps of ``[C, O, K]``."""
    for c, i in itertools.product(range(x.shape[0]), range(x.shape[1])):
        w[c] * x[c, i]


def attention(q, k, v):
    (q @ k.swapaxes(-1, -2)) @ v


def multi_head(q, k, v, heads):
    E = q.shape[-1]
    projected = [t @ numbers(t.shape[-1], E) for t in (q, k, v)]
    q, k, v = (t.reshape(len(t), heads, -1).swapaxes(0, 1) for t in projected)
    attention(q, k, v)
    numbers(q.shape[1], E) @ numbers(E, E)


def recurrent(steps, width, hidden, gates, layers=1, directions=1):
    for layer, _, _ in itertools.product(range(layers), range(directions), range(steps)):
        given = directions * hidden if layer else width
        numbers(gates * hidden, given) @ numbers(given)
        numbers(gates * hidden, hidden) @ numbers(hidden)


def neighborhood(H, W, heads, d, dv, K):
    """Of every query the keys of its window, which lies within the map."""
    for y, x, _ in itertools.product(range(H), range(W), range(heads)):
        top, left = (min(max(i - K // 2, 0), n - K) for i, n in ((y, H), (x, W)))
        k, v = numbers(H, W, d), numbers(H, W, dv)
        window = slice(top, top + K), slice(left, left + K)
        attention(numbers(1, d), k[window].reshape(-1, d), v[window].reshape(-1, dv))


def halo(H, W, heads, d, dv, b, h):
    w = b + 2 * h
    for _ in itertools.product(range(0, H, b), range(0, W, b), range(heads)):
        q = numbers(b * b, d)
        attention(q, numbers(w * w, d), numbers(w * w, dv))
        q @ numbers(d, 2 * w - 1)  # rows
        q @ numbers(d, 2 * w - 1)  # columns


def aggregated(H, W, heads, d, P, K):
    """Of every query the window, at borders too, and the pooled keys; then the weights from learnable tokens."""
    for _ in range(H * W * heads):
        q = numbers(1, d)
        attention(q, numbers(K * K + P, d), numbers(K * K + P, d))
        q @ numbers(d, K * K)


def weighted_sum(H, W, K, C):
    for _ in range(H * W):
        numbers(1, K * K) @ numbers(K * K, C)


class Call(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


DEFINITIONS = {  # a call, shapes of its tensors, and what multiplies
    "linear": (F.linear, [(2, 3, 4), (5, 4)], lambda: numbers(6, 4) @ numbers(4, 5)),
    "operator": (lambda a, b: a @ b, [(2, 3, 4), (4, 5)], lambda: numbers(2, 3, 4) @ numbers(4, 5)),
    "matmul": (torch.matmul, [(3, 4), (2, 4, 5)], lambda: numbers(3, 4) @ numbers(2, 4, 5)),
    "dot": (torch.dot, [(4,), (4,)], lambda: numbers(4) @ numbers(4)),
    "mv": (torch.mv, [(3, 4), (4,)], lambda: numbers(3, 4) @ numbers(4)),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], lambda: numbers(2, 3, 4) @ numbers(2, 4, 5)),
    "baddbmm": (torch.baddbmm, [(1,), (2, 3, 4), (2, 4, 5)], lambda: numbers(2, 3, 4) @ numbers(2, 4, 5)),
    "addmm": (torch.addmm, [(1,), (3, 4), (4, 5)], lambda: numbers(3, 4) @ numbers(4, 5)),
    "inner": (torch.inner, [(2, 4), (3, 4)], lambda: np.inner(numbers(2, 4), numbers(3, 4))),
    "tensordot": (torch.tensordot, [(2, 3, 4), (3, 4, 5)], lambda: numbers(2, 12) @ numbers(12, 5)),
    "conv1d": (F.conv1d, [(1, 4, 7), (6, 4, 3)], lambda: conv(numbers(4, 7), numbers(6, 4, 3))),
    "conv2d": (
        lambda x, w: F.conv2d(x, w, groups=2),
        [(1, 4, 5, 6), (6, 2, 3, 2)],
        lambda: [conv2d(numbers(2, 5, 6), numbers(3, 2, 3, 2)) for _ in range(2)],
    ),
    "depthwise": (
        lambda x, w: F.conv1d(x, w, groups=4),
        [(1, 4, 7), (8, 1, 3)],
        lambda: conv(numbers(4, 7), numbers(8, 1, 3), 4),
    ),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2),
        [(1, 4, 7), (4, 3, 5)],
        lambda: conv_transpose(numbers(4, 7), numbers(4, 3, 5)),
    ),
    "einsum": (
        lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b),
        [(2, 3, 4, 5), (2, 3, 6, 5)],
        lambda: numbers(2, 3, 4, 5) @ numbers(2, 3, 5, 6),
    ),
    "einsum over two": (
        lambda a, b: torch.einsum("...ij,kij", a, b),
        [(2, 3, 4), (5, 3, 4)],
        lambda: numbers(2, 12) @ numbers(12, 5),
    ),
    "einsum of sums": (
        lambda a, b: torch.einsum("bij,bjk->bi", a, b),  # k is summed first
        [(2, 3, 4), (2, 4, 5)],
        lambda: numbers(2, 3, 4) @ numbers(2, 4, 1),
    ),
    "einsum of three": (
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c),
        [(2, 3), (3, 4), (4, 5)],
        lambda: numbers(2, 3) @ numbers(3, 4) @ numbers(4, 5),
    ),
    "einsum without a sum": (lambda a, b: torch.einsum("i,j->ij", a, b), [(3,), (4,)], lambda: None),
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)],
        lambda: attention(numbers(2, 3, 4, 5), numbers(2, 3, 6, 5), numbers(2, 3, 6, 7)),
    ),
    "multi-head attention": (
        nn.MultiheadAttention(6, 2, kdim=4, vdim=3),
        [(5, 6), (7, 4), (7, 3)],
        lambda: multi_head(numbers(5, 6), numbers(7, 4), numbers(7, 3), 2),
    ),
    "lstm": (
        nn.LSTM(5, 3, num_layers=2, bidirectional=True),
        [(4, 5)],
        lambda: recurrent(4, 5, 3, 4, 2, 2),
    ),
    "gru": (nn.GRU(5, 3), [(4, 5)], lambda: recurrent(4, 5, 3, 3)),
    "rnn cell": (nn.RNNCell(5, 3), [(1, 5)], lambda: recurrent(1, 5, 3, 1)),
    "cdist": (torch.cdist, [(3, 4), (5, 4)], lambda: numbers(3, 4) @ numbers(4, 5)),
    "neighbourhood": (
        lambda q, k, v: neighborhood_attention(q, k, v, 3),
        [(1, 4, 5, 2, 3), (1, 4, 5, 2, 3), (1, 4, 5, 2, 2)],
        lambda: neighborhood(4, 5, 2, 3, 2, 3),
    ),
    "halo": (
        lambda q, k, v, up, left: halo_attention(q, k, v, up, left, 2, 1),
        [(1, 5, 4, 2, 3), (1, 5, 4, 2, 3), (1, 5, 4, 2, 2), (7, 3), (7, 3)],
        lambda: halo(5, 4, 2, 3, 2, 2, 1),
    ),
    "aggregated": (
        lambda q, kv, pooled_kv, *parameters: aggregated_attention(q, kv, pooled_kv, 2, *parameters),
        [(1, 4, 5, 6), (1, 4, 5, 12), (1, 2, 12), (2, 1, 3), (2, 1, 1), (2, 9), (2, 20, 2), (2, 3, 9), (2, 1, 9)],
        lambda: aggregated(4, 5, 2, 3, 2, 3),
    ),
    "weighted sum": (
        lambda a, v: na2d_av(a, v, 3),
        [(1, 1, 4, 5, 9), (1, 1, 4, 5, 2)],
        lambda: weighted_sum(4, 5, 3, 2),
    ),
}


@pytest.mark.parametrize(("call", "shapes", "definition"), DEFINITIONS.values(), ids=DEFINITIONS)
def test_formulas_by_brute_force(call, shapes, definition, monkeypatch):
    """A loop over the definition multiplies as often, and the profiler counts as much."""
    monkeypatch.setattr(Number, "products", 0)
    definition()
    model = call if isinstance(call, nn.Module) else Call(call)
    inputs = [torch.randn(shape) for shape in shapes]
    assert hand_count(model.eval(), *inputs).total() == Number.products
    assert count(model, *inputs).macs == Number.products


def test_hand_does_not_depend_on_fused_attention():
    x = torch.empty(1, 3, 160, 160, device="meta")
    try:
        totals = set()
        for fused in (True, False):
            set_fused_attn(fused)
            totals.add(hand_count(build("test_vit", device="meta"), x).total())
    finally:
        set_fused_attn(True)
    assert len(totals) == 1
