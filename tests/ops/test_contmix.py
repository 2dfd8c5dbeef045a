import itertools

import pytest
import torch
import torch.nn.functional as F
from golden import image, load, weights
from graphs import compiled
from tolerance import close, golden_close, golden_gradients, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops.backend import HAS_TRITON, onednn_missing
from vizoo.backbones.ops.contmix import contmix, reference_contmix, working_size
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.na2d_av import na2d_av

if HAS_TRITON:
    from vizoo.backbones.ops import _contmix_kernels as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
NAMES = ("out", "dq", "dM", "dbias", "drpb1", "drpb2", "dv")
# B, G, C, H, W, k1, k2
CASES = [
    (1, 1, 1, 3, 3, 3, 3),
    (2, 2, 3, 5, 7, 3, 5),
    (1, 3, 14, 7, 7, 5, 7),  # stage 4 of the smallest model at 224
    (1, 2, 10, 11, 8, 5, 7),
    (1, 1, 16, 14, 13, 5, 13),
    (1, 2, 8, 17, 19, 5, 13),
    (2, 1, 5, 13, 29, 7, 3),  # the first kernel may be the larger one
]
SMALL = CASES[:5]  # for the interpreter
BLOCKS = ["overlock_contmix_k7", "overlock_contmix_k13", "overlock_contmix_k13_small"]


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, G, C, H, W, k1, k2):
    generator = torch.Generator().manual_seed(42)
    S = k1 * k1 + k2 * k2
    shapes = [
        (B, G * C, H, W),
        (B, G, C, S),
        (S,),
        (G, 2 * k1 - 1, 2 * k1 - 1),
        (G, 2 * k2 - 1, 2 * k2 - 1),
        (B, 2 * G * C, H, W),
    ]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def start(i, L, K):
    return min(max(i - (K - 1) // 2, 0), L - K)


def loop(q, k, weight, bias, rpbs, v, sizes):
    """ContMix as published: affinity to every region, linear map to the logits, bias of the true offset, softmax, sum.

    ``k`` is ``[B, G, C, 49]``, ``weight`` ``[S, 49]``; the small kernel has the first rows and the first channels.
    """
    B, _, H, W = q.shape
    G, C = k.shape[1:3]
    out = torch.zeros_like(v)
    for b, g, i, j in itertools.product(*map(range, (B, G, H, W))):
        affinity = torch.stack([q[b, g * C : (g + 1) * C, i, j] @ k[b, g, :, l] for l in range(k.shape[3])])
        logits, first = weight @ affinity + bias, 0
        for m, (K, rpb) in enumerate(zip(sizes, rpbs, strict=True)):
            offsets = list(itertools.product(range(K), range(K)))
            si, sj = start(i, H, K), start(j, W, K)
            own = [
                logits[first + n] + rpb[g, si + p - i + K - 1, sj + r - j + K - 1] for n, (p, r) in enumerate(offsets)
            ]
            p_own = torch.stack(own).softmax(0)
            channels = slice((m * G + g) * C, (m * G + g + 1) * C)
            out[b, channels, i, j] = sum(
                w * v[b, channels, si + p, sj + r] for w, (p, r) in zip(p_own, offsets, strict=True)
            )
            first += K * K
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, case, dtype, device="cpu", change=lambda t: t):
    """Output and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    sizes = case[-2:]
    tensors = [change(t.to(device, dtype)) for t in inputs(*case)]
    grad = torch.randn(tensors[-1].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = run(lambda *t: reference_contmix(*t, *sizes), [t.double() for t in tensors], grad.double())
    plain = run(lambda *t: reference_contmix(*t, *sizes), tensors, grad)
    found = run(lambda *t: f(*t, *sizes), tensors, grad)
    for name, a, t, p in zip(NAMES, found, truth, plain, strict=True):
        op_close(a, t, p, grad=name != "out", what=name)


@pytest.mark.parametrize("f", [reference_contmix, contmix])
@pytest.mark.parametrize("case", [(2, 2, 2, 3, 5, 3, 3), (1, 1, 3, 7, 5, 3, 5), (1, 2, 1, 5, 5, 5, 3)], ids=ids)
def test_is_the_definition(f, case):
    q, _, bias, rpb1, rpb2, v = inputs(*case)
    B, G, C = case[:3]
    k, weight = torch.randn(B, G, C, 4, dtype=torch.float64), torch.randn(len(bias), 4, dtype=torch.float64)
    op_close(f(q, k @ weight.T, bias, rpb1, rpb2, v, *case[-2:]), loop(q, k, weight, bias, (rpb1, rpb2), v, case[-2:]))


@pytest.mark.parametrize("f", [reference_contmix, contmix])
def test_gradcheck(f):
    tensors = [t.requires_grad_() for t in inputs(1, 2, 1, 3, 4, 3, 3)]
    assert torch.autograd.gradcheck(lambda *t: f(*t, 3, 3), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matrix_products(case, dtype):
    check(contmix, case, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_kernels(case, dtype):
    check(lambda *a: contmix(*a, backend="triton"), case, dtype, DEVICE)


@needs_triton
@pytest.mark.parametrize("C", [2, 17, 33, 64])
def test_kernels_mask_channels(C):
    check(lambda *a: contmix(*a, backend="triton"), (1, 1, C, 3, 5, 3, 3), torch.float32, DEVICE)


@needs_triton
def test_kernels_take_more_queries_and_offsets_than_a_tile():
    """Of one window, and of several that share values and context."""
    check(lambda *a: contmix(*a, backend="triton"), (1, 1, 2, 9, 10, 9, 9), torch.float32, DEVICE)


@needs_triton
def test_kernels_take_an_empty_batch():
    tensors = [t[:0].float().to(DEVICE) if t.dim() == 4 else t.float().to(DEVICE) for t in inputs(1, 1, 2, 8, 5, 3, 5)]
    out, *grads = run(lambda *t: contmix(*t, 3, 5, "triton"), tensors, tensors[-1])
    assert out.shape == tensors[-1].shape
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)


@needs_triton
@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_small_gradients_do_not_vanish_in_float16(size):
    """The tables' gradients are float32, and context and queries large: what the kernels lose they lose before."""
    *tensors, v = (t.to(DEVICE) for t in inputs(1, 1, 4, 8, 5, 3, 5))  # tiles for the first kernel, then windows
    tensors = [t.half() if t.dim() == 4 else t.float() for t in (*tensors, v)]
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).mul(size).to(DEVICE, torch.float16)
    found = run(lambda *t: contmix(*t, 3, 5, "triton"), tensors, grad)
    truth = run(lambda *t: reference_contmix(*t, 3, 5), [t.double() for t in tensors], grad.double())
    for name, a, t in list(zip(NAMES, found, truth, strict=True))[3:6]:
        op_close((a / size).half(), t / size, grad=True, what=name)


