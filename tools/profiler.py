"""``vizoo profile``: what any timm model costs: parameters, multiply-accumulates, activations, memory, time."""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vizoo.tools.common import (
    Failure,
    Table,
    UserError,
    build_model,
    check_file,
    check_output,
    check_result,
    imports,
    one_line,
    print_json,
    print_tables,
    progress,
    resolve_device,
    resolve_models,
    run_tool,
    short,
    write_result,
)
from vizoo.tools.options import MODES, Parser, add, add_result, number, read_size
from vizoo.tools.training.options import check_choice

if TYPE_CHECKING:
    from vizoo.backbones.ops.cost import Cost, register_cost
    from vizoo.tools.profiling.counting import count
    from vizoo.tools.profiling.profile import profile
    from vizoo.tools.profiling.result import Profile
    from vizoo.tools.profiling.timing import compare, measure

__all__ = ["Cost", "Profile", "compare", "count", "measure", "profile", "register_cost"]
_HOMES = {  # of the Python interface, which is imported when it is asked for
    "Cost": "vizoo.backbones.ops.cost",
    "Profile": "vizoo.tools.profiling.result",
    "compare": "vizoo.tools.profiling.timing",
    "count": "vizoo.tools.profiling.counting",
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


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(args, key) for key in ("in_chans", "num_classes") if getattr(args, key) is not None}
    if args.checkpoint:
        given["checkpoint_path"] = args.checkpoint
    if args.features:
        given["features_only"] = True
    return {**args.model_kwargs, **given}


def _check(args: argparse.Namespace) -> None:
    """Refuse bad input before anything runs; names and modes become those that are meant."""
    from vizoo.tools.profiling.result import COLUMNS

    check_result(args.out, COLUMNS)
    check_choice("--sort", args.sort, SORTED)
    check_output(args.plot, "--plot", ".png", ".pdf", ".svg")
    if args.checkpoint is not None:
        check_file(args.checkpoint, "--checkpoint")
    if args.size is not None:
        read_size(args.size)
    if args.max_time < args.min_time:
        raise UserError(f"--min-time {args.min_time:g} --max-time {args.max_time:g}: need 0 <= min <= max seconds")
    _import(args.packages)
    resolve_device(args.device or "cpu")
    args.models = resolve_models(args.models)
    args.mode = args.mode or (["all"] if args.device not in (None, "meta") else ["count"])


def _import(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except (Exception, SystemExit) as e:  # whatever a package does when it is imported
            raise UserError(f"--import {short(package)}: cannot be imported: {one_line(e)}") from e


def _one(args: argparse.Namespace, name: str, dtype: str, batch: int | None, tell: Any) -> Profile:
    from vizoo.tools.profiling.profile import profile
    from vizoo.tools.profiling.timing import fused

    kwargs = _model_kwargs(args)
    model: Any = name
    with fused(args.fused):
        if args.reparam:
            from timm.utils.model import reparameterize_model

            model = reparameterize_model(build_model(name, **kwargs).eval())
        result = profile(
            model,
            size=args.size,
            mode=args.mode,
            device=args.device or "cpu",
            dtype=dtype,
            amp=args.amp,
            channels_last=args.channels_last,
            compile=args.compile or False,
            batch=batch,
            fvcore=args.fvcore,
            check=args.check,
            min_time=args.min_time,
            max_time=args.max_time,
            model_kwargs=kwargs,
            step=tell,
        )
    result.model = name
    result.config.update(fused=args.fused, reparam=args.reparam, features=args.features)
    return result


def _profile_all(args: argparse.Namespace) -> list[Profile]:
    """Profile every model with every dtype and batch."""
    _import(args.packages)
    cases = list(itertools.product(args.models, args.dtype, args.batch or [None]))
    profiles = []
    with progress() as bar:
        task = bar.add_task("starting", total=len(cases))
        for name, dtype, batch in cases:

            def tell(text: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {text}")

            profiles.append(_one(args, name, dtype, batch, tell))
            bar.advance(task)
    return profiles


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
    """Whether ``--check`` found something."""
    return any(note.startswith(("engines differ", "not linear")) for note in p.notes)


def _profile(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with imports():
        from vizoo.tools.profiling.machine import default_threads, with_threads
        from vizoo.tools.profiling.picture import plot, print_notes
        from vizoo.tools.profiling.result import table, to_record

    _check(args)
    profiles = with_threads(args.threads or [default_threads()], _profile_all, args)
    result, details = [p.to_dict() for p in profiles], _details(args, profiles)
    if args.json:
        print_json(result)
    else:
        print_tables(table(profiles), *details)
    print_notes(profiles)
    agreed = dict.fromkeys(p.model for p in profiles if args.check and not _differs(p))
    if agreed and not args.json:
        print(f"both engines agree, and the cost is linear in the batch: {', '.join(agreed)}")
    write_result(args.out, result, [table(profiles, noted=True), *details], to_record(profiles))
    if args.plot:
        plot(profiles, Path(args.plot))
    partial = [f"{p.model}: {p.reasons[0]}" for p in profiles if p.reasons]
    if args.strict and partial:
        raise Failure(f"--strict: partial counts: {'; '.join(dict.fromkeys(partial))}")
    return int(args.check and any(map(_differs, profiles)))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile models; returns the exit status."""
    return run_tool(_profile, argv, "profile")


if __name__ == "__main__":
    raise SystemExit(main())
