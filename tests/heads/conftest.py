"""Tiny pictures of shapes for detectors and segmentors."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import write


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in the layouts of COCO and ADE20K: 16 training and 6 validation pictures."""
    return write(tmp_path_factory.mktemp("shapes"))
