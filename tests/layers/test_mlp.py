"""The MLP of several families against float64."""

import pytest
import torch
import torch.nn.functional as F
from golden import image
from tolerance import op_close

from vizoo.backbones.layers import mlp as module
from vizoo.backbones.layers.mlp import Mlp
from vizoo.backbones.ops import backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mlp(dtype):
    """Inference on a CPU, where GELU may be part of the first product, and autograd, against float64."""
    mlp = Mlp(7, 13, dtype=dtype)
    x = image((3, 5, 2, 7)).to(dtype)
    args = [x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]

    def plain(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    truth = plain(*(t.double() for t in args))
    op_close(mlp(x), truth, plain(*args), what="autograd")
    with torch.no_grad():
        op_close(mlp(x), truth, plain(*args), what="inference")


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def gelu_inside(request, monkeypatch):
    """On both kinds of processors."""
    monkeypatch.setattr(backend, "_WIDE", request.param)


@pytest.mark.usefixtures("gelu_inside")
@pytest.mark.parametrize("limit", [1, 6 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 5, 7), (3, 35), (4,), (2, 0)], ids=str)
def test_inference_is_training(monkeypatch, limit, dtype, size):
    """A few images at a time, and GELU inside of the product or after it."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", limit)
    layer = Mlp(6, 10, dtype=dtype).eval()
    x = torch.randn(*size, 12, dtype=dtype)[..., ::2]
    expected = layer(x).detach()
    with torch.no_grad():
        found = layer(x)
    assert found.shape == expected.shape
    if found.numel() > 0:
        truth = Mlp(6, 10, dtype=torch.float64)
        truth.load_state_dict(layer.state_dict())
        op_close(found, truth(x.double()).detach(), expected)


def test_changed_layers_see_every_image(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    layer, seen = Mlp(6, 10).eval(), []
    layer.fc2.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    with torch.no_grad():
        layer(torch.randn(3, 5, 6))
    assert seen == [(3, 5, 10)]
