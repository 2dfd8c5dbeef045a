"""Counting: the anchor table, hand numbers for single constructs, both engines, nothing left behind."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import nn
from torchvision.ops import DeformConv2d

from vizoo.backbones.ops import _cost
from vizoo.tools._counting import fvcore_macs, unwrap
from vizoo.tools.profiler import Cost, count, register_cost

# name, side, params, multiply-accumulates, fvcore's total, fvcore's activations (unfused attention)
ANCHORS = [
    ("vit_tiny_patch16_224", 224, 5_717_416, 1_253_683_200, 1_258_411_200, 5_974_636),
    ("swin_tiny_patch4_window7_224", 224, 28_288_354, 4_490_566_656, 4_509_194_496, 17_055_352),
    ("halonet26t", 256, 12_480_288, 3_172_810_752, 3_193_978_880, 11_693_032),
    ("resnet18", 224, 11_689_512, 1_814_073_344, 1_819_065_856, 2_484_712),
    ("convnext_tiny", 224, 28_589_128, 4_455_531_264, 4_470_437_376, 13_435_624),
    ("pvt_v2_b2", 224, 25_362_856, 4_026_734_592, 4_045_817_152, 27_529_592),
    ("mambaout_tiny", 224, 26_545_096, 4_469_655_744, 4_486_040_064, 16_683_688),
]
LARGE = [("swin_large_patch4_window12_384", 384, 103_919_087_616), ("convnext_large", 224, 34_361_433_600)]
FAMILIES = """resnext50_32x4d efficientnet_b0 mobilenetv3_small_100 regnety_002 vgg11 densenet121 mixer_s32_224
    deit3_small_patch16_224 pit_ti_224 xcit_nano_12_p16_224 edgenext_xx_small maxvit_rmlp_pico_rw_256 coat_lite_tiny
    poolformerv2_s12 nextvit_small tiny_vit_5m_224 repvgg_a0 ghostnet_050 hrnet_w18_small volo_d1_224""".split()  # noqa: SIM905


def image(side, batch=1, device="cpu"):
    return torch.zeros(batch, 3, side, side, device=device)


@pytest.mark.parametrize(("name", "side", "params", "macs", "total", "acts"), ANCHORS, ids=[a[0] for a in ANCHORS])
def test_anchors(name, side, params, macs, total, acts):
    """Fused and unfused, meta and CPU, batch 1 and 8, and fvcore with complete handlers: all the same."""
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            model = timm.create_model(name).eval()
        finally:
            set_fused_attn(True)
        for found in (count(model, image(side)), count(model, image(side), engine="real")):
            assert (found.params, found.macs, found.acts) == (params, macs, acts)
            assert found.uncounted == {}
        eight = count(model, image(side, 8, "meta"))
        assert (eight.macs, eight.acts) == (8 * macs, 8 * acts)
        assert fvcore_macs(model, image(side)) == macs
        assert fvcore_macs(model, image(side), contractions=False) == total


@pytest.mark.parametrize(("name", "side", "macs"), LARGE, ids=[a[0] for a in LARGE])
def test_anchors_on_meta(name, side, macs):
    model = timm.create_model(name, device="meta")
    found = count(model, image(side, device="meta"))
    assert (found.macs, found.engine, found.uncounted) == (macs, "meta", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_engines_agree_on_other_families(name):
    model = timm.create_model(name).eval()
    x = torch.zeros(1, *model.pretrained_cfg["input_size"])
    found = count(model, x)
    assert fvcore_macs(model, x) == found.macs
    assert found.uncounted == {}


@pytest.mark.parametrize("name", ["test_litv2", pytest.param("litv2_s", marks=pytest.mark.slow)])
def test_engines_and_paths_agree_on_the_zoo(name):
    """Fast path on the CPU, plain path, trace and meta give one number."""
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 101, 70)
    found = count(model, x)
    real = count(model, x, engine="real")
    assert "mkldnn::_linear_pointwise" in real.ops or not torch.backends.mkldnn.is_available()
    assert found.macs == real.macs == fvcore_macs(model, x)
    assert found.acts == real.acts
    assert found.uncounted == real.uncounted == {}


def hilo_macs(C, N, Np, s, low, high):
    window, pooled = s * s, Np // (s * s)
    hifi = Np * (3 * C * high + high**2) + 2 * Np * window * high
    lofi = Np * (C * low + low**2) + 2 * pooled * C * low + 2 * Np * pooled * low
    return (hifi if high else 0) + (lofi if low else 0)


@pytest.mark.parametrize("size", [(224, 224), (230, 150), (64, 96)], ids=str)
@pytest.mark.parametrize("name", ["test_litv2", "litv2_s", "litv2_s_alpha00", "litv2_m", "litv2_b"])
def test_litv2_formula(name, size):
    """Closed formula of the paper's parts, at sizes that need padding too."""
    model = timm.create_model(name, device="meta")
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
    assert count(model, torch.zeros(1, 3, *size, device="meta")).macs == expected


# single constructs with numbers by hand


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function, *children):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(children)

    def forward(self, *args, **kwargs):
        return self.function(*self.parts, *args, **kwargs)


