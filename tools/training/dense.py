"""``vizoo train --task detection`` and ``--task segmentation``.

torchvision's detectors and the segmentors of :mod:`vizoo.heads` on any backbone with features, with AdamW and a
learning rate that warms up and then follows a cosine or falls in steps.  Every epoch is measured on the held-out
images: average precision as COCO defines it, or intersection over union.  The papers' recipes are mmdet's and mmseg's:
``vizoo mm``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vizoo.heads.detection import detector
from vizoo.heads.segmentation import segmentor
from vizoo.tools.common import UserError, is_exhausted, progress, resolve_model
from vizoo.tools.data.dense import IGNORED, Boxes, Crops, Parts, detection_parts, segmentation_parts
from vizoo.tools.data.folders import ignore_interrupts, seed_everything
from vizoo.tools.data.shares import Share, from_first, gather, share_order
from vizoo.tools.training.loop import train
from vizoo.tools.training.parsers import METRICS
from vizoo.tools.training.run import match_classes, say_unnamed, skipped_text
from vizoo.tools.training.task import ALONE, Column, Task, World, to_device


def build(options: dict[str, Any], classes: int, pretrained: bool) -> nn.Module:
    """The model of a run.

    Args:
        options: ``task``, ``arch``, ``model``, ``model_kwargs``, ``arch_kwargs``, ``frozen_stages`` and ``size``.
        classes: Number of classes, without a background.
        pretrained: Load the backbone's published weights.

    Returns:
        The model.

    Raises:
        UserError: If backbone, head and arguments do not go together.
    """
    name = resolve_model(options["model"])
    settings = {
        "pretrained": pretrained,
        "frozen_stages": options["frozen_stages"],
        "backbone_kwargs": dict(options["model_kwargs"]),
        **options["arch_kwargs"],
    }
    try:
        if options["task"] == "segmentation":
            return segmentor(options["arch"], name, classes, **settings)
        short, long = options["size"]
        return detector(options["arch"], name, classes + 1, min_size=short, max_size=long, **settings)
    except (ValueError, TypeError, RuntimeError) as e:
        if is_exhausted(e):
            raise
        raise UserError(f"--arch {options['arch']} with --model {options['model']!r}: {e}") from e


def open_parts(options: dict[str, Any], statistics: tuple[Any, Any] = ((0.0,) * 3, (1.0,) * 3)) -> Parts:
    """The data of a run; arguments as the options of the command say."""
    checked, skip = options["check_data"] == "full", options.get("skip_unreadable", False)
    if options["task"] == "detection":
        return detection_parts(options["data"], options["arch"] == "mask_rcnn", options["hflip"], checked, skip)
    crops = Crops(options["size"][0], tuple(options["scale"]), options["hflip"], *statistics)
    classes, reduce = options.get("num_classes"), options["reduce_zero_label"]
    return segmentation_parts(options["data"], classes, reduce, crops, checked, skip)


def statistics(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a backbone's images.

    Args:
        model: Its name.

    Returns:
        Both, a number for each channel.
    """
    from timm.models import get_pretrained_cfg

    cfg: Any = get_pretrained_cfg(resolve_model(model), allow_unregistered=False)
    return tuple(cfg.mean), tuple(cfg.std)


