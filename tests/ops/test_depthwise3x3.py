import itertools

import pytest
import torch
import torch.nn.functional as F
from graphs import compiled
from tolerance import WORST, close, op_close, rms_ratio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.layers.contmix import residual_conv
from vizoo.backbones.litv2 import ConvFFN
from vizoo.backbones.ops import _depthwise3x3_kernels as kernels
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on, onednn_dtypes, onednn_missing
from vizoo.backbones.ops.cost import flop_formulas
from vizoo.backbones.ops.depthwise3x3 import depthwise3x3, reference_depthwise3x3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
NAMES = ("y", "dx", "dweight", "dbias")
FORMS = list(itertools.product((False, True), repeat=2))  # residual, GELU
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
CASES = [  # B, C, H, W
    (2, 3, 9, 5),  # a partial group of rows
    (1, 1, 1, 1),
    (1, 70, 3, 9),  # two tiles of channels and of columns
    (0, 3, 4, 5),
    (1, 2, 1, 66),
]


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, C, H, W):
    generator = torch.Generator().manual_seed(42)
    shapes = (B, C, H, W), (C, 1, 3, 3), (C,)
    scales = 1, 1 / 3, 1
    return [k * torch.randn(s, generator=generator, dtype=torch.float64) for s, k in zip(shapes, scales, strict=True)]


def channels_last(x, *others):
    return x.contiguous(memory_format=torch.channels_last), *others


def loop(x, weight, bias, residual, gelu):
    B, C, H, W = x.shape
    y = bias.reshape(-1, 1, 1).expand(x.shape).clone()
    for i, j, p, q in itertools.product(range(3), range(3), range(H), range(W)):
        if 0 <= p + i - 1 < H and 0 <= q + j - 1 < W:
            y[:, :, p, q] += weight[:, 0, i, j] * x[:, :, p + i - 1, q + j - 1]
    y = y + x if residual else y
    return y * 0.5 * (1 + torch.erf(y / 2**0.5)) if gelu else y


def triton_form(*args):
    return depthwise3x3(*args, backend="triton")


def run(f, tensors, grad):
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = f(*tensors)
    return y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], grad.to(y.dtype))


def check(f, case, dtype, form, change=lambda *t: t, bias=True, size=1.0):
    """Result and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    tensors = change(*(t.to(DEVICE, dtype) for t in inputs(*case)))
    if not bias:
        tensors = *tensors[:2], None
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).mul(size).to(DEVICE, dtype)

    def reference(*t):
        return reference_depthwise3x3(*t, *form)

    truth = run(reference, [None if t is None else t.double() for t in tensors], grad.double())
    plain = run(reference, tensors, grad)
    found = run(lambda *t: f(*t, *form), tensors, grad)
    for name, a, t, p in zip(NAMES, found, truth, plain, strict=False):
        assert a.shape == t.shape, name
        if t.numel() > 0:
            op_close(a, t, p, grad=name != "y", what=name)


@pytest.mark.parametrize("f", [reference_depthwise3x3, depthwise3x3])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_the_definition(f, form):
    for case in ((2, 3, 4, 5), (1, 2, 1, 1)):
        op_close(f(*inputs(*case), *form), loop(*inputs(*case), *form))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form):
    tensors = [t.requires_grad_() for t in inputs(1, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda *t: depthwise3x3(*t, *form), tensors)


@needs_triton
@LAYOUTS
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_kernels(dtype, form, last):
    check(triton_form, CASES[0], dtype, form, *([channels_last] if last else []))


@needs_triton
@LAYOUTS
@pytest.mark.parametrize(("case", "form"), list(zip(CASES[1:], FORMS, strict=True)), ids=ids)
def test_kernels_on_other_sizes(case, form, last):
    check(triton_form, case, torch.float16, form, *([channels_last] if last else []))


@needs_triton
@LAYOUTS
def test_results_have_the_memory_format_of_the_map(last):
    order = torch.channels_last if last else torch.contiguous_format
    x, *others = (t.float().to(DEVICE) for t in inputs(2, 3, 4, 5))
    x = x.contiguous(memory_format=order).requires_grad_()
    y = triton_form(x, *others, False, True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, memory_format=torch.contiguous_format))
    assert y.is_contiguous(memory_format=order)
    assert dx.is_contiguous(memory_format=order)


@needs_triton
@pytest.mark.parametrize("form", [(False, True), (True, False)], ids=str)
def test_kernels_without_bias(form):
    check(triton_form, (1, 3, 2, 5), torch.float32, form, bias=False)


@needs_triton
@LAYOUTS
@pytest.mark.parametrize("programs", [1, 10**6])
def test_kernels_share_images_or_split_rows(monkeypatch, programs, last):
    """Few programs that go through several images, and many, each with a part of the rows of one."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(triton_form, (3, 2, 15, 3), torch.float32, (False, True), *([channels_last] if last else []))


