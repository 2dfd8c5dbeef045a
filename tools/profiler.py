"""``vizoo profile``: what any timm model costs: parameters, multiply-accumulates, activations, memory, time."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import operator
import shlex
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
    read_spec,
    refuse_failures,
    resolve_device,
    resolve_models,
    run_tool,
    short,
)
from vizoo.tools.options import (
    MEASURES,
    Joined,
    Parser,
    add,
    add_alias,
    add_result,
    choice,
    listed,
    literal,
    number,
    read_sizes,
)
from vizoo.tools.training.options import check_choice

if TYPE_CHECKING:
    from vizoo.backbones.ops.cost import Cost, register_cost
    from vizoo.tools.profiling.profile import compare, count, profile
    from vizoo.tools.profiling.record import Record, read_records
    from vizoo.tools.profiling.timing import measure

__all__ = ["Cost", "Record", "compare", "count", "measure", "profile", "read_records", "register_cost"]
_HOMES = {  # of the Python interface, which is imported when it is asked for
    "Cost": "vizoo.backbones.ops.cost",
    "Record": "vizoo.tools.profiling.record",
    "compare": "vizoo.tools.profiling.profile",
    "count": "vizoo.tools.profiling.profile",
    "measure": "vizoo.tools.profiling.timing",
    "profile": "vizoo.tools.profiling.profile",
    "read_records": "vizoo.tools.profiling.record",
    "register_cost": "vizoo.backbones.ops.cost",
}

EXAMPLES = """\
examples:
  vizoo profile litv2_s                                    exact counts; needs no device and no weights
  vizoo profile litv2_s resnet50 --device cpu              count, latency, throughput and memory on this machine
  vizoo profile 'litv2_*' --size 224,800x1280              every match, at two sizes (height x width)
  vizoo profile torchvision:maskrcnn_resnet50_fpn@800x1280 --strict
  vizoo profile net.py:build --input 2x3x224x224           what a function of yours builds
  vizoo profile litv2_s --depth 2 --top 10                 where the cost sits
  vizoo profile litv2_s --device cpu --measure modules --depth 2 --sort time
  vizoo profile litv2_s --device cpu --measure train,roofline,energy
  vizoo profile litv2_s --device cpu --measure throughput --batch 1,2,4,8,16 --dtype fp32,bf16
  vizoo profile litv2_s --device cuda --dtype bf16 --compile no,max-autotune --graph no,yes --batch 128
  vizoo profile litv2_s resnet50 --device cpu --threads 1,2 --save speed.jsonl
  vizoo profile litv2_s --strict --check                   fail on a partial count; compare two engines"""

SORTED = ("", "macs", "params", "acts", "other", "time")  # of --sort; the model's order without
BASIC = ("count", "latency", "throughput", "memory")  # of --device without --measure


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo profile", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="names of timm, vizoo's included, globs, hf-hub:, local-dir:, torchvision:NAME, package.module:function, "
        "file.py:function, mm:config.py, .pt2, TorchScript or .onnx; @HEIGHTxWIDTH behind one is its size",
    )
    p.add_argument(
        "--measure",
        type=listed(choice(*MEASURES, "all")),
        nargs="+",
        action=Joined,
        metavar="WHAT",
        help=f"{', '.join(MEASURES)}, or all (count; with --device {', '.join(BASIC)})",
    )
    add_alias(p, "--mode", "measure")
    add(p, "--size", "the model's; 800 1280 or 800x1280 is height and width, 224,384 are two sizes")
    add(p, "--input")
    add(p, "--batch", "1; throughput 8 on a CPU, 64 on a GPU")
    add(p, "--device", "or meta")
    add(p, "--threads", "physical cores")
    add(p, "--dtype", "of weights and input; fp32", default=["fp32"])
    add(p, "--amp", "float32 weights under autocast to --dtype")
    add(p, "--compile", default=[None])
    add(p, "--graph", default=[False])
    add(p, "--channels-last")
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
    add(p, "--weights")
    add_alias(p, "--checkpoint", "weights")
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
    p.add_argument("--save", metavar="FILE", help="add records to it, .jsonl, with modules down to --depth")
    add(p, "--plot", "speed or size over GMACs: .png, .pdf or .svg")
    p.add_argument(
        "--import", dest="packages", nargs="+", default=[], metavar="PACKAGE", help="packages that register models"
    )
    return p


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of :func:`vizoo.tools.profiling.profile.profile` that all cases share."""
    names = ("measure", "amp", "channels_last", "fused", "reparam", "features", "fvcore", "check", "weights")
    given = {key: getattr(args, key) for key in ("in_chans", "num_classes") if getattr(args, key) is not None}
    return {
        **{name: getattr(args, name) for name in (*names, "min_time", "max_time")},
        "inputs": args.input,
        "device": args.device or "cpu",
        "model_kwargs": {**args.model_kwargs, **given},
    }


