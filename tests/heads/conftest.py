"""Tiny pictures of shapes for detectors and segmentors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shapes import write


@pytest.fixture(autouse=True)
def _no_scope() -> Iterator[None]:
    """mmengine keeps the default scope of the last runner for the whole process: the next test starts without one."""
    yield
    registry = sys.modules.get("mmengine.registry")
    if registry is not None:
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in the layouts of COCO and ADE20K: 16 training and 6 validation pictures."""
    return write(tmp_path_factory.mktemp("shapes"))