def sdpa(**kwargs):
    return Call(lambda *qkv: F.scaled_dot_product_attention(*qkv, **kwargs))


Q, K, V = torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 6)
CONSTRUCTS = {
    "attention": (sdpa(), (Q, K, torch.zeros(2, 4, 7, 8)), 2 * 4 * 10 * 7 * 16),
    "attention, wider values": (sdpa(), (Q, K, V), 2 * 4 * 10 * 7 * 14),
    "attention, mask": (sdpa(), (Q, K, torch.zeros(2, 4, 7, 8), torch.zeros(10, 7)), 2 * 4 * 10 * 7 * 16),
    "attention, causal is not halved": (sdpa(is_causal=True), (Q, Q, Q), 2 * 4 * 10 * 10 * 16),
    "attention, grouped queries": (
        sdpa(enable_gqa=True),
        (torch.zeros(2, 4, 10, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 8)),
        2 * 4 * 10 * 7 * 16,
    ),
    "multi-head attention": (
        Call(lambda a, x: a(x, x, x), nn.MultiheadAttention(64, 4, batch_first=True)),
        (torch.zeros(2, 128, 64),),
        8_388_608,
    ),
    "encoder layer": (nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), (torch.zeros(2, 128, 64),), 12_582_912),
    "einsum": (
        Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
        (torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)),
        360,
    ),
    "baddbmm": (
        Call(torch.baddbmm),
        (torch.zeros(3, 4, 6), torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)),
        360,
    ),
    "transposed convolution": (
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        (torch.zeros(2, 4, 5, 7),),
        2 * 5 * 7 * 4 * 6 * 9,
    ),
    "grouped convolution": (nn.Conv2d(8, 12, 3, groups=4, padding=1), (torch.zeros(2, 8, 5, 7),), 2 * 35 * 12 * 2 * 9),
    "dynamic convolution": (
        Call(lambda x, w: F.conv2d(x.reshape(1, -1, 5, 5), w.reshape(-1, 1, 3, 3), groups=6)),
        (torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 3, 3)),
        9 * 6 * 9,
    ),
    "linear on a map": (nn.Linear(5, 7), (torch.zeros(2, 3, 4, 5),), 24 * 35),
    "shared module": (Call(lambda m, x: m(m(x)), nn.Linear(5, 5)), (torch.zeros(3, 5),), 150),
    "forward called by hand": (Call(lambda m, x: m.forward(x), nn.Linear(5, 6)), (torch.zeros(3, 5),), 90),
}


@pytest.mark.parametrize("what", CONSTRUCTS)
@pytest.mark.parametrize("engine", ["meta", "fake", "real"])
def test_by_hand(what, engine):
    model, inputs, macs = CONSTRUCTS[what]
    found = count(model, *inputs, engine=engine)
    assert (found.macs, found.uncounted) == (macs, {})


@pytest.mark.parametrize("what", [w for w in CONSTRUCTS if "grouped queries" not in w])
def test_by_hand_second_engine(what):
    model, inputs, macs = CONSTRUCTS[what]
    assert fvcore_macs(model, *inputs) == macs


@pytest.mark.parametrize("engine", ["meta", "fake", "real"])
def test_deformable_convolution(engine):
    model = Call(lambda o, c, x: c(x, o(x)), nn.Conv2d(16, 18, 3, padding=1), DeformConv2d(16, 32, 3, padding=1))
    x = torch.zeros(1, 16, 32, 32)
    found = count(model, x, engine=engine)
    assert found.macs == 2_654_208 + 4_718_592 == fvcore_macs(model, x)
    assert found.flops_other == 2 * 589_824 + 18 * 1024  # sampling, and the bias of the offset convolution
    assert found.uncounted == {}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x

    @staticmethod
    def backward(ctx, g):
        return g


def test_inside_of_autograd_functions():
    assert count(Call(Square.apply), torch.zeros(4, 4)).macs == 64


def test_any_inputs_and_outputs():
    layer = nn.Linear(3, 4)
    model = Call(lambda m, batch, *, scale: {"y": m(batch["x"]) * scale, "name": "z"}, layer)
    found = count(model, {"x": torch.zeros(5, 3), "other": [torch.zeros(1), 2]}, scale=torch.ones(1))
    assert found.macs == 60
    assert found.flops_other == 20 + 20  # bias and product


def test_other_costs():
    x = torch.zeros(2, 6, 4, 4)
    for function, each in [
        (nn.GELU(), 8),
        (nn.SiLU(), 5),
        (nn.ReLU(), 1),
        (nn.Softmax(-1), 5),
        (nn.LayerNorm(4), 5),
        (nn.BatchNorm2d(6), 2),
        (nn.GroupNorm(2, 6), 5),
        (Call(torch.exp), 1),
        (Call(lambda t: t + t), 1),
        (Call(lambda t: t.mean(-1)), 1),
        (Call(lambda t: t.reshape(2, -1).t()), 0),
        (Call(lambda t: t.permute(0, 2, 3, 1).contiguous()), 0),
    ]:
        found = count(function, x)
        assert (found.macs, found.flops_other, found.uncounted) == (0, each * x.numel(), {}), function
    grown = count(nn.Upsample(scale_factor=2, mode="bilinear"), x)
    assert grown.flops_other == 8 * 4 * x.numel()


