"""ContMixBlock: recorded official blocks, the merge of its kernels, its response norm."""

import itertools
from functools import partial

import pytest
import torch
from golden import image, load, weights
from tolerance import close, golden_close, golden_gradients, op_close
from torch import nn

from vizoo.backbones.layers import ContMixBlock
from vizoo.backbones.layers.contmix import (
    BRANCHES,
    DilatedReparamBlock,
    FusedSequential,
    GlobalResponseNorm,
    residual_conv,
)
from vizoo.backbones.ops import backend

TRAINED = ("rpb1", "rpb2", "weight_proj.weight", "weight_proj.bias")  # with recorded gradients
BLOCKS = {
    "overlock_contmix_k7": {"dim": 32, "num_heads": 2, "res_scale": True, "ls_init_value": 1},
    "overlock_contmix_k13": {"dim": 24, "kernel_size": 13, "num_heads": 1, "mlp_ratio": 2},
    "overlock_contmix_k13_small": {
        "dim": 24,
        "kernel_size": 13,
        "num_heads": 1,
        "mlp_ratio": 2,
        "res_scale": True,
        "ls_init_value": 1,
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_contmix_block(name):
    case = load(name)
    block = ContMixBlock(**BLOCKS[name]).eval()
    block.load_state_dict(weights(case.keys), strict=True)
    x = image(case.input_shape).requires_grad_()
    out = block(x)
    golden_close(out, case.outputs["out"], "output")
    golden_gradients(out, {"input": x, **{n: block.get_parameter(n) for n in TRAINED}}, case.outputs, seed=7)
    block.reparameterize()
    with torch.no_grad():
        golden_close(block(x), case.outputs["out"], "merged")


@pytest.mark.parametrize("kernel_size", BRANCHES)
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_kernel_merge(kernel_size, grad):
    case, prefix = load("overlock_reparam_merge"), f"k{kernel_size}."
    block = DilatedReparamBlock(4, kernel_size).eval()
    state = {k.removeprefix(prefix): v for k, v in weights(case.keys).items() if k.startswith(prefix)}
    block.load_state_dict(state, strict=True)
    x = image(case.input_shape)
    with torch.set_grad_enabled(grad):
        golden_close(block(x), case.outputs[f"out_k{kernel_size}"], "branches")
        block.reparameterize()
        assert list(block.state_dict()) == ["lk_origin.weight", "lk_origin.bias"]
        golden_close(block.lk_origin.weight, case.outputs[f"weight_k{kernel_size}"], "kernel")
        golden_close(block.lk_origin.bias, case.outputs[f"bias_k{kernel_size}"], "bias")
        golden_close(block(x), case.outputs[f"out_k{kernel_size}"], "merged")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_response_norm_of_zeros(layout):
    """A channel, or a whole image, of zeros has no slope of the norm, as in ``torch.norm``; values in both modes."""
    layer = GlobalResponseNorm(6).double()
    with torch.no_grad():
        layer.gamma.copy_(torch.randn(1, 6, 1, 1))
        layer.beta.copy_(torch.randn(1, 6, 1, 1))
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    x[0, 2] = x[1] = 0
    leaves = [x.contiguous(memory_format=layout).requires_grad_(), *layer.parameters()]
    norm = torch.norm(leaves[0], p=2, dim=(-1, -2), keepdim=True)
    expected = (layer.gamma * norm / (norm.mean(dim=1, keepdim=True) + 1e-6) + 1) * leaves[0] + layer.beta
    grad, out = torch.randn_like(x), layer(leaves[0])
    op_close(out.detach(), expected.detach(), what="out")
    found, truth = (torch.autograd.grad(t, leaves, grad) for t in (out, expected))
    for name, a, t in zip(("dx", "dgamma", "dbeta"), found, truth, strict=True):
        assert torch.isfinite(a).all()
        op_close(a, t, grad=True, what=name)
    with torch.inference_mode():
        op_close(layer(x.contiguous(memory_format=layout)), expected.detach(), what="inference")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 7, 5), (3, 4, 1, 9)], ids=str)
def test_residual_convolutions_train_as_written(shape, layout):
    """In float32 the residual is part of the kernel: the same output and gradients as of two operators."""
    torch.manual_seed(0)
    layer, grad = residual_conv(shape[1]), torch.randn(shape)
    x = torch.randn(shape).contiguous(memory_format=layout)

    def run(f, dtype):
        layer.to(dtype)
        leaves = [x.to(dtype).requires_grad_(), *layer.parameters()]
        out = f(leaves[0])
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    def plain(x):
        return x + nn.functional.conv2d(x, layer.weight, layer.bias, padding=1, groups=shape[1])

    found, rounded = run(layer, torch.float32), run(plain, torch.float32)
    for name, a, t, p in zip(("out", "dx", "dweight", "dbias"), found, run(plain, torch.float64), rounded, strict=True):
        op_close(a, t, p, grad=name != "out", what=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(5, 4), (19, 20)], ids=["few", "many"])
