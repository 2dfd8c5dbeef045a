"""Stand-in for ``mmcv._ext``, the compiled operators of mmcv, on torchvision and plain PyTorch.

mmcv imports ``mmcv._ext`` and asks it for 113 operators.  :func:`install` adds a finder that answers for this one
module when no compiled one is found, so a real extension always wins.  Operators that models of mmdet and mmseg use
are here; any other name is a function that raises ``NotImplementedError`` when called.

The environment variable ``VIZOO_MMCV_EXT`` says which one is used: ``auto``; ``torchvision``, this module even when a
compiled one exists; ``off``, never this module, which holds for the file of ``vizoo mm link`` too.

Every operator has the signature of the compiled one: results go in place into tensors that the caller allocated, in
their dtype; half precision is computed in float32.  The compiled ones take their numbers (scales, thresholds) as
float32, and boxes are suppressed in float32, so both are rounded here too.  Where the compiled kernels leave the order
of equal scores to an unstable sort, the first box comes first here, on every machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # also registers torch.ops.torchvision
from torch import Tensor

NAME, SWITCH, CHOICES = "mmcv._ext", "VIZOO_MMCV_EXT", ("auto", "torchvision", "off")
TINY, LOWEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min  # of logarithms, of maxima

__all__ = [
    "bbox_overlaps",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "psamask_backward",
    "psamask_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
]


# finding the module


class ExtFinder:
    """Meta-path finder that knows the module ``mmcv._ext`` only."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The module's spec, or None for any other name."""
        return ModuleSpec(NAME, ExtLoader(NAME, __file__), origin=__file__) if fullname == NAME else None


class ExtLoader(SourceFileLoader):
    """Fills the module ``mmcv._ext`` with the operators of this one."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the operators."""
        fill(vars(module))


def fill(namespace: dict[str, Any]) -> None:
    """Put the operators into the namespace of a module ``mmcv._ext``.

    Args:
        namespace: Its ``vars``.

    Raises:
        ModuleNotFoundError: If ``VIZOO_MMCV_EXT`` is ``off``: what mmcv would raise without this module.
        ValueError: If the variable has another value than ``auto``, ``torchvision`` or ``off``.
    """
    if _choice() == "off":
        raise ModuleNotFoundError(f"No module named {NAME!r}", name=NAME)
    namespace.update({name: globals()[name] for name in __all__}, __getattr__=missing)


def _choice() -> str:
    """What the environment says, checked."""
    choice = os.environ.get(SWITCH, "auto")
    if choice not in CHOICES:
        raise ValueError(f"got {SWITCH}={choice!r} in the environment, need one of {', '.join(CHOICES)}")
    return choice


def install() -> None:
    """Add the finder to ``sys.meta_path`` as ``VIZOO_MMCV_EXT`` says; a second call changes nothing.

    Raises:
        ValueError: If the variable has another value than ``auto``, ``torchvision`` or ``off``.
    """
    choice = _choice()
    if choice == "off" or ExtFinder in sys.meta_path:
        return
    finder: Any = ExtFinder
    if choice == "torchvision":
        sys.meta_path.insert(0, finder)
    else:
        sys.meta_path.append(finder)


def missing(name: str) -> Callable[..., Any]:
    """Module-level ``__getattr__`` of ``mmcv._ext``: an operator without equivalent, which raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"operator {name!r} of mmcv has no equivalent in torchvision or PyTorch, and the compiled extension "
            "mmcv._ext is missing: build mmcv from source as vizoo's docs/mm.md says, "
            "or take a model without this operator"
        )

    unavailable.__name__ = name
    return unavailable


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors, half precision as float32."""
    half = (torch.float16, torch.bfloat16)
    return [(t.float() if t.dtype in half else t).contiguous() for t in tensors]


def _single(number: float) -> float:
    """The number as the compiled operators take it."""
    return torch.tensor(number, dtype=torch.float32).item()


