"""Recounts ``backbones/models.csv``, and writes NOTICE, the tables of the pages and the families' cards; in a checkout.

The tests fail when one is out of date.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from vizoo.tools.common import (
    Failure,
    UserError,
    atomic_write,
    build_model,
    match_names,
    read_text,
    run_tool,
    short,
)
from vizoo.tools.documents.cards import card, card_path
from vizoo.tools.documents.sources import families, pages
from vizoo.tools.documents.tables import WHOLE_WORDS, rewrite
from vizoo.tools.models import list_zoo
from vizoo.tools.options import Parser, add
from vizoo.tools.profiling.counting import count

EXAMPLES = """\
examples:
  python -m vizoo.tools.table           recount models.csv, rewrite tables, citations, cards and NOTICE
  python -m vizoo.tools.table litv2_s   recount only this row of models.csv
  python -m vizoo.tools.table --check   only say what is out of date"""
ORIGINS = "Origins of the families."  # begins the paragraph of NOTICE above the families


def recount(text: str, patterns: Sequence[str] = ()) -> str:
    """``models.csv`` with parameters and multiply-accumulates counted again.

    Args:
        text: Contents of the file; counts may be empty.
        patterns: Globs on the names to count; none means all.

    Returns:
        The new contents, ordered by name.

    Raises:
        UserError: If the columns are others, or a name is unknown.
        Failure: If a count is partial.
    """
    import torch
    from timm.models import get_model_input_config

    import vizoo  # noqa: F401 - registers the zoo

    reader = csv.DictReader(text.splitlines())
    if not {"name", "params", "macs"} <= set(reader.fieldnames or []):
        raise UserError(f"models.csv has the columns {short(reader.fieldnames)}, need name, params and macs among them")
    rows = sorted(reader, key=lambda row: row["name"])
    names = [row["name"] for row in rows]
    for pattern in patterns:
        if not match_names(names, [pattern]):
            raise UserError(f"NAME {pattern!r} is no row of models.csv")
    chosen = set(match_names(names, patterns) if patterns else names)
    for row in rows:
        if row["name"] not in chosen:
            continue
        model = build_model(row["name"], device="meta")
        counted = count(model, torch.empty(1, *get_model_input_config(model)["input_size"], device="meta"))
        if counted.reasons:
            raise Failure(f"{row['name']}: partial count: {counted.reasons[0]}; not written")
        row["params"], row["macs"] = str(counted.params), str(counted.macs)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def notice(text: str) -> str:
    """NOTICE with the origins of all families written again.

    Args:
        text: Contents of the file.

    Raises:
        UserError: If it has no paragraph that begins with ``ORIGINS``.
    """
    if f"\n\n{ORIGINS}" not in text:
        raise UserError(f"NOTICE has no paragraph that begins with {ORIGINS!r}")
    paragraph = text[text.index(ORIGINS) :].split("\n\n")[0]
    lines = []
    for about in (family.about for family in families()):
        start = f"{about.name:24s}" if len(about.name) < 24 else f"{about.name}  "
        lines += textwrap.wrap(start + about.origin, 120, subsequent_indent=" " * 24, **WHOLE_WORDS)
    return text[: text.index(ORIGINS)] + paragraph + "\n\n" + "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="python -m vizoo.tools.table", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument("name", metavar="NAME", nargs="*", help="rows of models.csv to count again (all)")
    p.add_argument("--root", type=Path, metavar="DIR", default=Path("."), help="the checkout (.)")
    add(p, "--check", "say what is out of date, write nothing")
    return p


def documents(root: Path) -> Iterator[tuple[Path, str]]:
    """Every document that is written from code and data, with its new text.

    Args:
        root: The checkout.

    Raises:
        UserError: If a file is missing or not of the form that it should have.
    """
    notices = root / "NOTICE"
    yield notices, notice(read_text(notices, "--root"))
    zoo = list_zoo(["*"])
    for page in pages(root):
        yield page, rewrite(read_text(page, "--root"), page, root, zoo)
    for family in families():
        yield card_path(root, family), card(family, root, zoo)


def _renew(path: Path, text: str, root: Path, check: bool) -> bool:
    """Write a file if its text is another, or only say so with ``check``; whether it is."""
    if path.is_file() and read_text(path, "--root") == text:
        return False
    print(f"{path.relative_to(root)} {'is out of date' if check else 'written'}")
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(text)
    return True


def _table(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    for name in ("backbones/models.csv", "NOTICE", "README.md"):
        if not os.path.isfile(args.root / name):
            raise UserError(f"--root {short(str(args.root))}: no {name} there; give the checkout")
    models = args.root / "backbones/models.csv"
    stale = _renew(models, recount(read_text(models, "--root"), args.name), args.root, args.check)
    for path, text in documents(args.root):
        stale |= _renew(path, text, args.root, args.check)
    return int(stale and args.check)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the generated tables; returns the exit status."""
    return run_tool(_table, argv, "table")


if __name__ == "__main__":
    raise SystemExit(main())
