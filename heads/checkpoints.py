"""Checkpoints of detectors and segmentors: mmengine's own, and those that the authors of a backbone published.

Nothing that such a file holds is run: PyTorch's restricted unpickler reads it, and what it may name beyond tensors is
answered by the classes and functions of this module, which check their arguments.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vizoo.backbones.layers.checkpoint import unwrap

__all__ = ["NUMPY_GLOBALS", "convert_checkpoint", "mmengine_checkpoints", "read_checkpoint", "state_of"]


# what NumPy's pickles name


class _DType:
    """Stands for ``numpy.dtype``, whose own ``__setstate__`` takes any: raw bytes then become pointers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSUO]\d+", code):
            raise UnpicklingError(f"NumPy type {code!r} is none of numbers, text and objects")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|"):
            raise UnpicklingError(f"NumPy type {self.dtype} with the state {state!r}")
        dtype = self.dtype.newbyteorder(order)
        if dtype.__reduce__()[2] != state:
            raise UnpicklingError(f"NumPy type {self.dtype} with the state {state!r}")
        self.dtype = dtype


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``: only :func:`_reconstruct` makes one, and it is written as a plain array."""

    def __new__(cls, *args: Any) -> _Array:
        raise UnpicklingError("a NumPy array that NumPy did not write")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _DType):
            raise UnpicklingError("a NumPy array that NumPy did not write")
        version, shape, kind, fortran, data = state
        dtype, size = kind.dtype, _size(shape)
        expected = list if dtype.hasobject else bytes
        if type(data) is not expected or len(data) != size * (1 if dtype.hasobject else dtype.itemsize):
            raise UnpicklingError(f"a NumPy array of shape {shape} and type {dtype} with other contents")
        super().__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.asarray(self).__reduce_ex__(protocol)

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


def _size(shape: Any) -> int:
    """Number of elements of a shape."""
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise UnpicklingError(f"a NumPy array of shape {shape!r}")
    return math.prod(shape)


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """An empty array, which the unpickler then fills by its ``__setstate__``."""
    if subtype is not _Array:
        raise UnpicklingError(f"a NumPy array of class {subtype!r}")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(kind: Any, data: Any) -> Any:
    """One number of NumPy."""
    if not isinstance(kind, _DType) or type(data) is not bytes or len(data) != kind.dtype.itemsize:
        raise UnpicklingError("a NumPy scalar that NumPy did not write")
    return np.frombuffer(data, kind.dtype)[0]


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """An array of the fifth pickle protocol."""
    if not isinstance(kind, _DType) or order not in ("C", "F"):
        raise UnpicklingError("a NumPy array that NumPy did not write")
    if len(data) != _size(shape) * kind.dtype.itemsize:
        raise UnpicklingError(f"a NumPy array of shape {shape} and type {kind.dtype} with other contents")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode`` as pickles of bytes use it."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnpicklingError(f"text in the encoding {encoding!r}, need 'latin1'")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    """``bytes``, by which pickles of the second protocol make empty ones."""
    if args:
        raise UnpicklingError("bytes that a pickle did not write")
    return b""


NUMPY_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
"""All that a pickle of NumPy arrays and numbers (NumPy 1 and 2, every protocol) may name: (module, name) -> what to
give for it, for ``find_class`` of an unpickler.  None of them is NumPy's own: they check what they are given, raise
``pickle.UnpicklingError``, and make numbers, text and objects, no structured types."""


# what checkpoints of mmengine name


class _HistoryBuffer:
    """Stands for the class of mmengine where that is not installed; its contents are logs of the training."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@functools.cache
def _mmengine_globals(history_buffer: type) -> dict[tuple[str, str], Any]:
    """As :data:`NUMPY_GLOBALS`, with ``HistoryBuffer`` and the ``getattr`` by which it names its methods."""

    class Logs(history_buffer):  # type: ignore[misc]
        """Becomes a ``history_buffer`` once its state is checked."""

        def __init__(self, *args: Any) -> None:
            raise UnpicklingError("a HistoryBuffer that mmengine did not write")

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict):
                raise UnpicklingError("a HistoryBuffer that mmengine did not write")
            checked: dict[str, Any] = {"statistics_methods": {}}  # those of the class: no file decides what is called
            for key in state.keys() - {"statistics_methods"}:
                value = state[key]
                if key == "max_length" and type(value) is int:
                    checked[key] = value
                elif key in ("_log_history", "_count_history") and _is_numbers(value):
                    checked[key] = np.asarray(value)
                else:
                    raise UnpicklingError(f"a HistoryBuffer with {key}={type(value).__name__}")
            super().__setstate__(checked)
            self.__class__ = history_buffer

    def method(cls: Any, name: Any) -> None:
        if cls is not Logs or not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise UnpicklingError(f"attribute {name!r} of {cls!r}")

    return {
        **NUMPY_GLOBALS,
        ("mmengine.logging.history_buffer", "HistoryBuffer"): Logs,
        ("builtins", "getattr"): method,
    }


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "biufc"


_LOADING = threading.RLock()  # PyTorch keeps one list for the process