def _copy_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, into: Sequence[Tensor]
) -> None:
    """Differentiate ``function(*inputs)`` and copy its gradients."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, grad)
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def get_compiler_version() -> str:
    """For mmcv's environment report."""
    return "none: vizoo.heads.mm.ext on torchvision"


def get_compiling_cuda_version() -> str:
    """For mmcv's environment report."""
    return f"none: torchvision {torchvision.__version__}"


# boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2.
        scores: ``[N]``.
        iou_threshold: Overlap that is still kept.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.

    Returns:
        Indices ``[K]``, int64.
    """
    order, threshold = scores.argsort(descending=True, stable=True), _single(iou_threshold)
    boxes = boxes[order].float()
    if offset == 0:
        falling = -torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
        return order[torchvision.ops.nms(boxes, falling, threshold)]
    left = torch.arange(len(boxes), device=boxes.device)
    kept = [left[:0]]
    while len(left):
        kept.append(left[:1])
        overlap = _overlap(boxes[left[0]], boxes[left[1:]], offset)
        left = left[1:][~(overlap > threshold)]
    return order[torch.cat(kept)]


def _overlap(box: Tensor, others: Tensor, offset: int = 0) -> Tensor:
    """Intersection over union of one box ``[4]`` with others ``[N, 4]``; that of two empty ones is no number."""
    size = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + offset).clamp(min=0)
    intersection = size.prod(dim=1)
    areas = (others[:, 2:] - others[:, :2] + offset).prod(dim=1)
    return intersection / ((box[2:] - box[:2] + offset).prod() + areas - intersection)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being dropped.

    The best box is swapped to the front and dropped ones with the last, as in the compiled operator: this decides
    which of equal scores comes first.  Empty boxes do not overlap; there, Gaussian scores become no numbers.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        dets: ``[N, 5]``, of which the first ``K`` rows are set to boxes and decayed scores.
        iou_threshold: Overlap from which methods 0 and 1 decay.
        sigma: Width of method 2.
        min_score: Boxes are dropped below this score.
        method: 0 hard, 1 linear, 2 Gaussian.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.

    Returns:
        Indices ``[K]``, int64.
    """
    boxes, scores = boxes.float(), scores.float().clone()
    order, first = torch.arange(len(boxes), device=boxes.device), 0
    while first < len(order):
        if not scores[first].isnan():  # a score that is no number is never the greater one
            best = first + int(scores[first:].nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax())
            for values in (order, scores):
                values[[first, best]] = values[[best, first]]
        box = boxes[order[first]]
        dets[first, :4], dets[first, 4] = box, scores[first]
        first += 1
        iou = _overlap(box, boxes[order[first:]], offset)
        if method == 2:
            weight = torch.where(iou.isnan(), 1.0, torch.exp(-(iou * iou) / sigma))
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1.0)
        scores[first:] *= weight
        alive = ~(scores < min_score)
        alive[:first] = True
        kept = int(alive.sum())
        moved = torch.arange(kept, device=boxes.device)
        moved[~alive[:kept]] = kept + alive[kept:].nonzero()[:, 0].flip(0)
        order, scores = order[moved], scores[moved]
    return order


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: one that is kept, then those that overlap it by the threshold or more, best first.

    Args:
        dets: ``[N, 5]``, boxes and scores.
        iou_threshold: Overlap from which a box joins a group.

    Returns:
        Indices of each group.
    """
    left, groups = dets[:, 4].argsort(descending=True, stable=True), []
    boxes = dets[:, :4].float()
    while len(left):
        others = left[1:]
        same = _overlap(boxes[left[0]], boxes[others]) >= iou_threshold
        groups.append([int(left[0]), *others[same].tolist()])
        left = others[~same]
    return groups


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Intersection over union (``mode`` 0) or over the first box (1).

    Args:
        boxes1: ``[N, 4]``.
        boxes2: ``[M, 4]``.
        ious: Result ``[N, M]``, or ``[N]`` if ``aligned``.
        mode: 0 or 1.
        aligned: Compare row by row.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.

    The overlap of two empty boxes is 0, where the compiled operator's is no number.
    """
    a, b = _wide(boxes1, boxes2)
    a = a if aligned else a[:, None]
    intersection = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset).clamp(min=0)
    overlap = intersection.prod(dim=-1)
    base = (a[..., 2:] - a[..., :2] + offset).prod(dim=-1)
    if mode == 0:
        base = base + (b[..., 2:] - b[..., :2] + offset).prod(dim=-1) - overlap
    ious.copy_(torch.where(base == 0, 0.0, overlap / base))


