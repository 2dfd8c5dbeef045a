import itertools

import pytest
import torch
from tolerance import close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.layers.contmix import BRANCHES, DilatedReparamBlock
from vizoo.backbones.ops import _depthwise_kernels as kernels
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.depthwise import depthwise_conv, reference_depthwise_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
NAMES = ("out", "dx", "dweight", "dbias")
# B, C, H, W, K, dilation: tiles of 16 and 32 whole columns, and with 8 or 16 columns around
CASES = [
    (3, 5, 7, 7, 7, 1),
    (2, 2, 14, 14, 13, 1),
    (2, 2, 9, 11, 9, 2),  # a kernel larger than the map
    (1, 2, 20, 33, 17, 1),  # a last tile of one column
    (1, 2, 5, 40, 5, 3),  # dilated rows apart, some phases shorter
    (1, 1, 3, 36, 31, 1),  # the largest kernel
    (1, 1, 1, 1, 5, 1),
    (2, 1, 2, 20, 3, 15),  # the largest dilation: more phases than rows
    (0, 2, 5, 7, 7, 1),
]


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, C, H, W, K, dilation):
    generator = torch.Generator().manual_seed(42)
    shapes = (B, C, H, W), (C, 1, K, K), (C,)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def loop(x, weight, bias, dilation):
    """Every output by itself, over the taps that are on the map."""
    (B, C, H, W), K = x.shape, weight.shape[2]
    out = bias.reshape(1, C, 1, 1).repeat(B, 1, H, W)
    for y, u, i, j in itertools.product(range(H), range(W), range(K), range(K)):
        v, w = y + dilation * (i - K // 2), u + dilation * (j - K // 2)
        if 0 <= v < H and 0 <= w < W:
            out[:, :, y, u] += weight[:, 0, i, j] * x[:, :, v, w]
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, case, dtype, change=lambda x: x):
    """Output and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    dilation = case[-1]
    tensors = [t.to(DEVICE, dtype) for t in inputs(*case)]
    grad = change(torch.randn(case[:4], generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype))

    def reference(*t):
        return reference_depthwise_conv(*t, dilation)

    truth = run(reference, [t.double() for t in tensors], grad.double())
    plain = run(reference, tensors, grad)
    found = run(lambda x, *t: f(change(x), *t, dilation), tensors, grad)
    for name, a, t, p in zip(NAMES, found, truth, plain, strict=True):
        if t.numel() > 0:
            op_close(a, t, p, grad=name != "out", what=name)
        else:
            assert a.shape == t.shape, name


def triton_form(x, weight, bias=None, dilation=1):
    return depthwise_conv(x, weight, bias, dilation, "triton")


@pytest.mark.parametrize("case", [CASES[0], CASES[2], (1, 2, 5, 3, 3, 4)], ids=ids)
def test_is_the_definition(case):
    op_close(reference_depthwise_conv(*inputs(*case), case[-1]), loop(*inputs(*case), case[-1]))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "part of channels last": lambda x: channels_last(torch.cat([x, x], 1))[:, : x.shape[1]],
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


# for training on a CPU


def cpu_form(x, weight, bias=None, dilation=1):
    return torch.ops.vizoo.depthwise_conv(x, weight, bias, dilation, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*CASES, (3, 8, 11, 13, 3, 7), (1, 8, 14, 14, 7, 2), (2, 8, 7, 5, 3, 1)], ids=ids)
def test_cpu_form(case, dtype, layout):
    """Dilations that are and that are not shorter than the map, and divide its sides or do not."""
    check(cpu_form, case, dtype, LAYOUTS[layout])


@pytest.mark.parametrize("case", [(2, 2, 5, 6, 5, 1), (2, 2, 5, 7, 3, 5)], ids=ids)
def test_gradients_of_the_cpu_form(case):
    tensors = [t.requires_grad_() for t in inputs(*case)]
    assert torch.autograd.gradcheck(lambda *t: cpu_form(*t, case[-1]), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: cpu_form(*t, case[-1]), tensors)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's choice")
def test_cpus_train_in_their_own_form():
    """In float32; what it is no gain for runs as PyTorch's convolution, to the last bit."""
    x, weight, bias = (t.float().requires_grad_() for t in inputs(*CASES[0]))
    assert "vizoo" in type(depthwise_conv(x, weight, bias).grad_fn).__name__
    half = [t.bfloat16() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "Convolution" in type(depthwise_conv(x, weight, bias).grad_fn).__name__
    for tensors, f in (([x, weight[..., :3, :3], bias], depthwise_conv), (half, depthwise_conv)):
        out = f(*tensors)
        assert torch.equal(out, torch.nn.functional.conv2d(*tensors, padding=tensors[1].shape[2] // 2, groups=5))
        assert "Convolution" in type(out.grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(depthwise_conv(x, weight, bias), reference_depthwise_conv(x, weight, bias))


@pytest.mark.parametrize("layout", ["contiguous", "part of channels last"])
def test_the_cpu_form_keeps_the_memory_format(layout):
    x, weight, bias = (t.float().to(DEVICE) for t in inputs(2, 4, 6, 5, 3, 5))
    torch.library.opcheck(torch.ops.vizoo.depthwise_conv.default, (LAYOUTS[layout](x), weight, bias, 5, False))
    for needed in ((True, False), (False, True)):
        arguments = (LAYOUTS[layout](torch.randn_like(x)), LAYOUTS[layout](x), weight, 5, *needed, False)
        torch.library.opcheck(torch.ops.vizoo.depthwise_conv_backward.default, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's choice")
def test_the_cpu_form_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv, backend="aot_eager", fullgraph=True, dynamic=True)
    for case in ((2, 1, 3, 4, 5, 1), (1, 2, 4, 9, 7, 2)):
        check(compiled, case, torch.float32, channels_last)


# the kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_kernels(case, dtype):
    check(triton_form, case, dtype)


@needs_triton
@pytest.mark.parametrize("kernel_size", [5, 9, 11, 15])
def test_kernels_take_any_size(kernel_size):
    check(triton_form, (1, 2, 4, 12, kernel_size, 1), torch.float32)


@needs_triton
@pytest.mark.parametrize("layout", ["channels last", "part", "strided", "transposed"])
def test_inputs_need_not_be_contiguous(layout):
    """Channels-last maps in float32 are copied, a part of the channels is read in place."""
    check(triton_form, (2, 3, 4, 6, 5, 1), torch.float32, LAYOUTS[layout])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize(
    "case", [(2, 8, 3, 5, 7, 1), (1, 16, 2, 19, 3, 1), (1, 8, 4, 33, 3, 5), (1, 8, 2, 36, 3, 9)], ids=ids
)
def test_kernels_read_eight_channels(case, dtype):
    check(triton_form, case, dtype, channels_last)


@needs_triton
def test_memory_format_is_kept():
    """Also that of a part of the channels, read in place, and whatever that of the output's gradient is."""
    x, weight, _ = (t.half().to(DEVICE) for t in inputs(2, 16, 3, 2, 3, 1))
    weight.requires_grad_()
    out = triton_form(channels_last(x)[:, 8:], weight[8:])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, triton_form(channels_last(x[:, 8:]), weight[8:]))
    grad = torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    first, second = (torch.autograd.grad(out, weight, g, retain_graph=True)[0] for g in (grad, channels_last(grad)))
    assert torch.equal(first, second)


@needs_triton
def test_partial_blocks_of_images():
    """More images than a program takes, and sums over them in several parts."""
    check(triton_form, (67, 1, 3, 17, 3, 2), torch.float32)


@needs_triton
@pytest.mark.parametrize("size", [1e-6, 1e-7])
def test_small_gradients_do_not_vanish_in_float16(size):
    """The kernel's gradient is float32 under autocast; it is made of the output's as it is."""
    x, weight, bias = (t.to(DEVICE) for t in inputs(*CASES[0]))
    x, weight, bias = x.half(), weight.float(), bias.float()
    grad = (size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).to(DEVICE, torch.float16)
    found = run(triton_form, (x, weight, bias), grad)
    truth = run(reference_depthwise_conv, [t.double() for t in (x, weight, bias)], grad.double())
    for name, a, t in list(zip(NAMES, found, truth, strict=True))[2:]:
        assert a.dtype == torch.float32
        close(a.double() / size, t / size, "gradient", name)


def launch(x, kernel="forward", kernel_size=13, last=False):
    return kernels._Launch(kernel, x, x, kernel_size, 1, last)


@needs_triton
@pytest.mark.parametrize(("setting", "precision"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "tf32x3")])
def test_kernels_follow_the_precision_of_matrix_products(setting, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert launch(torch.empty(1, 2, 3, 4, device="meta")).arguments["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@needs_triton
def test_kernels_index_large_images_in_64_bits():
    """Those that a program meets together; how many there are in all does not matter."""
    import triton.language as tl

    assert launch(torch.empty(1 << 20, 256, 16, 16, device="meta")).arguments["INDEX"] == tl.int32
    assert launch(torch.empty(1 << 20, 1 << 17, 16, 16, device="meta")).arguments["INDEX"] == tl.int64


@needs_triton
@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)])
@pytest.mark.parametrize("kernel_size", [3, 17, 19, 31])
def test_every_width_has_a_tile(dtype, last, kernel_size):
    """Which reads as far as its kernel reaches."""
    for kernel, W in itertools.product(("forward", "weight"), (1, 7, 16, 17, 32, 33, 304)):
        found = launch(torch.empty(2, 8, 5, W, dtype=dtype, device="meta"), kernel, kernel_size, last)
        read, written, left = (found.columns[name] for name in ("READ", "WRITTEN", "LEFT"))
        assert found.arguments["tiles"] * written >= W
        assert (left == 0 and written >= W) or left >= kernel_size // 2 <= read - left - written


@needs_triton
@pytest.mark.gpu
def test_gradients_are_deterministic():
    tensors = [t.float().cuda() for t in inputs(64, 32, 56, 56, 17, 1)]
    grad = torch.randn(64, 32, 56, 56, device="cuda")
    first, second = (run(triton_form, tensors, grad) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


# dtypes, derivatives, costs


@needs_triton
def test_autocast_computes_in_its_dtype():
    """As a convolution does, and gradients have the dtypes of what they belong to."""
    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in inputs(*CASES[0]))
    with torch.autocast(DEVICE, dtype=torch.float16):
        out, plain = triton_form(x, weight, bias), reference_depthwise_conv(x, weight, bias)
    assert out.dtype == plain.dtype == torch.float16
    op_close(out, reference_depthwise_conv(*(t.double() for t in (x, weight, bias))), plain)
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


@needs_triton
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_is_needed(needed):
    x, weight, _ = (t.float().to(DEVICE) for t in inputs(*CASES[6]))
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    triton_form(x, weight).sum().backward()
    assert tuple(t.grad is not None for t in (x, weight)) == needed


@needs_triton
def test_second_derivatives():
    tensors = [t.to(DEVICE, torch.float32) for t in inputs(2, 2, 4, 5, 5, 1)]

    def second(f, kind):
        leaves = [t.to(kind).requires_grad_() for t in tensors]
        first = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    pairs = zip(second(triton_form, torch.float32), second(reference_depthwise_conv, torch.float64), strict=True)
    for name, (a, t) in zip(NAMES[1:], pairs, strict=True):
        op_close(a, t, grad=True, what=name)


@needs_triton
def test_opcheck():
    """Small: each call runs a dozen times."""
    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in inputs(1, 2, 2, 3, 3, 1))
    torch.library.opcheck(torch.ops.vizoo.depthwise_conv.default, (x, weight, bias, 2, True))
    x, weight = channels_last(x.detach()), weight.detach().half()
    for needed in ((True, False), (False, True)):
        arguments = (torch.randn_like(x), x, weight, 1, *needed, True)
        torch.library.opcheck(torch.ops.vizoo.depthwise_conv_backward.default, arguments)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_counts_are_those_of_a_convolution(backend):
    B, C, H, W, K, dilation = case = CASES[4]
    macs = B * C * H * W * K * K
    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in inputs(*case))
    with FlopCounterMode(display=False) as counter:
        out = depthwise_conv(x, weight, bias, dilation, backend)
        assert counter.get_total_flops() == 2 * macs
        if backend == "triton":  # PyTorch's own formula forgets the groups
            out.sum().backward()
            assert counter.get_total_flops() == 6 * macs
    cost = COSTS["vizoo::depthwise_conv"](case[:4], (C, 1, K, K), (C,), dilation, True, out=case[:4])
    plain = COSTS["aten::convolution_backward"](
        case[:4], case[:4], (C, 1, K, K), (C,), 1, 0, dilation, False, 0, C, (True, True, False)
    )
    both = COSTS["vizoo::depthwise_conv_backward"](case[:4], case[:4], (C, 1, K, K), dilation, True, True, True)
    assert (cost.macs, both.macs) == (macs, plain.macs)


