import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from tolerance import close, op_close
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops import _halo_kernels
from vizoo.backbones.ops import halo as module
from vizoo.backbones.ops.backend import HAS_TRITON
from vizoo.backbones.ops.cost import COSTS
from vizoo.backbones.ops.halo import halo_attention, reference_halo_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter is wrong in bfloat16
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")
NAMES = ("out", "dq", "dk", "dv", "dheight_rel", "dwidth_rel")
# B, H, W, h, d, dv, block_size, halo_size, stride
CASES = [
    (1, 1, 1, 1, 1, 1, 8, 3, 1),  # one pixel in a block of 64
    (2, 5, 7, 2, 3, 4, 4, 1, 2),  # partial blocks in both directions, strided
    (1, 9, 6, 1, 20, 3, 2, 3, 1),  # a window over five blocks on an axis
    (1, 7, 5, 2, 3, 2, 3, 0, 3),  # no halo, one query for each block
    (1, 3, 11, 1, 5, 7, 8, 3, 1),  # fewer rows than a block
    (0, 5, 7, 2, 3, 4, 4, 1, 1),
    (3, 12, 20, 2, 5, 3, 4, 2, 1),
    (1, 13, 9, 1, 16, 17, 10, 3, 2),
    (2, 16, 24, 4, 16, 16, 8, 3, 1),
    (1, 3, 4, 2, 3, 4, 4, 1, 1),  # one block, two heads: its queries are a view
]
SMALL = CASES[:6]  # for the interpreter
# scale, scale_pos_embed, pad_mode, rel_index
PLAIN = (None, False, "zero", "array")
OTHER = (0.7, True, "mask", "pixel")
ALL = list(itertools.product((None, 0.7), (False, True), ("zero", "mask"), ("array", "pixel")))


def ids(case):
    return "x".join(map(str, case)) if isinstance(case, tuple) else None


