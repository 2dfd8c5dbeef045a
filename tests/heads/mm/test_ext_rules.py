"""The stand-in against the rules of mmcv's kernels, written out as loops: odd boxes, ties, thresholds, every dtype.

The loops compute in the type of the kernel (NumPy scalars), half precision in float32, and follow mmcv 2.1.0: the
kernels for the CPU, and those for CUDA where there are no others.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import close, op_close
from torch import Tensor

pytestmark = pytest.mark.mm
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")
ext = importlib.import_module("vizoo.heads.mm.ext")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOWEST = np.finfo(np.float32).min
NAN = float("nan")


def kernel_type(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def numbers(tensor: Tensor) -> Any:
    """A tensor in the type that the kernel computes in."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy()


def assert_same(found: Tensor, expected: Any) -> None:
    """Equal up to the order of a few sums, and to the rounding of half precision."""
    truth = torch.as_tensor(np.asarray(expected)).double()
    if found.dtype in (torch.float32, torch.float64) or not found.numel():
        close(found, truth.to(found.dtype), "rerun")
    else:
        op_close(found, truth)


# boxes: all in float32, as the kernels, which take nothing else

BOXES = {
    "random": lambda: torch.cat([c := torch.rand(60, 2) * 40, c + torch.rand(60, 2) * 30], dim=1),
    "whole": lambda: torch.cat([c := torch.randint(0, 8, (60, 2)).float(), c + torch.randint(1, 6, (60, 2))], dim=1),
    "degenerate": lambda: torch.randint(-3, 6, (60, 4)).float() / 2,  # empty, inverted, far apart
    "points": lambda: torch.randint(0, 3, (60, 2)).float().repeat(1, 2),
    "same": lambda: torch.tensor([1.3, 2.1, 5.7, 9.9]).expand(20, 4).clone(),
    "none": lambda: torch.zeros(0, 4),
}
SCORES = {"different": torch.rand, "equal": lambda n: torch.randint(0, 3, (n,)) / 4 + 0.25}


def kernel_overlap(a: Any, b: Any, offset: int) -> Any:
    """As the kernels for the CPU have it; 0 / 0 is no number."""
    one, zero = np.float32(offset), np.float32(0)
    areas = [(x[2] - x[0] + one) * (x[3] - x[1] + one) for x in (a, b)]
    w = max(zero, min(a[2], b[2]) - max(a[0], b[0]) + one)
    h = max(zero, min(a[3], b[3]) - max(a[1], b[1]) + one)
    with np.errstate(invalid="ignore", divide="ignore"):
        return w * h / (areas[0] + areas[1] - w * h)


