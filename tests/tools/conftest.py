"""Data and finished runs of every task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import runs as made
import torch

from vizoo.tools.training import loop


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As :func:`runs.write` says."""
    return made.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each task, trained; not to be changed."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    for task in made.TASKS:
        assert made.start(task, folders, root / task) == 0
    return root


@pytest.fixture
def no_curves() -> Iterator[None]:
    """Pictures are empty but in :func:`runs`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", made.draw_nothing)
        yield
