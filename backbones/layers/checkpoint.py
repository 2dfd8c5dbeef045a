"""The weights in a checkpoint, whoever wrote it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["unwrap"]

_logger = logging.getLogger(__name__)

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: averaged weights first
LIGHTNING = "pytorch-lightning_version"  # in every checkpoint of Lightning
COUNTER = "n_averaged"  # beside the weights of torch's AveragedModel
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of processes and averages, of torch.compile, of Lightning


def unwrap(state_dict: Mapping[str, Any], dense: bool = False) -> dict[str, Any]:
    """The state dict in a checkpoint, under the names of the model that was trained.

    It is taken out of the containers ``state_dict_ema``, ``model_ema``, ``state_dict`` and ``model``, the first that
    holds anything, however they are nested.  The prefixes ``module.``, ``_orig_mod.`` and ``model.`` are those of a
    wrapper, and go, where all names have them; a model with a part of such a name has other parts beside it.  Of a
    checkpoint of Lightning only ``model.`` counts, as losses and metrics may have weights beside it.

    Args:
        state_dict: Checkpoint or state dict; it stays as it is.
        dense: Whether it may be a whole detector or segmentor, of which only ``backbone.*`` counts.

    Returns:
        Name -> weight.

    Raises:
        ValueError: If it is no dictionary.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"got a checkpoint that holds a {type(state_dict).__name__}, need a dictionary")
    is_lightnings = LIGHTNING in state_dict
    for _ in CONTAINERS:
        inside = [state_dict[name] for name in CONTAINERS if isinstance(state_dict.get(name), Mapping)]
        if inside:
            state_dict = max(inside, key=bool)  # the first that is not empty
    weights = {k: v for k, v in state_dict.items() if k != COUNTER}
    if is_lightnings and any(_is_in("model.", k) for k in weights):
        weights = {k: v for k, v in weights.items() if _is_in("model.", k)}
    while prefix := next((p for p in WRAPPERS if weights and all(_is_in(p, k) for k in weights)), ""):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    if not dense or not any(_is_in("backbone.", k) for k in weights):
        return weights
    dropped = sorted({str(k).split(".")[0] for k in weights if not _is_in("backbone.", k)})
    if dropped:
        _logger.info("left out of the checkpoint: %s", ", ".join(dropped))
    return {k.removeprefix("backbone."): v for k, v in weights.items() if _is_in("backbone.", k)}


def _is_in(prefix: str, key: Any) -> bool:
    return isinstance(key, str) and key.startswith(prefix)