def launches(monkeypatch, *case, dtype=torch.float32):
    """Arguments of every launch of a forward and backward pass on the meta device, by kernel."""
    calls = {}

    class Recorder:
        def __init__(self, name):
            self.own = calls.setdefault(name, [])

        def __getitem__(self, grid):
            return lambda *args, **arguments: self.own.append(arguments)

    for place in (kernels, kernels.sums):
        for name in [n for n in vars(place) if n.endswith("_kernel")]:
            monkeypatch.setattr(place, name, Recorder(name))
    tensors = [t.to("meta", dtype if t.dim() == 4 else torch.float32) for t in inputs(*case)]
    out, lse = kernels.kernel_forward(tensors, *case[-2:])
    kernels.kernel_backward(out, out, lse, tensors, *case[-2:])
    return calls


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision_of_products_is_pytorchs(monkeypatch, precision):
    for place in (kernels, kernels.sums):
        monkeypatch.setattr(place, "product_precision", lambda device: precision)
    calls = launches(monkeypatch, 1, 1, 2, 8, 5, 3, 5)
    assert len(calls.pop("contmix_bias_kernel")) == 4  # forward and backward, for both kernel sizes
    assert len(calls) == 8
    assert all(calls.values())
    assert {c["PRECISION"] for found in calls.values() for c in found} == {precision}