def in_order(scores: Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("scored", list(SCORES))
@pytest.mark.parametrize("kind", list(BOXES))
def test_nms(kind, scored, offset):
    boxes = BOXES[kind]()
    scores = SCORES[scored](len(boxes))
    for threshold in (0.0, 0.3, 0.5, 0.7):
        kept: list[int] = []
        for i in in_order(scores):
            overlaps = [kernel_overlap(numbers(boxes[j]), numbers(boxes[i]), offset) for j in kept]
            if not any(o > np.float32(threshold) for o in overlaps):
                kept.append(i)
        assert ext.nms(boxes, scores, iou_threshold=threshold, offset=offset).tolist() == kept


def test_nms_offset_matters():
    """Boxes of one pixel: apart by real widths, 1/3 overlap when a box ends with its last pixel."""
    boxes = torch.tensor([[0.0, 0.0, 3.0, 0.0], [2.0, 0.0, 5.0, 0.0]])
    scores = torch.tensor([0.9, 0.8])
    assert ext.nms(boxes, scores, iou_threshold=0.3, offset=1).tolist() == [0]
    assert ext.nms(boxes, scores, iou_threshold=0.3, offset=0).tolist() == [0, 1]


def at_threshold() -> list[tuple[Tensor, float]]:
    """Pairs of boxes whose overlap in float32 is the threshold's float32."""
    cases = []
    for hits, total in ((1, 10), (2, 10), (3, 10), (7, 10), (9, 10), (1, 3)):  # the overlap is hits / total
        boxes = torch.tensor([[0.0, 0.0, total, 1.0], [0.0, 0.0, hits, 1.0]])
        cases.append((boxes, hits / total))
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nms_at_the_threshold(dtype):
    """An overlap that equals the threshold is kept, also where the threshold's double lies on the other side of it."""
    scores = torch.tensor([0.9, 0.8], dtype=dtype)
    crossed = 0
    for boxes, threshold in at_threshold():
        assert kernel_overlap(numbers(boxes[0]), numbers(boxes[1]), 0) == np.float32(threshold)
        crossed += float(np.float32(threshold)) > threshold
        assert ext.nms(boxes.to(dtype), scores, iou_threshold=threshold, offset=0).tolist() == [0, 1]
        dets = torch.cat([boxes.to(dtype), scores[:, None]], dim=1)
        assert ext.nms_match(dets, iou_threshold=threshold) == [[0, 1]]
        decayed = torch.full((2, 5), NAN)
        kept = ext.softnms(boxes.to(dtype), scores, decayed, threshold, 0.5, 0.001, method=0, offset=0)
        assert kept.tolist() == [0]
    assert crossed


@pytest.mark.parametrize("dtype", DTYPES)
def test_nms_dtypes(dtype):
    """Boxes of every dtype are compared in float32; scores keep their own order."""
    boxes, scores = BOXES["random"]().to(dtype), torch.rand(60).to(dtype)
    expected = ext.nms(boxes.float(), scores.double(), iou_threshold=0.4, offset=1).tolist()
    assert ext.nms(boxes, scores, iou_threshold=0.4, offset=1).tolist() == expected
    near = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert ext.nms(boxes[:1].repeat(2, 1), near, iou_threshold=0.4, offset=0).tolist() == [1]


def slow_softnms(boxes: Tensor, scores: Tensor, threshold, sigma, min_score, method, offset) -> tuple[list, list]:
    """The kernel for the CPU, exchange by exchange; 0 / 0 counts as no overlap."""
    threshold, sigma, min_score = (np.float32(v) for v in (threshold, sigma, min_score))
    rows = [[*numbers(b), s, i] for i, (b, s) in enumerate(zip(boxes, numbers(scores), strict=True))]
    i = 0
    while i < len(rows):
        best = i
        for j in range(i + 1, len(rows)):
            if rows[best][4] < rows[j][4]:
                best = j
        rows[i], rows[best] = rows[best], rows[i]
        j = i + 1
        while j < len(rows):
            overlap = kernel_overlap(rows[i], rows[j], offset)
            weight = np.float32(1)
            if method == 2:
                if not np.isnan(overlap):
                    weight = np.exp(-(overlap * overlap) / sigma)
            elif overlap >= threshold:
                weight = 1 - overlap if method == 1 else np.float32(0)
            rows[j][4] *= weight
            if rows[j][4] < min_score:
                rows[j] = rows[-1]
                rows.pop()
            else:
                j += 1
        i += 1
    return [row[:5] for row in rows], [row[5] for row in rows]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [0, 1, 2], ids=["naive", "linear", "gaussian"])
@pytest.mark.parametrize("scored", list(SCORES))
@pytest.mark.parametrize("kind", list(BOXES))
def test_softnms(kind, scored, method, offset):
    boxes = BOXES[kind]()
    scores = SCORES[scored](len(boxes))
    for threshold, min_score in itertools.product((0.0, 0.3), (0.0, 0.001, 0.4)):
        numbers_ = (threshold, 0.5, min_score, method, offset)
        rows, indices = slow_softnms(boxes, scores, *numbers_)
        dets = torch.full((len(boxes), 5), NAN)
        found = ext.softnms(boxes, scores, dets, *numbers_)
        assert found.tolist() == indices
        assert found.dtype == torch.int64
        if rows:
            assert_same(dets[: len(found)], rows)
        assert dets[len(found) :].isnan().all()


