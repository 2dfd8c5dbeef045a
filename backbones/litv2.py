"""LITv2: hierarchical backbone with HiLo attention and deformable token merging.

Paper: "Fast Vision Transformers with HiLo Attention", Z. Pan, J. Cai, B. Zhuang, NeurIPS 2022,
https://arxiv.org/abs/2205.13213; the token merging is that of "Less is More: Pay Less Attention in Vision
Transformers", AAAI 2022, https://arxiv.org/abs/2105.14217.  Official code and weights: github.com/ziplab/LITv2
(Apache-2.0), whose outputs these models reproduce; names of parameters are changed by :func:`checkpoint_filter_fn`.

Deviations: any image size is accepted, padded as in the official detection and segmentation code (the official
classification code takes only the size it was built for).  Dropout inside the feed-forward network, 0 in every released
model, is left out; ``drop_rate`` is the dropout before the classifier, as in timm.
"""

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_module,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import HiLo, Panel
from .layers.about import NAMED_SIZES, About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import ANY, check_heads, check_lengths, check_stages, checked, is_sequence, need, scaled
from .layers.panel import seen_by, tiled
from .layers.plain import depthwise, fuses, project, tensors
from .ops.conv_ffn import conv_ffn
from .ops.deform_merge import deform_sample, reference_deform_sample
from .ops.depthwise3x3 import depthwise3x3

__all__ = ["LITv2"]

ABOUT = About(
    "LITv2 (HiLo attention)",
    "github.com/ziplab/LITv2, commit 7501c86, Apache-2.0; weights released in the same repository.",
    (
        (
            'Z. Pan, J. Cai, B. Zhuang, "Fast Vision Transformers with HiLo Attention", NeurIPS 2022',
            "2205.13213",
        ),
    ),
    limits=(
        NAMED_SIZES.format("all models"),
        "Images have at least 29x29 pixels.",
    ),
    example="""
        # HiLo attention drops into other models
        from vizoo.backbones.layers import HiLo

        vit = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg")
        for block in vit.blocks:
            block.attn = HiLo(dim=192, num_heads=3, qkv_bias=True, window_size=2, alpha=0.7)
        print(vit(image).shape)
    """,
)

_logger = logging.getLogger(__name__)
_norm_layer = partial(LayerNorm, eps=1e-5)


@register_notrace_module  # picks its path by the device of its input
class ConvFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution, the only source of position (Sec. 3.3).

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
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if self.fused and depthwise(self.dwconv, 3):
                if fuses(x, self.fc1, self.fc2):
                    return conv_ffn(x, *tensors(self.fc1, self.dwconv, self.fc2))
                weight, bias = tensors(self.dwconv)
                x = depthwise3x3(self.fc1(x).permute(0, 3, 1, 2), weight, bias, gelu=True)
                return self.fc2(x.permute(0, 2, 3, 1))
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2))  # [B, H, W, M] -> [B, M, H, W], channels-last in memory
        return self.fc2(F.gelu(x.permute(0, 2, 3, 1)))


