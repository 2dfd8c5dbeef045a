"""What a user installs: the wheel made from the source distribution made from this checkout."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT, tracked
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import vizoo

pytestmark = pytest.mark.slow

FOLDERS = [f for f in ("backbones", "heads", "tools", "configs") if (ROOT / f).is_dir()]
FLOORS = {"torch": "2.9", "timm": "1.0.31"}
DATA = {".yaml", ".csv", ".md", ".json", ".html"}
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
    left = source / "build/lib/vizoo/backbones/removed.py"  # as of an earlier build in the same checkout
    left.parent.mkdir(parents=True)
    left.touch()
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
    """But for the plugin of pytest, which must not import the package."""
    names = {"vizoo", "_vizoo_pytest.py", f"vizoo-{vizoo.__version__}.dist-info"}
    assert {n.split("/")[0] for n in shipped} == names


def test_wheel_is_complete(shipped: list[str]) -> None:
    """Every module and data file of the folders is in the wheel, and nothing else is."""
    assert len(shipped) == len(set(shipped))
    expected = {"_vizoo_pytest.py", *(f"vizoo/{name}" for name in ("__init__.py", "__main__.py", "py.typed"))}
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
    assert metadata["Author"] == citation()["authors"][0]["name"]
    required = {r.name: r for r in map(Requirement, metadata.get_all("Requires-Dist", [])) if r.marker is None}
    for name, floor in FLOORS.items():
        assert Version(floor) in required[name].specifier
        (lowest,) = [s.version for s in required[name].specifier if s.operator == ">="]
        assert Version(lowest) == Version(floor), f"{name}>={lowest}"


def test_pythons(metadata: Message) -> None:
    """The classifiers name each Python from the first that is allowed, and linted for, to the last that was tried."""
    classifiers = metadata.get_all("Classifier", [])
    minors = [int(found[1]) for c in classifiers if (found := re.search(r"Python :: 3\.(\d+)$", c))]
    assert minors == list(range(minors[0], minors[-1] + 1))
    allowed = SpecifierSet(metadata["Requires-Python"])
    assert [v for v in range(minors[0] - 1, minors[-1] + 1) if f"3.{v}" in allowed] == minors
    assert f'target-version = "py3{minors[0]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_long_description(metadata: Message) -> None:
    """It is README.md with its links into the repository, which lead nowhere from a package index, as text."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme, text = (ROOT / "README.md").read_text(encoding="utf-8"), metadata.get_payload()
    assert re.findall(r"\]\((?!https?:|#)|(?:src|href|srcset)=\"(?!https?:|#)", text) == []
    assert text.count("\n") == readme.count("\n")
    assert text.count("](http") == readme.count("](http")
    paths = re.findall(r"\]\((?!https?:|#)([^)#]+)", readme)
    assert paths
    assert [p for p in paths if p not in text] == []


def test_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        lines = archive.read(name).decode().split("\n")
    found = [line.replace(" ", "") for line in lines if "=" in line]
    assert found == ["vizoo=vizoo.tools.cli:main", "vizoo=_vizoo_pytest"]  # the command, and the plugin of pytest


def test_sdist_holds_each_file_once(sdist: Path) -> None:
    """The links of ``src/vizoo`` must not bring a second copy of the folders."""
    with tarfile.open(sdist) as archive:
        members = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile() or m.issym()]
    assert len(members) == len(set(members))
    assert [n for n in members if n.startswith(tuple(f"src/vizoo/{f}/" for f in FOLDERS))] == []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert members.count(path.relative_to(ROOT).as_posix()) == 1, path.name


def test_sdist_holds_what_its_tests_read(sdist: Path) -> None:
    """All that is tracked but links and what git itself reads, and nothing that running left behind."""
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
        assert archive.getmember(f"vizoo-{vizoo.__version__}/.ci/run").mode & 0o100
    names = {p.relative_to(ROOT).as_posix() for p in tracked()}
    assert names - members == {".gitignore"}
    made = {"PKG-INFO", "setup.cfg"} | {n for n in members if n.startswith("vizoo.egg-info/")}
    left = members - names - made
    assert [n for n in left if n.startswith(".") or "cache" in n or n.endswith((".pyc", ".log"))] == []


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_citation() -> None:
    """CITATION.cff has what its format 1.2.0 asks for, and the version of the package."""
    found = citation()
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "abstract", "keywords", "license"} <= found.keys()
    assert found["version"] == vizoo.__version__
    assert found["type"] == "software"


FIELDS = {  # attributes of each type of GitHub's forms: those that must be there, and all
    "markdown": ({"value"}, {"value"}),
    "input": ({"label"}, {"label", "description", "placeholder", "value"}),
    "textarea": ({"label"}, {"label", "description", "placeholder", "value", "render"}),
    "dropdown": ({"label", "options"}, {"label", "options", "description", "multiple"}),
    "checkboxes": ({"label", "options"}, {"label", "options", "description"}),
}


@pytest.mark.parametrize("name", ["bug", "model"])
def test_issue_forms(name: str) -> None:
    """GitHub shows no form that has an unknown key or type, two fields of one name, or nothing to fill in."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form.keys() == {"name", "description", "body"}
    for field in form["body"]:
        must, may = FIELDS[field["type"]]
        assert must <= field["attributes"].keys() <= may
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field.get("validations", {"required": True}).keys() == {"required"}
    fields = [f for f in form["body"] if f["type"] != "markdown"]
    for names in ([f["id"] for f in fields], [f["attributes"]["label"] for f in fields]):
        assert names
        assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[\w-]+", f["id"]) for f in fields)


def test_forms_ask_for_the_machine() -> None:
    for page in ("ISSUE_TEMPLATE/bug.yml", "PULL_REQUEST_TEMPLATE.md"):
        assert "`vizoo env`" in (ROOT / ".github" / page).read_text(encoding="utf-8"), page


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