def test_strided_convolutions_train_in_either_layout(size, layout):
    """Channels-first where the map has few positions; the next module has channels-last again."""
    modules = FusedSequential(nn.Conv2d(64, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8))
    x = torch.randn(2, 64, *size).contiguous(memory_format=layout)
    grad = torch.randn(2, 8, (size[0] + 1) // 2, (size[1] + 1) // 2)

    def run(f, dtype):
        leaves = [x.to(dtype).requires_grad_(), *modules.to(dtype).parameters()]
        out = f(leaves[0])
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    def plain(x):
        return nn.Sequential(*modules)(x)

    found, rounded, truth = run(modules, torch.float32), run(plain, torch.float32), run(plain, torch.float64)
    for name, a, t, p in zip(("out", "dx", "dweight", "dgamma", "dbeta"), found, truth, rounded, strict=True):
        op_close(a, t, p, grad=name != "out", what=name)
    assert size[0] > 5 or modules.float()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@torch.no_grad()
def test_gelu_after_convolutions(fused, approximate, monkeypatch):
    """While the product is written, or in its memory; and large kernels on rows that are long."""
    monkeypatch.setattr("vizoo.backbones.layers.contmix.fuses_gelu", lambda x: fused)
    torch.manual_seed(0)
    gelu = nn.GELU(approximate)
    modules = FusedSequential(nn.Conv2d(4, 6, 3), gelu, nn.Conv2d(6, 8, 1), gelu, DilatedReparamBlock(8, 7))
    modules, x = modules.eval(), torch.randn(3, 4, 7, 41)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        with torch.enable_grad():
            plain = nn.Sequential(*modules)(y).detach()
        found = modules(y)
        op_close(found, nn.Sequential(*modules.double())(y.double()), plain)
        modules.float()


# what pictures show


@pytest.mark.parametrize(
    ("size", "dtype"), [((9, 8), torch.float64), ((7, 11), torch.float64), ((9, 8), torch.bfloat16)], ids=str
)
def test_kernels_are_those_of_the_block(size, dtype):
    """At every position, corners and edges too: kernels times the values of their windows give ContMix."""
    block = ContMixBlock(16, kernel_size=7, smk_size=3, num_heads=2, dtype=dtype).eval()
    with torch.no_grad():
        for table in (block.rpb1, block.rpb2, block.weight_proj.weight, block.weight_proj.bias):
            table.normal_()
        x, value = (torch.randn(1, 16, *size, dtype=dtype) for _ in range(2))
        out = block.contmix(x, x, value)
        q, k = block.weight_query(x), block.weight_key(x)
        found = torch.zeros_like(out, dtype=torch.float64)
        for row, col in itertools.product(*map(range, size)):
            halves = []
            for kernel, v in zip(
                block.kernels_at(q, k, row, col), value.unflatten(1, (2, 4, 2)).unbind(1), strict=True
            ):
                K = kernel.shape[3]
                close(kernel.sum((2, 3)), torch.ones_like(kernel[:, :, 0, 0]), "rerun")
                top, left = (min(max(i - K // 2, 0), n - K) for i, n in zip((row, col), size, strict=True))
                window = v[..., top : top + K, left : left + K]  # [1, groups, C, K, K]
                halves.append((kernel.unsqueeze(2) * window).sum((3, 4)).flatten())
            found[0, :, row, col] = torch.cat(halves)
    op_close(out, found, grad=dtype == torch.bfloat16)  # there logits are rounded before the softmax, not after


@pytest.mark.skipif(bool(backend.onednn_missing()), reason="needs oneDNN, which PyTorch was built without")
@pytest.mark.parametrize("size", [(5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_bfloat16_runs_in_as_few_operators(batch, size, monkeypatch):
    """Each convolution with its norm and activation; where the processor has none of them, in operators that round."""
    ops, ran = torch.ops.mkldnn, []
    if torch.bfloat16 not in backend.onednn_dtypes():
        monkeypatch.setattr(backend, "_ONEDNN_DTYPES", (torch.float32, torch.bfloat16))
        runs = {name: getattr(ops, name) for name in ("_linear_pointwise", "_convolution_pointwise")}

        def rounding(name, x, w, b, *args):
            ran.append((x.dtype, w.dtype, None if b is None else b.dtype))
            return runs[name](x.float(), w.float(), None if b is None else b.float(), *args).to(x.dtype)

        for name in runs:
            monkeypatch.setattr(ops, name, partial(rounding, name))
    torch.manual_seed(0)
    modules = FusedSequential(
        DilatedReparamBlock(24, 5),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 40, 1),
        nn.GELU(),
        residual_conv(40),
        GlobalResponseNorm(40),
        nn.Conv2d(40, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
    ).eval()
    for name, t in modules.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) + 0.5 if name.endswith("var") else 0.3 * torch.randn_like(t))
    modules, x = modules.bfloat16(), torch.randn(batch, 24, *size).bfloat16()
    with torch.enable_grad():  # the modules one after the other
        plain = nn.Sequential(*modules)(x).detach()
    found = modules(x)
    assert all(set(dtypes) <= {torch.bfloat16, None} for dtypes in ran)
    assert len(ran) in (0, 3)
    op_close(found, nn.Sequential(*modules.double())(x.double()), plain)
