"""``vizoo profile``: what any timm model costs: parameters, multiply-accumulates, activations, memory, time."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vizoo.tools.common import (
    Failure,
    Results,
    Table,
    UserError,
    check_file,
    check_output,
    check_result,
    imports,
    one_line,
    progress,
    refuse_failures,
    resolve_device,
    resolve_models,
    run_tool,
    short,
)
from vizoo.tools.options import MODES, Parser, add, add_result, number, read_size
from vizoo.tools.training.options import check_choice

if TYPE_CHECKING:
    from vizoo.backbones.ops.cost import Cost, register_cost
    from vizoo.tools.profiling.profile import compare, count, profile
    from vizoo.tools.profiling.result import Profile
    from vizoo.tools.profiling.timing import measure

__all__ = ["Cost", "Profile", "compare", "count", "measure", "profile", "register_cost"]
_HOMES = {  # of the Python interface, which is imported when it is asked for
    "Cost": "vizoo.backbones.ops.cost",
    "Profile": "vizoo.tools.profiling.result",
    "compare": "vizoo.tools.profiling.profile",
    "count": "vizoo.tools.profiling.profile",
    "measure": "vizoo.tools.profiling.timing",
    "profile": "vizoo.tools.profiling.profile",
    "register_cost": "vizoo.backbones.ops.cost",
}

EXAMPLES = """\
examples:
  vizoo profile litv2_s                                    exact counts; needs no device and no weights
  vizoo profile litv2_s resnet50 --device cpu              everything, measured on this machine
  vizoo profile 'litv2_*' --mode count --size 800 1280     every match, at another size (height width)
  vizoo profile litv2_s --mode count --depth 2 --top 10    where the cost sits
  vizoo profile litv2_s --device cuda --dtype bf16 --compile --batch 128
  vizoo profile litv2_s resnet50 --device cpu --threads 1 2 --out speed.csv
  vizoo profile litv2_s --device cpu --mode throughput --batch 1 8 --dtype fp32 bf16
  vizoo profile litv2_s litv2_m swin_tiny_patch4_window7_224 --device cpu --mode latency --plot cost.png
  vizoo profile litv2_s --strict --check                   fail on a partial count; compare two engines"""

SORTED = ("", "macs", "params", "acts", "other")  # of --sort; the model's order without


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo profile", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument("models", nargs="+", metavar="MODEL", help="timm names or globs, vizoo's included")
    p.add_argument("--mode", nargs="+", choices=[*MODES, "all"], help="what to do (count; all when --device is given)")
    add(p, "--size", "the model's; height and width where they differ")
    add(p, "--batch", "latency 1; throughput 8 on a CPU, 64 on a GPU")
    add(p, "--device", "or meta")
    add(p, "--threads", "physical cores")
    add(p, "--dtype", "of weights and input; fp32", default=["fp32"])
    add(p, "--amp", "float32 weights under autocast to --dtype")
    add(p, "--channels-last")
    add(p, "--compile")
    p.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fused attention and kernels (default), or plain PyTorch",
    )
    add(p, "--reparam")
    p.add_argument("--features", action="store_true", help="the backbone as features_only")
    add(p, "--in-chans", "the model's")
    add(p, "--num-classes", "the model's; 0 for no head")
    add(p, "--model-kwargs")
    add(p, "--checkpoint", "as timm's checkpoint_path")
    p.add_argument("--depth", type=number(int, 0), metavar="N", help="also list modules down to this depth")
    p.add_argument("--by", choices=["module", "op"], help="list modules (depth 1) or operators")
    add(p, "--sort", f"of modules: {', '.join(SORTED[1:])}", default="")
    p.add_argument("--top", type=number(int, 0), default=0, metavar="N", help="most rows of that list")
    p.add_argument("--fvcore", action="store_true", help="also fvcore's total, with its norms and pooling")
    add(p, "--check", "both counting engines, and batches")
    p.add_argument("--strict", action="store_true", help="exit status 1 when a count is partial")
    p.add_argument("--min-time", type=number(float, 0), default=2.0, metavar="S", help="least seconds of sampling (2)")
    p.add_argument("--max-time", type=number(float, 0), default=10.0, metavar="S", help="most seconds of sampling (10)")
    add_result(p, ".json, .csv, to which rows are added, or .md")
    add(p, "--plot", "speed or size over GMACs: .png, .pdf or .svg")
    p.add_argument(
        "--import", dest="packages", nargs="+", default=[], metavar="PACKAGE", help="packages that register models"
    )
    return p


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of :func:`vizoo.tools.profiling.profile.profile` that all cases share."""
    names = ("size", "mode", "amp", "channels_last", "fused", "reparam", "features", "fvcore", "check")
    given = {key: getattr(args, key) for key in ("in_chans", "num_classes") if getattr(args, key) is not None}
    if args.checkpoint:
        given["checkpoint_path"] = args.checkpoint
    return {
        **{name: getattr(args, name) for name in (*names, "min_time", "max_time")},
        "device": args.device or "cpu",
        "compile": args.compile or False,
        "model_kwargs": {**args.model_kwargs, **given},
    }


