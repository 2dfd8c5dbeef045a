"""Maps the top-level folders to the package ``vizoo`` and makes the long description; the rest is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

NAME, FOLDERS = "vizoo", ("backbones", "heads", "tools", "configs")
SUBPACKAGES = [f"{d}.{p}" for d in FOLDERS for p in find_namespace_packages(d, exclude=["results*"])]
README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
# Pictures and links into the repository lead nowhere from a package index: pictures go, links become their text
PICTURE, LINK = r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)"
setup(
    packages=[NAME, *(f"{NAME}.{p}" for p in (*FOLDERS, *SUBPACKAGES))],
    package_dir={NAME: f"src/{NAME}", **{f"{NAME}.{d}": d for d in FOLDERS}},
    long_description=re.sub(LINK, r"\1", re.sub(PICTURE, "", README)),
    long_description_content_type="text/markdown",
)