def rows_apart(x, *others):
    return x.repeat_interleave(2, 2)[:, :, ::2], *others


def transposed(x, weight, bias):
    return x.transpose(1, 2).contiguous().transpose(1, 2), weight, torch.stack([bias, bias], 1)[:, 0]


def columns_apart(x, *others):
    return x.repeat_interleave(2, 3)[..., ::2], *others


@needs_triton
@pytest.mark.parametrize("change", [rows_apart, transposed, columns_apart])
def test_kernels_read_strided_maps(change):
    check(triton_form, (2, 3, 4, 5), torch.float32, (True, True), change)


@needs_triton
def test_gradients_of_a_sum():
    """They have no strides."""
    for change in (lambda *t: t, channels_last):
        tensors = change(*(t.float().to(DEVICE) for t in inputs(2, 3, 4, 5)))
        grad = torch.ones((), device=DEVICE).expand(2, 3, 4, 5)
        found, plain = (run(lambda *t, f=f: f(*t, True, True), tensors, grad) for f in (triton_form, depthwise3x3))
        for name, a, b in zip(NAMES, found, plain, strict=True):
            close(a, b, "gradient", name)


@needs_triton
@pytest.mark.parametrize("form", [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-7])
def test_small_gradients_do_not_vanish_in_float16(size, form):
    """Those of float32 weights are sums of what never was half; that of the map is rounded as PyTorch does it."""
    x, *others = (t.to(DEVICE, torch.float32) for t in inputs(2, 3, 9, 5))
    tensors = x.half(), *others
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).mul(size).to(DEVICE, torch.float16)
    found = run(lambda *t: triton_form(*t, *form), tensors, grad)
    truth = run(lambda *t: reference_depthwise3x3(*t, *form), [t.double() for t in tensors], grad.double())
    plain = run(lambda *t: reference_depthwise3x3(*t, *form), [t.half() for t in tensors], grad)
    assert rms_ratio(found[1], truth[1]) <= WORST * rms_ratio(plain[1], truth[1])
    for name, a, t in list(zip(NAMES, found, truth, strict=True))[2:]:
        assert a.dtype == torch.float32
        close(a.double() / size, t / size, "gradient", name)


@needs_triton
def test_gelu_on_its_whole_range():
    x = torch.cat([torch.linspace(-12, 12, 121), torch.tensor([1e-30, -1e-30, 300.0, -300.0, 1e18, -1e18, 0.5])])
    weight, bias = torch.zeros(1, 1, 3, 3, device=DEVICE), torch.zeros(1, device=DEVICE)
    weight[0, 0, 1, 1] = 1
    x = x.reshape(1, 1, 1, -1).to(DEVICE).requires_grad_()
    y = triton_form(x, weight, bias, False, True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.gelu(wide).sum(), wide)
    close(y.detach().double(), F.gelu(wide).detach(), "rerun")
    close(slope.double()[..., :-1], truth[..., :-1], "rerun")  # that of infinity is NaN in PyTorch
    for value in (torch.inf, torch.nan):
        assert str(
            triton_form(torch.full((1, 1, 1, 1), value, device=DEVICE), weight, bias, False, True).item()
        ) == str(value)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_autocast(form, dtype):
    """The dtype of the plain form: half, and that of the map where a wider one is added.  Gradients have their own."""
    x, *others = (t.float().to(DEVICE) for t in inputs(1, 3, 4, 5))
    tensors = [t.requires_grad_() for t in (x.to(dtype), *others)]
    with torch.autocast(DEVICE, dtype=torch.float16):
        found, plain = triton_form(*tensors, *form), reference_depthwise3x3(*tensors, *form)
    assert found.dtype == plain.dtype
    truth = reference_depthwise3x3(*(t.detach().double() for t in tensors), *form)
    close(found.detach().half().double(), truth, "runtime")
    found.sum().backward()
    assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]


