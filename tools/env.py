"""``vizoo env``: versions, devices and usable backends, for bug reports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vizoo.tools.common import print_json, run_tool
from vizoo.tools.options import Parser, add

EXAMPLES = """\
examples:
  vizoo env          what to paste into a bug report
  vizoo env --json   the same for programs"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo env",
        description="Print versions, devices and which backends can be used here.",
        epilog=EXAMPLES,
    )
    add(p, "--json")
    return p


def _env(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from vizoo.tools.profiling.machine import installation

    found = installation()
    if args.json:
        print_json(found)
        return 0
    threads = f"{found['cores']} cores, {found['threads']} torch threads"
    print("versions  " + "  ".join(f"{k} {v}" for k, v in found["versions"].items() if v))
    print("absent    " + ", ".join(k for k, v in found["versions"].items() if v is None))
    print(f"system    {found['system']}")
    print(f"cpu       {found['cpu']}, {found['cpu_capability']}, {threads}")
    print(f"memory    {found['memory_gib']} GiB")
    print("gpu       " + (", ".join(found["gpus"]) or "none"))
    print("backends")
    for name, b in found["backends"].items():
        print(f"  {name:8s}{'usable' if b['usable'] else 'no':8s}{b['reason']}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the environment; returns the exit status."""
    return run_tool(_env, argv, "env")


if __name__ == "__main__":
    raise SystemExit(main())
