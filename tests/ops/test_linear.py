"""When a linear layer leaves oneDNN to plain operators; its values are tested with ConvFFN, which is built alike."""

import torch
import torch.nn.functional as F

from vizoo.backbones.ops import backend
from vizoo.backbones.ops.linear import linear


def test_onednn_stands_back():
    """Autograd, autocast, other dtypes and tracing get plain operators; the results are theirs."""
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    assert not backend.use_onednn(x, w)  # autograd is on
    with torch.no_grad():
        assert not backend.use_onednn(x.double(), w.double())
        assert not backend.use_onednn(x.half(), w.half())
        assert not backend.use_onednn(x.bfloat16(), w)
        assert not backend.use_onednn(x[:0], w)
        assert not backend.use_onednn(x.to("meta"), w.to("meta"))
        with torch.autocast("cpu"):
            assert not backend.use_onednn(x, w)
            assert linear(x, w).dtype == torch.bfloat16
        traced = torch.jit.trace(linear, (x, w))
        assert "mkldnn" not in str(traced.inlined_graph)
        torch.testing.assert_close(linear(x, w), F.linear(x, w))
    weight = w.requires_grad_()
    assert linear(x, weight).requires_grad


def test_processors_without_bfloat16(monkeypatch):
    """PyTorch's operators have bfloat16 everywhere, oneDNN's only where the processor has."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert backend.onednn_dtypes() == (torch.float32,)
    monkeypatch.setattr(backend, "_ONEDNN_DTYPES", backend.onednn_dtypes())
    x, w = torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    with torch.no_grad():
        assert not backend.use_onednn(x, w)
        torch.testing.assert_close(linear(x, w), F.linear(x, w))
