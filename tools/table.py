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
from typing import Any

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
from vizoo.tools.documents.chart import draw_chart
from vizoo.tools.documents.sources import families, pages
from vizoo.tools.documents.tables import WHOLE_WORDS, rewrite
from vizoo.tools.models import list_zoo
from vizoo.tools.options import TASKS, Parser, add
from vizoo.tools.profiling.counting import count

EXAMPLES = """\
examples:
  python -m vizoo.tools.table           recount models.csv, rewrite tables, citations, cards and NOTICE
  python -m vizoo.tools.table litv2_s   recount only this row of models.csv
  python -m vizoo.tools.table --check   only say what is out of date
  python -m vizoo.tools.table --picture also draw the picture of the README from tools/results"""
ORIGINS = "Origins of the families."  # begins the paragraph of NOTICE above the families
PICTURE = "docs/pictures/speed.png"  # its bytes depend on the version of matplotlib, so only drawn when asked for
BY_HAND = ("name", "paper_top1", "source")  # columns of models.csv; the rest follows from the models
COUNTED = (
    *("family", "tasks", "params", "macs", "merged_params", "merged_macs"),
    *("height", "width", "licence", "weights"),
)


def recount(text: str, patterns: Sequence[str] = ()) -> str:
    """``models.csv`` with everything that follows from the models written again.

    Args:
        text: Contents of the file; what is counted may be empty.
        patterns: Globs on the names to count; none means all.

    Returns:
        The new contents, ordered by name.

    Raises:
        UserError: If the columns are others, or a name is unknown.
        Failure: If a count is partial.
    """
    import vizoo  # noqa: F401 - registers the zoo

    reader = csv.DictReader(text.splitlines(), restval="")
    if list(reader.fieldnames or []) != [*BY_HAND, *COUNTED]:
        need = ",".join([*BY_HAND, *COUNTED])
        raise UserError(f"models.csv has the columns {short(','.join(reader.fieldnames or []))}, need {need}")
    rows = sorted(reader, key=lambda row: row["name"])
    names = [row["name"] for row in rows]
    for pattern in patterns:
        if not match_names(names, [pattern]):
            raise UserError(f"NAME {pattern!r} is no row of models.csv")
    chosen = set(match_names(names, patterns) if patterns else names)
    for row in rows:
        if row["name"] in chosen:
            row.update(counted_columns(row["name"], build_model(row["name"], device="meta")))
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=[*BY_HAND, *COUNTED], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def counted_columns(name: str, model: Any) -> dict[str, str]:
    """The columns of ``models.csv`` that follow from a model.

    Args:
        name: Its name, with or without a tag.
        model: The model, on any device.

    Returns:
        Texts by the names of ``COUNTED``.

    Raises:
        Failure: If a count is partial.
    """
    from timm.models import get_model_input_config, get_pretrained_cfg, list_models, model_entrypoint
    from timm.utils.model import reparameterize_model

    cfg: Any = get_pretrained_cfg(name)
    arch, dot, _ = name.partition(".")
    size = get_model_input_config(model)["input_size"]
    params, macs = _costs(name, model, size)
    merges = any(hasattr(module, "reparameterize") for module in model.modules())
    merged = _costs(name, reparameterize_model(model), size) if merges else ("", "")
    tags = [name] if dot else list_models(arch, pretrained=True, include_tags=True)
    return {
        "family": model_entrypoint(arch).__module__.rpartition(".")[2],
        "tasks": " ".join(_tasks(model)),
        **{"params": params, "macs": macs, "merged_params": merged[0], "merged_macs": merged[1]},
        **{"height": str(size[-2]), "width": str(size[-1]), "licence": cfg.license or ""},
        "weights": " ".join(f"{tag.partition('.')[2]}={_address(get_pretrained_cfg(tag))}" for tag in tags),
    }


def _costs(name: str, model: Any, size: Sequence[int]) -> tuple[str, str]:
    """Parameters, and multiply-accumulates of one image."""
    import torch

    counted = count(model, torch.empty(1, *size, device="meta"))
    if counted.reasons:
        raise Failure(f"{name}: partial count: {counted.reasons[0]}; not written")
    return str(counted.params), str(counted.macs)


def _tasks(model: Any) -> list[str]:
    """What ``vizoo train`` can train a model for; detectors and segmentors stand on maps of four strides."""
    from vizoo.backbones.oat import OAT

    pyramid = {4, 8, 16, 32} <= {level["reduction"] for level in getattr(model, "feature_info", ())}
    scanpath = isinstance(model, OAT)
    able = {"classification": not scanpath, "detection": pyramid, "segmentation": pyramid, "scanpath": scanpath}
    return [task for task in TASKS if able[task]]


def _address(cfg: Any) -> str:
    """Where timm gets weights from."""
    return f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url


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
    p.add_argument("--picture", action="store_true", help="also draw accuracy over images per second, for the README")
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
    if stale and args.check:
        return 1  # the documents follow from it
    for path, text in documents(args.root):
        stale |= _renew(path, text, args.root, args.check)
    if args.picture:
        draw_chart(args.root / "tools/results", args.root / PICTURE)
    return int(stale and args.check)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the generated tables; returns the exit status."""
    return run_tool(_table, argv, "table")


if __name__ == "__main__":
    raise SystemExit(main())
