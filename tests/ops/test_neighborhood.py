import itertools

import golden
import pytest
import torch
import torch.nn.functional as F
from tolerance import close, golden_close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import _neighborhood_kernels, backend
from vizoo.backbones.ops import neighborhood as module
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.neighborhood import neighborhood_attention, reference_neighborhood_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
ADDITIONAL = ("additional_keys", "additional_values", "additional_bias")
NAMES = ("out", "dq", "dk", "dv", "drpb", "dpad_k", "dpad_v", *(f"d{name}" for name in ADDITIONAL))
# B, H, W, h, d, dv, kernel_size, stride, dilation
CASES = [
    (1, 1, 1, 1, 1, 1, (1, 1), (1, 1), (1, 1)),
    (2, 4, 7, 2, 3, 4, (3, 3), (1, 1), (1, 1)),
    (1, 9, 6, 1, 5, 3, (3, 5), (1, 2), (1, 1)),  # a window of its own on each axis
    (1, 11, 10, 1, 4, 4, (5, 3), (1, 1), (2, 3)),  # dilations that do not divide the sides
    (2, 4, 5, 1, 3, 2, (3, 4), (1, 1), (2, 1)),  # a map smaller than the dilated window; an even side
    (1, 2, 3, 2, 3, 3, (5, 5), (5, 2), (1, 2)),  # smaller on both axes, and separate blocks
    (0, 5, 7, 2, 3, 4, (3, 3), (1, 1), (1, 1)),
    (1, 10, 9, 1, 4, 4, (4, 2), (4, 1), (1, 4)),  # one window for each dilation group on an axis
    (1, 17, 20, 2, 8, 8, (7, 7), (1, 1), (1, 1)),  # several tiles
    (1, 26, 9, 1, 4, 2, (3, 7), (2, 3), (2, 1)),
]
SMALL = CASES[:6]  # for the interpreter
FORMS = {"torch": neighborhood_attention, "reference": reference_neighborhood_attention}


def ids(case):
    return "x".join(map(str, case)).replace(" ", "") if isinstance(case, tuple) else None


