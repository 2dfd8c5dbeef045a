"""ULSAM: the official outputs, the loop over subspaces, other networks."""

import copy
from functools import partial

import pytest
import timm
import torch
from golden import image, load, names, weights
from tolerance import close, golden_close, op_close
from torch import nn

from vizoo.backbones.layers import ULSAM, add_ulsam
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.tools.profiling.official import ULSAMLoop

CASES = [(64, 4, 14, 14), (64, 1, 7, 9), (12, 12, 5, 3), (24, 3, 1, 8), (40, 8, 17, 1)]  # dim, splits, H, W


LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


PLAIN = {"fast": True, "plain": False}


def pair(dim, splits, dtype=torch.float64, fused=True):
    """The loop with the parameters and statistics of a trained one, and ours with the same."""
    loop, ours = ULSAMLoop(dim, splits), ULSAM(dim, splits)
    loop.load_state_dict(weights({k: [list(v.shape), str(v.dtype)] for k, v in loop.state_dict().items()}))
    ours.load_state_dict(loop.state_dict())
    ours.fused = fused
    return loop.to(dtype), ours.to(dtype)


def effect(module, x):
    """What the attention adds, scaled to order one: the map itself would hide it."""
    return (module(x) - x) * (x.shape[2] * x.shape[3])


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("name", names("ulsam_64"))
def test_golden(name, fused, grad):
    case = load(name)
    layer = ULSAM(64, case.meta["args"]["num_splits"]).eval()
    layer.fused = fused
    layer.load_state_dict(weights(case.keys))
    x = image(case.input_shape)
    with torch.set_grad_enabled(grad):
        golden_close(layer(x)[:, ::4, ::2, ::2], case.outputs["out"], "output")
        golden_close(layer.attention(x), case.outputs["attn"], "attention")
        layer, x = layer.double(), x.double()
        golden_close(effect(layer, x)[:, ::4, ::2, ::2], case.outputs["delta"], "effect", float64=True)
        golden_close(layer.attention(x), case.outputs["attn"], "attention", float64=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_is_the_loop(case, layout):
    dim, splits, *size = case
    loop, ours = pair(dim, splits)
    x = torch.randn(3, dim, *size, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = effect(loop.eval(), x)
        op_close(effect(ours.eval(), x), expected)
        assert ours(x).stride() == x.stride()
        op_close(ours.attention(x).sum((2, 3)), torch.ones(3, splits, dtype=torch.float64))
    op_close(effect(ours, x).detach(), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_trains_as_float64(batch, layout):
    """Where one product scales the channels, and by the convolution itself where it is watched."""
    _, ours = pair(12, 3)
    x = torch.randn(batch, 12, 5, 7, dtype=torch.float64)
    grad = torch.randn_like(x)

    def outcome(dtype):
        given = x.to(dtype, memory_format=layout).requires_grad_()
        layer = ours.to(dtype)
        out = layer._scaled(given)
        return out, *torch.autograd.grad(out, [given, *layer.conv_dws.parameters()], grad.to(dtype))

    found, seen = outcome(torch.float32), []
    with ours.conv_dws.register_forward_hook(lambda *a: seen.append(a)):
        watched = outcome(torch.float32)
    assert "Convolution" not in type(found[0].grad_fn).__name__
    assert len(seen) == 1
    for i, truth in enumerate(outcome(torch.float64)):
        op_close(found[i].detach(), truth.detach(), watched[i].detach(), grad=i > 0)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_kernels_are_the_loop(training):
    """As on a GPU, in float32: both operators have kernels there, and norms are not folded."""
    loop, ours = pair(6, 2, dtype=torch.float32)
    x, found = torch.randn(2, 6, 5, 4), []
    for module in (ours, loop):
        given = x.clone().requires_grad_()
        with kernels_on("cpu"):
            out = module.train(training)(given)
            with torch.no_grad():
                inferred = module.eval()(given)
        (grad,) = torch.autograd.grad(out.square().sum(), given)
        found.append((out.detach(), inferred, grad))
    for a, b in zip(*found, strict=True):
        op_close(a, b.double())


@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients_and_statistics_are_those_of_the_loop(case, training, layout, fused):
    dim, splits, *size = case
    loop, ours = pair(dim, splits, fused=fused)
    x = torch.randn(3, dim, *size, dtype=torch.float64).contiguous(memory_format=layout)
    grad, found = torch.randn(x.shape, dtype=torch.float64), []
    for module in (ours, loop):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        for _ in range(2):  # the second pass starts from moved statistics
            out = effect(module.train(training), given)
        assert out.stride() == x.stride() or module is loop
        out.backward(grad)
        found.append((out.detach(), given.grad))
    for a, b in zip(*found, strict=True):
        op_close(a, b)
    expected = ULSAM(dim, splits).double()
    expected.load_state_dict(loop.state_dict())
    for key, value in ours.state_dict().items():
        close(value.double(), expected.state_dict()[key].double(), "rerun", key)
    assert int(ours.bn_dws.num_batches_tracked) == 2 * training
    # all at once: before a norm in training the gradients of scale and bias are zero but for rounding
    stacked = {k: p.grad for k, p in loop.named_parameters()}
    expected.load_state_dict({**loop.state_dict(), **stacked})
    both = [(p.grad, expected.get_parameter(k).detach()) for k, p in ours.named_parameters()]
    op_close(*(torch.cat([t.flatten() for t in side]) for side in zip(*both, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
def test_dtypes(dtype, fused):
    loop, ours = pair(64, 4, dtype, fused)
    x = torch.randn(2, 64, 9, 6).to(dtype)
    with torch.no_grad():
        found, plain = ours.eval().attention(x), loop.eval().attention(x)
        truth = copy.deepcopy(loop).double().attention(x.double())
        op_close(found, truth, plain)
        out = ours(x)
        op_close(out, copy.deepcopy(loop).double()(x.double()), loop(x))
        assert out.dtype == dtype
        if dtype == torch.float32:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert ours(x).dtype == dtype
    ours.train()(x).float().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
def test_dead_subspace_is_uniform(fused):
    """A subspace whose logits are all negative attends everywhere alike and learns nothing."""
    _, ours = pair(8, 2, fused=fused)
    ours.bn_point.bias.data[1] = -1e6
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    attention = ours.eval().attention(x)
    assert (attention[:, 1] == attention[0, 1, 0, 0]).all()
    assert attention[:, 0].std() > 0
    attention.square().sum().backward()
    for parameter in ours.parameters():
        dead, alive = parameter.grad.chunk(2)[::-1]
        assert (dead == 0).all()
        assert (alive != 0).any()


def test_official_names_come_back():
    case = load("ulsam_64_g4")
    official = weights(case.keys)
    layer = ULSAM(64, 4)
    layer.load_state_dict(official)
    exported = layer.official_state_dict()
    assert list(exported) == list(case.keys)
    for key, value in exported.items():
        close(value, official[key], "same", key)
    net = nn.Sequential(nn.Conv2d(3, 64, 1), ULSAM(64, 4))
    net.load_state_dict(
        {**{k: v for k, v in net.state_dict().items() if k[0] == "0"}, **{f"1.{k}": official[k] for k in official}}
    )
    close(net[1].conv_dws.weight, layer.conv_dws.weight, "same")
    with pytest.raises(ValueError, match="got a state dict with 4 subspaces, need num_splits=8"):
        ULSAM(64, 8).load_state_dict(official)
    del official["subspaces.2.bn_dws.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        ULSAM(64, 4).load_state_dict(official)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_graphs(training):
    """Script, one compiled graph, and a program with free sizes."""
    _, ours = pair(24, 3, torch.float32)
    x = torch.randn(2, 24, 5, 7)

    def twin():
        return copy.deepcopy(ours).train(training)

    expected = effect(twin(), x)
    torch._dynamo.reset()
    close(effect(torch.compile(twin(), backend="aot_eager", fullgraph=True), x), expected, "layout")
    close(effect(torch.jit.script(twin()), x), expected, "layout")
    if not training:
        free = {i: torch.export.Dim(name, min=2) for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
        program = torch.export.export(twin(), (x,), dynamic_shapes=(free,), strict=False).module()
        larger = torch.randn(3, 24, 4, 9)
        close(effect(program, larger), effect(twin(), larger), "layout")


@pytest.mark.parametrize("splits", [0, 5, -1])
def test_rejects_splits(splits):
    with pytest.raises(ValueError, match=f"got dim=64 and num_splits={splits}, need dim to be a multiple"):
        ULSAM(64, splits)


def test_momentum():
    layer = ULSAM(8, 2, bn_momentum=0.1)
    assert (layer.bn_dws.momentum, layer.bn_point.momentum, ULSAM(8).bn_dws.momentum) == (0.1, 0.1, 0.9)


# in other networks


def test_attn_layer_of_timm():
    model = timm.create_model("resnet18", block_args={"attn_layer": partial(ULSAM, num_splits=8)}, num_classes=5)
    layers = [m for m in model.modules() if isinstance(m, ULSAM)]
    assert [layer.conv_dws.in_channels for layer in layers] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 5)


def test_add_ulsam():
    """Insertion follows a block, replacement takes its place; features keep their names, the rest its weights."""
    model = timm.create_model("resnet18", features_only=False).train()
    plain = copy.deepcopy(model)
    model.bn1.eval()
    positions = {
        "layer1": {"mode": "replace", "num_splits": 2},
        "layer3.1": {"bn_momentum": 0.1},
        "layer4": {"mode": "insert"},
    }
    assert add_ulsam(model, positions, torch.zeros(1, 3, 64, 64)) is model
    assert isinstance(model.layer1, ULSAM)
    assert (model.layer1.num_splits, model.layer3[1][1].num_splits, model.layer3[1][1].bn_dws.momentum) == (2, 4, 0.1)
    assert (model.layer4[1].conv_dws.in_channels, model.layer4[1].training) == (512, True)
    assert (model.bn1.training, model.layer2.training) == (False, True)
    close(model.layer3[1][0].conv1.weight, plain.layer3[1].conv1.weight, "same")
    close(model.bn1.running_mean, plain.bn1.running_mean, "same")  # the trial pass moves no statistics
    assert not any(m._forward_hooks for m in model.modules())
    x = torch.randn(2, 3, 96, 64)
    taps = model.eval().forward_intermediates(x, intermediates_only=True)
    assert [t.shape[1:] for t in taps[-2:]] == [(256, 6, 4), (512, 3, 2)]
    assert model(x).shape == (2, 1000)
    alone = add_ulsam(nn.Sequential(nn.Conv2d(4, 8, 3).to(torch.float64)), {"0": {}}, torch.zeros(1, 4, 9, 9).double())
    assert alone[0][1].conv_dws.weight.dtype == torch.float64


class Odd(nn.Module):
    """Submodules that cannot take ULSAM."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.flat = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(2)
        self.twice, self.bilinear, self.unused = nn.ReLU(), nn.Bilinear(1, 1, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.down(self.twice(self.twice(self.stem(x))))
        return self.flat(self.bilinear(x[..., :1], x[..., :1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stemm", {}, "got position 'stemm', need a submodule of the model, such as stem"),
        ("", {}, "got position '', need a submodule"),
        ("stem", {"mode": "append"}, "got mode='append' at 'stem', need 'insert' or 'replace'"),
        ("stem", {"splits": 4}, "got option 'splits' at 'stem', need mode, num_splits or bn_momentum"),
        ("stem", {"num_splits": 3}, "at 'stem': got dim=8 and num_splits=3"),
        (
            "stem",
            {"mode": "replace"},
            r"mode='replace' at 'stem', which maps \[1, 3, 224, 224\] to \[1, 8, 224, 224\]",
        ),
        ("down", {"mode": "replace"}, r"which maps \[1, 8, 224, 224\] to \[1, 8, 111, 111\]; need equal shapes"),
        ("flat", {}, r"got position 'flat', which maps .* need one \[B, C, H, W\] to another"),
        ("bilinear", {}, r"got position 'bilinear', which maps .* need one \[B, C, H, W\] to another"),
        ("twice", {}, "got position 'twice', which is called 2 times; need one call"),
        ("unused", {}, "got position 'unused', which is called 0 times"),
    ],
)
def test_add_ulsam_rejects(name, options, message):
    model = Odd()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        add_ulsam(model, {"stem": {}, name: options} if name != "stem" else {name: options})
    assert dict(model.named_modules()) == before
    assert not any(m._forward_hooks for m in model.modules())