# programs


@needs_triton
def test_compiles_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(triton_form, backend="aot_eager", fullgraph=True, dynamic=True)
    for case in ((2, 1, 3, 4, 5, 1), (1, 2, 4, 9, 7, 1)):
        check(compiled, case, torch.float32)


def test_exports_and_transforms_see_a_convolution():
    x, weight, bias = (t.float() for t in inputs(*CASES[0]))
    with kernels_on("cpu"):

        class Model(torch.nn.Module):
            def forward(self, x):
                return depthwise_conv(x, weight, bias)

        program = torch.export.export(Model(), (x,), strict=False)
        assert "vizoo" not in str(program.graph)
        close(program.module()(x), Model()(x), "graph")
        found = torch.func.vmap(lambda x: depthwise_conv(x, weight, bias))(torch.stack([x, x]))
        close(found[1], reference_depthwise_conv(x, weight, bias), "rerun")


def functions(out):
    """Names of all functions that a gradient passes."""
    nodes, names = [out.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names[node] = type(node).__name__
            nodes += [n for n, _ in node.next_functions]
    return list(names.values())


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's choice")
def test_reparam_block_trains_on_a_cpu():
    """As in float64, and by the convolutions themselves where they are watched."""
    torch.manual_seed(0)
    block = DilatedReparamBlock(8, 9)
    x = channels_last(torch.randn(2, 8, 7, 9))
    wanted = [p for p in block.parameters() if p.dim() == 4]

    def outcome(block, x):
        x = x.clone().requires_grad_()
        out = block(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *wanted], retain_graph=True)

    found = outcome(block, x)
    assert sum("vizoo_depthwise" in name for name in functions(found[0])) == 1 + len(BRANCHES[9])
    with block.lk_origin.register_forward_hook(lambda *a: None):
        watched = outcome(block, x)
    assert sum("vizoo_depthwise" in name for name in functions(watched[0])) == len(BRANCHES[9])
    wanted = [p for p in block.double().parameters() if p.dim() == 4]
    for pair in (found, watched):
        for a, truth in zip(pair, outcome(block, x.double()), strict=True):
            op_close(a, truth, grad=True)


