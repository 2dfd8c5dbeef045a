"""``vizoo compare``: which of two models, conditions or revisions is faster, by how much, and how sure that is.

Each side runs in fresh processes that take turns, in the order A, B, B, A.  One target alone is compared with itself
under other conditions, at another revision of a git repository, or with what a file of records holds.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from vizoo.tools.common import UserError, check_result, compute_device, give, imports, progress, run_tool, short
from vizoo.tools.options import MODELS, MOST, Parser, add, add_result, number, read_size
from vizoo.tools.profiling.comparing import (
    LEAST_PROCESSES,
    Outcome,
    Place,
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
  vizoo compare litv2_s --dtype fp32 bf16                  one model: A in fp32, B in bf16
  vizoo compare litv2_s --rev v0.1.0                       the last release against the files as they are
  vizoo compare litv2_s --rev main HEAD --budget 5%        exit status 3 if HEAD is more than 5 % slower
  vizoo compare litv2_s --baseline speed.jsonl             against the newest record of 'vizoo profile --save'

'slower' and 'faster' mean that the 95 % interval of the ratio does not contain 1, 'undecided' that it does.  The exit
status is 3 if B is slower than --budget allows beyond doubt: if the lower bound of the interval is above."""
PAIRED = ("batch", "dtype", "threads")  # conditions that each side may have a value of
EXCEEDED = 3  # exit status


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo compare", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument("models", nargs="+", metavar=MODELS[0], help="A and B, names of timm, vizoo's included; or one")
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
    add(p, "--rounds", "20 in each process", default=20)
    add(p, "--size", "the model's; height and width where they differ")
    add(p, "--batch", "1; two values are A's and B's", default=[1])
    add(p, "--dtype", "fp32; two values are A's and B's", default=["fp32"])
    add(p, "--threads", "physical cores; two values are A's and B's")
    add(p, "--device", default="cpu")
    add(p, "--amp", "float32 weights under autocast to --dtype")
    add(p, "--channels-last")
    add(p, "--compile")
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
            raise UserError(f"--{key} {' '.join(map(str, given))}: give one value, or two, of A and of B")
        values[key] = (given[0], given[-1])
    same = {key: getattr(args, key) for key in ("device", "compile", "channels_last", "amp", "reparam")}
    size = None if args.size is None else read_size(args.size)
    found = [
        Side(target, size, **same, **{key: pair[i] for key, pair in values.items()})
        for i, target in enumerate((args.models[0], args.models[-1]))
    ]
    alone = len(args.models) == 1
    if args.rev and args.baseline:
        raise UserError("--rev and --baseline: give one of them")
    if args.rev and (len(args.rev) > 2 or found[0] != found[1]):
        raise UserError("--rev: needs one target, one value of each condition, and one or two revisions")
    if args.baseline and (not alone or found[0] != found[1]):
        raise UserError("--baseline: needs one target and one value of each condition")
    if alone and found[0] == found[1] and not (args.rev or args.baseline):
        raise UserError("one target alone: give a second one, two values of a condition, --rev or --baseline")
    return found[:1] if args.baseline else found


def _check(args: argparse.Namespace) -> list[Side]:
    """Refuse bad input before anything runs."""
    from vizoo.tools.profiling.machine import default_threads
    from vizoo.tools.profiling.profile import check_conditions

    check_result(args.out)
    args.threads = args.threads or [default_threads()]
    compute_device(args.device)
    sides = _sides(args)
    for side in sides:
        check_conditions(side.device, "latency", side.dtype, side.amp)
    if args.cpu_time and (args.threads != [1] or args.device != "cpu"):
        raise UserError("--cpu-time: adds up all threads, so it needs --threads 1 and --device cpu")
    return sides


def _against_record(args: argparse.Namespace, side: Side, tick: Callable[[], None]) -> Outcome:
    """Compare a side with the newest record of it."""
    from vizoo.tools.profiling.comparing import read_records
    from vizoo.tools.profiling.machine import environment

    records = read_records(args.baseline)
    found = baseline(
        records, side, environment(compute_device(side.device))["fingerprint"], f"--baseline {args.baseline}"
    )
    names, (now,), _, notes, state = measure_sides([side], (), args.processes, args.rounds, args.cpu_time, tick)
    then = found["samples"]
    told = "outputs are not compared: a record has none"
    names = [f"{names[0]} (recorded)", names[0]]
    return Outcome((names[0], names[1]), (side, side), (then, now), unpaired(then, now), told, notes, state)


def _against_each_other(
    args: argparse.Namespace, sides: Sequence[Side], places: Sequence[Place], tick: Callable[[], None]
) -> Outcome:
    names, (a, b), told, notes, state = measure_sides(sides, places, args.processes, args.rounds, args.cpu_time, tick)
    if args.rev:
        at = [*(f" at {rev}" for rev in args.rev), ", files as they are"]
        names = [f"{names[i]}{at[i]}" for i in (0, 1)]
    return Outcome((names[0], names[1]), (sides[0], sides[1]), (a, b), paired(a, b), told, notes, state)


def _compare(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with imports():
        sides = _check(args)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress())
        task = bar.add_task("taking turns", total=args.processes * args.rounds)
        revisions = ([*args.rev, None] if args.rev else [])[:2]
        places = [stack.enter_context(revision(rev, Path.cwd())) for rev in revisions]

        def tick() -> None:
            bar.advance(task)

        if args.baseline:
            found = _against_record(args, sides[0], tick)
        else:
            found = _against_each_other(args, sides, places, tick)
    give(args, found.to_dict(), [found.table()])
    return EXCEEDED if args.budget is not None and found.exceeds(args.budget) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two sides; returns the exit status."""
    return run_tool(_compare, argv, "compare")


if __name__ == "__main__":
    raise SystemExit(main())