@needs_triton
def test_kernels_are_compiled_once_for_a_model(monkeypatch):
    """Neither the size of a map nor groups nor batch change a constant of a kernel."""
    constants = {}
    for case in (
        (4, 8, 16, 14, 14, 5, 13),
        (2, 16, 16, 7, 7, 5, 7),
        (1, 2, 16, 50, 76, 5, 13),
        (1, 3, 16, 16, 17, 5, 13),
    ):
        for name, calls in launches(monkeypatch, *case, dtype=torch.float16).items():
            for c in calls:
                own = {
                    k: v
                    for k, v in c.items()
                    if k.startswith("num_") or (k.isupper() and k not in ("G", "H", "W", "S"))
                }
                constants.setdefault((name, c.get("K")), set()).add(str(own))
    assert {key: len(c) for key, c in constants.items()} == dict.fromkeys(constants, 1)


@needs_triton
@pytest.mark.parametrize(
    ("size", "windows"),
    [
        ((14, 14, 13), True),
        ((7, 7, 7), True),
        ((16, 15, 13), True),
        ((14, 14, 5), False),
        ((32, 32, 13), False),
        ((50, 76, 13), False),
        ((25, 38, 7), False),
    ],
    ids=str,
)
def test_kernels_take_few_windows_as_such(size, windows):
    assert kernels.by_windows(*size) is windows


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@pytest.mark.parametrize("change", [transposed, channels_last])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_inputs_need_not_be_contiguous(backend, change):
    check(
        lambda *a: contmix(*map(change, a[:6]), *a[6:], backend), (2, 2, 3, 5, 7, 3, 5), torch.float32, DEVICE, change
    )


@needs_triton
def test_kernels_keep_channels_last():
    tensors = [channels_last(t.float().to(DEVICE)) for t in inputs(1, 2, 3, 5, 7, 3, 5)]
    assert contmix(*tensors, 3, 5, "triton").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_mixed_dtypes(backend):
    """As under autocast: half queries and values, float32 parameters; logits that overflow float16 stay finite."""
    q, M, bias, rpb1, rpb2, v = (t.to(DEVICE) for t in inputs(1, 2, 16, 7, 5, 3, 5))
    q, v = 60 * q, v.half()
    tensors = [q.half(), (60 * M).half(), bias.float(), rpb1.float(), rpb2.float(), v]
    truth = reference_contmix(*(t.double() for t in tensors), 3, 5)
    assert (q.half().reshape(1, 2, 16, 35).transpose(2, 3).float() @ tensors[1].float()).abs().max() > 65504
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for f in (lambda *a: contmix(*a, backend), reference_contmix):
            op_close(f(*tensors, 3, 5), truth)