# regions of interest


def _regions(
    rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, tuple[int, int]]]:
    """Image, start, extent and bin size (each y, x) of every RoI, and the samples of a bin in each direction."""
    start, end = (rois[:, axes] * _single(scale) - (0.5 if aligned else 0.0) for axes in ([2, 1], [4, 3]))
    extent = end - start if aligned else (end - start).clamp(min=1)
    bins = extent / extent.new_tensor(size)
    grids = bins.float().ceil().nan_to_num().clamp(min=0).long().tolist()
    for k, image in enumerate(rois[:, 0].long().tolist()):
        grid = (sampling_ratio, sampling_ratio) if sampling_ratio > 0 else (grids[k][0], grids[k][1])
        yield image, start[k], extent[k], bins[k], grid


def _samples(
    start_y: Tensor, start_x: Tensor, bins: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Places y and x ``[ph, pw, gh, gw]`` of the samples; starts are one number, or one for each bin, ``[ph, pw]``."""
    rows, columns, inner_y, inner_x = (torch.arange(n, device=bins.device).to(bins) for n in (*size, *grid))
    inner_y, inner_x = (inner_y + 0.5) * bins[0] / grid[0], (inner_x + 0.5) * bins[1] / grid[1]
    y = (start_y + rows[:, None] * bins[0])[..., None, None] + inner_y[:, None]
    x = (start_x + columns * bins[1])[..., None, None] + inner_x
    y, x = torch.broadcast_tensors(y, x)
    return y, x


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Bilinear interpolation at places of any shape.

    Returns:
        Rows and columns before and after each place; the index of the four corners in a flat map, ``[4, ...]``; and
        their weights, 0 for places further than one pixel outside.
    """
    outside = ~((y >= -1) & (y <= height) & (x >= -1) & (x <= width))
    around, shares = [], []
    for place, n in ((y, height), (x, width)):
        place = place.masked_fill(outside, 0).clamp(min=0)
        low = place.long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        rest = torch.where(low == high, 0.0, place - low)
        around += [low, high]
        shares.append((1 - rest, rest))
    pairs = [(i, j) for i in (0, 1) for j in (0, 1)]
    index = torch.stack([around[i] * width + around[2 + j] for i, j in pairs])
    weights = torch.stack([shares[0][i] * shares[1][j] for i, j in pairs])
    return around, index, weights.masked_fill(outside, 0)


def _first_maximum(values: Tensor, places: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
    """Maximum over the last axis and the first of ``places`` that has it; ``lowest`` and -1 if none is greater."""
    values = F.pad(values.masked_fill(values.isnan(), lowest), (1, 0), value=lowest)
    places = F.pad(places, (1, 0), value=-1)
    best, which = values.max(dim=-1)
    return best, places.expand(values.shape).gather(-1, which[..., None])[..., 0]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., ICCV 2017) of ``[N, C, H, W]`` at ``[K, 5]`` (image, x1, y1, x2, y2) into ``output``.

    ``pool_mode`` 1 is the mean of a bin's samples, 0 their maximum, with its place in ``argmax_y`` and ``argmax_x``.
    RoIs with ``x2 < x1`` or ``y2 < y1`` are read as mmcv's kernel for GPUs reads them; that for CPUs refuses some.
    """
    x, boxes = _wide(input, rois)
    boxes, size = boxes.to(x.dtype), (aligned_height, aligned_width)
    if pool_mode == 1:
        boxes, scale = _without_negative_grids(boxes, sampling_ratio, aligned), _single(spatial_scale)
        output.copy_(torchvision.ops.roi_align(x, boxes, size, scale, sampling_ratio, aligned))
        return
    lowest = -10000.0 if x.device.type == "cpu" else LOWEST  # the compiled kernels begin so
    for k, (image, start, _, bins, grid) in enumerate(_regions(boxes, size, spatial_scale, sampling_ratio, aligned)):
        places = _samples(start[0], start[1], bins, size, grid)
        _, index, weights = _corners(*places, *x.shape[2:])
        values = (x[image].flatten(1)[:, index] * weights).sum(dim=1).flatten(3)
        for argmax, place in zip((argmax_y, argmax_x), places, strict=True):
            output[k], argmax[k] = _first_maximum(values, place.flatten(2), lowest)


def _without_negative_grids(rois: Tensor, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIs of which none has fewer samples than none, which torchvision would allocate."""
    if sampling_ratio > 0 or not aligned:
        return rois
    return torch.cat([rois[:, :3], torch.maximum(rois[:, 1:3], rois[:, 3:])], dim=1)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` into ``grad_input [N, C, H, W]``."""
    grad, boxes = _wide(grad_output, rois)
    boxes, shape = boxes.to(grad.dtype), grad_input.shape
    if pool_mode == 1:
        size, scale = (aligned_height, aligned_width), _single(spatial_scale)
        boxes = _without_negative_grids(boxes, sampling_ratio, aligned)
        backward = torch.ops.torchvision._roi_align_backward
        grad_input.copy_(backward(grad, boxes, scale, *size, *shape, sampling_ratio, aligned))
        return
    y, x = _wide(argmax_y, argmax_x)
    _, index, weights = _corners(y, x, *shape[2:])
    weights = weights * (y != -1)
    maps = (boxes[:, 0].long()[:, None] * shape[1] + torch.arange(shape[1], device=grad.device))[..., None, None]
    found = grad.new_zeros(shape)
    found.view(-1).index_add_(0, (maps * shape[2] * shape[3] + index).flatten(), (grad * weights).flatten())
    grad_input.copy_(found)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, ICCV 2015) by mmcv's rule; ``argmax`` is int32 as ``output`` in shape.

    A RoI reaches from ``x1`` to ``x2 + 1``, scaled and not rounded; a bin holds every pixel it touches.  Bins without
    any, and RoIs without extent, give 0 and the index -1, which has no gradient.
    """
    x, boxes = _wide(input, rois)
    height, width = x.shape[2:]
    boxes, scale = boxes.to(x.dtype), _single(spatial_scale)
    start, end = boxes[:, 1:3] * scale, (boxes[:, 3:] + 1) * scale
    extent = end - start
    edges = []
    for axis, bins, limit in ((1, pooled_height, height), (0, pooled_width, width)):
        steps = torch.arange(bins + 1, device=x.device) * (extent[:, axis] / bins)[:, None] + start[:, axis, None]
        low, high = steps[:, :-1].float().floor(), steps[:, 1:].float().ceil()
        edges += [e.nan_to_num().clamp(0, limit).long() for e in (low, high)]
    for k, image in enumerate(boxes[:, 0].long().tolist()):
        if not (extent[k] > 0).all():
            output[k], argmax[k] = 0, -1
            continue
        top, bottom, left, right = (e[k] for e in edges)
        rows, inside_y = _spans(top, bottom)
        columns, inside_x = _spans(left, right)
        index = (rows * width)[:, None, :, None] + columns[None, :, None, :]  # [ph, pw, rows, columns]
        inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
        values = x[image].flatten(1)[:, index].masked_fill(~inside, LOWEST)
        best, argmax[k] = _first_maximum(values.flatten(3), index.flatten(2), LOWEST)
        output[k] = best.masked_fill(~inside.flatten(2).any(dim=2), 0)


def _spans(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[bins, longest]`` from each start to each end, and which of them lie before the end."""
    index = start[:, None] + torch.arange(int((end - start).max().clamp(min=0)), device=start.device)
    inside = index < end[:, None]
    return index.where(inside, 0), inside


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` into ``grad_input [N, C, H, W]``."""
    grad, boxes = _wide(grad_output, rois)
    n, channels, height, width = grad_input.shape
    maps = boxes[:, 0].long()[:, None] * channels + torch.arange(channels, device=grad.device)
    index = maps[..., None, None] * height * width + argmax
    found, pooled = grad.new_zeros(n * channels * height * width), argmax != -1
    found.index_add_(0, index[pooled], grad[pooled])
    grad_input.copy_(found.view(grad_input.shape))


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Deformable RoI pooling (Dai et al., ICCV 2017): RoIAlign whose bins are moved.

    Args:
        input: ``[N, C, H, W]``.
        rois: ``[K, 5]``, image, x1, y1, x2, y2.
        offset: ``[K, 2, ph, pw]``, x and y of each bin in ``gamma`` of the RoI's size; empty for none.
        output: Result ``[K, C, ph, pw]``.
        pooled_height: ``ph``.
        pooled_width: ``pw``.
        spatial_scale: Of the RoIs.
        sampling_ratio: Samples of a bin in each direction; 0 for one each pixel.
        gamma: Unit of the offsets.
    """
    x, boxes, moves = _wide(input, rois, offset)
    for k, (image, _, grid, places) in enumerate(
        _moved(x, boxes, moves, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma)
    ):
        _, index, weights = _corners(*places, *x.shape[2:])
        values = (x[image].flatten(1)[:, index] * weights).sum(dim=1)
        output[k] = values.sum(dim=(3, 4)) / max(grid[0] * grid[1], 1)


def _moved(
    x: Tensor, rois: Tensor, offset: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, gamma: float
) -> Iterator[tuple[int, Tensor, tuple[int, int], tuple[Tensor, Tensor]]]:
    """Image, unit of the offsets (y, x), samples in each direction and their places of every RoI."""
    for k, region in enumerate(_regions(rois.to(x.dtype), size, scale, sampling_ratio, aligned=True)):
        image, start, extent, bins, grid = region
        unit = _single(gamma) * extent
        start_y, start_x = start
        if offset.numel():
            start_y, start_x = start_y + unit[0] * offset[k, 1], start_x + unit[1] * offset[k, 0]
        yield image, unit, grid, _samples(start_y, start_x, bins, size, grid)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Gradients of :func:`deform_roi_pool_forward` by input and offset.

    Between the border and one pixel outside, where the value no longer changes, the compiled operator's gradient by the
    offset goes on as inside; so does this one.
    """
    grad, x, boxes, moves = _wide(grad_output, input, rois, offset)
    found, size = torch.zeros_like(x), (pooled_height, pooled_width)
    for k, (image, unit, grid, (y, px)) in enumerate(
        _moved(x, boxes, moves, size, spatial_scale, sampling_ratio, gamma)
    ):
        (top, bottom, left, right), index, weights = _corners(y, px, *x.shape[2:])
        share = (grad[k] / max(grid[0] * grid[1], 1))[..., None, None]  # [C, ph, pw, 1, 1]
        found[image].flatten(1).index_add_(1, index.flatten(), (share[:, None] * weights).flatten(1))
        if moves.numel():
            a, b, c, d = x[image].flatten(1)[:, index].unbind(1)
            inside = weights.sum(dim=0) > 0
            by_x = d * (y - top) + b * (bottom - y) + c * (top - y) + a * (y - bottom)
            by_y = d * (px - left) + c * (right - px) + b * (left - px) + a * (px - right)
            for axis, slope in enumerate((by_x * unit[1], by_y * unit[0])):
                grad_offset[k, axis] = (share * slope * inside).sum(dim=(0, 3, 4))
    grad_input.copy_(found)


# deformable convolution


def _inside(
    offset: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """Where the samples of ``offset [N, 2 * G * kh * kw, oh, ow]`` lie inside the padded frame, in its shape.

    mmcv gives samples at -1 or further out no gradient.  torchvision gives those at exactly -1 a one-sided one, and
    with zero-initialised offsets every border pixel of a padded convolution lies there on the first step.
    """
    n, _, oh, ow = offset.shape
    positions = offset.unflatten(1, (-1, *kernel, 2))  # [N, G, kh, kw, (y, x), oh, ow]
    inside = torch.ones_like(positions[:, :, :, :, 0], dtype=torch.bool)
    for axis, outputs in enumerate((oh, ow)):
        start = torch.arange(outputs, device=offset.device) * stride[axis] - padding[axis]
        tap = torch.arange(kernel[axis], device=offset.device) * dilation[axis]
        base = tap[:, None] + start  # [kh, oh] or [kw, ow]
        base = base[:, None, :, None] if axis == 0 else base[:, None, :]
        position = base + positions[:, :, :, :, axis]
        inside &= (position > -1) & (position < size[axis])
    return inside.unsqueeze(4).expand_as(positions).reshape(offset.shape)


def _first(larger: Tensor, size: Sequence[int]) -> Tensor:
    """Offsets or masks ``[N, C, H, W]`` for an output of ``size``: the first values of each sample, in memory order.

    DyHead passes those of a finer level; the compiled operator then reads them so, and trained weights expect it.
    """
    if larger.shape[2:] == size:
        return larger
    n, c = larger.shape[:2]
    return larger.flatten(1)[:, : c * size[0] * size[1]].reshape(n, c, *size)


def _fill_first(target: Tensor, values: Tensor) -> None:
    """Copy a gradient of :func:`_first`; what was not read has none."""
    whole = values.new_zeros(len(target), target[0].numel())
    whole[:, : values[0].numel()] = values.flatten(1)
    target.copy_(whole.view(target.shape))


def _deform_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    group: int,
    deformable_group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    grad, x, weight, offset = _wide(grad, x, weight, offset)
    modulation = x.new_zeros(len(x), 1) if mask is None else _wide(mask)[0]
    bias = x.new_zeros(len(weight))
    numbers = (*stride, *padding, *dilation, group, deformable_group, mask is not None)
    found = torch.ops.torchvision._deform_conv2d_backward(grad, x, weight, offset, modulation, bias, *numbers)
    kernel = (weight.shape[2], weight.shape[3])
    inside = _inside(offset, kernel, stride, padding, dilation, (x.shape[2], x.shape[3]))
    return found[0], found[1], found[2] * inside, found[3], found[4]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (Dai et al., ICCV 2017) into ``output``; ``d`` is the stride."""
    x, w, o = _wide(input, weight, offset)
    found = torchvision.ops.deform_conv2d(
        x, o, w, stride=(dH, dW), padding=(padH, padW), dilation=(dilationH, dilationW)
    )
    output.copy_(found.view_as(output))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` by input and offset."""
    geometry = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    grad_input, _, grad_offset, _, _ = _deform_backward(gradOutput, input, weight, offset, None, *geometry)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient of :func:`deform_conv_forward` by the weight to ``gradWeight``."""
    geometry = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _, grad_weight, _, _, _ = _deform_backward(gradOutput, input, gradWeight, offset, None, *geometry)
    gradWeight.add_(grad_weight.to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (Zhu et al., CVPR 2019) into ``output``."""
    x, w, o, m = _wide(input, weight, _first(offset, output.shape[2:]), _first(mask, output.shape[2:]))
    found = torchvision.ops.deform_conv2d(
        x,
        o,
        w,
        _wide(bias)[0] if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=m,
    )
    output.copy_(found.view_as(output))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """All gradients of :func:`modulated_deform_conv_forward`."""
    geometry = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)
    size = grad_output.shape[2:]
    found = _deform_backward(grad_output, input, weight, _first(offset, size), _first(mask, size), *geometry)
    grad_input.copy_(found[0])
    grad_weight.copy_(found[1])
    _fill_first(grad_offset, found[2])
    _fill_first(grad_mask, found[3])
    if with_bias:
        grad_bias.copy_(found[4])


# focal losses


def _class_weights(target: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Weight ``[N]`` of each row: that of its class, 1 for background or without weights."""
    foreground = (target >= 0) & (target < num_classes)
    if weight.numel() == 0:
        return torch.ones_like(target, dtype=torch.float32)
    return torch.where(foreground, weight[target.clamp(0, num_classes - 1)].float(), 1.0)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., ICCV 2017) of logits ``[N, C]``; a label outside ``0..C-1`` is background."""
    (x,) = _wide(input)
    p = x.sigmoid()
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    loss = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log(),
        -(1 - alpha) * p**gamma * (1 - p).clamp(min=TINY).log(),
    )
    output.copy_(loss * _class_weights(target, weight, x.shape[1]).to(x.dtype)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by its logits; the caller multiplies by the outer gradient."""
    (x,) = _wide(input)
    p = x.sigmoid()
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    log_p, log_q = p.clamp(min=TINY).log(), (1 - p).clamp(min=TINY).log()
    grad = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p),
    )
    grad_input.copy_(grad * _class_weights(target, weight, x.shape[1]).to(x.dtype)[:, None])


def _of_target(softmax: Tensor, target: Tensor) -> Tensor:
    """Probability ``[N]`` of each row's class, at least TINY."""
    return softmax.gather(1, target.clamp(min=0)[:, None])[:, 0].clamp(min=TINY)


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of probabilities ``[N, C]`` into ``output [N]``; rows with a negative label get 0."""
    (probabilities,) = _wide(softmax)
    p = _of_target(probabilities, target)
    loss = -alpha * (1 - p) ** gamma * p.log() * _class_weights(target, weight, softmax.shape[1]).to(p.dtype)
    output.copy_(torch.where(target >= 0, loss, 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`softmax_focal_loss_forward` by the logits."""
    (probabilities,) = _wide(softmax)
    p = _of_target(probabilities, target)
    slope = alpha * (-((1 - p) ** gamma) + gamma * (1 - p) ** (gamma - 1) * p * p.log())
    slope = torch.where(target >= 0, slope * _class_weights(target, weight, softmax.shape[1]).to(p.dtype), 0.0)
    buff.copy_(slope)
    own = target[:, None] == torch.arange(softmax.shape[1], device=softmax.device)
    grad_input.copy_(slope[:, None] * (own.to(p.dtype) - probabilities))


# attention


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Deformable attention (Zhu et al., ICLR 2021) by mmcv's own PyTorch function.

    Args:
        value: ``[B, keys, heads, channels]``.
        spatial_shapes: Height and width of each level ``[L, 2]``.
        level_start_index: Unused.
        sampling_locations: ``[B, Q, heads, L, points, 2]``, 0 to 1.
        attention_weights: ``[B, Q, heads, L, points]``.
        im2col_step: Unused.

    Returns:
        ``[B, Q, heads * channels]``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    wide = _wide(value, sampling_locations, attention_weights)
    found: Tensor = multi_scale_deformable_attn_pytorch(wide[0], spatial_shapes, wide[1], wide[2])
    return found.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, which is run again."""

    def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(value, spatial_shapes, level_start_index, locations, weights, im2col_step)

    *inputs, grad = _wide(value, sampling_locations, attention_weights, grad_output)
    _copy_gradients(attention, inputs, grad, (grad_value, grad_sampling_loc, grad_attn_weight))


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Attention of each place over the whole map from that over a window around it (Zhao et al., PSANet, ECCV 2018).

    Args:
        input: ``[N, h_mask * w_mask, H, W]``.
        output: Result ``[N, H * W, H, W]``, 0 outside the windows.
        psa_type: 0 collects, the channel being the place looked at; 1 distributes, the channel being the place itself.
        num_: ``N``.
        h_feature: ``H``.
        w_feature: ``W``.
        h_mask: Height of the window.
        w_mask: Width of the window.
        half_h_mask: Row of the window that lies on its place.
        half_w_mask: Column of the window that lies on its place.
    """
    rows, columns = (
        torch.arange(n, device=input.device)[:, None] - torch.arange(n, device=input.device) + half
        for n, half in ((h_feature, half_h_mask), (w_feature, half_w_mask))
    )  # [y, h] and [x, w]: where the window of (h, w) holds (y, x)
    inside_y, inside_x = (rows >= 0) & (rows < h_mask), (columns >= 0) & (columns < w_mask)
    index = rows.clamp(0, h_mask - 1)[:, None, :, None] * w_mask + columns.clamp(0, w_mask - 1)[:, None]
    inside = inside_y[:, None, :, None] & inside_x[:, None]
    found = input.gather(1, index.view(1, -1, h_feature, w_feature).expand(num_, -1, -1, -1))
    found = found.masked_fill(~inside.view(-1, h_feature, w_feature), 0)
    output.copy_(found if psa_type == 0 else _other_psa(found))


def _other_psa(attention: Tensor) -> Tensor:
    """Attention ``[N, H * W, H, W]`` with the two places exchanged."""
    return attention.flatten(2).transpose(1, 2).reshape(attention.shape)


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Gradient of :func:`psamask_forward` into ``grad_input``."""
    grad = grad_output if psa_type == 0 else _other_psa(grad_output)
    rows, columns = (
        torch.arange(window, device=grad.device)[:, None] + torch.arange(n, device=grad.device) - half
        for n, window, half in ((h_feature, h_mask, half_h_mask), (w_feature, w_mask, half_w_mask))
    )  # [i, h] and [j, w]: what row i and column j of the window of (h, w) hold
    inside_y, inside_x = (rows >= 0) & (rows < h_feature), (columns >= 0) & (columns < w_feature)
    index = rows.clamp(0, h_feature - 1)[:, None, :, None] * w_feature + columns.clamp(0, w_feature - 1)[:, None]
    inside = inside_y[:, None, :, None] & inside_x[:, None]
    found = grad.gather(1, index.view(1, -1, h_feature, w_feature).expand(num_, -1, -1, -1))
    grad_input.copy_(found.masked_fill(~inside.view(-1, h_feature, w_feature), 0))


# guided anchoring and CARAFE


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Columns ``[C * kh * kw, P]`` of the windows whose output positions are given, of one image ``[1, C, H, W]``."""
    (x,) = _wide(im)
    padded = F.pad(x[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # [C, oh, ow, kh, kw]
    col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put columns ``[C, P]`` at their positions in ``im [1, C, H, W]``."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Weighted sums of the ``k x k`` windows of ``[N, C, H, W]`` by ``masks [N, G * k * k, sH, sW]``."""
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    windows = F.unfold(features, k, padding=k // 2).view(n, g, c // g, k * k, h, 1, w, 1)
    weights = masks.view(n, g, 1, k * k, h, s, w, s)
    return (windows * weights).sum(dim=3).reshape(n, c, h * s, w * s)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Content-aware upsampling (Wang et al., ICCV 2019) into ``output [N, C, sH, sW]``."""
    x, weights = _wide(features, masks)
    output.copy_(_carafe(x, weights, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of :func:`carafe_naive_forward`."""
    grad, *inputs = _wide(grad_output, features, masks)

    def upsample(features: Tensor, masks: Tensor) -> Tensor:
        return _carafe(features, masks, kernel_size, group_size, scale_factor)

    _copy_gradients(upsample, inputs, grad, (grad_input, grad_masks))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As :func:`carafe_naive_forward`; ``rfeatures`` keeps the features for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of :func:`carafe_forward`."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)
