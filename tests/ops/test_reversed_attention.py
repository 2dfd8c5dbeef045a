import itertools

import pytest
import torch
from golden import image, load
from tolerance import golden_close, op_close
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import _reversed_attention_kernels as kernels
from vizoo.backbones.ops import reversed_attention as module
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.reversed_attention import (
    dependency_mask,
    reference_reversed_attention,
    reversed_attention,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
INTERPRETED_FP32 = pytest.param(  # float32 is theirs in the interpreter only, where it shows the smallest errors
    torch.float32, marks=pytest.mark.skipif(DEVICE == "cuda", reason="the row kernels take half precision")
)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
NAMES = ("out", "dq", "dk", "dv", "d_weight")
CASES = [(1, 2, 1, 3), (2, 3, 37, 16), (1, 2, 61, 12), (1, 1, 131, 33), (2, 1, 16, 32)]  # B, h, N, d
ROWS = [(1, 2, 1, 3), (2, 3, 37, 16), (1, 2, 61, 12), (1, 1, 131, 27), (2, 1, 16, 100)]  # of the row kernels
TILES = [(1, 2, 45, 20), (1, 1, 70, 16), (1, 1, 23, 100)]  # of the tile kernels: partial last tiles both ways
GOLDEN = load("reversed_attention_op")


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, h, N, D):
    generator = torch.Generator().manual_seed(42)
    q, k, v = (torch.randn(B, h, N, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.rand(B, h, N, generator=generator, dtype=torch.float64)


def loop(q, k, v, weight):
    """Every sender shares its weighted value out among the receivers."""
    B, h, N, D = q.shape
    out = torch.zeros_like(v)
    for b, head, i in itertools.product(range(B), range(h), range(N)):
        scores = [float(q[b, head, i] @ k[b, head, j]) * D**-0.5 for j in range(N)]
        shares = torch.tensor(scores, dtype=torch.float64).exp()
        shares = shares / shares.sum()
        for j in range(N):
            out[b, head, j] += shares[j] * weight[b, head, i] * v[b, head, i]
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def through(backend):
    return lambda *tensors: reversed_attention(*tensors, backend=backend)


def check(f, tensors, dtype, device="cpu", against_plain=True):
    """Output and gradients of ``f`` in ``dtype`` against the reference in float64."""
    tensors = [t.to(device, dtype) for t in tensors]
    grad = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = run(reference_reversed_attention, [t.double() for t in tensors], grad.double())
    plain = run(reference_reversed_attention, tensors, grad)
    for i, (a, t, p) in enumerate(zip(run(f, tensors, grad), truth, plain, strict=True)):
        op_close(a, t, p if against_plain else None, grad=i > 0, what=NAMES[i])


@pytest.mark.parametrize("case", [(2, 2, 5, 3), (1, 1, 1, 2), (1, 2, 7, 4)], ids=ids)
@pytest.mark.parametrize("f", [reference_reversed_attention, reversed_attention, through("sdpa")])
def test_is_the_definition(f, case):
    tensors = inputs(*case)
    op_close(f(*tensors), loop(*tensors))
    with torch.no_grad():
        op_close(f(*tensors), loop(*tensors))


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


@pytest.mark.parametrize("f", [reference_reversed_attention, reversed_attention, through("sdpa")])
def test_gradcheck(f):
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs(1, 2, 5, 3)])


@pytest.mark.parametrize("f", [reference_reversed_attention, reversed_attention, through("sdpa")])
def test_second_derivatives(f):
    assert torch.autograd.gradgradcheck(f, [t.requires_grad_() for t in inputs(1, 2, 5, 3)])


def test_second_derivatives_under_autocast():
    """Products keep their dtype in the gradient of the gradient, too."""
    tensors = [t.float().requires_grad_() for t in inputs(1, 2, 5, 3)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(reversed_attention(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), tensors))
    for actual, expected in zip(found[1], found[0], strict=True):
        op_close(actual, expected.double(), grad=True)


