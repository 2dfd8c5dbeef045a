"""``vizoo train``: train a classifier with timm's parts and the option names of timm's training script.

Differences from that script: ``--data digits`` brings a data set and a recipe along; data, options and the fit of model
and input size are checked before training starts; ``--resume`` without a path finds the newest checkpoint of the run;
and a resumed run is exact, also in the middle of an epoch: on the same machine with the same number of threads, weights
and summary.csv equal those of an uninterrupted run bit for bit (tested on CPU; CUDA kernels may not be deterministic).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import difflib
import fnmatch
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm.loss
import timm.optim
import timm.scheduler
import torch
import torch.distributed
from timm.models import model_parameters
from timm.utils import (
    ModelEmaV3,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    reduce_tensor,
)
from timm.utils.distributed import init_distributed_device_so
from torch import nn

from vizoo.backbones.medusa import MEDUSA, medusa_parameters
from vizoo.tools.common import (
    UserError,
    build_model,
    compute_device,
    console,
    is_exhausted,
    progress,
    resolve_models,
    run_tool,
)
from vizoo.tools.data.folders import (
    Splits,
    build_loaders,
    digits_splits,
    folder_splits,
    reorder_classes,
    reordered,
    seed_everything,
    seeded_batches,
)
from vizoo.tools.evaluate import evaluate
from vizoo.tools.training.options import asked_task, model_config, parse_options
from vizoo.tools.training.run import (
    Saver,
    check_loss,
    draw_curves,
    load_optimizer,
    load_training_checkpoint,
    match_classes,
    open_run,
    read_history,
    say_changes,
    say_unnamed,
    skipped_text,
    write_options,
    write_summary,
)
from vizoo.tools.training.scanpath import train_scanpaths
from vizoo.tools.training.tuning import PROMPTS, tune


class Stopped(Exception):
    """A signal asked to stop; the state is at an update boundary."""


class Trainer:
    """One training run of one process.

    Args:
        args: Options.
        world: ``distributed``, ``world_size``, ``global_rank`` and ``device`` of this process.
        splits: Data.
    """

    def __init__(self, args: argparse.Namespace, world: SimpleNamespace, splits: Splits) -> None:
        self.args, self.world, self.splits = args, world, splits
        self.primary = world.global_rank == 0
        self.device = torch.device(world.device)
        self.classes = splits.classes
        self.skipped = {"train": splits.train.skipped, "val": splits.held_out.skipped}
        self.num_classes = args.num_classes or len(self.classes)
        if self.num_classes < len(self.classes):
            raise UserError(f"--num-classes {self.num_classes} is below the {len(self.classes)} classes of the data")
        seed_everything(args.seed)
        self.model = self._build_model()
        self.compute: Any = self.model  # compiled, and shared between processes, once prepared
        self.eval_model: Any = self.model
        self.loader, self.held_out = build_loaders(
            args, splits, self.data_config, self.device, self.num_classes, world.distributed
        )
        if not len(self.loader):
            share = f" for each of {world.world_size} processes" if world.distributed else ""
            raise UserError(
                f"--batch-size {args.batch_size} exceeds the training images{share}: {len(splits.train)} in total"
            )
        self.updates_per_epoch = -(-len(self.loader) // args.grad_accum_steps)
        self.criterion = self._build_loss().to(self.device)
        self.optimizer, self.scheduler, self.epochs = self._build_optimizer()
        self.lr_scales = [g.get("lr_scale", 1.0) for g in self.optimizer.param_groups]
        self.rounds = self._medusa_rounds()
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        self.scaler = None
        if args.amp:
            dtype = getattr(torch, args.amp_dtype)
            self.autocast = functools.partial(torch.autocast, device_type=self.device.type, dtype=dtype)
            self.scaler = NativeScaler(device=self.device.type) if dtype == torch.float16 else None
        self.ema = None
        if args.model_ema:
            self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        # position: epoch in progress, batches of it already used, and the sums over them
        self.epoch = self.batch = 0
        self.sums = [0.0, 0.0, 0.0]  # loss, per cent right, images
        self.history: list[dict[str, float]] = []
        self.all_sums = [self.sums]  # of all processes, when a checkpoint is written
        self.elapsed, self.started = 0.0, time.monotonic()
        self.reported, self.drawn = False, -math.inf
        self.stop: list[int] = []

    def _build_model(self) -> nn.Module:
        args = self.args
        name = args.model
        self.load_kwargs, self.data_config = model_config(args, self.num_classes)
        size = tuple(self.data_config["input_size"])
        overlay: dict[str, Any] = {}
        if args.pretrained_path:  # -1 classes: its head is always replaced
            overlay["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
        model = build_model(
            name,
            pretrained=args.pretrained or bool(args.pretrained_path),
            **overlay,
            checkpoint_path=args.initial_checkpoint or "",
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **self.load_kwargs,
        )
        tune(model, args)
        if args.grad_checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError):
                raise UserError(f"--grad-checkpointing: model {name!r} does not support it") from None
        model.to(self.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.sync_bn and self.world.distributed:
            if self.device.type != "cuda":
                raise UserError("--sync-bn needs CUDA devices; leave it out, --dist-bn averages after each epoch")
            model = timm.layers.convert_sync_batchnorm(model)
        self._probe(model, size)
        return model

    def _probe(self, model: nn.Module, size: tuple[int, ...]) -> None:
        """Run the model once, so that a size it cannot take is one line before training starts."""
        try:
            with torch.no_grad():
                out = model.eval()(torch.zeros(2, *size, device=self.device))
                # in training the output may be another one, and BatchNorm on a 1x1 map needs two images
                batch = min(2, self.args.batch_size)
                trained = copy.deepcopy(model).train()(torch.zeros(batch, *size, device=self.device))
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError) as e:
            if is_exhausted(e):
                raise
            what = f"input {size[1]}x{size[2]} (--img-size) with --batch-size {self.args.batch_size}"
            reason = (str(e).strip() or "no message").splitlines()[0][:200]
            raise UserError(f"model {self.args.model!r} cannot take {what}: {type(e).__name__}: {reason}") from None
        try:
            split_logits(trained)
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
        self.mixed = bool(args.mixup or args.cutmix or args.cutmix_minmax)
        if args.bce_loss:
            return timm.loss.BinaryCrossEntropy(smoothing=0.0 if self.mixed else args.smoothing)
        if self.mixed:
            return timm.loss.SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=args.smoothing)

    def _build_optimizer(self) -> tuple[torch.optim.Optimizer, Any, int]:
        args = self.args
        lr = args.lr
        if lr is None:
            ratio = args.batch_size * self.world.world_size * args.grad_accum_steps / args.lr_base_size
            root = (args.lr_base_scale or ("sqrt" if "ada" in args.opt or "lamb" in args.opt else "linear")) == "sqrt"
            lr = args.lr_base * (math.sqrt(ratio) if root else ratio)
        try:
            timm.optim.get_optimizer_class(args.opt.lower().removeprefix("lookahead_"))
        except ValueError:
            near = difflib.get_close_matches(args.opt, timm.optim.list_optimizers(), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "for example adamw, sgd, lamb"
            raise UserError(f"--opt {args.opt!r} is unknown; {hint}") from None
        extra = {"eps": args.opt_eps, "betas": args.opt_betas}
        try:
            optimizer = timm.optim.create_optimizer_v2(
                self.model,
                opt=args.opt,
                lr=lr,
                momentum=args.momentum,
                param_group_fn=functools.partial(parameter_groups, args=args),
                **{k: v for k, v in extra.items() if v is not None},
            )
        except UserError:
            raise
        except (TypeError, ValueError, IndexError, AssertionError, ImportError) as e:
            raise UserError(f"--opt {args.opt!r}: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
        try:
            scheduler, epochs = timm.scheduler.create_scheduler_v2(
                optimizer,
                **timm.scheduler.scheduler_kwargs(args),
                updates_per_epoch=self.updates_per_epoch,
            )
        except (AssertionError, ValueError) as e:
            raise UserError(f"--sched {args.sched} with --epochs {args.epochs}: {e}") from None
        return optimizer, scheduler, epochs

    def _medusa_rounds(self) -> int:
        """How often backbone and body of a MEDUSA train in turn."""
        rounds, most = self.args.medusa_rounds, (self.epochs - 1) // 2
        if not isinstance(self.model, MEDUSA):
            if rounds is not None:
                raise UserError(f"--medusa-rounds {rounds}: {self.args.model!r} is no medusa_* model")
            return 0
        if rounds is None:
            return min(2, most)
        if rounds > most:
            raise UserError(f"--medusa-rounds {rounds} needs at least {2 * rounds + 1} epochs, got {self.epochs}")
        return int(rounds)

    def choose_phase(self) -> None:
        """Set what a MEDUSA trains in this epoch: its backbone, its body, in the end both at a tenth of the rate."""
        if not self.rounds:
            return
        parts = 2 * self.rounds + 1
        part = self.epoch * parts // self.epochs
        phase = "all" if part == parts - 1 else ("backbone", "body")[part % 2]
        before = [p.requires_grad for p in self.model.parameters()]
        medusa_parameters(self.model, phase)
        for group, scale in zip(self.optimizer.param_groups, self.lr_scales, strict=True):
            group["lr_scale"] = scale * (0.1 if phase == "all" else 1.0)
        self.schedule()
        if self.compute is not self.eval_model and before != [p.requires_grad for p in self.model.parameters()]:
            self.compute = self._distributed(self.eval_model)  # it gathers what needed gradients when it was made
        if self.primary and (self.epoch == 0 or (self.epoch - 1) * parts // self.epochs != part):
            what = "everything, at a tenth of the rate" if phase == "all" else f"{phase} and attention heads"
            print(f"from epoch {self.epoch + 1} on: {what}")

    def schedule(self) -> None:
        """Set the learning rate of the position."""
        if self.scheduler.t_in_epochs:
            self.scheduler.step(self.epoch)
        else:
            done = -(-self.batch // self.args.grad_accum_steps)
            self.scheduler.step_update(self.epoch * self.updates_per_epoch + done)

    def contents(self) -> dict[str, Any]:
        """What a checkpoint holds; every entry loads with ``weights_only=True``."""
        out: dict[str, Any] = {
            "arch": self.args.model,
            "task": "classification",
            "classes": self.classes,
            "skipped": self.skipped,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "args": {k: v for k, v in vars(self.args).items() if k not in ("config", "debug", "resume")},
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
        if self.world.distributed:
            self.all_sums = [[] for _ in range(self.world.world_size)]
            torch.distributed.all_gather_object(self.all_sums, self.sums)
        if self.saver:
            self.saver.save_recovery(self.epoch, self.batch)
        return self.folder / f"recovery-{self.epoch}-{self.batch}.pth.tar"

    def resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint of this tool or of timm's training script.

        Args:
            path: The file.
            checkpoint: Its contents.

        Raises:
            UserError: If it belongs to another model, other classes or another optimizer.
        """
        try:
            self._resume(path, checkpoint)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"--resume {str(path)!r} is no checkpoint of 'vizoo train': {type(e).__name__}: {e}") from e

    def _resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        args = self.args
        if checkpoint["arch"] != args.model:
            raise UserError(f"--resume {str(path)!r} holds model {checkpoint['arch']!r}, --model is {args.model!r}")
        before = checkpoint.get("args") or {}
        before = before if isinstance(before, dict) else vars(before)  # a namespace in those of timm's script
        data, who = f"--data {args.data!r}", f"--resume {str(path)!r}"
        order = match_classes(checkpoint.get("classes"), self.classes, data, who)
        for part in (self.splits.train, self.splits.held_out):
            reorder_classes(part, order)
        self.classes = reordered(self.classes, order)
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
            if self.ema:
                self.ema.module.load_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
        except RuntimeError as e:
            reason = " ".join(" ".join(str(e).split()).split(" ")[:30])
            raise UserError(f"--resume {str(path)!r} does not fit the model with these options: {reason}") from None
        if not args.no_resume_opt:
            try:
                if before.get("opt", args.opt) != args.opt:
                    raise ValueError(f"it was trained with --opt {before['opt']!r}")
                load_optimizer(self.optimizer, checkpoint["optimizer"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
                raise UserError(
                    f"--resume {str(path)!r}: its optimizer state does not fit --opt {args.opt!r} ({e}); "
                    "add --no-resume-opt to start with a fresh optimizer"
                ) from None
            if self.scaler and self.scaler.state_dict_key in checkpoint:
                self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])
        run = checkpoint.get("run") or {"epoch": checkpoint["epoch"] + 1}
        self.epoch, self.batch = int(run["epoch"]), int(run.get("batch", 0))
        if self.epoch >= self.epochs and path.parent.resolve() != self.folder.resolve():
            raise UserError(f"--resume {str(path)!r}: all {self.epochs} epochs are done already; raise --epochs")
        sums = run.get("sums", [])
        if len(sums) == self.world.world_size:
            self.sums = sums[self.world.global_rank]
        self.history = read_history(run.get("history", []), ("train_loss", "eval_loss", f"eval_{args.eval_metric}"))
        self.elapsed = float(run.get("elapsed", 0.0))
        if self.epoch < 0 or self.batch < 0:
            raise ValueError(f"it stopped in epoch {self.epoch}, batch {self.batch}")
        if self.batch > len(self.loader):
            raise UserError(
                f"--resume {str(path)!r} stopped after {self.batch} batches of an epoch, which now has "
                f"{len(self.loader)}; use its --batch-size, or resume from last.pth.tar"
            )
        self.schedule()
        if self.primary:
            say_unnamed(checkpoint.get("classes"), who)
        if before and self.primary:
            say_changes(before, vars(args))

    def prepare(self, folder: Path, resumed: tuple[Path, dict[str, Any]] | None) -> None:
        """Set up output and parallel training.

        Args:
            folder: Output folder of the run; the first process writes to it.
            resumed: Checkpoint to continue from and its contents.
        """
        args = self.args
        self.folder = folder
        self.saver: Saver | None = None
        if resumed:
            self.resume(*resumed)
        if self.primary:
            self.saver = Saver(
                self.contents,
                model=self.model,
                optimizer=self.optimizer,
                checkpoint_dir=str(folder),
                recovery_dir=str(folder),
                decreasing=args.eval_metric == "loss",
                max_history=args.checkpoint_hist,
            )
            if (
                resumed
                and resumed[0].parent.resolve() == folder.resolve()
                and isinstance(resumed[1].get("saver"), dict)
            ):
                self.saver.repeat(resumed[0], resumed[1]["saver"])
        compute: Any = self.model
        if args.torchcompile:
            try:
                compute = torch.compile(self.model, backend=args.torchcompile)
            except (RuntimeError, ImportError) as e:
                raise UserError(f"--torchcompile {args.torchcompile!r}: {str(e).splitlines()[0]}") from None
        self.eval_model = compute
        self.compute = self._distributed(compute) if self.world.distributed else compute
        if not resumed:
            self.save_recovery()  # so that a run that stops in its first epoch can go on
        if self.primary:
            options = {k: v for k, v in vars(args).items() if k not in ("config", "debug", "resume")}
            options["lr_scale"] = [f"{pattern}={scale}" for pattern, scale in args.lr_scale]
            write_options(folder, {**options, "classes": self.classes, "skipped": self.skipped})
            self.write_log(picture=True)

    def _distributed(self, model: Any) -> nn.Module:
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Stopped: After a signal, with a checkpoint saved.
            Failure: When the loss is not finite.
        """
        reduce = self.args.dist_bn == "reduce"
        while self.epoch < self.epochs:
            self.choose_phase()
            began = time.monotonic()
            used = self.sums[2]
            self.train_epoch()
            trained = time.monotonic()
            sums = self.sums
            if self.world.distributed:
                sums = reduce_tensor(torch.tensor(sums, device=self.device, dtype=torch.float64), 1).tolist()
                for m in (self.model, self.ema) if self.args.dist_bn else ():
                    if m is not None:
                        distribute_bn(m, self.world.world_size, reduce)
            model = self.ema.module if self.ema else self.eval_model
            measured = evaluate(
                model,
                self.held_out,
                self.device,
                self.autocast,
                self.args.channels_last,
                self.world.world_size,
                on_batch=lambda *_: self.stop_if_asked(agreed=not self.world.distributed),
            )
            row = {"epoch": self.epoch, "train_loss": sums[0] / sums[2]}
            if not self.mixed:
                row["train_top1"] = sums[1] / sums[2]
            row.update({f"eval_{k}": v for k, v in measured.items()}, lr=self.base_lr())
            self.history.append(row)
            self.epoch, self.batch, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
            self.all_sums = []
            if self.saver:
                best = self.saver.best_epoch
                self.saver.save_checkpoint(self.epoch - 1, metric=measured[self.args.eval_metric])
                self.saver.drop_recovery()
                speed = (sums[2] - used * self.world.world_size) / max(trained - began, 1e-9)
                self.report_epoch(row, speed, improved=self.saver.best_epoch != best)
            self.scheduler.step(self.epoch)
            self.stop_if_asked()

    def train_epoch(self) -> None:
        """Train on the rest of the epoch in progress.

        Raises:
            Stopped: After a signal, with a checkpoint saved.
            Failure: When the loss is not finite.
        """
        args, steps = self.args, len(self.loader)
        last_group = steps % args.grad_accum_steps or args.grad_accum_steps
        second_order = getattr(self.optimizer, "is_second_order", False)
        self.loader.mixup_enabled = not args.mixup_off_epoch or self.epoch < args.mixup_off_epoch
        self.model.train()
        self.compute.train()
        if args.tune == "linear":
            self.model.eval()
        matching = args.tune == "tcpa"
        if matching:
            self.model.random_match = self.epoch < args.random_epochs  # type: ignore[assignment]
        self.optimizer.zero_grad()
        if self.batch == steps:
            return  # stopped while the held-out images were measured
        bar = progress(disable=not (self.primary and console(stderr=True).is_terminal))
        with bar:
            task = bar.add_task(f"epoch {self.epoch + 1}/{self.epochs}", total=steps, completed=self.batch)
            for k, (images, target) in enumerate(
                seeded_batches(self.loader, args.seed, self.world.global_rank, self.epoch)
            ):
                if k < self.batch:
                    continue
                group = last_group if k >= steps - last_group else args.grad_accum_steps
                update = k + 1 == steps or (k + 1) % args.grad_accum_steps == 0
                if args.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                wait = self.world.distributed and not update
                with self.compute.no_sync() if wait else contextlib.nullcontext():
                    with self.autocast():
                        logits, aux = split_logits(self.compute(images))
                        loss = self.criterion(logits, target)
                        if aux is not None:
                            loss = loss + AUX_WEIGHT * self.criterion(aux, target)
                        if matching and self.model.match_loss is not None:
                            loss = loss + args.match_weight * self.model.match_loss  # type: ignore[operator]
                    value = loss.item()
                    check_loss(
                        value,
                        f"in epoch {self.epoch + 1}, batch {k + 1} of {steps}, at learning rate {self.base_lr():.3g}",
                        "lower --lr, add --clip-grad or raise --warmup-epochs",
                    )
                    self.backward(loss / group, update, create_graph=second_order)
                n = len(target)
                self.sums[0] += value * n
                if not self.mixed:
                    self.sums[1] += 100 * (logits.argmax(1) == target).sum().item()
                self.sums[2] += n
                bar.update(task, completed=k + 1, description=f"epoch {self.epoch + 1}/{self.epochs} loss {value:.3f}")
                if not update:
                    continue
                self.batch = k + 1
                done = k // args.grad_accum_steps + 1
                total = self.epoch * self.updates_per_epoch + done
                self.optimizer.zero_grad()
                if self.ema:
                    self.ema.update(self.model, step=total)
                self.scheduler.step_update(total)
                if self.primary and done % args.log_interval == 0 and not console(stderr=True).is_terminal:
                    mean = self.sums[0] / self.sums[2]
                    print(f"epoch {self.epoch + 1} batch {k + 1}/{steps} loss {mean:.4f}", file=sys.stderr)
                self.stop_if_asked(agreed=not self.world.distributed or done % args.log_interval == 0)
                if args.recovery_interval and done % args.recovery_interval == 0 and k + 1 < steps:
                    self.save_recovery()

    def backward(self, loss: torch.Tensor, update: bool, create_graph: bool) -> None:
        """Accumulate gradients and, at an update, clip them and step."""
        args = self.args
        parameters = model_parameters(self.model, exclude_head=args.clip_mode == "agc")
        if self.scaler:
            self.scaler(
                loss, self.optimizer, args.clip_grad, args.clip_mode, parameters, create_graph, need_update=update
            )
            return
        loss.backward(create_graph=create_graph)
        if update:
            if args.clip_grad is not None:
                dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
            self.optimizer.step()

    def stop_if_asked(self, agreed: bool = True) -> None:
        """Save and raise after a signal.

        Args:
            agreed: False where processes cannot stop together; they do at the next log interval or epoch.

        Raises:
            Stopped: If any process got a signal.
        """
        if not agreed:
            return
        asked = self.stop[0] if self.stop else 0
        if self.world.distributed:
            flag = torch.tensor(asked, device=self.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = int(flag)
        if asked:
            self.stop[:] = [asked]
            path = self.save_recovery() if self.batch else self.folder / "last.pth.tar"
            self.write_log(picture=True)
            raise Stopped(
                f"stopped in epoch {self.epoch + 1} of {self.epochs} after {self.batch} of {len(self.loader)} batches; "
                f"saved {path}; continue with the same command and --resume"
            )

    def base_lr(self) -> float:
        """Learning rate of the groups that ``--lr-scale`` and layer decay leave alone."""
        return max(g["lr"] / s if s else 0.0 for g, s in zip(self.optimizer.param_groups, self.lr_scales, strict=True))

    def report_epoch(self, row: dict[str, float], speed: float, improved: bool) -> None:
        """Print one line and rewrite the log."""
        if not self.reported:
            print("  epoch  train loss  held-out loss   top-1 %        lr  images/s  elapsed")
            self.reported = True
        elapsed = datetime.timedelta(seconds=int(self.elapsed + time.monotonic() - self.started))
        print(
            f"{int(row['epoch']) + 1:3d}/{self.epochs:<3d}  {row['train_loss']:10.4f}  {row['eval_loss']:13.4f}  "
            f"{row['eval_top1']:8.2f}{'*' if improved else ' '}  {row['lr']:8.2e}  {speed:8.0f}  {elapsed}",
            flush=True,
        )
        self.write_log(picture=time.monotonic() - self.drawn > 10 or self.epoch == self.epochs)

    def write_log(self, picture: bool) -> None:
        """Write summary.csv and, at most every ten seconds, curves.png."""
        if not self.saver or not self.history:
            return
        write_summary(self.folder, self.history)
        if picture:
            size = "x".join(map(str, self.data_config["input_size"]))
            title = f"{self.args.model} on {Path(self.args.data).name}, {size}"
            how = ["as is" if self.args.no_aug else "augmented"]
            how += ["mixed"] * self.mixed + [f"smoothing {self.args.smoothing:g}"] * bool(self.args.smoothing)
            draw_curves(self.history, self.folder / "curves.png", title, ", ".join(how))
            self.drawn = time.monotonic()

    def summary(self) -> str:
        """The last words: best result, where it is and how to load it."""
        assert self.saver is not None
        name, unit = {"top1": ("top-1", " %"), "top5": ("top-5", " %"), "loss": ("loss", "")}[self.args.eval_metric]
        best = self.folder / "model_best.pth.tar"
        keywords = {**self.load_kwargs, "checkpoint_path": str(best)}
        create = functools.partial(_call, "timm.create_model", repr(self.args.model))
        if self.args.tune in PROMPTS and not self.args.model.endswith("_tcpa"):
            function, settings = PROMPTS[self.args.tune]
            load = (
                f"import timm; from vizoo.backbones.layers import {function.__name__}; "
                f"model = {_call(function.__name__, create(**self.load_kwargs), **settings, **self.args.tune_kwargs)}; "
                f"model.load_state_dict(timm.models.load_state_dict({str(best)!r}))"
            )
        else:
            load = f"import timm, vizoo; model = {create(**keywords)}"
        result = f"best {name} {self.saver.best_metric:.{2 if unit else 4}f}{unit}"
        count, epoch = len(self.held_out.dataset), (self.saver.best_epoch or 0) + 1
        left_out = skipped_text(self.skipped["val"])
        return (
            f"{result} on {count:,} held-out images{left_out}, epoch {epoch} of {self.epochs}: {best}\n"
            f"learning curves: {self.folder / 'curves.png'}\n"
            f"load it: {load}"
        )


AUX_WEIGHT = 0.4  # of the second classifier of OverLoCK, in its official training


def split_logits(out: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits of a model in training, and those of its auxiliary classifier if it has one.

    Args:
        out: Logits ``[B, classes]``, or a dictionary of ``main`` and ``aux``.

    Returns:
        Both.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(out, torch.Tensor):
        return out, None
    if isinstance(out, dict) and out.keys() == {"main", "aux"}:
        return out["main"], out["aux"]
    raise TypeError(f"its output in training is a {type(out).__name__}; need logits, or a dictionary of main and aux")


def _call(function: str, *args: str, **kwargs: Any) -> str:
    """A function call as Python writes it."""
    return f"{function}({', '.join([*args, *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def parameter_groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Timm's parameter groups, split where ``--lr-scale`` matches; timm's schedulers honour ``lr_scale``.

    Args:
        model: The model.
        args: ``weight_decay``, ``layer_decay``, ``layer_decay_min_scale`` and ``lr_scale``.

    Returns:
        Groups for an optimizer.

    Raises:
        UserError: If a pattern matches no parameter.
    """
    keep: set[str] = getattr(model, "no_weight_decay", set)()
    if args.layer_decay is None:
        groups = timm.optim.param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=keep)
    else:
        groups = timm.optim.param_groups_layer_decay(
            model,
            args.weight_decay,
            no_weight_decay_list=keep,
            layer_decay=args.layer_decay,
            min_scale=args.layer_decay_min_scale,
        )
    names = {id(p): n for n, p in model.named_parameters()}
    for pattern, _ in args.lr_scale:
        if not fnmatch.filter(names.values(), pattern):
            some = ", ".join(list(names.values())[:3])
            raise UserError(f"--lr-scale: no parameter of {args.model!r} matches {pattern!r}; some are {some}")
    split: dict[tuple[int, float], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            scale = 1.0
            for pattern, factor in args.lr_scale:
                if fnmatch.fnmatchcase(names[id(p)], pattern):
                    scale = factor
            whole = {**group, "lr_scale": group.get("lr_scale", 1.0) * scale, "params": []}
            split.setdefault((i, scale), whole)["params"].append(p)
    return list(split.values())


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


def _train(argv: list[str]) -> int:
    task = asked_task(argv)
    if task == "scanpath":
        return train_scanpaths(argv)
    if task in ("detection", "segmentation"):
        from vizoo.tools.training.dense import train_dense

        return train_dense(task, argv)
    args = parse_options(argv)
    names = resolve_models([args.model])
    if len(names) != 1:
        raise UserError(f"--model {args.model!r} matches {len(names)} models; name one")
    args.model = names[0]
    compute_device(args.device)
    world = SimpleNamespace(**init_distributed_device_so(args.device))
    try:
        mode = "L" if args.in_chans == 1 else "RGB"
        if args.data == "digits":
            splits = digits_splits(mode)
        else:
            check = args.check_images if world.global_rank == 0 else "none"
            splits = folder_splits(
                args.data, args.train_split, args.val_split, mode, check, args.window, args.skip_unreadable
            )
        return _run(args, world, splits)
    finally:
        if world.distributed:
            torch.distributed.destroy_process_group()


def _run(args: argparse.Namespace, world: SimpleNamespace, splits: Splits) -> int:
    trainer = Trainer(args, world, splits)
    with contextlib.ExitStack() as stack:
        chosen: list[Any] = [None]
        try:
            if trainer.primary:
                label = f"{args.model}-{trainer.data_config['input_size'][-1]}"
                chosen = [stack.enter_context(open_run(args, label))]
        finally:
            if world.distributed:
                torch.distributed.broadcast_object_list(chosen)
        if chosen[0] is None:
            return 2  # the first process says why
        folder, checkpoint = chosen[0]
        trainer.prepare(folder, (checkpoint, load_training_checkpoint(checkpoint)) if checkpoint else None)
        return _fit(trainer, splits)


def _fit(trainer: Trainer, splits: Splits) -> int:
    args, world, size = trainer.args, trainer.world, trainer.data_config["input_size"]
    if trainer.primary:
        millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        processes = f" x {world.world_size} processes" if world.distributed else ""
        print(
            f"{args.model}: {millions:.2f} M parameters, input {'x'.join(map(str, size))}, {world.device}{processes}\n"
            f"{args.data}: {len(trainer.classes)} classes, {len(splits.train):,} training and {len(splits.held_out):,} "
            f"held-out images\noutput: {trainer.folder}"
        )
        if trainer.epoch >= trainer.epochs:
            print(f"all {trainer.epochs} epochs are done already; raise --epochs to train on")
    try:
        with _signals(trainer.stop):
            trainer.fit()
    except Stopped as e:
        if trainer.primary:
            print(f"vizoo train: {e}", file=sys.stderr)
        return 128 + trainer.stop[0]
    if trainer.primary:
        print(trainer.summary())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train a classifier.

    Args:
        argv: Arguments; None means ``sys.argv[1:]``.

    Returns:
        Exit status: 0 done, 1 the loss diverged, 2 bad input, 130 after Ctrl-C and 143 after SIGTERM.
    """
    return run_tool(_train, argv, "train")


if __name__ == "__main__":
    raise SystemExit(main())
