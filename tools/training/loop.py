"""The training loop of every task: epochs, exact resume, signals, the best epoch, divergence, several processes.

All randomness of a batch follows from its position (:func:`vizoo.tools.data.folders.seeded_batches`) and the learning
rate does too, so a run that stopped anywhere goes on as if it had not: on the same machine with the same number of
threads and processes, weights and summary.csv are equal bit for bit (tested on CPU; CUDA kernels may differ).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.layers
import timm.optim
import timm.scheduler
import torch
import torch.distributed
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, reduce_tensor
from torch import nn

from vizoo.tools.common import UserError, compute_device, console, one_line, progress
from vizoo.tools.data.folders import seed_everything, seeded_batches
from vizoo.tools.data.shares import from_first
from vizoo.tools.training.optimizer import build_optimizer, build_scheduler, precision
from vizoo.tools.training.options import UNSTORED
from vizoo.tools.training.run import (
    Saver,
    check_kept,
    check_loss,
    draw_curves,
    load_optimizer,
    load_training_checkpoint,
    open_run,
    read_history,
    say_changes,
    write_options,
    write_summary,
)
from vizoo.tools.training.task import Task, processes, to_device


class Stopped(Exception):
    """A signal asked to stop; the state is at an update boundary."""


class _Step(nn.Module):
    """Model and loss as one module, so that any number of processes share its gradients."""

    def __init__(self, model: nn.Module, losses: Callable[..., dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        return self.losses(self.model, batch)


class Loop:
    """One training run of one process.

    Args:
        task: Model and data.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.args, self.world = task, task.args, task.world
        self.model: Any = task.model
        args = self.args
        if not len(task.loader):
            share = f" of each of {self.world.size} processes" if self.world.size > 1 else ""
            count = len(task.loader.dataset)
            raise UserError(f"--batch-size {args.batch_size}{share} exceeds the {count} training {task.unit}")
        if args.sync_bn and self.world.size > 1:
            if self.world.device.type != "cuda":
                raise UserError("--sync-bn needs CUDA devices; leave it out, --dist-bn averages after each epoch")
            self.model = task.model = timm.layers.convert_sync_batchnorm(self.model)
        self.updates_per_epoch = -(-len(task.loader) // args.grad_accum_steps)
        self.optimizer = build_optimizer(self.model, args, self.world.size)
        self.scheduler, self.epochs = build_scheduler(self.optimizer, args, self.updates_per_epoch)
        self.learning = self._learning(), 1.0  # what learns, and at which share of the learning rate
        self._choose_part(0)  # refuses a number of epochs before the run starts
        self.lr_scales = [g.get("lr_scale", 1.0) for g in self.optimizer.param_groups]
        self.autocast, self.scaler = precision(args, self.world.device)
        self.ema: Any = None
        if args.model_ema:
            self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        self.compute: Any = None
        self.saver: Saver | None = None
        # position: epoch in progress, batches of it already used, and the sums over them
        self.epoch = self.batch = 0
        self.sums = [0.0, 0.0, 0.0]  # loss, per cent right, images
        self.history: list[dict[str, float]] = []
        self.all_sums = [self.sums]  # of all processes, when a checkpoint is written
        self.elapsed, self.started = 0.0, time.monotonic()
        self.reported, self.drawn = False, -math.inf
        self.stop: list[int] = []

    # checkpoints

    def contents(self) -> dict[str, Any]:
        """What a checkpoint holds; every entry loads with ``weights_only=True``."""
        out: dict[str, Any] = {
            "task": self.args.task,
            **self.task.entries(),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "args": {k: v for k, v in vars(self.args).items() if k not in UNSTORED},
            "run": {
                "epoch": self.epoch,
                "batch": self.batch,
                "sums": self.all_sums,
                "history": self.history,
                "elapsed": self.elapsed + time.monotonic() - self.started,
            },
        }
        if self.ema:
            out["state_dict_ema"] = self.ema.module.state_dict()
        if self.scaler:
            out[self.scaler.state_dict_key] = self.scaler.state_dict()
        return out

    def save_recovery(self) -> Path:
        """Save in the middle of an epoch; all processes call it at the same update."""
        self.all_sums = [self.sums]
        if self.world.size > 1:
            self.all_sums = [[] for _ in range(self.world.size)]
            torch.distributed.all_gather_object(self.all_sums, self.sums)
        if self.saver:
            self.saver.save_recovery(self.epoch, self.batch)
        return self.folder / f"recovery-{self.epoch}-{self.batch}.pth.tar"

    def resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of this tool or, for a classifier, of timm's training script.

        Args:
            path: The file.
            checkpoint: Its contents.

        Raises:
            UserError: If it belongs to another task, model, data or optimizer, or to options that must not change.
        """
        who = f"--resume {str(path)!r}"
        try:
            before = check_kept(checkpoint, vars(self.args), self.task.kept, who)
            self.task.take_over(checkpoint, who)
            self._load_weights(checkpoint, who)
            if not self.args.no_resume_opt:
                self._load_optimizer(checkpoint, before, who)
            self._load_position(path, checkpoint, who)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            reason = f"{type(e).__name__}: {one_line(e, 200)}"
            raise UserError(f"{who} is no checkpoint of 'vizoo train': {reason}") from e
        self.schedule()
        if before and self.world.primary:
            say_changes(before, vars(self.args))

    def _load_weights(self, checkpoint: dict[str, Any], who: str) -> None:
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
        except RuntimeError as e:
            raise UserError(f"{who} does not fit the model with these options: {one_line(e)}") from None

    def _load_optimizer(self, checkpoint: dict[str, Any], before: dict[str, Any], who: str) -> None:
        args = self.args
        try:
            if before.get("opt", args.opt) != args.opt:
                raise ValueError(f"it was trained with --opt {before['opt']!r}")
            load_optimizer(self.optimizer, checkpoint["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(
                f"{who}: its optimizer state does not fit --opt {args.opt!r} ({e}); "
                "add --no-resume-opt to start with a fresh optimizer"
            ) from None
        if self.scaler and self.scaler.state_dict_key in checkpoint:
            self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])

    def _load_position(self, path: Path, checkpoint: dict[str, Any], who: str) -> None:
        run = checkpoint.get("run") or {"epoch": checkpoint["epoch"] + 1}
        self.epoch, self.batch = int(run["epoch"]), int(run.get("batch", 0))
        if self.epoch >= self.epochs and path.parent.resolve() != self.folder.resolve():
            raise UserError(f"{who}: all {self.epochs} epochs are done already; raise --epochs")
        sums = run.get("sums", [])
        if len(sums) == self.world.size:
            self.sums = [float(value) for value in sums[self.world.rank]]
        elif self.batch:
            now = f"these are {self.world.size}; start as many, or resume from last.pth.tar"
            raise UserError(f"{who} stopped in the middle of an epoch of {len(sums)} processes, {now}")
        self.history = read_history(run.get("history", []), ("train_loss", *(c.key for c in self.task.columns)))
        self.elapsed = float(run.get("elapsed", 0.0))
        if self.epoch < 0 or self.batch < 0 or (self.history and len(self.history) > self.epoch):
            raise ValueError(
                f"it stopped in epoch {self.epoch}, batch {self.batch}, with {len(self.history)} epochs done"
            )
        if self.batch > len(self.task.loader):
            raise UserError(
                f"{who} stopped after {self.batch} batches of an epoch, which now has "
                f"{len(self.task.loader)}; use its --batch-size, or resume from last.pth.tar"
            )

    # the run

    def prepare(self, folder: Path, resumed: tuple[Path, dict[str, Any]] | None) -> None:
        """Set up output and parallel training.

        Args:
            folder: Output folder of the run; the first process writes to it.
            resumed: Checkpoint to continue from and its contents.
        """
        self.folder = folder
        if resumed:
            self.resume(*resumed)
        if self.world.primary:
            self.saver = Saver(
                self.contents,
                model=self.model,
                optimizer=self.optimizer,
                checkpoint_dir=str(folder),
                recovery_dir=str(folder),
                decreasing=self.task.decreasing,
                max_history=self.args.checkpoint_hist,
            )
            if resumed and resumed[0].parent.resolve() == folder.resolve():
                state = resumed[1].get("saver")
                if isinstance(state, dict):
                    self.saver.repeat(resumed[0], state)
        self.step = _Step(self.task.compute(), self.task.losses)
        self.compute = self._distributed()
        if not resumed:
            self.save_recovery()  # so that a run that stops in its first epoch can go on
        if self.world.primary:
            options = {k: v for k, v in vars(self.args).items() if k not in UNSTORED}
            options["lr_scale"] = [f"{pattern}={scale}" for pattern, scale in self.args.lr_scale]
            write_options(folder, {**options, **self.task.records()})
            self.write_log(picture=True)

    def _distributed(self) -> nn.Module:
        if self.world.size == 1:
            return self.step
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        skips = self.task.skips_parameters
        return nn.parallel.DistributedDataParallel(self.step, device_ids=ids, find_unused_parameters=skips)

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Stopped: After a signal, with a checkpoint saved.
            Failure: When the loss is not finite.
        """
        while self.epoch < self.epochs and not self.is_enough():
            self.start_epoch()
            began, used = time.monotonic(), self.sums[2]
            self.train_epoch()
            seconds = time.monotonic() - began
            sums = self._all_sums()
            tick = functools.partial(self.stop_if_asked, agreed=self.world.size == 1)
            model = self.ema.module if self.ema else self.step.model
            with self.autocast():
                figures = self.task.measure(model, tick)
            right = sums[1] / sums[2] if sums[1] >= 0 else None
            row = {"epoch": self.epoch, **self.task.row(sums[0] / sums[2], right, figures), "lr": self.base_lr()}
            self.history.append(row)
            self.epoch, self.batch, self.sums, self.all_sums = self.epoch + 1, 0, [0.0, 0.0, 0.0], []
            self._save_epoch(row, (sums[2] - used * self.world.size) / max(seconds, 1e-9))
            self.stop_if_asked()

    def is_enough(self) -> bool:
        """Whether the best epoch was so long ago that the task has no more patience."""
        patience, best = self.task.patience, self.saver.best_epoch if self.saver else None
        enough = patience is not None and best is not None and self.epoch - 1 - best >= patience
        return bool(self._agree(int(enough))) if patience is not None else False

    def _agree(self, value: int) -> int:
        """The largest value of all processes."""
        if self.world.size == 1:
            return value
        flag = torch.tensor(value, device=self.world.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    def start_epoch(self) -> None:
        """Set what is trained in this epoch, and at which learning rate."""
        before = self._learning()
        self.compute.train()
        self.task.start_epoch(self.epoch, self.epochs)
        factor = self._choose_part(self.epoch)
        for group, scale in zip(self.optimizer.param_groups, self.lr_scales, strict=True):
            group["lr_scale"] = scale * factor
        self.schedule()
        now = self._learning()
        if before != now:
            self.compute = self._distributed()  # it gathers what needed gradients when it was made
        if self.world.primary and self.learning != (now, factor):
            sizes = [p.numel() for p in self.model.parameters()]
            learns = sum(n for n, learns in zip(sizes, now, strict=True) if learns)
            rate = "" if factor == 1 else f", at {factor:g} of the learning rate"
            print(f"from epoch {self.epoch + 1} on: {learns:,} of {sum(sizes):,} parameters learn{rate}")
        self.learning = now, factor

    def _learning(self) -> list[bool]:
        return [p.requires_grad for p in self.model.parameters()]

    def _choose_part(self, epoch: int) -> float:
        """Ask the model, if it has ``training_phase(epoch, epochs)``, what it trains and at which share of the rate.

        Raises:
            UserError: If the epochs do not suffice for its phases.
        """
        hook = getattr(self.model, "training_phase", None)
        try:
            factor = hook(epoch, self.epochs) if hook else None
        except ValueError as e:
            raise UserError(f"--epochs {self.epochs} with --model {self.args.model!r}: {e}") from None
        return 1.0 if factor is None else float(factor)

    def schedule(self) -> None:
        """Set the learning rate of the next update; after the last one of an epoch, its line tells that one's rate."""
        if self.scheduler.t_in_epochs:
            self.scheduler.step(self.epoch)
        else:
            done = min(-(-self.batch // self.args.grad_accum_steps), self.updates_per_epoch - 1)
            self.scheduler.step_update(self.epoch * self.updates_per_epoch + done)

    def _equal_statistics(self) -> None:
        """Make the BatchNorm statistics of all processes equal; a checkpoint holds those of the first one."""
        if self.world.size > 1 and self.args.dist_bn:
            distribute_bn(self.model, self.world.size, self.args.dist_bn == "reduce")
            if self.ema:
                distribute_bn(self.ema, self.world.size, reduce=False)

    def _all_sums(self) -> list[float]:
        """Sums over the epoch of all processes."""
        if self.world.size == 1:
            return self.sums
        total = torch.tensor(self.sums, device=self.world.device, dtype=torch.float64)
        found: list[float] = reduce_tensor(total, 1).tolist()
        return found

    def train_epoch(self) -> None:
        """Train on the rest of the epoch in progress.

        Raises:
            Stopped: After a signal, with a checkpoint saved.
            Failure: When the loss is not finite.
        """
        args, steps = self.args, len(self.task.loader)
        self.optimizer.zero_grad()
        if self.batch == steps:
            return  # stopped while the held-out data were measured
        name = f"epoch {self.epoch + 1}/{self.epochs}"
        with progress(self.world.primary) as bar:
            shown = bar.add_task(name, total=steps, completed=self.batch)
            batches = seeded_batches(self.task.loader, args.seed, self.world.rank, self.epoch)
            for k, batch in enumerate(batches):
                if k < self.batch:
                    continue
                update = k + 1 == steps or (k + 1) % args.grad_accum_steps == 0
                value = self.train_batch(k, batch, update)
                bar.update(shown, completed=k + 1, description=f"{name} loss {value:.3f}")
                if update:
                    self.finish_update(k + 1)

    def train_batch(self, k: int, batch: Sequence[Any], update: bool) -> float:
        """Add the gradients of one batch, and step after the last one of an update.

        Args:
            k: Place of the batch in the epoch.
            batch: As the loader gives it.
            update: Whether it is the last one of an update.

        Returns:
            Its loss.
        """
        steps, accumulated = len(self.task.loader), self.args.grad_accum_steps
        last_group = steps % accumulated or accumulated
        group = last_group if k >= steps - last_group else accumulated
        batch = to_device(batch, self.world.device)
        wait = self.world.size > 1 and not update
        with self.compute.no_sync() if wait else contextlib.nullcontext():
            with self.autocast():
                out = self.compute(batch)
                loss = self._weighted(out)
            value = loss.item()
            where = f"in epoch {self.epoch + 1}, batch {k + 1} of {steps}, at learning rate {self.base_lr():.3g}"
            check_loss(value, where, "lower --lr, add --clip-grad or warm up longer")
            self.backward(loss / group, update)
        n = self.task.count(batch)
        self.sums[0] += value * n
        self.sums[1] += out["right"].item() if "right" in out else -math.inf
        self.sums[2] += n
        return value

    def _weighted(self, out: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch; of several processes so weighted that the mean over them is that of one process."""
        loss = out["loss"]
        if self.world.size == 1 or "weight" not in out:
            return loss
        total = out["weight"].detach().to(torch.float64, copy=True)
        torch.distributed.all_reduce(total)
        return loss * (out["weight"] * self.world.size / total).to(loss.dtype)

    def backward(self, loss: torch.Tensor, update: bool) -> None:
        """Accumulate gradients and, at an update, clip them and step.

        Args:
            loss: Of a batch.
            update: Whether to step.
        """
        args = self.args
        second_order = getattr(self.optimizer, "is_second_order", False)
        parameters = model_parameters(self.model, exclude_head=args.clip_mode == "agc")
        if self.scaler:
            self.scaler(
                loss, self.optimizer, args.clip_grad, args.clip_mode, parameters, second_order, need_update=update
            )
            return
        loss.backward(create_graph=second_order)
        if update:
            if args.clip_grad is not None:
                dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
            self.optimizer.step()

    def finish_update(self, batch: int) -> None:
        """After a step of the optimizer: average, learning rate, log, signals, recovery.

        Args:
            batch: Batches of the epoch that are done.
        """
        args, steps = self.args, len(self.task.loader)
        self.batch = batch
        done = -(-batch // args.grad_accum_steps)
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model, step=self.epoch * self.updates_per_epoch + done)
        self.schedule()
        if batch == steps:
            self._equal_statistics()
        if self.world.primary and done % args.log_interval == 0 and not console(stderr=True).is_terminal:
            mean = self.sums[0] / self.sums[2]
            print(f"epoch {self.epoch + 1} batch {batch}/{steps} loss {mean:.4f}", file=sys.stderr)
        self.stop_if_asked(agreed=self.world.size == 1 or done % args.log_interval == 0)
        if args.recovery_interval and done % args.recovery_interval == 0 and batch < steps:
            self.save_recovery()

    def stop_if_asked(self, agreed: bool = True) -> None:
        """Save and raise after a signal.

        Args:
            agreed: False where processes cannot stop together; they do at the next log interval or epoch.

        Raises:
            Stopped: If any process got a signal.
        """
        if not agreed:
            return
        asked = self._agree(self.stop[0] if self.stop else 0)
        if asked:
            self.stop[:] = [asked]
            path = self.save_recovery() if self.batch else self.folder / "last.pth.tar"
            self.write_log(picture=True)
            raise Stopped(
                f"stopped in epoch {self.epoch + 1} of {self.epochs} after {self.batch} of "
                f"{len(self.task.loader)} batches; saved {path}; continue with the same command and --resume"
            )

    def base_lr(self) -> float:
        """Learning rate of the groups that ``--lr-scale`` and layer decay leave alone."""
        return max(g["lr"] / s if s else 0.0 for g, s in zip(self.optimizer.param_groups, self.lr_scales, strict=True))

    # what people see

    def _save_epoch(self, row: dict[str, float], speed: float) -> None:
        """Save an epoch, print its line and rewrite the log."""
        if not self.saver:
            return
        best, metric = self.saver.best_epoch, row[self.task.what[0]]
        if math.isnan(metric):  # nothing to measure: worse than all
            metric = sys.float_info.max * (1 if self.task.decreasing else -1)
        self.saver.save_checkpoint(self.epoch - 1, metric=metric)
        self.saver.drop_recovery()
        if not self.reported:
            titles = "".join(f"  {c.title:>8s}" for c in self.task.columns)
            print(f"  epoch{titles}        lr  {self.task.unit}/s  elapsed")
            self.reported = True
        cells = "".join(f"  {row[c.key]:{max(8, len(c.title))}{c.format}}" for c in self.task.columns)
        star = "*" if self.saver.best_epoch != best else " "
        elapsed = datetime.timedelta(seconds=int(self.elapsed + time.monotonic() - self.started))
        width = len(self.task.unit) + 2
        start = f"{int(row['epoch']) + 1:3d}/{self.epochs:<3d}{cells}{star}"
        print(f"{start} {row['lr']:8.2e}  {speed:{width}.0f}  {elapsed}", flush=True)
        self.write_log(picture=time.monotonic() - self.drawn > 10 or self.epoch == self.epochs)

    def write_log(self, picture: bool) -> None:
        """Write summary.csv and perhaps curves.png.

        Args:
            picture: Whether to draw, which takes a second.
        """
        if not self.saver or not self.history:
            return
        write_summary(self.folder, self.history)
        if picture:
            key, name, unit = self.task.what
            draw_curves(
                self.history, self.folder / "curves.png", *self.task.title(), (key, name, unit), self.task.decreasing
            )
            self.drawn = time.monotonic()

    def summary(self) -> str:
        """The last words: best result, where it is and how to go on."""
        assert self.saver is not None
        _, name, unit = self.task.what
        metric = math.nan if self.saver.best_metric is None else self.saver.best_metric
        best = f"best {name} {metric:.{2 if unit else 4}f}{unit}"
        epoch = f"epoch {(self.saver.best_epoch or 0) + 1} of {self.epochs}"
        return self.task.summary(best, epoch, self.folder / "model_best.pth.tar")


@contextlib.contextmanager
def _signals(stop: list[int]) -> Iterator[None]:
    """Collect SIGINT and SIGTERM, so that training stops at an update; the second Ctrl-C interrupts at once."""

    def handle(signum: int, frame: Any) -> None:
        if stop and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, action in before.items():
            signal.signal(s, action)


def train(args: argparse.Namespace, task: type[Task]) -> int:
    """Train in this process, which ``torchrun`` may have started beside others.

    Args:
        args: Options of the task.
        task: What to train.

    Returns:
        Exit status: 0 done, 2 if the first process refuses the folder, 130 after Ctrl-C and 143 after SIGTERM.

    Raises:
        UserError: For bad input.
        Failure: If the loss is not finite.
    """
    args.device = str(compute_device(args.device))
    with processes(args.device) as world:
        seed_everything(args.seed)
        return _run(Loop(task(args, world)))


def _run(loop: Loop) -> int:
    with contextlib.ExitStack() as stack:
        chosen = None
        try:
            if loop.world.primary:
                chosen = stack.enter_context(open_run(loop.args, loop.task.label()))
        finally:
            chosen = from_first(chosen, loop.world.size)
        if chosen is None:
            return 2  # the first process says why
        folder, checkpoint = chosen
        loop.prepare(folder, (checkpoint, load_training_checkpoint(checkpoint)) if checkpoint else None)
        return _fit(loop)


def _about(loop: Loop) -> str:
    """What is trained, where, and on which data."""
    model, size, data = loop.task.about()
    millions = sum(p.numel() for p in loop.model.parameters()) / 1e6
    processes = f" x {loop.world.size} processes" if loop.world.size > 1 else ""
    place = f"input {size}, {loop.world.device}" if size else f"{loop.world.device}"
    return f"{model}: {millions:.2f} M parameters, {place}{processes}\n{loop.args.data}: {data}"


def _fit(loop: Loop) -> int:
    if loop.world.primary:
        print(f"{_about(loop)}\noutput: {loop.folder}")
        if loop.epoch >= loop.epochs:
            print(f"all {loop.epochs} epochs are done already; raise --epochs to train on")
    try:
        with _signals(loop.stop):
            loop.fit()
    except Stopped as e:
        if loop.world.primary:
            print(f"vizoo train: {e}", file=sys.stderr)
        return 128 + loop.stop[0]
    if loop.world.primary:
        if loop.epoch < loop.epochs:
            print(f"no better {loop.args.eval_metric} for {loop.task.patience} epochs")
        print(loop.summary())
    return 0
