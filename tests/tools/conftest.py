"""Data and finished runs of every task."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs as made
import torch


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
