import pytest
import torch
from tolerance import op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import _prompt_attention_kernels as kernels
from vizoo.backbones.ops import prompt_attention as module
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.backbones.ops.prompt_attention import prompt_attention, reference_prompt_attention

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
NAMES = ("out", "dq", "dk", "dv", "dk_prompt", "dv_prompt")
CASES = {  # images, heads, tokens, prompts, channels, images of the prompts
    "one of all": (1, 1, 1, 1, 16, 1),
    "shared prompts": (2, 2, 37, 5, 16, 1),
    "prompts of each image": (2, 1, 70, 36, 16, 2),
    "more prompts than a tile": (1, 1, 131, 70, 48, 1),
}


def inputs(B, h, N, P, d, own):
    """Queries, keys and values of tokens, those of prompts, and a choice in which some take all and some none."""
    generator = torch.Generator().manual_seed(42)
    sizes = [(B, h, N, d)] * 3 + [(own, h, P, d)] * 2
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    chosen = torch.rand(B, N, P, generator=generator) < 0.4
    chosen[:, N // 2], chosen[:, N // 3] = True, False
    return tensors, chosen


def by_kernels(*args):
    return prompt_attention(*args, backend="triton")


def by_flash(*args):
    return prompt_attention(*args, backend="torch")


FORMS = [pytest.param(by_kernels, DEVICE, marks=needs_triton, id="triton"), pytest.param(by_flash, "cpu", id="flash")]
each_form = pytest.mark.parametrize(("f", "device"), FORMS)


def run(f, tensors, chosen, grad, scale=0.3):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*tensors, chosen, scale)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, device, tensors, chosen, dtype):
    """Output and gradients of a form in ``dtype`` against the reference in float64."""
    tensors, chosen = [t.to(device, dtype) for t in tensors], chosen.to(device)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = run(reference_prompt_attention, [t.double() for t in tensors], chosen, grad.double())
    plain = run(reference_prompt_attention, tensors, chosen, grad)
    for i, (a, t, p) in enumerate(zip(run(f, tensors, chosen, grad), truth, plain, strict=True)):
        op_close(a, t, p, grad=i > 0, what=NAMES[i])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels(case, dtype, nan_empty):
    check(by_kernels, DEVICE, *inputs(*case), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES.values(), (2, 2, 9, 4, 5, 1)])
