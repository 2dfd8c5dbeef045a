"""``vizoo evaluate``: measure and draw what was trained: classes, boxes, masks, scanpaths beside people's.

The tasks are in :mod:`vizoo.tools.evaluation`; this module finds out which one a run is of, reads its
options and hands over.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from vizoo.tools.common import is_first_process, print_json, run_tool
from vizoo.tools.evaluation.parsers import classifier_parser, dense_parser, scanpath_parser
from vizoo.tools.training.options import asked_task


def _evaluate(argv: list[str]) -> int:
    asked = "--json" in argv
    with contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext():
        result = _measure(argv)
    if asked and is_first_process():
        print_json(result)
    return 0


def _measure(argv: list[str]) -> dict[str, Any]:
    task = asked_task(argv)
    if task == "scanpath":
        args = scanpath_parser().parse_args(argv)
        from vizoo.tools.evaluation.scanpath import evaluate_scanpaths

        return evaluate_scanpaths(args)
    if task in ("detection", "segmentation"):
        args = dense_parser(task).parse_args(argv)
        from vizoo.tools.evaluation.dense import evaluate_dense

        return evaluate_dense(task, args)
    args = classifier_parser().parse_args(argv)
    from vizoo.tools.evaluation.classification import evaluate_classifier

    return evaluate_classifier(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was trained; returns the exit status: 0 done, 1 if it cannot be measured, 2 bad input."""
    return run_tool(_evaluate, argv, "evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
