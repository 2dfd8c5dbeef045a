"""Maps of objects in images for inference on a CPU: RoIAlign, a convolution, max pooling, and a second convolution.

RoIAlign of a box (He et al., "Mask R-CNN", https://arxiv.org/abs/1703.06870) is the mean of bilinear samples inside of
each cell of a grid, the places of which are the product of places on both axes:

    crop[i, j] = sum over y and x of rows[i, y] * cols[j, x] * image[y, x]

Both matrices have two weights for each sample.  The fast path therefore takes columns, then rows, each a sum of whole
rows of memory, where one sample after the other would gather four pixels of every channel.  It works on some objects at
once, so that neither crops nor what the first convolution makes of them, 25 times the pooled map, leave the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import Cost, register_cost
from .operators import operator

_CHUNK_BYTES = 4 << 20  # of the maps of the first convolution; more leave the cache, fewer objects are more calls


def reference_crop_maps(
    x: Tensor, weight: Tensor, bias: Tensor | None, second: Tensor, second_bias: Tensor | None, pool: int
) -> Tensor:
    """``relu(conv(relu(max_pool(conv(x)))))``, both convolutions without zeros around.

    Args:
        x: Crops ``[M, C, h, w]``.
        weight: Of the first convolution ``[D, C, k, k]``.
        bias: ``[D]`` or None.
        second: Of the second one ``[E, D, l, l]``.
        second_bias: ``[E]`` or None.
        pool: Side and stride of the pooling.

    Returns:
        ``[M, E, h', w']``.
    """
    return F.relu(F.conv2d(F.relu(F.max_pool2d(F.conv2d(x, weight, bias), pool)), second, second_bias))


class _Axis(NamedTuple):
    """What RoIAlign takes of one axis of an image for each of N boxes: places and weights ``[N, samples, cells]``.

    Places count from the first that a box needs, of those from ``first`` to ``last``, without the last.
    """

    places: Tensor
    weights: Tensor
    first: list[int]
    last: list[int]

    @classmethod
    def of(cls, start: Tensor, stop: Tensor, cells: int, length: int) -> _Axis:
        """Of boxes from ``start`` to ``stop`` ``[N]``, float32, in the order of operations of torchvision."""
        start, stop = start[:, None, None] - 0.5, stop[:, None, None] - 0.5
        if not bool((stop >= start).all()):
            raise ValueError("got boxes of negative size, need x1 <= x2 and y1 <= y2")
        step = (stop - start) / cells
        count = step.ceil()  # samples of each cell
        sample = torch.arange(max(1, int(count.max())), dtype=start.dtype)[:, None]
        at = start + torch.arange(cells, dtype=start.dtype) * step + (sample + 0.5) * step / count.clamp_min(1)
        counts = (at >= -1) & (at <= length) & (sample < count)
        last_sample = (count.long() - 1).clamp_min(0).expand(-1, 1, cells)
        at = torch.minimum(at, at.gather(1, last_sample)).clamp(0, length - 1)  # those too many see no other pixels
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        share, weight = at - low, counts / count.clamp_min(1)
        places, weights = torch.cat((low, high), 1), torch.cat(((1 - share) * weight, share * weight), 1)
        first, last = places.amin((1, 2)), places.amax((1, 2)) + 1
        return cls(places - first[:, None, None], weights, first.tolist(), last.tolist())

    def take(self, box: int, x: Tensor, out: Tensor) -> Tensor:
        """Weighted sums ``out`` ``[cells, n]`` of the rows of ``x`` ``[places, n]``."""
        terms = zip(self.places[box].unbind(), self.weights[box].unsqueeze(2).unbind(), strict=True)
        for i, (places, weights) in enumerate(terms):
            rows = x.index_select(0, places)
            out = out.addcmul_(rows, weights) if i else torch.mul(rows, weights, out=out)
        return out


def cut_out(image: Tensor, boxes: Tensor, size: Sequence[int], chunk: int) -> Iterator[Tensor]:
    """Some crops after the other of one image, by RoIAlign with the number of samples that a box needs.

    Args:
        image: ``[C, H, W]`` in float32.
        boxes: ``[N, 4]`` as x1, y1, x2, y2, N at least 1.
        size: Height and width of the crops.
        chunk: Crops at once.

    Yields:
        Crops ``[chunk, C, h, w]``, channels-last; the next ones are written over them.

    Raises:
        ValueError: If a box ends before it begins.
    """
    C, H, W = image.shape
    (h, w), boxes = size, boxes.float()
    rows, cols = _Axis.of(boxes[:, 1], boxes[:, 3], h, H), _Axis.of(boxes[:, 0], boxes[:, 2], w, W)
    turned = image.flatten(0, 1).t().contiguous().view(W, C, H)  # columns are rows of memory
    crops = image.new_empty(min(chunk, len(boxes)), h, w * C)
    for start in range(0, len(boxes), chunk):
        stop = min(start + chunk, len(boxes))
        for box in range(start, stop):
            top, bottom = rows.first[box], rows.last[box]
            part = turned[cols.first[box] : cols.last[box], :, top:bottom].flatten(1)
            part = cols.take(box, part, part.new_empty(w, part.shape[1]))
            rows.take(box, part.view(w * C, bottom - top).t().contiguous(), crops[box - start])
        yield crops[: stop - start].view(-1, h, w, C).permute(0, 3, 1, 2)


def _max_pool(x: Tensor, side: int) -> Tensor:
    """``F.max_pool2d(x, side)`` of a channels-last map, by maxima of whole rows: PyTorch's looks for places as well."""
    h, w = (n // side for n in x.shape[2:])
    x = x.permute(0, 2, 3, 1)[:, : h * side, : w * side].unflatten(1, (h, side)).transpose(1, 2)
    x = _maximum(x).unflatten(2, (w, side)).permute(0, 3, 1, 2, 4)
    return _maximum(x).permute(0, 3, 1, 2)


def _maximum(x: Tensor) -> Tensor:
    """Of ``[B, n, ...]`` over the second dimension."""
    first, *others = x.unbind(1)
    out = torch.maximum(first, others[0]) if others else first.clone()
    for t in others[1:]:
        torch.maximum(out, t, out=out)
    return out


class _Convolutions(NamedTuple):
    """Both convolutions and the pooling, for crops ``[M, C, h, w]``."""

    weight: Tensor
    bias: Tensor | None
    second: Tensor
    second_bias: Tensor | None
    pool: int

    def sides(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Height and width after the first and after the second convolution."""
        first = [n - k + 1 for n, k in zip(size, self.weight.shape[2:], strict=True)]
        return first, [n // self.pool - k + 1 for n, k in zip(first, self.second.shape[2:], strict=True)]

    def empty(self, x: Tensor, count: Any, size: Sequence[int]) -> Tensor:
        """Maps of ``count`` objects."""
        shape = count, self.second.shape[0], *self.sides(size)[1]
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def chunk(self, x: Tensor, size: Sequence[int]) -> int:
        """Objects at once."""
        return max(1, _CHUNK_BYTES // (self.weight.shape[0] * prod(self.sides(size)[0]) * x.element_size()))

    def run(self, x: Tensor) -> Tensor:
        """Maps of some crops."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        geometry: Any = [0, 0], [1, 1], [1, 1], 1, "none", [], ""  # with nothing after it
        x = convolve(x.contiguous(memory_format=torch.channels_last), self.weight, self.bias, *geometry)
        x = _max_pool(x, self.pool).relu_()  # as after a ReLU, with fewer values
        return convolve(x, self.second, self.second_bias, *geometry).relu_()


@operator
def _crop_maps(
    x: Tensor, weight: Tensor, bias: Tensor | None, second: Tensor, second_bias: Tensor | None, pool: int
) -> Tensor:
    """:func:`reference_crop_maps`, channels-last, for a call that ``fuses`` has found to fit."""
    layers = _Convolutions(weight, bias, second, second_bias, pool)
    out = layers.empty(x, len(x), x.shape[2:])
    if len(x):
        chunk = layers.chunk(x, x.shape[2:])
        for crops, maps in zip(x.split(chunk), out.split(chunk), strict=True):
            maps.copy_(layers.run(crops))
    return out


@operator
def _object_maps(
    image: Tensor,
    boxes: Tensor,
    size: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    pool: int,
) -> Tensor:
    """:func:`reference_crop_maps` of objects that are cut out of images, for a call that ``fuses`` has found to fit.

    Args:
        image: ``[B, C, H, W]``.
        boxes: ``[B, N, 4]`` as x1, y1, x2, y2.
        size: Height and width to which they are cut out, by ``torchvision.ops.roi_align(aligned=True)``.
        weight: As in :func:`reference_crop_maps`, like the rest.
        bias: Likewise.
        second: Likewise.
        second_bias: Likewise.
        pool: Likewise.

    Returns:
        ``[B * N, E, h', w']``, channels-last.
    """
    layers = _Convolutions(weight, bias, second, second_bias, pool)
    out = layers.empty(image, boxes.shape[0] * boxes.shape[1], size)
    if boxes.numel():
        chunk = layers.chunk(image, size)
        for scene, places, maps in zip(image, boxes, out.split(boxes.shape[1]), strict=True):
            crops = cut_out(scene.float(), places, size, chunk)  # as for bfloat16 RoIAlign of torchvision
            for some, part in zip(crops, maps.split(chunk), strict=True):
                part.copy_(layers.run(some.to(image.dtype)))
    return out


crop_maps, object_maps = torch.ops.vizoo.crop_maps, torch.ops.vizoo.object_maps


@torch.library.register_fake("vizoo::crop_maps")
def _(x, *layers):
    return _Convolutions(*layers).empty(x, x.shape[0], x.shape[2:])


@torch.library.register_fake("vizoo::object_maps")
def _(image, boxes, size, *layers):
    return _Convolutions(*layers).empty(image, boxes.shape[0] * boxes.shape[1], size)


@register_cost("vizoo::crop_maps")
def _cost(x: Any, weight: Any, bias: Any, second: Any, second_bias: Any, pool: int, out: Any = None) -> Cost:
    sides = [n - k + 1 for n, k in zip(x[2:], weight[2:], strict=True)]
    first, pooled = x[0] * weight[0] * prod(sides), x[0] * weight[0] * prod(n // pool for n in sides)
    biases = first * (bias is not None) + prod(out) * (second_bias is not None)
    return Cost(
        macs=first * prod(weight[1:]) + prod(out) * prod(second[1:]),
        other=biases + first + pooled + prod(out),  # pooling, and ReLU twice
        acts=first + prod(out),
    )


@register_cost("vizoo::object_maps")
def _(image: Any, boxes: Any, size: Any, *layers: Any, out: Any = None) -> Cost:
    crops = boxes[0] * boxes[1], image[1], *size
    cost = _cost(crops, *layers, out=out)
    return cost._replace(other=cost.other + 32 * prod(crops))  # as RoIAlign of torchvision is priced
