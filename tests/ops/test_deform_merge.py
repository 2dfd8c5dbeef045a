import math

import pytest
import timm
import torch
import torch.nn.functional as F
from tolerance import op_close
from torchvision.ops import deform_conv2d
from zoo import gradients

from vizoo.backbones.litv2 import DeformableTokenMerging
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.deform_merge import (
    deform_merge,
    deform_sample,
    reference_deform_merge,
    reference_deform_sample,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
SIZES = [(1, 2, 2, 1, 1), (2, 5, 4, 3, 7), (1, 7, 11, 5, 2), (3, 6, 3, 8, 4)]  # B, H, W, C, O


def tensors(B, H, W, C, O, scale=3.0):
    g = torch.Generator().manual_seed(42)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [draw(B, H, W, C), scale * draw(B, H // 2, W // 2, 8), draw(O, C, 2, 2), draw(O)]


def loop(x, offset, weight, bias):
    B, H, W, C = x.shape
    Ho, Wo, O = H // 2, W // 2, weight.shape[0]
    out = torch.zeros(B, Ho, Wo, O, dtype=x.dtype)
    for b in range(B):
        for oy in range(Ho):
            for ox in range(Wo):
                total = bias.clone()
                for i in range(2):
                    for j in range(2):
                        t = 2 * i + j
                        y = 2 * oy + i + offset[b, oy, ox, 2 * t].item()
                        p = 2 * ox + j + offset[b, oy, ox, 2 * t + 1].item()
                        sample = torch.zeros(C, dtype=x.dtype)
                        for yy in (math.floor(y), math.floor(y) + 1):
                            for pp in (math.floor(p), math.floor(p) + 1):
                                if 0 <= yy < H and 0 <= pp < W:
                                    sample += (1 - abs(y - yy)) * (1 - abs(p - pp)) * x[b, yy, pp]
                        total += weight[:, :, i, j] @ sample
                out[b, oy, ox] = total
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_is_the_definition(f, size):
    args = tensors(*size)
    op_close(f(*args), loop(*args))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_is_torchvision_with_all_gradients(f, size):
    x, offset, weight, bias = (t.requires_grad_() for t in tensors(*size))
    mine = f(x, offset, weight, bias)
    theirs = deform_conv2d(x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2), weight, bias, stride=2)
    theirs = theirs.permute(0, 2, 3, 1)
    op_close(mine.detach(), theirs.detach())
    grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = zip(
        torch.autograd.grad(mine, (x, offset, weight, bias), grad),
        torch.autograd.grad(theirs, (x, offset, weight, bias), grad),
        strict=True,
    )
    for a, b in parts:
        op_close(a, b, grad=True)


def test_gradcheck():
    args = [t.requires_grad_() for t in tensors(1, 4, 5, 2, 3, scale=0.4)]
    assert torch.autograd.gradcheck(reference_deform_merge, args)
    assert torch.autograd.gradcheck(deform_merge, args)


@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_rim_and_outside(f):
    """A point on the rim mixes with zeros, one outside gives zero, far offsets and NaN do not read foreign memory."""
    x = torch.ones(1, 2, 2, 1, dtype=torch.float64)
    weight = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    weight[0, 0, 0, 0] = 1  # only tap (0, 0), which starts at (0, 0)
    offset = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    for dy, expected in [(0.0, 1.0), (-0.25, 0.75), (-1.0, 0.0), (1.5, 0.5), (2.0, 0.0), (1e30, 0.0), (-1e30, 0.0)]:
        offset[0, 0, 0, 0] = dy
        assert f(x, offset, weight).item() == pytest.approx(expected), dy
    offset[0, 0, 0, 0] = math.nan
    assert f(x, offset, weight).isnan().all()


def places(x, offset):
    """Rows and columns ``[..., 8]`` that the taps sample, and how many of each the map has."""
    B, H, W, _ = x.shape
    start = torch.zeros(H // 2, W // 2, 8, dtype=x.dtype)
    start[..., 0::2] = 2 * torch.arange(H // 2).reshape(-1, 1, 1) + torch.tensor([0, 0, 1, 1])
    start[..., 1::2] = 2 * torch.arange(W // 2).reshape(-1, 1) + torch.tensor([0, 1, 0, 1])
    return start + offset, torch.tensor([H, W] * 4)


def official(x, offset, weight, bias, grad):
    """Output and gradients of torchvision's operator, offsets with mmcv's rule: none a pixel outside or further."""
    out = deform_conv2d(x.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)
    dx, doffset, *others = torch.autograd.grad(out, (x, offset, weight, bias), grad)
    place, size = places(x.detach(), offset.detach())
    inside = ((place > -1) & (place < size)).unflatten(3, (4, 2)).all(4, keepdim=True)  # both coordinates of a tap
    return out.detach(), dx, doffset.where(inside.expand(-1, -1, -1, -1, 2).flatten(3), 0.0), *others


def kinks(kind, x, offset):
    """Offsets at which the operator has a kink, for offsets of any size."""
    if kind == "zero":
        return torch.zeros_like(offset)
    if kind == "whole":
        return offset.round()
    if kind == "half":
        return offset.floor() + 0.5
    place, size = places(x, torch.zeros_like(offset))
    rim = torch.where(torch.rand(offset.shape) < 0.5, -1.0, size) - place  # the pixel before the first, after the last
    chosen = torch.rand(offset.shape) < 0.4
    if kind == "rim":
        return torch.where(chosen, rim, offset.round())
    return torch.where(chosen, rim.sign() * math.inf, offset)


@pytest.mark.parametrize("kind", ["zero", "whole", "half", "rim", "infinite"])
@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_kinks_are_official(f, kind):
    """One slope of two at whole offsets, none a pixel outside, nothing at all at infinity: value and all gradients."""
    for size in SIZES:
        x, offset, weight, bias = tensors(*size)
        args = [t.requires_grad_() for t in (x, kinks(kind, x, offset), weight, bias)]
        out = f(*args)
        grad = torch.randn(out.shape, dtype=out.dtype)
        found = (out.detach(), *torch.autograd.grad(out, args, grad))
        truth = official(*args, grad)
        for name, a, t in zip(("out", "dx", "doffset", "dweight", "dbias"), found, truth, strict=True):
            op_close(a, t, grad=name != "out", what=f"{name} of {size}")
        place, limit = places(x, args[1].detach())
        outside = ~((place > -1) & (place < limit))
        assert (found[2][outside] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_constant_map_has_no_slope(f, dtype):
    """Exactly none where a whole offset has its next pixel on the map: on a plain area nothing drifts in training.

    Widths are those of models: a product of 3 channels may round by where its row lies in memory.
    """
    for size in [(2, 5, 4, 16, 7), (1, 7, 11, 32, 2), (3, 6, 3, 96, 4)]:
        x, offset, weight, bias = (t.to(dtype) for t in tensors(*size))
        x, offset = torch.full_like(x, 0.7), offset.round().requires_grad_()
        slope = torch.autograd.grad(f(x, offset, weight, bias).square().sum(), offset)[0]
        place, limit = places(x, offset.detach())
        inner = ((place >= 0) & (place <= limit - 2)).unflatten(3, (4, 2)).all(4)
        assert inner.any()
        assert (slope.unflatten(3, (4, 2))[inner] == 0).all()
        assert slope.any(), "on the last pixel the next one is outside"


@pytest.mark.parametrize("f", [reference_deform_merge, deform_merge])
def test_nan_stays_where_it_is(f):
    """An offset that is NaN makes its own output NaN, and no gradient of another place."""
    x, offset, weight, bias = (t.requires_grad_() for t in tensors(*SIZES[1]))
    broken = offset.detach().clone()
    broken[1, 1, 0, 3] = math.nan
    out = f(x, broken.requires_grad_(), weight, bias)
    lost = torch.zeros(out.shape[:3], dtype=torch.bool)
    lost[1, 1, 0] = True
    assert torch.equal(out.isnan().all(3), lost)
    assert torch.equal(out.isnan().any(3), lost)
    dx, doffset = torch.autograd.grad(out, (x, broken), torch.ones_like(out))
    assert torch.isfinite(dx[0]).all()
    assert torch.isfinite(doffset[~lost]).all()


def torchvisions(self, x):
    """``DeformableTokenMerging.forward`` by torchvision's operator."""
    x = x.permute(0, 3, 1, 2)
    x = deform_conv2d(x, self.offset(x), self.conv.weight, self.conv.bias, stride=2)
    return self.act(self.norm(x)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_first_step_is_that_of_torchvision(fused, monkeypatch):
    """A model as it starts, with every offset zero, in float64: loss and the gradient of every parameter and image."""
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model("test_litv2", num_classes=5).double().train()
    finally:
        timm.layers.set_fused_attn(True)
    x, labels, found = torch.randn(3, 3, 75, 101, dtype=torch.float64, requires_grad=True), torch.arange(3), []
    for forward in (DeformableTokenMerging.forward, torchvisions):
        monkeypatch.setattr(DeformableTokenMerging, "forward", forward)
        model.zero_grad()
        x.grad = None
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        found.append({"loss": loss.detach(), "image": x.grad, **gradients(model)})
    largest = max(gradient.abs().max() for gradient in found[1].values())
    for key, truth in found[1].items():
        if truth.abs().max() > 1e-12 * largest:  # of a bias before a batch norm it is rounding
            op_close(found[0][key], truth, grad=key != "loss", what=key)
        else:
            assert key.endswith(("conv.bias", "fc2.bias")), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_coordinates(dtype):
    """The sampling grid is computed in float32 even for half inputs on maps wider than the dtype can count."""
    x, offset, weight, bias = tensors(1, 4, 600, 4, 3)
    args = [t.to(dtype) for t in (x, offset, weight, bias)]
    truth = reference_deform_merge(*(t.double() for t in args))
    plain = reference_deform_merge(*args)
    op_close(deform_merge(*args), truth, plain)


def test_bad_shapes_are_named():
    x, offset, weight, bias = tensors(1, 6, 6, 4, 3)
    with pytest.raises(ValueError, match=r"got offset \[1, 3, 2, 8\] for a 6x6 map, need \[B, 3, 3, 8\]"):
        deform_merge(x, offset[:, :, :2], weight, bias)
    with pytest.raises(ValueError, match=r"got weight \[3, 2, 2, 2\] for 4 channels"):
        deform_merge(x, offset, weight[:, :2], bias)


def sampled(x, offset):
    return deform_sample(x, offset, "triton")


def sample_gradients(f, x, offset, scale=1.0):
    """Samples and both gradients."""
    args = [t.detach().requires_grad_() for t in (x, offset)]
    out = f(*args)
    grad = scale * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad(out, args, grad.to(out.device, out.dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", ["any", "zero", "whole", "half", "rim", "infinite"])
def test_kernels(kind, dtype):
    """An odd map of one tile and one of two, with 3 and 40 channels: in parts of 16 and 8, the last one partial."""
    for size in (SIZES[1], (1, 9, 12, 40, 1)):
        x, offset = tensors(*size)[:2]
        offset = offset if kind == "any" else kinks(kind, x, offset)
        args = [t.to(DEVICE, dtype) for t in (x, offset)]
        truth = sample_gradients(reference_deform_sample, *(t.double() for t in args))
        plain = sample_gradients(reference_deform_sample, *args)
        for name, a, t, p in zip(("out", "dx", "doffset"), sample_gradients(sampled, *args), truth, plain, strict=True):
            op_close(a, t, p, grad=name != "out", what=f"{name} of {size}")


@needs_triton
def test_kernels_in_any_layout():
    """Maps with channels first in memory, offsets as a convolution leaves them, and none at all."""
    x, offset = (t.float().to(DEVICE) for t in tensors(2, 5, 6, 18, 1)[:2])
    truth = sample_gradients(reference_deform_sample, x.double(), offset.double())
    views = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (x, offset)]
    wide = x.repeat_interleave(2, 2)[:, :, ::2]
    for args in (views, (wide, offset)):
        for i, (a, t) in enumerate(zip(sample_gradients(sampled, *args), truth, strict=True)):
            op_close(a, t, grad=i > 0)
    out, *grads = sample_gradients(sampled, x[:0], offset[:0])
    assert [t.shape for t in (out, *grads)] == [(0, 4, 6, 18), (0, 5, 6, 18), (0, 2, 3, 8)]


@needs_triton
def test_kernels_leave_nan_where_it_is():
    x, offset = (t.float().to(DEVICE) for t in tensors(*SIZES[1])[:2])
    offset[1, 1, 0, 3] = math.nan  # of the second tap
    out, dx, doffset = sample_gradients(sampled, x, offset)
    lost = torch.zeros(out.shape[:3], dtype=torch.bool)
    lost[1, 2, 1] = True
    assert torch.equal(out.isnan().all(3).cpu(), lost)
    assert torch.equal(out.isnan().any(3).cpu(), lost)
    assert torch.isfinite(dx[0]).all()
    assert torch.isfinite(doffset.flatten(0, 2)[[0, 1, 2, 3, 4, 5, 7]]).all()


@needs_triton
def test_kernels_keep_small_gradients():
    """Of the size of float16's smallest: sums are made in float32."""
    x, offset = tensors(1, 6, 7, 20, 1)[:2]
    args = x.to(DEVICE, torch.float16), offset.to(DEVICE, torch.float32)
    _, _, doffset = sample_gradients(sampled, *args, scale=1e-6)
    grad = torch.randn(1, 6, 6, 20, generator=torch.Generator().manual_seed(1)).mul(1e-6).to(DEVICE, torch.float16)
    wide = args[0].double(), args[1].double().requires_grad_()
    op_close(doffset, torch.autograd.grad(reference_deform_sample(*wide), wide[1], grad.double())[0], grad=True)


@needs_triton
def test_opcheck_and_second_derivatives():
    args = [t.float().to(DEVICE).requires_grad_() for t in tensors(1, 5, 4, 3, 1, scale=0.4)[:2]]
    torch.library.opcheck(torch.ops.vizoo.deform_sample.default, args)
    inputs = (reference_deform_sample(*args).detach(), *(t.detach() for t in args))
    torch.library.opcheck(torch.ops.vizoo.deform_sample_backward.default, inputs, test_utils="test_schema")
    seconds = []
    for f in (sampled, reference_deform_sample):
        found = torch.autograd.grad(f(*args).square().sum(), args, create_graph=True)
        seconds.append(torch.autograd.grad(sum(t.square().sum() for t in found), args))
    for a, b in zip(*seconds, strict=True):
        op_close(a, b.double(), grad=True)


def test_rejects_backends():
    x, offset = tensors(1, 4, 4, 3, 1)[:2]
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch' or 'triton'"):
        deform_sample(x, offset, "natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but the kernels take .*not torch.float64"):
        sampled(x, offset)