def inputs(B, H, W, h, d, dv, block_size, halo_size, stride):
    generator = torch.Generator().manual_seed(42)
    rows = 2 * (block_size + 2 * halo_size) - 1
    shapes = [
        (B, -(-H // stride), -(-W // stride), h, d),
        (B, H, W, h, d),
        (B, H, W, h, dv),
        (rows, d),
        (rows, d),
    ]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def loop(q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, scale_pos_embed, pad_mode, rel_index):
    """Halo attention of one query after the other: the keys of its block's window, off-map ones zero or left out."""
    B, H, W, h, d = k.shape
    w, side = block_size + 2 * halo_size, block_size // stride
    scale = d**-0.5 if scale is None else scale
    out = q.new_zeros(*q.shape[:4], v.shape[4])
    for b, Y, X, g in itertools.product(*map(range, q.shape[:4])):
        (block_y, i), (block_x, m) = divmod(Y, side), divmod(X, side)
        if rel_index == "pixel":
            i, m = i * stride, m * stride
        logits, values = [], []
        for j, n in itertools.product(range(w), range(w)):
            y, x = block_y * block_size - halo_size + j, block_x * block_size - halo_size + n
            on_map = 0 <= y < H and 0 <= x < W
            if pad_mode == "mask" and not on_map:
                continue
            query = q[b, Y, X, g]
            relative = query @ height_rel[j - i + w - 1] + query @ width_rel[n - m + w - 1]
            content = query @ k[b, y, x, g] if on_map else 0.0
            logits.append(scale * content + relative * (scale if scale_pos_embed else 1.0))
            values.append(v[b, y, x, g] if on_map else torch.zeros_like(v[0, 0, 0, 0]))
        out[b, Y, X, g] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def run(f, tensors, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check(f, case, dtype, options=PLAIN, device="cpu", change=lambda *t: t):
    """Output and every gradient of ``f`` in ``dtype`` against the reference in float64."""
    sizes = case[-3:]
    tensors = change(*(t.to(device, dtype) for t in inputs(*case)))
    shape = (*tensors[0].shape[:4], case[5])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def reference(*t):
        return reference_halo_attention(*t, *sizes, *options)

    truth = run(reference, [t.double() for t in tensors], grad.double())
    plain = run(reference, tensors, grad)
    found = run(lambda *t: f(*t, *sizes, *options), tensors, grad)
    for name, a, t, p in zip(NAMES, found, truth, plain, strict=True):
        if t.numel() > 0:
            op_close(a, t, p, grad=name != "out", what=name)
        else:
            assert a.shape == t.shape, name


def triton_form(*args):
    return halo_attention(*args, "triton")


@pytest.fixture
def small_chunks(monkeypatch):
    """A few blocks at a time also on tiny maps."""
    monkeypatch.setattr(module, "CHUNK", 2000)
    monkeypatch.setattr(module, "FUSED_CHUNK", 2000)


# the definition


@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
@pytest.mark.parametrize("case", [CASES[1], (1, 4, 3, 1, 2, 3, 2, 2, 1), (1, 3, 2, 2, 2, 1, 4, 1, 2)], ids=ids)
@pytest.mark.parametrize("options", ALL, ids=str)
def test_is_the_definition(f, case, options):
    op_close(f(*inputs(*case), *case[-3:], *options), loop(*inputs(*case), *case[-3:], *options))


@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=str)
def test_gradients_at_the_border(f, options):
    """Every gradient of the definition: partial blocks, windows over every side of the map, larger than the map."""
    for case in [(1, 5, 3, 1, 2, 3, 2, 1, 1), (1, 4, 6, 1, 2, 1, 2, 2, 2), (1, 2, 3, 2, 2, 2, 4, 1, 1)]:
        tensors = inputs(*case)
        grad = torch.randn(*tensors[0].shape[:4], case[5], dtype=torch.float64)
        found, truth = (run(lambda *t, g=g: g(*t, *case[-3:], *options), tensors, grad) for g in (f, loop))  # noqa: B023
        for name, a, t in zip(NAMES, found, truth, strict=True):
            op_close(a, t, grad=name != "out", what=f"{name} of {case}")


@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=str)
def test_gradcheck(f, options):
    case = (1, 3, 5, 2, 2, 1, 2, 1, 2)
    tensors = [t.requires_grad_() for t in inputs(*case)]
    assert torch.autograd.gradcheck(lambda *t: f(*t, *case[-3:], *options), tensors)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
def test_is_the_peer(f, stride):
    """timm's module, on maps of whole blocks: output and the gradients of its input and parameters."""
    peer = HaloAttn(16, 24, num_heads=2, dim_head=6, block_size=4, halo_size=2, stride=stride)
    x = torch.randn(2, 16, 8, 12, requires_grad=True)

    def ours(x):
        q, kv = peer.q(x).permute(0, 2, 3, 1), peer.kv(x).permute(0, 2, 3, 1)
        k, v = kv.unflatten(-1, (2, 18)).split([6, 12], -1)
        tables = peer.pos_embed.height_rel, peer.pos_embed.width_rel
        return f(q.unflatten(-1, (2, 6)), k, v, *tables, 4, 2, stride).flatten(3).permute(0, 3, 1, 2)

    expected = peer(x)
    grad = torch.randn_like(expected)
    close(ours(x), expected, "rerun")
    wanted = [x, *peer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, wanted, grad) for y in (ours(x), expected)), strict=True):
        close(a, b, "gradient")


def test_rows_that_are_never_read_get_no_gradient():
    case = CASES[6]
    unread = 2 * case[7]
    tensors = [t.requires_grad_() for t in inputs(*case)]
    halo_attention(*tensors, *case[-3:]).sum().backward()
    for t in tensors[3:]:
        assert (t.grad[:unread] == 0).all()
        assert (t.grad[unread:] != 0).any(1).all()


# the chunked form


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_chunks(case, dtype):
    check(halo_attention, case, dtype)


@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=ids)
def test_several_chunks(small_chunks, case, options):
    check(halo_attention, case, torch.float32, options)


@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_products_of_half_precision(monkeypatch, case, options):
    """As on a processor that has them; on others they are emulated."""
    monkeypatch.setattr(module, "multiplies", lambda x: True)
    check(halo_attention, case, torch.bfloat16, options)


