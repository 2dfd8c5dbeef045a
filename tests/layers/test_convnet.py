"""timm's convolutional blocks in their fast form against timm's own, and what keeps a module out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath
from timm.models import _efficientnet_blocks, byobnet, resnet
from tolerance import close, op_close
from torch import Tensor, nn

from vizoo.backbones.layers import convnet
from vizoo.backbones.layers.convnet import infers, run, speed_up

LAYERS = byobnet.LayerFn(act=nn.SiLU, conv_norm_act=lambda *a, **k: ConvNormAct(*a, **{"act_layer": nn.SiLU, **k}))
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "separable": lambda: _efficientnet_blocks.DepthwiseSeparableConv(8, 12, stride=2, pw_act=True, act_layer=nn.ReLU6),
    "separable_skip": lambda: _efficientnet_blocks.DepthwiseSeparableConv(8, 8),
    "inverted": lambda: _efficientnet_blocks.InvertedResidual(8, 8, exp_ratio=6, act_layer=nn.ReLU6),
    "inverted_stride": lambda: _efficientnet_blocks.InvertedResidual(8, 12, stride=2, exp_ratio=3, act_layer=nn.SiLU),
    "inverted_se": lambda: _efficientnet_blocks.InvertedResidual(
        8, 8, exp_ratio=2, se_layer=_efficientnet_blocks.SqueezeExcite, drop_path_rate=0.1
    ),
    "normed": lambda: ConvNormAct(8, 16, 3, stride=2, bias=True),
    "stem": lambda: byobnet.Stem(8, 16, stride=4, num_rep=2, layers=LAYERS),
    "bottleneck": lambda: byobnet.BottleneckBlock(8, 16, stride=2, bottle_ratio=0.5, group_size=4, layers=LAYERS),
    "bottleneck_linear": lambda: byobnet.BottleneckBlock(8, 8, linear_out=True, extra_conv=True, layers=LAYERS),
    "basic": lambda: resnet.BasicBlock(8, 8, drop_path=DropPath(0.1)),
    "basic_stride": lambda: resnet.BasicBlock(8, 16, stride=2, downsample=resnet.downsample_avg(8, 16, 1, 2)),
    "bottle": lambda: resnet.Bottleneck(16, 4),
    "bottle_stride": lambda: resnet.Bottleneck(8, 4, stride=2, downsample=resnet.downsample_conv(8, 16, 1, 2)),
}


def drawn(module: nn.Module) -> nn.Module:
    """A module with norms unlike the identity, some of whose variances are tiny, in evaluation mode."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.2, 2)
    return module.eval()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """timm's block, and ours with its weights."""
    torch.manual_seed(0)
    plain = drawn(BLOCKS[name]())
    fast = nn.Sequential(copy.deepcopy(plain))
    speed_up(fast)
    assert type(fast[0]) is not type(plain)
    assert isinstance(fast[0], type(plain))
    return plain, fast[0]


def channels(block: Any) -> int:
    return next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", ["dense", "last", "strided"])
def test_blocks(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as timm's block, for one image and several, all at once and a few at a time."""
    plain, fast = pair(name)
    for batch, limit in ((1, 8 << 20), (3, 8 << 20), (3, 4096)):
        monkeypatch.setattr(convnet, "_CHUNK_BYTES", limit)
        x = torch.randn(batch, channels(plain), 17, 2 * 13)
        x = x[..., ::2] if layout == "strided" else x[..., :13]
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        before = x.clone()
        truth = copy.deepcopy(plain).double()(x.double()).detach()
        with torch.no_grad():
            assert infers(x)
            op_close(fast(x), truth, plain(x), what=f"{name} {batch} {limit}")
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", BLOCKS)
def test_training_and_doubles(name: str) -> None:
    """Where a gradient is recorded, in training, and in float64 a block is timm's."""
    plain, fast = pair(name)
    x = torch.randn(2, channels(plain), 9, 11)
    close(fast(x), plain(x), "rerun")
    with torch.no_grad():
        close(fast.double()(x.double()), plain.double()(x.double()), "rerun")
    for module in (plain.float(), fast.float()):
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter.grad = None
        module.train()(x).square().sum().backward()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, "gradient")
    for a, b in zip(fast.buffers(), plain.buffers(), strict=True):
        close(a, b, "rerun")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_scripted(name: str) -> None:
    plain, fast = pair(name)
    x = torch.randn(2, channels(plain), 9, 11)
    with torch.no_grad():
        close(torch.jit.script(fast)(x), plain(x), "graph")


