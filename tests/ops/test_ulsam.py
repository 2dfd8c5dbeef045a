import itertools

import pytest
import torch
from tolerance import close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import ulsam as module
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.ulsam import (
    reference_subspace_attention,
    reference_ulsam_logits,
    subspace_attention,
    ulsam_logits,
)
from vizoo.tools.profiling.counting import count

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
# B, g, channels of a group, H, W
CASES = [(1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (1, 4, 4, 9, 2), (3, 2, 17, 5, 13), (1, 8, 1, 11, 6), (2, 1, 16, 8, 9)]
AFFINE = [True, False]
LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, g, G, H, W, affine=True):
    generator = torch.Generator().manual_seed(42)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [draw(B, g * G, H, W), draw(g, G), draw(g)]
    return [*tensors, draw(g * G), draw(g * G)] if affine else tensors


def loop(x, weight, bias, scale=None, shift=None):
    B, C, H, W = x.shape
    g, G = weight.shape
    out = torch.zeros(B, g, H, W, dtype=x.dtype)
    for b, n, i, j in itertools.product(*map(range, (B, g, H, W))):
        out[b, n, i, j] = bias[n]
        for c in range(n * G, (n + 1) * G):
            around = x[b, c, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            if scale is not None:
                around = around * scale[c] + shift[c]
            out[b, n, i, j] += weight[n, c - n * G] * around.clamp(min=0).max()
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, tensors, dtype, device="cpu", layout=LAYOUTS["channels first"]):
    """Output and gradients of ``f`` in ``dtype`` against the reference in float64."""
    tensors = [t.to(device, dtype) for t in tensors]
    shape = (tensors[0].shape[0], tensors[1].shape[0], *tensors[0].shape[2:])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = run(reference_ulsam_logits, [t.double() for t in tensors], grad.double())
    plain = run(reference_ulsam_logits, tensors, grad)
    found = run(f, [layout(tensors[0]), *tensors[1:]], grad)
    names = ("out", "d_x", "d_weight", "d_bias", "d_scale", "d_shift")
    for i, (a, t, p) in enumerate(zip(found, truth, plain, strict=True)):
        op_close(a, t, p, grad=i > 0, what=names[i])


def triton(*tensors):
    return ulsam_logits(*tensors, backend="triton")


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("f", [reference_ulsam_logits, ulsam_logits])
def test_is_the_definition(f, grad, affine):
    for case in [(2, 2, 3, 4, 5), (1, 3, 1, 1, 3)]:
        tensors = inputs(*case, affine=affine)
        tensors[0].requires_grad_(grad)
        op_close(f(*tensors).detach(), loop(*(t.detach() for t in tensors)))


