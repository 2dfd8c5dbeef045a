"""Data and finished runs of every task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs as made
import torch
from card import Card

from vizoo.tools.training import loop


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As :func:`runs.write` says."""
    return made.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each task, trained; not to be changed."""
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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Card]:
    """A GPU that needs so many seconds to launch a call and to work on it."""

    def make(launch: float, busy: float) -> Card:
        card = Card(launch, busy)
        for name, fake in {"synchronize": card.synchronize, "Event": card.event, "_sleep": card.spin}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        return card

    return make
