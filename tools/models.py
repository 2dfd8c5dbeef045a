"""``vizoo models``: what is in the zoo."""

from __future__ import annotations

import argparse
import csv
import difflib
import sys
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from vizoo.tools.common import UserError, match_names, print_json, print_table, run_tool, short
from vizoo.tools.options import Parser, add

EXAMPLES = """\
examples:
  vizoo models                every model
  vizoo models 'litv2*'       one family
  vizoo models '*b' '*384*'   several patterns
  vizoo models --csv          the same as comma-separated values
  vizoo models --json         for programs, with exact counts and the tags of weights"""


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
        source: ``official weights``, ``timm weights``, ``reconstruction`` (neither official code nor weights exist) or
            ``for tests``.
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
        words: Parts of names or families, or globs on names; none means everything but the ``test_*`` models.

    Returns:
        The rows that match any of them.

    Raises:
        UserError: If one matches nothing; near names are suggested.
    """
    text = resources.files("vizoo").joinpath("backbones/models.csv").read_text(encoding="utf-8")
    entries = [_entry(row) for row in csv.DictReader(text.splitlines())]
    if not words:
        return [e for e in entries if not e.name.startswith("test_")]
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
    """Names that a word stands for; models for tests only where it begins as their names do.

    Raises:
        UserError: If it stands for none.
    """
    if any(c in word for c in "*?["):
        found = match_names([e.name for e in entries], [word])
    else:
        shown = [e for e in entries if word.startswith("test") or not e.name.startswith("test_")]
        found = [e.name for e in shown if word in e.name or word in e.family]
    if found:
        return found
    known = dict.fromkeys([*(e.family for e in entries), *(e.name for e in entries)])
    near = difflib.get_close_matches(word, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "'vizoo models' lists all"
    raise UserError(f"no model of the zoo matches {short(word)}; {hint}")


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo models", description="List the models of the zoo.", epilog=EXAMPLES)
    p.add_argument("patterns", nargs="*", metavar="PATTERN", help="names or globs; default: every model")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    add(form, "--json")
    return p


def _models(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    entries = list_zoo(args.patterns)
    if args.json:
        print_json([e._asdict() for e in entries])
        return 0
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
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return 0
    print_table(columns, rows, numeric=(1, 2, 3, 4))
    print("GMACs: multiply-accumulates of one image in units of 1e9; papers of this field print them as FLOPs.")
    print("paper top-1: ImageNet-1k, as published with the weights; not verified here.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """List the models of the zoo; returns the exit status."""
    return run_tool(_models, argv, "models")


if __name__ == "__main__":
    raise SystemExit(main())