@needs_triton
@pytest.mark.parametrize(("form", "last"), [((False, True), True), ((True, False), False)], ids=str)
def test_opcheck(form, last):
    tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 3, 2)]
    tensors = channels_last(*tensors) if last else tensors
    y = torch.ops.vizoo.depthwise3x3(*tensors, *form)
    torch.library.opcheck(torch.ops.vizoo.depthwise3x3_backward.default, (torch.randn_like(y), *tensors, *form))
    tensors = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.vizoo.depthwise3x3.default, (*tensors[:2], tensors[2] if last else None, *form))


@needs_triton
def test_second_derivatives_and_transforms():
    """Of the plain form, also where kernels give the first ones."""
    tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 3, 4)]

    def penalty(f):
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(f(*leaves, True, True).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for a, b in zip(penalty(triton_form), penalty(reference_depthwise3x3), strict=True):
        close(a, b, "gradient")
    with kernels_on(DEVICE):
        tangents = [
            torch.func.jvp(lambda x, f=f: f(x, *tensors[1:], True, True), (tensors[0],), (tensors[0],))[1]
            for f in (depthwise3x3, reference_depthwise3x3)
        ]
    close(*tangents, "same")


@needs_triton
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_counts_are_those_of_the_plain_form(form):
    counts = []
    for f in (triton_form, reference_depthwise3x3):
        tensors = [t.float().to(DEVICE).requires_grad_() for t in inputs(2, 3, 4, 5)]
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            y = f(*tensors, *form)
            counts.append(counter.get_total_flops())
            y.sum().backward()
            counts.append(counter.get_total_flops())
    assert counts == 2 * [2 * 9 * 120, 3 * 2 * 9 * 120]


def launches(monkeypatch, shape, dtype=torch.bfloat16, gelu=True):
    """Arguments of every launch of one step on a channels-last map."""
    found = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: found.append({**arguments, "grid": grid})

    for name in ("fwd", "bwd"):
        monkeypatch.setattr(kernels, f"_depthwise_{name}_kernel", Recorder())
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(shape[1], 1, 3, 3, device="meta"), torch.empty(shape[1], device="meta")
    kernels.kernel_forward(x, weight, bias, not gelu, gelu)
    kernels.kernel_backward(x, x, weight, bias, not gelu, gelu)
    return found


@needs_triton
def test_kernels_are_compiled_once_for_a_model(monkeypatch):
    """No stage of LITv2 changes a constant of a kernel."""
    constants = [
        [str({k: v for k, v in c.items() if k.isupper() and k not in "BCHW"}) for c in launches(monkeypatch, shape)]
        for shape in ((128, 384, 56, 56), (128, 768, 28, 28), (128, 1536, 14, 14), (128, 3072, 7, 7))
    ]
    assert [len(set(c)) for c in zip(*constants, strict=True)] == [1, 1, 1]


@needs_triton
def test_offsets_are_wide_where_an_image_needs_it(monkeypatch):
    for width, bits in ((64, 32), (1 << 14, 64)):
        calls = launches(monkeypatch, (1, 16, 1 << 13, width))
        assert {c["INDEX"].primitive_bitwidth for c in calls} == {bits}


@needs_triton
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (7, 512, 7, 7), (300, 48, 13, 29), (2, 64, 200, 304)], ids=str)
def test_programs_cover_every_row_and_image_once(monkeypatch, shape):
    B, _, H, _ = shape
    for call in launches(monkeypatch, shape):
        assert call["parts"] * call["span"] >= H > (call["parts"] - 1) * call["span"]
        assert call["grid"][2] * call["images"] >= B > (call["grid"][2] - 1) * call["images"]
        assert call["span"] % call["ROWS"] == 0


class Watch(TorchDispatchMode):
    """Names of the zoo's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vizoo":
            self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize(
    ("build", "shape"), [(lambda: ConvFFN(3, 5), (2, 4, 3, 3)), (lambda: residual_conv(3), (2, 3, 4, 3))]
)
def test_layers(build, shape):
    """On a kernel's device plain layers take it; elsewhere, or with a hook on the convolution, all stays as it is."""
    layer = build().to(DEVICE)
    x = torch.randn(shape, device=DEVICE)
    conv = next(m for m in layer.modules() if isinstance(m, torch.nn.Conv2d))
    with kernels_on(DEVICE), Watch() as watch:
        fast = layer(x)
        fast.square().sum().backward()
    assert watch.names == ["depthwise3x3", "depthwise3x3_backward"]
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    seen = []
    handle = conv.register_forward_hook(lambda *args: seen.append(1))
    with kernels_on(DEVICE), Watch() as watch:
        watched = layer(x)
    assert watch.names == []
    assert seen == [1]
    handle.remove()
    if DEVICE == "cpu":
        close(layer(x), watched, "rerun")
    close(fast, watched, "rerun")
    watched.square().sum().backward()
    for a, p in zip(grads, layer.parameters(), strict=True):
        close(a, p.grad, "gradient")


