"""The one call of timm's builder that every family makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from .checks import WRAPPERS, check_indices, checked, need
from .features import FeatureGetter

__all__ = ["build"]

_Model = TypeVar("_Model", bound=nn.Module)


def build(
    model_cls: Callable[..., _Model],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[..., dict[str, Any]],
    taps: int | Sequence[int] | None = (0, 1, 2, 3),
    wrapper: type[nn.Module] = FeatureGetter,
    flatten_sequential: bool = False,
    getter_for: str = "",
    dilates: bool = False,
    rounds: Callable[[float], int] | None = math.ceil,
    **kwargs: Any,
) -> _Model:
    """``timm.models.build_model_with_cfg`` with what the models of the zoo have in common.

    Args:
        model_cls: Makes the model.
        variant: Registered name.
        pretrained: Load the weights of the configuration.
        filter_fn: ``checkpoint_filter_fn`` of the family.
        taps: Features of a ``features_only`` model that asks for none; None for four, spread evenly.
        wrapper: Its wrapper, if it asks for none.
        flatten_sequential: Whether the features are blocks of an ``nn.Sequential``, for the other wrappers of timm.
        getter_for: Argument of the model whose features only the getter can give, "" for none.
        dilates: Whether the model takes ``output_stride``.
        rounds: How the model rounds the side of its last map, if it takes images of any size: ``img_size`` then only
            changes the configuration.  None for a model that has an ``img_size`` of its own.
        **kwargs: Arguments of timm's builder and the model.

    Returns:
        The model, or its feature net with ``features_only``.

    Raises:
        ValueError: If an argument is outside its range, the model has no ``output_stride``, or ``feature_cls`` cannot
            give the features; the message names the argument.
    """
    if "output_stride" in kwargs and not dilates:  # also for 32, as timm's models without dilation
        raise ValueError(f"got output_stride={kwargs['output_stride']}, but {variant} is never dilated: leave it out")
    asked = kwargs.get("feature_cls", FeatureGetter)
    known = asked.lower() in WRAPPERS if isinstance(asked, str) else callable(asked)
    need(known, f"a class or one of {', '.join(map(repr, WRAPPERS))}", feature_cls=asked)
    getter = asked in ("getter", FeatureGetter)
    need(getter or not kwargs.get(getter_for), f"'getter' for features with {getter_for}", feature_cls=asked)
    if "feature_cls" in kwargs and getter:
        kwargs["feature_cls"] = FeatureGetter
    feature_cfg: dict[str, Any] = {
        "out_indices": taps,
        "feature_cls": wrapper,
        "flatten_sequential": flatten_sequential,
    }
    if kwargs.get("features_only"):
        model_cls = _with_features(model_cls, kwargs.get("out_indices", taps), feature_cfg)
    if rounds is not None and "img_size" in kwargs:
        kwargs["pretrained_cfg_overlay"] = _sized(variant, kwargs.pop("img_size"), rounds, kwargs)
    with torch.inference_mode(False):  # parameters made in it can never be trained
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg=feature_cfg,
            **kwargs,
        )


def _with_features(
    model_cls: Callable[..., _Model], out_indices: int | Sequence[int] | None, feature_cfg: dict[str, Any]
) -> Callable[..., _Model]:
    """Makes the model, and checks that it has the features before any wrapper looks for them."""

    def make(**kwargs: Any) -> _Model:
        model = model_cls(**kwargs)
        count = len(model.feature_info)  # type: ignore[arg-type]
        if out_indices is None:
            feature_cfg["out_indices"] = tuple(dict.fromkeys(math.ceil(count * i / 4) - 1 for i in (1, 2, 3, 4)))
        else:
            check_indices(count, out_indices)
        return model

    return make


@checked()
def _sized(
    variant: str, img_size: int | tuple[int, int], rounds: Callable[[float], int], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """``pretrained_cfg_overlay`` for images of another size."""
    size = to_2tuple(img_size)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    sized: dict[str, Any] = {"input_size": (cfg.input_size[0], *size), "test_input_size": None}
    if cfg.pool_size is not None:
        stride = round(cfg.input_size[1] / cfg.pool_size[0])
        sized["pool_size"] = tuple(rounds(n / stride) for n in size)
    return {**overlay, **sized}
