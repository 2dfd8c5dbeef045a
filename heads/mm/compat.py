"""What mmengine needs on current PyTorch and setuptools: safe loading of checkpoints, bases of installed packages."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import package_utils

from ..checkpoints import mmengine_checkpoints

__all__ = ["config_path", "find_configs", "load_safely"]


def load_safely() -> None:
    """Let mmengine read its training checkpoints, from wherever they come, and run nothing in them.

    Files, addresses and registered schemes all pass ``CheckpointLoader.load_checkpoint``; PyTorch's own list of allowed
    names is untouched outside of it.  A config in ``meta``, a program of which a resumed run reads ``gpu_ids``, is left
    out.
    """
    theirs = CheckpointLoader.load_checkpoint.__func__
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with mmengine_checkpoints(HistoryBuffer):
            found = theirs(*args, **kwargs)
        meta = found.get("meta") if isinstance(found, dict) else None
        if isinstance(meta, dict):
            meta.pop("config", None)
        return found

    CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)


def find_configs() -> None:
    """Make ``mmdet::`` and ``mmseg::`` bases work with every set of packages.

    mmengine looks packages up by the name of their distribution, which forks change, and with ``pkg_resources``, which
    setuptools 82 no longer has.
    """
    for module in ("mmdet", "mmseg"):
        if importlib.util.find_spec(module) is not None and not _distribution_exists(MODULE2PACKAGE[module]):
            owners = metadata.packages_distributions().get(module)
            if owners:
                MODULE2PACKAGE[module] = owners[0]
    if importlib.util.find_spec("pkg_resources") is None:
        _replace(package_utils.is_installed, _is_installed)
        _replace(package_utils.get_installed_path, _installed_path)


def _replace(theirs: Any, ours: Any) -> None:
    """Put a function in the place of another in every module of mmengine; those imported later take it from there."""
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "mmengine"]:
        for name in [name for name, value in vars(module).items() if value is theirs]:
            setattr(module, name, ours)


def _distribution_exists(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _module_of(package: str) -> str:
    """Module of a distribution, or the name itself when it is one of a module."""
    return next((module for module, name in MODULE2PACKAGE.items() if name == package), package)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(_module_of(package)) is not None


def _installed_path(package: str) -> str:
    spec = importlib.util.find_spec(_module_of(package))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return str(Path(spec.origin).parent)


def config_path(name: str) -> str:
    """Absolute path of a config of the zoo, for ``_base_`` of your own configs.

    A ``_base_`` line is an expression:
    ``_base_ = __import__("vizoo.heads.mm", fromlist=["mm"]).config_path("detection/mmdet/NAME.py")``.

    Args:
        name: Path below the ``configs`` folder, or the name of the file alone, with or without its ending.

    Returns:
        The path of the installed file.

    Raises:
        ValueError: If there is no such file.
    """
    root = Path(str(resources.files("vizoo.configs")))
    if (root / name).is_file():
        return str(root / name)
    known = {p.stem: p for p in sorted(root.glob("*/mm*/*.py"))}
    stem = name.removesuffix(".py")
    if stem not in known:
        near = difflib.get_close_matches(stem, known, n=3, cutoff=0.3)
        raise ValueError(f"got config name={name!r}, which vizoo does not have; near: {', '.join(near) or 'none'}")
    return str(known[stem])
