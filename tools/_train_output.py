"""What ``vizoo train`` writes and reads back: checkpoints, the folder of a run, learning curves."""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, load_checkpoint_metadata

from vizoo.tools.common import UserError, save_figure


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
            shutil.copyfile(self.source, save_path)
            return
        saver = self.state_dict(epoch, metric)
        torch.save({**self.contents(), "epoch": epoch, "version": 2, "metric": metric, "saver": saver}, save_path)

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temp = f"{dst}.tmp"
        Path(temp).unlink(missing_ok=True)
        super()._duplicate(src, temp)
        os.replace(temp, dst)
        Path(temp).unlink(missing_ok=True)  # replacing a file by a link to itself leaves both

    def repeat(self, source: Path, state: dict[str, Any]) -> None:
        """Take over the bookkeeping of a checkpoint of this folder and finish what a kill may have cut off.

        Args:
            source: The checkpoint.
            state: Its ``saver`` entry.
        """
        epoch, metric = state.get("pending", (None, None))
        self.load_state_dict({**state, "pending": (None, None)})
        if metric is not None:
            self.source = source
            self.save_checkpoint(epoch, metric)
            self.source = None
        best = Path(self._checkpoint_path(self.best_epoch))
        if best.is_file():
            self._duplicate(str(best), str(best.parent / f"model_best{self.extension}"))

    def drop_recovery(self) -> None:
        """Remove the checkpoints of an epoch that is finished."""
        for file in Path(self.recovery_dir).glob(f"{self.recovery_prefix}-*{self.extension}"):
            file.unlink()


def draw_curves(
    history: list[dict[str, float]],
    path: Path,
    title: str,
    how: str,
    metric: tuple[str, str] = ("top1", "top-1 accuracy (%)"),
) -> None:
    """Draw the losses and one metric over the epochs.

    Args:
        history: Rows of summary.csv.
        path: PNG file to write.
        title: Above the picture.
        how: What makes the training values differ from held-out ones.
        metric: Its column of summary.csv, after ``train_`` and ``eval_`` or alone, and its name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 2)
    series = (
        ("train_", f"training ({how})", "tab:gray"),
        ("eval_", "held-out", "tab:blue"),
        ("", "held-out", "tab:blue"),
    )
    for axes, column, label in zip(panels, ("loss", metric[0]), ("loss", metric[1]), strict=True):
        for prefix, name, colour in series:
            key = prefix + column
            if key in history[-1]:
                marker = "o" if len(history) <= 30 else None
                axes.plot(epochs, [row[key] for row in history], label=name, color=colour, marker=marker, markersize=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    held_out = f"eval_{metric[0]}" if f"eval_{metric[0]}" in history[-1] else metric[0]
    best = max(history, key=lambda row: row[held_out])
    panels[0].legend(frameon=False)
    panels[1].axhline(best[held_out], color="tab:blue", linewidth=0.8, linestyle=":")
    panels[1].set_title(f"best {best[held_out]:.2f} % in epoch {int(best['epoch']) + 1}", fontsize=10)
    save_figure(figure, path)


def load_training_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint without running any code in it.

    Args:
        path: The file.

    Returns:
        Its entries.

    Raises:
        UserError: If it is missing, broken, or no training checkpoint.
    """
    if not path.is_file():
        raise UserError(f"--resume {str(path)!r}: no such file")
    try:
        checkpoint = load_checkpoint_metadata(str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise UserError(f"--resume {str(path)!r}: cannot read the checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or not {"arch", "epoch", "state_dict", "optimizer"} <= checkpoint.keys():
        raise UserError(f"--resume {str(path)!r} is no training checkpoint; use --initial-checkpoint for bare weights")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run that is furthest in training, or None."""
    files = [folder / "last.pth.tar", *folder.glob("recovery-*.pth.tar")]
    positions = []
    for file in files:
        if file.is_file():
            checkpoint = load_training_checkpoint(file)
            run = checkpoint.get("run") or {"epoch": checkpoint["epoch"] + 1, "batch": 0}
            positions.append(((run["epoch"], run["batch"]), file))
    return max(positions)[1] if positions else None


def choose_folder(args: argparse.Namespace, size: Sequence[int]) -> tuple[Path, Path | None]:
    """Output folder of the run and the checkpoint to resume from.

    Args:
        args: ``output``, ``experiment``, ``resume`` and ``model``.
        size: Input size ``(C, H, W)``.

    Returns:
        The folder, which exists, and the checkpoint or None.

    Raises:
        UserError: If the folder holds another run or cannot be made.
    """
    output = Path(args.output)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in args.model)
    suffix = f"{name}-{size[-1]}"
    checkpoint = None if args.resume in (None, "auto") else Path(args.resume)
    if args.experiment:
        folder = output / args.experiment
    elif checkpoint:
        folder = checkpoint.parent
    else:
        earlier = sorted(output.glob(f"????????-??????-{suffix}")) if args.resume else []
        folder = earlier[-1] if earlier else output / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output {args.output!r}: cannot make {str(folder)!r}: {e.strerror}") from None
    newest = newest_checkpoint(folder)
    if args.resume == "auto":
        checkpoint = newest
        print(f"resuming {newest}" if newest else f"no checkpoint in {folder}, starting from the beginning")
    elif newest and not checkpoint:
        raise UserError(f"--experiment: {str(folder)!r} holds a run; add --resume to continue it or choose another")
    return folder, checkpoint
