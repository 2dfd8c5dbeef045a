"""What ``vizoo evaluate`` of every task takes and leaves: the run, ``--out``, ``--plot`` and ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vizoo.tools.common import Table, check_output, check_result, is_first_process, print_tables, write_result
from vizoo.tools.options import add, add_result


def add_results(parser: argparse.ArgumentParser, task: str, picture: str, required: bool = True) -> None:
    """Add the options that every task has.

    Args:
        parser: The parser.
        task: Its task.
        picture: What ``--plot`` draws.
        required: Whether a run must be given.
    """
    parser.add_argument(
        "run", nargs=None if required else "?", metavar="RUN", help="folder that 'vizoo train' of this task wrote"
    )
    add(parser, "--task", f"{task}, as RUN says")
    add(parser, "--checkpoint", "the best of the run")
    add(parser, "--device", "cuda if there is one")
    add_result(parser, ".json; .csv or .md: the table")
    add(parser, "--plot", f".png: {picture}")


def check_results(args: argparse.Namespace) -> None:
    """Say before any work starts that a result cannot be written.

    Args:
        args: ``out`` and ``plot``.

    Raises:
        UserError: As :func:`vizoo.tools.common.check_output`.
    """
    check_result(args.out)
    check_output(args.plot, "--plot", ".png")


def write_results(
    args: argparse.Namespace,
    result: dict[str, Any],
    tables: Callable[[dict[str, Any]], list[Table]],
    draw: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Print a result for people and write what was asked for, in the first of several processes.

    Args:
        args: ``out``, ``plot`` and ``json``.
        result: Figures, JSON-ready.
        tables: Makes of them what people read.
        draw: Draws them into a file.

    Returns:
        The result.
    """
    if not is_first_process():
        return result
    shown = tables(result)
    if not args.json:  # which the command prints
        print_tables(*shown)
    write_result(args.out, result, shown)
    if args.plot:
        draw(result, Path(args.plot))
    return result