@pytest.mark.parametrize("size", [1, 3, 8, 9, 16, 21, 24, 50])
@pytest.mark.parametrize(("block_size", "halo_size", "stride"), [(8, 3, 1), (4, 6, 2), (2, 0, 2), (3, 9, 1)])
def test_windows_of_blocks(size, block_size, halo_size, stride):
    """Every block once, its keys on the map first to last, and the places off the map."""
    b, side, queries = block_size, block_size // stride, -(-size // stride)
    seen = {}
    for blocks in module._axis(queries, size, block_size, halo_size, stride):
        for i in range(blocks.blocks):
            one = blocks.part(i, 1)
            inside = list(range(one.first[0], one.first[0] + one.keys))
            outside = sorted(place for n, first, _ in one.outside for place in range(first, first + n))
            seen[one.block] = one.queries, inside, outside
    assert sorted(seen) == list(range(-(-size // b)))
    for block, found in seen.items():
        places = range(b + 2 * halo_size)
        inside = [i for i in places if 0 <= block * b - halo_size + i < size]
        count = min(side, queries - block * side)
        assert found == (count, inside, [i for i in places if i not in inside])


@pytest.mark.parametrize("limit", [1, 300, 1200, 6000, 1 << 18])
def test_chunks_cover_every_block_once(monkeypatch, limit):
    """Parts of a row of blocks, rows, parts of the batch, everything: 4 heads, 2 x 2 queries, 3 x 3 keys a block."""
    monkeypatch.setattr(module, "CHUNK", limit)
    q, k, v, *tables = inputs(5, 6, 10, 4, 1, 1, 2, 0, 1)
    chunks = module._Chunks(q, k, v, *tables, 2, 0, 1, 1.0, 1.0, False, False)
    seen = torch.zeros(5, 3, 5)
    largest = 0
    for at in chunks:
        seen[at] += 1
        largest = max(largest, seen[at].numel() * 4 * 4 * 4)
    assert (seen == 1).all()
    assert largest <= max(limit, 64)
    assert largest * 4 > min(limit, 5 * 15 * 64)  # nor are they needlessly small


def test_memory_of_inference():
    """Neither windows nor scores of the whole map: no tensor is larger than a chunk or the padded map."""
    B, H, W, h, d, b, r = 1, 64, 64, 2, 4, 8, 3
    tensors = [t.float() for t in inputs(B, H, W, h, d, d, b, r, 1)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with torch.no_grad(), Watch():
        module._fused_forward(*tensors, b, r, 1, d**-0.5, 1.0, False, False)
    padded = h * (H + b) * (W + b) * 2 * d
    assert largest <= 4 * max(module.FUSED_CHUNK, padded)
    assert h * H * W * (b + 2 * r) ** 2 > module.FUSED_CHUNK  # else this would show nothing


@pytest.mark.slow
@pytest.mark.parametrize("case", [(1, 64, 64, 4, 16, 16, 8, 3, 1), (1, 30, 43, 8, 16, 40, 14, 2, 1)], ids=ids)
def test_full_size(case):
    check(halo_attention, case, torch.float32)


# the kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_kernels(case, dtype):
    check(triton_form, case, dtype, device=DEVICE)


@needs_triton
@pytest.mark.parametrize("case", SMALL[2:5], ids=ids)
def test_kernels_mask_and_scale(case):
    check(triton_form, case, torch.float16, OTHER, DEVICE)


@needs_triton
@pytest.mark.parametrize(("d", "dv"), [(33, 1), (1, 130), (64, 65)])
def test_kernels_mask_channels(d, dv):
    check(triton_form, (1, 3, 5, 1, d, dv, 3, 1, 1), torch.float32, device=DEVICE)


@needs_triton
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_kernels_take_any_scale(scale):
    check(triton_form, (1, 3, 2, 1, 3, 2, 2, 1, 1), torch.float32, (scale, False, "mask", "array"), DEVICE)


@needs_triton
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_small_gradients_do_not_vanish_in_float16(size):
    """The tables' gradients are float32: what the kernels lose they lose before."""
    case = (1, 3, 5, 1, 3, 2, 2, 1, 1)
    tensors = [t.to(DEVICE, torch.float16 if i < 3 else torch.float32) for i, t in enumerate(inputs(*case))]
    grad = torch.randn(1, 3, 5, 1, 2, generator=torch.Generator().manual_seed(1)).mul(size).to(DEVICE, torch.float16)
    found = run(lambda *t: triton_form(*t, *case[-3:], *PLAIN), tensors, grad)
    truth = run(lambda *t: reference_halo_attention(*t, *case[-3:]), [t.double() for t in tensors], grad.double())
    for name, a, t in list(zip(NAMES, found, truth, strict=True))[4:]:
        close(a.double() / size, t / size, "gradient", name)


def launch(dtype=torch.float32, width=8):
    from vizoo.backbones.ops._halo_kernels import _Launch

    q = torch.empty(1, 8, width, 1, 16, dtype=dtype, device="meta")
    table = torch.empty(27, 16, device="meta")
    return _Launch(q, q, q, table, table, 8, 3, 1, 0.25, 1.0, False, False)


@needs_triton
@pytest.mark.parametrize(("setting", "precision"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")])
def test_kernels_follow_the_precision_of_matrix_products(setting, precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert launch().arguments["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@needs_triton
def test_kernels_index_large_images_in_64_bits():
    import triton.language as tl

    assert launch(width=1 << 20).arguments["INDEX"] == tl.int32
    assert launch(width=1 << 24).arguments["INDEX"] == tl.int64


@needs_triton
@pytest.mark.parametrize("queries", [1, 16, 25, 64, 100, 144, 196, 1024])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("window", [6, 14, 18])
def test_every_width_has_a_tile(half, queries, window):
    from vizoo.backbones.ops._halo_kernels import _choice

    for kernel, width in itertools.product(("forward", "query", "key"), range(32, 2 * module.MAX_CHANNELS + 1, 16)):
        tile = _choice(kernel, half, width, queries, window)
        assert 16 <= tile.queries <= max(16, 2 * queries)
        assert kernel != "key" or max(tile.rows, tile.cols) <= 8  # their one-hot matrix has 8 + 8 columns


@needs_triton
@pytest.mark.slow
def test_kernels_in_full_tiles():
    """196 queries and 324 keys to a block, both with a partial last tile."""
    check(triton_form, (1, 5, 15, 1, 16, 40, 14, 2, 1), torch.float16, device=DEVICE)


@needs_triton
@pytest.mark.slow
def test_training_with_kernels_is_training_without():
    """The same losses over 20 steps; every input is trained."""
    case = (1, 2, 3, 1, 3, 2, 2, 1, 1)
    target = torch.randn(1, 2, 3, 1, 2, generator=torch.Generator().manual_seed(7)).to(DEVICE)

    def losses(backend):
        parameters = [(0.3 * t).float().to(DEVICE).requires_grad_() for t in inputs(*case)]
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        found = []
        for _ in range(20):
            loss = F.mse_loss(halo_attention(*parameters, *case[-3:], *PLAIN, backend), target)
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
    case = (3, 45, 33, 4, 16, 24, 8, 3, 1)
    tensors = [t.float().cuda() for t in inputs(*case)]
    grad = torch.randn(3, 45, 33, 4, 24, device="cuda")
    first, second = (run(lambda *t: triton_form(*t, *case[-3:], *PLAIN), tensors, grad) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


# both


def views_of_one_tensor(q, k, v, *tables):
    kv = torch.cat([k, v], -1)
    return q, *kv.split([k.shape[-1], v.shape[-1]], -1), *tables


def strided(*tensors):
    return (
        *(t.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2] for t in tensors[:2]),
        tensors[2],
        *(t[:, ::2] for t in tensors[3:]),
    )


@pytest.mark.parametrize("change", [views_of_one_tensor, strided])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_inputs_need_not_be_contiguous(backend, change):
    check(lambda *a: halo_attention(*a, backend), CASES[1], torch.float32, PLAIN, DEVICE, change)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_mixed_dtypes(backend):
    """As under autocast: half projections, float32 tables; logits that overflow float16 stay finite."""
    case = (1, 5, 7, 2, 16, 4, 4, 1, 1)
    q, k, v, *tables = (t.to(DEVICE) for t in inputs(*case))
    tensors = [(60 * q).half(), (300 * k).half(), v.half(), *(t.float() for t in tables)]
    truth = reference_halo_attention(*(t.double() for t in tensors), *case[-3:])
    assert (tensors[0][0, 0, 0, 0].float() * tensors[1][0, 0, 0, 0].float()).abs().sum() > 65504
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for f in (lambda *a: halo_attention(*a, *PLAIN, backend), reference_halo_attention):
            out = f(*tensors, *case[-3:])
            assert out.dtype == torch.float16
            op_close(out, truth)
    mixed = halo_attention(tensors[0].float(), *tensors[1:], *case[-3:], *PLAIN, backend)
    assert mixed.dtype == torch.float16
    op_close(mixed, truth)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("change", [lambda *t: t, views_of_one_tensor], ids=["plain", "views"])
def test_opcheck(backend, change):
    case = (1, 2, 3, 1, 2, 3, 2, 1, 2)
    tensors = [t.detach().requires_grad_() for t in change(*(t.float().to(DEVICE) for t in inputs(*case)))]
    args = (*case[-3:], 0.7, 0.7, True, False, backend == "triton")
    torch.library.opcheck(torch.ops.vizoo.halo_attention.default, (*tensors, *args, True))
    plain = [t.detach() for t in tensors]
    outputs = torch.ops.vizoo.halo_attention(*plain, *args, True)
    backward = torch.ops.vizoo.halo_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(outputs[0]), *outputs, *plain, *args))


@pytest.mark.parametrize(
    ("case", "device"),
    [(CASES[4], DEVICE), (CASES[1], "meta"), (CASES[4], "meta"), ((2, 7, 5, 2, 3, 5, 6, 2, 3), "meta")],
    ids=ids,
)
def test_counts_are_those_of_the_definition(case, device):
    """``Nq * (w^2 (d + dv) + 2 (2w - 1) d)`` per head, ``Nq`` in whole blocks; twice that backward, on every path."""
    B, H, W, h, d, dv, block_size, halo_size, stride = case
    w = block_size + 2 * halo_size
    queries = B * -(-H // block_size) * -(-W // block_size) * (block_size // stride) ** 2
    macs = queries * h * (w * w * (d + dv) + 2 * (2 * w - 1) * d)
    paths = {"reference": reference_halo_attention, "torch": halo_attention}
    if HAS_TRITON:
        paths["triton"] = lambda *a: halo_attention(*a, *PLAIN, "triton")
    for name, f in paths.items():
        tensors = [t.float().to(device).requires_grad_() for t in inputs(*case)]
        with FlopCounterMode(display=False) as counter:
            out = f(*tensors, *case[-3:])
            assert counter.get_total_flops() == 2 * macs, name
            out.sum().backward()
        assert counter.get_total_flops() == 6 * macs, name
    shapes = [tuple(t.shape) for t in tensors]
    cost = COSTS["vizoo::halo_attention"](*shapes, *case[-3:], 1.0, 1.0, False, False, False, out=tuple(out.shape))
    assert cost.macs == macs
    assert cost.acts == queries * h * (w * w + 2 * (2 * w - 1) + dv)


# programs


class Attention(torch.nn.Module):
    """As in a model: keys and values from one projection, queries strided."""

    def __init__(self, f=halo_attention, options=PLAIN, stride=1):
        super().__init__()
        self.f, self.options, self.stride = f, options, stride

    def forward(self, x, height_rel, width_rel):
        k, v = x.unflatten(-1, (2, 7)).split([3, 4], -1)
        q = 0.5 * k[:, :: self.stride, :: self.stride]
        return self.f(q, k, v, height_rel, width_rel, 4, 1, self.stride, *self.options)


def program_inputs(B, H, W):
    generator = torch.Generator().manual_seed(B * H * W)
    return [torch.randn(s, generator=generator) for s in ((B, H, W, 14), (11, 3), (11, 3))]


@pytest.mark.parametrize(
    ("f", "options", "stride"), [(halo_attention, PLAIN, 2), (reference_halo_attention, OTHER, 1)], ids=["op", "ref"]
)
def test_compiles_without_a_break_for_any_size(f, options, stride):
    torch._dynamo.reset()
    eager = Attention(f, options, stride)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 9, 6), (3, 5, 13), (1, 16, 8), (2, 2, 3)):
        tensors = program_inputs(*size)
        grad = torch.randn(eager(*tensors).shape)
        for a, b in zip(run(compiled, tensors, grad), run(eager, tensors, grad), strict=True):
            close(a, b, "rerun", str(size))


@needs_triton
def test_compiles_kernels_without_a_break():
    torch._dynamo.reset()
    case = CASES[1]
    compiled = torch.compile(lambda *t: triton_form(*t, *case[-3:], *PLAIN), backend="aot_eager", fullgraph=True)
    check(lambda *a: compiled(*a[:5]), case, torch.float32, device=DEVICE)


@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_exports_plain_operators_for_any_size(options, stride):
    """Recorded at a map of several blocks, run at maps of one, of whole blocks and of partial ones."""
    model, dim = Attention(halo_attention, options, stride), torch.export.Dim
    sizes = {0: dim("batch", min=1, max=8), 1: dim("height", min=3, max=64), 2: dim("width", min=3, max=64)}
    program = torch.export.export(
        model, tuple(program_inputs(2, 9, 6)), dynamic_shapes=(sizes, None, None), strict=False
    )
    assert "vizoo" not in str(program.graph)
    for size in ((2, 9, 6), (3, 5, 13), (2, 16, 8), (2, 4, 4), (2, 3, 7)):
        tensors = program_inputs(*size)
        close(program.module()(*tensors), model(*tensors), "graph", str(size))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
def test_scripts(f):
    scripted = torch.jit.script(f)
    check(scripted, CASES[1], torch.float32, OTHER)
    check(scripted, CASES[2], torch.float32)


# arguments


def rejected(change):
    case = [torch.zeros(t.shape) for t in inputs(2, 5, 7, 2, 3, 4, 4, 1, 2)] + [4, 1, 2, None, False, "zero", "array"]
    for i, value in change.items():
        case[i] = value
    return case


@pytest.mark.parametrize("f", [reference_halo_attention, halo_attention])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 5, 7, 2, 3)}, r"got q \[2, 5, 7, 2, 3\].*need \[B, ceil\(H / 2\), ceil\(W / 2\), h, d\]"),
        ({0: torch.zeros(2, 3, 4, 6)}, r"got q \[2, 3, 4, 6\].*need \[B, H, W, h, d\] each"),
        ({2: torch.zeros(2, 5, 7, 1, 4)}, r"got v \[2, 5, 7, 1, 4\], need \[2, 5, 7, 2, dv\]"),
        ({3: torch.zeros(10, 3)}, r"got height_rel \[10, 3\].*need \[11, 3\]"),
        ({4: torch.zeros(11, 4)}, r"width_rel \[11, 4\], need \[11, 3\]"),
        ({5: 0}, "got block_size=0 and halo_size=1, need at least 1 and 0"),
        ({6: -1}, "got block_size=4 and halo_size=-1"),
        ({7: 3}, "got stride=3, need a divisor of block_size=4"),
        ({7: 0}, "got stride=0, need a divisor of block_size=4"),
        ({10: "reflect"}, "got pad_mode='reflect', need 'zero' or 'mask'"),
        ({11: "row"}, "got rel_index='row', need 'array' or 'pixel'"),
    ],
)
def test_rejects(f, change, message):
    with pytest.raises(ValueError, match=message):
        f(*rejected(change))


