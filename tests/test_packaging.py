"""What a user installs: the wheel made from the source distribution made from this checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import vizoo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = [f for f in ("backbones", "heads", "tools", "configs") if (ROOT / f).is_dir()]
FLOORS = {"torch": "2.9", "timm": "1.0.31"}
DATA = {".yaml", ".csv", ".md"}
IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "output")


def run_backend(hook: str, source: Path, out: Path) -> Path:
    """Call one hook of the build backend in ``source``: offline, without an isolated environment."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools>=77, the build backend")
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "checkout"
    shutil.copytree(ROOT, source, symlinks=True, ignore=IGNORED)
    return run_backend("build_sdist", source, folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the unpacked source distribution, as ``python -m build`` does."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = (p for p in folder.iterdir() if p.is_dir())
    return run_backend("build_wheel", source, folder)


@pytest.fixture(scope="module")
def shipped(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_wheel_has_one_top_level_name(shipped: list[str]) -> None:
    assert {n.split("/")[0] for n in shipped} == {"vizoo", f"vizoo-{vizoo.__version__}.dist-info"}


def test_wheel_is_complete(shipped: list[str]) -> None:
    """Every module and data file of the folders is in the wheel, and nothing else is."""
    assert len(shipped) == len(set(shipped))
    expected = {f"vizoo/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    for folder in FOLDERS:
        paths = [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", *DATA} and "results" not in p.parts]
        assert paths, f"{folder}/ ships nothing"
        expected |= {f"vizoo/{p.relative_to(ROOT).as_posix()}" for p in paths}
    assert {n for n in shipped if ".dist-info/" not in n} == expected
    assert "vizoo/backbones/models.csv" in expected
    assert [n for n in expected if n.startswith("vizoo/configs/") and n.endswith(".yaml")]


def test_wheel_leaves_tests_and_results_out(shipped: list[str]) -> None:
    assert [n for n in shipped if {"tests", "results", "__pycache__"} & set(n.split("/"))] == []


def test_metadata(metadata: Message) -> None:
    """Name, version, licence files, and the floors that the code relies on."""
    assert metadata["Name"] == "vizoo"
    assert metadata["Version"] == vizoo.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE"} <= set(metadata.get_all("License-File", []))
    assert metadata.get_payload().strip(), "no long description: README.md is missing or empty"
    required = {r.name: r for r in map(Requirement, metadata.get_all("Requires-Dist", [])) if r.marker is None}
    for name, floor in FLOORS.items():
        assert Version(floor) in required[name].specifier
        (lowest,) = [s.version for s in required[name].specifier if s.operator == ">="]
        assert Version(lowest) == Version(floor), f"{name}>={lowest}"


def test_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        lines = archive.read(name).decode().split("\n")
    assert [line.replace(" ", "") for line in lines if "=" in line] == ["vizoo=vizoo.tools.cli:main"]


def test_sdist_holds_each_file_once(sdist: Path) -> None:
    """The links of ``src/vizoo`` must not bring a second copy of the folders."""
    with tarfile.open(sdist) as archive:
        members = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile() or m.issym()]
    assert len(members) == len(set(members))
    assert [n for n in members if n.startswith(tuple(f"src/vizoo/{f}/" for f in FOLDERS))] == []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert members.count(path.relative_to(ROOT).as_posix()) == 1, path.name
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"} <= set(members)
    assert "backbones/models.csv" in members


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import timm, vizoo
from vizoo.tools.cli import main
assert vizoo.__file__.startswith(sys.argv[1]), vizoo.__file__
print(sum(timm.models.model_entrypoint(n).__module__.startswith("vizoo.") for n in timm.list_models()))
sys.exit(main(["--version"]))
"""


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked away from the checkout, the wheel registers the same models and runs its command."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, version = done.stdout.split()
    assert version == vizoo.__version__
    assert int(count) > 0
