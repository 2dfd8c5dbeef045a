import itertools

import pytest
import torch
from golden import image, load
from tolerance import golden_close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import na2d_av as module
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.na2d_av import matmul_na2d_av, na2d_av, reference_na2d_av

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
# B, G, H, W, C, K, tile of the fast form: none is one product per distinct window, the map's size a single tile
CASES = [
    (1, 1, 3, 3, 1, 3, "windows"),  # one window
    (2, 3, 7, 7, 5, 7, "windows"),
    (1, 2, 13, 14, 10, 13, "windows"),  # two windows
    (1, 2, 14, 15, 3, 11, "map"),
    (1, 2, 16, 15, 14, 13, "windows"),
    (2, 1, 7, 11, 3, 5, "map"),
    (1, 2, 3, 41, 2, 3, "map"),
    (1, 1, 17, 19, 4, 13, "map"),
    (2, 1, 13, 11, 5, 3, "tiles"),  # partial last tiles in both directions
    (1, 2, 29, 7, 3, 7, "tiles"),
    (1, 1, 12, 16, 7, 5, "tiles"),
]
SMALL = [c for c in CASES if c[2] * c[3] * c[5] ** 2 < 15000]  # for the interpreter, which needs 0.1 s per step
GOLDEN = load("overlock_na2d_av")


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, G, H, W, C, K):
    generator = torch.Generator().manual_seed(42)
    attn = torch.randn(B, G, H, W, K * K, generator=generator, dtype=torch.float64).softmax(-1)
    return attn, torch.randn(B, G, H, W, C, generator=generator, dtype=torch.float64)


def start(i, L, K):
    return min(max(i - (K - 1) // 2, 0), L - K)


def loop(attn, value, K):
    B, G, H, W, C = value.shape
    out = torch.zeros_like(value)
    for b, g, i, j, p, r in itertools.product(*map(range, (B, G, H, W, K, K))):
        out[b, g, i, j] += attn[b, g, i, j, p * K + r] * value[b, g, start(i, H, K) + p, start(j, W, K) + r]
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, tensors, K, dtype, device="cpu"):
    """Output and gradients of ``f`` in ``dtype`` against the reference in float64."""
    tensors = [t.to(device, dtype) for t in tensors]
    grad = torch.randn(tensors[1].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = run(lambda a, v: reference_na2d_av(a, v, K), [t.double() for t in tensors], grad.double())
    plain = run(lambda a, v: reference_na2d_av(a, v, K), tensors, grad)
    for i, (a, t, p) in enumerate(zip(run(f, tensors, grad), truth, plain, strict=True)):
        op_close(a, t, p, grad=i > 0, what=("out", "d_attn", "d_value")[i])


@pytest.mark.parametrize("case", [(2, 1, 3, 5, 2, 3), (1, 2, 7, 5, 1, 5), (1, 1, 5, 5, 2, 5)], ids=ids)
@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av, matmul_na2d_av])
def test_is_the_definition(f, case):
    attn, value = inputs(*case)
    op_close(f(attn, value, case[-1]), loop(attn, value, case[-1]))


@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av, matmul_na2d_av])
@pytest.mark.parametrize("case", [(1, 2, 3, 4, 2, 3), (1, 1, 3, 3, 1, 3)], ids=ids)
def test_gradcheck(f, case):
    attn, value = (t.requires_grad_() for t in inputs(*case))
    assert torch.autograd.gradcheck(lambda a, v: f(a, v, case[-1]), (attn, value))


@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av, matmul_na2d_av])
@pytest.mark.parametrize("case", GOLDEN.meta["cases"], ids=lambda c: "{H}x{W}_k{K}".format(**c))
def test_golden(f, case):
    B, G, C, H, W, K = (case[n] for n in "BGCHWK")
    value, attn = image((B, G, H, W, C), seed=1), image((B, G, H, W, K * K), seed=2).softmax(-1)
    out, dattn, dvalue = run(lambda a, v: f(a, v, K), (attn, value), image(value.shape, seed=3))
    s = 1 if attn.numel() < 8000 else 3 if K <= 7 else 7
    for name, actual in {"out": out, "dattn": dattn[:, :1, ::s, ::s], "dvalue": dvalue}.items():
        golden_close(actual, GOLDEN.outputs[f"{name}_{H}x{W}_k{K}"], name)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("f", [na2d_av, matmul_na2d_av])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matrix_products(case, f, dtype):
    *sizes, K, form = case
    H, W = sizes[2:4]
    assert module._tile_size(H, W, K) == {"windows": (0, 0), "map": (H, W), "tiles": (4, 4)}[form]
    check(lambda a, v: f(a, v, K), inputs(*sizes, K), K, dtype)


