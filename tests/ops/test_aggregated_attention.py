import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import _aggregated_attention_kernels as kernels
from vizoo.backbones.ops import aggregated_attention as module
from vizoo.backbones.ops.aggregated_attention import aggregated_attention, reference_aggregated_attention
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
PARAMETERS = ("query_embedding", "temperature", "local_bias", "pool_bias", "tokens", "token_bias")
NAMES = ("out", *(f"d{name}" for name in ("q", "kv", "pooled_kv", *PARAMETERS)))
# B, H, W, h, d, P, K
CASES = [
    (1, 1, 1, 1, 2, 1, 1),
    (2, 3, 5, 2, 4, 3, 3),
    (1, 5, 2, 3, 3, 1, 5),  # a window larger than the map on one axis
    (1, 2, 3, 1, 5, 4, 7),  # and on both
    (0, 3, 4, 2, 3, 2, 3),
    (3, 9, 11, 2, 6, 5, 3),
]
FORMS = {"torch": aggregated_attention, "reference": reference_aggregated_attention}


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, H, W, h, d, P, K, temperature=0.5):
    """Maps and parameters; logits reach the ``softplus(temperature) * log(K^2 + P)`` fold of 1 and more."""
    generator = torch.Generator().manual_seed(42)
    C, taps = h * d, K * K
    shapes = [(B, H, W, C), (B, H, W, 2 * C), (B, P, 2 * C)]
    shapes += [(h, 1, d), (h, 1, 1), (h, taps), (h, H * W, P), (h, d, taps), (h, 1, taps)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[4] = tensors[4] / 4 + temperature
    return tensors


def call(f, tensors, num_heads, **options):
    return f(*tensors[:3], num_heads, *tensors[3:], **options)


def loop(tensors, h):
    """One query after the other, from the definition (TransNeXt, Sec. 3.1 to 3.3)."""
    q, kv, pooled_kv, embedding, temperature, local_bias, pool_bias, tokens, token_bias = tensors
    B, H, W, C = q.shape
    K, d, P = math.isqrt(local_bias.shape[1]), C // h, pooled_kv.shape[1]

    def unit(t):
        return t / t.norm().clamp_min(1e-12)

    out = [[[[None] * h for _ in range(W)] for _ in range(H)] for _ in range(B)]
    for b, y, x, e in itertools.product(range(B), range(H), range(W), range(h)):
        own = slice(e * d, (e + 1) * d)
        keys, values = slice(e * d, (e + 1) * d), slice(C + e * d, C + (e + 1) * d)
        on_map = {}
        for i, j in itertools.product(range(K), repeat=2):
            row, col = y + i - K // 2, x + j - K // 2
            if 0 <= row < H and 0 <= col < W:
                on_map[i * K + j] = kv[b, row, col]
        qn = unit(q[b, y, x, own])
        length = torch.tensor(len(on_map) + P).float().log()  # a constant of float32
        qs = (qn + embedding[e, 0]) * F.softplus(temperature[e, 0, 0]) * length
        logits = [qs @ unit(t[keys]) + local_bias[e, tap] for tap, t in on_map.items()]
        logits += [qs @ unit(t[keys]) + pool_bias[e, y * W + x, p] for p, t in enumerate(pooled_kv[b])]
        weights = torch.stack(logits).softmax(0)
        total = torch.zeros(d, dtype=q.dtype)
        for weight, (tap, t) in zip(weights, on_map.items(), strict=False):
            total = total + (weight + qn @ tokens[e, :, tap] + token_bias[e, 0, tap]) * t[values]
        for weight, t in zip(weights[len(on_map) :], pooled_kv[b], strict=True):
            total = total + weight * t[values]
        out[b][y][x][e] = total
    if B == 0:
        return torch.zeros_like(q)
    return torch.stack([torch.stack([torch.stack([torch.cat(heads) for heads in row]) for row in m]) for m in out])


def run(f, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, case, dtype, device="cpu", change=lambda tensors: tensors, parameters=torch.float32):
    """Output and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    h = case[3]
    kinds = [dtype] * 3 + [torch.float64 if dtype == torch.float64 else parameters] * 6
    tensors = change([t.to(device, kind) for t, kind in zip(inputs(*case), kinds, strict=True)])
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def reference(t):
        return call(reference_aggregated_attention, t, h)

    truth = run(reference, [t.double() for t in tensors], grad.double())
    plain = run(reference, tensors, grad)
    for name, a, t, p in zip(NAMES, run(lambda t: call(f, t, h), tensors, grad), truth, plain, strict=True):
        if t.numel() > 0:
            op_close(a, t, p, grad=name != "out", what=name)
        else:
            assert a.shape == t.shape, name


def triton_form(*args):
    return aggregated_attention(*args, backend="triton")


# the definition


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", CASES[:5], ids=ids)
def test_is_the_definition(f, case):
    tensors, grad = inputs(*case), torch.randn(*case[:3], case[3] * case[4]).double()
    if case[0] == 0:
        assert call(f, tensors, case[3]).shape == grad.shape
        return
    found = run(lambda t: call(f, t, case[3]), tensors, grad)
    truth = run(lambda t: loop(t, case[3]), tensors, grad)
    for name, a, t in zip(NAMES, found, truth, strict=True):
        op_close(a, t, grad=name != "out", what=name)


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_gradcheck(f):
    case = (1, 2, 3, 1, 2, 2, 3)
    tensors = [t.requires_grad_() for t in inputs(*case)]
    assert torch.autograd.gradcheck(lambda *t: call(f, t, 1), tensors)
    if f is aggregated_attention:
        assert torch.autograd.gradgradcheck(lambda *t: call(f, t, 1), tensors)


@pytest.mark.parametrize("f", [*FORMS.values(), pytest.param(triton_form, marks=needs_triton)])
@pytest.mark.parametrize("length", [0.0, 1e-13])
def test_vectors_without_a_direction(f, length):
    """A vector shorter than 1e-12 is divided by that, and no other gradient is bent by it."""
    tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 3, 1, 4, 2, 3)]
    for t, place in zip(tensors, ((0, 0, 1), (0, 1, 0), (0, 1)), strict=False):
        t[place][:4] = length  # query, key and pooled key
    grad = torch.ones(1, 2, 3, 4, device=DEVICE)
    found = run(lambda t: call(f, t, 1), tensors, grad)
    truth = run(lambda t: loop(t, 1), [t.double().cpu() for t in tensors], grad.double().cpu())
    assert all(a.isfinite().all() for a in found)
    for name, a, t in zip(NAMES, found, truth, strict=True):
        far = t.abs() > 1e6  # by 1e12 at the place of such a vector: no other number shows beside it
        assert far.sum() == (4 if name in NAMES[1:4] else 0)
        for part in (far, ~far):
            op_close(a.cpu() * part, t * part, grad=True, what=name)


# the fast form


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_fast(case, dtype):
    check(aggregated_attention, case, dtype)


def test_parameters_in_half_precision():
    check(aggregated_attention, CASES[1], torch.float16, parameters=torch.float16)


@pytest.mark.parametrize("limit", [1, 4000])
@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=ids)
def test_some_rows_at_a_time(monkeypatch, case, limit):
    """One row of one image at once, or several, the last ones fewer."""
    monkeypatch.setattr(module, "_WORKSPACE", limit)
    check(aggregated_attention, case, torch.float32)


def test_every_size_and_window():
    for H, W, K in itertools.product((1, 2, 3, 6), (1, 4, 7), (1, 3, 5)):
        tensors = inputs(1, H, W, 2, 3, 2, K)
        op_close(*(call(f, tensors, 2) for f in FORMS.values()), what=f"{H}x{W} {K}")


def test_an_image_alone_is_as_in_a_batch():
    tensors = [t.float() for t in inputs(*CASES[5])]
    out = call(aggregated_attention, tensors, CASES[5][3])
    for b in range(3):
        alone = call(aggregated_attention, [t[b : b + 1] for t in tensors[:3]] + tensors[3:], CASES[5][3])
        close(alone, out[b : b + 1], "rerun")


# the kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", [(1, 3, 6, 2, 4, 3, 3), (2, 3, 2, 1, 17, 1, 5)], ids=ids)
def test_kernels(monkeypatch, case, dtype):
    monkeypatch.setattr(kernels, "ELEMENTS", 16)  # two tiles of positions, or one of each image
    check(triton_form, case, dtype, DEVICE)


@needs_triton
def test_kernels_of_a_window_larger_than_the_map_and_of_no_image():
    check(triton_form, (1, 2, 1, 1, 3, 2, 5), torch.float32, DEVICE)
    check(triton_form, CASES[4], torch.float32, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 31, 45, 3, 24, 49, 3), (2, 14, 15, 12, 24, 49, 5)], ids=ids)
def test_kernels_on_several_tiles(case, dtype):
    check(triton_form, case, dtype, DEVICE)


def taps(weights, v, K):
    """Weighted values of all taps: weights ``[B, h, K * K, N]``, values ``[B, H, W, h, C]``."""
    B, H, W, h, C = v.shape
    windows = F.unfold(v.flatten(3).permute(0, 3, 1, 2), K, padding=K // 2).reshape(B, h, C, K * K, H * W)
    return torch.einsum("bhtn,bhctn->bnhc", weights, windows).reshape(v.shape)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", [(1, 5, 7, 2, 3, 3), (2, 3, 6, 1, 18, 5)], ids=ids)
def test_kernels_of_the_taps(monkeypatch, case, dtype):
    """Several tiles of positions; the output is in the dtype of the operator, the rest in float32."""
    monkeypatch.setattr(kernels, "ELEMENTS", 16)
    B, H, W, h, C, K = case
    weights = torch.randn(B, h, K * K, H * W, device=DEVICE)
    v, base, dout, dv = (torch.randn(B, H, W, h, C, device=DEVICE) for _ in range(4))
    leaves = [t.double().requires_grad_() for t in (weights, v)]
    truth = taps(*leaves, K)
    found = kernels.taps_forward(weights, v, base, K, dtype)
    op_close(found, (truth + base).detach(), (truth + base).detach().to(dtype))
    dweights, dvalues = torch.autograd.grad(truth, leaves, dout.double())
    expected = dvalues + dv
    op_close(kernels.taps_backward(dout, weights, v, dv, K), dweights, grad=True)
    op_close(dv, expected, grad=True)


class Recorder:
    """In place of a kernel: keeps the arguments of its launches."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **kwargs: self.calls.append({**kwargs, "grid": grid})


def launches(monkeypatch, *size, K=3):
    recorder = Recorder()
    for name in ("vectors", "vectors_bwd", "taps_fwd", "taps_bwd"):
        monkeypatch.setattr(kernels, f"aggregated_{name}_kernel", recorder)
    v = torch.empty(*size, device="meta")
    weights = torch.empty(size[0], size[3], K * K, size[1] * size[2], device="meta")
    kernels.taps_forward(weights, v, v, K, torch.float32)
    kernels.taps_backward(v, weights, v, v, K)
    parameters = v[0, 0, 0], v[0, 0, 0, :, 0], v[0, :, :, 0, 0]
    kernels.vectors(v, torch.stack([v, v], 3), *parameters, 1e-12)
    tokens, lengths = torch.empty(size[3], K * K, size[4], device="meta"), v[..., :1]
    kernels.vectors_backward((v, weights, v, v), (v, v, lengths, lengths), (*parameters, tokens), 1e-12, v.dtype)
    return recorder.calls


@needs_triton
def test_kernels_are_compiled_once_for_a_model(monkeypatch):
    """Neither the map nor the heads of a TransNeXt change a constant of a kernel."""
    constants = []
    for size, heads in ((56, 3), (28, 6), (14, 12), (100, 3), (1, 1)):
        for found in launches(monkeypatch, 2, size, size, heads, 24):
            constants.append(str({k: v for k, v in found.items() if k.isupper() or k.startswith("num_")}))
            assert found["grid"] == (2 * heads * -(-size * size // found["BLOCK"]),)
    assert len(constants) == 20
    assert len(set(constants)) == 3  # the vectors know no window, their gradients know all


@needs_triton
def test_offsets_are_wide_where_an_image_needs_it(monkeypatch):
    for width, bits in ((64, [32] * 4), (1 << 13, [32, 32, 64, 64]), (1 << 14, [64] * 4)):
        calls = launches(monkeypatch, 1, 1 << 13, width, 1, 16)
        assert [c["INDEX"].primitive_bitwidth for c in calls] == bits, width  # keys and values together are larger


@pytest.mark.gpu
def test_gradients_are_deterministic():
    case = (4, 33, 45, 3, 24, 49, 3)
    tensors = [t.float().cuda() for t in inputs(*case)]
    grad = torch.randn(4, 33, 45, 72, device="cuda")
    first, second = (run(lambda t: call(triton_form, t, 3), tensors, grad) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


# all


def strided(tensors):
    """Channels that are not dense, and a bias as the transpose of ``[h, P, H * W]``."""
    maps = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors[:3]]
    return [*maps, *(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors[3:])]


def views_of_one_tensor(tensors):
    q, kv, *others = tensors
    return [*torch.cat([q, kv], -1).split([q.shape[-1], kv.shape[-1]], -1), *others]


@pytest.mark.parametrize("change", [views_of_one_tensor, strided])
@pytest.mark.parametrize("f", [aggregated_attention, pytest.param(triton_form, marks=needs_triton)])
def test_inputs_need_not_be_contiguous_and_do_not_change(f, change):
    case = (1, 3, 4, 2, 3, 1, 3)  # one pooled key: its transpose is itself
    given = []

    def kept(tensors):
        given.append([change(tensors), [t.clone() for t in tensors]])
        return given[0][0]

    check(f, case, torch.float32, DEVICE, kept)
    assert all(torch.equal(a, b) for a, b in zip(*given[0], strict=True))


@pytest.mark.parametrize("f", [*FORMS.values(), pytest.param(triton_form, marks=needs_triton)])
def test_large_logits_in_half_precision(f):
    """Logits of several hundred stay exact, under autocast too: nothing of them is in half precision."""
    case = (1, 3, 4, 1, 16, 5, 3)
    maps = [t.to(DEVICE, torch.float16) for t in inputs(*case, temperature=90.0)[:3]]
    tensors = [*maps, *(t.float().to(DEVICE) for t in inputs(*case, temperature=90.0)[3:])]
    truth = call(reference_aggregated_attention, [t.double() for t in tensors], 1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = call(f, tensors, 1)
    assert out.dtype == torch.float16
    op_close(out, truth)


def test_autocast_changes_no_gradient():
    case = CASES[1]

    def f(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return aggregated_attention(*args)

    check(f, case, torch.float32)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_opcheck(backend):
    tensors = [t.float().to(DEVICE) for t in inputs(1, 2, 3, 1, 2, 1, 3)]
    args = 1, backend == "triton"
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.vizoo.aggregated_attention.default, (*leaves, *args))
    out, *others = torch.ops.vizoo.aggregated_attention(*tensors, *args)
    backward = torch.ops.vizoo.aggregated_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), *tensors, *others, *args))


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=ids)
def test_counts_are_those_of_the_definition(case, device):
    """Logits, weights from tokens and weighted sum of all taps and pooled keys, on every path; backward twice that."""
    B, H, W, h, d, P, K = case
    macs = 0
    for _ in range(B * H * W * h):
        macs += (K * K + P) * d  # logits
        macs += K * K * d  # weights from tokens
        macs += (K * K + P) * d  # weighted sum
    paths = dict(FORMS)
    if HAS_TRITON and device == "meta":
        paths["triton"] = triton_form
    for name, f in paths.items():
        tensors = [t.float().to(device).requires_grad_() for t in inputs(*case)]
        with FlopCounterMode(display=False) as counter:
            out = call(f, tensors, h)
            assert counter.get_total_flops() == 2 * macs, name
            out.sum().backward()
        assert counter.get_total_flops() == 6 * macs, name
    shapes = [tuple(t.shape) for t in tensors]
    cost = COSTS["vizoo::aggregated_attention"](*shapes, h, False, out=tuple(out.shape))
    assert cost.macs == macs
    assert cost.acts == B * H * W * h * (2 * K * K + P + d)


