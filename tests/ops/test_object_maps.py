"""Maps of objects by operators: against RoIAlign of torchvision and PyTorch's convolutions."""

import math

import pytest
import torch
from tolerance import close, op_close
from torchvision.ops import roi_align

from vizoo.backbones.ops import backend
from vizoo.backbones.ops import object_maps as family
from vizoo.backbones.ops.object_maps import crop_maps, cut_out, object_maps, reference_crop_maps

pytestmark = pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")

BOXES = {
    "inside": [[3.25, 4.5, 20.75, 19.0], [0.0, 0.0, 8.0, 6.0], [10.0, 3.0, 11.0, 4.0]],
    "whole": [[0.0, 0.0, 37.0, 29.0]],
    "beyond": [
        [-9.0, -3.0, 60.0, 40.0],
        [30.0, 20.0, 45.5, 29.9],
        [-30.0, -30.0, -20.0, -10.0],
        [90.0, 5.0, 95.0, 9.0],
    ],
    "border": [[-1.5, -0.5, 0.5, 0.5], [36.0, 28.0, 38.0, 30.0], [35.5, 0.0, 37.5, 29.5]],
    "tiny": [[5.1, 6.2, 5.2, 6.25], [5.0, 6.0, 5.0, 8.0], [5.0, 6.0, 5.0, 6.0], [36.9, 28.9, 36.95, 28.95]],
    "many samples": [[0.0, 0.0, 5.0, 5.0], [-40.0, -60.0, 77.0, 80.0], [1.0, 0.0, 36.0, 3.0]],
}


@pytest.mark.parametrize("size", [(7, 5), (3, 4), (40, 31)], ids=str)
@pytest.mark.parametrize("case", BOXES)
def test_cut_out(case, size):
    """RoIAlign of torchvision, with one crop at a time and several."""
    image, boxes = torch.rand(3, 29, 37), torch.tensor(BOXES[case])
    expected = roi_align(image[None], [boxes], size, 1.0, aligned=True)
    for chunk in (1, 2, 100):
        found = torch.cat([crops.clone() for crops in cut_out(image, boxes, size, chunk)])
        assert (found - expected).abs().max() <= 1e-6
    empty = torch.tensor([[5.0, 3.0, 4.0, 8.0]])
    with pytest.raises(ValueError, match="negative size"):
        list(cut_out(image, empty, size, 1))


def layers(dtype=torch.float32, bias=True):
    """Weights and biases of both convolutions, the second for odd channels, and the side of the pooling."""
    weights = torch.randn(6, 3, 5, 5) / 8, torch.randn(6), torch.randn(5, 6, 3, 3) / 7, torch.randn(5)
    return *(t.to(dtype) if bias or t.dim() > 1 else None for t in weights), 5


def check(out, crops, weights, pool):
    """As accurate as plain torch."""
    plain = reference_crop_maps(crops, *weights, pool)
    assert out.shape == plain.shape
    if out.numel():
        wide = (None if t is None else t.double() for t in weights)
        op_close(out, reference_crop_maps(crops.double(), *wide, pool), plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(19, 19), (33, 26)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_crop_maps(count, size, bias, monkeypatch):
    """In any layout, some at a time, NaN included; and what the compiler is told of it is true."""
    monkeypatch.setattr(family, "_CHUNK_BYTES", 2 * 4 * 6 * math.prod(n - 4 for n in size))
    wide, (*weights, pool) = torch.randn(count, 3, size[0], 2 * size[1]), layers(bias=bias)
    for x in (wide[..., ::2].contiguous(), wide[..., ::2].to(memory_format=torch.channels_last), wide[..., ::2]):
        out = crop_maps(x, *weights, pool)
        check(out, x, weights, pool)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(torch.ops.vizoo.crop_maps.default, (x, *weights, pool))
    if count:
        x = torch.full((1, 3, *size), math.nan)
        assert crop_maps(x, *weights, pool).isnan().all()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_object_maps(batch, monkeypatch):
    """Crops and convolutions, for scenes in any layout, some objects at a time."""
    monkeypatch.setattr(family, "_CHUNK_BYTES", 2 * 4 * 6 * 20 * 18)
    boxes = torch.tensor([[3.25, 4.5, 40.75, 39.0], [-5.0, 0.0, 18.0, 16.0], [10.0, 3.0, 99.0, 40.0]])
    boxes, wide, (*weights, pool) = boxes.expand(batch, 3, 4), torch.rand(batch, 3, 45, 104), layers()
    for x in (wide[..., ::2].contiguous(), wide[..., ::2].to(memory_format=torch.channels_last), wide[..., ::2]):
        rois = torch.cat((torch.arange(batch).repeat_interleave(3)[:, None], boxes.flatten(0, 1)), 1)
        crops = roi_align(x, rois, (24, 22), 1.0, aligned=True)
        out = object_maps(x, boxes, (24, 22), *weights, pool)
        check(out, crops, weights, pool)
        torch.library.opcheck(torch.ops.vizoo.object_maps.default, (x, boxes, (24, 22), *weights, pool))
    assert object_maps(wide, boxes[:, :0], (24, 22), *weights, pool).shape == (0, 5, 2, 1)


def test_half_precision():
    """Crops are cut out in float32, as those that layers get."""
    if torch.bfloat16 not in backend.onednn_dtypes():
        pytest.skip("oneDNN has no bfloat16 here")
    (*weights, pool), x = layers(torch.bfloat16), torch.rand(2, 3, 45, 52).bfloat16()
    boxes = torch.tensor([[3.25, 4.5, 40.75, 39.0]]).expand(2, 1, 4)
    crops = roi_align(x.float(), list(boxes), (24, 22), 1.0, aligned=True).bfloat16()
    close(object_maps(x, boxes, (24, 22), *weights, pool), reference_crop_maps(crops, *weights, pool), "layout")
