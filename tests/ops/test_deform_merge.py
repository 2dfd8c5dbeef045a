import math

import pytest
import torch
from tolerance import op_close
from torchvision.ops import deform_conv2d

from vizoo.backbones.ops.deform_merge import deform_merge, reference_deform_merge

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
