"""What ``vizoo train`` writes and reads back: the folder of a run, checkpoints, the classes they know, curves."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import math
import os
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import CheckpointSaver, load_checkpoint_metadata

from vizoo.tools.common import Failure, UserError, atomic_write, check_file, one_line, replace, save_figure, short

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
RUN_FILES = ("args.yaml", "summary.csv", "curves.png", "last.pth.tar", "model_best.pth.tar")
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth\.tar")  # of the best epochs
RECOVERY = re.compile(r"recovery-(\d+)-(\d+)\.pth\.tar")  # of an epoch and the batches of it that are done
UNFINISHED = re.compile(
    rf"\.({'|'.join(map(re.escape, RUN_FILES))}|(recovery_)?tmp\.pth\.tar)\.\w+\.tmp"
)  # of a killed run
NAMED = 10  # classes that a message names
RECORDED = ("max_len", "trials_of_parts")  # what a run says of its data, no options


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint that replaces the file in one step.

    Args:
        path: The file.
        contents: Everything in it loads with ``weights_only=True``.

    Raises:
        Failure: If it cannot be written; the old file is still there.
    """
    with atomic_write(path, "wb") as f:
        torch.save(contents, f)


class Saver(CheckpointSaver):
    """timm's checkpoint saver with our contents, files that are whole at any moment, and repeatable bookkeeping.

    Args:
        contents: Returns what to save; everything in it loads with ``weights_only=True``.
        **kwargs: Of :class:`timm.utils.CheckpointSaver`.
    """

    def __init__(self, contents: Callable[[], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contents = contents
        self.source: Path | None = None

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self.source:
            self._copy(str(self.source), save_path)
            return
        saver = self.state_dict(epoch, metric)
        save_checkpoint(save_path, {**self.contents(), "epoch": epoch, "version": 2, "metric": metric, "saver": saver})

    def _replace(self, src: str, dst: str) -> None:
        replace(src, dst)

    @staticmethod
    def _copy(src: str, dst: str) -> None:
        with open(src, "rb") as f, atomic_write(dst, "wb") as g:
            shutil.copyfileobj(f, g)

    def _duplicate(self, src: str, dst: str) -> None:
        if self.can_hardlink:
            temp = f"{dst}.tmp"
            Path(temp).unlink(missing_ok=True)
            try:
                os.link(src, temp)
                replace(temp, dst)
                Path(temp).unlink(missing_ok=True)  # replacing a file by a link to itself leaves both
                return
            except OSError:
                self.can_hardlink = False
        self._copy(src, dst)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over bookkeeping, of which nothing decides a path but numbers: what is no name of ours is left out."""
        files, listed = [], state_dict.get("checkpoint_files")
        for entry in listed if isinstance(listed, (list, tuple)) else ():
            name, metric = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
            if isinstance(name, str) and NUMBERED.fullmatch(name) and _is_number(metric):
                files.append((name, metric))
        epoch, metric = _pending(state_dict)
        best = state_dict.get("best_epoch"), state_dict.get("best_metric")
        known = isinstance(best[0], int) and _is_number(best[1])
        super().load_state_dict(
            {
                "checkpoint_files": files,
                "best_epoch": best[0] if known else None,
                "best_metric": best[1] if known else None,
                "pending": (epoch, metric),
            }
        )

    def repeat(self, source: Path, state: dict[str, Any]) -> None:
        """Take over the bookkeeping of a checkpoint of this folder and finish what a kill may have cut off.

        Args:
            source: The checkpoint.
            state: Its ``saver`` entry.
        """
        epoch, metric = _pending(state)
        self.load_state_dict({**state, "pending": None})
        if epoch is not None:
            self.source = source
            self.save_checkpoint(epoch, metric)
            self.source = None
        if self.best_epoch is None:
            return
        best = Path(self._checkpoint_path(self.best_epoch))
        if best.is_file():
            self._duplicate(str(best), str(best.parent / f"model_best{self.extension}"))

    def drop_recovery(self) -> None:
        """Remove the checkpoints of an epoch that is finished."""
        for file in Path(self.recovery_dir).iterdir():
            if RECOVERY.fullmatch(file.name):
                file.unlink()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pending(state: dict[str, Any]) -> tuple[int | None, float | None]:
    """Epoch and metric of the checkpoint that the bookkeeping was saved with."""
    pending = state.get("pending")
    epoch, metric = pending if isinstance(pending, (list, tuple)) and len(pending) == 2 else (None, None)
    return (epoch, metric) if isinstance(epoch, int) and epoch >= 0 and _is_number(metric) else (None, None)


def load_training_checkpoint(path: Path, name: str = "--resume") -> dict[str, Any]:
    """Read a training checkpoint without running any code in it.

    Args:
        path: The file.
        name: Argument name for the message.

    Returns:
        Its entries.

    Raises:
        UserError: If it is missing, broken, or no training checkpoint.
    """
    check_file(path, name)
    try:
        checkpoint = load_checkpoint_metadata(str(path))
    except Exception as e:  # whatever an unpickler raises
        raise UserError(f"{name} {short(str(path))}: cannot read the checkpoint: {one_line(e, 200)}") from None
    if not isinstance(checkpoint, dict) or not {"arch", "epoch", "state_dict", "optimizer"} <= checkpoint.keys():
        raise UserError(f"{name} {str(path)!r} is no training checkpoint; use --initial-checkpoint for bare weights")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The readable checkpoint of a run that is furthest in training; what cannot be read is named on standard error.

    Args:
        folder: Of the run.

    Returns:
        The file; None if there is no checkpoint at all.

    Raises:
        UserError: If there are checkpoints and none of them can be read.
    """
    files = [f for f in sorted(folder.iterdir()) if f.name == "last.pth.tar" or RECOVERY.fullmatch(f.name)]
    earlier = [f for f in sorted(folder.iterdir()) if f.name == "model_best.pth.tar" or NUMBERED.fullmatch(f.name)]
    broken: list[str] = []
    for some in (files, earlier):  # the best ones only where there is nothing newer
        positions = []
        for file in some:
            try:
                positions.append((_position(load_training_checkpoint(file)), file))
            except UserError as e:
                broken.append(str(e).removeprefix("--resume "))
        if positions:
            newest = max(positions)[1]
            if broken:
                print(f"vizoo train: {'; '.join(broken)}; taking {newest.name} instead", file=sys.stderr)
            return newest
    if broken:
        raise UserError(f"--resume: no checkpoint of {str(folder)!r} can be read: {'; '.join(broken)}")
    return None


def _position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Epoch in progress and batches of it that are done."""
    try:
        run = checkpoint.get("run") or {"epoch": checkpoint["epoch"] + 1, "batch": 0}
        return int(run["epoch"]), int(run["batch"])
    except (TypeError, KeyError, ValueError):
        return (0, 0)


@contextlib.contextmanager
def locked(folder: Path, name: str = "--experiment") -> Iterator[None]:
    """Hold the folder of a run, so that no second process writes into it.

    The lock ends with the process, however it ends, and is not inherited by data workers.

    Args:
        folder: Of the run.
        name: Argument name for the message.

    Raises:
        UserError: If another process holds it; names host and process id.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            raise UserError(
                f"{name}: {str(folder)!r} is in use by {holder}; wait for it, stop it, or choose another"
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its last holder has just removed it
    try:
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on host {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
        )
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


@contextlib.contextmanager
def open_run(args: argparse.Namespace, label: str) -> Iterator[tuple[Path, Path | None]]:
    """Choose, make and hold the folder of a run, and find the checkpoint to resume from.

    A new folder is taken away again if the run ends with nothing in it.

    Args:
        args: ``output``, ``experiment`` and ``resume``: a checkpoint, ``"auto"`` for the newest one, or None.
        label: End of the names of unnamed folders, for example ``"litv2_s-224"``.

    Yields:
        The folder and the checkpoint or None.

    Raises:
        UserError: If the folder holds another run or other files of the same names, is in use, or cannot be made.
    """
    output = Path(args.output)
    label = "".join(c if c.isalnum() or c in "-_." else "_" for c in label)[:150]
    checkpoint = None if args.resume in (None, "auto") else Path(args.resume)
    if checkpoint:
        load_training_checkpoint(checkpoint)
    if args.experiment:
        folder = output / args.experiment
    elif checkpoint:
        folder = checkpoint.parent
    else:
        earlier = sorted(output.glob(f"????????-??????-{label}")) if args.resume else []
        folder = earlier[-1] if earlier else output / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{label}"
    made = []
    try:
        made = [d for d in (folder, *folder.parents) if not d.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) or not folder.stat().st_mode & 0o222:
            raise UserError(f"--output {short(str(args.output))}: {short(str(folder))} is read-only")
    except UserError:
        raise
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"--output {short(str(args.output))}: cannot make {short(str(folder))}: {reason}") from None
    try:
        with locked(folder):
            for file in folder.iterdir():
                if UNFINISHED.fullmatch(file.name):
                    file.unlink()
            yield folder, _choose_checkpoint(folder, checkpoint, args.resume)
    finally:
        with contextlib.suppress(OSError):
            for d in made:
                d.rmdir()


def _choose_checkpoint(folder: Path, checkpoint: Path | None, resume: str | None) -> Path | None:
    present = [
        f.name
        for f in sorted(folder.iterdir())
        if f.name in RUN_FILES or NUMBERED.fullmatch(f.name) or RECOVERY.fullmatch(f.name)
    ]
    if checkpoint and checkpoint.parent.resolve() == folder.resolve():
        return checkpoint
    if resume == "auto":
        newest = newest_checkpoint(folder)
        if newest is None and present:
            raise UserError(
                f"--resume: {str(folder)!r} holds {present[0]} but no checkpoint; choose another --experiment"
            )
        print(f"resuming {newest}" if newest else f"no checkpoint in {folder}, starting from the beginning")
        return newest
    if present:
        what = "a run" if "args.yaml" in present or "last.pth.tar" in present else present[0]
        raise UserError(f"--experiment: {str(folder)!r} holds {what}; add --resume to continue it or choose another")
    return checkpoint


def write_options(folder: Path, options: dict[str, Any]) -> None:
    """Write args.yaml, which ``vizoo evaluate`` and ``vizoo train -c`` read.

    Args:
        folder: Of the run.
        options: Plain values by name; what is None is left out.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    with atomic_write(folder / "args.yaml") as f:
        yaml.safe_dump({k: plain(v) for k, v in options.items() if v is not None}, f, sort_keys=False)


def write_summary(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Write summary.csv, a row for each epoch; a column that options changed in between is empty where it is not known.

    Args:
        folder: Of the run.
        history: The rows.
    """
    with atomic_write(folder / "summary.csv") as f:
        writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(key for row in history for key in row)))
        writer.writeheader()
        writer.writerows(history)


