"""Options of ``vizoo train``: names and defaults of timm's training script, recipes and configuration files."""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg

from vizoo.tools.common import UserError, read_yaml, short
from vizoo.tools.options import WINDOW, KeyValues, Parser, add, number

DIGITS_RECIPE = "classification/digits_litv2_s.yaml"
TUNE_RECIPE = "classification/tune.yaml"
TASKS = ("classification", "detection", "segmentation", "scanpath")
TUNES = ("tcpa", "vpt", "vfpt", "linear", "full")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
EPILOG = """\
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
  vizoo train -c output/train/first/args.yaml --seed 1
      repeat a run with another seed
  torchrun --nproc_per_node=8 -m vizoo.tools.train --data imagenet --model litv2_s --opt adamw --lr-base 5e-4 \\
      --lr-base-size 512 --lr-base-scale linear --weight-decay 0.05 --clip-grad 5 --warmup-epochs 20 \\
      --sched-on-updates --mixup 0.8 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --amp \\
      --lr-scale '*conv_offset.weight=0.01'
      ImageNet on eight GPUs

a run leaves in OUTPUT/EXPERIMENT: model_best.pth.tar, last.pth.tar and the best checkpoints (load them with
timm.create_model(..., checkpoint_path=...)), summary.csv, curves.png and args.yaml.
Ctrl-C saves and exits with 130."""


