"""The files of the checkout, as git knows them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked() -> list[Path]:
    """The tracked files, links left out; a test that asks outside of a git checkout is skipped."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout: the list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]