def test_flash(case, dtype, nan_empty):
    check(by_flash, "cpu", *inputs(*case), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fused_form(dtype):
    """What programs and transforms see, where each token has an unchosen prompt."""
    tensors, chosen = inputs(2, 2, 9, 4, 5, 1)
    chosen[:, :, 0] = False
    check(lambda *args: module._fused_form(*args, 0.0), "cpu", tensors, chosen, dtype)


@needs_triton
def test_kernels_add_up_images(monkeypatch, nan_empty):
    """Gradients of shared prompts where each program takes several images, the last one fewer."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(by_kernels, DEVICE, *inputs(3, 1, 21, 5, 16, 1), torch.float32)


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_of_products_reaches_the_kernels(precision, monkeypatch):
    monkeypatch.setattr(kernels, "product_precision", lambda device: precision)
    found = launches(monkeypatch)
    check(by_kernels, DEVICE, *inputs(1, 1, 21, 5, 16, 1), torch.float32)
    assert [x["PRECISION"] for x in found if "PRECISION" in x] == [precision] * 4
    assert len(found) == 5  # and the choice as bits


def launches(monkeypatch, run=True):
    """Keyword arguments of every launch of a kernel from here on; with ``run=False`` none is made."""
    found = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *pointers, **arguments: (
                found.append(arguments) or (run and self.kernel[grid](*pointers, **arguments))
            )

    for name in [x for x in vars(kernels) if x.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorded(getattr(kernels, name)))
    return found


@needs_triton
def test_wide_offsets_only_where_an_image_needs_them(monkeypatch):
    found = launches(monkeypatch, run=False)
    for tokens, bits in [(2**10, 32), (2**27, 64)]:
        q = torch.empty(2, 1, tokens, 16, dtype=torch.float16, device="meta")
        prompts, chosen = q[:1, :, :5], torch.empty(2, tokens, 5, dtype=torch.bool, device="meta")
        out, lse, kept = kernels.kernel_forward(q, q, q, prompts, prompts, chosen=chosen, scale=1.0)
        kernels.kernel_backward(out, out, lse, kept, q, q, q, prompts, prompts, scale=1.0)
        assert {x["INDEX"].primitive_bitwidth for x in found if "INDEX" in x} == {bits}
        found.clear()


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_every_size_has_tiles(precision, monkeypatch):
    monkeypatch.setattr(kernels, "product_precision", lambda device: precision)
    for dtype in (torch.float32, torch.float16):
        for d in range(16, module.MAX_HEAD_SIZE + 1, 16):
            for name in ("fwd", "query", "key"):
                tile = kernels._choice(torch.empty(1, 1, 1, d, dtype=dtype), name)
                assert tile.keys in (16, 32, 64)  # one or two words of the choice
                assert tile.queries >= 16


@needs_triton
@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e3])
def test_tiny_and_large_float16_gradients(size):
    """Of the output; those of the logits, a small part of it, would be 0 or infinite in float16."""
    tensors, chosen = inputs(1, 1, 37, 5, 16, 1)
    tensors, chosen = [t.half().to(DEVICE) for t in tensors], chosen.to(DEVICE)
    tensors[0], tensors[1], tensors[3] = tensors[0] * 0.25, tensors[1] * 4, tensors[3] * 4
    grad = (torch.sign(torch.randn(tensors[0].shape)) * size).half().to(DEVICE)
    unit = grad.double() / grad.abs().max().double()
    truth = run(reference_prompt_attention, [t.double() for t in tensors], chosen, unit)
    out, *rest = torch.ops.vizoo.prompt_attention(*tensors, chosen, 0.3, "triton")
    found = torch.ops.vizoo.prompt_attention_backward(grad, out, *rest, *tensors, chosen, 0.3, "triton")
    for actual, expected, name in zip(found, truth[1:], NAMES[1:], strict=True):
        wanted = expected * grad.abs().max().double()
        error = (actual.double() - wanted).abs()
        assert (error <= 2e-3 * wanted.abs().max() + 2.0**-25).all(), name  # half a step of float16 near 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: of keys that are not stored
@needs_triton
def test_logits_far_below_zero():
    """What stands for keys past the last must not be larger than any number."""
    tensors, chosen = inputs(1, 1, 21, 5, 16, 1)
    tensors[0], tensors[1], tensors[3] = tensors[0] + 5, tensors[1] - 5, tensors[3] - 5
    tensors = [t.float().to(DEVICE) for t in tensors]
    grad = tensors[2]
    truth = run(reference_prompt_attention, [t.double() for t in tensors], chosen.to(DEVICE), grad.double(), 1.0)
    found = run(by_kernels, tensors, chosen.to(DEVICE), grad, 1.0)
    for actual, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@each_form
def test_inputs_need_not_be_contiguous(f, device):
    B, h, N, P, d = 2, 3, 11, 5, 16
    q, k, v = torch.randn(B, N, 3, h, d, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind(0)
    _, kp, vp = torch.randn(1, P, 3, h, d, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind(0)
    chosen = torch.rand(B, P, N).transpose(1, 2) < 0.5
    check(f, device, (q, k, v, kp, vp), chosen, torch.float32)
    check(f, device, (q.mT.contiguous().mT, k.flip(2), v, kp.contiguous(), vp), chosen, torch.float32)


@pytest.mark.parametrize("own", [1, 2])
@pytest.mark.parametrize("form", [pytest.param("triton", marks=needs_triton), "flash"])
def test_opcheck(form, own):
    device = DEVICE if form == "triton" else "cpu"
    tensors, chosen = inputs(2, 2, 7, 3, 16, own)
    tensors, chosen = [t.float().to(device).requires_grad_() for t in tensors], chosen.to(device)
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vizoo.prompt_attention.default, (*tensors, chosen, 0.5, form), test_utils=kinds)
    tensors = [t.detach() for t in tensors]
    results = torch.ops.vizoo.prompt_attention(*tensors, chosen, 0.5, form)
    arguments = (torch.randn_like(results[0]), *results, *tensors, chosen, 0.5, form)
    backward = torch.ops.vizoo.prompt_attention_backward.default
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@each_form
def test_second_derivatives(f, device):
    tensors, chosen = inputs(1, 2, 7, 3, 16, 1)
    found = []
    for form, dtype in ((f, torch.float32), (reference_prompt_attention, torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        out = form(*leaves, chosen.to(device), 0.3)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for name, actual, expected in zip(NAMES[1:], *found, strict=True):
        op_close(actual, expected, grad=True, what=name)


def test_flash_under_autocast():
    """Products keep the dtype of the values, whatever norms have made of queries and keys."""
    tensors, chosen = inputs(2, 2, 9, 4, 16, 1)
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q, k, v, k_prompt, v_prompt = (t.to(dtype) for t in tensors)
            out = prompt_attention(q.float(), k.float(), v, k_prompt.float(), v_prompt, chosen, 0.3)
        assert out.dtype == dtype
        op_close(out, reference_prompt_attention(*(t.to(dtype).double() for t in tensors), chosen, 0.3))


class Attend(torch.nn.Module):
    def forward(self, q, k, v, k_prompt, v_prompt, chosen):
        return prompt_attention(q, k, v, k_prompt, v_prompt, chosen, 0.3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_programs_and_transforms_see_plain_operators():
    """Where the kernels would run: traces, exports and transforms of ``torch.func`` have none; compiled graphs do."""
    tensors, chosen = inputs(2, 1, 7, 5, 16, 1)
    chosen[:, :, 0] = False
    tensors = [t.float().to(DEVICE) for t in tensors]
    args, truth = (*tensors, chosen.to(DEVICE)), reference_prompt_attention(*(t.double() for t in tensors), chosen, 0.3)
    with kernels_on("cpu"):
        traced = torch.jit.trace(Attend(), args)
        assert "vizoo::" not in str(traced.inlined_graph)
        program = torch.export.export(Attend(), args, strict=False)
        assert "vizoo" not in str(program.graph)
        tangents = torch.func.jvp(lambda q: Attend()(q, *args[1:]), (args[0],), (args[0],))
        torch._dynamo.reset()
        compiled = torch.compile(Attend(), backend="aot_eager", fullgraph=True, dynamic=True)(*args)
    for out in (traced(*args), program.module()(*args), tangents[0], compiled):
        op_close(out, truth)


@each_form
def test_no_images(f, device):
    tensors, chosen = inputs(1, 2, 5, 3, 16, 1)
    tensors = [t.float()[:0] for t in tensors[:3]] + [t.float() for t in tensors[3:]]
    tensors = [t.to(device).requires_grad_() for t in tensors]
    out = f(*tensors, chosen[:0].to(device), 0.3)
    assert out.shape == (0, 2, 5, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@each_form
def test_counts_are_those_of_plain_operators(f, device):
    """Of the fused form, forward and backward, so that a model's counts are the same on every device."""
    tensors, chosen = inputs(2, 3, 29, 5, 16, 1)
    found = []
    for form in (lambda *args: module._fused_form(*args, 0.0), f):
        leaves = [t.float().to(device).requires_grad_() for t in tensors]
        with FlopCounterMode(display=False) as counter:
            out = form(*leaves, chosen.to(device), 0.3)
            forward = counter.get_total_flops()
            out.sum().backward()
        found.append((forward, counter.get_total_flops()))
    assert found[0] == found[1]


REFUSED = {
    "dropout": ({"drop": 0.5}, "no dropout"),
    "scale": ({"scale": -1.0}, "positive scales, not -1"),
    "float64": ({"dtype": torch.float64}, r"not torch\.float64"),
    "channels": ({"d": 24}, "not 24"),
    "backend": ({"backend": "natten"}, "backend='natten'"),
}


@needs_triton
@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(change, match):
    settings = {"scale": 0.3, "drop": 0.0, "backend": "triton", "dtype": torch.float32, "d": 16, **change}
    tensors, chosen = inputs(1, 1, 3, 2, settings.pop("d"), 1)
    dtype = settings.pop("dtype")
    with pytest.raises(ValueError, match=match):
        prompt_attention(*(t.to(DEVICE, dtype) for t in tensors), chosen.to(DEVICE), **settings)