@register_notrace_module  # the sampling grid follows the size of its input
class DeformableTokenMerging(nn.Module):
    """Deformable 2x2 stride-2 convolution, batch norm and GELU between two stages (LITv1, Sec. 3.3).

    An odd map loses its last row or column as a start point.

    Args:
        dim: Input channels.
        out_dim: Output channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    fused: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fused = use_fused_attn()
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2, **dd)
        self.offset = nn.Conv2d(dim, 8, 2, stride=2, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens.

        Args:
            x: Map ``[B, H, W, C]`` of at least 2x2 tokens.

        Returns:
            ``[B, H // 2, W // 2, out_dim]``.

        Raises:
            ValueError: If the map is smaller than 2x2.
        """
        if x.shape[1] < 2 or x.shape[2] < 2:
            raise ValueError(
                f"got a {x.shape[1]}x{x.shape[2]} map to merge, need at least 2x2 tokens: "
                "use images of at least 32x32 pixels (29x29 is the smallest that works)"
            )
        offset = x.permute(0, 3, 1, 2)
        offset = self.offset(offset) if torch.jit.is_scripting() else project(self.offset, offset)
        offset = offset.permute(0, 2, 3, 1)  # [B, H/2, W/2, 8]
        x = deform_sample(x, offset) if self.fused else reference_deform_sample(x, offset)  # [B, H or H - 1, ..., C]
        x = x.permute(0, 3, 1, 2)
        x = self.conv(x) if torch.jit.is_scripting() else project(self.conv, x)
        return self.act(self.norm(x).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Pre-norm block: HiLo attention, left out for ``window_size=0``, and ConvFFN.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        window_size: Window of HiLo; 0 for a block without attention.
        alpha: Share of low-frequency heads.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        qkv_bias: Bias of the query, key and value projections.
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1: nn.Module | None = None
        self.attn: nn.Module | None = None
        self.drop_path1: nn.Module | None = None
        if window_size > 0:
            self.norm1 = _norm_layer(dim, **dd)
            self.attn = HiLo(dim, num_heads, qkv_bias=qkv_bias, window_size=window_size, alpha=alpha, **dd)
            self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = ConvFFN(dim, scaled(dim, mlp_ratio=mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        if self.norm1 is not None and self.attn is not None and self.drop_path1 is not None:
            x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Token merging, unless it is the first stage, and blocks.

    Args:
        in_dim: Channels of the stage before.
        dim: Channels.
        depth: Number of blocks.
        num_heads: Attention heads.
        window_size: Window of HiLo; 0 for a stage without attention.
        alpha: Share of low-frequency heads.
        downsample: Merge 2x2 tokens first.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        qkv_bias: Bias of the query, key and value projections.
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
        window_size: int,
        alpha: float,
        downsample: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = DeformableTokenMerging(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    num_heads,
                    window_size=window_size,
                    alpha=alpha,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
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


class LITv2(nn.Module):
    """LITv2 (Sec. 3.3): four stages at strides 4, 8, 16 and 32; attention in the last two only.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dim: Channels of the first stage, doubled in each next one.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window of HiLo in each stage: 0 no attention, 1 plain global attention.  One number ``s`` means
            ``(0, 0, s, 1)``, the form of every released model.  It holds no parameters: weights fit any window.
        alpha: Share of low-frequency heads, 0 to 1.
        mlp_ratio: Hidden channels of the feed-forward networks over the stage's.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        feature_norms: Stages whose feature gets a layer norm of its own, as in the official dense models:
            ``(1, 2, 3)`` detection, ``(0, 1, 2, 3)`` segmentation.  The final norm is then left out.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        windows: Any = window_size if is_sequence(window_size) else (0, 0, window_size, 1)
        fits = len(windows) == len(depths) and (is_sequence(window_size) or windows[2] > 0)
        need(fits, f"one number >= 1 or {len(depths)} numbers >= 0", window_size=window_size, depths=depths)
        check_lengths(depths=depths, num_heads=num_heads)
        check_stages(len(depths), feature_norms=feature_norms)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(dims, num_heads, embed_dim=embed_dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=_norm_layer,
            strict_img_size=False,
            dynamic_img_pad=True,
            flatten=False,
            output_fmt="NHWC",
            **dd,
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        in_dim = embed_dim
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stages.append(
                Stage(
                    in_dim,
                    dim,
                    depth,
                    num_heads[i],
                    window_size=windows[i],
                    alpha=alpha,
                    downsample=i > 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path=rates[i],
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = in_dim
        self.feature_norms = nn.ModuleList(
            _norm_layer(dim, **dd) if i in feature_norms else nn.Identity() for i, dim in enumerate(dims)
        )
        self.norm = nn.Identity() if feature_norms else _norm_layer(in_dim, **dd)
        self.head = ClassifierHead(
            in_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper: truncated normal for linear layers, zero offsets in the token merging.

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
        for module in self.modules():
            if isinstance(module, DeformableTokenMerging):
                nn.init.zeros_(module.offset.weight)
                nn.init.zeros_(module.offset.bias)  # type: ignore[arg-type]
            elif isinstance(module, ConvFFN):
                nn.init.normal_(module.dwconv.weight, std=math.sqrt(2 / 9))
                nn.init.zeros_(module.dwconv.bias)  # type: ignore[arg-type]

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
        x = self.patch_embed(x)
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
        x = self.patch_embed(x)
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
    def explain(self, image: Tensor, stage: int | None = None, block: int = -1) -> list[Panel]:
        """What the Hi-Fi and the Lo-Fi heads of one HiLo layer give: their frequencies (Fig. 4) and where.

        A spectrum is the absolute Fourier transform of the output over the map, its mean over the channels, with the
        constant in the middle.

        Args:
            image: ``[1, in_chans, height, width]``, normalised.
            stage: Stage of the layer, from 0; None for the first with heads of both kinds, or with any.
            block: Block of the stage; negative ones count from the end.

        Returns:
            The spectra, their ratio, and the root mean square over the channels at each token; of the heads that the
            layer has.

        Raises:
            ValueError: If the stage has no attention, or not so many blocks.
        """
        stage, block, hilo = self._hilo(stage, block)
        ((_, out),) = seen_by(self, image, [hilo])
        low = "Lo-Fi" if hilo.window_size > 1 else "Attention"  # without windows there are no low frequencies only
        kinds = zip(("Hi-Fi", low), (hilo.h_heads, hilo.l_heads), hilo.parts(out[0].float()), strict=True)
        parts = {f"{name} ({heads} of {hilo.h_heads + hilo.l_heads} heads)": x for name, heads, x in kinds if heads}
        spectra = [spectrum(x) for x in parts.values()]
        limits = min(float(x.min()) for x in spectra), max(float(x.max()) for x in spectra)
        place, bar = f"stage {stage}, block {block}", "log10 of the amplitude; frequency 0 is in the middle"
        panels = [
            Panel(title=f"{name}: spectrum, {place}", heat=x, bar=bar, limits=limits, alone=True)
            for name, x in zip(parts, spectra, strict=True)
        ]
        if len(spectra) == 2:
            ratio = spectra[0] - spectra[1]
            most = float(ratio.abs().max())
            title, bar = "Hi-Fi over Lo-Fi at each frequency", "log10 of the ratio"
            panels.append(Panel(title=title, heat=ratio, bar=bar, limits=(-most, most), alone=True))
        for name, x in parts.items():
            heat = x.square().mean(-1).sqrt()
            area = tiled(image, heat, (self.feature_info[stage]["reduction"],) * 2)
            panels.append(Panel(title=f"{name}: size of the output, {place}", heat=heat, area=area, bar="RMS"))
        return panels

    def _hilo(self, stage: int | None, block: int) -> tuple[int, int, HiLo]:
        """The layer that :meth:`explain` shows, and where it is."""
        layers = {i: [m for m in s.modules() if isinstance(m, HiLo)] for i, s in enumerate(self.stages)}
        known = [i for i, found in layers.items() if found]
        if stage is None:
            both = [i for i in known if layers[i][-1].has_hifi and layers[i][-1].has_lofi]
            stage = next(iter(both or known), None)
        need(stage in known, f"a stage with attention: {', '.join(map(str, known)) or 'there is none'}", stage=stage)
        assert stage is not None  # for mypy
        count = len(layers[stage])
        need(-count <= block < count, f"a whole number from {-count} to {count - 1}", block=block)
        return stage, block % count, layers[stage][block]


def spectrum(x: Tensor) -> Tensor:
    """Logarithm to base 10 of the amplitudes of a map ``[H, W, C]``, their mean over the channels, 0 in the middle."""
    amplitude = torch.fft.fftshift(torch.fft.fft2(x, dim=(0, 1), norm="forward").abs().mean(-1))
    finfo = torch.finfo(x.dtype)  # what is smaller than rounding errors is as good as 0, which has no logarithm
    return amplitude.clamp_min(max(float(amplitude.max()) * finfo.eps, finfo.tiny)).log10()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classification, detection and segmentation checkpoints in our names.

    Args:
        state_dict: Checkpoint or state dict; one in our names is returned as it is.
        model: The model to load; norms it has no place for are left out.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict, dense=True)
    if any(k.startswith("stages.") for k in state_dict):
        return state_dict

    renamed = {}
    for k, v in state_dict.items():
        k = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", k)
        k = re.sub(r"^layers\.", "stages.", k)
        k = re.sub(r"^norm(\d)\.", r"feature_norms.\1.", k)
        k = re.sub(r"^head\.", "head.fc.", k)
        k = k.replace("downsample.dconv.conv_offset.", "downsample.offset.").replace(
            "downsample.dconv.", "downsample.conv."
        )
        k = k.replace("downsample.norm_layer.", "downsample.norm.").replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
        renamed[k] = v
    own = model.state_dict().keys()
    for k in [k for k in renamed if k.startswith(("norm.", "feature_norms.")) and k not in own]:
        _logger.info("left out of the checkpoint: %s, which this model does not have", k)
        del renamed[k]
    return renamed


_RELEASES = "https://github.com/ziplab/LITv2/releases/download/"


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _RELEASES + url if url else "",
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
        "origin_url": "https://github.com/ziplab/LITv2",
        "paper_name": "Fast Vision Transformers with HiLo Attention",
        "paper_ids": "arXiv:2205.13213",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg("v1.0/litv2_s.pth"),
        "litv2_s.alpha09_in1k": _cfg("v1.1/alpha_0.9.pth"),
        "litv2_m.in1k": _cfg("v1.0/litv2_m.pth"),
        "litv2_b.in1k": _cfg("v1.0/litv2_b.pth"),
        "litv2_b.r384_in1k": _cfg(
            "v1.0/litv2_b_384.pth", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"
        ),
        "litv2_s_alpha00.in1k": _cfg("v1.1/alpha_0.pth"),
        "litv2_s_alpha02.in1k": _cfg("v1.1/alpha_0.2.pth"),
        "litv2_s_alpha04.in1k": _cfg("v1.1/alpha_0.4.pth"),
        "litv2_s_alpha05.in1k": _cfg("v1.1/alpha_0.5.pth"),
        "litv2_s_alpha07.in1k": _cfg("v1.1/alpha_0.7.pth"),
        "litv2_s_alpha10.in1k": _cfg("v1.1/alpha_1.pth"),
        "test_litv2.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0),
    }
)


def _create_litv2(variant: str, pretrained: bool = False, **kwargs: Any) -> LITv2:
    # the official training code stores its yacs configuration beside the weights: read it as a plain dict
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        return build(
            LITv2,
            variant,
            pretrained,
            checkpoint_filter_fn,
            flatten_sequential=True,
            getter_for="feature_norms",
            rounds=math.floor,
            **kwargs,
        )


@register_model
def test_litv2(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """Tiny LITv2 for tests."""
    model_args = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "alpha": 0.5}
    return _create_litv2("test_litv2", pretrained, **{**model_args, **kwargs})


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S."""
    return _create_litv2("litv2_s", pretrained, **kwargs)


@register_model
def litv2_s_alpha00(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with high-frequency heads only (Fig. 4)."""
    return _create_litv2("litv2_s_alpha00", pretrained, **{"alpha": 0.0, **kwargs})


@register_model
def litv2_s_alpha02(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 2 of 12 heads low-frequency (Fig. 4)."""
    return _create_litv2("litv2_s_alpha02", pretrained, **{"alpha": 0.2, **kwargs})


@register_model
def litv2_s_alpha04(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 4 of 12 heads low-frequency (Fig. 4)."""
    return _create_litv2("litv2_s_alpha04", pretrained, **{"alpha": 0.4, **kwargs})


@register_model
def litv2_s_alpha05(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with half of the heads low-frequency (Fig. 4)."""
    return _create_litv2("litv2_s_alpha05", pretrained, **{"alpha": 0.5, **kwargs})


@register_model
def litv2_s_alpha07(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 8 of 12 heads low-frequency (Fig. 4)."""
    return _create_litv2("litv2_s_alpha07", pretrained, **{"alpha": 0.7, **kwargs})


@register_model
def litv2_s_alpha10(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with low-frequency heads only (Fig. 4)."""
    return _create_litv2("litv2_s_alpha10", pretrained, **{"alpha": 1.0, **kwargs})


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M."""
    return _create_litv2("litv2_m", pretrained, **{"depths": (2, 2, 18, 2), **kwargs})


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B."""
    model_args = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create_litv2("litv2_b", pretrained, **{**model_args, **kwargs})
