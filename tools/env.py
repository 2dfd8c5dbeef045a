"""``vizoo env``: versions, devices and usable backends, for bug reports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from vizoo.tools.common import Table, check_result, give, run_tool
from vizoo.tools.options import Parser, add_result
from vizoo.tools.profiling.machine import installation

EXAMPLES = """\
examples:
  vizoo env                what to paste into a bug report
  vizoo env --json         the same for programs
  vizoo env --out env.md   the same as a table of Markdown"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo env",
        description="Print versions, devices and which backends can be used here.",
        epilog=EXAMPLES,
    )
    add_result(p)
    return p


def _table(found: dict[str, Any]) -> Table:
    """What people read, from what :func:`vizoo.tools.profiling.machine.installation` found."""
    rows = [[package, version or "not installed"] for package, version in found["versions"].items()]
    rows += [
        ["system", found["system"]],
        ["cpu", f"{found['cpu']}, {found['cpu_capability']}"],
        ["cores", f"{found['cores']}, {found['threads']} torch threads"],
        ["memory", f"{found['memory_gib']} GiB"],
        ["gpu", ", ".join(found["gpus"]) or "none"],
    ]
    rows += [
        [f"backend {name}", f"{'usable' if b['usable'] else 'no'}: {b['reason']}"]
        for name, b in found["backends"].items()
    ]
    return Table(["what", "here"], rows)


def _env(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_result(args.out)
    found = installation()
    give(args, found, [_table(found)])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the environment; returns the exit status."""
    return run_tool(_env, argv, "env")


if __name__ == "__main__":
    raise SystemExit(main())
