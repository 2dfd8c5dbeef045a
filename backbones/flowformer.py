"""Flowformer: hierarchical backbone with Flow-Attention, whose cost is linear in the number of tokens.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows", H. Wu, J. Wu, J. Xu, J. Wang, M. Long, ICML 2022,
https://arxiv.org/abs/2202.06258.  Official code and weights: github.com/thuml/Flowformer (MIT), whose outputs these
models reproduce; names of parameters are changed by :func:`checkpoint_filter_fn`.

Names: the paper calls its vision model Flowformer; ``flowformer_19`` says that it has 19 blocks.

Our choices: any image size is accepted, where the official code takes only the one that it was built for.  Images are
padded to whole patches and maps to even sides, and the position embedding is resampled, as in timm.  Features are the
outputs of the stages, without a norm.

Deviations: the flow is computed in float32 at least, also under autocast and in half precision.  Dropout inside the
feed-forward network, 0 in the released model, is left out; ``drop_rate`` is the dropout before the classifier, and
``drop_path_rate``, 0.2 in the official training, is 0 unless given, as in timm.
"""

import argparse
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
    LayerScale,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    is_exporting,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .layers import FlowAttention, Panel
from .layers.about import NAMED_SIZES, About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import ANY, check_heads, check_lengths, checked, need, scaled
from .layers.mlp import Mlp
from .layers.panel import cell_at, seen_by, tiled
from .layers.plain import project
from .layers.resampling import position_map

__all__ = ["Flowformer"]

ABOUT = About(
    "Flowformer",
    "github.com/thuml/Flowformer, commit 61f5d8c, MIT; weights on a share page that its README names.",
    (
        (
            'H. Wu, J. Wu, J. Xu, J. Wang, M. Long, "Flowformer: Linearizing Transformers with Conservation Flows", '
            "ICML 2022",
            "2202.06258",
        ),
    ),
    golden=("flow_*",),
    checked="Models of four sizes, for images of 32 to 256 pixels, were also run beside the official code: outputs and "
    "the gradient of every parameter agree to 2e-6; so does the attention alone, of images, general and causal, from "
    "one token on, to 3e-7.  The profiler counts 6.870 GMACs at 224x224 and 27.476 at 448x448.",
    limits=(
        "``pretrained=True`` downloads nothing: the official weights lie on a share page (cloud.tsinghua.edu.cn/d/"
        "82d93375f97f4ca58886), of whose files we have seen none.  A file from there loads by ``pretrained=True, "
        'pretrained_cfg_overlay={"file": "PATH"}``, strictly.  The accuracy is the paper\'s.',
        "Linear cost pays at high resolution.  We claim no speed over the official code, whose form is linear too.",
        NAMED_SIZES.format("all models"),
    ),
    example="""
        # Flow-Attention drops into other models, and attends to other tokens
        from vizoo.backbones.layers import FlowAttention, FlowCrossAttention

        vit = timm.create_model("vit_tiny_patch16_224")
        for block in vit.blocks:
            block.attn = FlowAttention(dim=192, num_heads=3)
        print(vit(image).shape)
        cross = FlowCrossAttention(dim=64, num_heads=4, source_dim=192)
        print(cross(torch.randn(1, 10, 64), torch.randn(1, 197, 192)).shape)
    """,
)

_norm_layer = partial(LayerNorm, eps=1e-6)


@register_notrace_module  # resamples by the size of its input
class PositionEmbedding(nn.Module):
    """Learned vector of each token of a grid, resampled for maps of any other size.

    Args:
        grid: Rows and columns.
        dim: Channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, *grid, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Truncated normal."""
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add it to a map ``[B, H, W, C]``."""
        return x + position_map(self.weight, x.shape[1], x.shape[2])

    @torch.jit.ignore
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the vectors for another grid, once and for all."""
        resampled = position_map(self.weight.detach(), *grid)
        self.weight = nn.Parameter(resampled.clone(), requires_grad=self.weight.requires_grad)