def _collate(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _loss(model: nn.Module, heads: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
    """Loss of a batch.

    Args:
        model: Detector or segmentor, perhaps shared between processes.
        heads: The segmentor itself.
        images: Each ``[3, H, W]``.
        targets: Boxes and so on of each, or class ids ``[H, W]``.

    Returns:
        A scalar.
    """
    if isinstance(targets[0], dict):
        return torch.stack(list(model(images, targets).values())).sum()
    loss: Tensor = heads.loss(model(torch.stack(images)), torch.stack(targets))  # type: ignore[operator]
    return loss


def figures(
    model: nn.Module,
    data: Any,
    classes: Sequence[str],
    batch_size: int,
    workers: int,
    device: torch.device,
    world: World = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure a detector or a segmentor on held-out images.

    Args:
        model: The model.
        data: :class:`Boxes` or :class:`Masks`.
        classes: Names.
        batch_size: Images at once of a detector; a segmentor sees one, as images keep their aspect.
        workers: Processes that read images.
        device: Where the model is.
        world: Processes that share the images by whole batches.
        tick: Called after each batch.

    Returns:
        Of a detector ``AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large``, with masks those with the
        ending ``_mask``; of a segmentor ``mIoU``, ``mAcc`` and ``pixel_accuracy``; all in per cent.  And ``classes``, a
        row of each.
    """
    model.eval()
    batch = batch_size if isinstance(data, Boxes) else 1
    share = Share(data, batch, world.rank, world.size)
    start = {"num_workers": workers, "collate_fn": _collate, "worker_init_fn": ignore_interrupts}
    loader: Any = DataLoader(share, batch, **start)  # type: ignore[arg-type]
    with torch.inference_mode(), progress(world.primary) as bar:

        def batches() -> Iterator[Any]:
            for images, targets in bar.track(loader, description="held-out images"):
                yield to_device(images, device), targets
                tick()

        if isinstance(data, Boxes):
            return _average_precision(model, batches(), data, classes, share.indices, world)
        return _overlap(model, batches(), classes, world)


def _average_precision(
    model: nn.Module, batches: Iterator[Any], data: Boxes, classes: Sequence[str], indices: Sequence[int], world: World
) -> dict[str, Any]:
    from torchmetrics.detection import MeanAveragePrecision

    kinds = {"bbox": "", "segm": "_mask"} if data.masks else {"bbox": ""}
    types: Any = tuple(kinds)
    metric: Any = MeanAveragePrecision(iou_type=types, class_metrics=True, backend="pycocotools", sync_on_compute=False)
    metric.warn_on_many_detections = False  # COCO takes the 100 best of an image
    for images, targets in batches:
        found = [{k: v.cpu() for k, v in one.items()} for one in model(images)]
        if data.masks:
            found = [{**one, "masks": one["masks"].flatten(0, 1) > 0.5} for one in found]
            targets = [{**t, "masks": t["masks"].bool()} for t in targets]
        metric.update(
            [{k: v.float() if v.is_floating_point() else v for k, v in one.items()} for one in found], targets
        )
    for name, states in metric.metric_state.items() if world.size > 1 else ():
        found = gather(states or [None] * len(indices), indices, world.size)  # equal scores rank by the order of images
        setattr(metric, name, [state for state in found if state is not None])
    return from_first(_precisions(metric, kinds, classes) if world.primary else {}, world.size)


def _precisions(metric: Any, kinds: dict[str, str], classes: Sequence[str]) -> dict[str, Any]:
    """Figures of all images, by the ending of each kind of outline."""
    values = metric.compute()
    result: dict[str, Any] = {}
    for kind, ending in kinds.items():
        prefix = f"{kind}_" if len(kinds) > 1 else ""
        for ours, theirs in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75"), ("AP_small", "map_small"),
                             ("AP_medium", "map_medium"), ("AP_large", "map_large")):  # fmt: skip
            result[ours + ending] = _percent(values[prefix + theirs].item())
    prefix = "bbox_" if len(kinds) > 1 else ""
    shares = values[prefix + "map_per_class"].flatten().tolist()
    each = dict(zip(values["classes"].flatten().tolist(), map(_percent, shares), strict=True))
    return {**result, "classes": [{"name": name, "AP": each.get(i)} for i, name in enumerate(classes, 1)]}


def _percent(share: float) -> float | None:
    """Per cent; None for the -1 of a mean over nothing."""
    return None if share < 0 else share * 100


def segment(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """Call the class of each pixel.

    Args:
        model: Segmentor.
        image: ``[3, h, w]``.
        size: ``(H, W)``, perhaps another size.

    Returns:
        Ids ``[H, W]`` on the CPU.
    """
    logits = model(image[None])["out"].float()
    return F.interpolate(logits, (size[0], size[1]), mode="bilinear", align_corners=False).argmax(1)[0].cpu()


def _overlap(model: nn.Module, batches: Iterator[Any], classes: Sequence[str], world: World) -> dict[str, Any]:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    n = len(classes)
    counts = torch.zeros(n, n, dtype=torch.float64)
    for images, targets in batches:
        for image, ids in zip(images, targets, strict=True):
            called = segment(model, image, ids.shape)
            counts += multiclass_confusion_matrix(called, ids, n, ignore_index=IGNORED)
    if world.size > 1:
        counts = counts.to(world.device)
        torch.distributed.all_reduce(counts)
        counts = counts.cpu()
    right, truth, claimed = counts.diag(), counts.sum(1), counts.sum(0)
    present = truth + claimed > 0
    overlap, recall = right / (truth + claimed - right), right / truth
    rows = [
        {
            "name": name,
            "IoU": (overlap[i] * 100).item() if present[i] else None,
            "Acc": (recall[i] * 100).item() if truth[i] else None,
        }
        for i, name in enumerate(classes)
    ]
    figures = {
        "mIoU": overlap[present].mean().item() * 100,
        "mAcc": recall[truth > 0].mean().item() * 100,
        "pixel_accuracy": (right.sum() / truth.sum()).item() * 100,
    }
    return {**figures, "classes": rows}


class Dense(Task):
    """A detector or a segmentor.

    Args:
        args: Options of the command.
        world: Processes.
    """

    kept = ("arch", "model", "model_kwargs", "arch_kwargs", "size", "batch_size", "opt", "seed")
    skips_parameters = True  # heads of classes that a batch does not hold, stages that no head reads

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        super().__init__(args, world)
        options = {**vars(args), "check_data": args.check_data if world.primary else "none"}
        self.parts = open_parts(options, statistics(args.model))
        seed_everything(args.seed)
        self.model = build(options, len(self.parts.classes), args.pretrained).to(world.device)
        start = {"num_workers": args.workers, "collate_fn": _collate, "worker_init_fn": ignore_interrupts}
        start["generator"] = torch.Generator()
        self.loader = DataLoader(self.parts.train, args.batch_size, shuffle=True, drop_last=True, **start)
        share_order(self.loader, args.seed, world.rank, world.size)
        self.what = (args.eval_metric, *METRICS[args.task][args.eval_metric])
        self.columns = (Column("train loss", "train_loss", ".4f"), Column(self.what[1], args.eval_metric, ".2f"))

    def label(self) -> str:
        """Heads and backbone."""
        return f"{self.args.arch}-{self.args.model}"

    def entries(self) -> dict[str, Any]:
        """Heads, classes and images left out."""
        return {"arch": self.args.arch, **self.records()}

    def records(self) -> dict[str, Any]:
        """Classes and images left out."""
        return {"classes": self.parts.classes, "skipped": self.parts.skipped}

    def take_over(self, checkpoint: dict[str, Any], who: str) -> None:
        """Refuse other classes; another order is mended."""
        trained = checkpoint.get("classes")
        self.parts.reorder(match_classes(trained, self.parts.classes, f"--data {self.args.data!r}", who))
        if self.world.primary:
            say_unnamed(trained, who)

    def losses(self, model: nn.Module, batch: Sequence[Any]) -> dict[str, Tensor]:
        """Loss of images and their boxes or masks, every image weighing the same."""
        images, targets = batch
        return {"loss": _loss(model, self.model, images, targets)}

    def measure(self, model: nn.Module, tick: Callable[[], None]) -> dict[str, float]:
        """Figures over all classes; NaN where there is nothing to measure."""
        args, parts = self.args, self.parts
        found = figures(
            model, parts.val, parts.classes, args.batch_size, args.workers, self.world.device, self.world, tick
        )
        return {k: math.nan if v is None else v for k, v in found.items() if k != "classes"}

    def about(self) -> tuple[str, str, str]:
        """Heads and backbone; classes and images."""
        parts = self.parts
        images = f"{len(parts.train):,} training and {len(parts.val):,} held-out images"
        return f"{self.args.arch} on {self.args.model}", "", f"{len(parts.classes)} classes, {images}"

    def title(self) -> tuple[str, str]:
        """Model and data; training images are augmented."""
        return f"{self.args.arch} on {self.args.model}, {Path(self.args.data).name}", "augmented"

    def summary(self, best: str, epoch: str, file: Path) -> str:
        """Where the best weights are and how to measure them."""
        return (
            f"{best} on held-out images{skipped_text(self.parts.val.skipped)}, {epoch}: {file}\n"
            f"measure it again: vizoo evaluate {file.parent} --plot predictions.png"
        )


def train_dense(args: argparse.Namespace) -> int:
    """Train a detector or a segmentor by the options of ``vizoo train``; returns the exit status."""
    return train(args, Dense)
