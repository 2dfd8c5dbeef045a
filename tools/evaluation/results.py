"""What ``vizoo evaluate`` of every task takes and leaves: the run, ``--out``, ``--plot`` and ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vizoo.tools.common import check_output, is_first_process, write_json
from vizoo.tools.options import add


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
    add(parser, "--out", ".json")
    add(parser, "--plot", f".png: {picture}")
    add(parser, "--json")


def check_results(args: argparse.Namespace) -> None:
    """Say before any work starts that a result cannot be written.

    Args:
        args: ``out`` and ``plot``.

    Raises:
        UserError: As :func:`vizoo.tools.common.check_output`.
    """
    check_output(args.out, "--out", ".json")
    check_output(args.plot, "--plot", ".png")


def write_results(
    args: argparse.Namespace,
    result: dict[str, Any],
    report: Callable[[dict[str, Any]], None],
    draw: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Print a result for people and write what was asked for, in the first of several processes.

    Args:
        args: ``out``, ``plot`` and ``json``.
        result: Figures, JSON-ready.
        report: Prints them for people.
        draw: Draws them into a file.

    Returns:
        The result.
    """
    if not is_first_process():
        return result
    if not args.json:  # which the command prints
        report(result)
    if args.out:
        write_json(args.out, result)
    if args.plot:
        draw(result, Path(args.plot))
    return result
