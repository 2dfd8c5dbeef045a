"""CONTRIBUTING's steps to a new backbone, gone in a copy of the checkout with the toy family, and nothing besides."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"
BY_HAND = {"backbones/toy.py", "backbones/__init__.py", "backbones/models.csv", "tests/backbones/test_toy.py"}
BY_COMMANDS = {
    "README.md",
    "NOTICE",
    "docs/models/toy.md",
    "tests/golden/toy.npz",
}  # and the row in models.csv
# as CONTRIBUTING says, but for the rest of the suite; in one process, which imports PyTorch once
COMMANDS = """
import sys
sys.path[:0] = ["tests"]
import pytest, record_golden
from vizoo.tools import table
record = "toy --checkout tests/toy --call official:Net --kwargs classes=10 --input 2 3 64 64 --origin"
assert record_golden.main([*record.split(), "tests/toy/official.py"]) == 0
assert table.main(["test_toy"]) == 0
assert table.main(["--check", "test_toy"]) == 0
left_out = "light or too_deep"  # the time of an import; that torchvision cannot trace, as it can trace the toy
chosen = f"(toy or layout) and not ({left_out})"
sys.exit(pytest.main(["tests/backbones", "tests/test_layout.py", "-q", "-n0", "-m", "not slow", "-k", chosen]))
"""


def files(root: Path) -> dict[str, str]:
    """Digest of every file by its path."""
    found = (
        p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts and ".pytest_cache" not in p.parts
    )
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def insert(path: Path, line: str, begin: str = "") -> None:
    """Put a line in order among those that begin alike."""
    lines = path.read_text(encoding="utf-8").splitlines()
    alike = [i for i, other in enumerate(lines) if other.startswith(begin)]
    at = next((i for i in alike if lines[i] > line), alike[-1] + 1)
    path.write_text("\n".join([*lines[:at], line, *lines[at:]]) + "\n", encoding="utf-8")


def test_a_new_family_touches_four_files(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in ("backbones", "heads", "tools", "configs", "docs", "src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignored)
    for name in ("README.md", "NOTICE", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "tools/results", root / "tools/results")
    for name in ("backbones", "heads", "tools", "configs"):  # a source distribution has no links
        if not (root / "src/vizoo" / name).exists():
            (root / "src/vizoo" / name).symlink_to(root / name)
    before = files(root)
    shutil.copy(TOY / "family.py", root / "backbones/toy.py")
    shutil.copy(TOY / "tests_of_family.py", root / "tests/backbones/test_toy.py")
    insert(root / "backbones/__init__.py", "from . import toy as toy", "from . import")
    insert(root / "backbones/models.csv", "test_toy,,for tests")
    by_hand = {name for name, digest in files(root).items() if before.get(name) != digest}
    assert by_hand == BY_HAND
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests'}"}
    words = [sys.executable, "-c", COMMANDS]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = files(root)
    assert {name for name, digest in after.items() if before.get(name) != digest} == BY_HAND | BY_COMMANDS
    assert before.keys() <= after.keys()
    row = next(
        line for line in (root / "backbones/models.csv").read_text().splitlines() if line.startswith("test_toy,")
    )
    assert row.startswith("test_toy,,for tests,toy,classification")
    assert "tests/toy/official.py, Apache-2.0" in (root / "NOTICE").read_text()
    assert '"A Toy", nowhere, [arXiv 0000.00000]' in (root / "README.md").read_text()
    assert "| `toy` |" in (root / "docs/models/toy.md").read_text()