def _check(args: argparse.Namespace) -> list[str]:
    """Refuse bad input before anything runs; names, sizes and measures become those that are meant.

    Returns:
        What is measured.
    """
    from vizoo.tools.profiling.profile import check_conditions
    from vizoo.tools.profiling.record import COLUMNS, read_records

    check_result(args.out, COLUMNS)
    check_output(args.save, "--save", ".jsonl")
    check_choice("--sort", args.sort, SORTED)
    check_output(args.plot, "--plot", ".png", ".pdf", ".svg")
    if args.weights is not None:
        check_file(args.weights, "--weights")
    args.size = [None] if args.size is None else read_sizes(args.size)
    _import(args.packages)
    resolve_device(args.device or "cpu")
    args.measure = args.measure or (list(BASIC) if args.device not in (None, "meta") else ["count"])
    timed: list[str] = []
    for dtype, batch, compile, graph in itertools.product(args.dtype, args.batch or [None], args.compile, args.graph):
        how = {"dtype": dtype, "batch": batch, "compile": compile, "graph": graph}
        _, timed = check_conditions(**how, **_options(args))
    if kept := [name for name in args.models if name.endswith(".jsonl")]:
        raise UserError(f"model {short(kept[0])}: records are read by 'vizoo report' and 'vizoo compare --baseline'")
    args.models = resolve_models(args.models)
    if args.save is not None and Path(args.save).exists():
        read_records(args.save, "--save")
    return timed


