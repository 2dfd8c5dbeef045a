import pytest
import torch
from tolerance import op_close

from vizoo.backbones.layers.contmix import GlobalResponseNorm
from vizoo.backbones.ops import backend
from vizoo.backbones.ops.response_norm import (
    reference_response_ffn,
    reference_response_norm,
    response_ffn,
    response_norm,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "part of channels last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def inputs(B, C, H, W, dtype=torch.float64):
    generator = torch.Generator().manual_seed(42)
    shapes = (B, C, H, W), (1, C, 1, 1), (1, C, 1, 1), (B, C, H, W)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]
    if B > 1:
        tensors[0][0, C // 2] = tensors[0][1] = 0  # a channel and an image of zeros, where a norm has no slope
    return tensors


def run(f, tensors, grad):
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (1, 6, 1, 9), (2, 1, 5, 5)], ids=str)
def test_is_the_reference(shape, dtype, layout):
    """Output and every gradient."""
    *tensors, grad = inputs(*shape, dtype)
    plain = run(reference_response_norm, tensors, grad)
    truth = run(reference_response_norm, [t.double() for t in tensors], grad.double())
    change = LAYOUTS[layout]
    found = run(lambda x, *t: response_norm(change(x), *t), tensors, change(grad))
    for name, a, t, p in zip(("out", "dx", "dgamma", "dbeta"), found, truth, plain, strict=True):
        assert torch.isfinite(a).all()
        op_close(a, t, p, grad=name != "out", what=name)


def test_the_reference_is_the_definition():
    x, gamma, beta, _ = inputs(3, 5, 7, 4)
    norm = x.square().sum((2, 3), keepdim=True).sqrt()
    op_close(reference_response_norm(x, gamma, beta), gamma * norm / (norm.mean(1, keepdim=True) + 1e-6) * x + beta + x)


def test_no_images():
    *tensors, grad = inputs(0, 3, 2, 2)
    assert [t.shape for t in run(response_norm, tensors, grad)] == [grad.shape, *(t.shape for t in tensors)]


def test_derivatives():
    *tensors, _ = inputs(1, 3, 2, 3)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(response_norm, tensors)
    assert torch.autograd.gradgradcheck(response_norm, tensors)


def test_keeps_its_promises():
    x, gamma, beta, grad = inputs(2, 4, 3, 5, torch.float32)
    for change in (LAYOUTS["contiguous"], LAYOUTS["part of channels last"]):
        tensors = change(x), gamma, beta
        torch.library.opcheck(torch.ops.vizoo.response_norm.default, tensors)
        norm = torch.ops.vizoo.response_norm(*tensors)[1]
        torch.library.opcheck(torch.ops.vizoo.response_norm_backward.default, (grad, tensors[0], gamma, norm))


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's choice")
def test_layers_train_by_it():
    layer, x = GlobalResponseNorm(6), torch.randn(2, 6, 5, 4)
    assert "vizoo" in str(layer(x).grad_fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "vizoo" not in str(layer(x).grad_fn)
    assert "vizoo" not in str(layer.double()(x.double()).grad_fn)


@pytest.mark.skipif(bool(backend.onednn_missing()) or DEVICE == "cuda", reason="needs oneDNN")
@pytest.mark.parametrize("shape", [(1, 5, 7, 4), (3, 6, 3, 9), (0, 3, 2, 2), (8, 56, 56, 4)], ids=str)
@torch.no_grad()
def test_the_network_around_it(shape):
    """One operator of compiled inference, of which the last case works on some images at a time."""
    (B, H, W, C), hidden = shape, 160
    generator = torch.Generator().manual_seed(42)
    sizes = (
        (hidden, C),
        (hidden,),
        (hidden, 1, 3, 3),
        (hidden,),
        (1, hidden, 1, 1),
        (1, hidden, 1, 1),
        (3, hidden),
        (3,),
    )
    weights = [torch.randn(s, generator=generator) / s[-1] ** 0.5 for s in sizes]
    x = torch.randn(shape, generator=generator)
    for arguments in ((x, *weights), (x, weights[0], None, weights[1 + 1], None, *weights[4:7], None)):
        wide = [None if t is None else t.double() for t in arguments]
        found = response_ffn(*arguments)
        if B == 0:
            assert found.shape == (B, H, W, 3)
        else:
            op_close(found, reference_response_ffn(*wide), reference_response_ffn(*arguments))
    if 0 < B < 8:
        torch.library.opcheck(torch.ops.vizoo.response_ffn.default, (x, *weights))
