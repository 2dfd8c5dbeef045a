"""Golden cases: what a paper's official model answers for weights and inputs that are rebuilt from names alone.

A case is one ``golden/NAME.npz``: ``keys`` (JSON, official state-dict name -> [shape, dtype]), ``meta`` (JSON, origin
and constructor arguments), ``input_shape``, and one array for every recorded output.  No weights are stored: each
tensor is drawn from the CRC-32 of its name.  ``RandomState`` is used because NumPy keeps its stream frozen.

``record_golden.py`` records cases.  In its ``keys`` a third entry says that a tensor is not drawn: a number fills it,
``"stored"`` stands for the array ``state/NAME``; in its ``meta``, ``draw`` lists the inputs, and ``strides`` says which
outputs are thinned.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

FOLDER = Path(__file__).with_suffix("")
FIELDS = ("keys", "meta", "input_shape")
STATE = "state/"  # arrays of weights that are not drawn
LARGEST = 300 * 1024  # bytes of a file
SCALES = {"normal": 1.0, "large": 1e4, "tiny": 1e-40}  # of a drawn input; float32 has no normal number below 1e-38


class Case(NamedTuple):
    """One recorded case; ``outputs`` maps the name of an output to its tensor, ``keys`` is what ``weights`` takes."""

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
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key not in FIELDS}
    for key, entry in keys.items():
        if entry[2:] == ["stored"]:
            entry[2] = arrays[STATE + key]
    outputs = {key: value for key, value in arrays.items() if not key.startswith(STATE)}
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
    """The official state dict of a case.

    Args:
        keys: Name -> [shape, dtype], drawn from the name, or zero for integers and booleans; or name ->
            [shape, dtype, value], a number or a tensor.

    Returns:
        Name -> tensor, in the order of the keys.
    """
    state = {}
    for name, (shape, dtype, *given) in keys.items():
        counts = "int" in dtype or "bool" in dtype
        if given:
            values = torch.zeros(shape, dtype=torch.float64) + given[0]
        else:
            values = torch.from_numpy(np.zeros(shape) if counts else _draw(name, shape))
        state[name] = values.to(getattr(torch, dtype.removeprefix("torch.")))
    return state


def image(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard-normal float32 input of ``shape``."""
    return torch.from_numpy(RandomState(seed).standard_normal(tuple(shape)).astype("float32"))


def special(shape: tuple[int, ...], seed: int = 0, kind: str | float = "normal") -> Tensor:
    """Float32 input of ``shape``: drawn, at a scale of ``SCALES``, ``"impulse"`` (a one in the middle), or a number."""
    if kind in SCALES:
        return (image(shape, seed).double() * SCALES[str(kind)]).float()
    x = torch.zeros(shape)
    if kind == "impulse":
        x[tuple(n // 2 for n in shape)] = 1.0
        return x
    return x + float(kind)


def inputs(case: Case) -> list[Tensor]:
    """The inputs of a case of ``record_golden.py``."""
    return [special(tuple(shape), seed, kind) for shape, seed, kind in case.meta["draw"]]


def thin(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Every n-th entry of the leading dimensions, one number for each of them."""
    return x[tuple(slice(None, None, n) for n in strides)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error ``||actual - expected|| / ||expected||`` in float32."""
    difference = (actual.float() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-12)).item()
