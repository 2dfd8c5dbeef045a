"""``vizoo train``: a classifier with timm's parts and the option names of timm's training script.

Differences from that script: ``--data digits`` brings a data set and a recipe along; data, options and the fit of model
and input size are checked before training starts; ``--resume`` without a path finds the newest checkpoint of the run;
and a resumed run is exact.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.loss
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from timm.utils import accuracy
from torch import nn

from vizoo.backbones.layers import PROMPTS, has_prompts
from vizoo.tools.common import Failure, UserError, build_model, one_line, resolve_model, taking
from vizoo.tools.data.folders import (
    Splits,
    digits_splits,
    folder_splits,
    held_out_loader,
    reorder_classes,
    reordered,
    seed_everything,
    training_loader,
)
from vizoo.tools.data.shares import Share, gather_batches, share_order
from vizoo.tools.training.loop import train
from vizoo.tools.training.parsers import METRICS
from vizoo.tools.training.run import match_classes, say_unnamed, skipped_text
from vizoo.tools.training.task import ALONE, Column, Task, World, extra_loss
from vizoo.tools.training.tuning import tune


def model_config(args: argparse.Namespace, num_classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to build the model of a run and how to feed it.

    Args:
        args: Options.
        num_classes: Outputs.

    Returns:
        Keywords for ``timm.create_model`` and the data configuration of :func:`timm.data.resolve_data_config`.
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    if args.in_chans != 3:
        kwargs["in_chans"] = args.in_chans
    if args.gp:
        kwargs["global_pool"] = args.gp
    kwargs.update(args.model_kwargs)
    config = get_pretrained_cfg(args.model, allow_unregistered=True) if ":" not in args.model else None
    data = resolve_data_config(vars(args), pretrained_cfg=config.to_dict() if config else {})
    if data["input_size"][0] != args.in_chans:
        data["input_size"] = (args.in_chans, *data["input_size"][1:])
    size = tuple(data["input_size"])
    if config and config.fixed_input_size and size[1:] != tuple(config.input_size[1:]):
        kwargs.setdefault("img_size", size[1:])
    return kwargs, data


def open_splits(args: argparse.Namespace, check: str) -> Splits:
    """The images of a run.

    Args:
        args: Options.
        check: As in :func:`vizoo.tools.data.folders.folder_splits`.

    Returns:
        Both splits.
    """
    mode = "L" if args.in_chans == 1 else "RGB"
    if args.data == "digits":
        return digits_splits(mode, args.only_classes)
    where = (args.data, args.train_split, args.val_split)
    return folder_splits(*where, mode, check, args.window, args.skip_unreadable, args.only_classes)


def shared_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], world: World) -> Any:
    """Loader of held-out images, of which every process takes its batches.

    Args:
        args: Options.
        dataset: All of them.
        data_config: Of :func:`model_config`.
        world: Processes.

    Returns:
        The loader.
    """
    size = args.validation_batch_size or args.batch_size
    share = Share(dataset, size, world.rank, world.size) if world.size > 1 else dataset
    return held_out_loader(args, share, data_config, world.device)


class Classification(Task):
    """A classifier on digits or on folders of images.

    Args:
        args: Options of the command.
        world: Processes.
    """

    columns = (
        Column("train loss", "train_loss", ".4f"),
        Column("held-out loss", "eval_loss", ".4f"),
        Column("top-1 %", "eval_top1", ".2f"),
    )

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        super().__init__(args, world)
        self.splits = splits = open_splits(args, args.check_images if world.primary else "none")
        self.classes = splits.classes
        self.skipped = {"train": splits.train.skipped, "val": splits.held_out.skipped}
        self.num_classes = args.num_classes or len(self.classes)
        if self.num_classes < len(self.classes):
            raise UserError(f"--num-classes {self.num_classes} is below the {len(self.classes)} classes of the data")
        seed_everything(args.seed)
        self.model = self._build_model()
        self.loader = training_loader(args, splits.train, self.data_config, world.device, self.num_classes)
        share_order(self.loader, args.seed, world.rank, world.size)
        self.held_out = shared_loader(args, splits.held_out, self.data_config, world)
        self.mixed = bool(args.mixup or args.cutmix or args.cutmix_minmax)
        self.criterion = self._build_loss().to(world.device)
        self.what = (f"eval_{args.eval_metric}", *METRICS["classification"][args.eval_metric])
        self.decreasing = args.eval_metric == "loss"

    def _build_model(self) -> nn.Module:
        args = self.args
        self.load_kwargs, self.data_config = model_config(args, self.num_classes)
        overlay: dict[str, Any] = {}
        if args.pretrained_path:  # -1 classes: its head is always replaced
            overlay["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
        model: nn.Module = build_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            **overlay,
            checkpoint_path=args.initial_checkpoint or "",
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **self.load_kwargs,
        )
        self.had_prompts = has_prompts(model)
        tune(model, args)
        if args.grad_checkpointing:
            try:
                model.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AttributeError, AssertionError):
                raise UserError(f"--grad-checkpointing: model {args.model!r} does not support it") from None
        model.to(self.world.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._probe(model, tuple(self.data_config["input_size"]))
        return model

    def _probe(self, model: nn.Module, size: tuple[int, ...]) -> None:
        """Run the model once, so that a size it cannot take is one line before training starts."""
        what = f"input {size[1]}x{size[2]} (--img-size) with --batch-size {self.args.batch_size}"
        with taking(self.args.model, what), torch.no_grad():
            out = model.eval()(torch.zeros(2, *size, device=self.world.device))
            # in training the output may be another one, and BatchNorm on a 1x1 map needs two images
            batch = min(2, self.args.batch_size)
            trained = copy.deepcopy(model).train()(torch.zeros(batch, *size, device=self.world.device))
        try:
            logits_of(trained)
            if isinstance(trained, dict) and len(trained) > 1 and not hasattr(model, "extra_loss"):
                raise TypeError(f"its output in training has {', '.join(trained)}, but it has no extra_loss() for them")
        except TypeError as e:
            raise UserError(f"model {self.args.model!r} cannot be trained here: {e}") from None
        if not isinstance(out, torch.Tensor) or out.shape != (2, self.num_classes) or not out.isfinite().all():
            shape = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise UserError(
                f"model {self.args.model!r} gives {shape} at {size[1]}x{size[2]} instead of finite logits "
                f"[2, {self.num_classes}]; change --img-size or the model"
            )

    def _build_loss(self) -> nn.Module:
        args = self.args
        if args.bce_loss:
            return timm.loss.BinaryCrossEntropy(smoothing=0.0 if self.mixed else args.smoothing)
        if self.mixed:
            return timm.loss.SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=args.smoothing)

    def label(self) -> str:
        """Model and side of the input."""
        return f"{self.args.model}-{self.data_config['input_size'][-1]}"

    def entries(self) -> dict[str, Any]:
        """Model, classes and images left out."""
        return {"arch": self.args.model, **self.records()}

    def records(self) -> dict[str, Any]:
        """Classes and images left out."""
        return {"classes": self.classes, "skipped": self.skipped}

    def take_over(self, checkpoint: dict[str, Any], who: str) -> None:
        """Refuse another model and other classes; another order of the classes is mended."""
        if checkpoint["arch"] != self.args.model:
            raise UserError(f"{who} holds model {checkpoint['arch']!r}, --model is {self.args.model!r}")
        trained = checkpoint.get("classes")
        order = match_classes(trained, self.classes, f"--data {self.args.data!r}", who)
        for part in (self.splits.train, self.splits.held_out):
            reorder_classes(part, order)
        self.classes = reordered(self.classes, order)
        if self.world.primary:
            say_unnamed(trained, who)

    def compute(self) -> nn.Module:
        """The model, compiled if asked for."""
        backend = self.args.torchcompile
        if not backend:
            return super().compute()
        try:
            compiled: Any = torch.compile(self.model, backend=backend)
        except (RuntimeError, ImportError) as e:
            raise UserError(f"--torchcompile {backend!r}: {one_line(e)}") from None
        found: nn.Module = compiled
        return found

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch mixing off where ``--mixup-off-epoch`` says; a frozen backbone stays in evaluation mode."""
        args = self.args
        self.loader.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        if args.tune == "linear":
            self.model.eval()

    def losses(self, model: nn.Module, batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Loss of images ``[B, C, H, W]`` and targets ``[B]`` or ``[B, classes]``, all losses added."""
        images, target = batch
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        out = model(images)
        logits = logits_of(out)
        loss = self.criterion(logits, target)
        more = extra_loss(self.model, out, lambda logits: self.criterion(logits, target))
        loss = loss if more is None else loss + more
        if self.mixed:
            return {"loss": loss}
        return {"loss": loss, "right": 100 * (logits.detach().argmax(1) == target).sum()}

    def measure(self, model: nn.Module, tick: Callable[[], None]) -> dict[str, float]:
        """``loss``, ``top1`` and ``top5`` on held-out images."""
        last = self.args.channels_last
        return accuracies(model, self.held_out, self.world.device, last, self.world, on_batch=lambda *_: tick())

    def row(self, loss: float, right: float | None, figures: dict[str, float]) -> dict[str, float]:
        """``train_loss``, ``train_top1`` without mixing, and the figures after ``eval_``."""
        out = {"train_loss": loss} if right is None else {"train_loss": loss, "train_top1": right}
        return {**out, **{f"eval_{k}": v for k, v in figures.items()}}

    def about(self) -> tuple[str, str, str]:
        """Model, size of its input, classes and images."""
        size, splits = "x".join(map(str, self.data_config["input_size"])), self.splits
        images = f"{len(splits.train):,} training and {len(splits.held_out):,} held-out images"
        return self.args.model, size, f"{len(self.classes)} classes, {images}"

    def title(self) -> tuple[str, str]:
        """Model, data and size; how training images are changed."""
        args, size = self.args, "x".join(map(str, self.data_config["input_size"]))
        how = ["as is" if args.no_aug else "augmented"]
        how += ["mixed"] * self.mixed + [f"smoothing {args.smoothing:g}"] * bool(args.smoothing)
        return f"{args.model} on {Path(args.data).name}, {size}", ", ".join(how)

    def summary(self, best: str, epoch: str, file: Path) -> str:
        """Where the best weights are and how to load them."""
        count, left_out = len(self.splits.held_out), skipped_text(self.skipped["val"])
        return (
            f"{best} on {count:,} held-out images{left_out}, {epoch}: {file}\n"
            f"learning curves: {file.parent / 'curves.png'}\n"
            f"load it: {self._load_text(str(file))}"
        )

    def _load_text(self, file: str) -> str:
        """The line of Python that loads a checkpoint."""
        args = self.args
        create = functools.partial(_call, "timm.create_model", repr(args.model))
        if args.tune not in PROMPTS or self.had_prompts:
            return f"import timm, vizoo; model = {create(**self.load_kwargs, checkpoint_path=file)}"
        tuned = _call(f"PROMPTS[{args.tune!r}]", create(**self.load_kwargs), **args.tune_kwargs)
        return (
            f"import timm; from vizoo.backbones.layers import PROMPTS; model = {tuned}; "
            f"model.load_state_dict(timm.models.load_state_dict({file!r}))"
        )


def logits_of(out: Any) -> torch.Tensor:
    """The logits of a classifier in training.

    Args:
        out: Logits ``[B, classes]``, or a dictionary with them as ``main``; the rest is for its ``extra_loss``.

    Returns:
        The logits.

    Raises:
        TypeError: For anything else.
    """
    logits = out.get("main") if isinstance(out, dict) else out
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"its output in training is a {type(out).__name__}; need logits, or a dictionary with main")
    return logits


def predictions(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    channels_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run a classifier once over its images.

    Args:
        model: Maps images ``[B, C, H, W]`` to logits ``[B, classes]``.
        loader: Yields images and targets ``[B]``.
        device: Where the model is.
        channels_last: Hand images over in channels-last layout.

    Yields:
        Logits ``[B, classes]`` in float32 and targets ``[B]``, on the device.
    """
    model.eval()
    for images, target in loader if len(loader) else ():  # timm's loader of nothing fails
        images, target = images.to(device), target.to(device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits = model(images)
        yield logits.float(), target


def accuracies(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    channels_last: bool = False,
    world: World = ALONE,
    on_batch: Callable[[torch.Tensor, torch.Tensor], None] = lambda logits, target: None,
) -> dict[str, float]:
    """Measure a classifier.

    Args:
        model: As for :func:`predictions`, like all but the last two.
        loader: Images and targets.
        device: Where the model is.
        channels_last: Memory layout of images.
        world: Processes that share the images by whole batches.
        on_batch: Called with logits ``[B, classes]`` and targets ``[B]`` after each batch.

    Returns:
        ``loss`` (cross-entropy without smoothing), ``top1`` and ``top5`` in per cent.

    Raises:
        Failure: If an output is not finite.
    """
    rows = []
    for logits, target in predictions(model, loader, device, channels_last):
        n = len(target)
        if not logits.isfinite().all():
            raise Failure("the model answers held-out images with NaN or infinity; its accuracy would mean nothing")
        # exact: the share is a float32
        right = [round(share.item() * n / 100) for share in accuracy(logits, target, topk=(1, 5))]
        loss = nn.functional.cross_entropy(logits, target).item()
        rows.append([n, loss * n, *(100 * r / n * n for r in right)])
        on_batch(logits, target)
    count, *sums = (sum(column) for column in zip(*gather_batches(rows, world.rank, world.size), strict=True))
    return {name: total / count for name, total in zip(("loss", "top1", "top5"), sums, strict=True)}


def _call(function: str, *args: str, **kwargs: Any) -> str:
    """A function call as Python writes it."""
    return f"{function}({', '.join([*args, *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def train_classifier(args: argparse.Namespace) -> int:
    """Train a classifier by the options of ``vizoo train``; returns the exit status."""
    args.model = resolve_model(args.model)
    return train(args, Classification)