@pytest.mark.parametrize("f", [reference_ulsam_logits, ulsam_logits])
def test_gradcheck(f):
    for affine in AFFINE:
        tensors = [t.requires_grad_() for t in inputs(2, 2, 3, 3, 4, affine=affine)]
        assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_separable_maximum(case, layout, dtype, monkeypatch):
    """Inference on a CPU, in one chunk and in several of which the last is smaller."""
    for affine in AFFINE:
        tensors = [t.to(dtype) for t in inputs(*case, affine=affine)]
        truth = reference_ulsam_logits(*(t.double() for t in tensors))
        plain = reference_ulsam_logits(*tensors)
        for chunk in (module._CHUNK, 2 * tensors[0][0].numel(), 1):
            monkeypatch.setattr(module, "_CHUNK", chunk)
            op_close(ulsam_logits(LAYOUTS[layout](tensors[0]), *tensors[1:]), truth, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autograd(layout):
    check(ulsam_logits, inputs(2, 3, 5, 4, 7), torch.float32, layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_folded_norms_stay_in_float32(dtype):
    """Parameters in float32 beside a map in half precision: the sum is in float32, the result in the map's dtype."""
    x, *others = inputs(2, 3, 5, 4, 7)
    x, others = x.to(dtype), [t.float() for t in others]
    truth = reference_ulsam_logits(x.double(), *(t.double() for t in others))
    for f in (ulsam_logits, reference_ulsam_logits):
        op_close(f(x, *others), truth, what=f.__name__)


@pytest.mark.parametrize("f", [reference_ulsam_logits, ulsam_logits, pytest.param(triton, marks=needs_triton)])
@pytest.mark.parametrize("affine", AFFINE)
def test_gradients_of_ties(f, affine):
    """Of equal neighbours the first gets the gradient, and none where the largest is 0 or less."""
    x = torch.randint(-2, 3, (2, 6, 4, 5)).double()
    weight, bias = inputs(1, 3, 2, 1, 1)[1:3]
    others = [torch.tensor([1.0, -1, 2, 0.5, 0, 1]), torch.tensor([0.0, 1, -2, -1, 0, 2])] if affine else []
    tensors = [x, weight, bias, *(t.double() for t in others)]
    scale, shift = tensors[3:] or (torch.ones(6).double(), torch.zeros(6).double())
    grad = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = [torch.zeros_like(t) for t in (x, weight, bias, scale, shift)]
    for b, c, i, j in itertools.product(*map(range, x.shape)):
        n, k = divmod(c, 2)
        around = [(y, z) for y in range(max(i - 1, 0), min(i + 2, 4)) for z in range(max(j - 1, 0), min(j + 2, 5))]
        values = [(x[b, c, y, z] * scale[c] + shift[c]).item() for y, z in around]
        peak = max(values)  # the first of several
        if peak > 0:
            y, z = around[values.index(peak)]
            slope = grad[b, n, i, j] * weight[n, k]
            expected[0][b, c, y, z] += slope * scale[c]
            expected[1][n, k] += grad[b, n, i, j] * peak
            expected[3][c] += slope * x[b, c, y, z]
            expected[4][c] += slope
    expected[2] = grad.sum((0, 2, 3))
    dtype, device = (torch.float32, DEVICE) if f is triton else (torch.float64, "cpu")
    found = run(f, [t.to(device, dtype) for t in tensors], grad.to(device, dtype))[1:]
    for name, a, t in zip(("d_x", "d_weight", "d_bias", "d_scale", "d_shift"), found, expected):  # noqa: B905
        op_close(a.cpu(), t, grad=True, what=name)
    assert torch.equal(found[0].cpu() == 0, expected[0] == 0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_kernels(case, dtype):
    for affine in AFFINE:
        check(triton, inputs(*case, affine=affine), dtype, DEVICE)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_in_any_layout(layout):
    check(triton, inputs(2, 2, 18, 5, 15), torch.float32, DEVICE, LAYOUTS[layout])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_kernels_cut_maps_and_take_empty_ones(dtype):
    """Two tiles of rows by two of columns, for so many channels that few columns fit; then nothing at all."""
    check(triton, inputs(1, 1, 513, 9, 2), dtype, DEVICE, LAYOUTS["channels last"])
    for shape in [(0, 2, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)]:
        tensors = [t.to(DEVICE, dtype) for t in inputs(*shape)]
        out, dx, *others = run(triton, tensors, torch.ones(shape[0], 2, *shape[3:], device=DEVICE, dtype=dtype))
        assert (out.numel(), dx.shape) == (0, tensors[0].shape)
        assert not any(t.any() for t in others)


@needs_triton
@pytest.mark.parametrize("affine", AFFINE)
def test_kernels_keep_small_gradients(affine):
    """Far below what float16 has: sums are made in float32, so only what is stored in it is rounded."""
    tensors = [t.to(DEVICE, torch.float16) for t in inputs(2, 2, 5, 6, 7, affine)]
    tensors[1:] = [t.float() for t in tensors[1:]]
    grad = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(1)).mul(2e-6).to(DEVICE, torch.float16)
    truth = run(reference_ulsam_logits, [t.double() for t in tensors], grad.double())
    for a, t in zip(run(triton, tensors, grad)[2:], truth[2:], strict=True):
        op_close(a, t, grad=True)


@needs_triton
def test_kernels_choose_the_neighbour_that_pytorch_chooses():
    """Of equal neighbours the first gets the gradient, and none when nothing is above zero."""
    x = torch.randint(-2, 3, (2, 6, 7, 9), generator=torch.Generator().manual_seed(0)).double()
    weight, bias = inputs(1, 3, 2, 1, 1)[1:3]
    grad = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    truth = run(reference_ulsam_logits, (x, weight, bias), grad)
    found = run(triton, [t.to(DEVICE, torch.float32) for t in (x, weight, bias)], grad.to(DEVICE, torch.float32))
    for i, (a, t) in enumerate(zip(found, truth, strict=True)):
        op_close(a.cpu(), t, grad=i > 0)
    assert torch.equal(found[1].cpu() == 0, truth[1] == 0)


@pytest.mark.parametrize("f", [ulsam_logits, pytest.param(triton, marks=needs_triton)])
def test_nan_is_not_lost(f):
    x, *others = (t.float().to(DEVICE) for t in inputs(1, 1, 2, 5, 6))
    x[0, 1, 2, 3] = float("nan")
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(f(x, *others)[0, 0].isnan().cpu(), expected)


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=needs_triton)], ids=["torch", "triton"])
def test_opcheck(triton):
    op = torch.ops.vizoo.ulsam_logits.default
    for affine, layout in zip(AFFINE, LAYOUTS.values(), strict=False):
        x, weight, bias, *rest = (t.float().to(DEVICE).requires_grad_(triton) for t in inputs(2, 2, 3, 5, 7, affine))
        scale, shift = rest or (None, None)
        x = layout(x.detach()).requires_grad_(triton)
        torch.library.opcheck(op, (x, weight, bias, scale, shift, triton, triton))
        if triton:
            logits, place = op(x, weight, bias, scale, shift, True, True)
            arguments = (
                logits.detach(),
                x.detach(),
                weight.detach(),
                scale if scale is None else scale.detach(),
                place,
            )
            torch.library.opcheck(torch.ops.vizoo.ulsam_logits_backward.default, arguments, test_utils="test_schema")
            assert op(x.detach(), weight.detach(), bias.detach(), None, None, False, True)[1].numel() == 0


