"""``vizoo train --task scanpath``: OAT on human scanpaths.

Teacher forcing with Adam, a constant learning rate and clipped gradients; the best epoch is the one whose greedy
scanpaths on the validation part behave most like people (``delta``), as in the official training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from vizoo.backbones.oat import OAT, next_fixations
from vizoo.tools.common import UserError, build_model, resolve_model
from vizoo.tools.data.folders import ignore_interrupts, seed_everything
from vizoo.tools.data.scanpaths import Batches, Scanpaths, Trial, collate, load_scanpaths, search_task, split
from vizoo.tools.data.shares import Share, gather, share_order
from vizoo.tools.scanpaths import average, compare, sim
from vizoo.tools.training.loop import train
from vizoo.tools.training.parsers import METRICS
from vizoo.tools.training.task import ALONE, Column, Task, World, to_device

BLANK = {True: (19, 19), False: (29, 29)}  # crops of data without images: the smallest with and without spp


def load_trials(options: dict[str, Any]) -> Scanpaths:
    """The trials of a run.

    Args:
        options: ``data``, and perhaps ``images``, ``grid``, ``trials`` and ``seed``.

    Returns:
        All of them.

    Raises:
        UserError: If they cannot be read.
    """
    grid = tuple(options["grid"]) if options.get("grid") else None
    if options["data"] == "search":
        if options.get("images"):
            raise UserError(f"--images {options['images']!r}: 'search' has no images")
        return search_task(options["trials"], grid or (3, 5), seed=options["seed"])  # type: ignore[arg-type]
    return load_scanpaths(options["data"], options.get("images"), grid)  # type: ignore[arg-type]


def build(name: str, kwargs: dict[str, Any], checkpoint: str = "") -> OAT:
    """An oat_* model.

    Args:
        name: Of the model.
        kwargs: Its arguments.
        checkpoint: Weights, or empty.

    Returns:
        The model.

    Raises:
        UserError: If it is no OAT, or cannot be built.
    """
    name = resolve_model(name)
    if timm.models.model_entrypoint(name.partition(".")[0]).__module__ != OAT.__module__:
        raise UserError(f"--model {name!r} predicts no scanpaths; allowed: oat_*")
    model: OAT = build_model(name, checkpoint_path=checkpoint, **kwargs)
    return model


def trial_batches(model: OAT, trials: Sequence[Trial]) -> Batches:
    """Trials as a model looks at them: whole images with a backbone, else crops of the objects.

    Args:
        model: The model.
        trials: The trials.

    Returns:
        A data set for :func:`vizoo.tools.data.scanpaths.collate`.
    """
    height, width = model.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    return Batches(trials, None if model.backbone is not None else model.crop_size, (height, width))


def teacher_forced(model: OAT, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the next fixations, given those before.

    Args:
        model: The model.
        batch: Of :func:`vizoo.tools.data.scanpaths.collate`, on the device.

    Returns:
        ``[B, T, N + 2]``.
    """
    place = (batch["target"], batch["sequence"], batch["object_mask"])
    if model.backbone is None:
        return model.forward_objects(batch["x"], batch["coords"], *place)
    out: torch.Tensor = model(batch["x"], batch["boxes"], *place, batch["coords"])
    return out


def predict(
    model: OAT,
    trials: Sequence[Trial],
    max_len: int,
    size: int,
    device: torch.device,
    samples: int = 0,
    seed: int = 0,
    world: World = ALONE,
    group: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[list[list[int]]], dict[str, float]]:
    """Predict scanpaths.

    Args:
        model: The model.
        trials: What to predict.
        max_len: Longest scanpath.
        size: Trials of a batch.
        device: Where the model is.
        samples: Scanpaths to draw for each trial; 0 for the greedy one.
        seed: Of the draws.
        world: Processes that share the trials by whole batches.
        group: Trials whose loss is one mean, before that of all groups is taken; 0 for ``size``.
        tick: Called after each batch.

    Returns:
        Scanpaths of each trial; and ``loss`` and ``sim``, teacher forced.
    """
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    share = Share(trial_batches(model, trials), size, world.rank, world.size)
    mode, n = ("sample", samples) if samples else ("greedy", 1)
    paths: list[list[list[int]]] = []
    rows: list[tuple[float, int, float]] = []  # of each trial: sum of the losses, their number, SIM
    for batch in DataLoader(share, size, collate_fn=collate):
        batch = to_device(batch, device)
        scene = {"object_mask": batch["object_mask"], "coords": batch["coords"]}
        boxes = batch["boxes"] if model.backbone is not None else None
        flat = model.generate(batch["x"], boxes, batch["target"], max_len, mode, n, generator, **scene)
        paths += [flat[i : i + n] for i in range(0, len(flat), n)]
        with torch.inference_mode():
            logits = teacher_forced(model, batch).float()
            labels = next_fixations(batch["sequence"], logits.shape[2] - 2)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none")
            sums = losses.unflatten(0, labels.shape).double().sum(1).tolist()
            probabilities = logits.softmax(-1).cpu().numpy()
        for total, p, t in zip(sums, probabilities, labels.cpu().numpy(), strict=True):
            rows.append((total, len(t[t >= 0]), sim(p[: len(t[t >= 0])], t[t >= 0])))
        tick()
    paths, rows = (gather(found, share.indices, world.size) for found in (paths, rows))
    groups = [rows[i : i + (group or size)] for i in range(0, len(rows), group or size)]
    means = [len(g) * sum(r[0] for r in g) / sum(r[1] for r in g) for g in groups]
    return paths, {"loss": sum(means) / len(trials), "sim": float(np.mean([r[2] for r in rows]))}


