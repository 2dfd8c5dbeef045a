"""Optimizer, learning rate and precision of a run, by the options that every task has."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable
from typing import Any

import timm.optim
import timm.scheduler
import torch
from timm.utils import NativeScaler
from torch import nn

from vizoo.tools.common import UserError, one_line


def precision(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], Any], Any]:
    """What ``--amp`` asks for.

    Args:
        args: Options.
        device: Where it is computed.

    Returns:
        What makes the context of a pass, and the scaler of gradients or None.
    """
    if not args.amp:
        return contextlib.nullcontext, None
    dtype = getattr(torch, args.amp_dtype)
    scaler = NativeScaler(device=device.type) if dtype == torch.float16 else None
    return functools.partial(torch.autocast, device_type=device.type, dtype=dtype), scaler


def build_optimizer(model: nn.Module, args: argparse.Namespace, processes: int) -> torch.optim.Optimizer:
    """Any optimizer of timm, by the options that every task has.

    Args:
        model: What is trained.
        args: Options.
        processes: Their number, which scales ``--lr-base``.

    Returns:
        The optimizer.

    Raises:
        UserError: For an unknown one, or arguments it does not take.
    """
    lr = args.lr
    if lr is None:
        ratio = args.batch_size * processes * args.grad_accum_steps / args.lr_base_size
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
        return timm.optim.create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            momentum=args.momentum,
            param_group_fn=functools.partial(parameter_groups, args=args),
            **{k: v for k, v in extra.items() if v is not None},
        )
    except UserError:
        raise
    except (TypeError, ValueError, IndexError, AssertionError, ImportError) as e:
        raise UserError(f"--opt {args.opt!r}: {one_line(e)}") from None


def build_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates_per_epoch: int
) -> tuple[Any, int]:
    """Any learning-rate schedule of timm, by the options that every task has.

    Args:
        optimizer: Whose rates it sets.
        args: Options; ``warmup_updates`` in place of ``warmup_epochs`` where a task has it.
        updates_per_epoch: Steps of the optimizer.

    Returns:
        The schedule and the number of epochs, warm-up and cool-down included.

    Raises:
        UserError: If the options do not go together.
    """
    if args.decay_rate > 1 and args.sched != "poly":
        need = "must be a number between 0 and 1, but as power of --sched poly"
        raise UserError(f"argument --decay-rate: got {args.decay_rate:g}, {need}")
    keywords = timm.scheduler.scheduler_kwargs(args)
    if getattr(args, "warmup_updates", None) is not None:
        keywords |= _counted_in_updates(args, updates_per_epoch)
        updates_per_epoch = 1
    try:
        scheduler, epochs = timm.scheduler.create_scheduler_v2(
            optimizer, **keywords, updates_per_epoch=updates_per_epoch
        )
    except (AssertionError, ValueError) as e:
        raise UserError(f"--sched {args.sched} with --epochs {args.epochs}: {e}") from None
    return scheduler, epochs if updates_per_epoch > 1 or "warmup_epochs" in args else args.epochs


def _counted_in_updates(args: argparse.Namespace, updates_per_epoch: int) -> dict[str, Any]:
    """Keywords of timm for ``--warmup-updates``: at most a tenth of the run, before the schedule."""
    total = args.epochs * updates_per_epoch
    warmup = min(args.warmup_updates, total // 10)
    return {
        "num_epochs": total - warmup,
        "warmup_epochs": warmup,
        "warmup_prefix": True,
        "warmup_lr": args.lr * 1e-3,
        "decay_epochs": args.decay_epochs * updates_per_epoch,
        "decay_milestones": [epoch * updates_per_epoch for epoch in args.decay_milestones],
        "step_on_epochs": False,
    }


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
