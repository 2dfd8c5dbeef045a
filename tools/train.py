"""``vizoo train``: train a classifier, a detector, a segmentor or OAT, all by one loop.

The tasks are in :mod:`vizoo.tools.training`; this module reads the options, of the task that
``--task`` names, and hands over.
"""

from __future__ import annotations

from collections.abc import Sequence

from vizoo.tools.common import run_tool
from vizoo.tools.training.options import asked_task
from vizoo.tools.training.parsers import parse_classifier, parse_dense, parse_scanpaths


def _train(argv: list[str]) -> int:
    task = asked_task(argv)
    if task == "scanpath":
        args = parse_scanpaths(argv)
        from vizoo.tools.training.scanpath import train_scanpaths

        return train_scanpaths(args)
    if task in ("detection", "segmentation"):
        args = parse_dense(task, argv)
        from vizoo.tools.training.dense import train_dense

        return train_dense(args)
    args = parse_classifier(argv)
    from vizoo.tools.training.classification import train_classifier

    return train_classifier(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Train.

    Args:
        argv: Arguments; None means ``sys.argv[1:]``.

    Returns:
        Exit status: 0 done, 1 the loss diverged, 2 bad input, 130 after Ctrl-C and 143 after SIGTERM.
    """
    return run_tool(_train, argv, "train")


if __name__ == "__main__":
    raise SystemExit(main())
