"""TransNeXt and MoH-ViT: hierarchical backbones with aggregated attention, and with a mixture of its heads.

Papers: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", D. Shi, CVPR 2024,
https://arxiv.org/abs/2311.17132; "MoH: Multi-Head Attention as Mixture-of-Head Attention", P. Jin, B. Zhu, L. Yuan,
S. Yan, ICML 2025, https://arxiv.org/abs/2410.11842.  Official code and weights: github.com/DaiShiResearch/TransNeXt and
github.com/SkyworkAI/MoH (both Apache-2.0), whose outputs these models reproduce; names of parameters are changed by
:func:`checkpoint_filter_fn`.

Names: ``moh_vit_small_80`` is the official ``moh_transnext_small_80``: TransNeXt-Small whose tokens use 80 % of the
heads, on average.  ``transnext_micro_aaaa`` has aggregated attention in all four stages.

Deviations: any image size is accepted.  By default the position bias is made for the map at hand, as with the official
``is_extrapolation=True`` of the dense models; ``bias_size=800`` or ``512`` makes it for images of that size and resizes
it, as the released detectors and segmentors do.  A map smaller than the pooling has one pooled token, where the
official code fails.  The load-balance value is kept by each layer, not in a list of the class that grows in every pass
in training mode.  Dropout of attention and features, 0 in every released model, is left out; ``drop_rate`` is the
dropout before the classifier and ``drop_path_rate`` is 0 unless given, as in timm.

Our choices: heads that a token does not use are computed and weighted with 0.  To skip them is exact too, but on a CPU
it was no faster for the 7x7 and 14x14 tokens of images of 224 pixels in our measurements, and the paper gives no speed
for images: "80 % of the heads" is no statement on time.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_module,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from .layers import Panel
from .layers.about import About
from .layers.aggregated_attention import AggregatedAttention, LengthScaledAttention
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import (
    ANY,
    Range,
    check_counts,
    check_heads,
    check_lengths,
    check_positions,
    checked,
    is_sequence,
    need,
    scaled,
)
from .layers.mixture_of_heads import MixtureOfHeads, load_balance
from .layers.panel import cell_at, seen_by, tiled
from .layers.plain import depthwise, fuses, project, tensors
from .ops.conv_ffn import conv_ffn
from .ops.depthwise3x3 import depthwise3x3
from .ops.position_bias import BiasCache

__all__ = ["TransNeXt"]

ABOUT = About(
    "TransNeXt and MoH-ViT",
    "github.com/DaiShiResearch/TransNeXt, commit c8a9974, and github.com/SkyworkAI/MoH, commit 2cefd57, both "
    "Apache-2.0; weights released by their authors.",
    (
        (
            'D. Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024',
            "2311.17132",
        ),
        (
            'P. Jin, B. Zhu, L. Yuan, S. Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", ICML 2025',
            "2410.11842",
        ),
    ),
    golden=("moh_*",),
    limits=(
        "Weights of MoH-ViT are at huggingface.co/Chat-UniVi (``MoH-ViT-S-80``, ``MoH-ViT-S-75``, ``MoH-ViT-B-75``, "
        "``MoH-ViT-B-50``), under names of files that we could not look up: download one and give "
        "``pretrained=True, pretrained_cfg_overlay={'file': 'FILE.pth'}``.",
    ),
    example="""
        # a mixture of heads for any ViT of timm: one head works for all tokens, of the two others each chooses one
        from vizoo.backbones.layers import load_balance, moh

        vit = timm.create_model("vit_tiny_patch16_224")
        vit = moh(vit, shared=1, routed=1)
        loss = vit.train()(image).logsumexp(1).sum() + 0.01 * load_balance(vit)
        loss.backward()
    """,
)

_norm_layer = partial(LayerNorm, eps=1e-6)
AUX_WEIGHT = 0.01  # of the load-balance value in the loss: the published training


class OverlapPatchEmbed(nn.Module):
    """Convolution with overlapping patches, and layer norm.

    Args:
        in_chans: Channels of the map before.
        dim: Channels.
        kernel_size: Side of the patches, odd.
        stride: Distance of the patches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = LayerNorm(dim, eps=1e-5, **dd)  # unlike all other norms

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, ceil(H / stride), ceil(W / stride), dim]``."""
        x = self.proj(x) if torch.jit.is_scripting() else project(self.proj, x)
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module  # picks its path by the device of its input
class ConvGLU(nn.Module):
    """Gated feed-forward network whose gate is a depthwise 3x3 convolution (TransNeXt, Sec. 3.4).

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels of the hidden map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    fused: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fused = use_fused_attn()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if self.fused and depthwise(self.dwconv, 3):
                if fuses(x, self.fc1, self.fc2):
                    return conv_ffn(x, *tensors(self.fc1, self.dwconv, self.fc2))
                weight, bias = tensors(self.dwconv)
                gate, value = self.fc1(x).chunk(2, -1)
                gate = depthwise3x3(gate.permute(0, 3, 1, 2), weight, bias, gelu=True)
                return self.fc2(gate.permute(0, 2, 3, 1) * value)
        gate, value = self.fc1(x).chunk(2, -1)
        gate = self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last in memory
        return self.fc2(F.gelu(gate) * value)


