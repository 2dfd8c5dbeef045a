"""NAT, DiNAT and DiNAT_s: backbones in which every token attends to a window around itself.

Papers: "Neighborhood Attention Transformer", A. Hassani, S. Walton, J. Li, S. Li, H. Shi, CVPR 2023,
https://arxiv.org/abs/2204.07143 (NAT); "Dilated Neighborhood Attention Transformer", A. Hassani, H. Shi, 2022,
https://arxiv.org/abs/2209.15001 (DiNAT, DiNAT_s and the isotropic models).  Official code and weights:
github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT), whose outputs these models reproduce; names of parameters
are changed by :func:`checkpoint_filter_fn`.

The official code needs natten 0.14 to 0.17: natten 0.20 and later have no relative position bias, which every released
checkpoint contains, and other arguments (``embed_dim`` instead of ``dim``, no ``rel_pos_bias``, no ``attn_drop``).
These models need no natten at all.

Names: ``nat_*`` has plain windows, ``dinat_*`` plain and dilated ones in turn, and ``dinat_s_*`` those of DiNAT in the
layout of Swin: patches of 4x4 pixels, merging of 2x2 tokens.  The isotropic models are 12 blocks at one resolution, as
ViT.  ``vitrpb_*``, ViT with relative position biases, is what the paper compares those with: at 224x224 every token
attends to all.

Deviations: maps smaller than a window are padded as in natten 0.14, with which the models were trained; 0.17 refuses
them.  The isotropic models take any image size; ViT-rpb is neighborhood attention whose 14x14 window covers the map at
224x224.  Dropout of attention and features, 0 in every released model, is left out; ``drop_rate`` is the dropout before
the classifier and ``drop_path_rate`` is 0 unless given, as in timm.
"""

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .layers import Panel
from .layers.about import NAMED_SIZES, About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import (
    ANY,
    SHARE,
    Range,
    check_heads,
    check_lengths,
    check_positions,
    check_stages,
    checked,
    is_sequence,
    need,
)
from .layers.layout import to_channels_last
from .layers.neighborhood import NeighborhoodAttention, NeighborhoodBlock, resize_rpb
from .layers.panel import cell_at, seen_by
from .layers.plain import project

__all__ = ["NAT"]

ABOUT = About(
    "NAT, DiNAT, DiNAT_s",
    "github.com/SHI-Labs/Neighborhood-Attention-Transformer, commit d334f5b, MIT; weights released by its authors.",
    (
        (
            'A. Hassani, S. Walton, J. Li, S. Li, H. Shi, "Neighborhood Attention Transformer", CVPR 2023',
            "2204.07143",
        ),
        (
            'A. Hassani, H. Shi, "Dilated Neighborhood Attention Transformer", 2022',
            "2209.15001",
        ),
    ),
    golden=("dinat_*", "na2d_*"),
    checked="NAT, DiNAT, DiNAT_s and their isotropic models were also run beside the official code on NATTEN 0.14.6's "
    "CPU kernels, built for this PyTorch: outputs and the gradient of every parameter agree to 4e-6, on small, odd and "
    "dilated maps too.",
    limits=(
        NAMED_SIZES.format("DiNAT_s and the isotropic models"),
        "The checkpoints have not been downloaded by us.  That those of ImageNet-22k have 21,841 classes is an "
        "assumption.",
    ),
    example="""
        # neighborhood attention in a model of your own: maps with channels last, of any size
        from vizoo.backbones.layers import NeighborhoodAttention

        attention = NeighborhoodAttention(dim=64, num_heads=2, kernel_size=7, dilation=2)
        print(attention(torch.randn(1, 20, 30, 64)).shape)
    """,
)

MOST_PANELS = 6  # without blocks of the user's choice
_logger = logging.getLogger(__name__)
_norm_layer = partial(LayerNorm, eps=1e-5)

