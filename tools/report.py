"""``vizoo report``: one HTML page of what models cost, from files of records or of models that it profiles first."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vizoo.tools import profiler
from vizoo.tools.common import UserError, check_file, check_output, endings, imports, run_tool
from vizoo.tools.options import Parser, add

EXAMPLES = """\
examples:
  vizoo profile 'litv2_*' resnet50 --device cpu --batch 1,8 --save cpu.jsonl
  vizoo report cpu.jsonl --out cpu.html            a page of what was recorded
  vizoo report cpu.jsonl gpu.jsonl                 machines and conditions are chosen on the page, never mixed
  vizoo report litv2_s resnet50 --device cpu       profile both first
  vizoo report mine.jsonl --top1 mine.csv          with accuracies that were published elsewhere"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo report", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument(
        "records",
        nargs="+",
        metavar="RECORDS",
        help="files of vizoo profile --save or --out, .jsonl or .json, or targets to profile first",
    )
    add(p, "--out", ".html; report.html", default="report.html")
    add(p, "--device", "where targets are measured too; they are counted without it")
    p.add_argument("--top1", metavar="FILE", help="published accuracies: .csv with columns model,size,top1,source")
    return p


def _is_file(word: str) -> bool:
    return word.endswith((".jsonl", ".json"))


def _report(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_output(args.out, "--out", ".html")
    targets = [word for word in args.records if not _is_file(word)]
    if args.device is not None and not targets:
        raise UserError("--device: only targets are measured, and RECORDS are all files")
    for word in filter(_is_file, args.records):
        check_file(word, "RECORDS")
    with imports():
        from vizoo.tools.profiling.page import write_page
        from vizoo.tools.profiling.published import accuracies
        from vizoo.tools.profiling.record import read_records

    known = accuracies(args.top1)
    records: list[dict[str, Any]] = []
    for word in filter(_is_file, args.records):
        records += [r.to_dict() for r in read_records(word, "RECORDS")]
    status = 0
    if targets:
        with endings(), tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "targets.jsonl")
            where = [] if args.device is None else ["--device", args.device]
            status = profiler.main([*targets, *where, "--save", str(file)])
            records += [r.to_dict() for r in read_records(file)] if file.exists() else []
        if status == 2:
            return status
    if not records:
        raise UserError(f"RECORDS {', '.join(args.records)}: no record there")
    write_page(records, args.out, known)
    print(f"{args.out}: {len(records)} record{'s' * (len(records) != 1)}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Write a page of records; returns the exit status."""
    return run_tool(_report, argv, "report")


if __name__ == "__main__":
    raise SystemExit(main())
