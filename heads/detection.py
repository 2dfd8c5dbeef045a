"""torchvision's detectors on any backbone of timm and the zoo.

RetinaNet (https://arxiv.org/abs/1708.02002), FCOS (https://arxiv.org/abs/1904.01355), Faster R-CNN
(https://arxiv.org/abs/1506.01497) and Mask R-CNN (https://arxiv.org/abs/1703.06870), each on a feature pyramid
(https://arxiv.org/abs/1612.03144).  The recipes of the papers are mmdet's: :mod:`vizoo.heads.mm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from vizoo.backbones.layers.checks import check_names, checked, need

from .features import FeatureLevels, FeaturePyramid

__all__ = ["detector"]

ARCHS = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
TWO_STAGES = ("faster_rcnn", "mask_rcnn")


@checked(arch=tuple(ARCHS))
def detector(
    arch: str,
    backbone: str | nn.Module,
    num_classes: int,
    pretrained: bool | str | Path = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    strides: Sequence[int] | None = None,
    fpn_channels: int = 256,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a detector of torchvision.

    In training, ``model(images, targets)`` takes a list of RGB images ``[3, H, W]`` between 0 and 1 and a list of
    dictionaries with ``boxes`` ``[n, 4]`` (x1, y1, x2, y2 in pixels), ``labels`` ``[n]`` (1 to ``num_classes - 1``)
    and, for Mask R-CNN, ``masks`` ``[n, H, W]``, and returns a dictionary of losses.  In evaluation,
    ``model(images)`` returns for each image ``boxes``, ``labels``, ``scores`` and ``masks`` ``[n, 1, H, W]``.  Images
    are scaled and normalised inside, with the mean and standard deviation of the backbone.

    Args:
        arch: ``"retinanet"``, ``"fcos"``, ``"faster_rcnn"`` or ``"mask_rcnn"``.
        backbone: Any name of :func:`timm.create_model`, or a model made with ``features_only=True``.
        num_classes: Classes and the background, which is class 0 in every architecture: 91 for COCO.
        pretrained: Weights of the backbone, as in :class:`vizoo.heads.features.FeatureLevels`.
        frozen_stages: Stages of the backbone that are not trained: 0 the stem, k the stem and k stages, -1 none.
        norm_eval: Keep batch norms of the backbone in evaluation mode.
        strides: Strides of the backbone's levels; None for 4, 8, 16, 32, without the first in one-stage detectors.
        fpn_channels: Channels of the pyramid.
        min_size: Shorter side that images are scaled to, in pixels; of several one is drawn in training.
        max_size: Longest side.
        backbone_kwargs: Arguments of the backbone, such as ``drop_path_rate``.
        **kwargs: Arguments of torchvision's class, such as ``box_detections_per_img`` or ``anchor_generator``.

    Returns:
        ``torchvision.models.detection.RetinaNet``, ``FCOS``, ``FasterRCNN`` or ``MaskRCNN``.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown or lacks a stride; the message names it.
    """
    need(num_classes >= 2, "at least 2: the background counts", num_classes=num_classes)
    if strides is None:
        strides = (4, 8, 16, 32) if arch in TWO_STAGES else (8, 16, 32)
    body = FeatureLevels(
        backbone,
        strides,
        pretrained=pretrained,
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        **(backbone_kwargs or {}),
    )
    check_names(kwargs, _arguments(ARCHS[arch]), f"arch={arch!r}")
    data = resolve_model_data_config(body.body)
    shared: dict[str, Any] = {
        "num_classes": num_classes,
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        **kwargs,
    }
    if arch in TWO_STAGES:
        return _two_stages(arch, FeaturePyramid(body, fpn_channels, LastLevelMaxPool()), body.strides, shared)
    pyramid = FeaturePyramid(body, fpn_channels, LastLevelP6P7(fpn_channels, fpn_channels))
    levels = [*body.strides, body.strides[-1] * 2, body.strides[-1] * 4]
    if arch == "fcos":
        if "anchor_generator" not in kwargs:  # one square for each place, as large as the stride
            shared["anchor_generator"] = AnchorGenerator(tuple((s,) for s in levels), ((1.0,),) * len(levels))
        return FCOS(pyramid, **shared)
    if "anchor_generator" not in kwargs:  # three scales of 4 times the stride, as in the paper
        sizes = tuple(tuple(int(4 * s * 2 ** (k / 3)) for k in range(3)) for s in levels)
        shared["anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels))
    return RetinaNet(pyramid, **shared)


def _arguments(detector_cls: type[nn.Module]) -> set[str]:
    """What torchvision's class takes and :func:`detector` does not set; names that neither knows it drops silently."""
    own = {*inspect.signature(detector_cls).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    return own - {"backbone", "kwargs", "self", *inspect.signature(detector).parameters}


def _two_stages(arch: str, pyramid: FeaturePyramid, strides: Sequence[int], shared: dict[str, Any]) -> nn.Module:
    levels = [*strides, strides[-1] * 2]
    if "rpn_anchor_generator" not in shared:  # 8 times the stride: 32 to 512 pixels
        sizes = tuple((8 * s,) for s in levels)
        shared["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels))
    names = [str(i) for i in range(len(strides))]
    shared.setdefault("box_roi_pool", MultiScaleRoIAlign(names, 7, 2))
    if arch == "faster_rcnn":
        return FasterRCNN(pyramid, **shared)
    shared.setdefault("mask_roi_pool", MultiScaleRoIAlign(names, 14, 2))
    return MaskRCNN(pyramid, **shared)