def test_gaussian_softnms_keeps_empty_boxes():
    boxes = torch.tensor([[4.0, 3.0, 5.0, 3.0], [3.0, 1.0, 3.0, 1.0], [3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 9.0, 9.0]])
    dets = torch.full((4, 5), NAN)
    found = ext.softnms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), dets, 0.3, 0.5, 0.001, method=2, offset=0)
    assert found.tolist() == [0, 1, 2, 3]
    assert torch.equal(dets[:, 4], torch.tensor([0.9, 0.8, 0.7, 0.6]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softnms_dtypes(dtype):
    from mmcv.ops import soft_nms

    boxes, scores = BOXES["random"]().to(dtype), torch.rand(60).to(dtype)
    dets, kept = soft_nms(boxes, scores, method="gaussian")
    rows, indices = slow_softnms(boxes, scores.float(), 0.3, 0.5, 0.001, 2, 0)
    assert kept.tolist() == indices
    assert_same(dets, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(BOXES))
def test_nms_match(kind, dtype):
    boxes = BOXES[kind]().to(dtype)
    dets, single = torch.cat([boxes, SCORES["equal"](len(boxes)).to(dtype)[:, None]], dim=1), numbers(boxes.float())
    for threshold in (0.0, 0.3, 0.7):
        left, groups = in_order(dets[:, 4]), []
        while left:
            first, rest = left[0], left[1:]
            overlaps = [kernel_overlap(single[first], single[i], 0) for i in rest]
            same = [i for i, o in zip(rest, overlaps, strict=True) if o >= np.float32(threshold)]
            groups.append([first, *same])
            left = [i for i in rest if i not in same]
        assert ext.nms_match(dets, iou_threshold=threshold) == groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", [0, 1], ids=["iou", "iof"])
@pytest.mark.parametrize("kind", ["random", "degenerate", "none"])
def test_bbox_overlaps(kind, mode, aligned, offset, dtype):
    a = BOXES[kind]()[:7].to(dtype)
    b = BOXES[kind]()[: 7 if aligned else 5].to(dtype)
    one = kernel_type(dtype)(offset)

    def overlap(a: Any, b: Any) -> Any:
        w, h = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + one) for i in (0, 1))
        first, second = ((x[2] - x[0] + one) * (x[3] - x[1] + one) for x in (a, b))
        base = first + second - w * h if mode == 0 else first
        return w * h / base if base != 0 else 0

    pairs = zip(a, b, strict=True) if aligned else itertools.product(a, b)
    expected = [overlap(numbers(x), numbers(y)) for x, y in pairs]
    found = torch.full((len(a),) if aligned else (len(a), len(b)), NAN, dtype=dtype)
    ext.bbox_overlaps(a, b, found, mode=mode, aligned=aligned, offset=offset)
    assert_same(found.flatten(), np.array(expected, dtype=kernel_type(dtype)))


# regions of interest

H, W = 9, 11
ROIS = torch.tensor(
    [
        [0, 1.3, 2.7, 13.1, 17.9],
        [1, -6.2, 0.4, 30.5, 9.5],  # over the border
        [1, 4.0, 4.0, 9.0, 9.0],
        [0, 5.5, 5.5, 5.5, 5.5],  # a point
        [0, 7.25, 3.5, 4.75, 9.5],  # x2 < x1
        [1, 3.0, 9.0, 8.0, 2.5],  # y2 < y1
        [1, 9.0, 9.0, 2.0, 2.0],  # both
        [0, 300.0, 300.0, 320.0, 330.0],  # outside
        [0, -90.0, -90.0, -70.0, -60.0],
        [1, 0.0, 0.0, 0.4, 0.4],  # smaller than a pixel
        [1, 0.0, 0.0, 21.0, 17.0],
    ]
)
CASES = [(scale, size) for scale in (1.0, 0.5, 1 / 16, 0.3) for size in ((2, 3), (7, 7))]
CASES += [(2.0, (1, 1))]


def features(dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 3, H, W).to(dtype)
    x[0, 0, :3] = 0.5  # equal maxima: the first counts
    if dtype in (torch.float32, torch.float64):
        x[1, 1] -= 20000.0  # below the number from which RoIAlign's maximum starts
    return x


def slow_roi_pool(x: Any, rois: Any, size: tuple[int, int], scale: float) -> tuple[Any, Any]:
    kind = x.dtype.type
    out, where = np.zeros((len(rois), x.shape[1], *size), x.dtype), np.full((len(rois), x.shape[1], *size), -1)
    for k, roi in enumerate(rois):
        x1, y1 = (v * kind(np.float32(scale)) for v in roi[1:3])
        x2, y2 = ((v + kind(1)) * kind(np.float32(scale)) for v in roi[3:])
        w, h = x2 - x1, y2 - y1
        if w <= 0 or h <= 0:
            continue
        bin_w, bin_h = w / kind(size[1]), h / kind(size[0])
        for c, i, j in np.ndindex(x.shape[1], *size):
            left, top = (math.floor(np.float32(kind(n) * b + s)) for n, b, s in ((j, bin_w, x1), (i, bin_h, y1)))
            right, bottom = (math.ceil(np.float32(kind(n + 1) * b + s)) for n, b, s in ((j, bin_w, x1), (i, bin_h, y1)))
            left, right = (min(max(v, 0), x.shape[3]) for v in (left, right))
            top, bottom = (min(max(v, 0), x.shape[2]) for v in (top, bottom))
            best = kind(0) if bottom <= top or right <= left else kind(LOWEST)
            for row, column in itertools.product(range(top, bottom), range(left, right)):
                if x[int(roi[0]), c, row, column] > best:
                    best, where[k, c, i, j] = x[int(roi[0]), c, row, column], row * x.shape[3] + column
            out[k, c, i, j] = best
    return out, where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "size"), CASES)