# programs


class Attention(torch.nn.Module):
    """With a pooled map of the keys and a bias that depends on the map."""

    def __init__(self):
        super().__init__()
        tensors = inputs(1, 1, 1, 2, 3, 1, 3)
        names = [name for name in PARAMETERS if name != "pool_bias"]
        for name, t in zip(names, [*tensors[3:6], *tensors[7:]], strict=True):
            self.register_parameter(name, torch.nn.Parameter(t.float()))

    def forward(self, x):
        q, kv = x.split([6, 12], -1)
        pooled = F.adaptive_avg_pool2d(kv.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
        bias = q.mean((0, 3)).reshape(1, -1, 1).expand(2, -1, 4)
        given = dict(self.named_parameters()) | {"pool_bias": bias}
        return aggregated_attention(q, kv, pooled, 2, *(given[name] for name in PARAMETERS))


def image(*size):
    return torch.randn(*size, 18, generator=torch.Generator().manual_seed(math.prod(size)))


def test_compiles_without_a_break_for_any_size():
    torch._dynamo.reset()
    model = Attention()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 5, 4), (3, 2, 7)):
        found, expected = (
            run(lambda t, f=f: f(t[0]), [image(*size)], image(*size)[..., :6]) for f in (compiled, model)
        )
        for a, b in zip(found, expected, strict=True):
            close(a, b, "rerun", str(size))