def inputs(B, H, W, h, d, dv, kernel_size, stride, dilation):
    """Queries, keys, values, table, and the key and value of the padding."""
    generator = torch.Generator().manual_seed(42)
    table = (h, *(2 * k - 1 for k in kernel_size))
    shapes = [(B, H, W, h, d), (B, H, W, h, d), (B, H, W, h, dv), table, (h, d), (h, dv)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def call(f, tensors, case, scale=None, **options):
    q, k, v, rpb, pad_k, pad_v, *additional = tensors
    if additional:
        options |= dict(zip(ADDITIONAL, additional, strict=True))
    return f(q, k, v, *case[-3:], rpb, scale, pad_k, pad_v, **options)


def additional(P, bias=None, images=None):
    """Add keys and values that every query sees, of all images or of one, and their bias if its shape is given.

    A letter for each of the first two dimensions of the bias says that it is 1 (``1``) or that of the operator.
    """

    def change(tensors):
        (B, H, W, h, d), dv = tensors[0].shape, tensors[2].shape[4]
        shapes = [(images or B, P, h, d), (images or B, P, h, dv)]
        if bias:
            shapes.append((1 if bias[0] == "1" else h, 1 if bias[1] == "1" else H * W, P))
        generator = torch.Generator().manual_seed(P)
        found = [torch.randn(s, generator=generator, dtype=torch.float64).to(tensors[0]) for s in shapes]
        return [*tensors, *found, *([] if bias else [None])]

    return change


def loop(tensors, case, scale=None, boundary="shift"):
    """One query after the other, from the definition of generalised neighbourhood attention."""
    q, k, v, rpb, pad_k, pad_v, *others = tensors
    kernel_size, stride, dilation = case[-3:]
    B, H, W, h, d = q.shape
    scale = d**-0.5 if scale is None else scale
    size = [max(L, K * D) for L, K, D in zip((H, W), kernel_size, dilation, strict=True)]
    if boundary == "mask":
        size = [H, W]

    def window(i, axis):
        """Keys of a query on an axis, and their distances in steps of the dilation."""
        K, S, D = kernel_size[axis], stride[axis], dilation[axis]
        group = list(range(i % D, size[axis], D))
        leader = i // D // S * S + S // 2
        if boundary == "mask":
            places = range(leader - K // 2, leader - K // 2 + K)
            return [(group[p], p - i // D) for p in places if 0 <= p < len(group)]
        leader = min(leader, len(group) - 1)
        first = min(max(leader - K // 2, 0), len(group) - K)
        return [(j, (j - i) // D) for j in group[first : first + K]]

    out = q.new_zeros(*q.shape[:4], v.shape[4])
    for b, y, x, g in itertools.product(*map(range, q.shape[:4])):
        logits, values = [], []
        for (j, dy), (n, dx) in itertools.product(window(y, 0), window(x, 1)):
            on_map = j < H and n < W
            key = k[b, j, n, g] if on_map else pad_k[g]
            logits.append(scale * (q[b, y, x, g] @ key) + rpb[g, dy + kernel_size[0] - 1, dx + kernel_size[1] - 1])
            values.append(v[b, j, n, g] if on_map else pad_v[g])
        assert len(logits) == kernel_size[0] * kernel_size[1] or boundary == "mask"
        if others:
            keys, added, bias = others
            for p in range(keys.shape[1]):
                logits.append(scale * (q[b, y, x, g] @ keys[b % keys.shape[0], p, g]))
                if bias is not None:
                    logits[-1] = logits[-1] + bias[g % bias.shape[0], (y * W + x) % bias.shape[1], p]
                values.append(added[b % keys.shape[0], p, g])
        out[b, y, x, g] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def run(f, tensors, grad):
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = f(tensors)
    given = [t for t in tensors if t is not None]
    return out.detach(), *torch.autograd.grad(out, given, grad, allow_unused=True)


def check(f, case, dtype, device="cpu", change=lambda tensors: tensors, scale=None, **options):
    """Output and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    tensors = change([t.to(device, dtype) for t in inputs(*case)])
    shape = (*case[:4], case[5])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def reference(t):
        return call(reference_neighborhood_attention, t, case, scale, **options)

    truth = run(reference, [None if t is None else t.double() for t in tensors], grad.double())
    plain = run(reference, tensors, grad)
    found = run(lambda t: call(f, t, case, scale, **options), tensors, grad)
    names = ["out", *(n for n, t in zip(NAMES[1:], tensors, strict=False) if t is not None)]
    for name, a, t, p in zip(names, found, truth, plain, strict=True):
        assert (a is None) == (t is None), name  # the padding of a map that needs none
        if t is None:
            continue
        if t.numel() > 0:
            op_close(a, t, p, grad=name != "out", what=name)
        else:
            assert a.shape == t.shape, name


def triton_form(*args, **others):
    return neighborhood_attention(*args, backend="triton", **others)


def without(*places):
    """Drop optional arguments: 3 is the table, 4 and 5 the padding."""
    return lambda tensors: [None if i in places else t for i, t in enumerate(tensors)]


# the definition


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", [c for c in CASES if c[0]], ids=ids)
def test_is_the_definition(f, case):
    tensors = inputs(*case)
    op_close(call(f, tensors, case, 0.7), loop(tensors, case, 0.7))


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", [*CASES[1:6], CASES[7]], ids=ids)
def test_gradients_at_the_border(f, case):
    """Every gradient of the definition, on maps of which most positions lie at a border or in the padding."""
    tensors, grad = inputs(*case), torch.randn(*case[:4], case[5], dtype=torch.float64)
    found = run(lambda t: call(f, t, case), tensors, grad)
    truth = run(lambda t: loop(t, case), tensors, grad)
    for name, a, t in zip(NAMES[:7], found, truth, strict=True):
        assert (a is None) == (t is None), name  # the padding of a map that needs none
        if t is not None:
            op_close(a, t, grad=name != "out", what=name)


# bias, images that the additional keys are for
BIASES = [(None, None), ("hN", 1), ("1N", None), ("h1", None)]


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("boundary", ["shift", "mask"])
@pytest.mark.parametrize(
    ("case", "bias"), [*zip([*CASES[1:6], CASES[7]], [*BIASES, *BIASES[:2]], strict=True)], ids=str
)
def test_additional_keys_and_masked_windows(f, case, bias, boundary):
    tensors, grad = additional(3, *bias)(inputs(*case)), torch.randn(*case[:4], case[5], dtype=torch.float64)
    found = run(lambda t: call(f, t, case, boundary=boundary), tensors, grad)
    truth = run(lambda t: loop(t, case, boundary=boundary), tensors, grad)
    for a, t in zip(found, truth, strict=True):
        assert (a is None) == (t is None)  # the padding of a map that needs none
        if t is not None:
            op_close(a, t, grad=True)


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_is_the_attention_of_transnext(f):
    """Taps of an unfolded map padded by zeros, masked outside, and pooled keys, in one softmax (TransNeXt, Sec. 3)."""
    B, H, W, h, d, P = 2, 4, 5, 3, 6, 4
    q, k, v = (torch.randn(B, H, W, h, d, dtype=torch.float64) for _ in range(3))
    pooled_k, pooled_v = (torch.randn(B, P, h, d, dtype=torch.float64) for _ in range(2))
    local, bias = torch.randn(h, 9, dtype=torch.float64), torch.randn(h, H * W, P, dtype=torch.float64)

    def taps(t):
        t = F.unfold(t.flatten(3).permute(0, 3, 1, 2), 3, padding=1)  # channels of heads, then taps
        return t.reshape(B, h, d, 9, H * W).permute(0, 1, 4, 2, 3)  # [B, h, N, d, 9]

    queries = q.flatten(1, 2).transpose(1, 2)
    near = (queries.unsqueeze(3) @ taps(k)).squeeze(3) + local.unsqueeze(1)
    near = near.masked_fill(taps(torch.ones_like(k))[:, :, :, 0] == 0, -torch.inf)
    far = queries @ pooled_k.permute(0, 2, 3, 1) + bias
    weights = torch.cat([near, far], -1).softmax(-1)
    out = (weights[..., None, :9] * taps(v)).sum(-1) + weights[..., 9:] @ pooled_v.transpose(1, 2)
    rpb = F.pad(local.reshape(h, 3, 3), [1, 1, 1, 1])  # only the middle is read
    found = f(q, k, v, 3, 1, 1, rpb, 1.0, None, None, pooled_k, pooled_v, bias, "mask")
    op_close(found.flatten(1, 2).transpose(1, 2), out)


def test_window_of_the_map_is_attention():
    q, k, v = (torch.randn(2, 6, 5, 3, 4, dtype=torch.float64) for _ in range(3))
    tokens = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*tokens).transpose(1, 2).reshape(q.shape)
    for f in FORMS.values():
        op_close(f(q, k, v, (6, 5)), expected)


def test_stride_of_the_window_is_attention_in_blocks():
    q, k, v = (torch.randn(1, 6, 8, 1, 3, dtype=torch.float64) for _ in range(3))

    def blocks(t):
        return t.reshape(1, 2, 3, 2, 4, 1, 3).permute(0, 1, 3, 5, 2, 4, 6).reshape(1, 4, 12, 3)

    expected = F.scaled_dot_product_attention(*map(blocks, (q, k, v)))
    for f in FORMS.values():
        op_close(blocks(f(q, k, v, (3, 4), (3, 4))), expected)


def check_golden(f, name, device="cpu"):
    """NATTEN 0.14.6, heads first."""
    case = golden.load(name)
    K, dilation = case.meta["kernel_size"], case.meta["dilation"]
    q, k, v = (golden.image(case.input_shape, seed).permute(0, 2, 3, 1, 4).to(device) for seed in (1, 2, 3))
    rpb = golden.image((q.shape[3], 2 * K - 1, 2 * K - 1), 4).to(device) if case.meta["rpb"] else None
    out = f(q, k, v, K, 1, dilation, rpb)
    golden_close(out.permute(0, 3, 1, 2, 4).cpu(), case.outputs["out"], name)


@pytest.mark.parametrize("name", golden.names("na2d_k"))
@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_golden(name, f):
    check_golden(f, name)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["na2d_k7_d2_15x19_rpb", "na2d_k5_d3_17x23"])
def test_kernels_golden(name):
    check_golden(triton_form, name, DEVICE)


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("case", [(1, 3, 4, 2, 2, 1, (3, 2), (1, 2), (1, 2)), CASES[5]], ids=ids)
def test_gradcheck(f, case):
    tensors = [t.requires_grad_() for t in inputs(*case)]
    assert torch.autograd.gradcheck(lambda *t: call(f, t, case), tensors)


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("boundary", ["shift", "mask"])
def test_gradcheck_with_additional_keys(f, boundary):
    case = (2, 1, 3, 1, 2, 1, (1, 2), (1, 1), (1, 1))
    tensors = [t.requires_grad_() for t in additional(2, "1N", 1)(inputs(*case))]
    assert torch.autograd.gradcheck(lambda *t: call(f, t, case, boundary=boundary), tensors)
    if f is neighborhood_attention:
        assert torch.autograd.gradgradcheck(lambda *t: call(f, t, case, boundary=boundary), tensors)


# tiles


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_tiles(case, dtype):
    check(neighborhood_attention, case, dtype)


@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[8]], ids=ids)
@pytest.mark.parametrize("drop", [(3,), (4, 5), (3, 4, 5)], ids=str)
def test_optional_arguments(case, drop):
    check(neighborhood_attention, case, torch.float32, change=without(*drop), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("boundary", ["shift", "mask"])
@pytest.mark.parametrize(
    ("case", "P", "bias"), [*zip([CASES[2], *CASES[6:]], (1, 5, 17, 49, 2), [*BIASES, BIASES[0]], strict=True)], ids=str
)
def test_tiles_with_additional_keys(case, P, bias, boundary, dtype):
    check(neighborhood_attention, case, dtype, change=additional(P, *bias), boundary=boundary)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_products_of_half_precision(monkeypatch, case):
    """As on a processor that has them; on others they are emulated."""
    monkeypatch.setattr(module, "multiplies", lambda x: True)
    check(neighborhood_attention, case, torch.bfloat16)
    check(neighborhood_attention, case, torch.bfloat16, change=additional(5, "hN"), boundary="mask")


@pytest.mark.parametrize("case", [CASES[3], CASES[8], CASES[9]], ids=ids)
@pytest.mark.parametrize("limit", [1, 5000])
def test_several_pieces(monkeypatch, case, limit):
    monkeypatch.setattr(module, "_WORKSPACE", limit)
    check(neighborhood_attention, case, torch.float32)
    check(neighborhood_attention, case, torch.float32, change=additional(5, "hN"), boundary="mask")


def test_every_size_and_window():
    """All sides up to 20 with windows up to 7, strides and dilations, on one axis and in both directions."""
    for K, S, D in [(1, 1, 1), (2, 1, 3), (3, 2, 1), (3, 3, 2), (5, 1, 2), (5, 4, 1), (6, 3, 1), (7, 1, 1), (7, 1, 2)]:
        for L in range(1, 21):
            case = (1, L, 2, 1, 2, 2, (K, 1), (S, 1), (D, 1))
            tensors = inputs(*case)
            expected = call(reference_neighborhood_attention, tensors, case)
            op_close(call(neighborhood_attention, tensors, case), expected, what=f"{L} {K} {S} {D}")
            turned = [t.transpose(1, 2) if t.dim() > 2 else t for t in tensors]
            q, k, v, rpb, pad_k, pad_v = turned
            out = neighborhood_attention(q, k, v, (1, K), (1, S), (1, D), rpb, None, pad_k, pad_v)
            op_close(out.transpose(1, 2), expected, what=f"{L} {K} {S} {D}, turned")
            masked = [call(f, tensors, case, boundary="mask") for f in FORMS.values()]
            op_close(*masked, what=f"{L} {K} {S} {D}, masked")


@pytest.mark.slow
@pytest.mark.parametrize("dilation", [1, 8])
def test_full_size(dilation):
    check(neighborhood_attention, (1, 56, 56, 2, 32, 32, (7, 7), (1, 1), (dilation, dilation)), torch.float32)


# the kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_kernels(case, dtype):
    check(triton_form, case, dtype, DEVICE)


@needs_triton
def test_kernels_without_bias_and_padding():
    check(triton_form, CASES[4], torch.float32, DEVICE, without(3, 4, 5), 0.3)


@needs_triton
@pytest.mark.parametrize(("d", "dv"), [(33, 1), (1, 65)])
def test_kernels_mask_channels(d, dv):
    check(triton_form, (1, 3, 5, 1, d, dv, (3, 3), (1, 1), (1, 1)), torch.float32, DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ((1, 3, 22, 1, 4, 4, (3, 7), (1, 1), (1, 1)), torch.float32),  # 17 columns of queries reach a tile of keys
        ((1, 2, 17, 2, 3, 2, (1, 13), (1, 1), (1, 1)), torch.float16),  # 20 columns of keys for a tile of queries
        ((1, 11, 2, 1, 2, 2, (9, 1), (2, 1), (1, 1)), torch.float32),  # several steps down the rows
    ],
    ids=str,
)
def test_kernels_take_several_steps(case, dtype):
    check(triton_form, case, dtype, DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize(
    ("case", "P", "bias", "boundary"),
    [
        ((1, 3, 5, 2, 24, 24, (3, 3), (1, 1), (1, 1)), 5, ("hN", None), "mask"),
        ((1, 6, 5, 1, 32, 16, (3, 2), (1, 2), (2, 1)), 17, ("h1", 1), "shift"),
        ((1, 9, 3, 1, 3, 4, (3, 5), (3, 1), (1, 1)), 49, (None, None), "mask"),
        ((1, 3, 6, 1, 4, 4, (2, 3), (1, 1), (1, 2)), 1, ("1N", None), "shift"),
    ],
    ids=str,
)
def test_kernels_with_additional_keys(case, P, bias, boundary, dtype):
    check(triton_form, case, dtype, DEVICE, additional(P, *bias), 0.2, boundary=boundary)


@needs_triton
def test_kernels_take_several_tiles_of_additional_keys(monkeypatch):
    monkeypatch.setattr(_neighborhood_kernels, "PROGRAMS", 3)  # of several shares
    case = (2, 5, 7, 1, 2, 2, (3, 3), (1, 1), (1, 1))
    check(triton_form, case, torch.float32, DEVICE, additional(70, "hN"), boundary="mask")


@needs_triton
@pytest.mark.parametrize("small", [0, 1])
def test_kernels_keep_small_gradients(small):
    """Gradients of the logits far below the range of float16, of outputs that have 1e-7."""
    case = (1, 3, 5, 1, 4, 4, (3, 3), (1, 1), (1, 1))
    tensors = [t.to(DEVICE, torch.float16) for t in inputs(*case)]
    tensors[small] = tensors[small] * 1e-4
    grad = torch.full((1, 3, 5, 1, 4), 2e-7, dtype=torch.float16, device=DEVICE)

    def found(f, tensors, grad):
        return run(lambda t: call(f, t, case, 1e4), tensors, grad)[1 + small]

    truth = found(reference_neighborhood_attention, [t.double() for t in tensors], grad.double())
    assert truth.abs().max() > 1e-4
    op_close(found(triton_form, tensors, grad), truth, found(reference_neighborhood_attention, tensors, grad), True)


@needs_triton
@pytest.mark.parametrize("small", [(0,), (1, 6)], ids=["queries", "keys"])
def test_kernels_keep_small_gradients_with_additional_keys(small):
    case = (1, 3, 5, 1, 4, 4, (3, 3), (1, 1), (1, 1))
    tensors = [t.to(DEVICE, torch.float16) for t in additional(5, "hN")(inputs(*case))]
    tensors = [t * 1e-4 if i in small else t for i, t in enumerate(tensors)]
    grad = torch.full((1, 3, 5, 1, 4), 2e-7, dtype=torch.float16, device=DEVICE)

    def found(f, tensors, grad):
        return run(lambda t: call(f, t, case, 1e4, boundary="mask"), tensors, grad)[1 + small[-1]]

    truth = found(reference_neighborhood_attention, [t.double() for t in tensors], grad.double())
    assert truth.abs().max() > 1e-4
    op_close(found(triton_form, tensors, grad), truth, found(reference_neighborhood_attention, tensors, grad), True)


@needs_triton
def test_columns_of_queries_for_a_tile_of_keys():
    """What the kernels set aside is what the definition of the window needs, and no more."""
    T = _neighborhood_kernels.TILE
    for K, S, R, extra, masked in itertools.product((1, 2, 3, 7), (1, 2, 3), (1, 3), (0, 4), (False, True)):
        for L in range(R if masked else K * R, 26) if K >= S else ():
            queries = max(1, L - extra)
            start, _ = module._window_starts(queries, L, K, S, R, masked, torch.device("cpu"))
            most = 0
            for g in range(R):
                first = start[g::R]
                for j in range(0, -(-(L - g) // R), T):
                    reach = ((first < j + T) & (first + K > j)).nonzero()
                    most = max(most, int(reach[-1] - reach[0]) + 1 if len(reach) else 0)
            assert _neighborhood_kernels.key_columns(queries, L, K, S, R, masked) == most, (queries, L, K, S, R)


class Recorder:
    """In place of a kernel: keeps the arguments of its launches."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append(kwargs)


def launches(monkeypatch, q, kernel_size=7, dilation=1, number=0):
    """Arguments of the launches of one training step, by kernel, with so many additional keys."""
    names = ["table", "fwd", "bwd_query", "bwd_key", "bwd_bias"]
    names += ["bwd_additional", "bwd_additional_bias"] if number else []
    recorders = {name: Recorder() for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(_neighborhood_kernels, f"neighborhood_{name}_kernel", recorder)
    window = module._Window(*((n, n) for n in (kernel_size, 1, dilation)))
    rpb = q.new_zeros(q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1)
    B, H, W, h, d = q.shape
    keys, bias = (q.new_zeros(B, number, h, d), q.new_zeros(h, H * W, number)) if number else (None, None)
    tensors = q, q, q, rpb, keys, keys, bias
    out, lse = _neighborhood_kernels.kernel_forward(*tensors, window, 1.0)
    _neighborhood_kernels.kernel_backward(out, *tensors, out, lse, window, 1.0)
    return {name: recorder.calls for name, recorder in recorders.items()}


@needs_triton
def test_kernels_are_compiled_once_for_a_model(monkeypatch):
    """No map size, dilation, number of heads or batch of NAT or DiNAT changes a constant of a kernel."""
    constants = {}
    for size, heads, dilations in ((56, 2, (1, 8)), (28, 4, (1, 4)), (14, 8, (1, 2)), (7, 16, (1,))):
        for dilation in dilations:
            q = torch.empty(2, size, size, heads, 32, device="meta")
            for name, calls in launches(monkeypatch, q, 7, dilation).items():
                own = [{k: v for k, v in c.items() if k.isupper() or k.startswith("num_")} for c in calls]
                constants.setdefault(name, set()).update(str(c) for c in own)
    assert {name: len(c) for name, c in constants.items()} == dict.fromkeys(constants, 1)
    assert len(constants) == 5


@needs_triton
def test_kernels_are_compiled_once_for_additional_keys(monkeypatch):
    """Neither the map nor the number of keys nor the heads of a TransNeXt change a constant of a kernel."""
    constants = {}
    for size, heads, number in ((56, 3, 49), (28, 6, 49), (14, 12, 49), (100, 3, 144), (7, 1, 1)):
        q = torch.empty(2, size, size, heads, 24, device="meta")
        for name, calls in launches(monkeypatch, q, 3, number=number).items():
            own = [{k: v for k, v in c.items() if k.isupper() or k.startswith("num_")} for c in calls]
            constants.setdefault(name, set()).update(str(c) for c in own)
    assert {name: len(c) for name, c in constants.items()} == dict.fromkeys(constants, 1)
    assert len(constants) == 7


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision_of_products_is_pytorchs(monkeypatch, precision):
    monkeypatch.setattr(_neighborhood_kernels, "product_precision", lambda device: precision)
    calls = launches(monkeypatch, torch.empty(1, 7, 7, 1, 4, device="meta"), number=5)
    del calls["table"]
    assert {c["PRECISION"] for found in calls.values() for c in found} == {precision}


@needs_triton
def test_offsets_are_wide_where_an_image_needs_it(monkeypatch):
    for width, bits in ((64, 32), (1 << 14, 64)):
        calls = launches(monkeypatch, torch.empty(1, 1 << 13, width, 1, 16, device="meta"), number=1)
        del calls["table"]
        assert {c["INDEX"].primitive_bitwidth for found in calls.values() for c in found} == {bits}


@needs_triton
def test_kernels_share_images(monkeypatch):
    """The bias' gradient of several images by one program."""
    monkeypatch.setattr(_neighborhood_kernels, "PROGRAMS", 1)
    check(triton_form, (3, 5, 5, 1, 2, 2, (3, 3), (1, 1), (1, 1)), torch.float32, DEVICE)


@needs_triton
@pytest.mark.slow
def test_kernels_on_several_tiles():
    check(triton_form, CASES[9], torch.float16, DEVICE)


@pytest.mark.gpu
def test_gradients_are_deterministic():
    case = (4, 33, 45, 4, 32, 32, (7, 7), (1, 1), (2, 2))
    tensors = additional(49, "hN")([t.float().cuda() for t in inputs(*case)])
    grad = torch.randn(4, 33, 45, 4, 32, device="cuda")
    first, second = (run(lambda t: call(triton_form, t, case), tensors, grad) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert a is b is None or torch.equal(a, b), name


# NATTEN


@pytest.mark.parametrize("case", [c for c in CASES if c[0]], ids=ids)
def test_bias_as_channels(case):
    """What NATTEN gets: no bias, wider queries and keys, scale 1; run by the reference in its place."""
    tensors = inputs(*case)
    window = module._Window(*case[-3:])
    q, k, v, rpb, pad_k, pad_v = tensors
    k, v = module._padded(k, pad_k, window), module._padded(v, pad_v, window)
    q = F.pad(0.7 * q, [0, 0, 0, 0, 0, k.shape[2] - q.shape[2], 0, k.shape[1] - q.shape[1]])
    wide_q, wide_k = module._bias_channels(q, k, rpb, window)
    assert wide_q.shape[4] == wide_k.shape[4] == case[4] + case[6][0] * case[6][1]
    out = reference_neighborhood_attention(wide_q, wide_k, v, *window[:3], scale=1.0)[:, : case[1], : case[2]]
    op_close(out, call(reference_neighborhood_attention, tensors, case, 0.7))


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[8]], ids=ids)
@pytest.mark.parametrize("drop", [(), (3,)], ids=["bias", "plain"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_calls_natten(monkeypatch, case, drop, device):
    """With the reference for NATTEN: what it is called with gives outputs and gradients, and meets its rules."""
    seen = []

    class Natten:
        @staticmethod
        def na2d(
            q, k, v, kernel_size, stride, dilation, scale, additional_keys=None, additional_values=None, **options
        ):
            seen.append(options)
            if additional_keys is not None:
                assert additional_keys.shape[::3] == q.shape[::4]  # NATTEN repeats no image and widens no head
                assert additional_values.shape[3] == v.shape[4]
            assert q.shape == k.shape
            assert v.shape[:4] == k.shape[:4]
            assert q.shape[4] % 8 == v.shape[4] % 8 == 0
            assert device == "cuda" or q.shape[4] == v.shape[4] in (8, 16, 32, 64)
            assert all(K * D <= L for K, D, L in zip(kernel_size, dilation, k.shape[1:3], strict=True))
            assert (q.shape[4] == v.shape[4]) or options["backend"] == "cutlass-fna"
            others = {"additional_keys": additional_keys, "additional_values": additional_values}
            return reference_neighborhood_attention(q, k, v, kernel_size, stride, dilation, scale=scale, **others)

    widths = module._natten_widths
    monkeypatch.setattr(module, "_natten_widths", lambda d, dv, _: widths(d, dv, device))
    monkeypatch.setattr(module, "load_natten", lambda: Natten)
    monkeypatch.setattr(module, "choose_backend", lambda *a: "natten")
    check(neighborhood_attention, case, torch.float32, change=without(*drop))
    check(neighborhood_attention, case, torch.float32, change=lambda t: additional(3, None, 1)(without(*drop)(t)))
    assert seen


NATTEN_CASES = [
    (2, 15, 19, 2, 32, 32, (7, 7), (1, 1), (2, 2)),
    (1, 7, 7, 1, 8, 8, (7, 7), (1, 1), (1, 1)),
    CASES[2],
    CASES[4],
]


@pytest.mark.skipif(bool(backend._natten_absent()), reason=f"NATTEN: {backend._natten_absent()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("drop", [(), (3,)], ids=["bias", "plain"])
@pytest.mark.parametrize("case", NATTEN_CASES, ids=ids)
def test_natten_on_a_cpu(case, drop, dtype):
    """In float16 NATTEN computes in that: it may be further off than the reference, which computes in float32."""
    tensors = without(*drop)([t.to(dtype) for t in inputs(*case)])
    found = call(neighborhood_attention, tensors, case, backend="natten")
    plain = call(reference_neighborhood_attention, tensors, case) if dtype == torch.float32 else None
    op_close(
        found, call(reference_neighborhood_attention, [t if t is None else t.double() for t in tensors], case), plain
    )
    if dtype == torch.float32:
        tensors = additional(5)(tensors)
        found = call(neighborhood_attention, tensors, case, backend="natten")
        double = [t if t is None else t.double() for t in tensors]
        op_close(found, call(reference_neighborhood_attention, double, case))


@pytest.mark.gpu
@pytest.mark.skipif(bool(backend.natten_missing()), reason=f"NATTEN: {backend.natten_missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [(2, 15, 19, 2, 32, 32, (7, 7), (1, 1), (2, 2)), CASES[4]], ids=ids)
def test_natten(case, dtype):
    tensors = [t.to("cuda", dtype) for t in inputs(*case)]
    found = call(neighborhood_attention, tensors, case, backend="natten")
    op_close(found, call(reference_neighborhood_attention, [t.double() for t in tensors], case))


# all


def views_of_one_tensor(tensors):
    q, k, v, *others = tensors
    joined = torch.cat([q, k, v], -1)
    return [*joined.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1), *others]


def strided(tensors):
    return [t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 2 else t for t in tensors]


@pytest.mark.parametrize("change", [views_of_one_tensor, strided])
@pytest.mark.parametrize("f", [neighborhood_attention, pytest.param(triton_form, marks=needs_triton)])
def test_inputs_need_not_be_contiguous(f, change):
    check(f, CASES[1], torch.float32, DEVICE, change)


@pytest.mark.parametrize("f", [*FORMS.values(), pytest.param(triton_form, marks=needs_triton)])
def test_large_half_logits(f):
    """Logits beyond the range of float16 stay finite; autocast changes nothing."""
    case = (1, 5, 6, 1, 16, 16, (3, 3), (1, 1), (1, 1))
    q, k, v, *others = (t.to(DEVICE, torch.float16) for t in inputs(*case))
    tensors = [60 * q, 300 * k, v, *others]
    truth = call(reference_neighborhood_attention, [t.double() for t in tensors], case, 1.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = call(f, tensors, case, 1.0)
    assert out.dtype == torch.float16
    op_close(out, truth)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("optional", [(), (3, 4, 5, 6)], ids=str)
def test_opcheck(backend, optional):
    case = (1, 3, 2, 1, 2, 3, (3, 2), (1, 1), (1, 1))
    q, k, v, rpb, _, _, *others = additional(2, "11")([t.float().to(DEVICE) for t in inputs(*case)])
    tensors = [t if i < 3 or i in optional else None for i, t in enumerate([q, k, v, rpb, *others])]
    args = ([3, 2], [1, 1], [1, 1], bool(optional), 0.5, backend == "triton")
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.vizoo.neighborhood_attention.default, (*leaves, *args))
    out, lse = torch.ops.vizoo.neighborhood_attention(*tensors, *args)
    backward = torch.ops.vizoo.neighborhood_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), *tensors, out, lse, *args))


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=ids)
def test_counts_are_those_of_the_definition(case, device):
    """``N Kh Kw (d + dv)`` per head, on every path; backward the five products with recomputed weights."""
    B, H, W, h, d, dv, (Kh, Kw), *_ = case
    scores = B * H * W * h * Kh * Kw
    paths = {"torch": neighborhood_attention}
    if HAS_TRITON and case == CASES[1]:
        paths["triton"] = triton_form
    for name, f in paths.items():
        tensors = [t.float().to(device).requires_grad_() for t in inputs(*case)]
        with FlopCounterMode(display=False) as counter:
            out = call(f, tensors, case)
            assert counter.get_total_flops() == 2 * scores * (d + dv), name
            out.sum().backward()
        assert counter.get_total_flops() == 2 * scores * (4 * d + 3 * dv), name
    with FlopCounterMode(display=False) as counter:
        call(reference_neighborhood_attention, [t.detach() for t in tensors], case)
    assert counter.get_total_flops() == 2 * scores * (d + dv)
    with FlopCounterMode(display=False) as more, torch.no_grad():
        for f in FORMS.values():
            call(f, additional(5, "h1", 1)(tensors), case, boundary="mask")
    assert more.get_total_flops() == 2 * 2 * (scores + B * H * W * h * 5) * (d + dv)
    shapes = [tuple(t.shape) for t in tensors[:4]]
    cost = COSTS["vizoo::neighborhood_attention"](
        *shapes, None, None, None, *case[-3:], False, 1.0, False, out=tuple(out.shape)
    )
    assert cost.macs == scores * (d + dv)


# programs


class Attention(torch.nn.Module):
    def __init__(self, kernel_size, stride=1, dilation=1, f=neighborhood_attention):
        super().__init__()
        self.f, self.options = f, (kernel_size, stride, dilation)

    def forward(self, x, rpb, pad_k, pad_v):
        q, k, v = x.unflatten(-1, (2, 10)).split([3, 3, 4], -1)
        return self.f(q, k, v, *self.options, rpb, None, pad_k, pad_v)


class Aggregated(Attention):
    """With a pooled map as additional keys, and a bias that depends on the map."""

    def forward(self, x, rpb, pad_k, pad_v):
        q, k, v = x.unflatten(-1, (2, 10)).split([3, 3, 4], -1)
        pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2).unflatten(-1, (2, 10))
        bias = q.mean((0, 4)).flatten(0, 1).t().unsqueeze(2).expand(-1, -1, 4)
        others = {"additional_keys": pooled[..., 3:6], "additional_values": pooled[..., 6:], "additional_bias": bias}
        return self.f(q, k, v, *self.options, rpb, None, pad_k, pad_v, boundary="mask", **others)


WINDOWS = [((3, 5), (1, 2), (2, 1)), ((7, 7), (1, 1), (1, 1)), ((3, 3), (1, 1), (1, 3))]


def program_inputs(B, H, W, kernel_size):
    generator = torch.Generator().manual_seed(B * H * W)
    table = (2, *(2 * k - 1 for k in kernel_size))
    return [torch.randn(s, generator=generator) for s in ((B, H, W, 20), table, (2, 3), (2, 4))]


MODULES = [*((Attention, window) for window in WINDOWS), (Aggregated, WINDOWS[0])]


@pytest.mark.parametrize(("kind", "window"), MODULES, ids=str)
def test_compiles_without_a_break_for_any_size(kind, window):
    torch._dynamo.reset()
    eager = kind(*window)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 9, 10), (3, 15, 13), (1, 16, 8)):
        tensors = program_inputs(*size, window[0])
        grad = torch.randn(eager(*tensors).shape)
        found, expected = (run(lambda t, f=f: f(*t), tensors, grad) for f in (compiled, eager))
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                close(a, b, "rerun", str(size))


@needs_triton
def test_compiles_kernels_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(triton_form, backend="aot_eager", fullgraph=True)
    check(compiled, CASES[1], torch.float32, DEVICE)


@pytest.mark.parametrize(("kind", "window"), MODULES, ids=str)
def test_exports_plain_operators_for_any_size(kind, window):
    """Recorded at one size, run at others, maps smaller than the window included."""
    model, dim = kind(*window), torch.export.Dim
    sizes = {0: dim("batch", min=1, max=8), 1: dim("height", min=2, max=64), 2: dim("width", min=2, max=64)}
    program = torch.export.export(
        model,
        tuple(program_inputs(2, 19, 16, window[0])),
        dynamic_shapes=(sizes, None, None, None),
        strict=False,
    )
    assert "vizoo" not in str(program.graph)
    for size in ((2, 19, 16), (3, 5, 13), (2, 40, 9), (1, 2, 3)):
        tensors = program_inputs(*size, window[0])
        close(program.module()(*tensors), model(*tensors), "graph", str(size))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_scripts(f):
    scripted = torch.jit.script(f)
    for case in (CASES[2], CASES[3], CASES[5]):
        check(scripted, case, torch.float32)
    check(scripted, CASES[3], torch.float32, change=additional(3, "hN"), boundary="mask")


def test_transforms():
    """``torch.func.vmap`` and ``jvp`` of a plain form."""
    case = (1, 3, 4, 1, 2, 2, (3, 3), (1, 1), (1, 1))
    q, *rest = additional(3, "1N")(inputs(*case))

    def f(q, backend="auto"):
        return call(neighborhood_attention, [q, *rest], case, boundary="mask", backend=backend)

    many = torch.stack([q, 2 * q])
    op_close(torch.func.vmap(f)(many), torch.stack([f(t) for t in many]))
    tangent = torch.randn_like(q)
    (expected,) = torch.autograd.grad(f(q.requires_grad_()), q, ones := torch.randn_like(q))
    op_close((torch.func.jvp(f, (q,), (tangent,))[1] * ones).sum(), (expected * tangent).sum())


# arguments


def others(keys=None, values=None, bias=None):
    keys = torch.zeros(2, 6, 2, 3) if keys is None else keys
    values = torch.zeros(2, 6, 2, 4) if values is None else values
    return dict(zip(ADDITIONAL, (keys, values, bias), strict=True))


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 7, 6)}, r"got q of shape \[2, 5, 7, 6\], need \[B, H, W, h, d\]"),
        ({"k": torch.zeros(2, 5, 7, 2, 4)}, r"got k of shape \[2, 5, 7, 2, 4\], need that of q, \[2, 5, 7, 2, 3\]"),
        ({"v": torch.zeros(2, 5, 6, 2, 4)}, r"got v of shape \[2, 5, 6, 2, 4\], need \[2, 5, 7, 2\] and one more"),
        ({"v": torch.zeros(2, 5, 7, 2, 4).half()}, "got q, k and v in torch.float32, torch.float32 and torch.float16"),
        ({"kernel_size": 0}, r"got kernel_size=\(0, 0\), need at least 1"),
        ({"stride": (1, 4)}, r"got stride=\(1, 4\), need 1 to kernel_size=\(3, 3\)"),
        ({"stride": 0}, r"got stride=\(0, 0\), need 1 to"),
        ({"dilation": (1, 0)}, r"got dilation=\(1, 0\), need at least 1"),
        ({"rpb": torch.zeros(2, 5, 6)}, r"got rpb of shape \[2, 5, 6\], need \[2, 5, 5\]"),
        ({"pad_k": torch.zeros(3, 2)}, r"got pad_k of shape \[3, 2\], need \[2, 3\]"),
        ({"pad_v": torch.zeros(2, 3)}, r"got pad_v of shape \[2, 3\], need \[2, 4\]"),
        ({"boundary": "pad"}, "got boundary='pad', need 'shift' or 'mask'"),
        ({"additional_keys": torch.zeros(2, 6, 2, 3)}, "got one of additional_keys, additional_values and"),
        ({"additional_bias": torch.zeros(2, 35, 6)}, "got one of additional_keys, additional_values and"),
        (others(torch.zeros(3, 6, 2, 3)), r"got additional_keys of shape \[3, 6, 2, 3\], need \[2 or 1, P, 2, 3\]"),
        (others(torch.zeros(2, 0, 2, 3)), "with P of at least 1"),
        (others(values=torch.zeros(1, 6, 2, 4)), r"got additional_values of shape \[1, 6, 2, 4\], need \[2, 6, 2, 4\]"),
        (others(torch.zeros(2, 6, 2, 3).half()), "got additional keys and values in torch.float16 and torch.float32"),
        (others(bias=torch.zeros(2, 7, 6)), r"got additional_bias of shape \[2, 7, 6\], need \[2 or 1, 35 or 1, 6\]"),
    ],
)
def test_rejects(f, change, message):
    q, v = torch.zeros(2, 5, 7, 2, 3), torch.zeros(2, 5, 7, 2, 4)
    with pytest.raises(ValueError, match=message):
        f(**{"q": q, "k": q, "v": v, "kernel_size": 3, **change})