def _import(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except (Exception, SystemExit) as e:  # whatever a package does when it is imported
            raise UserError(f"--import {short(package)}: cannot be imported: {one_line(e)}") from e


class _Case(NamedTuple):
    """What is one row of the table."""

    spec: str
    size: tuple[int, int] | None
    dtype: str
    batch: int | None
    compile: str | None
    graph: bool


def _cases(args: argparse.Namespace) -> list[_Case]:
    rest = [args.dtype, args.batch or [None], args.compile, args.graph]
    sizes = {spec: [None] if read_spec(spec).size else args.size for spec in args.models}  # its own is meant
    return [_Case(spec, *one) for spec in args.models for one in itertools.product(sizes[spec], *rest)]


def _one(case: _Case, args: argparse.Namespace, step: Callable[[str], None] | None = None) -> Record:
    """Profile one model under one set of conditions; a process of its own first imports what registers models."""
    from vizoo.tools.profiling.profile import attempt

    _import(args.packages)
    spec, *conditions = case
    given = dict(zip(_Case._fields[1:], conditions, strict=True))
    found = attempt(spec, **given, step=step, **_options(args))
    found.command = _command(case, args, found.conditions["threads"])
    return found


def _command(case: _Case, args: argparse.Namespace, threads: int | None) -> str:
    """The command that makes one record again."""
    words = ["vizoo", "profile", case.spec, "--measure", ",".join(args.measure)]
    if case.size:
        words += ["--size", f"{case.size[0]}x{case.size[1]}"]
    words += ["--dtype", case.dtype, *(["--batch", str(case.batch)] if case.batch else [])]
    words += ["--compile", case.compile] if case.compile else []
    words += ["--graph"] * case.graph
    default = build_parser().parse_args([case.spec])
    for name in ("device", "in_chans", "num_classes", "weights", "min_time", "max_time", "depth"):
        if getattr(args, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", f"{getattr(args, name)}"]
    for name in ("amp", "channels_last", "reparam", "features", "fvcore", "check"):
        words += [f"--{name.replace('_', '-')}"] * bool(getattr(args, name))
    words += ["--no-fused"] * (not args.fused)
    if args.input:
        words += ["--input", args.input]
    if args.model_kwargs:
        words += ["--model-kwargs", *(f"{key}={_word(value)}" for key, value in args.model_kwargs.items())]
    words += ["--threads", str(threads)] if threads and args.measure != ["count"] else []
    return shlex.join([*words, *(["--import", *args.packages] if args.packages else [])])


def _word(value: Any) -> str:
    """The text that :func:`vizoo.tools.options.literal` reads as a value."""
    if isinstance(value, str):
        return value if literal(value) == value else repr(value)
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def _dead(case: _Case, args: argparse.Namespace, threads: int, why: Failure) -> Record:
    """The record of a case whose process died."""

    def refuse(step: str) -> None:
        raise why

    found = _one(case, args, refuse)
    found.conditions["threads"] = threads
    return found


def _profile_all(args: argparse.Namespace, timed: Sequence[str], results: Results) -> None:
    """Profile every model under all conditions, and give each record as it is known."""
    from vizoo.tools.profiling.machine import default_threads, run_cases
    from vizoo.tools.profiling.record import append_record

    cases, threads = _cases(args), args.threads or [default_threads()]
    # a lone count takes nothing with it, but code of others may end its process
    alone = len(args.models) == len(threads) == 1 and not timed and read_spec(args.models[0]).kind == "timm"
    with progress() as bar:
        task = bar.add_task("starting", total=len(cases) * len(threads))

        def tell(text: str) -> None:
            bar.update(task, description=f"{cases[len(results.found) % len(cases)].spec}: {text}")

        here = [tell] if alone else []  # a process of its own cannot call back
        group = None if alone else operator.attrgetter("spec")
        tell("starting")
        for case, n, found in run_cases(threads, cases, _one, args, *here, group=group):
            record = _dead(case, args, n, found) if isinstance(found, Failure) else found
            results.add(record, bar)
            if args.save is not None:
                append_record(args.save, record, args.depth)
            bar.advance(task)
            if len(results.found) < len(cases) * len(threads):
                tell("profiling")


def _details(args: argparse.Namespace, records: Sequence[Record]) -> list[Table]:
    """Where the cost of each model sits, if that is asked for or measured."""
    from vizoo.tools.profiling.views import modules_table, operators_table, parts_table

    by_op = args.by == "op" or (args.by is None and args.depth is None and any(r.operators for r in records))
    by_module = args.by == "module" or args.depth is not None or any(r.seconds for r in records)
    timed = any(r.seconds or r.operators for r in records)
    # a count does not depend on the conditions
    models = records if timed else list({(r.name, r.size): r for r in records}.values())
    tables = [parts_table(r) for r in records]
    if by_module and args.by != "op":
        tables += [modules_table(r, 1 if args.depth is None else args.depth, args.sort, args.top) for r in models]
    return [t for t in [*tables, *(operators_table(r, args.top) for r in models if by_op)] if t is not None]


def _differs(p: Record) -> bool:
    """Whether ``--check`` found something, or could not look."""
    return any(note.startswith(("engines differ", "not linear", "the batch cannot")) for note in p.notes)


def _profile(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with imports():
        from vizoo.tools.profiling.record import Record, headers, table, to_rows
        from vizoo.tools.profiling.views import print_notes

    timed = _check(args)
    several = [key for key in ("dtype", "batch", "compile", "graph") if len(getattr(args, key) or ()) > 1]
    heads = headers(timed, args.fvcore, not (args.device or "").startswith("cuda"), several)
    shown, filed = (functools.partial(table, heads=heads, noted=noted) for noted in (False, True))
    with Results(args, args.models, shown, to_rows, Record.to_dict, filed) as results:
        _profile_all(args, timed, results)
        records: list[Record] = results.found
        results.end(*_details(args, [r for r in records if r.counts]))
    whole = [r for r in records if not r.failure]
    print_notes(whole)
    agreed = dict.fromkeys(r.name for r in whole if args.check and not _differs(r))
    if agreed and not args.json:
        print(f"both engines agree, and the cost is linear in the batch: {', '.join(agreed)}")
    if args.plot and whole:
        from vizoo.tools.profiling.picture import plot

        plot(whole, Path(args.plot))
    failures = [r.failure if r.name in r.failure else f"{r.name}: {r.failure}" for r in records if r.failure]
    refuse_failures(failures, len(records), all(r.bad_input for r in records))
    partial = [f"{r.name}: {r.reasons[0]}" for r in records if r.reasons]
    if args.strict and partial:
        raise Failure(f"--strict: partial counts: {'; '.join(dict.fromkeys(partial))}")
    return int(args.check and any(map(_differs, records)))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile models; returns the exit status."""
    return run_tool(_profile, argv, "profile")


if __name__ == "__main__":
    raise SystemExit(main())
