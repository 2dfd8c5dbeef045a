import pytest
import torch
import torch.nn.functional as F
from tolerance import op_close

from vizoo.backbones.ops import backend, conv_ffn
from vizoo.backbones.ops.linear import linear

SIZES = [(1, 1, 1, 3, 5), (2, 3, 7, 8, 16), (3, 5, 2, 7, 13), (5, 9, 4, 16, 64)]  # B, H, W, C, hidden
LACKING = pytest.mark.skipif(torch.bfloat16 not in backend.onednn_dtypes(), reason="no bfloat16 on this processor")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=LACKING)]
gating = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def tensors(B, H, W, C, M, gated=False):
    g = torch.Generator().manual_seed(42)
    first = 2 * M if gated else M
    shapes = [(B, H, W, C), (first, C), (first,), (M, 1, 3, 3), (M,), (C, M), (C,)]
    scales = [1, C**-0.5, 1, 1 / 3, 1, M**-0.5, 1]
    return [s * torch.randn(*shape, generator=g, dtype=torch.float64) for s, shape in zip(scales, shapes, strict=True)]


def loop(x, w1, b1, wd, bd, w2, b2):
    B, H, W, _ = x.shape
    hidden = x @ w1.T + b1
    hidden, factor = hidden[..., : len(wd)], hidden[..., len(wd) :]
    mixed = torch.zeros_like(hidden)
    for y in range(H):
        for p in range(W):
            for i in range(3):
                for j in range(3):
                    if 0 <= y + i - 1 < H and 0 <= p + j - 1 < W:
                        mixed[:, y, p] += hidden[:, y + i - 1, p + j - 1] * wd[:, 0, i, j]
    mixed = mixed + bd
    gelu = mixed * 0.5 * (1 + torch.erf(mixed / 2**0.5))
    return (gelu * factor if len(w1) > len(wd) else gelu) @ w2.T + b2


@gating
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_definition(size, gated):
    args = tensors(*size, gated)
    op_close(conv_ffn.reference_conv_ffn(*args), loop(*args))


@gating
def test_gradcheck(gated):
    args = [t.requires_grad_() for t in tensors(1, 2, 3, 2, 3, gated)]
    assert torch.autograd.gradcheck(conv_ffn.reference_conv_ffn, args)


@pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")
@gating
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onednn(size, bias, dtype, gated, monkeypatch):
    """The inference path, also cut into chunks of uneven size, against float64."""
    args = [t if bias or t.dim() > 1 else None for t in tensors(*size, gated)]
    half = [None if t is None else t.to(dtype) for t in args]
    truth = conv_ffn.reference_conv_ffn(*(None if t is None else t.double() for t in half))
    plain = conv_ffn.reference_conv_ffn(*half)
    with torch.no_grad():
        assert backend.use_onednn(half[0], half[1])
        op_close(conv_ffn.conv_ffn(*half), truth, plain, what="whole")
        _, H, W, _, M = size
        monkeypatch.setattr(conv_ffn, "_CHUNK_BYTES", 2 * H * W * M * half[0].element_size())
        op_close(conv_ffn.conv_ffn(*half), truth, plain, what="two images at a time")
        monkeypatch.setattr(conv_ffn, "_CHUNK_BYTES", 1)
        op_close(conv_ffn.conv_ffn(*half), truth, plain, what="one image at a time")


@pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_onednn_reads_strided_inputs(dtype):
    args = [t.to(dtype) for t in tensors(2, 5, 3, 8, 16)]
    wide = torch.randn(2, 8, 5, 6).to(dtype)
    x = wide.permute(0, 2, 3, 1)[:, :, ::2]  # [2, 5, 3, 8]
    truth = conv_ffn.reference_conv_ffn(x.double(), *(t.double() for t in args[1:]))
    with torch.no_grad():
        op_close(conv_ffn.conv_ffn(x, *args[1:]), truth)
        op_close(linear(x, args[1], args[2]), F.linear(x.double(), args[1].double(), args[2].double()))


@pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")
@gating
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (0, 3, 2, 4, 8)], ids=str)
def test_compiled_operators(size, bias, gated):
    args = [t.float() if bias or t.dim() > 1 else None for t in tensors(*size, gated)]
    strided = args[0].transpose(1, 2)
    for x in (args[0], strided):
        torch.library.opcheck(torch.ops.vizoo.conv_ffn.default, (x, *args[1:]))
        torch.library.opcheck(torch.ops.vizoo.linear.default, (x, args[1], args[2]))


@pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_inference_keeps_onednn(dtype):
    """One graph with the operators inside; with gradients or for export they are plain."""
    args = [t.to(dtype) for t in tensors(2, 3, 7, 8, 16)]
    names: list[str] = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    class Net(torch.nn.Module):
        def forward(self, x, w1, b1, wd, bd, w2, b2):
            return linear(conv_ffn.conv_ffn(x, w1, b1, wd, bd, w2, b2), w1, b1)

    compiled = torch.compile(Net(), backend=look, fullgraph=True)
    with torch.no_grad():
        truth = Net()(*(t.double() for t in args))
        plain = F.linear(conv_ffn.reference_conv_ffn(*args), args[1], args[2])
        op_close(compiled(*args), truth, plain)
        assert {n for n in names if "vizoo" in n} == {"vizoo.conv_ffn", "vizoo.linear"}
        names.clear()
        exported = torch.export.export(Net(), tuple(args), strict=True)
        assert "vizoo" not in str(exported.graph)
    compiled(*args)
    assert names
    assert not [n for n in names if "vizoo" in n]