class Block(nn.Module):
    """Pre-norm block: attention and ConvGLU.

    Args:
        dim: Channels.
        attn: The attention.
        mlp_ratio: Nominal ratio ``r`` of the feed-forward network, which has ``2 r / 3`` times the channels inside.
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = int(2 * scaled(dim, mlp_ratio=mlp_ratio) / 3)
        need(hidden_dim > 0, f"a ratio that leaves one of {dim} channels", mlp_ratios=mlp_ratio)
        self.norm1 = _norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = ConvGLU(dim, hidden_dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Patch embedding, unless it is the first stage, blocks and norm.

    Args:
        downsample: The embedding, or None.
        blocks: The blocks.
        dim: Channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = _norm_layer(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_dim]`` to the normed one ``[B, H', W', dim]``."""
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


@torch.no_grad()
def _attention(name: str, attn: nn.Module, x: Tensor, image: Tensor, pixels: int, point: tuple[float, float]) -> Panel:
    """What a token of a map ``[1, H, W, C]``, whose tokens are as many pixels wide, attends to."""
    sides = pixels / image.shape[2], pixels / image.shape[3]
    row, col = cell_at(point, x.shape[1:3], sides)
    points = torch.tensor([[(row + 0.5) * sides[0], (col + 0.5) * sides[1]]])
    area, boxes = tiled(image, x[0, :, :, 0], (pixels, pixels)), None
    if isinstance(attn, AggregatedAttention):
        near, heat = attn.weights_at(x, row, col)
        name += f": pooled map; the window has {near[0].mean(0).sum():.0%}"
        reach = attn.window_size / 2
        corners = (row + 0.5 - reach, col + 0.5 - reach, row + 0.5 + reach, col + 0.5 + reach)
        boxes = torch.tensor([corners]) * torch.tensor([*sides, *sides])
    else:
        assert isinstance(attn, LengthScaledAttention)  # for mypy
        name, heat = f"{name}: whole map", attn.weights_at(x, row, col)
    heat = heat[0].float().mean(0)
    return Panel(title=name, heat=heat, area=area, boxes=boxes, points=points, bar="attention")


@torch.no_grad()
def _chosen(name: str, gates: MixtureOfHeads, x: Tensor) -> Panel:
    """Which head each token of a map ``[1, H, W, C]`` weighs most of those that it may choose."""
    weights = gates(x)[0, ..., gates.shared :]
    return Panel(title=f"{name}: strongest of {weights.shape[-1]} routed heads", parts=weights.argmax(-1))


