"""Options of ``vizoo train``: groups that every task has, the classifier's own, recipes and configuration files."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import UserError, read_yaml, short
from vizoo.tools.options import KeyValues, add

RECORDS = ("classes", "max_len", "skipped", "trials_of_parts")  # what args.yaml says of the data, no options
UNSTORED = ("config", "debug", "resume")  # of this command, not of the run
FILES = """\
a run leaves in OUTPUT/EXPERIMENT: model_best.pth.tar, last.pth.tar and the best checkpoints, summary.csv, curves.png
and args.yaml, which '-c' and 'vizoo evaluate' read.  Ctrl-C saves and exits with 130; --resume goes on exactly there.
'torchrun --nproc_per_node=N -m vizoo.tools.train ...' trains with N processes."""


def add_data(parser: Any, note: str, workers: str = "", default: int = 4) -> Any:
    """Add the group of the data.

    Args:
        parser: The parser.
        note: What ``--data`` takes.
        workers: Note of ``--workers``.
        default: Of ``--workers``.

    Returns:
        The group, for options of the task.
    """
    group = parser.add_argument_group("data")
    add(group, "--data", note)
    add(group, "--workers", workers, default=default)
    return group


def add_model(parser: Any, note: str, default: str | None = None) -> Any:
    """Add the group of the model.

    Args:
        parser: The parser.
        note: What ``--model`` may be.
        default: The model.

    Returns:
        The group, for options of the task.
    """
    group = parser.add_argument_group("model")
    add(group, "--model", note, default=default)
    add(group, "--model-kwargs")
    return group


def add_batches(parser: Any, batch_size: int, amp_dtype: str = "float16") -> Any:
    """Add the group of batches, device and precision.

    Args:
        parser: The parser.
        batch_size: Default.
        amp_dtype: Default.

    Returns:
        The group, for options of the task.
    """
    group = parser.add_argument_group("batches and device")
    add(group, "--batch-size", default=batch_size)
    add(group, "--grad-accum-steps", default=1)
    add(group, "--device", "cuda if there is one")
    add(group, "--amp")
    add(group, "--amp-dtype", default=amp_dtype)
    add(group, "--sync-bn")
    add(group, "--dist-bn", default="reduce")
    return group


def add_optimizer(
    parser: Any, opt: str, weight_decay: float, clip_grad: float | None = None, notes: tuple[str, str] = ("", "")
) -> None:
    """Add the group of the optimizer.

    Args:
        parser: The parser.
        opt: Default.
        weight_decay: Default.
        clip_grad: Default.
        notes: Of ``--opt`` and ``--weight-decay``; empty for their defaults.
    """
    group = parser.add_argument_group("optimizer")
    add(group, "--opt", notes[0], default=opt)
    add(group, "--opt-eps", "the optimizer's")
    add(group, "--opt-betas", "the optimizer's")
    add(group, "--momentum", default=0.9)
    add(group, "--weight-decay", notes[1], default=weight_decay)
    add(group, "--clip-grad", "" if clip_grad else "off", default=clip_grad)
    add(group, "--clip-mode", default="norm")
    add(group, "--layer-decay", "off")
    add(group, "--layer-decay-min-scale", default=0.0)
    group.add_argument(
        "--lr-scale",
        type=lr_scale,
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help="scale the learning rate of parameters whose name matches; repeatable, the last match counts",
    )


def add_schedule(
    parser: Any,
    epochs: int,
    lr: float | None,
    sched: str = "cosine",
    milestones: Sequence[int] = (90, 180, 270),
    note: str = "",
) -> Any:
    """Add the group of the learning rate.

    Args:
        parser: The parser.
        epochs: Default.
        lr: Default.
        sched: Default.
        milestones: Default of ``--decay-milestones``.
        note: Of ``--epochs``; empty for its default.

    Returns:
        The group, for options of the task.
    """
    group = parser.add_argument_group("learning rate")
    add(group, "--epochs", note, default=epochs)
    add(group, "--lr", "" if lr else "without it --lr-base is scaled", default=lr)
    add(group, "--sched", default=sched)
    add(group, "--min-lr", "0", default=0.0)
    add(group, "--decay-epochs", default=90.0)
    add(group, "--decay-milestones", default=list(milestones))
    add(group, "--decay-rate", default=0.1)
    return group


def add_warmup(group: Any, epochs: int) -> None:
    """Add what surrounds the schedule.

    Args:
        group: Of :func:`add_schedule`.
        epochs: Default of ``--warmup-epochs``.
    """
    add(group, "--sched-on-updates")
    add(group, "--warmup-epochs", f"{epochs}", default=epochs)
    add(group, "--warmup-lr", default=1e-5)
    add(group, "--warmup-prefix")
    add(group, "--cooldown-epochs", "0", default=0)


def add_average(parser: Any) -> None:
    """Add the group of the average of the weights."""
    group = parser.add_argument_group("average of the weights")
    add(group, "--model-ema")
    add(group, "--model-ema-decay", default=0.9998)
    add(group, "--model-ema-warmup")


def add_run(parser: Any, seed: int, label: str, metric: str, metrics: Sequence[str]) -> None:
    """Add the group of the run.

    Args:
        parser: The parser.
        seed: Default.
        label: End of the name of a folder without ``--experiment``.
        metric: Default of ``--eval-metric``.
        metrics: What it may be.
    """
    group = parser.add_argument_group("run")
    add(group, "--seed", default=seed)
    add(group, "--output", default="output/train")
    add(group, "--experiment", f"date-time-{label}")
    add(group, "--resume")
    add(group, "--no-resume-opt")
    add(group, "--checkpoint-hist", default=3)
    add(group, "--recovery-interval", "0, off", default=0)
    add(group, "--eval-metric", f"{metric}; or {', '.join(m for m in metrics if m != metric)}", default=metric)
    add(group, "--log-interval", default=50)


def lr_scale(text: str) -> tuple[str, float]:
    """Argument type: a pattern of parameter names and a factor.

    Args:
        text: ``PATTERN=FACTOR``.

    Returns:
        Both.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    pattern, _, factor = text.rpartition("=")
    try:
        scale = float(factor)
    except ValueError:
        scale = -1.0
    if not pattern or not 0 <= scale < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be PATTERN=FACTOR, such as '*conv_offset.weight=0.01'")
    return pattern, scale