def test_rejects_backends():
    q = torch.zeros(1, 3, 3, 1, 4)
    with pytest.raises(ValueError, match="got backend='flex', need 'auto', 'torch', 'triton' or 'natten'"):
        neighborhood_attention(q, q, q, 3, backend="flex")
    with pytest.raises(ValueError, match=r"got backend='natten', but the tensors are on meta, not on a CUDA device"):
        neighborhood_attention(*[q.to("meta")] * 3, 3, backend="natten")
    with pytest.raises(ValueError, match="backend='natten', but NATTEN takes CPU tensors only without gradients"):
        neighborhood_attention(q.clone().requires_grad_(), q, q, 3, backend="natten")
    with pytest.raises(
        ValueError, match=r"got backend='natten', but NATTEN takes up to 512 channels on a CPU, not 533"
    ):
        neighborhood_attention(*[torch.zeros(1, 23, 23, 1, 4)] * 3, 23, rpb=torch.zeros(1, 45, 45), backend="natten")
    with pytest.raises(ValueError, match="got backend='natten', but NATTEN shifts windows at the border"):
        neighborhood_attention(q, q, q, 3, boundary="mask", backend="natten")
    with pytest.raises(ValueError, match="got backend='natten', but NATTEN takes no bias of additional keys"):
        call(neighborhood_attention, additional(2, "hN")([q, q, q, *[None] * 3]), (3, 1, 1), backend="natten")
    with pytest.raises(ValueError, match=r"backend='natten', but NATTEN takes windows of at least 2, not \(1, 3\)"):
        neighborhood_attention(q, q, q, (1, 3), backend="natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but .*not torch.float64"):
        neighborhood_attention(*[q.double()] * 3, 3, backend="triton")
    wide = torch.zeros(1, 3, 3, 1, 129)
    with pytest.raises(ValueError, match="up to 128 channels per head, not 129"):
        neighborhood_attention(wide, wide, wide, 3, backend="triton")


def test_auto_never_interprets(monkeypatch):
    """On CPU tensors the kernels, and NATTEN, run only when a caller insists."""
    calls = []
    monkeypatch.setattr(_neighborhood_kernels, "kernel_forward", lambda *a: calls.append(a))
    monkeypatch.setattr(module, "_natten_form", lambda *a: calls.append(a))
    call(neighborhood_attention, [t.float() for t in inputs(*CASES[1])], CASES[1])
    assert calls == []
