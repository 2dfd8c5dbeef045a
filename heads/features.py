"""Features of any timm model, chosen by stride, and a feature pyramid on them.

The level choice, freezing and loading are shared by the heads of this package and the adapter of mmdet and mmseg.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from vizoo.backbones.layers.checks import WRAPPERS, check_model_name, check_positions, checked, need

__all__ = ["FeatureLevels", "FeaturePyramid", "Levels", "feature_levels"]

_Module = TypeVar("_Module", bound="FeatureLevels")


class Levels(NamedTuple):
    """Chosen features of a model."""

    indices: tuple[int, ...]
    """Index of each level among the model's features, for ``out_indices`` of timm."""
    channels: tuple[int, ...]
    """Channels of each level."""
    strides: tuple[int, ...]
    """Pixels of the image per position of each level."""


def create(model_name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` that suggests names for an unknown one."""
    check_model_name(model_name=model_name)
    return timm.create_model(model_name, **kwargs)


def create_without_memory(model_name: str, **kwargs: Any) -> nn.Module:
    """The model on the meta device, or on the CPU if it knows no device."""
    try:
        return create(model_name, device="meta", **kwargs)
    except TypeError:
        return create(model_name, **kwargs)


def feature_levels(model_name: str, strides: Sequence[int] = (4, 8, 16, 32), **kwargs: Any) -> Levels:
    """Find the features of a timm model that have the given strides, without allocating its weights.

    Args:
        model_name: Any name of ``timm.create_model``.
        strides: Strides of the levels in pixels, increasing.  Where several features share one, the last is taken.
        **kwargs: Arguments of the model; ``out_indices`` replaces ``strides``.

    Returns:
        Indices, channels and strides of the levels.

    Raises:
        ValueError: If the model is unknown, or has no feature of one of the strides or indices.
    """
    if kwargs.get("out_indices") is None:
        kwargs.pop("out_indices", None)
    else:
        _check_indices(model_name, **kwargs)
    info: Any = create_without_memory(model_name, features_only=True, **kwargs).feature_info
    if "out_indices" in kwargs:
        return Levels(tuple(kwargs["out_indices"]), tuple(info.channels()), tuple(info.reduction()))
    return _choose(info, strides, model_name)


def _check_indices(model_name: str, out_indices: Sequence[int], **kwargs: Any) -> None:
    """Refuse what the model does not have before any wrapper of timm looks for it."""
    kwargs.pop("feature_cls", None)
    count = len(create_without_memory(model_name, **kwargs).feature_info)  # type: ignore[arg-type]
    check_positions(count, out_indices=out_indices)
    places = [i % count for i in out_indices]
    need(places == sorted(places), "features in the order of the network", out_indices=out_indices)


def _choose(info: Any, strides: Sequence[int], model_name: str) -> Levels:
    need(strides and list(strides) == sorted(set(strides)), "increasing numbers", strides=tuple(strides))
    last = {stride: i for i, stride in enumerate(info.reduction())}
    missing = [s for s in strides if s not in last]
    if missing:
        raise ValueError(
            f"got strides={tuple(strides)}, but {model_name!r} has no feature of stride {missing[0]}; "
            f"it has {', '.join(map(str, sorted(last)))}"
        )
    found = [last[s] for s in strides]
    return Levels(tuple(info.out_indices[i] for i in found), tuple(info.channels()[i] for i in found), tuple(strides))


class FeatureLevels(nn.Module):
    """Features of a timm model, chosen by stride, as a tuple of NCHW maps.

    An image of ``height x width`` gives a map of ``ceil(height / stride) x ceil(width / stride)``, except where a
    family's official code rounds down (LITv2) or only takes one size (``img_size`` of timm's Swin).

    Args:
        backbone: Any name of ``timm.create_model``, or a model made with ``features_only=True``.
        strides: Strides of the levels in pixels, increasing.  Where several features share one, the last is taken.
        out_indices: Indices of the model's features, instead of ``strides``; only with a name.
        pretrained: True for the published weights, or a file (.pth, .safetensors, also a classifier or a whole
            detector or segmentor of the authors) or URL, read through the family's ``checkpoint_filter_fn``.
        frozen_stages: Parts that are not trained: 0 the stem, k the stem and k stages, -1 none.
        norm_eval: Keep batch norms in evaluation mode.
        grad_checkpointing: Recompute activations in the backward pass instead of storing them.
        feature_cls: Wrapper of timm: ``"getter"`` keeps the model whole, ``"list"``, ...; None for the family's own.
        out_norm: ``"layer"`` for a layer norm of each level, in models that have none of their own.
        **kwargs: Arguments of the model, such as ``drop_path_rate``; only with a name.

    Attributes:
        body: The model of timm.
        channels: Channels of each level.
        strides: Stride of each level.
        out_indices: Index of each level among the model's features.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    @checked(feature_cls=WRAPPERS, out_norm=("layer",))
    def __init__(
        self,
        backbone: str | nn.Module,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_indices: Sequence[int] | None = None,
        pretrained: bool | str | Path = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        feature_cls: str | type[nn.Module] | None = None,
        out_norm: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if feature_cls is not None:
            kwargs["feature_cls"] = feature_cls
        if isinstance(backbone, str):
            levels = feature_levels(backbone, strides, out_indices=out_indices, **kwargs)
            weights = pretrained_arguments(pretrained)
            body = create(backbone, features_only=True, out_indices=levels.indices, **weights, **kwargs)
            self.model_name, self._taken = backbone, list(range(len(levels.indices)))
        else:
            levels = self._levels_of(backbone, strides, out_indices=out_indices, pretrained=pretrained, **kwargs)
            body, info = backbone, backbone.feature_info
            cfg: Any = getattr(body, "pretrained_cfg", None) or {}
            self.model_name = cfg.get("architecture") or type(body).__name__
            self._taken = [list(info.out_indices).index(i) for i in levels.indices]  # type: ignore[union-attr,arg-type]
        self.body = body
        self._kwargs = kwargs
        self._channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        self.channels, self.strides, self.out_indices = map(list, (levels.channels, levels.strides, levels.indices))
        self.norm_eval = norm_eval
        self.out_norms = nn.ModuleList(LayerNorm2d(c) if out_norm else nn.Identity() for c in self.channels)
        if grad_checkpointing:
            self._checkpoint_gradients()
        self._frozen = self._find_frozen(frozen_stages) if frozen_stages >= 0 else set()
        self.train(self.training)

    @staticmethod
    def _levels_of(body: nn.Module, strides: Sequence[int], **only_named: Any) -> Levels:
        """Levels of a model that exists already."""
        given = [k for k, v in only_named.items() if v is not None and v is not False]
        if given:
            raise ValueError(f"got {given[0]}= with a module as backbone; it belongs to the call that made the module")
        info: Any = getattr(body, "feature_info", None)
        if not hasattr(info, "out_indices"):
            raise ValueError(
                f"got backbone of type {type(body).__name__}, need a name or timm.create_model(..., features_only=True)"
            )
        return _choose(info, strides, type(body).__name__)

    def _checkpoint_gradients(self) -> None:
        able: Any = next((m for m in (self.body, *self.body.children()) if hasattr(m, "set_grad_checkpointing")), None)
        if able is not None:
            able.set_grad_checkpointing(True)
            return
        raise ValueError(f"got grad_checkpointing=True, but {self.model_name!r} has no gradient checkpointing")

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
            inner, prefix = create_without_memory(self.model_name, **kwargs), ""
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

    def train(self: _Module, mode: bool = True) -> _Module:
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

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``[B, C, height, width]`` to one map ``[B, channels, H, W]`` for each level."""
        features = self.body(x)
        maps: list[Tensor] = []
        for i, norm in enumerate(self.out_norms):
            feature = features[self._taken[i]]
            maps.append(norm(feature.permute(0, 3, 1, 2) if self._channels_last else feature))
        if torch.jit.is_scripting():  # where a tuple has a fixed length
            return maps
        return tuple(maps)  # type: ignore[return-value]


class FeaturePyramid(nn.Module):
    """Backbone and feature pyramid network (Lin et al., CVPR 2017) in the form that torchvision's detectors take.

    Args:
        backbone: The levels.
        out_channels: Channels of every map.
        extra: Makes coarser maps, such as ``LastLevelMaxPool`` or ``LastLevelP6P7`` of torchvision; None for none.

    Attributes:
        out_channels: As given.
        strides: Stride of each level of the backbone; extra maps halve the last.
    """

    @checked()
    def __init__(self, backbone: FeatureLevels, out_channels: int = 256, extra: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels, extra)
        self.out_channels, self.strides = out_channels, backbone.strides

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images ``[B, C, height, width]`` to maps ``[B, out_channels, H, W]`` named "0", "1", ..."""
        levels: dict[str, Tensor] = {}
        for i, level in enumerate(self.backbone(x)):
            levels[str(i)] = level
        return self.fpn(levels)


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
