"""Any timm model as backbone of mmdet and mmseg."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["VizooBackbone", "channels", "data_preprocessor"]

TASKS = ("detection", "instance", "segmentation")


def _create(model_name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` that suggests names."""
    name = model_name.partition(".")[0]
    if ":" not in model_name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["see timm.list_models()"]
        raise ValueError(f"got model_name={model_name!r}, which timm does not know; near: {', '.join(near)}")
    return timm.create_model(model_name, **kwargs)


def _create_without_memory(model_name: str, **kwargs: Any) -> nn.Module:
    """The model on the meta device, or on the CPU if it knows no device."""
    try:
        return _create(model_name, device="meta", **kwargs)
    except TypeError:
        return _create(model_name, **kwargs)


def _levels(model_name: str, strides: Sequence[int], **kwargs: Any) -> tuple[list[int], list[int]]:
    """Index among the model's features, and channels, of the last feature of each stride."""
    if kwargs.get("out_indices") is not None:
        given: Any = _create_without_memory(model_name, features_only=True, **kwargs).feature_info
        return list(kwargs["out_indices"]), given.channels()
    kwargs.pop("out_indices", None)
    if list(strides) != sorted(set(strides)) or not strides:
        raise ValueError(f"got strides={tuple(strides)}, need increasing numbers")
    info: Any = _create_without_memory(model_name, features_only=True, **kwargs).feature_info
    indices = {stride: i for i, stride in enumerate(info.reduction())}
    missing = [s for s in strides if s not in indices]
    if missing:
        raise ValueError(
            f"got strides={tuple(strides)}, but {model_name!r} has no feature of stride {missing[0]}; "
            f"it has {', '.join(map(str, sorted(indices)))}"
        )
    found = [indices[s] for s in strides]
    return [info.out_indices[i] for i in found], [info.channels()[i] for i in found]


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
    return _levels(model_name, strides, **kwargs)[1]


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
    data = resolve_model_data_config(_create_without_memory(model_name))
    shared = {"mean": [255 * m for m in data["mean"]], "std": [255 * s for s in data["std"]], "bgr_to_rgb": True}
    if task == "segmentation":
        fit: dict[str, Any] = {"size_divisor": 32} if size is None else {"size": tuple(size)}
        return {"type": "SegDataPreProcessor", **shared, "pad_val": 0, "seg_pad_val": 255, **fit}
    return {"type": "DetDataPreprocessor", **shared, "pad_mask": task == "instance", "pad_size_divisor": 32}


