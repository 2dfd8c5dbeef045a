"""Golden cases: what a paper's official model answers for weights and inputs that are rebuilt from names alone.

A case is one ``golden/NAME.npz``: ``keys`` (JSON, official state-dict name -> [shape, dtype]), ``meta`` (JSON, origin
and constructor arguments), ``input_shape``, and one array for every recorded output.  No weights are stored: each
tensor is drawn from the CRC-32 of its name.  ``RandomState`` is used because NumPy keeps its stream frozen.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

FOLDER = Path(__file__).with_suffix("")
FIELDS = ("keys", "meta", "input_shape")


class Case(NamedTuple):
    """One recorded case; ``outputs`` maps the name of an output to its tensor."""

    keys: dict[str, list]
    meta: dict[str, Any]
    input_shape: tuple[int, ...]
    outputs: dict[str, Tensor]


def load(name: str | Path) -> Case:
    """Read a case by name (``"litv2_s"``) or by path."""
    path = name if isinstance(name, Path) else FOLDER / f"{name}.npz"
    with np.load(path, allow_pickle=False) as archive:
        keys, meta = (json.loads(str(archive[field])) for field in FIELDS[:2])
        shape = tuple(int(n) for n in archive["input_shape"])
        outputs = {key: torch.from_numpy(archive[key]) for key in archive.files if key not in FIELDS}
    return Case(keys, meta, shape, outputs)


def names(prefix: str = "") -> list[str]:
    """Names of the stored cases that start with ``prefix``."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz"))


def _draw(name: str, shape: list[int]) -> np.ndarray:
    """Values of one floating tensor, scaled by its role so that activations stay of order one."""
    noise = RandomState(zlib.crc32(name.encode())).standard_normal
    role = name.rpartition(".")[2]
    if role == "running_var":
        return np.asarray(0.5 + np.abs(noise(shape)))
    if role not in ("running_mean", "bias"):
        if role == "weight" and len(shape) == 1:
            return np.asarray(1.0 + 0.1 * noise(shape))
        if len(shape) >= 2:
            return noise(shape) / math.sqrt(max(1, int(np.prod(shape[1:]))))
    return np.asarray(0.1 * noise(shape))


def weights(keys: dict[str, list]) -> dict[str, Tensor]:
    """The official state dict of a case: integer and boolean tensors are zero, the others drawn from their names."""
    state = {}
    for name, (shape, dtype) in keys.items():
        counts = "int" in dtype or "bool" in dtype
        values = np.zeros(shape) if counts else _draw(name, shape)
        state[name] = torch.from_numpy(values).to(getattr(torch, dtype.removeprefix("torch.")))
    return state


def image(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard-normal float32 input of ``shape``."""
    return torch.from_numpy(RandomState(seed).standard_normal(tuple(shape)).astype("float32"))


def thin(features: Iterable[Tensor], strides: dict[str, list[int]]) -> dict[str, Tensor]:
    """Every c-th channel and s-th row and column of maps, ``strides`` being name -> [c, s] in the order of the maps."""
    named = zip(sorted(strides), features, strict=True)
    return {name: x[:, :: strides[name][0], :: strides[name][1], :: strides[name][1]] for name, x in named}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error ``||actual - expected|| / ||expected||`` in float32."""
    difference = (actual.float() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-12)).item()