def test_tiny_variance() -> None:
    """Norms whose channels hardly vary, or lie far from zero, are no less exact when they are folded."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, bias=True), drawn(nn.BatchNorm2d(8))
    norm.running_var[:4] = 1e-12
    norm.running_mean[2:6] = 100.0
    x = torch.randn(2, 8, 12, 12)
    truth = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double())).detach()
    with torch.no_grad():
        op_close(run(x, conv, norm), truth, norm(conv(x)))


def test_sums_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added, an activation of a norm before it, and one that oneDNN does not know."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), drawn(BatchNormAct2d(4))
    x, other = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for limit in (8 << 20, 600):
        monkeypatch.setattr(convnet, "_CHUNK_BYTES", limit)
        for act in (None, nn.ReLU(), nn.SiLU(), nn.Hardswish()):
            for layers in ((conv,), (conv, norm), (conv, nn.Tanh(), conv), (conv, nn.ReLU6(), nn.MaxPool2d(1), conv)):
                for add in (None, other, torch.randn(1, 4, 1, 1).expand(3, 4, 8, 8), other[:, :1]):
                    expected = x
                    for layer in layers:
                        expected = layer(expected)
                    expected = expected if add is None else expected + add
                    expected = expected if act is None else act(expected)
                    with torch.no_grad():
                        close(run(x, *layers, add=add, act=act), expected, "rerun", f"{layers} {act}")


def test_pooled_before_activation() -> None:
    """The maximum of activated values is the activated maximum, of NaN and with padding too."""
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(1, 2, 12, 12)
    x[0, 0, 4, 4] = torch.nan
    for act in (nn.ReLU(), nn.ReLU6()):
        pool = nn.MaxPool2d(3, 2, 1)
        with torch.no_grad():
            found, expected = run(x, conv, act, pool), pool(act(conv(x)))
        assert expected.isnan().any()
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_one_module_in_two_places() -> None:
    act, conv = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    layers, x = nn.Sequential(conv, act, conv, act), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        close(run(x, layers), layers(x), "rerun")


def test_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small maps neither the norm is folded nor the layout kept."""
    plain, fast = drawn(resnet.BasicBlock(64, 64)), drawn(resnet.BasicBlock(64, 64))
    fast.load_state_dict(plain.state_dict())
    speed_up(fast)
    monkeypatch.setattr(convnet, "fold", None)  # is not called
    x = torch.randn(1, 64, 3, 3)
    with torch.no_grad():
        close(fast(x), plain(x), "rerun")


def watched(module: Any) -> None:
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "whose"),
    [
        (watched, "bn1"),
        (watched, "conv2"),
        (watched, "act1"),
        (lambda m: setattr(m, "padding_mode", "circular"), "conv1"),
        (lambda m: m.train(), "bn2"),
        (lambda m: nn.utils.parametrizations.weight_norm(m), "conv1"),
        (lambda m: setattr(m, "running_var", None) or setattr(m, "running_mean", None), "bn1"),
    ],
)
def test_changed_blocks(change: Callable[[Any], Any], whose: str) -> None:
    """A block some of whose layers are not plain runs as timm's."""
    plain, fast = pair("basic")
    for block in (plain, fast):
        change(getattr(block, whose))
    x = torch.randn(3, 8, 9, 9)
    with torch.no_grad():
        close(fast(x), plain(x), "rerun")


def test_wrong_input_is_refused_by_the_layer() -> None:
    conv = nn.Conv2d(4, 4, 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match="to have 4 channels"):
        run(torch.randn(1, 3, 8, 8), conv)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size"):
        run(torch.randn(1, 4, 2, 2), conv)
    with torch.no_grad(), pytest.raises(RuntimeError, match="should be the same"):
        run(torch.randn(1, 4, 8, 8), nn.Conv2d(4, 4, 3).double(), nn.BatchNorm2d(4).double().eval())


def test_bfloat16_folds_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is as exact as its layers; oneDNN's operator is replaced, as few processors have one for it."""
    torch.manual_seed(0)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, *args: Any) -> Tensor:
        padding, stride, dilation, groups, name = args[:5]
        assert {x.dtype, weight.dtype, bias.dtype} == {torch.bfloat16}
        assert name == "none"
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    class Operators:
        _convolution_pointwise = staticmethod(convolve)

    conv, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), drawn(nn.BatchNorm2d(16))
    conv, norm = conv.bfloat16(), norm.bfloat16()
    x = torch.randn(2, 16, 12, 12).bfloat16()
    truth = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double())).relu().detach()
    monkeypatch.setattr(convnet, "infers", lambda x: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    with torch.no_grad():
        op_close(run(x, conv, norm, nn.ReLU()), truth, norm(conv(x)).relu())
