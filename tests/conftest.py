"""Set-up of every test: one thread, Triton's interpreter without a GPU, seeds, needs of markers, poisoned memory."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread in every process that a test starts as well: the workers have one core each, and threads of OpenMP that
# wait for a core spin for a whole time slice of the system, again and again.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.utils._device

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported, so set before any of them

NEEDS = {
    "gpu": (torch.cuda.is_available, "needs a CUDA device, torch.cuda.is_available() is false"),
    "mm": (lambda: importlib.util.find_spec("mmengine") is not None, "needs mmengine (extra mm), not installed"),
}
SEED = 42
gc.disable()  # until all is collected, for what is imported and collected stays


def _seed() -> None:
    """Seed everything that draws, so that no test depends on those before it in its worker."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="also run the tests that need the internet")


def pytest_collectstart() -> None:
    """Modules draw the same numbers each time that they are imported."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures of modules draw the same numbers whichever test needs them first."""
    _seed()


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of all garbage collections to come: none of it goes."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {name: reason for name, (present, reason) in NEEDS.items() if not present()}
    if not config.getoption("--network"):
        missing["network"] = "needs the internet: pass --network"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Give every test one thread (sums in one order), seeds, the default dtype and gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _seed()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def _no_scope() -> Iterator[None]:
    """mmengine keeps the default scope of the last runner for the whole process: the next test starts without one."""
    yield
    registry = sys.modules.get("mmengine.registry")
    if registry is not None:
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(scope="module")
def fast_parsing() -> Iterator[None]:
    """mmengine reads a hundred metafiles and reloads a package for every ``mmdet::`` base, and lays the config out anew
    for every checkpoint: once is enough here.
    """
    from mmengine.config import config, utils
    from yapf.yapflib.yapf_api import FormatCode

    import vizoo.heads.mm  # noqa: F401 - before anything of mmengine

    laid_out = {}

    def lay_out(text: str, **options: Any) -> Any:
        if text not in laid_out:
            laid_out[text] = FormatCode(text, **options)
        return laid_out[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load", functools.cache(utils.load))
        patch.setattr(config, "is_installed", functools.cache(config.is_installed))
        patch.setattr(config, "FormatCode", lay_out)
        yield


def _called_by_us(depth: int) -> bool:
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("vizoo.")


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty*`` returns to vizoo with NaN, so that an output that was not written shows."""

    def poison(function):
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            if not torch.compiler.is_compiling() and _called_by_us(2) and (out.is_floating_point() or out.is_complex()):
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return wrapper

    torch.utils._device._device_constructors()  # caches the functions that obey torch.device: the true ones
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _nan_empty_in_ops_and_layers(request: pytest.FixtureRequest) -> None:
    """Operators and the layers around them are always tested on poisoned memory."""
    if {Path(__file__).parent / folder for folder in ("ops", "layers")} & set(request.path.parents):
        request.getfixturevalue("nan_empty")