def _lr_scale(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        scale = float(factor)
    except ValueError:
        scale = -1.0
    if not pattern or not 0 <= scale < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be PATTERN=FACTOR, such as '*conv_offset.weight=0.01'")
    return pattern, scale


def asked_task(argv: Sequence[str]) -> str | None:
    """The task that the words of a command name with ``--task``, or by the folder of a run; None for neither."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", nargs="?")
    known, _ = parser.parse_known_args(list(argv))
    return known.task or next((task for word in argv if (task := stored_options(word).get("task"))), None)


def stored_options(folder: str) -> dict[str, Any]:
    """Options of a run of ``vizoo train``, empty where there is none."""
    if folder.startswith("-"):
        return {}
    try:
        return read_yaml(Path(folder) / "args.yaml", "RUN")
    except UserError:
        return {}


def options_file(folder: str, task: str | None = None) -> Path:
    """The args.yaml of a run.

    Args:
        folder: Of the run.
        task: That it should be of, for the message.

    Returns:
        Its path.

    Raises:
        UserError: If there is none.
    """
    file = Path(folder) / "args.yaml"
    if not os.path.lexists(file):
        command = f"vizoo train --task {task}" if task else "vizoo train"
        raise UserError(f"RUN {short(folder)}: no folder of {command!r}, it holds no args.yaml")
    return file


RECORDS = ("classes", "max_len", "skipped")  # what args.yaml says of the data, no options


def stored_arguments(parser: argparse.ArgumentParser, folder: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a run, checked as those of a command, and what else its args.yaml says.

    Args:
        parser: Of the command that made the run.
        folder: Of the run.
        task: That it must be of.

    Returns:
        The options and the records.

    Raises:
        UserError: If it is no folder of a run of this task, or its args.yaml is broken.
    """
    file = options_file(folder, task)
    stored = read_yaml(file, "RUN")
    options = vars(parser.parse_args(config_words(parser, file, task, "RUN")))
    return options, {k: v for k, v in stored.items() if k in RECORDS}


def add_skip_unreadable(parser: Any) -> None:
    """Add the option ``--skip-unreadable``, the same in every command.

    Args:
        parser: Parser of :mod:`argparse`, or a group of one.
    """
    text = "leave out images that cannot be read, and say how many, instead of stopping"
    parser.add_argument("--skip-unreadable", action="store_true", help=text)


def build_parser() -> argparse.ArgumentParser:
    """The parser; defaults are those of timm's training script unless the help says otherwise."""
    count, positive = number(int, 0), number(int, 1)
    real, share = number(float, 0), number(float, 0, 1)
    toggle = argparse.BooleanOptionalAction
    p = Parser(
        prog="vizoo train",
        usage="vizoo train --data NAME|DIR [--model MODEL] [options]",
        description="Train a classifier on handwritten digits or on folders of images.  Parentheses give defaults; "
        "'digits' is what its recipe sets instead.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("-c", "--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    text = "(classification); '--task detection --help' and so on explain the others"
    p.add_argument("--task", choices=TASKS, default=argparse.SUPPRESS, help=text)

    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        "--data-dir",
        metavar="NAME|DIR",
        help="'digits' (built in, sets a recipe for everything below), or a folder with train/ and val/ (or "
        "validation/), each with one folder for each class",
    )
    g.add_argument("--train-split", default="train", metavar="NAME", help="folder of training images (train)")
    g.add_argument("--val-split", default="validation", metavar="NAME", help="folder of held-out images (validation)")
    g.add_argument(
        "--check-images",
        choices=("auto", "full", "header", "none"),
        default="auto",
        help="before training decode every image, open it, or trust it (auto: decode up to 20,000, else open)",
    )
    add_skip_unreadable(g)
    add(g, "--window", WINDOW)
    g.add_argument("-j", "--workers", type=count, default=4, metavar="N", help="loader processes (4; digits 0)")
    g.add_argument("--pin-mem", action=toggle, default=False, help="pin memory, faster transfer to a GPU")

    g = p.add_argument_group("model")
    g.add_argument("--model", metavar="MODEL", help="any model of timm or vizoo, see 'vizoo models' (digits: litv2_s)")
    g.add_argument("--pretrained", action=toggle, default=False, help="start from published weights")
    g.add_argument(
        "--pretrained-path",
        metavar="PATH",
        help="start from this file as if it were the published weights: official names and another head are adapted",
    )
    g.add_argument("--initial-checkpoint", metavar="PATH", help="start from exactly this checkpoint, head included")
    g.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="extra model arguments"
    )
    g.add_argument("--num-classes", type=positive, metavar="N", help="outputs (the number of classes in the data)")
    g.add_argument("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax, catavgmax (the model's)")
    g.add_argument("--img-size", type=positive, metavar="N", help="side of the square input (the model's; digits 32)")
    g.add_argument("--input-size", type=positive, nargs=3, metavar=("C", "H", "W"), help="overrides --img-size")
    g.add_argument("--in-chans", type=int, choices=(1, 3), help="channels: 1 grey, 3 RGB (3)")
    g.add_argument("--crop-pct", type=number(float, 0.01, 1), metavar="PCT", help="centre crop of held-out images")
    finite, above = number(float), number(float, 0, above=True)
    g.add_argument("--mean", type=finite, nargs="+", metavar="MEAN", help="mean pixel, one value or one per channel")
    g.add_argument("--std", type=above, nargs="+", metavar="STD", help="standard deviation, likewise")
    g.add_argument("--interpolation", metavar="NAME", help="resizing: nearest, bilinear, bicubic (the model's)")
    g.add_argument("--grad-checkpointing", action=toggle, default=False, help="less memory, more computation")
    g.add_argument("--drop", type=share, default=0.0, metavar="PCT", help="dropout (0)")
    g.add_argument("--drop-path", type=share, metavar="PCT", help="stochastic depth (the model's)")

    g.add_argument(
        "--medusa-rounds",
        type=count,
        metavar="N",
        help="for medusa_* models: train backbone and attention body in turn, so often, before all together at a tenth "
        "of the rate; 0 trains all together (2, or what --epochs has room for)",
    )

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
    g.add_argument("--match-weight", type=real, default=0.01, metavar="W", help="of TCPA's matching loss (0.01)")
    g.add_argument("--random-epochs", type=count, default=10, metavar="N", help="TCPA chooses at random first (10)")

    g = p.add_argument_group("batches and device")
    g.add_argument("-b", "--batch-size", type=positive, default=128, metavar="N", help="per process (128)")
    g.add_argument("-vb", "--validation-batch-size", type=positive, metavar="N", help="held-out (as --batch-size)")
    g.add_argument("--grad-accum-steps", type=positive, default=1, metavar="N", help="batches for each update (1)")
    g.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (cuda if there is one)")
    g.add_argument("--channels-last", action=toggle, default=False, help="channels-last memory layout")
    g.add_argument("--amp", action=toggle, default=False, help="mixed precision")
    g.add_argument("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="(float16)")
    g.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile (inductor)")
    g.add_argument("--sync-bn", action=toggle, default=False, help="BatchNorm over all processes, CUDA only")
    g.add_argument("--dist-bn", choices=("reduce", "broadcast", ""), default="reduce", help="BatchNorm after an epoch")

    g = p.add_argument_group("optimizer")
    g.add_argument("--opt", default="sgd", metavar="NAME", help="any optimizer of timm (sgd; digits adamw)")
    g.add_argument("--opt-eps", type=real, metavar="EPS", help="(the optimizer's)")
    g.add_argument("--opt-betas", type=share, nargs="+", metavar="BETA", help="(the optimizer's)")
    g.add_argument("--momentum", type=real, default=0.9, metavar="M", help="(0.9)")
    g.add_argument(
        "--weight-decay", type=real, default=2e-5, metavar="W", help="not for biases and norms (2e-5; digits 0.05)"
    )
    g.add_argument("--clip-grad", type=real, metavar="NORM", help="clip gradients (off)")
    g.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="(norm)")
    g.add_argument("--layer-decay", type=real, metavar="FACTOR", help="layer-wise learning rate decay (off)")
    g.add_argument("--layer-decay-min-scale", type=share, default=0.0, metavar="MIN", help="its lower bound (0)")
    g.add_argument(
        "--lr-scale",
        type=_lr_scale,
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help="scale the learning rate of parameters whose name matches; repeatable, the last match counts",
    )

    g = p.add_argument_group("learning rate")
    g.add_argument("--sched", choices=SCHEDULES, default="cosine", help="(cosine)")
    g.add_argument("--sched-on-updates", action=toggle, default=False, help="change it at each update, not each epoch")
    g.add_argument("--lr", type=real, metavar="LR", help="learning rate; without it --lr-base is scaled")
    g.add_argument("--lr-base", type=real, default=0.1, metavar="LR", help="at a total batch of --lr-base-size (0.1)")
    g.add_argument("--lr-base-size", type=positive, default=256, metavar="N", help="(256)")
    g.add_argument(
        "--lr-base-scale",
        choices=("", "linear", "sqrt"),
        default="",
        help="how it grows with the batch (sqrt for optimizers named ada* and lamb, else linear)",
    )
    g.add_argument("--epochs", type=positive, default=300, metavar="N", help="(300; digits 12)")
    g.add_argument("--warmup-epochs", type=count, default=5, metavar="N", help="(5)")
    g.add_argument("--warmup-lr", type=real, default=1e-5, metavar="LR", help="where warm-up starts (1e-5)")
    g.add_argument("--warmup-prefix", action=toggle, default=False, help="add the warm-up to --epochs")
    g.add_argument("--min-lr", type=real, default=0.0, metavar="LR", help="(0)")
    g.add_argument("--cooldown-epochs", type=count, default=0, metavar="N", help="at --min-lr after --epochs (0)")
    g.add_argument("--decay-epochs", type=real, default=90.0, metavar="N", help="for step, wsd and rsqrt (90)")
    g.add_argument(
        "--decay-milestones", type=positive, nargs="+", default=[90, 180, 270], metavar="N", help="multistep"
    )
    g.add_argument("--decay-rate", type=real, default=0.1, metavar="RATE", help="step, multistep; power of poly (0.1)")

    g = p.add_argument_group("augmentation and regularization")
    g.add_argument("--no-aug", action="store_true", help="resize and crop only; mixup and cutmix stay")
    g.add_argument("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="(rrc, random resized crop)")
    g.add_argument("--scale", type=real, nargs=2, default=[0.08, 1.0], metavar="PCT", help="crop area (0.08 1)")
    g.add_argument("--ratio", type=real, nargs=2, default=[3 / 4, 4 / 3], metavar="RATIO", help="(0.75 1.33)")
    g.add_argument("--hflip", type=share, default=0.5, metavar="P", help="mirror images (0.5; digits 0)")
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
    g.add_argument("--bce-loss", action=toggle, default=False, help="binary cross-entropy")
    g.add_argument("--model-ema", action=toggle, default=False, help="average the weights; the average is evaluated")
    g.add_argument("--model-ema-decay", type=share, default=0.9998, metavar="DECAY", help="(0.9998)")
    g.add_argument("--model-ema-warmup", action=toggle, default=False, help="start with a shorter average")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=count, default=42, metavar="S", help="(42)")
    g.add_argument("--output", default="output/train", metavar="DIR", help="(output/train)")
    g.add_argument("--experiment", metavar="NAME", help="folder in it (date-time-model-size)")
    g.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="continue from a checkpoint; without a path from the newest of --experiment, or of the newest run of this "
        "model and size; from the start if there is none",
    )
    g.add_argument("--no-resume-opt", action="store_true", help="resume the weights only, not the optimizer")
    g.add_argument("--checkpoint-hist", type=positive, default=3, metavar="N", help="best checkpoints to keep (3)")
    g.add_argument("--recovery-interval", type=count, default=0, metavar="N", help="also save every N updates (off)")
    g.add_argument("--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="what is best (top1)")
    g.add_argument(
        "--log-interval", type=positive, default=50, metavar="N", help="updates for a line where no bar is shown (50)"
    )
    return p


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Merge defaults, the recipes of data set and tuning, the configuration file and the command line, in this order.

    Args:
        argv: Arguments.

    Returns:
        Checked options.

    Raises:
        UserError: For bad options or configuration files.
    """
    parser = build_parser()
    config = parser.parse_args(argv).config
    tokens = config_words(parser, Path(config)) if config else []
    chosen = parser.parse_args(tokens + argv)
    for wanted, name in ((chosen.tune is not None, TUNE_RECIPE), (chosen.data == "digits", DIGITS_RECIPE)):
        if wanted:
            recipe = importlib.resources.files("vizoo.configs").joinpath(name)
            with importlib.resources.as_file(recipe) as path:
                tokens = config_words(parser, path) + tokens
    args = parser.parse_args(tokens + argv)
    for name in ("data", "model"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; the shortest command is 'vizoo train --data digits'")
    if args.batch_size % 2 and (args.mixup or args.cutmix or args.cutmix_minmax):
        raise UserError(f"--batch-size {args.batch_size} is odd; mixup and cutmix need an even number")
    if args.input_size:
        if args.input_size[0] not in (1, 3) or args.in_chans not in (None, args.input_size[0]):
            raise UserError(f"--input-size {args.input_size[0]} ...: channels must be 1 or 3 and agree with --in-chans")
        args.in_chans = args.input_size[0]
    args.in_chans = args.in_chans or 3
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
    args.task = "classification"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def check_range(name: str, pair: Sequence[float] | None) -> None:
    """Refuse two numbers that are no range.

    Args:
        name: Of the option.
        pair: Its values, or None.

    Raises:
        UserError: Unless ``0 < LOW <= HIGH``.
    """
    if pair is not None and not 0 < pair[0] <= pair[1]:
        raise UserError(f"{name} {pair[0]:g} {pair[1]:g}: need two numbers, 0 < LOW <= HIGH")


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


def config_words(
    parser: argparse.ArgumentParser, path: Path, task: str = "classification", name: str = "--config"
) -> list[str]:
    """Turn a YAML file into command line words, so that its values meet the same checks.

    Args:
        parser: That will read the words.
        path: The file, of options and perhaps :data:`RECORDS`.
        task: Of the parser.
        name: Argument name for messages.

    Returns:
        The words.

    Raises:
        UserError: For another task, an unknown option or a bad value; names the file.
    """
    values, what = read_yaml(path, name), f"{name} {short(str(path))}"
    if values.get("task", task) != task:
        raise UserError(f"{what} is of --task {short(values['task'])}, need {task}")
    known = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config", "debug")}
    words = []
    for key, value in values.items():
        action = known.get(key.replace("-", "_"))
        if key in RECORDS:
            continue
        if action is None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{what}: unknown option {short(key)}{hint}")
        flag = next(s for s in action.option_strings if s.startswith("--"))
        if isinstance(value, bool):
            if action.nargs not in (0, "?"):
                raise UserError(f"{what}: {key} takes a value, not {str(value).lower()}")
            negative = f"--no-{flag[2:]}"
            words += [flag] if value else [negative] if negative in action.option_strings else []
        elif action.nargs == 0 and value is not None:
            raise UserError(f"{what}: {key} is true or false, not {short(value)}")
        elif isinstance(value, dict):
            if not isinstance(action, KeyValues):
                raise UserError(f"{what}: {key} takes a value, not {short(value)}")
            words += [flag, *(f"{k}={v!r}" for k, v in value.items())]
        elif isinstance(value, list) and isinstance(action.default, list) and action.nargs is None:
            words += [f"{flag}={v}" for v in value]  # a repeatable option
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={value}")
    try:
        parser.parse_args([*words, *_required(parser, words)])
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
    return words


def _required(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Stand-ins for required options that a file leaves to the command line."""
    given = {word.partition("=")[0] for word in words}
    missing = [a.option_strings[-1] for a in parser._actions if a.required and a.option_strings]
    return [word for flag in missing if flag not in given for word in (f"{flag}=x",)]
