"""Parsers of ``vizoo train``, one for each task; nothing heavy is imported to read options or to explain them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vizoo.tools.common import UserError
from vizoo.tools.options import WINDOW, KeyValues, Parser, add, add_alias, check_outputs, number
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

DIGITS_RECIPE = "classification/digits_litv2_s.yaml"
TUNE_RECIPE = "classification/tune.yaml"
TUNES = ("tcpa", "vpt", "vfpt", "linear", "full")  # the kinds of prompts, and what else may be trained
ARCHS = {
    "detection": ("retinanet", "fcos", "faster_rcnn", "mask_rcnn"),
    "segmentation": ("semantic_fpn", "upernet"),
}
METRICS = {  # of --eval-metric by task: how each is written, and its unit
    "classification": {"top1": ("top-1", " %"), "top5": ("top-5", " %"), "loss": ("loss", "")},
    "detection": {
        "AP": ("box AP", " %"),
        "AP50": ("box AP50", " %"),
        "AP75": ("box AP75", " %"),
        "AP_mask": ("mask AP", " %"),
    },
    "segmentation": {
        "mIoU": ("mean IoU", " %"),
        "mAcc": ("mean accuracy", " %"),
        "pixel_accuracy": ("pixel accuracy", " %"),
    },
    "scanpath": {"delta": ("delta", ""), "sequence_score": ("sequence score", "")},
}
CLASSIFIER_EXAMPLES = f"""\
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
DENSE_EXAMPLES = f"""\
examples:
  vizoo train --task detection --data coco --arch mask_rcnn --model litv2_s --pretrained
      coco/annotations/instances_train2017.json, coco/train2017/*.jpg and the same for val2017
  vizoo train --task segmentation --data ADEChallengeData2016 --num-classes 150 --reduce-zero-label --model overlock_t
      ADEChallengeData2016/images/training/*.jpg, annotations/training/*.png and the same for validation
  vizoo evaluate output/train/first --plot predictions.png
      the best epoch on the held-out images

{FILES}"""
SCANPATH_EXAMPLES = f"""\
examples:
  vizoo train --task scanpath --data search --model oat_small --lr 3e-4 --epochs 5 --experiment search
      a synthetic viewer who goes row by row to the target, learnt from scratch in about two minutes on a CPU
  vizoo train --task scanpath --data Amazon.json --images covers --model oat_small --experiment amazon
      people who look for a book cover; without --images from the places alone
  vizoo evaluate output/train/amazon --samples 100 --plot scanpaths.png
      the best epoch on the test part beside the people

{FILES}"""


