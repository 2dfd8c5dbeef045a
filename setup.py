"""Maps the top-level folders to the package ``vizoo``; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

NAME, FOLDERS = "vizoo", ("backbones", "heads", "tools", "configs")
SUBPACKAGES = [f"{d}.{p}" for d in FOLDERS for p in find_namespace_packages(d, exclude=["results*"])]
setup(
    packages=[NAME, *(f"{NAME}.{p}" for p in (*FOLDERS, *SUBPACKAGES))],
    package_dir={NAME: f"src/{NAME}", **{f"{NAME}.{d}": d for d in FOLDERS}},
)
