"""The MLP of several families against float64."""

import pytest
import torch
import torch.nn.functional as F
from golden import image
from tolerance import op_close

from vizoo.backbones.layers.mlp import Mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mlp(dtype):
    """Inference on a CPU, where GELU is part of the first product, and autograd, against float64."""
    mlp = Mlp(7, 13, dtype=dtype)
    x = image((3, 5, 2, 7)).to(dtype)
    args = [x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]

    def plain(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    truth = plain(*(t.double() for t in args))
    op_close(mlp(x), truth, plain(*args), what="autograd")
    with torch.no_grad():
        op_close(mlp(x), truth, plain(*args), what="inference")
