"""Maps the top-level folders to the package ``vizoo`` and makes the long description; the rest is in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup

NAME, FOLDERS = "vizoo", ("backbones", "heads", "tools", "configs")
SUBPACKAGES = [f"{d}.{p}" for d in FOLDERS for p in find_namespace_packages(d, exclude=["results*"])]
ROOT = Path(__file__).parent
LINK = re.compile(r"!?\[([^\]]+)\]\(([^)#\s]+)[^)]*\)")


def named(link: re.Match[str]) -> str:
    """A link to a file of the repository, which leads nowhere from a package index, as its text and the file's name."""
    text, path = link.groups()
    if not (ROOT / path).exists():
        return link[0]
    return text if path in text else f"{text} ({path})"


shutil.rmtree(ROOT / "build/lib", ignore_errors=True)  # setuptools would pack what an earlier build left there
setup(
    packages=[NAME, *(f"{NAME}.{p}" for p in (*FOLDERS, *SUBPACKAGES))],
    py_modules=["_vizoo_pytest"],  # pytest imports it in every session, so it is not in the package
    package_dir={"": "src", NAME: f"src/{NAME}", **{f"{NAME}.{d}": d for d in FOLDERS}},
    long_description=LINK.sub(named, (ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