def test_exports_plain_operators_for_any_size():
    """Recorded at one size, run at others, maps smaller than the window included."""
    model, dim = Attention(), torch.export.Dim
    sizes = {0: dim("batch", min=1, max=8), 1: dim("height", min=1, max=64), 2: dim("width", min=1, max=64)}
    program = torch.export.export(model, (image(2, 6, 5),), dynamic_shapes=(sizes,), strict=False)
    assert "vizoo" not in str(program.graph)
    for size in ((2, 6, 5), (3, 1, 7), (1, 9, 2), (1, 1, 1)):
        close(program.module()(image(*size)), model(image(*size)), "graph", str(size))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_traces_plain_operators():
    model = Attention()
    traced = torch.jit.trace(model, (image(2, 6, 5),))
    assert "vizoo::" not in str(traced.inlined_graph)
    for size in ((2, 6, 5), (1, 4, 7)):
        close(traced(image(*size)), model(image(*size)), "graph", str(size))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_scripts(f):
    scripted = torch.jit.script(f)
    for case in CASES[1:3]:
        check(scripted, case, torch.float32)


def test_transforms():
    """``torch.func.vmap`` and ``jvp`` of a plain form."""
    q, *rest = inputs(1, 2, 3, 1, 2, 2, 3)

    def f(q):
        return call(aggregated_attention, [q, *rest], 1)

    many = torch.stack([q, 2 - q])
    op_close(torch.func.vmap(f)(many), torch.stack([f(t) for t in many]))
    tangent = 2 - q  # one along q changes nothing
    (expected,) = torch.autograd.grad(f(q.requires_grad_()), q, ones := torch.randn_like(q))
    op_close((torch.func.jvp(f, (q,), (tangent,))[1] * ones).sum(), (expected * tangent).sum())