def test_bytes_and_kernels():
    found = count(Call(lambda x: (x + x).reshape(-1).exp()), torch.zeros(10, 10))
    assert (found.kernels, found.bytes, found.largest) == (2, 4 * 100 * (2 + 1 + 1 + 1), 100)


@torch.library.custom_op("vizoo_test::mystery", mutates_args=())
def mystery(x: torch.Tensor, n: int) -> torch.Tensor:
    return x * n


@mystery.register_fake
def _(x, n):
    return torch.empty_like(x)


def test_unknown_operators_are_named_until_they_have_a_cost(monkeypatch):
    model, x = Call(lambda x: mystery(mystery(x, 3), 3)), torch.zeros(2, 5)
    assert count(model, x).uncounted == {"vizoo_test::mystery": 2}
    monkeypatch.setattr(_cost, "COSTS", _cost.COSTS)  # the entry below is removed with it
    register_cost("vizoo_test::mystery")(lambda x, n, out: Cost(macs=n * x[0] * x[1], other=out[1]))
    try:
        register_cost("vizoo_test::mystery")(lambda x, n, out: Cost(macs=n * x[0] * x[1], other=7))  # again is harmless
        found = count(model, x)
        assert (found.macs, found.flops_other, found.uncounted) == (60, 14, {})
        assert count(model, x, engine="real").macs == fvcore_macs(model, x) == 60
    finally:
        del _cost.COSTS["vizoo_test::mystery"]


def test_backward():
    """Attention's backward recomputes on the CPU: 5 products against 2; linear layers take twice their forward."""
    layer = nn.Linear(6, 5)
    assert count(layer, torch.zeros(4, 6, requires_grad=True), backward=True).macs == 3 * 120
    vit = timm.create_model("vit_tiny_patch16_224")
    found = count(vit, image(224), backward=True, engine="real")
    assert found.macs / 1_253_683_200 == pytest.approx(3.048, abs=5e-4)
    assert found.uncounted == {}


def test_nothing_changes():
    model = timm.create_model("test_litv2", drop_path_rate=0.3).train()
    model.stages[1].eval()
    model.head.fc.weight.grad = torch.ones_like(model.head.fc.weight)
    modes = {n: m.training for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    for kwargs in ({}, {"engine": "real"}, {"backward": True, "engine": "real"}):
        torch.manual_seed(7)
        count(model, torch.randn(2, 3, 32, 32), **kwargs)
        torch.manual_seed(7)
        torch.randn(2, 3, 32, 32)
        after = torch.rand(3)
        torch.manual_seed(7)
        torch.randn(2, 3, 32, 32)
        count(model, torch.zeros(2, 3, 32, 32), **kwargs)
        assert torch.equal(torch.rand(3), after), "random state moved"
    fvcore_macs(model, torch.zeros(2, 3, 32, 32))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.head.fc.weight.grad, torch.ones_like(model.head.fc.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.fc.weight")
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_wrappers_are_looked_through():
    model = nn.Linear(3, 4)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(nn.DataParallel(compiled)) is model
    assert count(compiled, torch.zeros(2, 3)).macs == 24
    assert count(nn.DataParallel(model), torch.zeros(2, 3)).macs == 24


def test_modules_and_operators():
    model = timm.create_model("resnet18").eval()
    found = count(model, image(64))
    assert found.modules[""].macs == found.macs
    assert found.modules["layer1"].macs == sum(
        c.macs for p, c in found.modules.items() if p in ("layer1.0", "layer1.1")
    )
    assert sum(c.macs for p, c in found.modules.items() if p and "." not in p) == found.macs
    assert sum(macs for macs, _ in found.ops.values()) == found.macs
    assert found.ops["aten::convolution"][1] == 20
    assert sum(c.acts for p, c in found.modules.items() if p and "." not in p) == found.acts


def test_parameters():
    a = nn.Linear(3, 3, bias=False)
    b = nn.Linear(3, 3, bias=False)
    b.weight = a.weight
    c = nn.BatchNorm1d(3).requires_grad_(False)
    found = count(nn.Sequential(a, b, c), torch.zeros(2, 3))
    assert (found.params, found.trainable, found.buffers) == (15, 9, 7)
    assert found.state_bytes == 4 * (15 + 6) + 8


def test_engine_names():
    with pytest.raises(ValueError, match="engine='cuda'"):
        count(nn.Linear(1, 1), torch.zeros(1, 1), engine="cuda")
    with pytest.raises(RuntimeError):
        count(nn.Linear(3, 1), torch.zeros(1, 2))


class DataDependent(nn.Module):
    """Cannot run on meta, nor on fake tensors."""

    def forward(self, x):
        return x @ x if x.sum().item() > -1 else x


def test_falls_back_to_the_real_device():
    found = count(DataDependent(), torch.zeros(3, 3))
    assert (found.macs, found.engine) == (27, "cpu")
