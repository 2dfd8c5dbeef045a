"""The convolution that compiled inference does not look into."""

import pytest
import torch
import torch.nn.functional as F
from graphs import compiled
from tolerance import close
from torch import nn

from vizoo.backbones.layers.plain import project
from vizoo.backbones.ops import backend

pytestmark = pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")

GEOMETRIES = [  # channels in and out, kernel, stride, padding, dilation, groups
    (3, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (6, 4, (2, 3), (2, 1), (0, 2), (1, 2), 2),
    (5, 5, (3, 3), (1, 1), (2, 2), (2, 2), 5),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_operator(batch, geometry, bias):
    """Values of PyTorch's, of maps in any layout, and what the compiler is told of it is true."""
    c, o, kernel, *rest, groups = geometry
    weight, offset = torch.randn(o, c // groups, *kernel), torch.randn(o) if bias else None
    wide = torch.randn(batch, c, 7, 18)
    for x in (wide, wide.contiguous(memory_format=torch.channels_last), wide[:, :, :, ::2]):
        out = torch.ops.vizoo.convolution(x, weight, offset, *rest, groups)
        close(out, F.conv2d(x, weight, offset, *rest, groups), "layout")
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(torch.ops.vizoo.convolution.default, (x, weight, offset, *rest, groups))


class Net(nn.Module):
    """A map ``[B, H, W, C]`` whose norm comes before a convolution."""

    def __init__(self, **kwargs):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv2d(8, 6, 3, 2, 1, **kwargs)

    def forward(self, x):
        return project(self.conv, self.norm(x).permute(0, 3, 1, 2))


def targets(net, x):
    """The operators of ours in the graph of a compiled network, and its output."""
    names, out = compiled(net, x)
    return {name for name in names if "vizoo" in name}, out


def test_compiled_inference_hides_it():
    """In plain inference only: not while a gradient is recorded, in export, or of a layer that somebody changed."""
    net, x = Net(), torch.randn(2, 5, 7, 8)
    with torch.no_grad():
        found, out = targets(net, x)
        assert found == {"vizoo.convolution"}
        close(out, net(x), "layout")
        assert "vizoo" not in str(torch.export.export(net, (x,)).graph)
        assert not targets(Net(padding_mode="reflect"), x)[0]
        net.conv.register_forward_hook(lambda *args: None)
        assert not targets(net, x)[0]
    assert not targets(Net(), x)[0]
