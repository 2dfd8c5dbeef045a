"""``vizoo models``: what is in the zoo."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

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
        params: Number of parameters.
        macs: Multiply-accumulates of one image at the input size.
        size: Height and width in pixels.
        paper_top1: ImageNet-1k top-1 accuracy in percent that the paper or its code published; None if there is none.
        source: ``official weights``, ``timm weights``, ``reconstruction`` (neither official code nor weights exist) or
            ``for tests``.
        licence: Licence of code and weights.
        weights: Tags with weights to download.
    """

    name: str
    params: int
    macs: int
    size: tuple[int, int]
    paper_top1: float | None
    source: str
    licence: str
    weights: list[str]


def list_zoo(patterns: Sequence[str] = ()) -> list[Entry]:
    """The recorded table of the zoo, ordered by name; tests recompute every number in it.

    Args:
        patterns: Globs on the names; none means everything but the ``test_*`` models.

    Returns:
        The matching rows.
    """
    import timm

    import vizoo  # noqa: F401 - registers the zoo

    text = resources.files("vizoo.backbones").joinpath("models.csv").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in csv.DictReader(text.splitlines())}
    names = match_names(list(rows), patterns) if patterns else [n for n in rows if not n.startswith("test_")]
    entries = []
    for name in names:
        row = rows[name]
        cfg: Any = timm.get_pretrained_cfg(name)
        arch = name.partition(".")[0]
        entries.append(
            Entry(
                name=name,
                params=int(row["params"]),
                macs=int(row["macs"]),
                size=tuple(cfg.input_size[-2:]),
                paper_top1=float(row["paper_top1"]) if row["paper_top1"] else None,
                source=row["source"],
                licence=cfg.license or "",
                weights=[t.partition(".")[2] for t in timm.list_models(arch, pretrained=True, include_tags=True)],
            )
        )
    return entries


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
    if not entries:
        raise UserError(f"no model of the zoo matches {' '.join(map(short, args.patterns))}; 'vizoo models' lists all")
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
