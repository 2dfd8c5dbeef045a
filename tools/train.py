"""``vizoo train``: train a classifier, a detector, a segmentor or OAT, all by one loop.

The tasks are in :mod:`vizoo.tools.training`; this module reads ``--task`` and hands over.
"""

from __future__ import annotations

from collections.abc import Sequence

from vizoo.tools.common import run_tool
from vizoo.tools.training.options import asked_task


def _train(argv: list[str]) -> int:
    task = asked_task(argv)
    if task == "scanpath":
        from vizoo.tools.training.scanpath import train_scanpaths

        return train_scanpaths(argv)
    if task in ("detection", "segmentation"):
        from vizoo.tools.training.dense import train_dense

        return train_dense(task, argv)
    from vizoo.tools.training.classification import train_classifier

    return train_classifier(argv)


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
