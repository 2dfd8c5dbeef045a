"""``vizoo models``: what is in the zoo."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vizoo.tools.common import (
    Table,
    UserError,
    check_result,
    csv_text,
    is_shown,
    match_names,
    model_rows,
    print_json,
    print_tables,
    run_tool,
    short,
    write_result,
)
from vizoo.tools.options import Parser, add, quantity
from vizoo.tools.training.options import check_choice

EXAMPLES = """\
examples:
  vizoo models                            every model
  vizoo models litv2 overlock             models with one of these words in their name or family
  vizoo models '*_b' '*384*'              models with such names
  vizoo models --task detection --max-params 30M --sort top1 --reverse
  vizoo models nat_tiny --links           where its weights are
  vizoo models halonet --out halonet.md   a table for a page; .csv and .json also say tasks and weights
  vizoo models --json                     for programs, with exact counts"""
NOTES = (
    "GMACs: multiply-accumulates of one image in units of 1e9; papers of this field print them as FLOPs.",
    "paper top-1: ImageNet-1k, as published with the weights; not verified here.",
)


class Entry(NamedTuple):
    """One row of the zoo's table.

    Attributes:
        name: Name for ``timm.create_model``, with a tag where the tag changes the input size.
        family: File of ``backbones`` that it is in.
        tasks: What it can be trained for: some of ``classification, detection, segmentation, scanpath``.
        params: Number of parameters.
        macs: Multiply-accumulates of one image at the input size.
        merged_params: Parameters of the form for inference, where branches of the model can be merged; else None.
        merged_macs: Its multiply-accumulates.
        size: Height and width in pixels.
        paper_top1: ImageNet-1k top-1 accuracy in percent that the paper or its code published; None if there is none.
        source: ``official weights``, ``official weights by hand`` (no address of a file is known), ``timm weights``,
            ``reconstruction`` (neither official code nor weights exist), ``no published weights`` or ``for tests``.
        licence: Licence of code and weights.
        weights: Address of the weights of each tag that has some.
    """

    name: str
    family: str
    tasks: list[str]
    params: int
    macs: int
    merged_params: int | None
    merged_macs: int | None
    size: tuple[int, int]
    paper_top1: float | None
    source: str
    licence: str
    weights: dict[str, str]


def list_zoo(words: Sequence[str] = ()) -> list[Entry]:
    """The recorded table of the zoo, ordered by name; tests recompute every number in it.

    Args:
        words: Names, parts of names or families, or globs on names; none means everything but the ``test_*`` models.

    Returns:
        The rows that match any of them.

    Raises:
        UserError: If one matches nothing; near names are suggested.
    """
    entries = [_entry(row) for row in model_rows() if row["params"]]  # a new row is counted by vizoo.tools.table
    if not words:
        return [e for e in entries if is_shown(e.name, "")]
    chosen = {name for word in words for name in _matching(word, entries)}
    return [e for e in entries if e.name in chosen]


def _entry(row: dict[str, str]) -> Entry:
    return Entry(
        name=row["name"],
        family=row["family"],
        tasks=row["tasks"].split(),
        params=int(row["params"]),
        macs=int(row["macs"]),
        merged_params=int(row["merged_params"]) if row["merged_params"] else None,
        merged_macs=int(row["merged_macs"]) if row["merged_macs"] else None,
        size=(int(row["height"]), int(row["width"])),
        paper_top1=float(row["paper_top1"]) if row["paper_top1"] else None,
        source=row["source"],
        licence=row["licence"],
        weights=dict(word.split("=", 1) for word in row["weights"].split()),
    )


def _matching(word: str, entries: Sequence[Entry]) -> list[str]:
    """Names that a word stands for: a model with its tags, or all that contain the word.

    Models for tests are meant only where it begins as their names do.

    Raises:
        UserError: If it stands for none.
    """
    word = word.lower()  # as names are
    shown = [e for e in entries if is_shown(e.name, word)]
    if any(c in word for c in "*?["):
        found = match_names([e.name for e in entries], [word])
    else:
        found = [e.name for e in shown if word in (e.name, e.name.partition(".")[0])]
        found = found or [e.name for e in shown if word in e.name or word in e.family]
    if found:
        return found
    near = difflib.get_close_matches(word, {e.family for e in shown} | {e.name for e in shown}, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "'vizoo models' lists all"
    raise UserError(f"no model of the zoo matches {short(word)}; {hint}")


KEYS: dict[str, Callable[[Entry], Any]] = {  # of --sort
    "name": lambda e: e.name,
    "params": lambda e: e.params,
    "macs": lambda e: e.macs,
    "input": lambda e: e.size,
    "top1": lambda e: e.paper_top1,
}


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo models", description="List the models of the zoo.", epilog=EXAMPLES)
    p.add_argument("words", nargs="*", metavar="WORD", help="name, part of names or of a family, glob (every model)")
    add(p, "--task", "any")
    p.add_argument("--max-params", type=quantity, metavar="N", help="most parameters, such as 30M")
    p.add_argument("--max-macs", type=quantity, metavar="N", help="most multiply-accumulates, such as 4.5G")
    add(p, "--sort", ", ".join(KEYS), default="name")
    p.add_argument("--reverse", action="store_true", help="turn the order around")
    p.add_argument("--links", action="store_true", help="also say where weights are")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    add(form, "--json")
    add(p, "--out", ".json, .csv or .md")
    return p


def _chosen(args: argparse.Namespace) -> list[Entry]:
    """The rows that are asked for, in their order; those without the figure come last in any.

    Raises:
        UserError: If there are none.
    """
    limits = {"params": args.max_params or math.inf, "macs": args.max_macs or math.inf}
    entries = [
        e
        for e in list_zoo(args.words)
        if args.task in (None, *e.tasks) and all(getattr(e, name) <= most for name, most in limits.items())
    ]
    if not entries:
        given = {"--task": args.task, "--max-params": args.max_params, "--max-macs": args.max_macs}
        options = [f"{flag} {v:g}" if isinstance(v, float) else f"{flag} {v}" for flag, v in given.items() if v]
        raise UserError(f"no model of the zoo is left by {' '.join([*map(short, args.words), *options])}")
    figure = KEYS[args.sort]
    known = [e for e in entries if figure(e) is not None]
    return sorted(known, key=figure, reverse=args.reverse) + [e for e in entries if figure(e) is None]


def _table(entries: Sequence[Entry]) -> Table:
    """What is printed."""
    columns = ["model", "params M", "GMACs", "input", "paper top-1 %", "source", "licence"]
    rows = [
        [
            e.name,
            f"{e.params / 1e6:.2f}",
            f"{e.macs / 1e9:.3f}",
            f"{e.size[0]}x{e.size[1]}",
            "" if e.paper_top1 is None else str(e.paper_top1),
            e.source,
            e.licence,
        ]
        for e in entries
    ]
    merged = [
        f"{e.name} is the training form; with its branches merged (--reparam): "
        f"{e.merged_params / 1e6:.2f} M, {e.merged_macs / 1e9:.3f} GMACs."
        for e in entries
        if e.merged_params and e.merged_macs
    ]
    return Table(columns, rows, (1, 2, 3, 4), below=[*merged, *NOTES])


def _whole_table(entries: Sequence[Entry]) -> Table:
    """What files hold: the printed table with columns that are too wide for a terminal."""
    columns, rows, numeric, _, _ = _table(entries)
    more = [
        [
            e.family,
            " ".join(e.tasks),
            f"{e.merged_params / 1e6:.2f}" if e.merged_params else "",
            f"{e.merged_macs / 1e9:.3f}" if e.merged_macs else "",
            " ".join(f"{tag}={address}" for tag, address in e.weights.items()),
        ]
        for e in entries
    ]
    heads = ["family", "tasks", "merged params M", "merged GMACs", "weights"]
    return Table(
        [*columns, *heads], [[*a, *b] for a, b in zip(rows, more, strict=True)], (*numeric, 9, 10), below=NOTES
    )


def _weights(entries: Sequence[Entry]) -> Table:
    """Where weights are."""
    rows = [[e.name, *where] for e in entries for where in e.weights.items() or [("", "none")]]
    return Table(["model", "tag", "weights"], rows)


def _models(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_choice("--sort", args.sort, tuple(KEYS))
    check_result(args.out)
    entries = _chosen(args)
    result, whole = [e._asdict() for e in entries], _whole_table(entries)
    if args.json:
        print_json(result)
    elif args.csv:
        print(csv_text(whole), end="")
    else:
        print_tables(_table(entries), *[_weights(entries)] * args.links)
    write_result(args.out, result, [whole])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """List the models of the zoo; returns the exit status."""
    return run_tool(_models, argv, "models")


if __name__ == "__main__":
    raise SystemExit(main())
