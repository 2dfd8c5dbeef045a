"""``vizoo compare``: which of two models, conditions or revisions is faster, by how much, and how sure that is.

Each side runs in fresh processes that take turns, in the order A, B, B, A.  One target alone is compared with itself
under other conditions, at another revision of a git repository, or with what a file of records holds.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import (
    UserError,
    check_file,
    check_result,
    compute_device,
    endings,
    give,
    imports,
    progress,
    run_tool,
    short,
)
from vizoo.tools.options import MODELS, MOST, Parser, add, add_result, number, read_sizes
from vizoo.tools.profiling.comparing import (
    LEAST_PROCESSES,
    Outcome,
    Plan,
    Wanted,
    baseline,
    measure_sides,
    paired,
    percent,
    revision,
    unpaired,
)
from vizoo.tools.profiling.turns import Side

EXAMPLES = """\
examples:
  vizoo compare litv2_s swin_tiny_patch4_window7_224       two models
  vizoo compare litv2_s --dtype fp32,bf16                  one model: A in fp32, B in bf16
  vizoo compare litv2_s --rev v0.1.0                       the last release against the files as they are
  vizoo compare litv2_s --rev main HEAD --budget 5%        exit status 3 if HEAD is more than 5 % slower
  vizoo compare litv2_s --baseline speed.jsonl             against the newest record of 'vizoo profile --save'

'slower' and 'faster' mean that the 95 % interval of the ratio does not contain 1, 'undecided' that it does.  The exit
status is 3 if B is slower than --budget allows beyond doubt: if the lower bound of the interval is above."""
PAIRED = ("size", "batch", "dtype", "threads", "compile", "graph")  # conditions that each side may have a value of
EXCEEDED = 3  # exit status


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo compare", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument("models", nargs="+", metavar=MODELS[0], help="A and B, or one, as of vizoo profile")
    p.add_argument("--rev", nargs="+", metavar="REV", help="one revision against the files as they are, or two")
    p.add_argument("--baseline", metavar="FILE", help="records (.jsonl) with what A was")
    p.add_argument("--budget", type=percent, metavar="SHARE", help="exit status 3 if B is slower by more, such as 5%%")
    p.add_argument(
        "--processes",
        type=number(int, LEAST_PROCESSES, MOST),
        default=5,
        metavar="N",
        help="fresh processes of each side, one after the other (5)",
    )
    add(p, "--rounds", "30 in each process", default=30)
    add(p, "--size", "the model's; two values with a comma are A's and B's, 800x1280 is height and width")
    add(p, "--input", "of both sides")
    add(p, "--weights", "of both sides")
    add(p, "--batch", "1; two values are A's and B's", default=[1])
    add(p, "--dtype", "fp32; two values are A's and B's", default=["fp32"])
    add(p, "--threads", "physical cores; two values are A's and B's")
    add(p, "--device", default="cpu")
    add(p, "--amp", "float32 weights under autocast to --dtype")
    add(p, "--channels-last")
    add(p, "--compile", "no; no,default is eager A and compiled B", default=[None])
    add(p, "--graph", "no; no,yes is A without and B with one", default=[False])
    add(p, "--reparam")
    add(p, "--cpu-time")
    add_result(p)
    return p


def _sides(args: argparse.Namespace) -> list[Side]:
    """A and B; A alone where it is compared with a record."""
    if len(args.models) > 2:
        raise UserError(f"models {short(' '.join(args.models))}: give one or two")
    values = {}
    for key in PAIRED:
        given = getattr(args, key)
        if len(given) > 2:
            raise UserError(f"--{key}: got {len(given)} values; give one, or two, of A and of B")
        values[key] = (given[0], given[-1])
    same = {key: getattr(args, key) for key in ("device", "channels_last", "amp", "reparam", "input", "weights")}
    found = [
        Side(target, **same, **{key: pair[i] for key, pair in values.items()})
        for i, target in enumerate((args.models[0], args.models[-1]))
    ]
    alone, differ = len(args.models) == 1, found[0] != found[1]
    if args.rev and args.baseline:
        raise UserError("--rev and --baseline: give one of them")
    if args.rev and (len(args.rev) > 2 or not alone or differ):
        raise UserError("--rev: needs one target, one value of each condition, and one or two revisions")
    if args.baseline and (not alone or differ):
        raise UserError("--baseline: needs one target and one value of each condition")
    if alone and not (differ or args.rev or args.baseline):
        raise UserError("one target alone: give a second one, two values of a condition, --rev or --baseline")
    return found[:1] if args.baseline else found


def _check(args: argparse.Namespace) -> list[Side]:
    """Refuse bad input before anything runs."""
    from vizoo.tools.profiling.machine import default_threads
    from vizoo.tools.profiling.profile import check_conditions

    check_result(args.out)
    if args.weights is not None:
        check_file(args.weights, "--weights")
    args.threads = args.threads or [default_threads()]
    args.size = [None] if args.size is None else read_sizes(args.size)
    compute_device(args.device)
    sides = _sides(args)
    for side in sides:
        check_conditions(side.device, "latency", side.dtype, side.amp, graph=side.graph)
    if args.cpu_time and (args.threads != [1] or args.device != "cpu"):
        raise UserError("--cpu-time: adds up all threads, so it needs --threads 1 and --device cpu")
    return sides


def _against_record(args: argparse.Namespace, side: Side, plan: Plan) -> Outcome:
    """Compare a side with the newest record of it."""
    from vizoo.tools.profiling.record import read_records

    records, found = read_records(args.baseline, "--baseline"), []

    def ready(answers: list[dict[str, Any]]) -> None:
        target, machine = (answers[0][key] for key in ("target", "environment"))
        wanted = Wanted(target, side.conditions, side.batch, machine["fingerprint"])
        found.append(baseline(records, wanted, f"--baseline {short(args.baseline)}"))

    names, (now,), _, notes, state = measure_sides([side], (), plan._replace(ready=ready))
    then, told = found[0].samples, "outputs are not compared: a record has none"
    both = (f"{names[0]}, recorded", f"{names[0]}, now")
    return Outcome(both, (side, side), (then, now), unpaired(then, now), told, notes, state)


def _against_each_other(args: argparse.Namespace, sides: Sequence[Side], plan: Plan) -> Outcome:
    """Compare two sides, of two revisions perhaps."""
    revisions = [*args.rev, None][:2] if args.rev else []
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(revision(rev, Path.cwd())) for rev in revisions]
        names, (a, b), told, notes, state = measure_sides(sides, places, plan)
    at = [f" at {rev}" if rev else ", files as they are" for rev in revisions] or ["", ""]
    both = (names[0] + at[0], names[1] + at[1])
    return Outcome(both, (sides[0], sides[1]), (a, b), paired(a, b), told, notes, state)


def _compare(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with imports():
        sides = _check(args)
    with endings(), progress() as bar:
        task = bar.add_task("taking turns", total=args.processes * args.rounds)
        plan = Plan(args.processes, args.rounds, args.cpu_time, tick=lambda: bar.advance(task))
        found = _against_record(args, sides[0], plan) if args.baseline else _against_each_other(args, sides, plan)
    give(args, found.to_dict(), [found.table()])
    return EXCEEDED if args.budget is not None and found.exceeds(args.budget) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two sides; returns the exit status."""
    return run_tool(_compare, argv, "compare")


if __name__ == "__main__":
    raise SystemExit(main())