@needs_triton
@pytest.mark.parametrize("training", [True, False])
def test_reparam_block_on_kernels(training):
    """Kernels for all convolutions but those that cuDNN has, and none for one that is watched."""
    block = DilatedReparamBlock(1, 9).to(DEVICE).train(training)
    x = torch.randn(2, 1, 3, 5, device=DEVICE)
    wanted = [p for p in block.parameters() if p.dim() == 4]

    def outcome():
        out = block(x)
        return out, *torch.autograd.grad(out.square().sum(), wanted, retain_graph=True)

    plain = outcome()
    own = sum(K > 5 or dilation > 1 for K, dilation in ((9, 1), *BRANCHES[9]))
    with kernels_on(DEVICE):
        found = outcome()
        with block.lk_origin.register_forward_hook(lambda *a: None):
            assert sum("vizoo_depthwise" in name for name in functions(block(x))) == own - 1
    assert sum("vizoo_depthwise" in name for name in functions(found[0])) == own
    for a, b in zip(found, plain, strict=True):
        close(a, b, "gradient")


# arguments


@pytest.mark.parametrize("f", [reference_depthwise_conv, depthwise_conv])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 5)}, r"got x \[2, 5, 5\], need \[B, C, H, W\]"),
        ({"weight": torch.zeros(2, 1, 4, 4)}, r"got weight \[2, 1, 4, 4\] for x .*an odd K"),
        ({"weight": torch.zeros(3, 1, 3, 3)}, r"got weight \[3, 1, 3, 3\] for x .*need \[2, 1, K, K\]"),
        ({"weight": torch.zeros(2, 1, 3, 5)}, r"got weight \[2, 1, 3, 5\]"),
        ({"bias": torch.zeros(3)}, r"got bias \[3\], need \[2\]"),
        ({"dilation": 0}, "got dilation=0, need at least 1"),
    ],
)
def test_rejects(f, change, message):
    arguments = {"x": torch.zeros(1, 2, 5, 5), "weight": torch.zeros(2, 1, 3, 3), "bias": None, "dilation": 1}
    with pytest.raises(ValueError, match=message):
        f(**{**arguments, **change})


@pytest.mark.parametrize(
    ("x", "weight", "dilation", "backend", "message"),
    [
        (torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3), 1, "cuda", "got backend='cuda'"),
        (torch.zeros(1, 2, 5, 5).double(), torch.zeros(2, 1, 3, 3), 1, "triton", "not torch.float64"),
        (torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 9, 9), 4, "triton", "up to 15 pixels from the centre, not 16"),
    ],
)
def test_rejects_backends(x, weight, dilation, backend, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(x, weight, None, dilation, backend)