_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
DILATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "224": ((1, 8), (1, 4), (1, 2), (1,)),
    "384": ((1, 13), (1, 6), (1, 3), (1,)),
    "det": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "seg": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "seg640": ((1, 20), (1, 5, 1, 10), _640, (1, 2)),
    "mask2former": ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3), (1,)),
    "det_s": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "seg_s": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "seg640_s": ((1, 20), (1, 10), _640, (1, 2)),
}
"""Dilations of the four stages, repeated over their blocks, in the official models: DiNAT and DiNAT_s at 224x224 and
384x384; detectors and segmentors (``seg640``: the large ones) and those of DiNAT_s (``_s``); Mask2Former."""


class ConvTokenizer(nn.Module):
    """Two strided 3x3 convolutions down to stride 4 (NAT, Sec. 3).

    Args:
        in_chans: Channels of the image.
        dim: Output channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = _norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to a map ``[B, H, W, dim]``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Strided 3x3 convolution between two stages (NAT, Sec. 3).

    Args:
        dim: Input channels; the output has twice as many.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = _norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to ``[B, H / 2, W / 2, 2 * dim]``, rounded up."""
        x = x.permute(0, 3, 1, 2)
        x = self.reduction(x) if torch.jit.is_scripting() else project(self.reduction, x)
        return self.norm(x.permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Downsampling, if any, and blocks.

    Args:
        downsample: Module that halves the map; an identity for none.
        dim: Channels of the blocks.
        num_heads: Attention heads.
        dilations: Dilation of each block.
        drop_path: Stochastic depth rate of each block.
        kwargs: Further arguments of every block.
    """

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        num_heads: int,
        dilations: Sequence[int],
        drop_path: Sequence[float],
        **kwargs: Any,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(
            *(
                NeighborhoodBlock(dim, num_heads, dilation=dilation, drop_path=rate, **kwargs)
                for dilation, rate in zip(dilations, drop_path, strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_dim]`` to ``[B, H', W', dim]``."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def _block_dilations(dilations: str | int | Sequence[Any], depths: Sequence[int]) -> list[list[int]]:
    """Dilation of every block of every stage."""
    stages: Any = dilations
    if isinstance(dilations, str):
        need(dilations in DILATIONS, f"one of {', '.join(DILATIONS)}, or numbers", dilations=dilations)
        stages = DILATIONS[dilations]
    elif not is_sequence(dilations):
        stages = [dilations] * len(depths)
    patterns = [list(s) if is_sequence(s) else [s] for s in stages]
    check_lengths(depths=depths, dilations=stages)
    return [[pattern[i % len(pattern)] for i in range(depth)] for pattern, depth in zip(patterns, depths, strict=True)]


@torch.no_grad()
def _neighbourhood(
    name: str, attn: NeighborhoodAttention, x: Tensor, sides: tuple[float, float], point: tuple[float, float]
) -> Panel:
    """What a token of a map ``[1, H, W, C]``, whose tokens have these sides as fractions of the image, attends to."""
    place = cell_at(point, x.shape[1:3], sides)
    weights, keys = attn.weights_at(x, *place)
    K, D = attn.kernel_size, attn.dilation
    tokens, scale = keys.flatten(0, 1).cpu(), torch.tensor([*sides, *sides])
    boxes = torch.cat([tokens, tokens + 1], 1) * scale
    window = torch.cat([tokens[:1] + 0.5 - D / 2, tokens[-1:] + 0.5 + D / 2], 1) * scale
    return Panel(
        title=f"{name}: {K}x{K} neighbourhood" + (f", dilation {D}" if D > 1 else ""),
        heat=weights[0].mean(0),
        area=(*window[0].tolist(),),
        boxes=window if D == 1 else boxes,
        points=(torch.tensor([place]) + 0.5) * torch.tensor(sides),
        bar="attention",
    )


class NAT(nn.Module):
    """NAT, DiNAT, DiNAT_s and the isotropic models (Sec. 3 of both papers): stages of neighborhood attention blocks.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        layout: ``"conv"`` for overlapping convolutions down to stride 4 and between stages (NAT, DiNAT), ``"patch"``
            for patches of 4x4 pixels and merging of 2x2 tokens (DiNAT_s), ``"flat"`` for patches of 16x16 pixels and
            stages of one width without downsampling (isotropic: one block a stage).
        embed_dim: Channels of the first stage, doubled in each next one unless ``layout="flat"``.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; None for heads of 32 channels, as in every released model.
        kernel_size: Side of the attention's window.  Relative position biases of other windows are resized on loading.
        dilations: For each stage a number, or a pattern of numbers repeated over its blocks; one number for all; or
            the name of a pattern in ``DILATIONS``.  They hold no parameters: weights fit any dilations.
        mlp_ratio: Hidden channels of the feed-forward networks over the stage's.
        qkv_bias: Bias of the query, key and value projections.
        ls_init_value: Initial layer scale; None for no layer scale.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        feature_norms: Stages whose feature gets a layer norm of its own, as in the official dense models:
            ``(0, 1, 2, 3)``.  The final norm is then left out.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(embed_dim=Range(2), kernel_size=Range(2), layout=("conv", "patch", "flat"))
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layout: str = "conv",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] | None = None,
        kernel_size: int = 7,
        dilations: str | int | Sequence[int | Sequence[int]] = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_stages(len(depths), feature_norms=feature_norms)
        block_dilations = _block_dilations(dilations, depths)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        flat = layout == "flat"
        dims = [embed_dim * (1 if flat else 2**i) for i in range(len(depths))]
        heads = [dim // 32 for dim in dims] if num_heads is None else num_heads
        check_lengths(depths=depths, num_heads=heads)
        check_heads(dims, heads, embed_dim=embed_dim, num_heads=num_heads)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"

        if layout == "conv":
            self.patch_embed: nn.Module = ConvTokenizer(in_chans, embed_dim, **dd)
        else:
            self.patch_embed = PatchEmbed(
                img_size=None,
                patch_size=16 if flat else 4,
                in_chans=in_chans,
                embed_dim=embed_dim,
                norm_layer=_norm_layer,
                strict_img_size=False,
                dynamic_img_pad=True,
                flatten=False,
                output_fmt="NHWC",
                **dd,
            )
        merging = partial(PatchMerging, norm_layer=_norm_layer)  # type: ignore[arg-type]
        downsampler: Any = ConvDownsampler if layout == "conv" else merging
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(dims):
            stages.append(
                Stage(
                    nn.Identity() if i == 0 or flat else downsampler(dims[i - 1], **dd),
                    dim,
                    heads[i],
                    dilations=block_dilations[i],
                    drop_path=rates[i],
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    ls_init_value=ls_init_value,
                    **dd,
                )
            )
            stride = 16 if flat else 4 * 2**i
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.feature_norms = nn.ModuleList(
            _norm_layer(dim, **dd) if i in feature_norms else nn.Identity() for i, dim in enumerate(dims)
        )
        self.norm = nn.Identity() if feature_norms else _norm_layer(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper: truncated normal for linear layers, whose biases are zero.

        Args:
            needs_reset: First give every layer its own default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm|^feature_norms", (99999,)),
            ],
        }

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in the constructor; None keeps the current one.
        """
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    @checked(point=SHARE, blocks=ANY)
    def explain(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5), blocks: Sequence[int] | None = None
    ) -> list[Panel]:
        """The neighbourhood of the token at a point, and the token's attention to it.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.
            point: Row and column as fractions of the image.
            blocks: Blocks counted from 0 over all stages; None for the last of every dilation at every size of the
                map, but if that makes more than six, the widest of each size first.

        Returns:
            For each of the blocks a panel, the mean of its heads.  A dilated neighbourhood has a box around each of its
            tokens, and the colour of a token reaches half of the way to the next one.

        Raises:
            ValueError: If a setting is out of range.
        """
        layers: list[tuple[int, int, Any]] = [
            (i, j, block.attn)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)  # type: ignore[union-attr, arg-type]
        ]
        if blocks is not None:
            check_positions(len(layers), blocks=blocks)
        chosen = [layers[i] for i in (self._telling(layers) if blocks is None else blocks)]
        panels = []
        for (i, j, attn), ((x, *_), _) in zip(chosen, seen_by(self, image, [a for _, _, a in chosen]), strict=True):
            pixels = self.feature_info[i]["reduction"]
            sides = pixels / image.shape[2], pixels / image.shape[3]
            panels.append(_neighbourhood(f"Stage {i}, block {j}", attn, x, sides, point))
        return panels

    @torch.jit.ignore
    def _telling(self, layers: list[tuple[int, int, Any]]) -> list[int]:
        """Of all blocks those that show every size of the map and every dilation, as far as there is room."""
        kinds = [(self.feature_info[stage]["reduction"], attn.dilation) for stage, _, attn in layers]
        widest = dict(sorted(kinds))  # of each size
        last = {kind: i for i, kind in enumerate(kinds)}
        order = sorted(last, key=lambda kind: kind[1] < widest[kind[0]])
        return sorted(last[kind] for kind in order[:MOST_PANELS])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Stages to return; an int means the last ones, None all.
            norm: Apply the final norm to the last stage's feature.  Norms of ``feature_norms`` always apply.
            stop_early: Run no stage after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Return the features only.

        Returns:
            The features, or ``(final, features)`` with ``final`` as of :meth:`forward_features`.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        features: list[Tensor] = []
        x = self.patch_embed(to_channels_last(x))
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript cannot slice the stages
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        last = 0
        for last, (stage, feature_norm) in enumerate(zip(stages, self.feature_norms)):  # noqa: B905
            x = stage(x)
            if last in take_indices:
                feature = feature_norm(x)
                if norm and last == len(self.feature_norms) - 1:
                    feature = self.norm(feature)
                features.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return features
        if last == len(self.feature_norms) - 1:
            x = self.norm(x)
        return x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need.

        Args:
            indices: Stages to keep the features of, as in :meth:`forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            The stages as positive numbers.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        for i in range(len(self.feature_norms)):
            if i not in take_indices:
                self.feature_norms[i] = nn.Identity()
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the normed last map ``[B, H, W, num_features]``."""
        x = self.patch_embed(to_channels_last(x))
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, H, W, num_features]`` to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classification, detection and segmentation checkpoints in our names, for the windows of ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load; norms it has no place for are left out, and dense norms that the checkpoint does not
            have stay as they are.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict, dense=True)

    renamed = {}
    for k, v in state_dict.items():
        if k.endswith(".relative_position_index"):
            continue
        k = re.sub(r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", k)
        k = re.sub(r"^layers\.(\d+)\.(norm|attn|mlp)", r"stages.\1.blocks.0.\2", k)
        k = re.sub(r"^(?:levels|layers)\.", "stages.", k)
        k = re.sub(r"\.gamma(\d)$", r".ls\1.gamma", k)
        k = re.sub(r"^norm(\d)\.", r"feature_norms.\1.", k)
        k = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", k)
        renamed[k] = v
    own = model.state_dict()
    for k in [k for k in renamed if k.startswith(("norm.", "feature_norms.")) and k not in own]:
        _logger.info("left out of the checkpoint: %s, which this model does not have", k)
        del renamed[k]
    if not any(k.startswith("feature_norms.") for k in renamed):  # a classifier becomes a dense backbone
        renamed.update({k: v for k, v in own.items() if k.startswith("feature_norms.")})
    for k in [k for k in renamed if k.endswith(".rpb") and k in own]:
        renamed[k] = resize_rpb(renamed[k], (own[k].shape[-1] + 1) // 2)
    return renamed


_MASK2FORMER = ["coco_instance", "coco_panoptic"]
_MASK2FORMER += [f"{data}_{task}" for data in ("ade20k", "cityscapes") for task in ("instance", "panoptic", "semantic")]
_DENSE_TAGS = {  # the form of the model that a checkpoint is for: its dilations
    "maskrcnn_3x_coco": "det",
    "cascade_maskrcnn_3x_coco": "det",
    "upernet_ade20k": "seg",
    "upernet_r640_ade20k": "seg640",
    **{f"mask2former_{data}": "mask2former" for data in _MASK2FORMER},
}


def _cfg(url: str = "", project: str = "dinat", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://shi-labs.com/projects/{project}/checkpoints/{url}" if url else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2209.15001",
        **kwargs,
    }


_conv_cfg = partial(_cfg, first_conv="patch_embed.proj.0")
_nat_cfg = partial(
    _conv_cfg, project="nat", paper_name="Neighborhood Attention Transformer", paper_ids="arXiv:2204.07143"
)
_DENSE: dict[str, Any] = {"num_classes": 0}
_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_22K: dict[str, Any] = {"num_classes": 21841}
_FLAT: dict[str, Any] = {"pool_size": (14, 14)}
_TEST: dict[str, Any] = {"input_size": (3, 96, 96), "pool_size": (3, 3), "crop_pct": 1.0}
_NATS = [f"nat_{size}" for size in ("mini", "tiny", "small", "base")]
_DINATS: list[tuple[Any, str]] = [
    *((_conv_cfg, f"dinat_{size}") for size in ("mini", "tiny", "small", "base")),
    *((_cfg, f"dinat_s_{size}") for size in ("tiny", "small", "base")),
]
_LARGES: list[tuple[Any, str]] = [(_conv_cfg, "dinat_large"), (_cfg, "dinat_s_large")]
_FLATS = [f"{kind}_{size}" for kind in ("nat_isotropic", "dinat_isotropic", "vitrpb") for size in ("small", "base")]

default_cfgs = generate_default_cfgs(
    {
        **{f"{n}.in1k": _nat_cfg(f"CLS/{n}.pth") for n in _NATS},
        **{f"{n}.in1k": c(f"imagenet1k/{n}_in1k_224.pth") for c, n in _DINATS},
        **{f"{n}.in1k": _cfg(f"isotropic/{n}_in1k_224.pth", **_FLAT) for n in _FLATS},
        "dinat_large.in22k_ft_in1k": _conv_cfg("imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _conv_cfg("imagenet1k/dinat_large_in22k_in1k_384.pth", **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _conv_cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **_384),
        "dinat_large_21k.in22k": _conv_cfg("imagenet22k/dinat_large_in22k_224.pth", **_22K),
        "dinat_large_21k_11x11.in22k": _conv_cfg("imagenet22k/dinat_large_in22k_224_11x11interp.pth", **_22K),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_384.pth", **_384),
        "dinat_s_large_21k.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", **_22K),
        # backbones of detectors and segmentors
        **{f"{n}.maskrcnn_3x_coco": _nat_cfg(f"DET/{n}_maskrcnn.pth", **_DENSE) for n in _NATS[:3]},
        **{f"{n}.cascade_maskrcnn_3x_coco": _nat_cfg(f"DET/{n}_cascademaskrcnn.pth", **_DENSE) for n in _NATS},
        **{f"{n}.upernet_ade20k": _nat_cfg(f"SEG/{n}_upernet.pth", **_DENSE) for n in _NATS},
        **{f"{n}.maskrcnn_3x_coco": c(f"coco/maskrcnn_{n}.pth", **_DENSE) for c, n in _DINATS if "base" not in n},
        **{
            f"{n}.cascade_maskrcnn_3x_coco": c(f"coco/cascadedmaskrcnn_{n}.pth", **_DENSE) for c, n in _DINATS + _LARGES
        },
        **{f"{n}.upernet_ade20k": c(f"ade20k/upernet_{n}.pth", **_DENSE) for c, n in _DINATS},
        **{f"{n}.upernet_r640_ade20k": c(f"ade20k/upernet_{n}.pth", **_DENSE) for c, n in _LARGES},
        **{
            f"dinat_large_384_11x11.mask2former_{d}": _conv_cfg(
                f"m2f/mask2former_dinat_large_{d}.pth", **_384, **_DENSE
            )
            for d in _MASK2FORMER
        },
        "test_nat.untrained": _nat_cfg(**_TEST),
        "test_dinat_s.untrained": _cfg(**_TEST),
        "test_nat_isotropic.untrained": _cfg(**{**_TEST, "pool_size": (6, 6)}),
    }
)


def _create_nat(variant: str, pretrained: bool, model_args: dict[str, Any], **kwargs: Any) -> NAT:
    cfg = kwargs.get("pretrained_cfg")
    tag = cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", cfg)
    form: dict[str, Any] = {}
    if tag in _DENSE_TAGS:
        form["feature_norms"] = (0, 1, 2, 3)
        if variant.startswith("dinat"):
            form["dilations"] = _DENSE_TAGS[tag] + ("_s" if variant.startswith("dinat_s_") else "")
    kwargs = {**model_args, **form, **kwargs}
    model = build(
        NAT,
        variant,
        pretrained,
        checkpoint_filter_fn,
        taps=None,
        flatten_sequential=True,
        getter_for="feature_norms",
        **kwargs,
    )
    update_model_args(model, **{k: kwargs[k] for k in form})
    return model


_MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "mlp_ratio": 3.0}
_TINY = {"embed_dim": 64, "depths": (3, 4, 18, 5), "mlp_ratio": 3.0}
_SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0}
_BASE = {"embed_dim": 128, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0, "ls_init_value": 1e-5}
_LARGE = {"embed_dim": 192, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0}
_S_TINY = {"layout": "patch", "embed_dim": 96, "depths": (2, 2, 6, 2), "mlp_ratio": 4.0}
_S_SMALL = {"layout": "patch", "embed_dim": 96, "depths": (2, 2, 18, 2), "mlp_ratio": 4.0}
_S_BASE = {"layout": "patch", "embed_dim": 128, "depths": (2, 2, 18, 2), "mlp_ratio": 4.0}
_S_LARGE = {"layout": "patch", "embed_dim": 192, "depths": (2, 2, 18, 2), "mlp_ratio": 4.0}
_FLAT_SMALL = {"layout": "flat", "embed_dim": 384, "depths": (1,) * 12, "mlp_ratio": 4.0}
_FLAT_BASE = {"layout": "flat", "embed_dim": 768, "depths": (1,) * 12, "mlp_ratio": 4.0}


