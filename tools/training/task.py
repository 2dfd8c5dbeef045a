"""What the training loop asks of a task: classification, detection, segmentation and scanpaths are its subclasses."""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from timm.utils.distributed import init_distributed_device_so
from torch import nn


class World(NamedTuple):
    """The processes of a run and this one's place among them.

    Attributes:
        size: Number of processes.
        rank: Of this process, 0 for the first.
        device: Where it computes.
    """

    size: int = 1
    rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def primary(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


ALONE = World()


@contextlib.contextmanager
def processes(device: str) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if it did.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; of several processes each takes the GPU of its rank.

    Yields:
        All of them, and this one's place.
    """
    found = init_distributed_device_so(device)
    try:
        yield World(found["world_size"], found["global_rank"], torch.device(found["device"]))
    finally:
        if found["distributed"]:
            torch.distributed.destroy_process_group()


class Column(NamedTuple):
    """A column of summary.csv that an epoch's line shows.

    Attributes:
        title: Above it.
        key: Its name in summary.csv.
        format: Of its values, for example ``".2f"``.
    """

    title: str
    key: str
    format: str


class Task:
    """What the loop asks of a task; a subclass builds model and data in its constructor.

    Attributes:
        args: Options of the command.
        world: Processes.
        model: On the device.
        loader: Training batches, each a tuple or list that :func:`to_device` understands.
        what: Column of summary.csv that says which epoch is best, its name for people and its unit.
        decreasing: Whether smaller is better.
        columns: What an epoch's line shows.
        unit: What a batch consists of.
        kept: Options that must be equal when a run goes on.
        skips_parameters: Whether a step may leave parameters without a gradient.
        patience: Epochs without a better one after which a run ends; None for no such end.
    """

    columns: Sequence[Column] = ()
    unit = "images"
    kept: Sequence[str] = ()
    skips_parameters = False
    decreasing = False
    patience: int | None = None

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.model: Any = None
        self.loader: Any = None
        self.what = ("", "", "")

    def label(self) -> str:
        """End of the name of a folder without ``--experiment``."""
        raise NotImplementedError

    def entries(self) -> dict[str, Any]:
        """What a checkpoint says of model and data: ``arch`` at least."""
        raise NotImplementedError

    def records(self) -> dict[str, Any]:
        """What args.yaml says of the data beside the options."""
        return {}

    def take_over(self, checkpoint: dict[str, Any], who: str) -> None:
        """Refuse a checkpoint of another model or of other data, before anything of it is loaded.

        Args:
            checkpoint: Its entries.
            who: The checkpoint, for the message.
        """

    def compute(self) -> nn.Module:
        """The model as batches are computed with it, perhaps compiled."""
        model: nn.Module = self.model
        return model

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare an epoch, after the model is set to training and before it chooses what it trains.

        Args:
            epoch: From 0.
            epochs: Of the run.
        """

    def losses(self, model: nn.Module, batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Loss of a batch.

        Args:
            model: As :meth:`compute` gave it.
            batch: On the device.

        Returns:
            ``loss``, a scalar; perhaps ``weight``, the number of values whose mean it is, where that differs from batch
            to batch; and perhaps ``right``, the per cent of right answers times the images.
        """
        raise NotImplementedError

    def count(self, batch: Sequence[Any]) -> int:
        """Images or trials of a batch."""
        return len(batch[0])

    def measure(self, model: nn.Module, tick: Callable[[], None]) -> dict[str, float]:
        """Figures of held-out data, the same in all processes, which share the work.

        Args:
            model: The model, or the average of its weights.
            tick: Called after each batch.

        Returns:
            Columns of summary.csv.
        """
        raise NotImplementedError

    def row(self, loss: float, right: float | None, figures: dict[str, float]) -> dict[str, float]:
        """A row of summary.csv but for ``epoch`` and ``lr``.

        Args:
            loss: Mean training loss.
            right: Per cent of right answers in training, or None.
            figures: Of :meth:`measure`.

        Returns:
            Values by column.
        """
        return {"train_loss": loss, **figures}

    def about(self) -> tuple[str, str, str]:
        """For the lines that a run begins with: the model, the input it is built for or nothing, and the data."""
        raise NotImplementedError

    def title(self) -> tuple[str, str]:
        """Title of the curves, and what makes the training values differ from held-out ones."""
        raise NotImplementedError

    def summary(self, best: str, epoch: str, file: Path) -> str:
        """The last words.

        Args:
            best: For example ``"best top-1 98.61 %"``.
            epoch: For example ``"epoch 3 of 8"``.
            file: Checkpoint of that epoch.

        Returns:
            Lines.
        """
        raise NotImplementedError


def extra_loss(model: nn.Module, out: Any, criterion: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """What a model adds to its loss, by its method ``extra_loss()`` or ``extra_loss(out, criterion)``.

    Args:
        model: Any model.
        out: What it gave for the batch, in training.
        criterion: The loss of logits ``[B, classes]`` for the targets of the batch.

    Returns:
        A scalar; None if the model has no such method or nothing to add.
    """
    hook = getattr(model, "extra_loss", None)
    if hook is None:
        return None
    found: torch.Tensor | None = hook(out, criterion) if inspect.signature(hook).parameters else hook()
    return found


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of lists, tuples and dictionaries.

    Args:
        value: Any of these, or anything else, which stays as it is.
        device: Where to.

    Returns:
        The same structure.
    """
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
