import functools

import pytest
import torch
from tolerance import op_close

from vizoo.backbones.ops import attention as attention_module
from vizoo.backbones.ops.attention import MAX_BATCH
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.hilo import (
    hifi_attention,
    lofi_attention,
    reference_hifi_attention,
    reference_lofi_attention,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, W, heads, head size, window
HIFI = [(1, 1, 1, 1, 3, 1), (2, 4, 6, 3, 5, 2), (1, 3, 9, 2, 32, 3), (3, 8, 4, 1, 7, 4), (1, 10, 14, 2, 32, 2)]
# B, H, W, pooled H, pooled W, heads, head size
LOFI = [(1, 1, 1, 1, 1, 1, 3), (2, 4, 6, 2, 3, 3, 5), (1, 3, 7, 1, 2, 2, 32), (2, 11, 5, 11, 5, 1, 7)]


def ids(cases):
    return ["-".join(map(str, c)) for c in cases]


def loop_hifi(qkv, heads, s):
    B, H, W, C = qkv.shape
    d = C // 3 // heads
    out = torch.zeros(B, H, W, heads * d, dtype=qkv.dtype)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                y0, x0 = y // s * s, x // s * s
                for n in range(heads):

                    def part(j, yy, xx, b=b, n=n):
                        return qkv[b, yy, xx, (j * heads + n) * d : (j * heads + n + 1) * d]

                    mates = [(yy, xx) for yy in range(y0, y0 + s) for xx in range(x0, x0 + s)]
                    score = torch.stack([part(0, y, x) @ part(1, yy, xx) / d**0.5 for yy, xx in mates])
                    p = score.softmax(0)
                    out[b, y, x, n * d : (n + 1) * d] = sum(
                        w * part(2, yy, xx) for w, (yy, xx) in zip(p, mates, strict=True)
                    )
    return out


def loop_lofi(q, kv, heads):
    B, H, W, C = q.shape
    d = C // heads
    keys = kv.reshape(B, -1, 2 * C)
    out = torch.zeros_like(q)
    for b in range(B):
        for y in range(H):
            for x in range(W):
                for n in range(heads):
                    k = keys[b, :, n * d : (n + 1) * d]
                    v = keys[b, :, C + n * d : C + (n + 1) * d]
                    p = (k @ q[b, y, x, n * d : (n + 1) * d] / d**0.5).softmax(0)
                    out[b, y, x, n * d : (n + 1) * d] = p @ v
    return out


def inputs(*shapes):
    generator = torch.Generator().manual_seed(42)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def check(fast, reference, tensors, dtype):
    """Output and gradients of ``fast`` in ``dtype`` against ``reference`` in float64."""
    truth_in = [t.to(dtype).double().requires_grad_() for t in tensors]
    truth = reference(*truth_in)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(dtype).double()
    truth_grads = torch.autograd.grad(truth, truth_in, grad)
    results = []
    for f in (fast, reference):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        out = f(*x)
        results.append((out, *torch.autograd.grad(out, x, grad.to(dtype))))
    for i, (a, plain, t) in enumerate(zip(*results, (truth, *truth_grads), strict=True)):
        op_close(a.detach(), t.detach(), plain.detach(), grad=i > 0, what=f"tensor {i}")


@pytest.mark.parametrize("case", HIFI, ids=ids(HIFI))
def test_hifi_reference_is_the_definition(case):
    B, H, W, heads, d, s = case
    (qkv,) = inputs((B, H, W, 3 * heads * d))
    op_close(reference_hifi_attention(qkv, heads, s), loop_hifi(qkv, heads, s))


@pytest.mark.parametrize("case", LOFI, ids=ids(LOFI))
def test_lofi_reference_is_the_definition(case):
    B, H, W, hp, wp, heads, d = case
    q, kv = inputs((B, H, W, heads * d), (B, hp, wp, 2 * heads * d))
    op_close(reference_lofi_attention(q, kv, heads), loop_lofi(q, kv, heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HIFI, ids=ids(HIFI))
def test_hifi(case, dtype):
    B, H, W, heads, d, s = case
    check(
        lambda t: hifi_attention(t, heads, s),
        lambda t: reference_hifi_attention(t, heads, s),
        inputs((B, H, W, 3 * heads * d)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOFI, ids=ids(LOFI))
def test_lofi(case, dtype):
    B, H, W, hp, wp, heads, d = case
    check(
        lambda q, kv: lofi_attention(q, kv, heads),
        lambda q, kv: reference_lofi_attention(q, kv, heads),
        inputs((B, H, W, heads * d), (B, hp, wp, 2 * heads * d)),
        dtype,
    )


def test_references_are_differentiable():
    qkv, q, kv = inputs((1, 2, 4, 12), (1, 2, 3, 4), (1, 1, 2, 8))
    for t in (qkv, q, kv):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reference_hifi_attention(t, 2, 2), qkv)
    assert torch.autograd.gradcheck(lambda a, b: reference_lofi_attention(a, b, 2), (q, kv))


def test_inputs_need_not_be_contiguous():
    (wide,) = inputs((2, 4, 24, 6))
    qkv = wide.transpose(2, 3)  # [2, 4, 6, 24]
    op_close(hifi_attention(qkv, 2, 2), loop_hifi(qkv.contiguous(), 2, 2))


def calls(monkeypatch):
    """Shapes of the queries that PyTorch's attention gets from now on."""
    shapes, fused = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, *args, **kwargs):
        shapes.append(tuple(q.shape))
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return shapes


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_many_windows_are_taken_in_parts(compiled, monkeypatch):
    """As on a GPU, whose kernels take so many windows at once, but with a limit of 5: 12 and 10 windows."""
    shapes = calls(monkeypatch)
    monkeypatch.setattr(attention_module, "MAX_BATCH", 5)
    torch._dynamo.reset()
    f = functools.partial(hifi_attention, backend="torch")
    f = torch.compile(f, backend="eager", fullgraph=True, dynamic=True) if compiled else f
    for case, parts in (((2, 4, 6, 18), [5, 5, 2]), ((1, 10, 4, 18), [5, 5]))[: 1 if compiled else 2]:
        shapes.clear()
        with kernels_on("cpu"):
            check(lambda t: f(t, 3, 2), lambda t: reference_hifi_attention(t, 3, 2), inputs(case), torch.float32)
        assert compiled or [n for n, *_ in shapes] == parts
        assert shapes
    shapes.clear()
    hifi_attention(inputs((2, 4, 6, 18))[0], 3, 2)
    assert shapes == [(12, 3, 4, 2)], "a CPU takes them all"


def test_a_batch_of_images_has_more_windows_than_a_gpu_takes(monkeypatch):
    """128 images of 224 pixels in the first stage of LITv2."""
    shapes = calls(monkeypatch)
    qkv = torch.empty(128, 56, 56, 3 * 2 * 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with kernels_on("meta"):
        hifi_attention(qkv, 2, 2, backend="torch").sum().backward()
    assert MAX_BATCH == 65535
    assert shapes == [(65535, 2, 4, 32), (34817, 2, 4, 32)]
    assert qkv.grad.shape == qkv.shape


def triton(qkv, num_heads, window):
    return hifi_attention(qkv, num_heads, window, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", [c for c in HIFI if c[5] in (2, 4)], ids=ids(c for c in HIFI if c[5] in (2, 4)))
def test_kernels(case, dtype):
    B, H, W, heads, d, s = case
    (qkv,) = inputs((B, H, W, 3 * heads * d))
    check(lambda t: triton(t, heads, s), lambda t: reference_hifi_attention(t, heads, s), [qkv.to(DEVICE)], dtype)


@needs_triton
def test_kernels_in_any_layout():
    (wide,) = inputs((2, 4, 24, 6))
    qkv = wide.transpose(2, 3).float().to(DEVICE)  # [2, 4, 6, 24]
    truth = reference_hifi_attention(qkv.double(), 2, 2)
    for layout in (qkv, qkv.contiguous(), qkv.repeat_interleave(2, 1)[:, ::2]):
        op_close(triton(layout, 2, 2), truth)
    empty = qkv[:0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(triton(empty, 2, 2).sum(), empty)
    assert grad.shape == (0, 4, 6, 24)


@needs_triton
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_small_gradients_do_not_vanish_in_float16(size):
    (qkv,) = (t.to(DEVICE, torch.float16) for t in inputs((1, 4, 4, 3 * 2 * 16)))
    dout = torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(1)).mul(size).to(DEVICE, torch.float16)
    found = []
    for f, x in ((triton, qkv.requires_grad_()), (reference_hifi_attention, qkv.detach().double().requires_grad_())):
        found.append(torch.autograd.grad(f(x, 2, 2), x, dout.to(x.dtype))[0])
    rounding = 2.0**-25  # half of float16's smallest number
    error = (found[0].double() - found[1]).abs()
    assert (error <= 2 * rounding + 4e-3 * found[1].abs().amax()).all()
    assert found[1].abs().amax() > 8 * rounding


@needs_triton
@pytest.mark.parametrize(("setting", "precision"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")])
def test_kernels_follow_the_precision_of_matrix_products(setting, precision, monkeypatch):
    from vizoo.backbones.ops import _hilo_kernels as kernels

    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: found.append(arguments["PRECISION"])

    for name in ("hifi_fwd_kernel", "hifi_bwd_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        qkv = torch.empty(1, 4, 4, 48, device="meta")
        kernels.kernel_backward(kernels.kernel_forward(qkv, 1, 2), qkv, 1, 2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == [precision, precision]


@needs_triton
def test_opcheck_and_second_derivatives():
    (qkv,) = (t.float().to(DEVICE).requires_grad_() for t in inputs((1, 2, 4, 12)))
    torch.library.opcheck(torch.ops.vizoo.hifi_attention.default, (qkv, 2, 2))
    arguments = (torch.ones(1, 2, 4, 4, device=DEVICE), qkv.detach(), 2, 2)
    torch.library.opcheck(torch.ops.vizoo.hifi_attention_backward.default, arguments, test_utils="test_schema")
    seconds = []
    for f in (triton, reference_hifi_attention):
        (first,) = torch.autograd.grad(f(qkv, 2, 2).square().sum(), qkv, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), qkv)[0])
    op_close(seconds[0], seconds[1].double(), grad=True)


def test_counts_are_those_of_fused_attention():
    q, qkv = (2 * 6, 3, 4, 5), (2, 4, 6, 45)
    for name, other, arguments in (
        ("hifi_attention", "_scaled_dot_product_efficient_attention", ()),
        ("hifi_attention_backward", "_scaled_dot_product_efficient_attention_backward", (qkv,)),
    ):
        ours = COSTS[f"vizoo::{name}"](*arguments, qkv, 3, 2, out=qkv)
        theirs = COSTS[f"aten::{other}"](*(q for _ in arguments), q, q, q, out=q)
        assert (ours.macs, ours.acts) == (theirs.macs, theirs.acts)


def test_rejects_backends():
    (qkv,) = inputs((1, 4, 4, 12))
    for x, heads, window, message in [
        (qkv, 2, 2, "not torch.float64"),
        (qkv.float(), 2, 1, "windows of 2 and 4, not 1"),
        (torch.zeros(1, 2, 2, 3 * 130), 1, 2, "up to 128 channels per head, not 130"),
    ]:
        with pytest.raises(ValueError, match=f"got backend='triton', but the kernels take .*{message}"):
            triton(x, heads, window)


@pytest.mark.parametrize("f", [hifi_attention, reference_hifi_attention])
def test_hifi_names_the_size_to_pad_to(f):
    with pytest.raises(ValueError, match=r"got a 5x6 map.*window=4.*pad it to 8x8"):
        f(torch.zeros(1, 5, 6, 12), 2, 4)


@pytest.mark.parametrize("f", [lofi_attention, reference_lofi_attention])
def test_lofi_names_the_channels(f):
    with pytest.raises(ValueError, match="got kv with 9 channels, need 2 \\* 4"):
        f(torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, 1, 9), 2)