def test_roi_pool(scale, size, dtype):
    from mmcv.ops import RoIPool

    x, rois = features(dtype).requires_grad_(), ROIS.to(dtype)
    expected, where = slow_roi_pool(numbers(x), numbers(rois), size, scale)
    argmax = torch.full(expected.shape, -7, dtype=torch.int32)
    out = torch.full(expected.shape, NAN, dtype=dtype)
    ext.roi_pool_forward(x.detach(), rois, out, argmax, *size, scale)
    close(out, torch.as_tensor(expected).to(dtype), "same")
    assert argmax.tolist() == where.tolist()
    assert (argmax == -1).any()
    found = RoIPool(size, scale)(x, rois)
    assert torch.equal(found, out)
    grad = torch.randn(out.shape).to(dtype)
    found.backward(grad)
    slow = np.zeros_like(numbers(x))
    for k, c, i, j in np.ndindex(*where.shape):
        if where[k, c, i, j] >= 0:
            slow[int(rois[k, 0]), c].reshape(-1)[where[k, c, i, j]] += numbers(grad)[k, c, i, j]
    assert_same(x.grad, slow)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool", "deform_roi_pool", "max"])
def test_no_regions(op):
    from mmcv import ops

    call = {
        "roi_align": lambda x, rois: ops.roi_align(x, rois, (3, 2), 0.5),
        "roi_pool": lambda x, rois: ops.roi_pool(x, rois, (3, 2), 0.5),
        "deform_roi_pool": lambda x, rois: ops.deform_roi_pool(x, rois, None, (3, 2), 0.5),
        "max": lambda x, rois: ops.RoIAlign((3, 2), 0.5, pool_mode="max")(x, rois),
    }[op]
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    out = call(x, torch.zeros(0, 5))
    assert out.shape == (0, 3, 3, 2)
    out.sum().backward()
    assert (x.grad == 0).all()


def test_roi_pool_ignores_no_numbers():
    """As the kernel: nothing that is not greater than the lowest number is a maximum."""
    x = torch.full((1, 1, 4, 4), NAN)
    x[0, 0, 3, 3] = -2.0
    out, argmax = torch.full((1, 1, 1, 2), NAN), torch.full((1, 1, 1, 2), -7, dtype=torch.int32)
    ext.roi_pool_forward(x, torch.tensor([[0, 0.0, 0.0, 3.0, 3.0]]), out, argmax, 1, 2, 1.0)
    assert argmax.flatten().tolist() == [-1, 15]
    assert out.flatten().tolist() == [float(LOWEST), -2.0]


def corners(y: Any, x: Any, height: int, width: int) -> tuple[list[int], list[Any]]:
    """Rows and columns around a place, and the weights of the four corners, as the kernels compute them."""
    kind = type(y)
    if y < -1 or y > height or x < -1 or x > width:
        return [], []
    y, x = max(y, kind(0)), max(x, kind(0))
    top, left = int(y), int(x)
    bottom, right = top + 1, left + 1
    if top >= height - 1:
        top = bottom = height - 1
        y = kind(top)
    if left >= width - 1:
        left = right = width - 1
        x = kind(left)
    down, over = y - kind(top), x - kind(left)
    up, back = kind(1) - down, kind(1) - over
    return [top, bottom, left, right], [up * back, up * over, down * back, down * over]


def interpolate(plane: Any, y: Any, x: Any) -> Any:
    around, weights = corners(y, x, *plane.shape)
    if not around:
        return plane.dtype.type(0)
    top, bottom, left, right = around
    places = [(top, left), (top, right), (bottom, left), (bottom, right)]
    return sum((w * plane[p] for w, p in zip(weights[1:], places[1:], strict=True)), weights[0] * plane[places[0]])