@register_notrace_module  # pads by the size of its input
class Downsample(nn.Module):
    """Convolution of 2x2 tokens with stride 2, after zeros below and to the right of an odd map.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 2, stride=2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, dim]`` to ``[B, H', W', out_dim]``, half as high and wide, rounded up."""
        pad_h, pad_w = x.shape[1] % 2, x.shape[2] % 2
        if is_exporting() or pad_h > 0 or pad_w > 0:  # exported graphs keep height and width free
            x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h])
        x = x.permute(0, 3, 1, 2)
        x = self.proj(x) if torch.jit.is_scripting() else project(self.proj, x)
        return x.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm block: Flow-Attention without, and a feed-forward network with LayerScale.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        qkv_bias: Bias of the query, key and value projection.
        init_values: What LayerScale starts from; 0 or None leaves it out.
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-5,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = _norm_layer(dim, **dd)
        self.attn = FlowAttention(dim, num_heads, qkv_bias=qkv_bias, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = Mlp(dim, scaled(dim, mlp_ratio=mlp_ratio), **dd)
        self.layer_scale = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.layer_scale(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Downsampling, unless it is the first stage, and blocks.

    Args:
        in_dim: Channels of the stage before.
        dim: Channels.
        depth: Number of blocks.
        num_heads: Attention heads.
        downsample: Halve height and width first.
        mlp_ratio: Hidden channels of the feed-forward networks over ``dim``.
        qkv_bias: Bias of the query, key and value projections.
        init_values: What LayerScale starts from; 0 or None leaves it out.
        drop_path: Stochastic depth rate of each block.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        downsample: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float | None,
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = Downsample(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    init_values=init_values,
                    drop_path=drop_path[i],
                    **dd,
                )
                for i in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, in_dim]`` to ``[B, H', W', dim]``."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Flowformer(nn.Module):
    """Flowformer for images: four stages of Flow-Attention at strides 4, 8, 16 and 32.

    Args:
        img_size: Image size that the position embedding is made for; it is resampled for images of any other.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of every stage.
        mlp_ratio: Hidden channels of the feed-forward networks over the stage's.
        qkv_bias: Bias of the query, key and value projections.
        init_values: What LayerScale of the feed-forward networks starts from; 0 or None leaves it out (timm's
            ``create_model`` drops None).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_lengths(embed_dims=embed_dims, depths=depths)
        check_heads(embed_dims, [num_heads] * len(embed_dims), embed_dims=tuple(embed_dims), num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=4,
            in_chans=in_chans,
            embed_dim=embed_dims[0],
            strict_img_size=False,
            dynamic_img_pad=True,
            flatten=False,
            output_fmt="NHWC",
            **dd,
        )
        grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        self.pos_embed = PositionEmbedding(grid, embed_dims[0], **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        in_dim = embed_dims[0]
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            stages.append(
                Stage(
                    in_dim,
                    dim,
                    depth,
                    num_heads,
                    downsample=i > 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    init_values=init_values,
                    drop_path=rates[i],
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.num_stages = len(stages)  # also of a pruned model
        self.num_features = in_dim
        self.norm: nn.Module = _norm_layer(in_dim, **dd)
        self.head = ClassifierHead(
            in_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official code: truncated normal for linear layers.

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

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay would only shrink."""
        return {"pos_embed.weight"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed|^pos_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
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
    @checked()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size that positions are made for: they are resampled once, instead of in every pass.

        Args:
            img_size: Side, or height and width, in pixels.
        """
        size = to_2tuple(img_size)
        self.patch_embed.set_input_size(img_size=size)
        self.pos_embed.set_grid(self.patch_embed.dynamic_feat_size(size))
        update_model_input_size(self, size)

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
            norm: Apply the final norm to the last stage's feature.
            stop_early: Run no stage after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Return the features only.

        Returns:
            The features, or ``(final, features)`` with ``final`` as of :meth:`forward_features`.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        features: list[Tensor] = []
        x = self.pos_embed(self.patch_embed(x))
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript cannot slice the stages
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        last = 0
        for last, stage in enumerate(stages):
            x = stage(x)
            if last in take_indices:
                feature = self.norm(x) if norm and last == self.num_stages - 1 else x
                features.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return features
        if last == self.num_stages - 1:
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
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the normed last map ``[B, H, W, num_features]``."""
        x = self.pos_embed(self.patch_embed(x))
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, H, W, num_features]`` to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)

    @torch.jit.ignore
    @checked(stage=ANY, block=ANY)
    def explain(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5), stage: int = 1, block: int = -1
    ) -> list[Panel]:
        """What competition and allocation of one block leave to each token, and what the token at a point takes.

        Args:
            image: ``[1, in_chans, height, width]``, normalised.
            point: Row and column as fractions of the image.
            stage: Stage of the block, from 0.
            block: Block of the stage; negative ones count from the end.

        Returns:
            Three panels, each the mean of the heads.

        Raises:
            ValueError: If there is no such stage or block.
        """
        need(0 <= stage < len(self.stages), f"a whole number from 0 to {len(self.stages) - 1}", stage=stage)
        blocks: Any = self.stages[stage].blocks
        need(
            -len(blocks) <= block < len(blocks), f"a whole number from {-len(blocks)} to {len(blocks) - 1}", block=block
        )
        attn = blocks[block].attn
        (((x, *_), _),) = seen_by(self, image, [attn])
        size, pixels = x.shape[1:3], self.feature_info[stage]["reduction"]
        row, col = cell_at(point, size, [pixels / side for side in image.shape[2:]])
        with torch.no_grad():
            _, allocation, competition = attn.flows(x)
            taken = attn.weights_at(x, row * size[1] + col)
        place = f"stage {stage}, block {block % len(blocks)}"
        shown = {
            f"Competition of the sources, {place}": (competition, "weight of a token's value"),
            f"Allocation of the sinks, {place}": (allocation, "share of a token's result"),
            f"What the token at the point takes, {place}": (
                taken * taken.shape[-1],
                "weight of a value, times their number",
            ),
        }
        panels = []
        for title, (flow, bar) in shown.items():
            heat = flow[0].mean(0).reshape(size).float()
            panels.append(Panel(title=title, heat=heat, area=tiled(image, heat, (pixels, pixels)), bar=bar))
        return panels


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official checkpoints in our names, and positions of another image size resampled to the model's.

    Args:
        state_dict: Checkpoint or state dict; one in our names keeps them.
        model: The model to load.

    Returns:
        A state dict for ``model``.

    Raises:
        ValueError: If the official positions are of no square map.
    """
    state_dict = unwrap(state_dict, dense=True)
    renamed = {}
    for k, v in state_dict.items():
        k = re.sub(r"^pos_embed$", "pos_embed.weight", k)
        k = re.sub(r"^patch_embed\.0\.", "patch_embed.", k)
        k = re.sub(r"^patch_embed\.(\d+)\.", r"stages.\1.downsample.", k)
        k = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", k)
        k = re.sub(r"^(stages\.\d+\.blocks\.\d+)\.gamma$", r"\1.layer_scale.gamma", k)
        k = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", k)
        renamed[k] = v
    if "pos_embed.weight" in renamed:
        positions = model.get_parameter("pos_embed.weight")
        weight = _as_map(renamed["pos_embed.weight"])
        renamed["pos_embed.weight"] = position_map(weight, positions.shape[1], positions.shape[2])
    return renamed


def _as_map(pos_embed: Tensor) -> Tensor:
    """Official positions ``[1, N, C]`` as those of a square map ``[1, h, w, C]``, which ours are."""
    if pos_embed.dim() == 4:
        return pos_embed
    side = math.isqrt(pos_embed.shape[1])
    if side * side != pos_embed.shape[1]:
        raise ValueError(f"got pos_embed of {pos_embed.shape[1]} tokens, need a square number")
    return pos_embed.unflatten(1, (side, side))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
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
        "origin_url": "https://github.com/thuml/Flowformer",
        "paper_name": "Flowformer: Linearizing Transformers with Conservation Flows",
        "paper_ids": "arXiv:2202.06258",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "flowformer_19.in1k": _cfg(),
        "test_flowformer.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0),
    }
)


def _create_flowformer(variant: str, pretrained: bool = False, **kwargs: Any) -> Flowformer:
    # the official training code stores its command line beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        return build(
            Flowformer, variant, pretrained, checkpoint_filter_fn, flatten_sequential=True, rounds=None, **kwargs
        )


@register_model
def test_flowformer(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """Tiny Flowformer for tests."""
    # LayerScale of 1, so that tests see what the blocks do
    model_args = {
        "img_size": 96,
        "embed_dims": (16, 32, 64, 128),
        "depths": (1, 1, 2, 1),
        "num_heads": 4,
        "init_values": 1.0,
    }
    return _create_flowformer("test_flowformer", pretrained, **{**model_args, **kwargs})


@register_model
def flowformer_19(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """Flowformer; trained with ``drop_path_rate=0.2``."""
    return _create_flowformer("flowformer_19", pretrained, **kwargs)