@MODELS.register_module(force=True)
class VizooBackbone(BaseModule):
    """Features of a timm model, chosen by stride, as a tuple of NCHW maps.

    The per-level norms of the official dense LITv2, NAT and OverLoCK belong to these models: ask for them with
    ``feature_norms=(0, 1, 2, 3)``, ``dense="det"`` and so on.

    Args:
        model_name: Any name of ``timm.create_model``.
        strides: Strides of the levels, increasing.  Where several features of the model share one, the last is taken.
        out_indices: Indices of the model's features, instead of ``strides``.
        pretrained: True for the published weights, or a file (.pth, .safetensors, also a classifier or a whole
            detector or segmentor of the authors) or URL, read through the family's ``checkpoint_filter_fn``.
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
        super().__init__(init_cfg=init_cfg)
        self._is_init: bool = False
        if out_norm not in (None, "layer"):
            raise ValueError(f"got out_norm={out_norm!r}, need 'layer' or None")
        if feature_cls is not None:
            kwargs["feature_cls"] = feature_cls
        out_indices = _levels(model_name, strides, out_indices=out_indices, **kwargs)[0]
        weights = pretrained_arguments(pretrained)
        body = _create(model_name, features_only=True, out_indices=tuple(out_indices), **weights, **kwargs)
        self.body = body
        self.model_name, self._kwargs = model_name, kwargs
        info: Any = body.feature_info
        self.channels: list[int] = info.channels()
        self.strides: list[int] = info.reduction()
        self.out_indices = out_indices
        self.norm_eval = norm_eval
        self.out_norms = nn.ModuleList(LayerNorm2d(c) if out_norm else nn.Identity() for c in self.channels)
        if with_cp:
            self._checkpoint_gradients()
        self._frozen = self._find_frozen(frozen_stages) if frozen_stages >= 0 else set()
        self.train(self.training)

    def _checkpoint_gradients(self) -> None:
        able: Any = next((m for m in (self.body, *self.body.children()) if hasattr(m, "set_grad_checkpointing")), None)
        if able is not None:
            able.set_grad_checkpointing(True)
            return
        raise ValueError(f"got with_cp=True, but {self.model_name!r} has no gradient checkpointing")

    def layers(self, coarse: bool = False) -> dict[str, int]:
        """Depth of every parameter of the body.

        Args:
            coarse: By stage instead of by block.

        Returns:
            Name relative to ``body`` -> 0 for the stem, rising.

        Raises:
            ValueError: If the model has no ``group_matcher``.
        """
        inner, names = self._original()
        if not hasattr(inner, "group_matcher"):
            raise ValueError(f"{self.model_name!r} cannot be split into stages: it has no group_matcher")
        matcher = inner.group_matcher(coarse=coarse)  # type: ignore[operator]
        found = group_with_matcher(((n, None) for n in names), matcher, reverse=True)
        return {names[n]: layer for n, layer in found.items()}

    def no_weight_decay(self) -> set[str]:
        """Names, relative to ``body``, of the parameters that the model wants no weight decay for."""
        inner, names = self._original()
        wanted = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else set()  # type: ignore[operator]
        return {names[n] for n in wanted if n in names}

    def _original(self) -> tuple[nn.Module, dict[str, str]]:
        """The model itself, and its name of every parameter of the body -> that in the body."""
        inner, prefix = getattr(self.body, "model", None), "model."
        joined: dict[str, str] = {}
        if not isinstance(inner, nn.Module):  # a list of parts, where names of two levels are joined by underscores
            kwargs = {k: v for k, v in self._kwargs.items() if k != "feature_cls"}
            inner, prefix = _create_without_memory(self.model_name, **kwargs), ""
            joined = {n.replace(".", "_"): n for n, _ in inner.named_modules() if n.count(".") == 1}
        names = {}
        for name, _ in self.body.named_parameters():
            first, dot, rest = name.removeprefix(prefix).partition(".")
            names[joined.get(first, first) + dot + rest] = name
        return inner, names

    def _find_frozen(self, stages: int) -> set[str]:
        depth = self.layers(coarse=True)
        if stages > max(depth.values()):
            raise ValueError(
                f"got frozen_stages={stages}, need -1 to {max(depth.values())}: {self.model_name!r} with these levels "
                f"has a stem and {max(depth.values())} stages"
            )
        return {name for name, layer in depth.items() if layer <= stages}

    def train(self, mode: bool = True) -> VizooBackbone:
        """Training mode, except of frozen stages, and of batch norms with ``norm_eval``."""
        super().train(mode)
        names = {id(p): n for n, p in self.body.named_parameters()}
        for name, parameter in self.body.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)
        for module in self.body.modules():
            own = [names[id(p)] for p in module.parameters()]
            whole = bool(own) and self._frozen.issuperset(own)
            if whole or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Do what ``init_cfg`` says, and nothing without it.

        mmengine's own method would call ``init_weights`` of the model, which many have, and wipe loaded weights.
        """
        if self.init_cfg and not self._is_init:
            initialize(self, self.init_cfg)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images ``[B, C, height, width]`` to one map ``[B, channels, H, W]`` for each level."""
        features = self.body(x)
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [f.permute(0, 3, 1, 2) for f in features]
        return tuple(norm(f) for norm, f in zip(self.out_norms, features, strict=True))


def pretrained_arguments(pretrained: bool | str | Path) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for weights that are loaded before the model is wrapped."""
    if isinstance(pretrained, bool):
        return {"pretrained": pretrained}
    source = str(pretrained)
    if source.startswith(("http://", "https://")):
        return {"pretrained": True, "pretrained_cfg_overlay": {"url": source, "hf_hub_id": None, "file": None}}
    if not Path(source).is_file():
        raise ValueError(
            f"got pretrained={source!r}, need True, False, an existing file or a URL; "
            "a value that a base config sets for another backbone goes away with model.pretrained=None"
        )
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": source}}