def match_classes(trained: Sequence[str] | None, found: Sequence[str], where: str, who: str) -> list[int]:
    """Where each class of some data stands among the classes that a model was trained on.

    Args:
        trained: Names in the order of the model's outputs; None where a checkpoint does not say them.
        found: Names in the order of the data's ids.
        where: The data, for the message.
        who: The model, for the message.

    Returns:
        For each of ``found`` its index in ``trained``.

    Raises:
        UserError: If the names are not the same.
    """
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise UserError(f"{where} has two classes named {short(twice[0])}")
    if not isinstance(trained, (list, tuple)):
        return list(range(len(found)))
    trained = [str(name) for name in trained]
    if sorted(trained) != sorted(found):
        raise UserError(f"{where} has classes {_names(found)}; {who} was trained on {_names(trained)}")
    return [trained.index(name) for name in found]


def say_unnamed(trained: Sequence[str] | None, who: str) -> None:
    """Say on standard error that classes could not be compared by name; arguments as for :func:`match_classes`."""
    if not isinstance(trained, (list, tuple)):
        print(f"{who} does not say its classes: they are compared by their number only", file=sys.stderr)


def _names(classes: Sequence[str]) -> str:
    more = f", ... ({len(classes)} in total)" if len(classes) > NAMED else ""
    return f"{', '.join(map(str, classes[:NAMED]))}{more}"