@pytest.mark.parametrize("tile", [(1, 1), (4, 4), (3, 5), (2, 99)], ids=str)
@pytest.mark.parametrize("size", [(9, 7, 5), (5, 13, 3), (7, 8, 7)], ids=str)
def test_any_tile(size, tile):
    """The tile form and its gradients do not depend on the tile."""
    H, W, K = size
    tile = (min(tile[0], H), min(tile[1], W))
    attn, value = (t.squeeze(0) for t in inputs(1, 2, H, W, 3, K))
    grad = torch.randn(value.shape, dtype=torch.float64)
    truth = run(lambda a, v: reference_na2d_av(a[None], v[None], K)[0], (attn, value), grad)
    found = run(lambda a, v: module._tiles_form(a, v, K, *tile), (attn, value), grad)
    backward = module._tiles_backward(grad, attn, value, K, *tile)
    for a, t in zip((*found, *backward), (*truth, *truth[1:]), strict=True):
        op_close(a, t)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_kernels(case, dtype):
    *sizes, K, _ = case
    check(lambda a, v: na2d_av(a, v, K, backend="triton"), inputs(*sizes, K), K, dtype, DEVICE)


@needs_triton
@pytest.mark.parametrize("C", [1, 17, 33, 64])
def test_kernels_mask_channels(C):
    check(lambda a, v: na2d_av(a, v, 3, backend="triton"), inputs(1, 1, 3, 5, C, 3), 3, torch.float32, DEVICE)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_inputs_need_not_be_contiguous(backend):
    attn, value = inputs(2, 2, 5, 7, 3, 3)
    attn = attn.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    value = value.transpose(2, 3).contiguous().transpose(2, 3)[..., ::2]
    check(lambda a, v: na2d_av(a, v, 3, backend), (attn, value), 3, torch.float32, DEVICE)


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=needs_triton)], ids=["torch", "triton"])
def test_opcheck(triton):
    attn, value = (t.float().to(DEVICE).requires_grad_() for t in inputs(2, 1, 5, 7, 3, 3))
    torch.library.opcheck(torch.ops.vizoo.na2d_av.default, (attn, value, 3, triton))
    strided = attn.detach().transpose(2, 3).contiguous().transpose(2, 3)
    torch.library.opcheck(torch.ops.vizoo.na2d_av.default, (strided, value.detach(), 3, triton))
    grad = torch.randn_like(value)
    torch.library.opcheck(
        torch.ops.vizoo.na2d_av_backward.default, (grad, strided, value.detach(), 3, triton), test_utils="test_schema"
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("size", [(1, 2, 7, 7, 5, 7), (2, 1, 13, 11, 3, 3), (1, 1, 16, 15, 2, 13)], ids=str)
def test_counts_are_those_of_the_definition(size, device):
    """2 FLOPs for each of ``B G H W K^2 C`` multiply-accumulates, twice that backward, on every path."""
    B, G, H, W, C, K = size
    macs = B * G * H * W * K * K * C
    for f in (reference_na2d_av, na2d_av):
        attn, value = (t.float().to(device).requires_grad_() for t in inputs(*size))
        with FlopCounterMode(display=False) as counter:
            out = f(attn, value, K)
            assert counter.get_total_flops() == 2 * macs
            out.sum().backward()
        assert counter.get_total_flops() == 6 * macs
    shapes = tuple(attn.shape), tuple(value.shape)
    assert COSTS["vizoo::na2d_av"](*shapes, K, True, out=shapes[1]).macs == macs


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av])
def test_scripts(f):
    scripted = torch.jit.script(f)
    for H, W, K in [(7, 7, 7), (5, 9, 3), (14, 15, 13), (13, 11, 3)]:
        check(lambda a, v, K=K: scripted(a, v, K), inputs(1, 2, H, W, 3, K), K, torch.float32)