class Net(torch.nn.Module):
    def forward(self, x, weight, bias):
        return depthwise3x3(depthwise3x3(x, weight, bias, gelu=True), weight, bias, residual=True)


@pytest.mark.skipif(bool(onednn_missing()), reason=f"no oneDNN path: {onednn_missing()}")
@pytest.mark.parametrize("dtype", onednn_dtypes(), ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case[0]], ids=ids)
def test_inference_on_a_cpu(case, bias, dtype):
    """GELU while oneDNN writes, of maps in any layout; compiled, the convolution is an operator of ours."""
    wide, weight, summand = (t.to(dtype) for t in inputs(*case[:3], 2 * case[3]))
    summand = summand if bias else None
    for x in (wide, *channels_last(wide), wide[..., ::2]):
        truth = reference_depthwise3x3(*(None if t is None else t.double() for t in (x, weight, summand)), gelu=True)
        with torch.no_grad(), Watch() as watch:
            op_close(
                depthwise3x3(x, weight, summand, gelu=True),
                truth,
                reference_depthwise3x3(x, weight, summand, gelu=True),
            )
        assert watch.names == []


@pytest.mark.skipif(bool(onednn_missing()), reason=f"no oneDNN path: {onednn_missing()}")
def test_compiled_inference_hides_the_convolution():
    tensors = [t.float() for t in inputs(2, 3, 9, 5)]
    for mode, expected in ((torch.no_grad, ["vizoo.convolution"] * 2), (torch.enable_grad, [])):
        with mode():
            names, out = compiled(Net(), *tensors)
            close(out, Net()(*tensors), "layout")
        assert [name for name in names if "vizoo" in name] == expected


@needs_triton
def test_compiles_kernels_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(triton_form, backend="aot_eager", fullgraph=True)
    check(compiled, (2, 3, 4, 5), torch.float32, (False, True))


def test_programs_hold_plain_operators():
    """Exported for any size, traced and scripted; where kernels would run too."""
    tensors = [t.float().to(DEVICE) for t in inputs(2, 3, 9, 5)]
    small = torch.randn(1, 3, 4, 7, device=DEVICE)
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=1, max=8), 2: dim("height", min=2, max=64), 3: dim("width", min=2, max=64)}
    with kernels_on(DEVICE):
        exported = torch.export.export(Net(), tuple(tensors), dynamic_shapes=(sizes, None, None))
        traced = torch.jit.trace(Net(), tuple(tensors))
    assert "vizoo" not in str(exported.graph)
    assert "vizoo::" not in str(traced.inlined_graph)
    for program in (exported.module(), traced, torch.jit.script(Net())):
        for x in (tensors[0], small):
            close(program(x, *tensors[1:]), Net()(x, *tensors[1:]), "graph")


def test_rejects_backends():
    x, weight = torch.zeros(2, 3, 4, 5), torch.zeros(3, 1, 3, 3)
    with pytest.raises(ValueError, match="got backend='onednn', need 'auto', 'torch' or 'triton'"):
        depthwise3x3(x, weight, backend="onednn")
    with pytest.raises(
        ValueError, match=r"but the kernels take maps .* weights .*, not \[2, 3, 4, 5\], \[2, 1, 3, 3\]"
    ):
        depthwise3x3(x, weight[:2], backend="triton")
    with pytest.raises(ValueError, match=r"but the kernels take one number a channel as bias, not \[4\]"):
        depthwise3x3(x, weight, torch.zeros(4), backend="triton")
    with pytest.raises(ValueError, match=r"got backend='triton', but the kernels take .*, not torch.float64"):
        depthwise3x3(x.double(), weight.double(), backend="triton")
    with pytest.raises(ValueError, match=r"but the kernels take weights in float32 or .*, not torch.float16"):
        depthwise3x3(x, weight.half(), backend="triton")
    with pytest.raises(ValueError, match=r"but the kernels take up to 65535 images and channels, not 65536 and 3"):
        depthwise3x3(x[:1].expand(1 << 16, -1, -1, -1), weight, backend="triton")
