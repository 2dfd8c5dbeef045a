"""Checkpoints of detectors and segmentors: mmengine's own, and those that the authors of a backbone published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["convert_checkpoint", "read_checkpoint"]


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _HistoryBuffer(metaclass=_AnyAttribute):
    """Stands for the class of mmengine where that is not installed; its contents are logs of the training."""


def mmengine_globals(history_buffer: type = _HistoryBuffer) -> list[Any]:
    """What ``torch.load(weights_only=True)`` must know to read a training checkpoint of mmengine.

    ``getattr``, which every one of them needs, weakens the protection a little: attributes of the listed classes become
    reachable, no other name does.

    Args:
        history_buffer: ``mmengine.logging.HistoryBuffer``, or what stands for it.

    Returns:
        For :func:`torch.serialization.safe_globals`.
    """
    core = getattr(np, "_core", None) or np.core
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    old_names = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions]  # files written with NumPy 1
    new_names = [(f, f"numpy._core.multiarray.{f.__name__}") for f in functions]
    dtypes = {type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)}
    history = (history_buffer, "mmengine.logging.history_buffer.HistoryBuffer")
    return [history, np.ndarray, np.dtype, getattr, *old_names, *new_names, *dtypes]


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
    known = torch.serialization.get_safe_globals()  # leaving the context would take these away
    names = {g[1] for g in known if isinstance(g, tuple)}
    added = [g for g in mmengine_globals() if g not in known and not (isinstance(g, tuple) and g[1] in names)]
    try:
        with torch.serialization.safe_globals(added):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever an unpickler raises
        raise ValueError(f"{str(path)!r} is not a checkpoint that PyTorch reads safely: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(found).__name__}, need a dictionary")
    return found


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
        ValueError: If anything is missing, left over or of another shape; names the first ten of each.
    """
    adapter = model.backbone
    state = checkpoint.get("state_dict", checkpoint)
    state = {k.removeprefix("module."): v for k, v in state.items()}
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
    family = sys.modules[type(inner).__module__]
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
