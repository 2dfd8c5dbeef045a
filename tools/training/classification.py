"""``vizoo train``: a classifier with timm's parts and the option names of timm's training script.

Differences from that script: ``--data digits`` brings a data set and a recipe along; data, options and the fit of model
and input size are checked before training starts; ``--resume`` without a path finds the newest checkpoint of the run;
and a resumed run is exact.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.resources
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
from vizoo.tools.options import WINDOW, KeyValues, Parser, add, add_alias, check_outputs, number
from vizoo.tools.training.loop import train
from vizoo.tools.training.options import (
    FILES,
    add_average,
    add_batches,
    add_data,
    add_model,
    add_optimizer,
    add_run,
    add_schedule,
    add_warmup,
    check_choice,
    check_range,
    parse_task,
)
from vizoo.tools.training.run import match_classes, say_unnamed, skipped_text
from vizoo.tools.training.task import ALONE, Column, Task, World, extra_loss
from vizoo.tools.training.tuning import TUNES, tune

DIGITS_RECIPE = "classification/digits_litv2_s.yaml"
TUNE_RECIPE = "classification/tune.yaml"
METRICS = {"top1": ("top-1", " %"), "top5": ("top-5", " %"), "loss": ("loss", "")}
EPILOG = f"""\
examples:
  vizoo train --data digits
      LITv2-S from scratch on scikit-learn's handwritten digits, minutes on two CPU cores
  vizoo train --data digits --model convnext_atto --epochs 10 --lr-base 2e-3
      the same recipe with another model; options given here override the recipe
  vizoo train --data digits --output runs --experiment first --resume
      continue runs/first exactly where it was killed, or start it
  vizoo train --data flowers --model litv2_s --pretrained-path litv2_s.pth --opt adamw --lr 1e-4 --epochs 30 -b 64
      fine-tune on your own images: flowers/train/<class>/*.jpg and flowers/val/<class>/*.jpg
  vizoo train --data flowers --model vit_base_patch16_224.augreg_in21k --pretrained --tune tcpa --lr 0.014
      train prompts and head of a frozen transformer, by the recipe of TCPA's paper
  vizoo train -c output/train/half/args.yaml --only-classes 5 6 7 8 9 --tune tcpa \\
      --pretrained-path output/train/half/model_best.pth.tar
      the same on five digits, from a run on the others (--data digits --only-classes 0 1 2 3 4 --experiment half)
  vizoo train -c output/train/first/args.yaml --seed 1
      repeat a run with another seed
  torchrun --nproc_per_node=8 -m vizoo.tools.train --data imagenet --model litv2_s --opt adamw --lr-base 5e-4 \\
      --lr-base-size 512 --lr-base-scale linear --weight-decay 0.05 --clip-grad 5 --warmup-epochs 20 \\
      --sched-on-updates --mixup 0.8 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --amp \\
      --lr-scale '*conv_offset.weight=0.01'
      ImageNet on eight GPUs

{FILES}"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; defaults are those of timm's training script unless the help says otherwise."""
    positive = number(int, 1)
    real, share = number(float, 0), number(float, 0, 1)
    toggle = argparse.BooleanOptionalAction
    p = Parser(
        prog="vizoo train",
        usage="vizoo train --data NAME|DIR [--model MODEL] [options]",
        description="Train a classifier on handwritten digits or on folders of images.  Parentheses give defaults; "
        "'digits' is what its recipe sets instead.",
        epilog=EPILOG,
    )
    add(p, "--config")
    add(p, "--task", "classification; '--task detection --help' and so on explain the others")

    text = (
        "'digits', built in, sets a recipe for everything below; or a folder with train/ and val/ or validation/, each "
    )
    g = add_data(p, f"{text}with one folder for each class", "4; digits 0")
    add_alias(g, "--data-dir", "data")
    g.add_argument("--train-split", default="train", metavar="NAME", help="folder of training images (train)")
    g.add_argument("--val-split", default="validation", metavar="NAME", help="folder of held-out images (validation)")
    add(g, "--only-classes", "all")
    add(g, "--check-images", default="auto")
    add(g, "--skip-unreadable")
    add(g, "--window", WINDOW)
    g.add_argument("--pin-mem", action=toggle, default=False, help="pin memory, faster transfer to a GPU")

    g = add_model(p, "digits: litv2_s")
    add(g, "--pretrained", "to start from")
    g.add_argument(
        "--pretrained-path",
        metavar="PATH",
        help="start from this file as if it were the published weights: official names and another head are adapted",
    )
    g.add_argument("--initial-checkpoint", metavar="PATH", help="start from exactly this checkpoint, head included")
    add(g, "--num-classes", "the number of classes in the data")
    g.add_argument("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax, catavgmax (the model's)")
    add(g, "--img-size", "the model's; digits 32")
    g.add_argument("--input-size", type=positive, nargs=3, metavar=("C", "H", "W"), help="overrides --img-size")
    add(g, "--in-chans", "3")
    add(g, "--crop-pct", "the model's")
    finite, above = number(float), number(float, 0, above=True)
    g.add_argument("--mean", type=finite, nargs="+", metavar="MEAN", help="mean pixel, one value or one per channel")
    g.add_argument("--std", type=above, nargs="+", metavar="STD", help="standard deviation, likewise")
    g.add_argument("--interpolation", metavar="NAME", help="resizing: nearest, bilinear, bicubic (the model's)")
    g.add_argument("--grad-checkpointing", action=toggle, default=False, help="less memory, more computation")
    g.add_argument("--drop", type=share, default=0.0, metavar="PCT", help="dropout (0)")
    g.add_argument("--drop-path", type=share, metavar="PCT", help="stochastic depth (the model's)")

    g = p.add_argument_group("tuning")
    g.add_argument(
        "--tune",
        choices=TUNES,
        help="what to train: prompts and head of a frozen transformer (tcpa, vpt, vfpt), the head, or everything; "
        "sets the recipe of TCPA's paper",
    )
    g.add_argument(
        "--tune-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="settings of the prompts"
    )

    g = add_batches(p, 128)
    g.add_argument("-vb", "--validation-batch-size", type=positive, metavar="N", help="held-out (as --batch-size)")
    add(g, "--channels-last")
    g.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile (inductor)")

    add_optimizer(p, "sgd", 2e-5, notes=("sgd; digits adamw", "2e-5; digits 0.05"))

    g = add_schedule(p, 300, None, note="300; digits 8")
    add_warmup(g, 5)
    g.add_argument("--lr-base", type=real, default=0.1, metavar="LR", help="at a total batch of --lr-base-size (0.1)")
    g.add_argument("--lr-base-size", type=positive, default=256, metavar="N", help="(256)")
    g.add_argument(
        "--lr-base-scale",
        choices=("", "linear", "sqrt"),
        default="",
        help="how it grows with the batch (sqrt for optimizers named ada* and lamb, else linear)",
    )
    _add_augmentation(p)
    add_average(p)
    add_run(p, 42, "model-size", "top1", list(METRICS))
    return p


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    count, positive = number(int, 0), number(int, 1)
    real, share = number(float, 0), number(float, 0, 1)
    g = parser.add_argument_group("augmentation and regularization")
    g.add_argument("--no-aug", action="store_true", help="resize and crop only; mixup and cutmix stay")
    g.add_argument("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="(rrc, random resized crop)")
    add(g, "--scale", "0.08 1, the area of a crop", default=[0.08, 1.0])
    g.add_argument("--ratio", type=real, nargs=2, default=[3 / 4, 4 / 3], metavar="RATIO", help="(0.75 1.33)")
    add(g, "--hflip", "0.5; digits 0", default=0.5)
    g.add_argument("--vflip", type=share, default=0.0, metavar="P", help="(0)")
    g.add_argument("--rotate", type=real, default=0.0, metavar="DEG", help="rotate by up to so many degrees (0)")
    g.add_argument("--translate", type=share, default=0.0, metavar="PCT", help="shift by up to this share (0)")
    g.add_argument("--color-jitter", type=real, default=0.4, metavar="PCT", help="off with --aa (0.4)")
    g.add_argument("--color-jitter-prob", type=share, metavar="P", help="(always)")
    g.add_argument("--grayscale-prob", type=share, default=0.0, metavar="P", help="(0)")
    g.add_argument("--gaussian-blur-prob", type=share, default=0.0, metavar="P", help="(0)")
    g.add_argument("--aa", metavar="POLICY", help="AutoAugment, for example rand-m9-mstd0.5-inc1 (off)")
    g.add_argument("--train-interpolation", default="random", metavar="NAME", help="of random crops (random)")
    g.add_argument("--reprob", type=share, default=0.0, metavar="P", help="random erasing (0)")
    g.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="its filling (pixel)")
    g.add_argument("--recount", type=positive, default=1, metavar="N", help="erased areas (1)")
    g.add_argument("--mixup", type=real, default=0.0, metavar="ALPHA", help="(0)")
    g.add_argument("--cutmix", type=real, default=0.0, metavar="ALPHA", help="(0)")
    g.add_argument("--cutmix-minmax", type=share, nargs=2, metavar="PCT", help="cutmix by side lengths instead")
    g.add_argument("--mixup-prob", type=share, default=1.0, metavar="P", help="of either (1)")
    g.add_argument("--mixup-switch-prob", type=share, default=0.5, metavar="P", help="of cutmix if both are on (0.5)")
    g.add_argument("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="(batch)")
    g.add_argument("--mixup-off-epoch", type=count, default=0, metavar="N", help="off from this epoch on (never)")
    g.add_argument("--smoothing", type=share, default=0.1, metavar="PCT", help="label smoothing (0.1)")
    g.add_argument("--bce-loss", action=argparse.BooleanOptionalAction, default=False, help="binary cross-entropy")


def _recipes(stack: contextlib.ExitStack, args: argparse.Namespace) -> Iterator[Path]:
    for wanted, name in ((args.tune is not None, TUNE_RECIPE), (args.data == "digits", DIGITS_RECIPE)):
        if wanted:
            recipe = importlib.resources.files("vizoo.configs").joinpath(name)
            yield stack.enter_context(importlib.resources.as_file(recipe))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Merge defaults, the recipes of data set and tuning, the configuration file and the command line, in this order.

    Args:
        argv: Arguments.

    Returns:
        Checked options.

    Raises:
        UserError: For bad options or configuration files.
    """
    with contextlib.ExitStack() as stack:
        args = parse_task(build_parser(), argv, "classification", lambda args: list(_recipes(stack, args)))
    if not args.model:
        raise UserError("--model is missing; the shortest command is 'vizoo train --data digits'")
    check_outputs(args.num_classes)
    check_choice("--eval-metric", args.eval_metric, list(METRICS))
    if args.batch_size % 2 and (args.mixup or args.cutmix or args.cutmix_minmax):
        raise UserError(f"--batch-size {args.batch_size} is odd; mixup and cutmix need an even number")
    if args.input_size:
        if args.input_size[0] not in (1, 3) or args.in_chans not in (None, args.input_size[0]):
            raise UserError(f"--input-size {args.input_size[0]} ...: channels must be 1 or 3 and agree with --in-chans")
        args.in_chans = args.input_size[0]
    args.in_chans = args.in_chans or 3
    if args.in_chans not in (1, 3):
        raise UserError(f"--in-chans {args.in_chans}: need 1 or 3, images are gray or RGB")
    for name in ("scale", "ratio", "cutmix_minmax"):
        check_range(f"--{name.replace('_', '-')}", getattr(args, name))
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values and len(values) not in (1, args.in_chans):
            raise UserError(f"--{name} has {len(values)} values; give one, or one for each of {args.in_chans} channels")
    for name in ("interpolation", "train_interpolation"):
        value, allowed = getattr(args, name), ["nearest", "bilinear", "bicubic"]
        allowed += ["random"] if name.startswith("train") else []
        if value is not None and value not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {value!r} is unknown; allowed: {', '.join(allowed)}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


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
        self.what = (f"eval_{args.eval_metric}", *METRICS[args.eval_metric])
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


def train_classifier(argv: list[str]) -> int:
    """Train a classifier; returns the exit status."""
    args = parse_options(argv)
    args.model = resolve_model(args.model)
    return train(args, Classification)