# arguments


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 35, 6)}, r"got q of shape \[2, 35, 6\], need \[B, H, W, h \* d\]"),
        ({"num_heads": 4}, "got num_heads=4, need a divisor of the 6 channels of q"),
        ({"num_heads": 0}, "got num_heads=0, need a divisor of the 6"),
        ({"kv": torch.zeros(2, 5, 7, 6)}, r"got kv of shape \[2, 5, 7, 6\], need \[2, 5, 7, 12\], twice"),
        ({"kv": torch.zeros(2, 5, 7, 12).half()}, "got q, kv and pooled_kv in torch.float32, torch.float16 and"),
        ({"pooled_kv": torch.zeros(1, 4, 12)}, r"got pooled_kv of shape \[1, 4, 12\], need \[2, P, 12\] with P"),
        ({"pooled_kv": torch.zeros(2, 0, 12)}, r"need \[2, P, 12\] with P of at least 1"),
        ({"query_embedding": torch.zeros(2, 3)}, r"got query_embedding of shape \[2, 3\], need \[2, 1, 3\]"),
        ({"temperature": torch.zeros(2)}, r"got temperature of shape \[2\], need \[2, 1, 1\]"),
        ({"local_bias": torch.zeros(2, 4)}, r"got local_bias of shape \[2, 4\], need \[2, K \* K\] with an odd K"),
        ({"local_bias": torch.zeros(2, 8)}, "with an odd K"),
        ({"pool_bias": torch.zeros(2, 4, 35)}, r"got pool_bias of shape \[2, 4, 35\], need \[2, 35, 4\]"),
        ({"tokens": torch.zeros(2, 9, 3)}, r"got tokens of shape \[2, 9, 3\], need \[2, 3, 9\]"),
        ({"token_bias": torch.zeros(2, 9)}, r"got token_bias of shape \[2, 9\], need \[2, 1, 9\]"),
    ],
)
def test_rejects(f, change, message):
    q, kv, pooled_kv, *parameters = (t.float() for t in inputs(2, 5, 7, 2, 3, 4, 3))
    given = {"q": q, "kv": kv, "pooled_kv": pooled_kv, "num_heads": 2, **dict(zip(PARAMETERS, parameters, strict=True))}
    with pytest.raises(ValueError, match=message):
        f(**given | change)


def test_rejects_backends():
    tensors = inputs(1, 2, 2, 1, 4, 1, 3)
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch' or 'triton'"):
        call(aggregated_attention, tensors, 1, backend="natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but .*not torch.float64"):
        call(aggregated_attention, tensors, 1, backend="triton")
    wide = [t.float() for t in inputs(1, 1, 1, 1, 129, 1, 1)]
    with pytest.raises(ValueError, match="up to 128 channels per head, not 129"):
        call(aggregated_attention, wide, 1, backend="triton")


def test_auto_never_interprets(monkeypatch):
    """On CPU tensors the kernels run only when a caller insists."""
    monkeypatch.setattr(module, "_triton_forward", None)
    call(aggregated_attention, [t.float() for t in inputs(*CASES[1])], CASES[1][3])