def check_kept(checkpoint: dict[str, Any], options: dict[str, Any], kept: Sequence[str], who: str) -> dict[str, Any]:
    """Refuse to go on with a checkpoint of another task, or with options that would make another run of it.

    Args:
        checkpoint: Its entries.
        options: Of the command, with ``task``.
        kept: Names of the options that must be equal.
        who: The checkpoint, for the message.

    Returns:
        The options of the checkpoint, none where it does not say them.

    Raises:
        UserError: Names what differs.
    """
    before = checkpoint.get("args") or {}
    before = vars(before) if isinstance(before, argparse.Namespace) else before  # in those of timm's script
    if checkpoint.get("task", "classification") != options["task"] or not isinstance(before, dict):
        raise UserError(f"{who} is no checkpoint of 'vizoo train --task {options['task']}'")
    for key in kept:
        if before.get(key) != options[key]:
            option = f"--{key.replace('_', '-')}" if key not in RECORDED else key.replace("_", " ")
            raise UserError(f"{who}: {option} was {before.get(key)!r} and is {options[key]!r}; it must not change")
    return before


def skipped_text(count: int) -> str:
    """What stands beside a figure of data of which some images could not be read."""
    return f" ({count:,} unreadable ones left out)" if count else ""


def say_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say on standard error with which other options a run goes on.

    Args:
        before: Options by name, those of the checkpoint.
        now: Those of the command.
    """
    same = {k: v for k, v in now.items() if k not in ("output", "experiment", "log_interval", "resume", "device")}
    changed = [f"{k} {before[k]} -> {v}" for k, v in same.items() if before.get(k, v) != v]
    if changed:
        print(f"vizoo train: resumed with other options: {'; '.join(changed)}", file=sys.stderr)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, but not the settings that the command gives.

    Args:
        optimizer: Of the same kind and parameters.
        state: Of another one.

    Raises:
        ValueError: If the state is one of another kind of optimizer.
    """
    names = ("weight_decay", "betas", "eps", "momentum")
    before = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
    keys = [group.keys() for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings, known in zip(optimizer.param_groups, before, keys, strict=True):
        if missing := sorted(known - group.keys()):
            raise ValueError(f"it has no {missing[0]!r}")
        group.update(settings)


def read_history(history: Any, keys: Sequence[str]) -> list[dict[str, float]]:
    """The rows of summary.csv in a checkpoint.

    Args:
        history: What it holds.
        keys: Columns that every row has.

    Returns:
        The rows.

    Raises:
        ValueError: If they are no numbers by name.
    """
    for row in history if isinstance(history, list) else [history]:
        fits = isinstance(row, dict) and {"epoch", *keys} <= row.keys()
        if not fits or not all(isinstance(v, (int, float)) for v in row.values()):
            raise ValueError(f"its history holds {short(row)}, need numbers by name, also {', '.join(keys)}")
    return list(history)


def check_loss(value: float, where: str, advice: str) -> None:
    """Stop a training whose loss is not finite.

    Args:
        value: The loss.
        where: Epoch and batch.
        advice: What helps.

    Raises:
        Failure: For NaN and infinity.
    """
    if not math.isfinite(value):
        raise Failure(f"the training loss is {value} {where}; {advice}")


def draw_curves(
    history: list[dict[str, float]],
    path: Path,
    title: str,
    how: str,
    metric: tuple[str, str, str] = ("eval_top1", "top-1 accuracy", " %"),
    decreasing: bool = False,
) -> None:
    """Draw the losses and one metric over the epochs.

    Args:
        history: Rows of summary.csv.
        path: PNG file to write.
        title: Above the picture.
        how: What makes the training values differ from held-out ones.
        metric: Its column of summary.csv, its name and its unit.
        decreasing: Whether smaller is better.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    column, name, unit = metric
    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 2)
    label = f"{name} ({unit.strip()})" if unit else name
    training = column.replace("eval_", "train_") if column.startswith("eval_") else ""
    lines = (
        (panels[0], "train_loss", f"training ({how})", "tab:gray"),
        (panels[0], "eval_loss" if "eval_loss" in history[-1] else "loss", "held-out", "tab:blue"),
        (panels[1], training, f"training ({how})", "tab:gray"),
        (panels[1], column, "held-out", "tab:blue"),
    )
    for axes, key, line, colour in lines:
        if key in history[-1]:
            marker = "o" if len(history) <= 30 else None
            values = [row.get(key, math.nan) for row in history]
            axes.plot(epochs, values, label=line, color=colour, marker=marker, markersize=3)
    for axes, text in zip(panels, ("loss", label), strict=True):
        axes.set(xlabel="epoch", ylabel=text)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    sign = -1 if decreasing else 1
    best = max(history, key=lambda row: -math.inf if math.isnan(row[column]) else sign * row[column])
    panels[1].axhline(best[column], color="tab:blue", linewidth=0.8, linestyle=":")
    panels[1].set_title(
        f"best {best[column]:.{2 if unit else 4}f}{unit} in epoch {int(best['epoch']) + 1}", fontsize=10
    )
    save_figure(figure, path)