def attended(x, logits):
    return subspace_attention(x, logits, "triton")


def attention_inputs(B, g, G, H, W):
    generator = torch.Generator().manual_seed(42)
    return [torch.randn(B, c, H, W, generator=generator, dtype=torch.float64) for c in (g * G, g)]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_attention_kernels(dtype):
    """Values and gradients, in one layout after the other; those of the logits show the attention that values hide."""
    for case, layout in zip([*CASES, (1, 1, 9, 31, 33)], itertools.cycle(LAYOUTS.values())):
        tensors = [t.to(DEVICE, dtype) for t in attention_inputs(*case)]
        grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
        truth = run(reference_subspace_attention, [t.double() for t in tensors], grad.double())
        plain = run(reference_subspace_attention, tensors, grad)
        found = run(attended, [layout(tensors[0]), tensors[1]], grad)
        for i, (a, t, p) in enumerate(zip(found, truth, plain, strict=True)):
            op_close(a, t, p, grad=i > 0, what=f"{i} of {case}")


@needs_triton
def test_attention_opcheck():
    x, logits = (t.float().to(DEVICE).requires_grad_() for t in attention_inputs(2, 2, 3, 3, 4))
    for layout in LAYOUTS.values():
        inputs = layout(x.detach()).requires_grad_(), logits
        torch.library.opcheck(torch.ops.vizoo.subspace_attention.default, inputs)
        inputs = [t.detach() for t in (x, *inputs)]
        torch.library.opcheck(torch.ops.vizoo.subspace_attention_backward.default, inputs, test_utils="test_schema")
    found = [
        torch.autograd.grad(f(x, logits).square().sum(), (x, logits), create_graph=True)
        for f in (attended, reference_subspace_attention)
    ]
    second = [torch.autograd.grad(sum(t.square().sum() for t in parts), (x, logits)) for parts in found]
    for a, b in zip(*second, strict=True):
        op_close(a, b.double(), grad=True)