class TransNeXt(nn.Module):
    """TransNeXt (Sec. 3.5): four stages at strides 4, 8, 16 and 32, each with a norm at its end; and MoH-ViT.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Side of the attention's window, odd; or that of each stage, of which those over the whole map have
            none (None in the official code).
        sr_ratios: Side of each stage's map over that of its pooled one; 1 for attention over the whole map.
        fixed_pool_size: Side of the pooled maps, whatever the image ("linear mode"); None for ``sr_ratios``.
        mlp_ratios: Nominal ratio of the feed-forward networks of each stage.
        qkv_bias: Bias of the query, key and value projections.
        pretrain_size: Side of the images with which the weights were first trained, 64 at least: the unit of the
            position bias.  It stays 224 (256 for ``transnext_micro_aaaa``) in fine-tuning at another size.
        bias_size: Side of the images for which the position bias is made and then resized to the map at hand; None
            makes it for the map at hand.
        shared_heads: Heads of each stage that every token uses; None for no mixture of heads.
        routed_heads: Heads of each stage that a token chooses among the others.
        aux_weight: What :meth:`extra_loss` weighs :meth:`aux_loss` with.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(pretrain_size=Range(64), bias_size=Range(32))
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: int | Sequence[int | None] = 3,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        fixed_pool_size: int | None = None,
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        qkv_bias: bool = True,
        pretrain_size: int = 224,
        bias_size: int | None = None,
        shared_heads: Sequence[int] | None = None,
        routed_heads: Sequence[int] | None = None,
        aux_weight: float = AUX_WEIGHT,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        count = len(embed_dims)
        check_lengths(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, sr_ratios=sr_ratios, mlp_ratios=mlp_ratios
        )
        check_heads(embed_dims, num_heads, embed_dims=embed_dims, num_heads=num_heads)
        both = (shared_heads is None) == (routed_heads is None)
        need(both, "both or none of them", shared_heads=shared_heads, routed_heads=routed_heads)
        if shared_heads is not None and routed_heads is not None:
            check_counts(count, shared_heads=shared_heads, routed_heads=routed_heads)
        windows: Any = window_size if is_sequence(window_size) else (window_size,) * count
        check_counts(count, window_size=windows)
        given = all(w is not None or sr == 1 for w, sr in zip(windows, sr_ratios, strict=True))
        need(given, "a number for each stage with sr_ratios > 1", window_size=window_size, sr_ratios=sr_ratios)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.aux_weight = aux_weight
        self.output_fmt = "NHWC"
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = OverlapPatchEmbed(in_chans, embed_dims[0], 7, 4, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        in_dim = embed_dims[0]
        for i, dim in enumerate(embed_dims):
            positions: dict[str, Any] = {
                "qkv_bias": qkv_bias,
                "pretrain_map": max(2, pretrain_size // 2 ** (i + 2)),
                "bias_map": None if bias_size is None else max(1, bias_size // 2 ** (i + 2)),
                "shared_heads": None if shared_heads is None else shared_heads[i],
                "routed_heads": 0 if routed_heads is None else routed_heads[i],
                **dd,
            }
            blocks = []
            for j in range(depths[i]):
                attn: nn.Module
                if sr_ratios[i] == 1:
                    attn = LengthScaledAttention(dim, num_heads[i], **positions)
                else:
                    attn = AggregatedAttention(
                        dim, num_heads[i], sr_ratios[i], windows[i], fixed_pool_size, **positions
                    )
                blocks.append(Block(dim, attn, mlp_ratios[i], rates[i][j], **dd))
            downsample = OverlapPatchEmbed(in_dim, dim, 3, 2, **dd) if i > 0 else None
            stages.append(Stage(downsample, blocks, dim, **dd))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self._share_cache()
        self.num_features = in_dim
        self.head = ClassifierHead(
            in_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def _share_cache(self) -> None:
        cache = BiasCache()
        for module in self.modules():
            if isinstance(module, (AggregatedAttention, LengthScaledAttention)):
                module.cache = cache

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official code: truncated normal for linear layers, by the fan-out for convolutions.

        Args:
            needs_reset: First give every layer PyTorch's default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the paper's training does not decay, beside biases and norms."""
        kept = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}

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
                (r"^stages\.(\d+)\.norm", (99999,)),
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
    def aux_loss(self) -> Tensor | None:
        """Load-balance value of the last forward pass in training mode, the mean over the layers that route heads.

        MoH, Sec. 3: for ``E`` heads to choose from, ``E^2`` times the mean over them of the product of their mean
        probability and the share of tokens that chose them; ``routed_heads`` where all are chosen alike.

        Returns:
            A scalar; None without such layers, or before a pass.
        """
        return load_balance(self)

    @torch.jit.ignore
    def extra_loss(self) -> Tensor | None:
        """What training adds to the loss: ``aux_weight * aux_loss()``; None if there is nothing to balance."""
        loss = self.aux_loss()
        return None if loss is None else self.aux_weight * loss

    @torch.jit.ignore
    @checked(blocks=ANY)
    def explain(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5), blocks: Sequence[int] | None = None
    ) -> list[Panel]:
        """What the token at a point attends to, and which heads the tokens choose.

        Args:
            image: ``[1, in_chans, height, width]``, normalised.
            point: Row and column as fractions of the image.
            blocks: Blocks counted from 0 over all stages; None for the last of each stage.

        Returns:
            For each of the blocks the token's attention to the pooled map, or to the whole one, the mean of the heads,
            with a box around its window; and if the block routes heads, the one with the largest gate at each token.

        Raises:
            ValueError: If a setting is out of range.
        """
        layers: list[tuple[int, int, Any]] = [
            (i, j, block.attn)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)  # type: ignore[union-attr, arg-type]
        ]
        if blocks is None:
            blocks = [*{i: n for n, (i, _, _) in enumerate(layers)}.values()]
        check_positions(len(layers), blocks=blocks)
        chosen = [layers[i] for i in blocks]
        panels = []
        for (i, j, attn), ((x, *_), _) in zip(chosen, seen_by(self, image, [a for _, _, a in chosen]), strict=True):
            name = f"Stage {i}, block {j}"
            panels.append(_attention(name, attn, x, image, self.feature_info[i]["reduction"], point))
            if attn.gates is not None and attn.gates.routed:
                panels.append(_chosen(name, attn.gates, x))
        return panels

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, normed as in the official dense models.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Stages to return; an int means the last ones, None all.
            norm: Without effect, as every stage ends with its norm.
            stop_early: Run no stage after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Return the features only.

        Returns:
            The features, or ``(final, features)`` with ``final`` as of :meth:`forward_features`.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        features: list[Tensor] = []
        x = self.patch_embed(x)
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript cannot slice the stages
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                features.append(x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x)
        if intermediates_only:
            return features
        return x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need.

        Args:
            indices: Stages to keep the features of, as in :meth:`forward_intermediates`.
            prune_norm: Without effect, as the norms belong to the features.
            prune_head: Remove the classifier.

        Returns:
            The stages as positive numbers.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the normed last map ``[B, H, W, num_features]``."""
        x = self.patch_embed(x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, H, W, num_features]`` to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classification, detection and segmentation checkpoints in our names.

    Args:
        state_dict: Checkpoint or state dict; one in our names is returned as it is.
        model: The model to load; a dense checkpoint leaves its classifier as it is.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict, dense=True)
    if any(k.startswith("stages.") for k in state_dict):
        return state_dict

    renamed = {}
    for k, v in state_dict.items():
        k = re.sub(r"^patch_embed1\.", "patch_embed.", k)
        k = re.sub(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.", k)
        k = re.sub(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", k)
        k = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", k)
        k = re.sub(r"\.attn\.(wg|wg_0|wg_1)\.", r".attn.gates.\1.", k)
        k = k.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")
        renamed[re.sub(r"^head\.", "head.fc.", k)] = v
    return renamed


_HUB = "https://huggingface.co/DaiShiResearch/"
_DENSE_TAGS = {  # bias_size of the released detectors and segmentors
    "maskrcnn_1x_coco": 800,
    "dino_4scale_12e_coco": 800,
    "dino_5scale_12e_coco": 800,
    "upernet_ade20k": 512,
    "mask2former_ade20k_semantic": 512,
}


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _HUB + url if url else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        "paper_name": "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "paper_ids": "arXiv:2311.17132",
        **kwargs,
    }


_moh_cfg = partial(
    _cfg,
    origin_url="https://github.com/SkyworkAI/MoH",
    paper_name="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    paper_ids="arXiv:2410.11842",
)
_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}
_SIZES = ("micro", "tiny", "small", "base")
_DENSE_FILES = {
    "maskrcnn_1x_coco": "maskrcnn-transnext-{0}-coco/resolve/main/mask_rcnn_transnext_{0}_fpn_1x_coco_in1k.pth",
    "dino_4scale_12e_coco": "dino-4scale-transnext-{0}-coco/resolve/main/dino_4scale_transnext_{0}_12e_in1k.pth",
    "dino_5scale_12e_coco": "dino-5scale-transnext-{0}-coco/resolve/main/dino_5scale_transnext_{0}_12e_in1k.pth",
    "upernet_ade20k": "upernet-transnext-{0}-ade/resolve/main/upernet_transnext_{0}_512x512_160k_ade20k_in1k.pth",
    "mask2former_ade20k_semantic": (
        "mask2former-transnext-{0}-ade/resolve/main/mask2former_transnext_{0}_512x512_160k_ade20k_in1k.pth"
    ),
}
_MOHS = ("small_80", "small_75", "base_75", "base_50")

default_cfgs = generate_default_cfgs(
    {
        **{f"transnext_{s}.in1k": _cfg(f"transnext-{s}-224-1k/resolve/main/transnext_{s}_224_1k.pth") for s in _SIZES},
        **{
            f"transnext_{s}.r384_in1k": _cfg(
                f"transnext-{s}-384-1k-ft-1k/resolve/main/transnext_{s}_384_1k_ft_1k.pth", **_384
            )
            for s in _SIZES[2:]
        },
        "transnext_micro_aaaa.in1k": _cfg(
            "transnext-micro-AAAA-256-1k/resolve/main/transnext_micro_AAAA_256_1k.pth",
            input_size=(3, 256, 256),
            pool_size=(8, 8),
            crop_pct=224 / 256,
        ),
        # backbones of detectors and segmentors
        **{
            f"transnext_{s}.{tag}": _cfg(file.format(s), num_classes=0)
            for tag, file in _DENSE_FILES.items()
            for s in (_SIZES[1:2] if "4scale" in tag else _SIZES[1:])
        },
        # released under huggingface.co/Chat-UniVi, by names of files that we could not verify
        **{f"moh_vit_{s}.in1k": _moh_cfg() for s in _MOHS},
        "test_transnext.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0),
        "test_moh_vit.untrained": _moh_cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0),
    }
)


def _create_transnext(variant: str, pretrained: bool, model_args: dict[str, Any], **kwargs: Any) -> TransNeXt:
    cfg = kwargs.get("pretrained_cfg")
    tag = cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", cfg)
    form = {"bias_size": _DENSE_TAGS[tag]} if tag in _DENSE_TAGS else {}
    kwargs = {**model_args, **form, **kwargs}
    model = build(TransNeXt, variant, pretrained, checkpoint_filter_fn, flatten_sequential=True, **kwargs)
    update_model_args(model, **{k: kwargs[k] for k in form})
    return model


_MICRO = {"embed_dims": (48, 96, 192, 384), "depths": (2, 2, 15, 2), "num_heads": (2, 4, 8, 16)}
_TINY = {"embed_dims": (72, 144, 288, 576), "depths": (2, 2, 15, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32)}
_TEST = {"embed_dims": (20, 40, 60, 80), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "pretrain_size": 96}


@register_model
def test_transnext(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """Tiny TransNeXt for tests."""
    return _create_transnext("test_transnext", pretrained, _TEST, **kwargs)


@register_model
def test_moh_vit(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """Tiny MoH-ViT for tests."""
    model_args = {**_TEST, "num_heads": (2, 4, 6, 8), "shared_heads": (2, 1, 0, 3), "routed_heads": (0, 2, 3, 2)}
    return _create_transnext("test_moh_vit", pretrained, model_args, **kwargs)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro."""
    return _create_transnext("transnext_micro", pretrained, _MICRO, **kwargs)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro with aggregated attention in all four stages, for 256x256 pixels."""
    model_args = {**_MICRO, "sr_ratios": (16, 8, 4, 2), "pretrain_size": 256}
    return _create_transnext("transnext_micro_aaaa", pretrained, model_args, **kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Tiny."""
    return _create_transnext("transnext_tiny", pretrained, _TINY, **kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Small."""
    return _create_transnext("transnext_small", pretrained, _SMALL, **kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Base."""
    return _create_transnext("transnext_base", pretrained, _BASE, **kwargs)


@register_model
def moh_vit_small_80(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-S with 80 % of the heads activated."""
    model_args = {**_SMALL, "shared_heads": (3, 6, 3, 8), "routed_heads": (0, 0, 6, 12)}
    return _create_transnext("moh_vit_small_80", pretrained, model_args, **kwargs)


@register_model
def moh_vit_small_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-S with 75 % of the heads activated."""
    model_args = {**_SMALL, "shared_heads": (3, 6, 3, 4), "routed_heads": (0, 0, 6, 12)}
    return _create_transnext("moh_vit_small_75", pretrained, model_args, **kwargs)


@register_model
def moh_vit_base_75(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-B with 75 % of the heads activated."""
    model_args = {**_BASE, "shared_heads": (4, 8, 4, 5), "routed_heads": (0, 0, 8, 16)}
    return _create_transnext("moh_vit_base_75", pretrained, model_args, **kwargs)


@register_model
def moh_vit_base_50(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """MoH-ViT-B with 50 % of the heads activated."""
    model_args = {**_BASE, "shared_heads": (2, 2, 2, 4), "routed_heads": (2, 4, 6, 8)}
    return _create_transnext("moh_vit_base_50", pretrained, model_args, **kwargs)