def _check(args: argparse.Namespace) -> list[str]:
    """Refuse bad input before anything runs; names and modes become those that are meant.

    Returns:
        The modes in which models are run.
    """
    from vizoo.tools.profiling.profile import check_conditions
    from vizoo.tools.profiling.result import COLUMNS

    check_result(args.out, COLUMNS)
    check_choice("--sort", args.sort, SORTED)
    check_output(args.plot, "--plot", ".png", ".pdf", ".svg")
    if args.checkpoint is not None:
        check_file(args.checkpoint, "--checkpoint")
    if args.size is not None:
        read_size(args.size)
    _import(args.packages)
    resolve_device(args.device or "cpu")
    args.models = resolve_models(args.models)
    args.mode = args.mode or (["all"] if args.device not in (None, "meta") else ["count"])
    timed: list[str] = []
    for case in _cases(args):
        _, timed = check_conditions(dtype=case.dtype, batch=case.batch, **_options(args))
    return timed


def _import(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except (Exception, SystemExit) as e:  # whatever a package does when it is imported
            raise UserError(f"--import {short(package)}: cannot be imported: {one_line(e)}") from e


class _Case(NamedTuple):
    """What is one row of the table."""

    name: str
    dtype: str
    batch: int | None


def _cases(args: argparse.Namespace) -> list[_Case]:
    return [_Case(*one) for one in itertools.product(args.models, args.dtype, args.batch or [None])]


def _one(case: _Case, args: argparse.Namespace, step: Callable[[str], None] | None = None) -> Profile:
    """Profile one model under one set of conditions; a process of its own first imports what registers models."""
    from vizoo.tools.profiling.profile import attempt

    _import(args.packages)
    return attempt(case.name, dtype=case.dtype, batch=case.batch, step=step, **_options(args))


def _dead(case: _Case, args: argparse.Namespace, threads: int, why: Failure) -> Profile:
    """The result of a case whose process died."""

    def refuse(step: str) -> None:
        raise why

    found = _one(case, args, refuse)
    found.config["threads"] = threads
    return found


def _profile_all(args: argparse.Namespace, results: Results) -> None:
    """Profile every model with every dtype, batch and number of threads, and give each result as it is known."""
    from vizoo.tools.profiling.machine import default_threads, run_cases

    cases, threads = _cases(args), args.threads or [default_threads()]
    with progress() as bar:
        task = bar.add_task("starting", total=len(cases) * len(threads))

        def tell(text: str) -> None:
            bar.update(task, description=f"{cases[len(results.found)].name}: {text}")

        here = [tell] if len(threads) == 1 else []  # a process of its own cannot call back
        for case, n, found in run_cases(threads, cases, _one, args, *here):
            results.add(_dead(case, args, n, found) if isinstance(found, Failure) else found, bar)
            bar.advance(task)


def _details(args: argparse.Namespace, profiles: Sequence[Profile]) -> list[Table]:
    """Where the cost of each model sits, if that is asked for."""
    from vizoo.tools.profiling.picture import modules_table, operators_table

    if not args.by and args.depth is None:
        return []
    models = {p.model: p for p in profiles}.values()  # a count does not depend on the conditions
    if args.by == "op":
        return [operators_table(p, args.top) for p in models]
    return [modules_table(p, 1 if args.depth is None else args.depth, args.sort, args.top) for p in models]


def _differs(p: Profile) -> bool:
    """Whether ``--check`` found something, or could not look."""
    return any(note.startswith(("engines differ", "not linear", "the batch cannot")) for note in p.notes)


def _profile(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with imports():
        from vizoo.tools.profiling.picture import plot, print_notes
        from vizoo.tools.profiling.result import Profile, headers, table, to_record

    timed = _check(args)
    several = [key for key in ("dtype", "batch") if len(getattr(args, key) or ()) > 1]
    heads = headers(timed, args.fvcore, not (args.device or "").startswith("cuda"), several)
    shown, filed = (functools.partial(table, heads=heads, noted=noted) for noted in (False, True))
    with Results(args, args.models, shown, to_record, Profile.to_dict, filed) as results:
        _profile_all(args, results)
        profiles: list[Profile] = results.found
        results.end(*_details(args, [p for p in profiles if p.counts]))
    whole = [p for p in profiles if not p.failure]
    print_notes(whole)
    agreed = dict.fromkeys(p.model for p in whole if args.check and not _differs(p))
    if agreed and not args.json:
        print(f"both engines agree, and the cost is linear in the batch: {', '.join(agreed)}")
    if args.plot and whole:
        plot(whole, Path(args.plot))
    refuse_failures([p.failure for p in profiles if p.failure], len(profiles), all(p.bad_input for p in profiles))
    partial = [f"{p.model}: {p.reasons[0]}" for p in profiles if p.reasons]
    if args.strict and partial:
        raise Failure(f"--strict: partial counts: {'; '.join(dict.fromkeys(partial))}")
    return int(args.check and any(map(_differs, profiles)))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile models; returns the exit status."""
    return run_tool(_profile, argv, "profile")


if __name__ == "__main__":
    raise SystemExit(main())