def slow_samples(roi: Any, size: tuple[int, int], scale: float, ratio: int, aligned: bool) -> Any:
    """Extent of a RoI, samples of a bin in each direction, and a function that gives their places."""
    kind = roi.dtype.type
    shift = kind(0.5 if aligned else 0)
    x1, y1, x2, y2 = (v * kind(np.float32(scale)) - shift for v in roi[1:])
    w, h = x2 - x1, y2 - y1
    if not aligned:
        w, h = max(w, kind(1)), max(h, kind(1))
    bins = h / kind(size[0]), w / kind(size[1])
    grid = [ratio if ratio > 0 else math.ceil(np.float32(b)) for b in bins]

    def places(i: int, j: int, move_y: Any = None, move_x: Any = None) -> Any:
        start_y, start_x = y1 + (move_y or kind(0)), x1 + (move_x or kind(0))
        for a, b in itertools.product(range(grid[0]), range(grid[1])):
            y = start_y + kind(i) * bins[0] + kind(a + 0.5) * bins[0] / kind(grid[0])
            yield y, start_x + kind(j) * bins[1] + kind(b + 0.5) * bins[1] / kind(grid[1])

    return (h, w), grid, places


def add_interpolated(plane: Any, y: Any, x: Any, value: Any) -> None:
    around, weights = corners(y, x, *plane.shape)
    if around:
        top, bottom, left, right = around
        for p, weight in zip([(top, left), (top, right), (bottom, left), (bottom, right)], weights, strict=True):
            plane[p] += weight * value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("scale", "size"), [(1.0, (2, 3)), (0.5, (3, 2)), (0.3, (7, 7)), (1 / 16, (2, 2))])
def test_roi_align(scale, size, mode, ratio, aligned, dtype):
    from mmcv.ops import RoIAlign

    x, rois = features(dtype).requires_grad_(), ROIS.to(dtype)
    maps, boxes = numbers(x), numbers(rois)
    expected, slow = np.zeros((len(rois), 3, *size), maps.dtype), np.zeros_like(maps)
    grad = torch.randn(expected.shape).to(dtype)
    for k, roi in enumerate(boxes):
        _, grid, places = slow_samples(roi, size, scale, ratio, aligned)
        for c, i, j in np.ndindex(3, *size):
            plane, into, g = maps[int(roi[0]), c], slow[int(roi[0]), c], numbers(grad)[k, c, i, j]
            values = [interpolate(plane, *p) for p in places(i, j)]
            if mode == "avg":
                count = max(grid[0] * grid[1], 1)
                expected[k, c, i, j] = sum(values, maps.dtype.type(0)) / maps.dtype.type(count)
                for p in places(i, j):
                    add_interpolated(into, *p, g / maps.dtype.type(count))
                continue
            best, where = maps.dtype.type(-10000), None
            for value, p in zip(values, places(i, j), strict=True):
                if value > best:
                    best, where = value, p
            expected[k, c, i, j] = best
            if where is not None:
                y, px = (numbers(torch.tensor(v).to(dtype)).item() for v in where)  # the kernel stores them so
                if y != -1:
                    add_interpolated(into, maps.dtype.type(y), maps.dtype.type(px), g)
    out = RoIAlign(size, scale, ratio, pool_mode=mode, aligned=aligned)(x, rois)
    assert out.dtype == dtype
    assert_same(out, expected)
    out.backward(grad)
    assert_same(x.grad, slow)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize(("scale", "size", "gamma"), [(1.0, (2, 3), 0.1), (0.3, (3, 3), 0.7), (1 / 16, (2, 2), 0.1)])