@needs_triton
@pytest.mark.parametrize(
    "change", [transposed, channels_last, lambda t: t], ids=["transposed", "channels_last", "plain"]
)
def test_opcheck(change):
    tensors = [change(t.float().to(DEVICE)).requires_grad_() for t in inputs(2, 1, 2, 3, 4, 3, 3)]
    torch.library.opcheck(torch.ops.vizoo.contmix.default, (*tensors, 3, 3))
    plain = [t.detach() for t in tensors]
    out, lse = torch.ops.vizoo.contmix(*plain, 3, 3)
    torch.library.opcheck(torch.ops.vizoo.contmix_backward.default, (torch.randn_like(out), *plain, out, lse, 3, 3))


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize("case", [(2, 2, 3, 13, 11, 3, 5), (1, 1, 2, 7, 7, 5, 7)], ids=ids)
def test_counts_are_those_of_the_definition(case, device):
    """Logits and sum: ``2 B G H W (k1^2 + k2^2) C`` multiply-accumulates, twice that backward, on every path."""
    B, G, C, H, W, k1, k2 = case
    macs = 2 * B * G * H * W * (k1 * k1 + k2 * k2) * C
    paths = {"reference": reference_contmix, "torch": contmix}
    if HAS_TRITON:
        paths["triton"] = lambda *a: contmix(*a, "triton")
    for name, f in paths.items():
        if name == "triton" and device == "cpu" and H * W > 100:
            continue  # slow under the interpreter
        tensors = [t.float().to(device).requires_grad_() for t in inputs(*case)]
        with FlopCounterMode(display=False) as counter:
            out = f(*tensors, k1, k2)
            assert counter.get_total_flops() == 2 * macs, name
            out.sum().backward()
        assert counter.get_total_flops() == 6 * macs, name
    shapes = [tuple(t.shape) for t in tensors]
    assert COSTS["vizoo::contmix"](*shapes, k1, k2, out=shapes[-1]).macs == macs


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", [reference_contmix, contmix])
def test_scripts(f):
    scripted = torch.jit.script(f)
    for case in [(1, 2, 3, 7, 7, 5, 7), (2, 1, 4, 14, 15, 5, 13)]:
        check(scripted, case, torch.float32)


class Mix(torch.nn.Module):
    def __init__(self, backend="auto"):
        super().__init__()
        self.backend = backend

    def forward(self, q, M, bias, rpb1, rpb2, v):
        return contmix(q, M, bias, rpb1, rpb2, v, 3, 5, self.backend)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_break(backend):
    torch._dynamo.reset()
    compiled = torch.compile(Mix(backend), backend="aot_eager", fullgraph=True)
    check(lambda *a: compiled(*a[:6]), (2, 2, 3, 5, 7, 3, 5), torch.float32, DEVICE)


@pytest.mark.skipif(bool(onednn_missing()), reason=f"no oneDNN path: {onednn_missing()}")
def test_compiled_inference_is_one_operator():
    """Softmax and sums stay apart from what is around them; in training and eagerly there is no such operator."""
    args = [t.float() for t in inputs(2, 2, 3, 5, 7, 3, 5)]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            names, out = compiled(Mix(), *args)
            close(out, contmix(*args, 3, 5), "rerun")
        assert ("vizoo.contmix_products" in names) == (mode is torch.no_grad)
    torch.library.opcheck(torch.ops.vizoo.contmix_products.default, (*args, 3, 5))


def test_exports_plain_operators():
    tensors = [t.float() for t in inputs(2, 2, 3, 7, 9, 3, 5)]
    batch = {0: torch.export.Dim("batch", min=2, max=8)}
    program = torch.export.export(
        Mix(), tuple(tensors), dynamic_shapes=(batch, batch, None, None, None, batch), strict=False
    )
    assert "vizoo" not in str(program.graph)
    assert torch.equal(program.module()(*tensors), contmix(*tensors, 3, 5))
    larger = [t.repeat(2, 1, 1, 1) if t.dim() == 4 else t for t in tensors]
    close(program.module()(*larger), contmix(*larger, 3, 5), "graph")