@contextlib.contextmanager
def mmengine_checkpoints(history_buffer: type = _HistoryBuffer) -> Iterator[None]:
    """Let ``torch.load`` read training checkpoints of mmengine within the block, and run nothing in them.

    ``weights_only`` is on for every call in the block, whatever its argument says, as PyTorch's
    ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` does; only ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` of the user goes before it.
    Names that the user allowed stay allowed, but for those that this module answers.

    Args:
        history_buffer: ``mmengine.logging.HistoryBuffer``, for logs that mmengine can use.

    Yields:
        Nothing.
    """
    ours = [(what, f"{module}.{name}") for (module, name), what in _mmengine_globals(history_buffer).items()]
    names = {name for _, name in ours}
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _LOADING:
        replaced = [g for g in torch.serialization.get_safe_globals() if _name(g) in names]
        before = os.environ.get(switch)
        _exchange(replaced, ours)
        if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:
            os.environ[switch] = "1"
        try:
            yield
        finally:
            _exchange(ours, replaced)
            os.environ.pop(switch, None)
            if before is not None:
                os.environ[switch] = before


def _exchange(old: list[Any], new: list[Any]) -> None:
    """Take ``old`` from PyTorch's list of allowed names and add ``new``."""
    kept = [g for g in torch.serialization.get_safe_globals() if g not in old]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*kept, *new])


def _name(allowed: Any) -> str:
    """Full name of an entry of PyTorch's list."""
    return str(allowed[1]) if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


# reading


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of mmengine, mmcv or PyTorch without running any code in it.

    Args:
        path: The file.

    Returns:
        Its contents.

    Raises:
        ValueError: If there is no such file, or it holds anything but tensors, plain values and mmengine's logs.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        with mmengine_checkpoints():
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever an unpickler raises
        raise ValueError(f"{str(path)!r} is not a checkpoint that PyTorch reads safely: {_reason(e)}") from e
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(found).__name__}, need a dictionary")
    return found


def _reason(e: Exception) -> str:
    """One line of what PyTorch says in many, without its advice to unpickle everything."""
    text = str(e).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
    text = re.split(r"(?<=\w)\. |Please use|, please", text)[0].strip()
    return text or type(e).__name__


def state_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that mmengine takes from a checkpoint: of ``state_dict``, without the prefix ``module.``.

    Args:
        checkpoint: Checkpoint or state dict.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: If it holds anything else under a name.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise ValueError("the checkpoint holds no weights")
    foreign = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if foreign:
        raise ValueError(f"the checkpoint holds {type(state[foreign[0]]).__name__} under {foreign[0]!r}, need tensors")
    return {k.removeprefix("module."): v for k, v in state.items()}


def convert_checkpoint(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Names of a detector or segmentor published by a backbone's authors, or trained here, -> those of ``model``.

    Necks and heads kept their names since mmdet 2 and mmseg 0; the backbone goes through the family's
    ``checkpoint_filter_fn``.

    Args:
        checkpoint: Checkpoint or state dict.
        model: Detector or segmentor with a :class:`vizoo.heads.features.FeatureLevels` as ``backbone``.

    Returns:
        The state dict, which fits ``model`` strictly.

    Raises:
        ValueError: If anything is missing, left over, of another shape or no tensor; names the first ten of each.
    """
    adapter = model.backbone
    state = state_of(unwrap(checkpoint))
    own = model.state_dict()
    dropped: list[str] = []
    if any(k.startswith("backbone.body.") for k in state):
        converted = state
    else:
        inner: Any = adapter.body.model if hasattr(adapter.body, "model") else None  # type: ignore[union-attr]
        if inner is None:
            raise ValueError("got a backbone without official task checkpoints: its features are no 'getter'")
        converted, dropped = _convert_backbone(state, inner)
    problems = {
        "missing": sorted(own.keys() - converted.keys()),
        "unexpected": sorted({*(converted.keys() - own.keys()), *dropped}),
        "of another shape": sorted(k for k, v in converted.items() if k in own and v.shape != own[k].shape),
    }
    texts = [f"{len(keys)} {what}: {', '.join(keys[:10])}" for what, keys in problems.items() if keys]
    if texts:
        raise ValueError(f"the checkpoint does not fit the model; {'; '.join(texts)}")
    return converted


def _convert_backbone(state: dict[str, torch.Tensor], inner: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict with the backbone's official names replaced, and those that the family's filter left out."""
    body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    name = (getattr(inner, "pretrained_cfg", None) or {}).get("architecture", "")
    family = sys.modules[(timm.models.model_entrypoint(name) if timm.is_model(name) else type(inner)).__module__]
    filter_fn = getattr(family, "checkpoint_filter_fn", lambda state_dict, model: state_dict)
    filtered = filter_fn(dict(body), inner)
    ours = {t.data_ptr() for t in inner.state_dict().values() if t.numel()}  # filled in by the filter, not in the file
    filled = {k for k, v in filtered.items() if v.numel() and v.data_ptr() in ours}
    converted = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    converted.update({f"backbone.body.model.{k}": v for k, v in filtered.items() if k not in filled})
    kept = {v.data_ptr() for v in filtered.values()}
    dropped = [k for k in body if not k.endswith("relative_position_index")]
    if len(filtered) - len(filled) == len(dropped):
        dropped = []  # renamed or resized, none left out
    return converted, [f"backbone.{k}" for k in dropped if body[k].data_ptr() not in kept]