def test_rejects_backends():
    with pytest.raises(ValueError, match="got backend='natten', need 'auto', 'torch' or 'triton'"):
        halo_attention(*rejected({}), "natten")
    with pytest.raises(ValueError, match=r"got backend='triton', but .*not torch.float64"):
        triton_form(*inputs(*CASES[1]), *CASES[1][-3:], *PLAIN)
    with pytest.raises(ValueError, match="up to 256 channels per head, half in queries, not 1, 257"):
        triton_form(*(t.float() for t in inputs(1, 1, 1, 1, 1, 257, 1, 0, 1)), 1, 0, 1, *PLAIN)
    with pytest.raises(ValueError, match="tables with up to 8192 numbers in use, not 99 rows of 65"):
        triton_form(*(t.float() for t in inputs(1, 1, 1, 1, 65, 1, 50, 0, 1)), 50, 0, 1, *PLAIN)
    with pytest.raises(ValueError, match="tables with up to 128 rows in use, not 129"):
        triton_form(*(t.float() for t in inputs(1, 1, 1, 1, 1, 1, 65, 0, 1)), 65, 0, 1, *PLAIN)


def test_auto_never_interprets(monkeypatch):
    """On CPU tensors the kernels run only when a caller insists."""
    calls = []
    monkeypatch.setattr(_halo_kernels, "kernel_forward", lambda *a: calls.append(a))
    halo_attention(*(t.float() for t in inputs(*CASES[1])), *CASES[1][-3:])
    assert calls == []