@pytest.mark.slow
@needs_triton
def test_training_with_kernels_is_training_without():
    """The same losses over 12 steps; every input is trained."""
    case = (2, 1, 3, 3, 4, 3, 3)
    target = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(7)).to(DEVICE)

    def losses(backend):
        parameters = [(0.3 * t).float().to(DEVICE).requires_grad_() for t in inputs(*case)]
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        found = []
        for _ in range(12):
            loss = F.mse_loss(contmix(*parameters, 3, 3, backend), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    plain = losses("torch")
    assert plain[-1] < 0.5 * plain[0]
    close(losses("triton"), plain, "gradient")


@pytest.mark.gpu
def test_gradients_are_deterministic():
    tensors = [t.float().cuda() for t in inputs(3, 4, 16, 23, 17, 5, 13)]
    first, second = (run(lambda *t: contmix(*t, 5, 13, "triton"), tensors, tensors[-1]) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("size", "K", "expected"),
    [
        ((14, 14), 13, (14, 14)),
        ((7, 12), 13, (13, 22)),
        ((12, 7), 13, (22, 13)),
        ((5, 45), 7, (7, 62)),  # double precision in this order; integers would give 63
        ((11, 11), 15, (15, 15)),  # truncates to 14, where the official code raises
        ((1, 1), 7, (7, 7)),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_working_size(size, K, expected):
    assert working_size(*size, K) == expected
    assert torch.jit.script(working_size)(*size, K) == expected


def rejected(change):
    case = [torch.zeros(t.shape) for t in inputs(2, 2, 3, 5, 7, 3, 5)] + [3, 5]
    for i, value in change.items():
        case[i] = value
    return case


@pytest.mark.parametrize("f", [reference_contmix, contmix])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 6, 35)}, r"got q \[2, 6, 35\]"),
        ({0: torch.zeros(2, 5, 5, 7)}, r"got M \[2, 2, 3, 34\] for q \[2, 5, 5, 7\]"),
        ({1: torch.zeros(2, 2, 3, 33)}, r"got M \[2, 2, 3, 33\].*need \[B, G, C, 34\]"),
        ({2: torch.zeros(35)}, r"got bias \[35\], need \[34\]"),
        ({3: torch.zeros(2, 3, 3)}, r"got rpb1 \[2, 3, 3\], need \[2, 5, 5\]"),
        ({4: torch.zeros(1, 9, 9)}, r"got rpb2 \[1, 9, 9\], need \[2, 9, 9\]"),
        ({5: torch.zeros(2, 6, 5, 7)}, r"got v \[2, 6, 5, 7\], need \[2, 12, 5, 7\]"),
        ({6: 4}, "got k1=4, need an odd number"),
        ({7: 7}, "got k2=7 on a 5x7 map, need at most 5; enlarge the map first"),
    ],
)
def test_rejects(f, change, message):
    with pytest.raises(ValueError, match=message):
        f(*rejected(change))


def test_auto_never_interprets(monkeypatch):
    """On CPU tensors the kernels run only when a caller insists."""
    calls = []
    monkeypatch.setattr(f"{contmix.__module__}._contmix", lambda *a: calls.append(a))
    monkeypatch.setattr("vizoo.backbones.ops._na2d_av_kernels.kernel_forward", lambda *a: calls.append(a))
    tensors = [t.float() for t in inputs(1, 1, 2, 3, 4, 3, 3)]
    contmix(*tensors, 3, 3)
    na2d_av(torch.rand(1, 1, 3, 4, 9), torch.rand(1, 1, 3, 4, 2), 3)
    assert calls == []


def test_rejects_backends():
    with pytest.raises(ValueError, match="got backend='cuda', need 'auto', 'torch' or 'triton'"):
        contmix(*rejected({}), "cuda")
    with pytest.raises(ValueError, match=r"got backend='triton', but .*not torch.float64"):
        contmix(*inputs(1, 1, 1, 3, 3, 3, 3), 3, 3, "triton")


# the official block around the operator, written from its parameters


def norm(state, name, x):
    return F.batch_norm(
        x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state[f"{name}.weight"], state[f"{name}.bias"]
    )


def layer_norm(state, name, x):
    return F.layer_norm(
        x.permute(0, 2, 3, 1), (x.shape[1],), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
    ).permute(0, 3, 1, 2)


def conv(state, name, x, dilation=1):
    weight = state[f"{name}.weight"]
    groups = x.shape[1] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
    pad = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=pad, dilation=dilation, groups=groups)


