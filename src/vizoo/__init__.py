"""Vision backbones on the timm interface: with this package imported, timm knows every model.

The models are registered at the end of ``import timm``, at once where timm is there already.  So ``import vizoo`` by
itself imports neither torch nor timm, which take seconds.  The hook is our own because that of wrapt forgets a
registration that failed, so that a second ``import timm`` goes without the models, and takes as long as a help text.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import backbones as backbones


def __getattr__(name: str) -> Any:
    """``vizoo.backbones``, imported when it is first asked for."""
    if name == "backbones":
        return importlib.import_module("vizoo.backbones")
    raise AttributeError(f"module 'vizoo' has no attribute {name!r}")


class _Timm:
    """Loader of timm that registers our models when timm is loaded; all else is as its own loader does it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module("vizoo.backbones")


class _TimmFinder:
    """Finds timm as the finders behind it do.  It stays, so that an import that failed fails again in full."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm":
            return None
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:  # type: ignore[arg-type]
            find = getattr(finder, "find_spec", None)  # which finders for Python 2 lack
            spec = find(name, path, target) if find else None
            if spec is not None:
                spec.loader = _Timm(spec.loader)
                return spec
        return None


def _register() -> None:
    for package in ("torch", "timm"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"vizoo needs {package}, which is not installed", name=package)
    if "timm" in sys.modules:
        importlib.import_module("vizoo.backbones")
    else:
        sys.meta_path.insert(0, _TimmFinder)  # type: ignore[arg-type]


_register()
