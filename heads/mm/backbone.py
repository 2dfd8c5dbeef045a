"""Any timm model as backbone of mmdet and mmseg."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from timm.data import resolve_model_data_config

from ..features import FeatureLevels, create, create_without_memory, feature_levels, pretrained_arguments

__all__ = ["VizooBackbone", "channels", "data_preprocessor"]

TASKS = ("detection", "instance", "segmentation")


def channels(model_name: str, strides: Sequence[int] = (4, 8, 16, 32), **kwargs: Any) -> list[int]:
    """Channels of a model's features, for ``in_channels`` of necks and heads.

    Args:
        model_name: Any name of ``timm.create_model``.
        strides: As for :class:`VizooBackbone`.
        **kwargs: ``out_indices`` instead of ``strides``, and arguments of the model.

    Returns:
        Channels of each level.

    Raises:
        ValueError: If the model is unknown or has no feature of one of the strides.
    """
    return list(feature_levels(model_name, strides, **kwargs).channels)


def data_preprocessor(model_name: str, task: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Config of the data preprocessor that gives images as the model's weights expect them.

    Args:
        model_name: Any name of ``timm.create_model``.
        task: ``"detection"``, ``"instance"`` (with masks) or ``"segmentation"``.
        size: Height and width of the training crops in segmentation; None pads to multiples of 32.

    Returns:
        A config of ``DetDataPreprocessor`` or ``SegDataPreProcessor``; mean and standard deviation are for 0 to 255.

    Raises:
        ValueError: If the task or the model is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"got task={task!r}, need one of {', '.join(TASKS)}")
    data = resolve_model_data_config(create_without_memory(model_name))
    shared = {"mean": [255 * m for m in data["mean"]], "std": [255 * s for s in data["std"]], "bgr_to_rgb": True}
    if task == "segmentation":
        fit: dict[str, Any] = {"size_divisor": 32} if size is None else {"size": tuple(size)}
        return {"type": "SegDataPreProcessor", **shared, "pad_val": 0, "seg_pad_val": 255, **fit}
    return {"type": "DetDataPreprocessor", **shared, "pad_mask": task == "instance", "pad_size_divisor": 32}


@MODELS.register_module(force=True)
class VizooBackbone(FeatureLevels, BaseModule):
    """Features of a timm model, chosen by stride, as a tuple of NCHW maps.

    The per-level norms of the official dense LITv2, NAT and OverLoCK belong to these models: ask for them with
    ``feature_norms=(0, 1, 2, 3)``, ``dense="det"`` and so on.

    Args:
        model_name: Any name of ``timm.create_model``.
        strides: Strides of the levels, increasing.  Where several features of the model share one, the last is taken.
        out_indices: Indices of the model's features, instead of ``strides``.
        pretrained: True for the published weights, or a file (.pth, .safetensors, also a classifier or a whole
            detector or segmentor of the authors) or URL, read through the family's ``checkpoint_filter_fn``; loaded by
            :meth:`init_weights`, which mm calls before training only.
        frozen_stages: Parts that are not trained: 0 the stem, k the stem and k stages, -1 none.
        norm_eval: Keep batch norms in evaluation mode.
        with_cp: Recompute activations in the backward pass instead of storing them.
        feature_cls: Wrapper of timm: ``"getter"`` keeps the model whole, ``"list"``, ...; None for the family's own.
        out_norm: ``"layer"`` for a layer norm of each level, in models that have none of their own.
        init_cfg: Initialisation of mmengine; of type ``Pretrained`` with keys relative to this module.
        **kwargs: Arguments of the model, such as ``drop_path_rate``.

    Attributes:
        channels: Channels of each level.
        strides: Stride of each level.
        out_indices: Index of each level among the model's features.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        model_name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_indices: Sequence[int] | None = None,
        pretrained: bool | str | Path = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        feature_cls: str | None = None,
        out_norm: str | None = None,
        init_cfg: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model_name,
            strides,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            grad_checkpointing=with_cp,
            feature_cls=feature_cls,
            out_norm=out_norm,
            **kwargs,
        )
        self._weights = pretrained_arguments(pretrained)
        self.init_cfg = copy.deepcopy(init_cfg)
        self._is_init: bool = False

    def init_weights(self) -> None:
        """Load the weights of ``pretrained``, then do what ``init_cfg`` says; the second call does nothing.

        mmengine's own method would call ``init_weights`` of the model, which many have, and wipe loaded weights.
        """
        if self._is_init:
            return
        if self._weights["pretrained"]:
            options = {"features_only": True, "out_indices": self.out_indices, **self._weights, **self._kwargs}
            self.body.load_state_dict(create(self.model_name, **options).state_dict())
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True