def path_metrics(trials: Sequence[Trial], paths: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """Metrics of predicted scanpaths, those of one trial averaged first.

    Args:
        trials: What people did.
        paths: Scanpaths of each trial.

    Returns:
        As :func:`vizoo.tools.scanpaths.scanpath_metrics`.
    """
    rows = []
    for trial, predicted in zip(trials, paths, strict=True):
        where = ((trial.scene.boxes[:, :2] + trial.scene.boxes[:, 2:]) / 2).numpy()
        rows.append(average([compare(p, trial.sequence, trial.target, where, trial.scene.screen) for p in predicted]))
    return average(rows)


class Scanpath(Task):
    """OAT on scanpaths.

    Args:
        args: Options of the command; ``model_kwargs`` is completed, ``max_len`` and ``trials_of_parts`` are added.
        world: Processes.
    """

    kept = ("model", "model_kwargs", "max_len", "trials_of_parts", "split_by", "batch_size", "eval_metric", "seed")
    unit = "trials"
    columns = (
        Column("train loss", "train_loss", ".4f"),
        Column("val loss", "loss", ".4f"),
        Column("sequence score", "sequence_score", ".4f"),
        Column("delta", "delta", ".3f"),
    )
    skips_parameters = True  # without a second object, nothing attends

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        super().__init__(args, world)
        self.data = load_trials(vars(args))
        self.parts = split(self.data.trials, args.seed, args.split_by)
        args.model_kwargs = self._complete(dict(args.model_kwargs))
        args.max_len = max(len(t.sequence) for t in self.parts["train"])
        args.trials_of_parts = {name: len(trials) for name, trials in self.parts.items()}
        seed_everything(args.seed)
        self.model = build(args.model, args.model_kwargs).to(world.device)
        trials = trial_batches(self.model, self.parts["train"])
        start = {"collate_fn": collate, "num_workers": args.workers, "worker_init_fn": ignore_interrupts}
        self.loader = DataLoader(trials, args.batch_size, shuffle=True, generator=torch.Generator(), **start)
        share_order(self.loader, args.seed, world.rank, world.size)
        self.what = (args.eval_metric, *METRICS["scanpath"][args.eval_metric])
        self.decreasing = args.eval_metric == "delta"
        self.patience = args.patience

    def _complete(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model, with the grid and the size of the crops that the data have."""
        kwargs = {"grid": self.data.grid, **kwargs}
        if "crop_size" not in kwargs and not self.args.images:
            crops = self.data.trials[0].scene.crops
            spp = getattr(build(self.args.model, {**kwargs, "device": "meta"}).appearance, "spp", 1)
            kwargs["crop_size"] = BLANK[bool(spp)] if crops is None else tuple(crops.shape[2:])
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}

    def label(self) -> str:
        """The model."""
        return str(self.args.model)

    def entries(self) -> dict[str, Any]:
        """The model."""
        return {"arch": self.args.model}

    def count(self, batch: Sequence[Any]) -> int:
        """Trials of a batch."""
        return len(batch["target"])  # type: ignore[call-overload]

    def losses(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Loss of teacher forcing, the mean over fixations and ends."""
        loss = self.model.loss(teacher_forced(model, batch), batch["sequence"])  # type: ignore[arg-type]
        return {"loss": loss, "weight": (batch["sequence"] >= 0).sum() + len(batch["target"])}

    def measure(self, model: nn.Module, tick: Callable[[], None]) -> dict[str, float]:
        """Greedy scanpaths on the validation part."""
        args, trials = self.args, self.parts["val"]
        model_: Any = model
        place = (args.max_len, args.batch_size, self.world.device)
        together = args.batch_size * self.world.size  # as in training
        paths, found = predict(model_, trials, *place, world=self.world, group=together, tick=tick)
        return {**found, **path_metrics(trials, paths)}

    def about(self) -> tuple[str, str, str]:
        """Model; trials of each part, and what was left out."""
        sizes = ", ".join(f"{n:,} {name}" for name, n in self.args.trials_of_parts.items())
        return str(self.args.model), "", f"{sizes}\n{self.data.note}" if self.data.note else sizes

    def title(self) -> tuple[str, str]:
        """Model and data."""
        return f"{self.args.model} on {Path(self.args.data).name}", "teacher forced"

    def summary(self, best: str, epoch: str, file: Path) -> str:
        """Where the best weights are and how to measure them."""
        return f"{best} on validation, {epoch}: {file}\nmeasure it on the test part: vizoo evaluate {file.parent}"


def train_scanpaths(args: argparse.Namespace) -> int:
    """Train OAT by the options of ``vizoo train``; returns the exit status."""
    return train(args, Scanpath)
