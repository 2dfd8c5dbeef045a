"""Semantic FPN and UPerNet on any backbone of timm and the zoo, with the parameter names of mmseg.

Semantic FPN: "Panoptic Feature Pyramid Networks", A. Kirillov et al., CVPR 2019, https://arxiv.org/abs/1901.02446.
UPerNet: "Unified Perceptual Parsing for Scene Understanding", T. Xiao et al., ECCV 2018,
https://arxiv.org/abs/1807.10221.  Both in the form and with the sizes of mmseg 1.2, so that checkpoints trained there,
and those that the authors of a backbone published, load here without it (:func:`load_segmentor`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from vizoo.backbones.layers.checks import ANY, checked, need
from vizoo.backbones.layers.resampling import RegionPool

from .checkpoints import convert_checkpoint, read_checkpoint
from .features import FeatureLevels

__all__ = ["Segmentor", "load_segmentor", "segmentor"]

ARCHS = ("semantic_fpn", "upernet")
IGNORED = 255  # class id of pixels that do not count


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, norm: bool = True) -> ConvNormAct:
    """Convolution, batch norm and ReLU with mmcv's names and initialisation; the convolution alone without ``norm``."""
    layer = ConvNormAct(in_channels, out_channels, kernel_size, bias=not norm, apply_norm=norm, apply_act=norm)
    if norm:
        nn.init.kaiming_normal_(layer.conv.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(layer.conv.weight)
        nn.init.zeros_(layer.conv.bias)
    return layer


def resize(x: Tensor, other: Tensor, mode: str = "bilinear") -> Tensor:
    """Resize a map ``[B, C, h, w]`` to height and width of another."""
    size = [int(other.shape[2]), int(other.shape[3])]
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "nearest" else False)


def top_down(maps: list[Tensor], mode: str) -> list[Tensor]:
    """Add to every map the coarser ones, resized."""
    out = list(maps)
    for i in range(len(out) - 1, 0, -1):
        out[i - 1] = out[i - 1] + resize(out[i], out[i - 1], mode)
    return out


class FPN(nn.Module):
    """Feature pyramid (mmseg's ``FPN``).

    Args:
        in_channels: Channels of each level.
        out_channels: Channels of every level of the pyramid.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_norm_relu(c, out_channels, 1, norm=False) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(out_channels, out_channels, 3, norm=False) for _ in in_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps ``[B, in_channels[i], H_i, W_i]`` to ``[B, out_channels, H_i, W_i]``."""
        levels: list[Tensor] = []
        for i, conv in enumerate(self.lateral_convs):
            levels.append(conv(maps[i]))
        levels = top_down(levels, "nearest")
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])
        return levels