def asked_task(argv: Sequence[str]) -> str | None:
    """The task that a command names with ``--task``, by its ``--config`` or by the folder of a run; None for none."""
    task = _word(argv, "--task") or _config_task(argv)
    return task or next((str(found) for word in argv if (found := stored_options(word).get("task"))), None)


def _config_task(argv: Sequence[str]) -> str | None:
    config = _word(argv, "--config", "-c")
    task = _stored(Path(config)).get("task") if config else None
    return None if task is None else str(task)


def _word(argv: Sequence[str], *flags: str) -> str | None:
    """What follows an option, long before a parser of a task is chosen."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*flags, nargs="?", dest="value")
    found: str | None = parser.parse_known_args(list(argv))[0].value
    return found


def _stored(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(file, "RUN")
    except UserError:
        return {}


def stored_options(folder: str) -> dict[str, Any]:
    """Options of a run of ``vizoo train``, empty where there is none."""
    return {} if folder.startswith("-") else _stored(Path(folder) / "args.yaml")


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


def parse_task(
    parser: argparse.ArgumentParser,
    argv: list[str],
    task: str,
    recipes: Callable[[argparse.Namespace], Sequence[Path]] = lambda args: (),
) -> argparse.Namespace:
    """Merge defaults, recipes, the configuration file and the command line, in this order.

    Args:
        parser: Of the task.
        argv: Arguments.
        task: Its name.
        recipes: Configuration files that the options ask for, the strongest first.

    Returns:
        The options, with ``task``.

    Raises:
        UserError: For bad options or configuration files.
    """
    words = []
    try:
        config = parser.parse_args(argv).config
    except UserError as e:
        if "--task" in argv or not (asked := _config_task(argv)):
            raise
        raise UserError(f"--config is of --task {asked!r}, need classification, or options of that task: {e}") from None
    if config:
        words = config_words(parser, Path(config), task)
    for path in recipes(parser.parse_args(words + argv)):
        words = config_words(parser, path, task) + words
    args = parser.parse_args(words + argv)
    if not args.data:
        hint = "the shortest command is 'vizoo train --data digits'"
        raise UserError(f"--data is missing; {hint if task == 'classification' else 'see --help for its layout'}")
    args.task = task
    return args


def check_choice(flag: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of the allowed ones, in the words of :mod:`argparse`.

    Args:
        flag: The option.
        value: What was given.
        allowed: What it may be.

    Raises:
        UserError: Names all of them.
    """
    if value not in allowed:
        raise UserError(f"argument {flag}: invalid choice: {short(value)} (choose from {', '.join(allowed)})")


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
        if key in RECORDS:
            continue
        action = known.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{what}: unknown option {short(key)}{hint}")
        try:
            words += _words(action, value)
        except ValueError as e:
            raise UserError(f"{what}: {key} {e}") from None
    try:
        parser.parse_args(words)
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
    return words


def _words(action: argparse.Action, value: Any) -> list[str]:
    """Words of the command line for one option of a file; a ValueError says what the option takes instead."""
    flag = next(s for s in action.option_strings if s.startswith("--"))
    if isinstance(value, bool):
        if action.nargs not in (0, "?"):
            raise ValueError(f"takes a value, not {str(value).lower()}")
        negative = f"--no-{flag[2:]}"
        return [flag] if value else [negative] if negative in action.option_strings else []
    if action.nargs == 0 and value is not None:
        raise ValueError(f"is true or false, not {short(value)}")
    if isinstance(value, dict):
        if not isinstance(action, KeyValues):
            raise ValueError(f"takes a value, not {short(value)}")
        return [flag, *(f"{k}={v!r}" for k, v in value.items())]
    if isinstance(value, list) and isinstance(action.default, list) and action.nargs is None:
        return [f"{flag}={v}" for v in value]  # a repeatable option
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [] if value is None else [f"{flag}={value}"]