@needs_triton
def test_attention_kernels_take_no_larger_maps():
    x, logits = (t.float().to(DEVICE) for t in attention_inputs(1, 1, 2, 41, 25))
    with pytest.raises(ValueError, match="the kernels take maps of up to 1024 positions, not 1025"):
        attended(x, logits)
    for a in attended(*(t[:0, :, :4] for t in (x, logits))), attended(*(t[:, :, :0] for t in (x, logits))):
        assert a.numel() == 0


class Logits(torch.nn.Module):
    """``ulsam_logits`` as a module."""

    def forward(self, *tensors):
        return ulsam_logits(*tensors)


@pytest.mark.parametrize("affine", AFFINE)
def test_counts_are_those_of_the_definition(affine):
    """One multiply-accumulate per element for the sum and one for the affine map, twice that backward, everywhere."""
    tensors = [t.float() for t in inputs(2, 3, 2, 5, 7, affine)]
    elements = tensors[0].numel()
    with FlopCounterMode(display=False) as counter:
        ulsam_logits(*tensors)
    assert counter.get_total_flops() == 2 * elements * (1 + affine)
    with FlopCounterMode(display=False) as counter:
        reference_ulsam_logits(*tensors)  # the affine map is the caller's depthwise convolution there
    assert counter.get_total_flops() == 2 * elements
    for engine in ("meta", "fake", "real"):
        found = count(Logits(), *(t.requires_grad_() for t in tensors), backward=True, engine=engine)
        assert (found.macs, found.uncounted) == (3 * elements, {}), engine
    shapes = [tuple(t.shape) for t in tensors] + [None, None][2 * affine :]
    assert COSTS["vizoo::ulsam_logits"](*shapes, True, True).macs == elements * (1 + affine)
    x, weight, _, scale, _ = shapes
    assert COSTS["vizoo::ulsam_logits_backward"]((2, 3, 5, 7), x, weight, scale, x).macs == 2 * elements * (1 + affine)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", [reference_ulsam_logits, ulsam_logits])
def test_scripts(f):
    scripted = torch.jit.script(f)
    for affine in AFFINE:
        tensors = inputs(2, 3, 2, 5, 7, affine=affine)
        op_close(scripted(*tensors), loop(*tensors))


def test_compiles_without_a_break_and_exports_plain_operators():
    tensors = [t.float() for t in inputs(2, 3, 2, 5, 7)]
    torch._dynamo.reset()
    check(torch.compile(Logits(), backend="aot_eager", fullgraph=True), tensors, torch.float32)
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    program = torch.export.export(
        Logits(),
        tuple(tensors),
        dynamic_shapes=(({0: batch, 2: height, 3: width}, None, None, None, None),),
        strict=False,
    )
    assert "vizoo" not in str(program.graph)
    larger = [t.float() for t in inputs(3, 3, 2, 11, 4)]
    close(program.module()(*larger), reference_ulsam_logits(*larger), "graph")


def test_inference_ignores_autocast():
    tensors = inputs(2, 3, 2, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        op_close(ulsam_logits(*(t.float() for t in tensors)), loop(*tensors))


@pytest.mark.parametrize("f", [reference_ulsam_logits, ulsam_logits])
def test_rejects_shapes(f):
    x, weight, bias, scale, shift = inputs(1, 3, 2, 4, 5)
    for arguments, message in [
        ((x[0], weight, bias), r"got x \[6, 4, 5\] and weight \[3, 2\], need \[B, g \* G, H, W\]"),
        ((x, weight[:2], bias), r"got x \[1, 6, 4, 5\] and weight \[2, 2\]"),
        ((x, weight, bias[:2]), r"got bias \[2\], need \[3\]"),
        ((x, weight, bias, scale), "got one of scale and shift, need both or none"),
        ((x, weight, bias, scale[:3], shift), r"got scale \[3\] and shift \[6\], need \[6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            f(*arguments)


def test_rejects_backends():
    tensors = inputs(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch' or 'triton'"):
        ulsam_logits(*tensors, backend="natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but the kernels take .*not torch.float64"):
        ulsam_logits(*tensors, backend="triton")
    with pytest.raises(ValueError, match="the kernels take groups of up to 2048 channels, not 5000"):
        ulsam_logits(*(t.float() for t in inputs(1, 1, 5000, 1, 1)), backend="triton")