class _Classifier(nn.Module):
    """Dropout of whole channels and the last convolution of a head."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(drop_rate)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def cls_seg(self, x: Tensor) -> Tensor:
        """Features ``[B, channels, H, W]`` to logits ``[B, num_classes, H, W]``."""
        out: Tensor = self.conv_seg(self.dropout(x))
        return out


class FPNHead(_Classifier):
    """Head of Semantic FPN: every level is brought to the finest, in steps of two, and all are added.

    Args:
        in_channels: Channels of every level.
        strides: Stride of each level, each a power of two of the first.
        num_classes: Classes.
        channels: Hidden channels.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self, in_channels: int, strides: Sequence[int], num_classes: int, channels: int = 128, drop_rate: float = 0.1
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            head: list[nn.Module] = []
            for k in range(max(1, (stride // strides[0]).bit_length() - 1)):
                head.append(conv_norm_relu(channels if k else in_channels, channels, 3))
                if stride != strides[0]:
                    head.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*head))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of the pyramid to logits ``[B, num_classes, H_0, W_0]``."""
        x = maps[0]
        for i, head in enumerate(self.scale_heads):
            x = head(x) if i == 0 else x + resize(head(maps[i]), x)
        return self.cls_seg(x)


class PPM(nn.ModuleList):
    """Pooling pyramid of PSPNet: averages over grids of some sizes.

    Args:
        in_channels: Channels of the input.
        channels: Channels of each pooled map.
        scales: Sides of the grids.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int]) -> None:
        super().__init__(nn.Sequential(RegionPool(s), conv_norm_relu(in_channels, channels, 1)) for s in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[B, in_channels, H, W]`` to one ``[B, channels, H, W]`` for each scale."""
        maps: list[Tensor] = []
        for pool in self:
            maps.append(resize(pool(x), x))
        return maps


class UPerHead(_Classifier):
    """Head of UPerNet: a pooling pyramid on the coarsest level, then a feature pyramid whose levels are joined.

    Args:
        in_channels: Channels of each level.
        num_classes: Classes.
        channels: Hidden channels.
        pool_scales: Sides of the pooled grids.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, drop_rate)
        *finer, coarsest = in_channels
        self.psp_modules = PPM(coarsest, channels, pool_scales)
        self.bottleneck = conv_norm_relu(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(c, channels, 1) for c in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = conv_norm_relu(len(in_channels) * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of the backbone to logits ``[B, num_classes, H_0, W_0]``."""
        levels: list[Tensor] = []
        for i, conv in enumerate(self.lateral_convs):
            levels.append(conv(maps[i]))
        pooled = [maps[-1]]
        pooled.extend(self.psp_modules(maps[-1]))
        levels.append(self.bottleneck(torch.cat(pooled, 1)))
        levels = top_down(levels, "bilinear")
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])
        return self.cls_seg(self.fpn_bottleneck(torch.cat([resize(m, maps[0]) for m in levels], 1)))


class FCNHead(_Classifier):
    """One convolution and a classifier: the auxiliary head.

    Args:
        in_channels: Channels of the level.
        num_classes: Classes.
        channels: Hidden channels.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, drop_rate: float = 0.1) -> None:
        super().__init__(channels, num_classes, drop_rate)
        self.convs = nn.Sequential(conv_norm_relu(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to logits ``[B, num_classes, H, W]``."""
        return self.cls_seg(self.convs(x))


class Segmentor(nn.Module):
    """Backbone, neck and heads; outputs as torchvision's segmentation models.

    Args:
        backbone: Features, finest first.
        decode_head: Logits of the features, or of the neck's.
        neck: Pyramid between them.
        auxiliary_head: Logits of the last level but one, in training.
        aux_weight: Weight of its loss.
        ignore_index: Class id of pixels that do not count.
    """

    @checked(ignore_index=ANY)
    def __init__(
        self,
        backbone: FeatureLevels,
        decode_head: nn.Module,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
        aux_weight: float = 0.4,
        ignore_index: int = IGNORED,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if neck is not None:
            self.neck = neck
        self.decode_head = decode_head
        if auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head
        self.aux_weight, self.ignore_index = aux_weight, ignore_index
        self._pools = isinstance(decode_head, UPerHead)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Segment images.

        Args:
            x: Normalised images ``[B, 3, H, W]``.

        Returns:
            ``out`` and, in training and with an auxiliary head, ``aux``: logits ``[B, num_classes, H, W]``.

        Raises:
            ValueError: For a single image in training of UPerNet, whose batch norms see one value of each channel.
        """
        if self.training and len(x) == 1 and self._pools:
            raise ValueError("got a batch of 1 image in training, need at least 2 for the batch norms of UPerNet")
        maps = self.backbone(x)
        out = {"out": resize(self.decode_head(self.neck(maps) if hasattr(self, "neck") else maps), x)}
        if hasattr(self, "auxiliary_head"):  # noqa: SIM102 - TorchScript decides this condition before it compiles
            if self.training:
                out["aux"] = resize(self.auxiliary_head(maps[-2]), x)
        return out

    def loss(self, out: dict[str, Tensor], target: Tensor) -> Tensor:
        """Cross-entropy of the outputs, that of the auxiliary head weighted; 0 when no pixel counts.

        Args:
            out: What :meth:`forward` returned.
            target: Class ids ``[B, H, W]``, ``ignore_index`` where there is none.

        Returns:
            A number: the mean over all pixels, as in mmseg, also those that do not count.
        """
        losses = {
            name: F.cross_entropy(logits.float(), target, ignore_index=self.ignore_index, reduction="none").mean()
            for name, logits in out.items()
        }
        return losses["out"] + self.aux_weight * losses["aux"] if "aux" in losses else losses["out"]


@checked(arch=ARCHS)
def segmentor(
    arch: str,
    backbone: str | nn.Module,
    num_classes: int,
    pretrained: bool | str | Path = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    strides: Sequence[int] = (4, 8, 16, 32),
    channels: int | None = None,
    aux: bool = True,
    backbone_kwargs: dict[str, Any] | None = None,
) -> Segmentor:
    """Build a segmentor.

    Args:
        arch: ``"semantic_fpn"`` or ``"upernet"``.
        backbone: Any name of :func:`timm.create_model`, or a model made with ``features_only=True``.
        num_classes: Classes, at most 255, the id of pixels that do not count; there is no background beside them.
        pretrained: Weights of the backbone, as in :class:`vizoo.heads.features.FeatureLevels`.
        frozen_stages: Stages of the backbone that are not trained: 0 the stem, k the stem and k stages, -1 none.
        norm_eval: Keep batch norms of the backbone in evaluation mode.
        strides: Strides of the backbone's levels, each twice the one before.
        channels: Hidden channels of the head; None for mmseg's 128 (Semantic FPN) or 512 (UPerNet).
        aux: Whether UPerNet has an auxiliary head in training.
        backbone_kwargs: Arguments of the backbone, such as ``drop_path_rate``.

    Returns:
        The segmentor.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown or lacks a stride; the message names it.
    """
    known = f"1 to {IGNORED}: {IGNORED} is the id of pixels that do not count"
    need(1 <= num_classes <= IGNORED, known, num_classes=num_classes)
    doubled = len(strides) > 1 and all(b == 2 * a for a, b in itertools.pairwise(strides))
    need(doubled, "at least two, each twice the one before", strides=tuple(strides))
    body = FeatureLevels(
        backbone,
        strides,
        pretrained=pretrained,
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        **(backbone_kwargs or {}),
    )
    if arch == "semantic_fpn":
        neck = FPN(body.channels)
        return Segmentor(body, FPNHead(256, body.strides, num_classes, channels or 128), neck)
    head = UPerHead(body.channels, num_classes, channels or 512)
    return Segmentor(body, head, None, FCNHead(body.channels[-2], num_classes) if aux else None)


def load_segmentor(model: Segmentor, path: str | Path) -> None:
    """Load a checkpoint of ``vizoo train``, of mmseg with our backbone, or one that a backbone's authors published.

    Args:
        model: The segmentor, with the same head and number of classes; give its backbone the norms of the official one,
            such as ``backbone_kwargs={"feature_norms": (0, 1, 2, 3)}``.
        path: The file.

    Raises:
        ValueError: If the file cannot be read safely, or anything is missing, left over or of another shape.
    """
    model.load_state_dict(convert_checkpoint(read_checkpoint(path), model))
