"""Detectors without an image: counted with the most boxes that there may be, so that no number decides their cost.

How many boxes of a two-stage detector go on is decided by the numbers of an image.  On tensors without numbers every
filter keeps all that it is given, and what cuts boxes off at a number cuts off there: Mask R-CNN of torchvision has
1000 proposals in its box head and 100 detections in its mask head, and so has mmdet in mode ``tensor``.  These are
the most that any image can cost, and usual images come near, for the proposals are nearly always 1000.  In detail:

* RoIAlign costs the same at every level; boxes are shared out among the levels equally.
* NMS compares every pair of boxes of a class (16 FLOPs each); of a two-stage detector all proposals are of each class.
* Masks and heatmaps of keypoints are enlarged to the size of the whole image.

None of this but the numbers of boxes concerns multiply-accumulates.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vizoo.backbones.ops.cost import Cost
from vizoo.tools.profiling.prices import price_of
from vizoo.tools.profiling.recording import Recorder

DETECTORS = ("torchvision.models.detection.", "mmdet.models.")


def detects(model: nn.Module) -> bool:
    """Whether a model is, or holds, a part of a detector of torchvision or mmdet."""
    return any(c.__module__.startswith(DETECTORS) for m in model.modules() for c in type(m).__mro__)


class MostBoxes(TorchDispatchMode):
    """Answers on the meta device what only numbers could: all boxes are kept, and every condition holds.

    Args:
        recorder: Charged with the operators that are answered here.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
        first = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if first is None:
            return func(*args, **kwargs or {})
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item") and first.dtype == torch.bool:
            return True
        if name == "aten::nonzero":
            return self._chosen(func, args, (first.numel(), first.dim()))
        if name == "torchvision::nms":
            return self._chosen(func, args, (len(first),))
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = first, [part for index in args[1] for part in self._numbered(index)], *args[2:]
        return func(*args, **kwargs or {})

    def _chosen(self, func: Any, args: Any, shape: tuple[int, ...]) -> Tensor:
        """Indices that an operator would choose, with its price."""
        out = args[0].new_empty(shape, dtype=torch.int64)
        price = price_of(func, func._schema.name)
        cost = price(*(a.shape if isinstance(a, Tensor) else a for a in args), out=out.shape) if price else Cost()
        self.recorder.charge(func._schema.name, cost, [a for a in args if isinstance(a, Tensor)], [out])
        return out

    def _numbered(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as the indices of all its elements; other indices as they are."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        return list(torch.ops.aten.nonzero(index).unbind(1)) if not index.is_meta else self._all(index)

    def _all(self, mask: Tensor) -> list[Tensor | None]:
        return list(self._chosen(torch.ops.aten.nonzero.default, (mask,), (mask.numel(), mask.dim())).unbind(1))


@contextlib.contextmanager
def most_boxes(recorder: Recorder) -> Iterator[None]:
    """Count detectors with the most boxes, as this file says.

    Args:
        recorder: Of the count, on the meta device.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        if "torchvision.models.detection" in sys.modules:
            _change_torchvision(stack)
        if "mmdet.models.roi_heads" in sys.modules:
            _change_mmdet(stack)
        stack.enter_context(MostBoxes(recorder))
        yield


def _shared_out(self: Any, boxes: Tensor, levels: int) -> Tensor:
    """Levels of boxes, the same number at each, as numbers."""
    return torch.arange(len(boxes)) * levels // max(len(boxes), 1)


def _change_mmdet(stack: contextlib.ExitStack) -> None:
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmengine.structures import InstanceData

    of_numbers = InstanceData.__getitem__

    def chosen(self: Any, item: Any) -> Any:
        """It refuses indices on the meta device."""
        if not (isinstance(item, Tensor) and item.is_meta):
            return of_numbers(self, item)
        found = type(self)(metainfo=self.metainfo)
        for key, value in self.items():
            found[key] = value[item]
        return found

    stack.enter_context(mock.patch.object(SingleRoIExtractor, "map_roi_levels", _shared_out))
    stack.enter_context(mock.patch.object(InstanceData, "__getitem__", chosen))


def _change_torchvision(stack: contextlib.ExitStack) -> None:
    from torchvision.models.detection import roi_heads, ssd, transform
    from torchvision.ops import boxes, poolers

    whole_masks, whole_heatmaps = transform.paste_masks_in_image, roi_heads.heatmaps_to_keypoints
    heads, classes, image = roi_heads.RoIHeads.forward, 1, (1, 1)

    def in_classes(post: Callable[..., Any]) -> Callable[..., Any]:
        def postprocess(self: Any, scores: Any, *args: Any) -> Any:
            nonlocal classes
            classes = (scores["cls_logits"] if isinstance(scores, dict) else scores).shape[-1] - 1  # not the background
            try:
                return post(self, scores, *args)
            finally:
                classes = 1

        return postprocess

    def batched_nms(found: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> Tensor:
        parts = zip(found.chunk(classes), scores.chunk(classes), strict=True)
        return torch.cat([boxes.nms(some, score, threshold) for some, score in parts])

    def levels(self: Any, found: list[Tensor]) -> Tensor:
        return _shared_out(self, torch.cat(found), self.k_max - self.k_min + 1)

    def paste(masks: Tensor, found: Tensor, size: tuple[int, int], padding: int = 1) -> Tensor:
        return whole_masks(masks, torch.tensor([[0.0, 0.0, size[1], size[0]]]).expand(len(found), 4), size, padding)

    def keypoints(maps: Tensor, found: Tensor) -> Any:
        return whole_heatmaps(maps, torch.tensor([[0.0, 0.0, *reversed(image)]]).expand(len(found), 4))

    def forward(self: Any, features: Any, proposals: Any, sizes: Any, *args: Any) -> Any:
        nonlocal image
        image = sizes[0]
        return heads(self, features, proposals, sizes, *args)

    for place, name, new in (
        (roi_heads.RoIHeads, "forward", forward),
        (roi_heads.RoIHeads, "postprocess_detections", in_classes(roi_heads.RoIHeads.postprocess_detections)),
        (ssd.SSD, "postprocess_detections", in_classes(ssd.SSD.postprocess_detections)),
        (roi_heads, "heatmaps_to_keypoints", keypoints),
        (transform, "paste_masks_in_image", paste),
        (boxes, "batched_nms", batched_nms),
        (poolers.LevelMapper, "__call__", levels),
    ):
        stack.enter_context(mock.patch.object(place, name, new))