class Sum(torch.nn.Module):
    def forward(self, attn, value):
        return na2d_av(attn, value, 3)


def test_compiles_without_a_break_and_exports_plain_operators():
    attn, value = (t.float() for t in inputs(2, 2, 13, 11, 3, 3))
    expected = na2d_av(attn, value, 3)
    torch._dynamo.reset()
    compiled = torch.compile(Sum(), backend="aot_eager", fullgraph=True)
    check(lambda a, v: compiled(a, v), (attn, value), 3, torch.float32)
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Sum(), (attn, value), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    assert "vizoo" not in str(program.graph)
    assert torch.equal(program.module()(attn, value), expected)
    assert program.module()(attn[:1].expand(3, -1, -1, -1, -1), value[:1].expand(3, -1, -1, -1, -1)).shape[0] == 3


def test_autocast_keeps_the_dtype_of_value():
    attn, value = inputs(1, 1, 5, 7, 3, 3)
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(lambda a, v: na2d_av(a.float(), v, 3), (attn, value), 3, dtype)
            assert reference_na2d_av(attn.float(), value.to(dtype), 3).dtype == dtype


@pytest.mark.gpu
def test_gradients_are_deterministic():
    attn, value = (t.float().cuda() for t in inputs(2, 4, 23, 17, 16, 7))
    first, second = (run(lambda a, v: na2d_av(a, v, 7, "triton"), (attn, value), value) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av])
@pytest.mark.parametrize(
    ("size", "K", "message"),
    [
        ((5, 6), 4, "got kernel_size=4, need an odd number"),
        ((5, 6), 1, "got kernel_size=1, need an odd number of at least 3"),
        ((5, 6), 7, "got kernel_size=7 on a 5x6 map, need at most 5"),
        ((6, 5), 7, "got kernel_size=7 on a 6x5 map, need at most 5"),
    ],
)
def test_rejects_windows(f, size, K, message):
    with pytest.raises(ValueError, match=message):
        f(torch.zeros(1, 1, *size, K * K), torch.zeros(1, 1, *size, 2), K)


@pytest.mark.parametrize("f", [reference_na2d_av, na2d_av])
def test_rejects_shapes(f):
    with pytest.raises(ValueError, match=r"got attn of shape \[1, 1, 5, 6, 8\], need \[1, 1, 5, 6, 9\]"):
        f(torch.zeros(1, 1, 5, 6, 8), torch.zeros(1, 1, 5, 6, 2), 3)
    with pytest.raises(ValueError, match=r"got value of shape \[5, 6, 2\], need \[B, G, H, W, C\]"):
        f(torch.zeros(5, 6, 9), torch.zeros(5, 6, 2), 3)


def test_rejects_backends():
    attn, value = inputs(1, 1, 3, 3, 2, 3)
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch' or 'triton'"):
        na2d_av(attn, value, 3, "natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but the kernels take .*not torch.float64"):
        na2d_av(attn, value, 3, "triton")
    with pytest.raises(ValueError, match="up to 64 channels per group, not 65"):
        na2d_av(attn.float(), torch.zeros(1, 1, 3, 3, 65), 3, "triton")


@pytest.mark.parametrize(
    ("has", "interpreted", "message"),
    [(False, True, "triton is not installed"), (True, False, "the tensors are on cpu, not on a CUDA device")],
)
def test_says_why_no_kernel_runs(monkeypatch, has, interpreted, message):
    from vizoo.backbones.ops import backend

    monkeypatch.setattr(backend, "HAS_TRITON", has)
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    attn, value = (t.float() for t in inputs(1, 1, 3, 3, 2, 3))
    with pytest.raises(ValueError, match=message):
        na2d_av(attn, value, 3, "triton")
    op_close(na2d_av(attn, value, 3), loop(attn, value, 3).double())