@pytest.mark.parametrize("f", [reversed_attention, through("torch"), through("sdpa")])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # PyTorch scripts its own decompositions for jvp
def test_transforms(f):
    """Under ``torch.func`` and in forward mode, with and without gradients, the operator is its plain form."""
    tensors, tangents = inputs(3, 2, 5, 4), tuple(t.flip(0) for t in inputs(3, 2, 5, 4))
    expected, tangent = torch.func.jvp(reference_reversed_attention, tensors, tangents)

    def loss(*one):
        return f(*(t[None] for t in one)).square().sum()

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for actual, wanted in zip(torch.func.jvp(f, tensors, tangents), (expected, tangent), strict=True):
                op_close(actual, wanted)
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
                op_close(forward_ad.unpack_dual(f(*duals)).tangent, tangent)
            op_close(torch.func.vmap(lambda *one: f(*(t[None] for t in one))[0])(*tensors), expected)
            each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*tensors)
            jacobian = torch.func.jacrev(f, argnums=3)(*(t[:1] for t in tensors))
        whole = [t.clone().requires_grad_() for t in tensors]
        for actual, wanted in zip(each, torch.autograd.grad(f(*whole).square().sum(), whole), strict=True):
            op_close(actual, wanted, grad=True)
        rows = torch.einsum("bhndBHN,BHN->bhnd", jacobian, tangents[3][:1])
        op_close(rows, reference_reversed_attention(*(t[:1] for t in tensors[:3]), tangents[3][:1]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_traces_plain_operators(grad):
    tensors = [t.float() for t in inputs(1, 2, 700, 4)]  # more than inference leaves to plain operators
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(reversed_attention, tensors)
    assert "vizoo::" not in str(traced.inlined_graph)
    op_close(traced(*tensors), reference_reversed_attention(*(t.double() for t in tensors)))


@pytest.mark.parametrize("backend", ["auto", "torch", "sdpa"])
def test_no_images(backend):
    tensors = [t[:0].requires_grad_() for t in inputs(1, 2, 5, 3)]
    out = reversed_attention(*tensors, backend=backend)
    assert out.shape == (0, 2, 5, 3)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]
    with torch.no_grad():
        assert reversed_attention(*tensors, backend=backend).shape == (0, 2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "f",
    [
        reference_reversed_attention,
        reversed_attention,
        through("sdpa"),
        pytest.param(through("triton"), marks=needs_triton, id="triton"),
    ],
)
def test_golden(f, dtype, request):
    if "triton" in request.node.callspec.id and dtype == torch.float64:
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            f(*inputs(1, 1, 2, 2))
        return
    shape = GOLDEN.input_shape
    q, k, v, grad = (image(shape, seed).to(DEVICE, dtype) for seed in (0, 1, 2, 4))
    weight = image(shape[:3], 3).to(DEVICE, dtype).sigmoid()
    found = run(f, (q, k, v, weight), grad)
    for name, actual in zip(("out", "dq", "dk", "dv", "dw"), found, strict=True):
        golden_close(actual.cpu(), GOLDEN.outputs[name], name)
    golden_close(f(q, k, v).cpu(), GOLDEN.outputs["out_plain"], "without weights")


@needs_triton
def test_golden_log_sum():
    shape = GOLDEN.input_shape
    q, k, v = (image(shape, seed).to(DEVICE) for seed in (0, 1, 2))
    lse = torch.ops.vizoo.reversed_attention(q, k, v, shape[3] ** -0.5, "triton")[1]
    golden_close(lse.cpu(), GOLDEN.outputs["lse"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_blocks(case, dtype):
    check(through("torch"), inputs(*case), dtype)


@pytest.mark.parametrize("scores", [16, 400, 9000], ids=lambda n: f"scores{n}")
def test_any_block(scores, monkeypatch):
    """One head at a time, a few senders at a time, several heads at once: the block changes nothing."""
    monkeypatch.setattr(module, "BLOCK_SCORES", scores)
    assert module._blocks(6, 37) == {16: (1, 16), 400: (1, 16), 9000: (6, 37)}[scores]
    check(through("torch"), inputs(2, 3, 37, 5), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_sdpa(case, dtype):
    check(through("sdpa"), inputs(*case), dtype, against_plain=dtype != torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_eager_inference(dtype):
    tensors = [t.to(dtype) for t in inputs(2, 3, 37, 16)]
    with torch.no_grad():
        assert module._choose("auto", tensors[0], tensors[2]) == "eager"
        op_close(reversed_attention(*tensors), reference_reversed_attention(*(t.double() for t in tensors)))


@needs_triton
@pytest.mark.parametrize("dtype", [INTERPRETED_FP32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", ROWS, ids=ids)
def test_row_kernels(case, dtype, monkeypatch):
    assert kernels._rows(inputs(*case)[0].half())
    monkeypatch.setattr(kernels, "_rows", lambda q: True)
    check(through("triton"), inputs(*case), dtype, DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", TILES, ids=ids)
def test_tile_kernels(case, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "ROW_TOKENS", 0)
    assert not kernels._rows(inputs(*case)[0].half())
    check(through("triton"), inputs(*case), dtype, DEVICE)


@needs_triton
def test_tile_kernels_without_tensor_cores(monkeypatch):
    monkeypatch.setattr(kernels, "product_precision", lambda device: "ieee")
    check(through("triton"), inputs(*TILES[0]), torch.float32, DEVICE)


def test_row_kernels_end_where_a_head_no_longer_fits():
    for N, D, rows in [(256, 32, True), (257, 8, False), (256, 33, False), (128, 64, True), (16, 128, True)]:
        assert kernels._rows(torch.empty(1, 1, N, D, dtype=torch.bfloat16)) is rows
        assert not kernels._rows(torch.empty(1, 1, N, D))


@needs_triton
@pytest.mark.parametrize("limit", [256, 0], ids=["rows", "tiles"])
@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e3])
def test_tiny_and_large_float16_gradients(size, limit, monkeypatch):
    """Of the output; those of the scores, a small part of it, would be 0 or infinite in float16."""
    monkeypatch.setattr(kernels, "ROW_TOKENS", limit)
    q, k, v, _ = (t.half().to(DEVICE) for t in inputs(1, 2, 37, 16))
    q, k = q * 0.25, k * 4  # so that the gradient of q can be held in float16
    out, lse = torch.ops.vizoo.reversed_attention(q, k, v, 0.25, "triton")
    grad = (torch.sign(out.float()) * size).half()
    unit = (grad.double() / grad.abs().max().double()).cpu()
    truth = run(lambda *t: reference_reversed_attention(*t, None, 0.25), [t.double().cpu() for t in (q, k, v)], unit)
    found = torch.ops.vizoo.reversed_attention_backward(grad, q, k, v, lse, 0.25, "triton")
    scale = grad.abs().max().double().cpu()
    for actual, expected, name in zip(found, truth[1:], NAMES[1:4], strict=True):
        step = 2.0**-24  # of float16 near 0
        wanted = expected * scale
        error = (actual.double().cpu() - wanted).abs()
        assert (error <= 2e-3 * wanted.abs().max() + step / 2).all(), name


@needs_triton
@pytest.mark.parametrize("rows", [pytest.param(True, marks=INTERPRETED_FP32.marks), False], ids=["rows", "tiles"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: of receivers that are not stored
def test_scores_far_below_zero(rows, monkeypatch):
    """What stands for receivers past the last must not be larger than any number."""
    monkeypatch.setattr(kernels, "_rows", lambda q: rows)
    q, k, v, weight = inputs(1, 1, 21, 16)
    tensors = [t.float().to(DEVICE) for t in (q + 5, k - 5, v, weight)]
    truth = run(reference_reversed_attention, [t.double() for t in tensors], tensors[2].double())
    for actual, expected in zip(run(through("triton"), tensors, tensors[2]), truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@needs_triton
@pytest.mark.parametrize("limit", [256, 0], ids=["rows", "tiles"])
def test_precision_of_products_reaches_the_kernels(limit, monkeypatch):
    monkeypatch.setattr(kernels, "ROW_TOKENS", limit)
    monkeypatch.setattr(kernels, "product_precision", lambda device: "tf32")
    found = launches(monkeypatch)
    q, k, v, weight = (t.half().to(DEVICE) for t in inputs(1, 2, 21, 16))
    run(through("triton"), (q, k, v, weight), v)
    assert len(found) == (2 if limit else 4)
    assert {x["PRECISION"] for x in found} == {"tf32"}


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_every_size_has_tiles(precision, monkeypatch):
    monkeypatch.setattr(kernels, "product_precision", lambda device: precision)
    for dtype, D in itertools.product((torch.float32, torch.float16), range(1, module.MAX_HEAD_SIZE + 1)):
        q = torch.empty(1, 1, 1, D, dtype=dtype)
        for rows in {False, kernels._rows(q)}:
            tile = kernels._tile(q, rows)
            assert min(tile.senders, tile.receivers or 16) >= 16


@needs_triton
def test_wide_offsets_only_where_an_image_needs_them(monkeypatch):
    found = launches(monkeypatch, run=False)
    for tokens, bits in [(2**10, 32), (2**27, 64)]:
        q = torch.empty(2, 1, tokens, 16, dtype=torch.float16, device="meta")
        kernels.kernel_forward(q, q, q, 1.0)
        kernels.kernel_backward(q, q, q, q, q[..., 0].float(), 1.0)
        assert {x["INDEX"].primitive_bitwidth for x in found} == {bits}
        found.clear()


def test_routes_agree():
    tensors = inputs(1, 3, 29, 8)
    expected = reference_reversed_attention(*tensors)
    for backend in ("torch", "sdpa"):
        op_close(reversed_attention(*tensors, backend=backend), expected)
    with torch.no_grad():
        op_close(reversed_attention(*tensors), expected)
    mask = dependency_mask(*tensors[:2], tensors[3])
    values = tensors[2][:, :1].expand(-1, 3, -1, -1)  # equal values in every head: the mask is the whole operator
    op_close(mask @ values[:, 0], reversed_attention(*tensors[:2], values, tensors[3]).sum(1))


def test_scale():
    q, k, v, weight = inputs(1, 2, 9, 4)
    op_close(reversed_attention(q, k, v, weight, scale=0.3), reference_reversed_attention(q * 0.6, k, v, weight))
    with torch.no_grad():
        op_close(reversed_attention(q, k, v, weight, 0.3), reference_reversed_attention(q * 0.6, k, v, weight))


@pytest.mark.parametrize("backend", ["torch", "sdpa", pytest.param("triton", marks=needs_triton)])
def test_permuted_tokens_permute_the_output(backend):
    tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 21, 8)]
    order = torch.randperm(21, device=DEVICE)
    out = reversed_attention(*tensors, backend=backend)
    permuted = reversed_attention(*(t[:, :, order] for t in tensors), backend=backend)
    op_close(permuted, out[:, :, order].double())


def test_mask_columns_sum_to_the_weights():
    q, k, _, weight = inputs(2, 3, 31, 8)
    mask = dependency_mask(q.float(), k.float(), weight.float())
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask.sum(1).double(), weight.sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "sdpa", pytest.param("triton", marks=needs_triton)])
def test_inputs_need_not_be_contiguous(backend):
    B, h, N, D = 2, 3, 11, 8
    qkv = torch.randn(B, N, 3, h, D, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weight = torch.rand(B, N, h, dtype=torch.float64).transpose(1, 2)
    check(through(backend), (q, k, v, weight), torch.float32, DEVICE)
    check(through(backend), (q.mT.contiguous().mT, k, v.flip(2), weight), torch.float32, DEVICE)


@pytest.mark.parametrize("form", ["blocks", "sdpa", pytest.param("triton", marks=needs_triton)])
def test_opcheck(form):
    q, k, u = (t.float().to(DEVICE).requires_grad_() for t in inputs(2, 3, 7, 4)[:3])
    torch.library.opcheck(torch.ops.vizoo.reversed_attention.default, (q, k, u, 0.5, form))
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(
        torch.ops.vizoo.reversed_attention.default, (strided, k.detach(), u.detach()[..., ::1], 0.5, form)
    )
    _, lse = torch.ops.vizoo.reversed_attention(q, k, u, 0.5, form)
    arguments = (torch.randn_like(u), strided, k.detach(), u.detach(), lse.detach(), 0.5, form)
    torch.library.opcheck(torch.ops.vizoo.reversed_attention_backward.default, arguments, test_utils="test_schema")
    torch.library.opcheck(torch.ops.vizoo.reversed_attention_backward.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_counts_are_those_of_the_definition(backend, device):
    """2 FLOPs for each of ``2 B h N^2 d`` multiply-accumulates, twice that backward, on every path."""
    B, h, N, D = 2, 3, 29, 5
    macs = 2 * B * h * N * N * D
    for f in (reference_reversed_attention, through(backend)):
        tensors = [t.float().to(device).requires_grad_() for t in inputs(B, h, N, D)]
        with FlopCounterMode(display=False) as counter:
            out = f(*tensors)
            assert counter.get_total_flops() == 2 * macs
            out.sum().backward()
        assert counter.get_total_flops() == 6 * macs
    shape = tuple(tensors[0].shape)
    cost = COSTS["vizoo::reversed_attention"](shape, shape, shape, 0.5, "triton", out=shape)
    assert (cost.macs, cost.acts) == (macs, B * h * N * (N + D))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().size() // t.element_size())
        return out


def test_memory_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SCORES", 2**13)
    B, h, N, D = 1, 2, 400, 8
    q, k, u = (t.float() for t in inputs(B, h, N, D)[:3])
    for f, arguments in ((module._blocks_forward, (q, k, u)), (module._blocks_backward, (u, q, k, u))):
        with Largest() as largest:
            f(*arguments, 0.5)
        assert largest.elements <= 2**13  # a matrix of one head has 160,000
    with Largest() as largest:
        reference_reversed_attention(q, k, u)
    assert largest.elements == B * h * N * N  # so the measurement sees what it should


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", [reference_reversed_attention, reversed_attention])
def test_scripts(f):
    scripted = torch.jit.script(f)
    check(scripted, inputs(1, 2, 13, 6), torch.float32)
    q, k, v, _ = inputs(1, 2, 13, 6)
    op_close(scripted(q, k, v), reference_reversed_attention(q, k, v))


class Attend(torch.nn.Module):
    def forward(self, q, k, v, weight):
        return reversed_attention(q, k, v, weight)


@pytest.mark.parametrize("grad", [True, False], ids=["train", "eval"])
def test_compiles_without_a_break(grad):
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), backend="aot_eager", fullgraph=True)
    tensors = inputs(2, 2, 23, 6)
    if grad:
        check(compiled, tensors, torch.float32)
    else:
        with torch.no_grad():
            op_close(compiled(*tensors), reference_reversed_attention(*tensors))


def test_exports_plain_operators():
    tensors = [t.float() for t in inputs(2, 2, 13, 6)]
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Attend(), tuple(tensors), dynamic_shapes=({0: batch},) * 4, strict=False)
    assert "vizoo" not in str(program.graph)
    op_close(program.module()(*tensors), reference_reversed_attention(*(t.double() for t in tensors)))
    assert program.module()(*(t[:1].expand(3, *t.shape[1:]) for t in tensors)).shape[0] == 3


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_autocast_keeps_the_dtype_of_v(backend):
    q, k, v, weight = inputs(1, 2, 13, 8)
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(
                lambda q, k, v, w: reversed_attention(q.float(), k, v, w.float(), None, backend),
                (q, k, v, weight),
                dtype,
            )
            assert reference_reversed_attention(q.float(), k.float(), v.to(dtype), weight).dtype == dtype
            with torch.no_grad():
                assert reversed_attention(q.bfloat16(), k.bfloat16(), v.to(dtype), weight).dtype == dtype


@pytest.mark.parametrize("backend", ["torch", "sdpa", pytest.param("triton", marks=needs_triton)])
def test_inference_mode(backend):
    with torch.inference_mode():
        tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 13, 8)]
        out = reversed_attention(*tensors, backend=backend)
        op_close(out, reference_reversed_attention(*(t.double() for t in tensors)))


def test_chooses_by_size_and_mode():
    small, large = torch.empty(1, 12, 196, 16), torch.empty(1, 12, 400, 16)
    assert module._choose("auto", small, small) == "blocks"  # autograd may need the operator
    with torch.no_grad():
        assert [module._choose("auto", t, t) for t in (small, large)] == ["eager", "blocks"]
        assert module._choose("sdpa", small, small) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("N", [196, 700])
def test_gradients_are_deterministic(N):
    tensors = [t.half().cuda() for t in inputs(2, 4, N, 16)]
    first, second = (run(through("triton"), tensors, tensors[2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("f", [reference_reversed_attention, reversed_attention])
def test_rejects_shapes(f):
    q, k, v, weight = inputs(1, 2, 5, 3)
    with pytest.raises(ValueError, match=r"got q \[2, 5, 3\], .* need one shape \[B, h, N, d\]"):
        f(q[0], k, v)
    with pytest.raises(ValueError, match=r"k \[1, 2, 4, 3\], v \[1, 2, 5, 3\], need one shape"):
        f(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match=r"got weight \[1, 2, 4\], need \[B, h, N\] = \[1, 2, 5\]"):
        f(q, k, v, weight[..., 1:])
    with pytest.raises(ValueError, match=r"got q \[1, 2, 0, 3\], need at least one token"):
        f(q[:, :, :0], k[:, :, :0], v[:, :, :0])


def test_rejects_backends(monkeypatch):
    q, k, v, weight = inputs(1, 1, 3, 2)
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch', 'sdpa' or 'triton'"):
        reversed_attention(q, k, v, weight, backend="natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but the kernels take .*not torch.float64"):
        reversed_attention(q, k, v, weight, backend="triton")
    wide = torch.zeros(1, 1, 3, 129)
    with pytest.raises(ValueError, match="up to 128 channels per head, not 129"):
        reversed_attention(wide, wide, wide, backend="triton")
    monkeypatch.setattr("vizoo.backbones.ops.backend.HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        reversed_attention(wide[..., :9], wide[..., :9], wide[..., :9], backend="triton")