@register_model
def test_nat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Tiny DiNAT for tests."""
    form = {"kernel_size": 3, "dilations": (1, (1, 4), (1, 2), 1), "mlp_ratio": 2.0, "ls_init_value": 0.1}
    model_args = {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 8), **form}
    return _create_nat("test_nat", pretrained, model_args, **kwargs)


@register_model
def test_dinat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Tiny DiNAT_s for tests."""
    form = {"layout": "patch", "kernel_size": 3, "dilations": ((1, 4), 1, (1, 2), 1), "mlp_ratio": 2.0}
    model_args = {"embed_dim": 16, "depths": (2, 1, 2, 1), "num_heads": (2, 2, 4, 8), **form}
    return _create_nat("test_dinat_s", pretrained, model_args, **kwargs)


@register_model
def test_nat_isotropic(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Tiny isotropic DiNAT for tests."""
    form = {"layout": "flat", "kernel_size": 3, "dilations": (1, 2, 1, 2), "mlp_ratio": 2.0}
    return _create_nat("test_nat_isotropic", pretrained, {"embed_dim": 64, "depths": (1,) * 4, **form}, **kwargs)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini; trained with ``drop_path_rate=0.2``."""
    return _create_nat("nat_mini", pretrained, _MINI, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny; trained with ``drop_path_rate=0.2``."""
    return _create_nat("nat_tiny", pretrained, _TINY, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small; trained with ``drop_path_rate=0.3``."""
    return _create_nat("nat_small", pretrained, {**_SMALL, "ls_init_value": 1e-5}, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base; trained with ``drop_path_rate=0.5``."""
    return _create_nat("nat_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini; trained with ``drop_path_rate=0.2``."""
    return _create_nat("dinat_mini", pretrained, {**_MINI, "dilations": "224"}, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny; trained with ``drop_path_rate=0.2``."""
    return _create_nat("dinat_tiny", pretrained, {**_TINY, "dilations": "224"}, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small; trained with ``drop_path_rate=0.3``."""
    return _create_nat("dinat_small", pretrained, {**_SMALL, "dilations": "224"}, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base; trained with ``drop_path_rate=0.5``."""
    return _create_nat("dinat_base", pretrained, {**_BASE, "dilations": "224"}, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large; fine-tuned with ``drop_path_rate=0.35``."""
    return _create_nat("dinat_large", pretrained, {**_LARGE, "dilations": "224"}, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for 384x384; fine-tuned with ``drop_path_rate=0.35``."""
    return _create_nat("dinat_large_384", pretrained, {**_LARGE, "dilations": "384"}, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for 384x384 with 11x11 windows; fine-tuned with ``drop_path_rate=0.35``."""
    return _create_nat("dinat_large_384_11x11", pretrained, {**_LARGE, "kernel_size": 11, "dilations": "224"}, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large of ImageNet-22k; trained with ``drop_path_rate=0.2``."""
    return _create_nat("dinat_large_21k", pretrained, {**_LARGE, "dilations": "224"}, **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large of ImageNet-22k, its biases resized to 11x11 windows."""
    return _create_nat("dinat_large_21k_11x11", pretrained, {**_LARGE, "kernel_size": 11, "dilations": "224"}, **kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Tiny; trained with ``drop_path_rate=0.2``."""
    return _create_nat("dinat_s_tiny", pretrained, {**_S_TINY, "dilations": "224"}, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Small; trained with ``drop_path_rate=0.3``."""
    return _create_nat("dinat_s_small", pretrained, {**_S_SMALL, "dilations": "224"}, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Base; trained with ``drop_path_rate=0.5``."""
    return _create_nat("dinat_s_base", pretrained, {**_S_BASE, "dilations": "224"}, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large; fine-tuned with ``drop_path_rate=0.35``."""
    return _create_nat("dinat_s_large", pretrained, {**_S_LARGE, "dilations": "224"}, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large for 384x384; fine-tuned with ``drop_path_rate=0.35``."""
    return _create_nat("dinat_s_large_384", pretrained, {**_S_LARGE, "dilations": "384"}, **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT_s-Large of ImageNet-22k; trained with ``drop_path_rate=0.2``."""
    return _create_nat("dinat_s_large_21k", pretrained, {**_S_LARGE, "dilations": "224"}, **kwargs)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Small; trained with ``drop_path_rate=0.1``."""
    return _create_nat("nat_isotropic_small", pretrained, _FLAT_SMALL, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic DiNAT-Small; trained with ``drop_path_rate=0.1``."""
    return _create_nat("dinat_isotropic_small", pretrained, {**_FLAT_SMALL, "dilations": (1, 2) * 6}, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """ViT-rpb-Small, attention to the whole 14x14 map at 224x224; trained with ``drop_path_rate=0.1``."""
    return _create_nat("vitrpb_small", pretrained, {**_FLAT_SMALL, "kernel_size": 14}, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic NAT-Base; trained with ``drop_path_rate=0.4``."""
    return _create_nat("nat_isotropic_base", pretrained, _FLAT_BASE, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Isotropic DiNAT-Base; trained with ``drop_path_rate=0.4``."""
    return _create_nat("dinat_isotropic_base", pretrained, {**_FLAT_BASE, "dilations": (1, 2) * 6}, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """ViT-rpb-Base, attention to the whole 14x14 map at 224x224; trained with ``drop_path_rate=0.4``."""
    return _create_nat("vitrpb_base", pretrained, {**_FLAT_BASE, "kernel_size": 14}, **kwargs)
