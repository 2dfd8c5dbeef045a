"""``vizoo train --task detection`` and ``--task segmentation``, and ``vizoo evaluate`` of such runs.

torchvision's detectors and the segmentors of :mod:`vizoo.heads` on any backbone with features, with AdamW and a
learning rate that warms up and then follows a cosine or falls in steps.  Every epoch is measured on the held-out
images: average precision as COCO defines it, or intersection over union.  A run that stops goes on from its last
finished epoch, on one machine with the same number of threads bit for bit as if it had not stopped.  The papers'
recipes are mmdet's and mmseg's: ``vizoo mm``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vizoo.heads.detection import detector
from vizoo.heads.segmentation import segmentor
from vizoo.tools.common import (
    UserError,
    check_output,
    check_weights,
    compute_device,
    is_exhausted,
    print_table,
    progress,
    resolve_models,
    save_figure,
    write_json,
)
from vizoo.tools.data.dense import IGNORED, Boxes, Crops, Masks, Parts, detection_parts, segmentation_parts
from vizoo.tools.data.folders import seed_everything, seeded_batches
from vizoo.tools.options import KeyValues, Parser, number
from vizoo.tools.training.options import add_skip_unreadable, check_range, stored_arguments
from vizoo.tools.training.run import (
    EpochRun,
    check_loss,
    draw_curves,
    load_training_checkpoint,
    match_classes,
    open_run,
    refuse_processes,
    say_unnamed,
    skipped_text,
    write_options,
    write_summary,
)

ARCHS = {
    "detection": ("retinanet", "fcos", "faster_rcnn", "mask_rcnn"),
    "segmentation": ("semantic_fpn", "upernet"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "detection": {"arch": "faster_rcnn", "size": [800, 1333], "epochs": 12, "batch_size": 2, "lr": 1e-4},
    "segmentation": {"arch": "upernet", "size": [512], "epochs": 40, "batch_size": 8, "lr": 1e-4},
}
METRIC = {"detection": ("AP", "box AP"), "segmentation": ("mIoU", "mean IoU")}
PICTURED = 4  # images of a picture
SHOWN = 0.5  # score from which a picture shows a box
TRAIN_EXAMPLES = """\
examples:
  vizoo train --task detection --data coco --arch mask_rcnn --model litv2_s --pretrained
      coco/annotations/instances_train2017.json, coco/train2017/*.jpg and the same for val2017
  vizoo train --task segmentation --data ADEChallengeData2016 --num-classes 150 --reduce-zero-label --model overlock_t
      ADEChallengeData2016/images/training/*.jpg, annotations/training/*.png and the same for validation
  vizoo evaluate output/train/first --plot predictions.png
      the best epoch on the held-out images"""
EVALUATE_EXAMPLES = """\
examples:
  vizoo evaluate output/train/first
      the best epoch on the held-out images
  vizoo evaluate output/train/first --data other --plot predictions.png --out figures.json
      on the held-out part of another folder with the same classes"""


def build_train_parser(task: str) -> argparse.ArgumentParser:
    """Command-line options of training a detector or a segmentor."""
    defaults = DEFAULTS[task]
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, high=1)
    p = Parser(
        prog=f"vizoo train --task {task}",
        description=f"Train a {task} model on a backbone of the zoo or of timm.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--task", choices=(task,), help="what to train")
    p.add_argument("--data", required=True, metavar="DIR", help="folder in the layout of the examples below")
    p.add_argument("--arch", choices=ARCHS[task], default=defaults["arch"], help=f"({defaults['arch']})")
    p.add_argument("--model", default="litv2_s", metavar="MODEL", help="backbone (litv2_s)")
    p.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="its arguments")
    p.add_argument("--arch-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="of the heads")
    p.add_argument("--pretrained", action="store_true", help="start from the backbone's published weights")
    p.add_argument(
        "--frozen-stages", type=number(int, -1), default=-1, metavar="N", help="0 stem, 1 and stage 1 ... (-1)"
    )
    if task == "detection":
        p.add_argument("--size", type=count, nargs=2, default=defaults["size"], metavar=("SHORT", "LONG"),
                       help="sides in pixels that images are scaled to (800 1333)")  # fmt: skip
    else:
        p.add_argument("--size", type=count, nargs=1, default=defaults["size"], metavar="N",
                       help="training crop, and shorter side of held-out images (512)")  # fmt: skip
        p.add_argument(
            "--scale", type=positive, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"), help="random size (0.5 2)"
        )
        p.add_argument("--num-classes", type=count, metavar="N", help="(lines of classes.txt in --data)")
        p.add_argument("--reduce-zero-label", action="store_true", help="masks hold class + 1, and 0 for none (ADE20K)")
    p.add_argument("--hflip", type=share, default=0.5, metavar="P", help="probability of a mirrored image (0.5)")
    p.add_argument("--epochs", type=count, default=defaults["epochs"], metavar="N", help=f"({defaults['epochs']})")
    p.add_argument(
        "-b",
        "--batch-size",
        type=count,
        default=defaults["batch_size"],
        metavar="N",
        help=f"({defaults['batch_size']})",
    )
    p.add_argument("--opt", default="adamw", metavar="NAME", help="optimizer of timm (adamw)")
    p.add_argument("--lr", type=positive, default=defaults["lr"], metavar="LR", help=f"({defaults['lr']:g})")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.05, metavar="WD", help="(0.05)")
    p.add_argument("--sched", choices=("cosine", "multistep"), default="cosine", help="(cosine)")
    p.add_argument(
        "--decay-milestones", type=count, nargs="+", default=[8, 11], metavar="EPOCH", help="of multistep (8 11)"
    )
    p.add_argument("--decay-rate", type=share, default=0.1, metavar="RATE", help="of multistep (0.1)")
    p.add_argument("--min-lr", type=number(float, 0), default=0.0, metavar="LR", help="of cosine (0)")
    p.add_argument(
        "--warmup-updates", type=number(int, 0), default=500, metavar="N", help="(500, at most a tenth of all)"
    )
    p.add_argument("--clip-grad", type=positive, metavar="NORM", help="(none)")
    p.add_argument("--amp", action="store_true", help="mixed precision in bfloat16")
    p.add_argument("-j", "--workers", type=number(int, 0), default=4, metavar="N", help="loader processes (4)")
    text = "look at every image and mask first (full); the records of a COCO file are checked in any case"
    p.add_argument("--check-data", choices=("full", "none"), default="full", help=text)
    add_skip_unreadable(p)
    p.add_argument(
        "--seed", type=number(int, 0), default=42, metavar="S", help="of weights, order and augmentation (42)"
    )
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (cuda if there is one)")
    p.add_argument("--output", default="output/train", metavar="DIR", help="(output/train)")
    p.add_argument("--experiment", metavar="NAME", help="folder in it (date-time-arch-model)")
    p.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint; without a path from the newest of --experiment; from the start if there is none",
    )
    return p


def build_evaluate_parser(task: str) -> argparse.ArgumentParser:
    """Command-line options of evaluating a detector or a segmentor."""
    p = Parser(
        prog="vizoo evaluate",
        description=f"Measure a model of 'vizoo train --task {task}'.",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", metavar="RUN", help=f"folder that 'vizoo train --task {task}' wrote")
    p.add_argument("--task", choices=(task,), help="may be said again")
    p.add_argument("--checkpoint", metavar="PATH", help="weights (the best of the run)")
    p.add_argument("--data", metavar="DIR", help="another folder with the same classes (the run's)")
    p.add_argument("-b", "--batch-size", type=number(int, 1), metavar="N", help="of a detector (the run's)")
    p.add_argument("-j", "--workers", type=number(int, 0), metavar="N", help="loader processes (the run's)")
    p.add_argument("--check-data", choices=("full", "none"), help="(the run's)")
    add_skip_unreadable(p)
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (cuda if there is one)")
    p.add_argument("--out", metavar="FILE.json", help="write the figures there")
    p.add_argument("--plot", metavar="FILE.png", help=f"draw truth and prediction of {PICTURED} images there")
    return p


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
    names = resolve_models([options["model"]])
    if len(names) != 1:
        raise UserError(f"--model {options['model']!r} matches {len(names)} models; name one")
    settings = {
        "pretrained": pretrained,
        "frozen_stages": options["frozen_stages"],
        "backbone_kwargs": dict(options["model_kwargs"]),
        **options["arch_kwargs"],
    }
    try:
        if options["task"] == "segmentation":
            return segmentor(options["arch"], names[0], classes, **settings)
        short, long = options["size"]
        return detector(options["arch"], names[0], classes + 1, min_size=short, max_size=long, **settings)
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


def _collate(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _to(item: Any, device: torch.device) -> Any:
    if isinstance(item, dict):
        return {k: _to(v, device) for k, v in item.items()}
    return [_to(v, device) for v in item] if isinstance(item, list) else item.to(device)


def _loss(model: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
    if isinstance(targets[0], dict):
        return torch.stack(list(model(images, targets).values())).sum()
    loss: Tensor = model.loss(model(torch.stack(images)), torch.stack(targets))  # type: ignore[operator]
    return loss


def measure(
    model: nn.Module, data: Boxes | Masks, classes: Sequence[str], options: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Measure a detector or a segmentor on held-out images.

    Args:
        model: The model.
        data: The images.
        classes: Names.
        options: ``batch_size``, ``workers`` and ``amp``.
        device: Where the model is.

    Returns:
        Of a detector ``AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large``, with masks those with the
        ending ``_mask``; of a segmentor ``mIoU``, ``mAcc`` and ``pixel_accuracy``; all in per cent.  And ``classes``, a
        row of each.
    """
    model.eval()
    batch = options["batch_size"] if isinstance(data, Boxes) else 1  # images keep their aspect
    loader = DataLoader(data, batch, num_workers=options["workers"], collate_fn=_collate)
    with torch.inference_mode(), progress() as bar, _autocast(options, device):
        batches = (
            (_to(images, device), targets) for images, targets in bar.track(loader, description="held-out images")
        )
        return (
            _average_precision(model, batches, data, classes)
            if isinstance(data, Boxes)
            else _overlap(model, batches, classes)
        )


def _autocast(options: dict[str, Any], device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if options["amp"] else contextlib.nullcontext()


def _average_precision(model: nn.Module, batches: Iterator[Any], data: Boxes, classes: Sequence[str]) -> dict[str, Any]:
    from torchmetrics.detection import MeanAveragePrecision

    kinds = {"bbox": "", "segm": "_mask"} if data.masks else {"bbox": ""}
    metric = MeanAveragePrecision(iou_type=tuple(kinds), class_metrics=True, backend="pycocotools")  # type: ignore[arg-type]
    for images, targets in batches:
        found = [{k: v.cpu() for k, v in one.items()} for one in model(images)]
        if data.masks:
            found = [{**one, "masks": one["masks"].flatten(0, 1) > 0.5} for one in found]
            targets = [{**t, "masks": t["masks"].bool()} for t in targets]
        metric.update(
            [{k: v.float() if v.is_floating_point() else v for k, v in one.items()} for one in found], targets
        )
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


def _segment(model: nn.Module, image: Tensor, size: Sequence[int]) -> Tensor:
    """Class ids ``[H, W]`` of an image ``[3, h, w]`` at another size."""
    logits = model(image[None])["out"].float()
    return F.interpolate(logits, (size[0], size[1]), mode="bilinear", align_corners=False).argmax(1)[0].cpu()


def _overlap(model: nn.Module, batches: Iterator[Any], classes: Sequence[str]) -> dict[str, Any]:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    n = len(classes)
    counts = torch.zeros(n, n, dtype=torch.float64)
    for images, targets in batches:
        for image, ids in zip(images, targets, strict=True):
            called = _segment(model, image, ids.shape)
            counts += multiclass_confusion_matrix(called, ids, n, ignore_index=IGNORED)
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


def train_dense(task: str, argv: list[str]) -> int:
    """Train a detector or a segmentor; returns the exit status."""
    args = build_train_parser(task).parse_args(argv)
    refuse_processes(task)
    device = compute_device(args.device)
    options = {**{k: v for k, v in vars(args).items() if k not in ("resume", "debug")}, "task": task}
    if args.arch == "upernet" and args.batch_size == 1:
        raise UserError("--batch-size 1: the batch norms of UPerNet need at least 2 images")
    check_range("--scale", options.get("scale"))
    if args.resume == "auto" and not args.experiment:
        raise UserError("--resume without a path needs --experiment, the name of the run")
    statistics = _statistics(options)
    parts = open_parts(options, statistics)
    seed_everything(args.seed)
    model = build(options, len(parts.classes), args.pretrained and not args.resume).to(device)
    with open_run(args, f"{args.arch}-{args.model}") as (folder, checkpoint):
        trainer = _Trainer(model, parts, options, device, folder)
        if checkpoint:
            trainer.resume(checkpoint)
        if not checkpoint:
            trainer.save(-1)  # so that a run that stops in its first epoch can go on
        write_options(folder, {**options, "classes": parts.classes, "skipped": parts.skipped})
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        counts = f"{len(parts.train):,} training and {len(parts.val):,} held-out images"  # type: ignore[arg-type]
        print(
            f"{args.arch} on {args.model}: {millions:.2f} M parameters, {device}\n"
            f"{args.data}: {len(parts.classes)} classes, {counts}\n"
            f"output: {folder}"
        )
        trainer.fit()
        key, name = METRIC[task]
        best = max(trainer.history[trainer.taken_over :], key=lambda row: row[key])
        where = f"on held-out images{skipped_text(parts.val.skipped)}, epoch {int(best['epoch']) + 1} of {args.epochs}"
        print(
            f"best {name} {best[key]:.2f} {where}: "
            f"{folder / 'model_best.pth.tar'}\nmeasure it again: vizoo evaluate {folder} --plot predictions.png"
        )
    return 0


def _statistics(options: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the backbone's images."""
    from timm.models import get_pretrained_cfg

    (name,) = resolve_models([options["model"]])[:1]
    cfg: Any = get_pretrained_cfg(name, allow_unregistered=False)
    return tuple(cfg.mean), tuple(cfg.std)


class _Trainer(EpochRun):
    """One training run."""

    kept = ("arch", "model", "model_kwargs", "arch_kwargs", "size", "epochs", "batch_size", "opt", "seed")

    def __init__(
        self, model: nn.Module, parts: Parts, options: dict[str, Any], device: torch.device, folder: Path
    ) -> None:
        super().__init__(model, options, folder)
        self.parts, self.device, self.metric = parts, device, METRIC[options["task"]][0]
        batch = options["batch_size"]
        generator = torch.Generator()
        self.loader = DataLoader(
            parts.train,
            batch,
            True,
            num_workers=options["workers"],
            collate_fn=_collate,
            drop_last=True,
            generator=generator,
        )
        self.generator = generator
        if not len(self.loader):
            raise UserError(f"--batch-size {batch} exceeds the {len(parts.train)} training images")  # type: ignore[arg-type]
        try:
            self.optimizer = create_optimizer_v2(model, options["opt"], options["lr"], options["weight_decay"])
        except (ValueError, AssertionError) as e:
            raise UserError(f"--opt {options['opt']!r}: {e}") from None
        total = options["epochs"] * len(self.loader)
        warmup = min(options["warmup_updates"], total // 10)
        shared = {"warmup_t": warmup, "warmup_lr_init": options["lr"] * 1e-3, "t_in_epochs": False}
        if options["sched"] == "cosine":
            cosine = {"t_initial": total - warmup, "lr_min": options["min_lr"], "warmup_prefix": True}
            self.scheduler: Any = CosineLRScheduler(self.optimizer, **cosine, **shared)
        else:
            steps = [epoch * len(self.loader) for epoch in options["decay_milestones"]]
            self.scheduler = MultiStepLRScheduler(self.optimizer, steps, options["decay_rate"], **shared)

    def entries(self) -> dict[str, Any]:
        """What else a checkpoint holds."""
        return {"arch": self.options["arch"], "classes": self.parts.classes, "skipped": self.parts.skipped}

    def check(self, checkpoint: dict[str, Any], who: str) -> None:
        """Refuse a checkpoint of other classes; another order is mended."""
        trained = checkpoint.get("classes")
        self.parts.reorder(match_classes(trained, self.parts.classes, f"--data {self.options['data']!r}", who))
        say_unnamed(trained, who)

    def fit(self) -> None:
        """Train to the last epoch."""
        key, name = METRIC[self.options["task"]]
        print(f"  epoch  train loss  {name:>8s}        lr  images/s  elapsed")
        while self.epoch < self.options["epochs"]:
            started = time.monotonic()
            loss = self._train_epoch()
            speed = len(self.loader) * self.options["batch_size"] / (time.monotonic() - started)
            found = measure(self.model, self.parts.val, self.parts.classes, self.options, self.device)  # type: ignore[arg-type]
            figures = {k: math.nan if v is None else v for k, v in found.items() if k != "classes"}
            row = {"epoch": self.epoch, "train_loss": loss, **figures, "lr": self.optimizer.param_groups[0]["lr"]}
            better = all(not row[key] <= earlier[key] for earlier in self.history[self.taken_over :])
            self.history.append(row)
            self.save(self.epoch, *["model_best"] * better)
            write_summary(self.folder, self.history)
            elapsed = self.elapsed + time.monotonic() - self.started
            print(
                f"{self.epoch + 1:3d}/{self.options['epochs']:<3d}  {loss:10.4f}  {row[key]:8.2f}"
                f"{'*' if better else ' '} {row['lr']:8.2e}  {speed:8.1f}  {datetime.timedelta(seconds=int(elapsed))}",
                flush=True,
            )
            self.epoch += 1
        draw_curves(
            self.history,
            self.folder / "curves.png",
            f"{self.options['arch']} on {self.options['model']}, {Path(self.options['data']).name}",
            "augmented",
            (key, f"{name} (%)"),
        )

    def _train_epoch(self) -> float:
        options, total = self.options, 0.0
        self.model.train()
        self.generator.manual_seed(options["seed"] * 100_003 + self.epoch)
        batches = seeded_batches(self.loader, options["seed"], 0, self.epoch)
        with progress() as bar:
            task = bar.add_task(f"epoch {self.epoch + 1}/{options['epochs']}", total=len(self.loader))
            for k, (images, targets) in enumerate(batches):
                self.scheduler.step_update(self.epoch * len(self.loader) + k)
                with _autocast(options, self.device):
                    loss = _loss(self.model, _to(images, self.device), _to(targets, self.device))
                where = f"in epoch {self.epoch + 1}, batch {k + 1} of {len(self.loader)}"
                check_loss(loss.item(), where, f"lower --lr {options['lr']:g} or add --clip-grad")
                self.optimizer.zero_grad()
                loss.backward()
                if options["clip_grad"]:
                    nn.utils.clip_grad_norm_(self.model.parameters(), options["clip_grad"])
                self.optimizer.step()
                total += loss.item()
                bar.advance(task)
        return total / len(self.loader)


def evaluate_dense(task: str, argv: list[str]) -> int:
    """Measure a run; returns the exit status."""
    args = build_evaluate_parser(task).parse_args(argv)
    options, records = stored_arguments(build_train_parser(task), args.run, task)
    check_output(args.out, "--out", ".json")
    check_output(args.plot, "--plot", ".png")
    device = compute_device(args.device)
    given = ("data", "batch_size", "workers", "check_data")
    options["skip_unreadable"] |= args.skip_unreadable
    options |= {"task": task} | {k: getattr(args, k) for k in given if getattr(args, k) is not None}
    file = Path(args.checkpoint or Path(args.run) / "model_best.pth.tar")
    checkpoint = load_training_checkpoint(file, "--checkpoint")
    parts = open_parts(options, _statistics(options))
    trained = checkpoint.get("classes") or records.get("classes")
    parts.reorder(match_classes(trained, parts.classes, f"--data {options['data']!r}", f"RUN {args.run!r}"))
    model = build(options, len(parts.classes), False)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (AttributeError, RuntimeError, TypeError) as e:
        reason = " ".join(" ".join(str(e).split()).split(" ")[:30])
        raise UserError(f"--checkpoint {str(file)!r} does not fit the run: {reason}") from None
    check_weights(model, file)
    say_unnamed(trained, str(file))
    model.to(device)
    found = measure(model, parts.val, parts.classes, options, device)  # type: ignore[arg-type]
    result = {k: options[k] for k in ("task", "arch", "model", "data")}
    result |= {"images": len(parts.val), "skipped": parts.val.skipped, **found}
    _report(result)
    if args.out:
        write_json(args.out, result)
    if args.plot:
        draw_predictions(model, parts.val, parts.classes, device, Path(args.plot))  # type: ignore[arg-type]
    return 0


def _report(result: dict[str, Any]) -> None:
    head = f"{result['arch']} on {result['model']}, {result['images']:,} images"
    head += f"{skipped_text(result['skipped'])} of {result['data']}"
    about = ("task", "arch", "model", "data", "images", "skipped", "classes")
    figures = {k: v for k, v in result.items() if k not in about}
    print(f"{head}: " + ", ".join(f"{k} {'-' if v is None else f'{v:.2f}'}" for k, v in figures.items()))
    columns = [k for k in result["classes"][0] if k != "name"]
    rows = [[row["name"], *("" if row[k] is None else f"{row[k]:.2f}" for k in columns)] for row in result["classes"]]
    print_table(["class", *(f"{k} (%)" for k in columns)], rows, numeric=range(1, len(columns) + 1))


def draw_predictions(
    model: nn.Module, data: Boxes | Masks, classes: Sequence[str], device: torch.device, path: Path
) -> None:
    """Draw truth and prediction side by side for some images, spread over the data.

    Args:
        model: The model.
        data: Images with truth.
        classes: Names.
        device: Where the model is.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    chosen = range(0, len(data), -(-len(data) // PICTURED))
    figure = Figure(figsize=(9, 3.6 * len(chosen)), dpi=130, layout="constrained")
    draw: Any = _draw_boxes if isinstance(data, Boxes) else _draw_masks
    model.eval()
    for axes, index in zip(figure.subplots(len(chosen), 2, squeeze=False), chosen, strict=True):
        with torch.inference_mode():
            panels = draw(model, data, index, classes, device)
        for panel, title, image in zip(axes, ("truth", "prediction"), panels, strict=True):
            panel.imshow(image.permute(1, 2, 0).numpy())
            panel.set_title(title, fontsize=9)
            panel.set_axis_off()
    if isinstance(data, Masks):
        from matplotlib.patches import Patch

        handles = [Patch(color=_fraction(_colour(i)), label=name) for i, name in enumerate(classes[:20])]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save_figure(figure, path)


def _colour(index: int) -> tuple[int, int, int]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["tab20"](index * 2 % 20 + index // 10 % 2, bytes=True)
    return int(red), int(green), int(blue)


def _fraction(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def _draw_boxes(
    model: nn.Module, data: Boxes, index: int, classes: Sequence[str], device: torch.device
) -> list[Tensor]:
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image, target = data[index]
    (found,) = model([image.to(device)])
    found = {k: v.cpu() for k, v in found.items()}
    kept = found["scores"] >= SHOWN
    panels = []
    for boxes, labels, scores, masks in (
        (target["boxes"], target["labels"], None, target.get("masks")),
        (
            found["boxes"][kept],
            found["labels"][kept],
            found["scores"][kept],
            found["masks"][kept] if "masks" in found else None,
        ),
    ):
        panel = (image * 255).round().to(torch.uint8)
        colours = [_colour(int(i) - 1) for i in labels]
        names = [classes[int(i) - 1] for i in labels]
        if scores is not None:
            names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
        if masks is not None and len(masks):
            outlines = masks.flatten(0, 1) > 0.5 if masks.dim() == 4 else masks.bool()
            panel = draw_segmentation_masks(panel, outlines, alpha=0.4, colors=colours)  # type: ignore[arg-type]
        if len(boxes):
            panel = draw_bounding_boxes(panel, boxes, names, colours, width=2)  # type: ignore[arg-type]
        panels.append(panel)
    return panels


def _draw_masks(
    model: nn.Module, data: Masks, index: int, classes: Sequence[str], device: torch.device
) -> list[Tensor]:
    from torchvision.utils import draw_segmentation_masks

    image, ids = data[index]
    called = _segment(model, image.to(device), ids.shape).masked_fill(ids == IGNORED, IGNORED)
    picture = data.read(index)[0].as_subclass(Tensor)
    colours = [_colour(i) for i in range(len(classes))]
    each = [torch.stack([m == i for i in range(len(classes))]) for m in (ids, called)]
    return [draw_segmentation_masks(picture, m, alpha=0.6, colors=colours) for m in each]  # type: ignore[arg-type]