def large_kernel(state, x):
    out = norm(state, "lepe.0.origin_bn", conv(state, "lepe.0.lk_origin", x))
    for key in state:
        if key.startswith("lepe.0.dil_conv") and key.endswith(".weight"):
            branch = key.removesuffix(".weight")
            dilation = int(branch.rsplit("_", 1)[1])
            out = out + norm(state, branch.replace("dil_conv", "dil_bn"), conv(state, branch, x, dilation))
    return norm(state, "lepe.1", out)


def mix(state, f, value, kernel_size, small, groups, op):
    B, d, H, W = f.shape
    size = working_size(H, W, kernel_size)
    if size != (H, W):
        f, value = (F.interpolate(t, size, mode="bilinear", align_corners=False) for t in (f, value))
    scale = (d // groups) ** -0.5
    q = norm(state, "weight_query.1", conv(state, "weight_query.0", f))
    k = norm(state, "weight_key.2", conv(state, "weight_key.1", F.adaptive_avg_pool2d(f, 7)))
    weight, bias = state["weight_proj.weight"].flatten(1), state["weight_proj.bias"]
    M = scale * (k.reshape(B, groups, -1, 49) @ weight.T)
    out = op(q, M, bias, state["rpb1"], state["rpb2"], value, small, kernel_size)
    return F.adaptive_avg_pool2d(out, (H, W)) if size != (H, W) else out


def block(state, x, op, kernel_size, smk_size, num_heads, res_scale):
    def skip(name, x):
        return x * state[f"{name}.weight"].flatten()[:, None, None] + state[f"{name}.bias"][:, None, None]

    x = x + conv(state, "dwconv1", x)
    f = layer_norm(state, "norm1", x)
    gate = F.silu(norm(state, "gate.1", conv(state, "gate.0", f)))
    value = norm(state, "weight_value.1", conv(state, "weight_value.0", f))
    z = mix(state, f, value, kernel_size, smk_size, 2 * num_heads, op)
    z = norm(state, "fusion_proj.1", conv(state, "fusion_proj.0", z)) + large_kernel(state, f)
    squeeze = F.gelu(conv(state, "se_layer.proj.1", z.mean((2, 3), keepdim=True)))
    z = z * conv(state, "se_layer.proj.3", squeeze).sigmoid()
    z = conv(state, "proj.1", norm(state, "proj.0", gate * z))
    x = (skip("ls1", x) if res_scale else x) + z
    x = x + conv(state, "dwconv2", x)
    y = F.gelu(conv(state, "mlp.0", layer_norm(state, "norm2", x)))
    y = y + conv(state, "mlp.2", y)
    energy = y.square().sum((2, 3), keepdim=True).sqrt()
    y = (state["mlp.3.gamma"] * energy / (energy.mean(1, keepdim=True) + 1e-6) + 1) * y + state["mlp.3.beta"]
    return (skip("ls2", x) if res_scale else x) + conv(state, "mlp.4", y)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        *itertools.product(BLOCKS, (reference_contmix, contmix)),
        pytest.param("overlock_contmix_k13", lambda *a: contmix(*a, "triton"), marks=[needs_triton, pytest.mark.slow]),
    ],
)
def test_golden_block(name, op):
    """Output and gradients of the official block, of its input, tables and kernel projection."""
    case = load(name)
    text = case.meta["constructor"]
    arguments = dict(pair.split("=") for pair in text[text.index("(") + 1 : -1].split(", "))
    state = {key: value.to(DEVICE) for key, value in weights(case.keys).items()}
    trained = ["rpb1", "rpb2", "weight_proj.weight", "weight_proj.bias"]
    for key in trained:
        state[key].requires_grad_()
    x = image(case.input_shape).to(DEVICE).requires_grad_()
    sizes = [int(arguments[key]) for key in ("kernel_size", "smk_size", "num_heads")]
    out = block(state, x, op, *sizes, arguments["res_scale"] == "True")
    golden_close(out.detach().cpu(), case.outputs["out"], "out")
    golden_gradients(out, {"input": x, **{key: state[key] for key in trained}}, case.outputs, seed=7)