def test_deform_roi_pool(scale, size, gamma, ratio, moved, dtype):
    from mmcv.ops import deform_roi_pool

    x, rois = torch.randn(2, 3, H, W).to(dtype).requires_grad_(), ROIS.to(dtype)
    offset = torch.randn(len(rois), 2, *size).to(dtype).requires_grad_() if moved else None
    maps, boxes = numbers(x), numbers(rois)
    kind, unit = maps.dtype.type, maps.dtype.type(np.float32(gamma))
    expected, slow = np.zeros((len(rois), 3, *size), kind), np.zeros_like(maps)
    slow_offset = np.zeros((len(rois), 2, *size), kind)
    grad = torch.randn(expected.shape).to(dtype)
    for k, roi in enumerate(boxes):
        (h, w), grid, places = slow_samples(roi, size, scale, ratio, aligned=True)
        count = kind(max(grid[0] * grid[1], 1))
        for c, i, j in np.ndindex(3, *size):
            plane, into, g = maps[int(roi[0]), c], slow[int(roi[0]), c], numbers(grad)[k, c, i, j] / count
            move = [unit * side * numbers(offset)[k, axis, i, j] for side, axis in ((h, 1), (w, 0))] if moved else []
            for y, px in places(i, j, *move):
                expected[k, c, i, j] += interpolate(plane, y, px) / count
                add_interpolated(into, y, px, g)
                around, _ = corners(y, px, H, W)
                if around:
                    top, bottom, left, right = around
                    a, b, d, e = plane[top, left], plane[top, right], plane[bottom, left], plane[bottom, right]
                    by_x = e * (y - top) + b * (bottom - y) + d * (top - y) + a * (y - bottom)
                    by_y = e * (px - left) + d * (right - px) + b * (left - px) + a * (px - right)
                    slow_offset[k, 0, i, j] += unit * w * g * by_x
                    slow_offset[k, 1, i, j] += unit * h * g * by_y
    out = deform_roi_pool(x, rois, offset, size, scale, ratio, gamma)
    assert out.dtype == dtype
    assert_same(out, expected)
    out.backward(grad)
    assert_same(x.grad, slow)
    if moved:
        assert_same(offset.grad, slow_offset)


@pytest.mark.parametrize("pack", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
def test_deform_roi_pool_packs(pack):
    """New packs move nothing: RoIAlign (times 1/2 with a mask); their layers learn; a RoI extractor takes them."""
    from mmcv import ops
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    layer = getattr(ops, pack)((3, 3), output_channels=3, deform_fc_channels=8, spatial_scale=0.5, sampling_ratio=2)
    x = torch.randn(2, 3, H, W).requires_grad_()
    out = layer(x, ROIS)
    aligned = ops.RoIAlign((3, 3), 0.5, 2)(x, ROIS)
    close(out, aligned * (0.5 if pack.startswith("Mod") else 1), "rerun")
    out.square().sum().backward()
    assert layer.offset_fc[-1].weight.grad.abs().sum() > 0
    config = {"type": pack, "output_size": 3, "output_channels": 3, "deform_fc_channels": 8}
    extractor = SingleRoIExtractor(config, out_channels=3, featmap_strides=[2])
    assert extractor((x,), ROIS).shape == (len(ROIS), 3, 3, 3)


# attention of PSANet


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("psa_type", [0, 1], ids=["collect", "distribute"])
@pytest.mark.parametrize(("size", "mask"), [((4, 5), (3, 3)), ((3, 5), (5, 9)), ((5, 4), (4, 2)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("n", [2, 0])
def test_psamask(n, size, mask, psa_type, dtype):
    from mmcv.ops import PSAMask

    (h, w), (mh, mw) = size, mask
    x = torch.randn(n, mh * mw, h, w).to(dtype).requires_grad_()
    expected, slow = torch.zeros(n, h * w, h, w, dtype=dtype), torch.zeros(n, mh * mw, h, w, dtype=dtype)
    grad = torch.randn(expected.shape).to(dtype)
    for b, i, j, a, c in np.ndindex(n, h, w, mh, mw):
        row, column = i + a - (mh - 1) // 2, j + c - (mw - 1) // 2
        if 0 <= row < h and 0 <= column < w:
            place, other = (row * w + column, i, j), (i * w + j, row, column)
            index = (b, *(place if psa_type == 0 else other))
            expected[index] = x[b, a * mw + c, i, j].detach()
            slow[b, a * mw + c, i, j] = grad[index]
    out = PSAMask(("collect", "distribute")[psa_type], mask)(x)
    assert torch.equal(out, expected)
    out.backward(grad)
    assert torch.equal(x.grad, slow)
    raw = torch.full_like(expected, NAN)
    numbers_ = {"num_": n, "h_feature": h, "w_feature": w, "h_mask": mh, "w_mask": mw}
    ext.psamask_forward(
        x.detach(), raw, psa_type=psa_type, **numbers_, half_h_mask=(mh - 1) // 2, half_w_mask=(mw - 1) // 2
    )
    assert torch.equal(raw, expected)