def classifier_parser() -> Parser:
    """The parser; defaults are those of timm's training script unless the help says otherwise."""
    positive = number(int, 1)
    real, share = number(float, 0), number(float, 0, 1)
    toggle = argparse.BooleanOptionalAction
    p = Parser(
        prog="vizoo train",
        usage="vizoo train --data NAME|DIR [--model MODEL] [options]",
        description="Train a classifier on handwritten digits or on folders of images.  Parentheses give defaults; "
        "'digits' is what its recipe sets instead.",
        epilog=CLASSIFIER_EXAMPLES,
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
    add_run(p, 42, "model-size", "top1", list(METRICS["classification"]))
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


def parse_classifier(argv: list[str]) -> argparse.Namespace:
    """Merge defaults, the recipes of data set and tuning, the configuration file and the command line, in this order.

    Args:
        argv: Arguments.

    Returns:
        Checked options.

    Raises:
        UserError: For bad options or configuration files.
    """
    with contextlib.ExitStack() as stack:
        args = parse_task(classifier_parser(), argv, "classification", lambda args: list(_recipes(stack, args)))
    if not args.model:
        raise UserError("--model is missing; the shortest command is 'vizoo train --data digits'")
    check_outputs(args.num_classes)
    check_choice("--eval-metric", args.eval_metric, list(METRICS["classification"]))
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
    if not args.device:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def dense_parser(task: str) -> Parser:
    """Command-line options.

    Args:
        task: ``"detection"`` or ``"segmentation"``.

    Returns:
        The parser.
    """
    detection = task == "detection"
    p = Parser(
        prog=f"vizoo train --task {task}",
        usage=f"vizoo train --task {task} --data DIR [--model MODEL] [options]",
        description=f"Train a {task} model on a backbone of the zoo or of timm.",
        epilog=DENSE_EXAMPLES,
    )
    add(p, "--config")
    add(p, "--task", task)
    g = add_data(p, "a folder in the layout of the examples below")
    add(g, "--check-data", default="full")
    add(g, "--skip-unreadable")
    if detection:
        add(g, "--size", "800 1333: the shorter side, and the longer one at most", default=[800, 1333])
    else:
        add(g, "--size", "512: training crop, and shorter side of held-out images", default=[512])
        add(g, "--scale", "0.5 2, a factor of the size", default=[0.5, 2.0])
        add(g, "--num-classes", "the lines of classes.txt in --data")
        g.add_argument("--reduce-zero-label", action="store_true", help="masks hold class + 1, and 0 for none (ADE20K)")
    add(g, "--hflip", default=0.5)
    g = add_model(p, "litv2_s; the backbone", default="litv2_s")
    names = ARCHS[task]
    arch = "faster_rcnn" if detection else "upernet"
    add(g, "--arch", f"{arch}; or {', '.join(n for n in names if n != arch)}", default=arch)
    add(g, "--arch-kwargs")
    add(g, "--pretrained", "of the backbone")
    add(g, "--frozen-stages", "-1, none", default=-1)
    add_batches(p, 2 if detection else 8, "bfloat16")
    add_optimizer(p, "adamw", 0.05)
    g = add_schedule(p, 12 if detection else 40, 1e-4, milestones=[8, 11])
    text = "updates in which the learning rate rises from a thousandth, at most a tenth of all (500)"
    g.add_argument("--warmup-updates", type=number(int, 0), default=500, metavar="N", help=text)
    add_average(p)
    add_run(p, 42, "arch-model", next(iter(METRICS[task])), list(METRICS[task]))
    return p


def check_dense(options: dict[str, Any]) -> None:
    """Refuse what the parser cannot know to be wrong.

    Args:
        options: Of the command or of a run.

    Raises:
        UserError: Names the option.
    """
    task, arch = options["task"], options["arch"]
    check_choice("--arch", arch, ARCHS[task])
    metrics = [m for m in METRICS[task] if m != "AP_mask" or arch == "mask_rcnn"]
    check_choice("--eval-metric", options["eval_metric"], metrics)
    sides = 2 if task == "detection" else 1
    if len(options["size"]) != sides:
        raise UserError(f"argument --size: expected {sides} argument{'s' * (sides > 1)}")
    if min(options["size"]) < 1:
        raise UserError(f"argument --size: got {min(options['size'])}, must be a whole number of at least 1")
    check_outputs(options.get("num_classes"))
    check_range("--scale", options.get("scale"))
    if arch == "upernet" and options["batch_size"] == 1:
        raise UserError("--batch-size 1: the batch norms of UPerNet need at least 2 images")


def parse_dense(task: str, argv: list[str]) -> argparse.Namespace:
    """Read the options of a detector or a segmentor.

    Args:
        task: ``"detection"`` or ``"segmentation"``.
        argv: Arguments.

    Returns:
        Checked options.

    Raises:
        UserError: For bad options or configuration files.
    """
    args = parse_task(dense_parser(task), argv, task)
    check_dense(vars(args))
    return args


def scanpath_parser() -> Parser:
    """Command-line options."""
    p = Parser(
        prog="vizoo train --task scanpath",
        usage="vizoo train --task scanpath --data NAME|FILE [--model MODEL] [options]",
        description="Train an oat_* model on human scanpaths.",
        epilog=SCANPATH_EXAMPLES,
    )
    add(p, "--config")
    add(p, "--task", "scanpath")
    g = add_data(p, "'search', or a .json, .pkl or .pickle file", "0", 0)
    add(g, "--images", "objects look alike without them")
    g.add_argument("--grid", type=number(int, 1), nargs=2, metavar=("ROWS", "COLUMNS"), help="of a scene (the data's)")
    g.add_argument("--trials", type=number(int, 20), default=2000, metavar="N", help="of 'search' (2000)")
    g.add_argument("--split-by", choices=("layout", "scanpath"), default="layout", help="what is in one part (layout)")
    add_model(p, "oat_small", default="oat_small")
    add_batches(p, 20, "bfloat16")
    add_optimizer(p, "adam", 0.0, 1.0)
    g = add_schedule(p, 500, 1e-4, "constant")
    add_warmup(g, 0)
    text = "epochs without a better one after which training ends (30)"
    g.add_argument("--patience", type=number(int, 1), default=30, metavar="N", help=text)
    add_average(p)
    add_run(p, 1234, "model", "delta", list(METRICS["scanpath"]))
    return p


def parse_scanpaths(argv: list[str]) -> argparse.Namespace:
    """Read the options of OAT.

    Args:
        argv: Arguments.

    Returns:
        Checked options.

    Raises:
        UserError: For bad options or configuration files.
    """
    args = parse_task(scanpath_parser(), argv, "scanpath")
    check_choice("--eval-metric", args.eval_metric, list(METRICS["scanpath"]))
    return args
