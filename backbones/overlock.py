"""OverLoCK: a convolutional backbone whose overview of the image steers a second, closer look.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", M. Lou, Y. Yu, CVPR
2025, https://arxiv.org/abs/2502.20087.  Official code and weights: github.com/LMMMEng/OverLoCK (Apache-2.0), whose
outputs these models reproduce and whose parameter names they keep.  The classifier is a linear layer here.

Deviations: the affinity to the context regions and the projection to kernel offsets are one product (equal up to
rounding).  Maps that the official rule would enlarge to less than the window (an 11x11 map for ``K = 15``), where the
official code raises, are enlarged to the window.  ``drop_rate``, without effect in the official code, is the dropout
before the classifier, as in timm.  Inference in half precision keeps layer scale and response norm in half precision.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm2d,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from .layers import Panel, to_fast_layout
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import ANY, SHARE, Range, check_counts, check_heads, check_positions, checked, need, scaled
from .layers.contmix import (
    BRANCHES,
    DilatedReparamBlock,
    DynamicBlock,
    FusedSequential,
    GlobalResponseNorm,
    LayerScale,
    SqueezeExcite,
    enlarge,
    merge_branches,
    residual_conv,
    shrink,
)
from .layers.panel import cell_at, seen_by, tiled
from .layers.plain import project
from .layers.resampling import resize
from .ops.na2d_av import window_starts

__all__ = ["OverLoCK"]

ABOUT = About(
    "OverLoCK (ContMix)",
    "github.com/LMMMEng/OverLoCK, commit 2c8ab3b, Apache-2.0; weights released in the same repository.",
    (
        (
            'M. Lou, Y. Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic '
            'Kernels", CVPR 2025',
            "2502.20087",
        ),
    ),
    limits=(
        "Programs of ``torch.export`` and ONNX with free sizes take images of at least 193 pixels a side.",
        "Merged weights (``reparam_in1k``) load only with ``deploy=True``, which the tag sets by itself.",
    ),
    example="""
        # parallel branches become one convolution: the form for inference, which deploy=True builds at once
        logits = model(image)
        model.reparameterize()
        print((model(image) - logits).abs().max())  # rounding
    """,
)

_logger = logging.getLogger(__name__)
AUX_WEIGHT = 0.4  # of the auxiliary head in the loss: the published training


def _downsample(dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    return FusedSequential(
        nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd), nn.BatchNorm2d(out_dim, **dd)
    )


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate(((in_chans, dim // 2), (dim // 2, dim // 2), (dim // 2, dim), (dim, dim))):
        layers += [
            nn.Conv2d(c_in, c_out, 3, stride=2 - i % 2, padding=1, bias=False, **dd),
            nn.BatchNorm2d(c_out, **dd),
            nn.GELU(),
        ]
    return FusedSequential(*layers[:-1])


class RepConvBlock(nn.Module):
    """Block of Base-Net and Overview-Net: large-kernel convolution and feed-forward network in one branch.

    Args:
        dim: Channels.
        kernel_size: Side of the large kernel.
        mlp_ratio: Hidden channels over ``dim``.
        ls_init_value: Initial layer scale; None for no layer scale.
        res_scale: Put the layer scale on the skip path, not on the branch.
        drop_path: Stochastic depth rate.
        deploy: Build the merged form of the large-kernel convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    res_scale: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        res_scale: bool = True,
        drop_path: float = 0.0,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = scaled(dim, mlp_ratio=mlp_ratio)
        self.res_scale = res_scale
        self.dwconv = residual_conv(dim, **dd)
        self.proj = FusedSequential(
            LayerNorm2d(dim, **dd),
            DilatedReparamBlock(dim, kernel_size, deploy=deploy, **dd),
            nn.BatchNorm2d(dim, **dd),
            SqueezeExcite(dim, **dd),
            nn.Conv2d(dim, hidden_dim, 1, **dd),
            nn.GELU(),
            residual_conv(hidden_dim, **dd),
            GlobalResponseNorm(hidden_dim, **dd),
            nn.Conv2d(hidden_dim, dim, 1, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ls = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        x = self.dwconv(x)
        if self.res_scale:
            return self.ls(x) + self.drop_path(self.proj(x))
        return x + self.drop_path(self.ls(self.proj(x)))


class FocusBlock(DynamicBlock):
    """Block of Focus-Net: ContMix whose kernels come from a context stream that travels beside the features.

    Args:
        dim: Channels of the features.
        ctx_dim: Channels of the context stream.
        kernel_size: Side of the large dynamic kernel.
        smk_size: Side of the small dynamic kernel.
        num_heads: Half the number of channel groups.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        ls_init_value: Initial layer scale; None for no layer scale.
        res_scale: Put the layer scale on the skip path, not on the branch.
        drop_path: Stochastic depth rate of both branches.
        use_prior: Add the context prior to the context stream first.
        deploy: Build the merged form of the large-kernel convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    use_prior: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        ctx_dim: int,
        kernel_size: int,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 3.0,
        ls_init_value: float | None = None,
        res_scale: bool = True,
        drop_path: float = 0.0,
        use_prior: bool = True,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        out_dim = dim + ctx_dim
        super().__init__(
            dim,
            ctx_dim,
            out_dim,
            kernel_size=kernel_size,
            smk_size=smk_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            res_scale=res_scale,
            drop_path=drop_path,
            deploy=deploy,
            **dd,
        )
        self.dim = dim
        self.use_prior = use_prior
        if use_prior:
            self.x_scale = LayerScale(ctx_dim, **dd)
            self.h_scale = LayerScale(ctx_dim, **dd)
        self.fusion = FusedSequential(
            nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, **dd),
            nn.BatchNorm2d(out_dim, **dd),
            nn.GELU(),
            nn.Conv2d(out_dim, dim, 1, **dd),
            GlobalResponseNorm(dim, **dd),
        )
        self.dyconv_proj = FusedSequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Relative position biases of zero."""
        nn.init.zeros_(self.rpb1)
        nn.init.zeros_(self.rpb2)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """Mix a map.

        Args:
            x: Features and context stream ``[B, dim + ctx_dim, H, W]``.
            prior: Context prior ``[B, ctx_dim, H, W]``.

        Returns:
            Features and context stream, same shape as ``x``.
        """
        if self.use_prior:
            context = self.x_scale(x[:, self.dim :]) + self.h_scale(prior)
            x = torch.cat([x[:, : self.dim], context], dim=1)
        skip = self.dwconv1(x)
        x = self.norm1(skip)
        value = self.fusion(x)
        gate, lepe = self.gate(value), self.lepe(value)
        large = enlarge(x, self.kernel_size)
        mixed = self.contmix(large[:, : self.dim], large[:, self.dim :], enlarge(value, self.kernel_size))
        return self.finish(skip, self.dyconv_proj(shrink(mixed, x)), gate, lepe)


class RepConvStage(nn.Sequential):
    """Blocks of Base-Net or Overview-Net."""

    grad_checkpointing: bool

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(list(self.children()), x)
        for block in self:
            x = block(x)
        return x


class FocusStage(nn.Sequential):
    """Blocks of Focus-Net."""

    grad_checkpointing: bool

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:  # type: ignore[override]
        """Map features and context stream ``[B, dim + ctx_dim, H, W]`` to the same shape, with the blocks' prior."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, prior)
            else:
                x = block(x, prior)
        return x


class ContextDownsample(nn.Module):
    """Halve features and context stream by a strided convolution each.

    Args:
        dim: Channels of the features.
        out_dim: Channels of the features afterwards.
        ctx_dim: Channels of the context stream.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        ctx_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.x_proj = _downsample(dim, out_dim, **dd)
        self.h_proj = _downsample(ctx_dim, ctx_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim + ctx_dim, H, W]`` to ``[B, out_dim + ctx_dim, H / 2, W / 2]``, rounded up."""
        return torch.cat([self.x_proj(x[:, : self.dim]), self.h_proj(x[:, self.dim :])], dim=1)


def _pointwise(dim: int, out_dim: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, out_dim, 1, **dd)


def _classifier(layer: Callable[..., nn.Module], dim: int, num_classes: int, **dd: Any) -> nn.Module:
    return layer(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()


@torch.no_grad()
def _kernel_panels(
    name: str, block: FocusBlock, q: Tensor, k: Tensor, extent: tuple[float, float], point: tuple[float, float]
) -> list[Panel]:
    """The kernels at a point: means of the groups, and the large ones of the two groups that differ most.

    Args:
        name: Of the block.
        block: It.
        q: Queries ``[1, dim / 2, H, W]``.
        k: Context regions ``[1, dim / 2, 7, 7]``.
        extent: Bottom and right edge of the map as fractions of the image.
        point: Row and column as fractions of the image.

    Returns:
        Four panels.
    """
    size = q.shape[2], q.shape[3]
    sides = extent[0] / size[0], extent[1] / size[1]
    place = cell_at(point, size, sides)
    (small,), (large,) = block.kernels_at(q, k, *place)  # [groups, K, K] each
    apart = torch.cdist(large.flatten(1), large.flatten(1)).fill_diagonal_(-1.0)
    first, second = sorted(divmod(int(apart.argmax()), len(apart)))
    mean = f"mean of {len(large)} groups"
    shown = [(small.mean(0), mean), (large.mean(0), mean)]
    shown += [(large[group], f"group {group + 1}") for group in (first, second)]
    panels = []
    for kernel, which in shown:
        K = len(kernel)
        top, left = (int(window_starts(L, K, q.device)[i]) for L, i in zip(size, place, strict=True))
        box = torch.tensor([[top, left, top + K, left + K]]) * torch.tensor([*sides, *sides])
        panels.append(
            Panel(
                title=f"{name}: {K}x{K} kernel, {which}",
                heat=kernel,
                area=(*box[0].tolist(),),
                boxes=box,
                points=(torch.tensor([place]) + 0.5) * torch.tensor(sides),
                bar="weight",
            )
        )
    return panels


class OverLoCK(nn.Module):
    """OverLoCK (Sec. 3): Base-Net down to stride 16, Overview-Net at stride 32, Focus-Net at strides 16 and 32.

    The overview, projected to a quarter of its channels, is the context prior: it enters Focus-Net as a second stream
    of channels, is added to that stream in every block, and decides the kernels of ContMix.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.  Unpooled and without
            classifier the model returns the map of :meth:`forward_features`.
        depths: Blocks of Base-Net (three stages) and Overview-Net.
        sub_depths: Blocks of the two stages of Focus-Net.
        embed_dims: Channels of the four stages.
        kernel_sizes: Side of the large kernel in the four stages; Focus-Net takes the last two.
        smk_size: Side of the small dynamic kernel.
        mlp_ratio: Hidden channels of the feed-forward networks of Base- and Overview-Net.
        sub_mlp_ratio: The same of Focus-Net, over the features without the context stream.
        sub_num_heads: Half the number of channel groups in the two stages of Focus-Net.
        ls_init_values: Initial layer scale of the four stages; None for no layer scale.
        res_scale: Put the layer scale on the skip path, not on the branch.
        projection: Channels of the head's convolution before the pooling.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        deploy: Build the merged form of all large-kernel convolutions, as :meth:`reparameterize` makes it.
        aux_head: Classify the overview too.  In training the output is then ``{"main": logits, "aux": logits}``, and
            :meth:`extra_loss` is what ``aux`` adds to the loss.
        dense: ``"det"`` or ``"seg"`` for the backbone of the official detectors or segmentors: no classifier, a layer
            norm for every feature, the second of them also in the trunk.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        num_features: Channels of :meth:`forward_features`, those of Focus-Net with its context stream.
        head_hidden_size: Width before the classifier: ``projection``, or a multiple of it with ``catavgmax``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(embed_dims=Range(4), smk_size=Range(3), dense=("det", "seg"))
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (4, 4, 6, 2),
        sub_depths: Sequence[int] = (12, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        smk_size: int = 5,
        mlp_ratio: float = 4.0,
        sub_mlp_ratio: float = 3.0,
        sub_num_heads: Sequence[int] = (4, 8),
        ls_init_values: Sequence[float | None] = (None, None, 1.0, 1.0),
        res_scale: bool = True,
        projection: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        aux_head: bool = False,
        dense: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_counts(4, depths=depths, embed_dims=embed_dims, kernel_sizes=kernel_sizes, ls_init_values=ls_init_values)
        check_counts(2, sub_depths=sub_depths, sub_num_heads=sub_num_heads)
        sizes = f"numbers out of {', '.join(map(str, BRANCHES))}"
        need(all(size in BRANCHES for size in kernel_sizes), sizes, kernel_sizes=kernel_sizes)
        odd = smk_size % 2 == 1 and smk_size <= min(kernel_sizes[2:])
        need(odd, f"an odd number from 3 to {min(kernel_sizes[2:])}, as large as kernel_sizes", smk_size=smk_size)
        groups = [4 * count for count in sub_num_heads]
        check_heads(embed_dims[2:], groups, embed_dims=embed_dims, sub_num_heads=sub_num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        ctx_dim = embed_dims[3] // 4
        self.num_classes = 0 if dense else num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = embed_dims[3] + ctx_dim
        self.last_level = 3
        channels = (embed_dims[0], embed_dims[1], embed_dims[2] + ctx_dim, self.num_features)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": c, "reduction": 4 * 2**i, "module": module}
            for i, (c, module) in enumerate(
                zip(channels, ("blocks1", "blocks2", "sub_blocks3", "sub_blocks4"), strict=True)
            )
        ]
        rates: Any = calculate_drop_path_rates(drop_path_rate, [*depths, *sub_depths], stagewise=True)

        def base(i: int) -> RepConvStage:
            return RepConvStage(
                *(
                    RepConvBlock(
                        embed_dims[i],
                        kernel_sizes[i],
                        mlp_ratio=mlp_ratio,
                        ls_init_value=ls_init_values[i],
                        res_scale=res_scale,
                        drop_path=rates[i][j],
                        deploy=deploy,
                        **dd,
                    )
                    for j in range(depths[i])
                )
            )

        def focus(i: int) -> FocusStage:
            return FocusStage(
                *(
                    FocusBlock(
                        embed_dims[i],
                        ctx_dim,
                        kernel_sizes[i],
                        smk_size=smk_size,
                        num_heads=sub_num_heads[i - 2],
                        mlp_ratio=sub_mlp_ratio,
                        ls_init_value=ls_init_values[i],
                        res_scale=res_scale,
                        drop_path=rates[i + 2][j],
                        use_prior=i > 2 or j > 0,
                        deploy=deploy,
                        **dd,
                    )
                    for j in range(sub_depths[i - 2])
                )
            )

        self.patch_embed1: nn.Module = _stem(in_chans, embed_dims[0], **dd)
        self.blocks1: nn.Module = base(0)
        self.patch_embed2: nn.Module = _downsample(embed_dims[0], embed_dims[1], **dd)
        self.blocks2: nn.Module = base(1)
        self.patch_embed3: nn.Module = _downsample(embed_dims[1], embed_dims[2], **dd)
        self.blocks3: nn.Module = base(2)
        self.patch_embed4: nn.Module = _downsample(embed_dims[2], embed_dims[3], **dd)
        self.blocks4: nn.Module = base(3)
        self.high_level_proj: nn.Module = nn.Conv2d(embed_dims[3], ctx_dim, 1, **dd)
        self.sub_blocks3: nn.Module | None = focus(2)
        self.patch_embedx: nn.Module = ContextDownsample(embed_dims[2], embed_dims[3], ctx_dim, **dd)
        self.sub_blocks4: nn.Module | None = focus(3)

        norms = {None: (), "seg": channels, "det": (*channels, embed_dims[3])}[dense]
        self.extra_norm = nn.ModuleList(LayerNorm2d(c, **dd) for c in norms) or nn.ModuleList(
            nn.Identity() for _ in channels
        )
        self.h_proj: nn.Module | None = None
        if dense == "det":
            self.h_proj = FusedSequential(
                nn.Conv2d(embed_dims[3], self.num_features, 1, **dd), LayerScale(self.num_features, 1e-5, **dd)
            )
        self.aux_head: nn.Module | None = None
        if aux_head and not dense:
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(embed_dims[3], **dd),
                nn.AdaptiveAvgPool2d(1),
                _classifier(_pointwise, embed_dims[3], num_classes, **dd),
            )
        self.head = nn.Sequential(
            nn.Identity() if dense else nn.Conv2d(self.num_features, projection, 1, bias=False, **dd),
            nn.Identity() if dense else nn.BatchNorm2d(projection, **dd),
            nn.Identity() if dense else nn.SiLU(),
            SelectAdaptivePool2d(pool_type=global_pool),
            nn.Identity(),
        )
        self.head_hidden_size = self._head_width() * self.head[3].feat_mult()  # type: ignore[operator]
        self.head[4] = _classifier(nn.Linear, self.head_hidden_size, self.num_classes, **dd)
        self.init_weights(needs_reset=False)

    def _head_width(self) -> int:
        return getattr(self.head[0], "out_channels", self.num_features)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the paper: truncated normal for convolutions and the classifier, no biases.

        Args:
            needs_reset: First give every layer its own default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        stages = {  # what belongs to the first block, the blocks, what belongs to the last one
            "blocks1": (r"$^", r"extra_norm\.0"),
            "blocks2": (r"patch_embed2", r"extra_norm\.1"),
            "blocks3": (r"patch_embed3", r"$^"),
            "blocks4": (r"patch_embed4", r"high_level_proj|extra_norm\.4"),
            "sub_blocks3": (r"$^", r"extra_norm\.2"),
            "sub_blocks4": (r"patch_embedx", r"extra_norm\.3|h_proj"),
        }
        groups: dict[str, Any] = {"stem": r"^patch_embed1"}
        for name, (first, last) in stages.items():
            if coarse:
                groups[name] = rf"^(?:{first}|{name}|{last})\b"
            else:
                groups[name] = [
                    (rf"^(?:{first})\b", (0,)),
                    (rf"^{name}\.(\d+)", None),
                    (rf"^(?:{last})\b", (99999,)),
                ]
        return groups

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, (RepConvStage, FocusStage)):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the branches of every large-kernel convolution for inference, with the norms' running statistics."""
        for module in list(self.modules()):
            if isinstance(module, DilatedReparamBlock):
                module.reparameterize()
        update_model_args(self, deploy=True)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head[4]

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier, and that of the auxiliary head.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in the constructor; None keeps the current one.
            reset_other: Remove the head's convolution before the pooling too.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        pool = SelectAdaptivePool2d(pool_type=global_pool)
        dd: dict[str, Any] = get_device_dtype(self)
        self.global_pool = global_pool
        self.head[3] = pool.train(self.training)
        if reset_other:
            for i in range(3):
                self.head[i] = nn.Identity()
        self.num_classes = num_classes
        self.head_hidden_size = self._head_width() * pool.feat_mult()
        self.head[4] = _classifier(nn.Linear, self.head_hidden_size, num_classes, **dd).train(self.training)
        if self.aux_head is not None:
            width = self.aux_head[0].num_features  # type: ignore[index]
            self.aux_head[2] = _classifier(_pointwise, width, num_classes, **dd).train(self.training)  # type: ignore[operator]

    @torch.jit.ignore
    @checked(point=SHARE, blocks=ANY)
    def explain(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5), blocks: Sequence[int] | None = None
    ) -> list[Panel]:
        """The context prior that the overview gives, and the kernels that Focus-Net makes of its context at a point.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.
            point: Row and column as fractions of the image.
            blocks: Blocks of Focus-Net, counted from 0 over both stages; None for the last of each.

        Returns:
            The norm of the prior's channels, and for each of the blocks four panels: the mean of its small kernels, of
            its large ones, and the large kernels of the two groups of channels that differ most.

        Raises:
            ValueError: If a setting is out of range, or the model was pruned down to Base-Net.
        """
        stages: list[Any] = [(3, self.sub_blocks3), (4, self.sub_blocks4)]
        layers = [(i, j, b) for i, stage in stages for j, b in enumerate(() if stage is None else stage)]
        if not layers:
            raise ValueError("got a model without Focus-Net, need one with it")
        if blocks is not None:
            check_positions(len(layers), blocks=blocks)
        last = {stage: i for i, (stage, _, _) in enumerate(layers)}
        chosen = [layers[i] for i in (last.values() if blocks is None else blocks)]
        parts = [part for _, _, block in chosen for part in (block, block.weight_query, block.weight_key)]
        (_, prior), *seen = seen_by(self, image, [self.high_level_proj, *parts])
        norm = torch.linalg.vector_norm(prior[0].float(), dim=0)
        panels = [
            Panel(title="Overview: context prior", heat=norm, area=tiled(image, norm, (32, 32)), bar="norm of channels")
        ]
        for i, (stage, number, block) in enumerate(chosen):
            out, q, k = (given for _, given in seen[3 * i : 3 * i + 3])
            *_, bottom, right = tiled(image, out[0, 0], (self.feature_info[stage - 1]["reduction"],) * 2)
            panels += _kernel_panels(f"Stage {stage}, block {number}", block, q, k, (bottom, right), point)
        return panels

    def _pyramid(self, x: Tensor, last: int) -> tuple[list[Tensor], Tensor]:
        """Features without norms up to a level, and the overview map, which needs a level of at least 2."""
        x = self.blocks1(self.patch_embed1(to_fast_layout(x)))
        overview = x
        levels = [x]
        if last >= 1:
            x = self.extra_norm[1](self.blocks2(self.patch_embed2(x)))
            levels.append(x)
        if last >= 2:
            base = self.blocks3(self.patch_embed3(x))
            overview = self.blocks4(self.patch_embed4(base))
            context = (
                self.high_level_proj(overview) if torch.jit.is_scripting() else project(self.high_level_proj, overview)
            )
            if self.sub_blocks3 is not None:
                prior = resize(context, base.shape[2], base.shape[3])
                x = self.sub_blocks3(torch.cat([base, prior], dim=1), prior)
                levels.append(x)
            if last >= 3:  # noqa: SIM102 - TorchScript decides the inner condition before it compiles
                if self.sub_blocks4 is not None:
                    x = self.sub_blocks4(self.patch_embedx(x), context)
                    levels.append(x)
        return levels, overview

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features at strides 4, 8, 16 and 32; the last two hold Focus-Net's features and its context stream.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Levels to return; an int means the last ones, None all.
            norm: Without effect, there is no final norm.  The norms of ``dense`` always apply.
            stop_early: Run nothing that the last level asked for does not need.
            output_fmt: ``NCHW``.
            intermediates_only: Return the features only.

        Returns:
            The features, or ``(final, features)`` with ``final`` as of :meth:`forward_features`.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        take_indices, max_index = feature_take_indices(self.last_level + 1, indices)
        levels, overview = self._pyramid(x, max_index if stop_early else self.last_level)
        features: list[Tensor] = []
        for i, extra_norm in enumerate(self.extra_norm):
            if i in take_indices:
                feature = levels[i] if i == 1 else extra_norm(levels[i])  # the trunk has normed level 1
                if self.h_proj is not None:  # noqa: SIM102 - TorchScript decides this condition before it compiles
                    if i == 3:
                        feature = feature + self.h_proj(self.extra_norm[4](overview))
                features.append(feature)
        if intermediates_only:
            return features
        return levels[-1], features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need.

        Args:
            indices: Levels to keep, as in :meth:`forward_intermediates`.
            prune_norm: Without effect, there is no final norm.
            prune_head: Remove the classifier and the auxiliary head.

        Returns:
            The levels as positive numbers.
        """
        take_indices, max_index = feature_take_indices(self.last_level + 1, indices)
        prune_end = max_index < self.last_level
        self.last_level = max_index
        if max_index < 3:
            self.patch_embedx, self.sub_blocks4 = nn.Identity(), None
        if max_index < 2:
            self.patch_embed3, self.blocks3 = nn.Identity(), nn.Identity()
            self.patch_embed4, self.blocks4 = nn.Identity(), nn.Identity()
            self.high_level_proj, self.sub_blocks3 = nn.Identity(), None
        if max_index < 1:
            self.patch_embed2, self.blocks2 = nn.Identity(), nn.Identity()
        for i in range(4):
            if i not in take_indices and not (i == 1 and max_index > 1):
                self.extra_norm[i] = nn.Identity()
        if 3 not in take_indices and self.h_proj is not None:
            self.extra_norm[4], self.h_proj = nn.Identity(), None
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.aux_head = None
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the last map ``[B, num_features, H, W]``."""
        levels, _ = self._pyramid(x, self.last_level)
        return levels[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, num_features, H, W]`` to logits, or to the pooled features with ``pre_logits``."""
        if self.global_pool == "" and self.num_classes == 0:
            return x
        x = self.head[0](x) if torch.jit.is_scripting() else project(self.head[0], x)
        x = self.head[3](self.head[2](self.head[1](x)))
        x = x.permute(0, 2, 3, 1) if self.global_pool == "" else x.flatten(1)
        if not pre_logits:
            if self.drop_rate > 0.0:
                x = F.dropout(x, p=self.drop_rate, training=self.training)
            x = self.head[4](x)
        return x.permute(0, 3, 1, 2) if self.global_pool == "" else x

    @torch.jit.ignore
    def _forward_aux(self, x: Tensor) -> Any:
        levels, overview = self._pyramid(x, self.last_level)
        return {"main": self.forward_head(levels[-1]), "aux": self.aux_head(overview).flatten(1)}  # type: ignore[misc]

    @torch.jit.ignore
    def extra_loss(self, out: Any, criterion: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the auxiliary head adds to the loss: 0.4 times its own, as in the official training.

        Args:
            out: Of the model in training.
            criterion: The loss of logits ``[B, num_classes]``.

        Returns:
            A scalar; None without ``aux_head``.
        """
        return AUX_WEIGHT * criterion(out["aux"]) if isinstance(out, dict) else None

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``, or to both with ``aux_head``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript decides this condition before it compiles
            if self.training and self.aux_head is not None:
                return self._forward_aux(x)
        x = self.forward_features(x)
        return self.forward_head(x)


def _merge_state(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training form to merged form, on a state dict in our names."""
    merged = {}
    for k, v in state_dict.items():
        prefix, large, _ = k.partition("lk_origin.")
        if large:
            kernel_size = v.shape[-1]
            names = [("lk_origin", "origin_bn")]
            names += [(f"dil_conv_k{n}_{r}", f"dil_bn_k{n}_{r}") for n, r in BRANCHES[kernel_size]]
            branches = []
            for conv, bn in names:
                norm = [state_dict[f"{prefix}{bn}.{t}"] for t in ("weight", "bias", "running_mean", "running_var")]
                branches.append((state_dict[f"{prefix}{conv}.weight"], norm[0], norm[1], norm[2], norm[3], 1e-5))
            weight, bias = merge_branches(kernel_size, branches)
            merged[f"{prefix}lk_origin.weight"], merged[f"{prefix}lk_origin.bias"] = (
                weight.to(v.dtype),
                bias.to(v.dtype),
            )
        elif ".origin_bn." not in k and ".dil_" not in k:
            merged[k] = v
    return merged


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official classification, detection and segmentation checkpoints, in training or merged form, for ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load; what it has no place for is left out, and dense norms that the checkpoint does not
            have stay as they are.

    Returns:
        A state dict for ``model``.

    Raises:
        ValueError: If the checkpoint is merged and the model is not.
    """
    state_dict = unwrap(state_dict, dense=True)

    if "head.4.weight" in state_dict:  # officially a 1x1 convolution
        state_dict["head.4.weight"] = state_dict["head.4.weight"].flatten(1)
    own = model.state_dict()
    for k in [k for k in state_dict if k.startswith(("head.", "aux_head.", "extra_norm.", "h_proj.")) and k not in own]:
        _logger.info("left out of the checkpoint: %s, which this model does not have", k)
        del state_dict[k]
    for k in [k for k in state_dict if k.startswith("aux_head.2.") and state_dict[k].shape != own[k].shape]:
        del state_dict[k]  # another number of classes
    if not any(k.startswith("extra_norm.") for k in state_dict):  # a classifier becomes a dense backbone
        state_dict.update({k: v for k, v in own.items() if k.startswith(("extra_norm.", "h_proj."))})

    merged, wanted = (any(k.endswith("lk_origin.bias") for k in state) for state in (state_dict, own))
    if merged and not wanted:
        raise ValueError(
            "got merged (reparameterized) weights for a model in training form; create it with deploy=True"
        )
    return _merge_state(state_dict) if wanted and not merged else state_dict


_RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
_TAG_ARGS: dict[str, dict[str, Any]] = {  # the form of the model that a checkpoint is for
    "reparam_in1k": {"deploy": True},
    "maskrcnn_1x_coco": {"dense": "det"},
    "maskrcnn_3x_coco": {"dense": "det"},
    "upernet_ade20k": {"dense": "seg"},
}


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": _RELEASE + url if url else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed1.0",
        "classifier": "head.4",
        "license": "apache-2.0",
        "origin_url": "https://github.com/LMMMEng/OverLoCK",
        "paper_name": "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        "paper_ids": "arXiv:2502.20087",
        **kwargs,
    }


def _dense_cfg(url: str) -> dict[str, Any]:
    return _cfg(url, num_classes=0, classifier=None)


default_cfgs = generate_default_cfgs(
    {
        "overlock_xt.in1k": _cfg("overlock_xt_in1k_224.pth", crop_pct=0.925),
        "overlock_xt.reparam_in1k": _cfg("overlock_xt_in1k_224_reparam.pth", crop_pct=0.925),
        "overlock_t.in1k": _cfg("overlock_t_in1k_224.pth"),
        "overlock_t.reparam_in1k": _cfg("overlock_t_in1k_224_reparam.pth"),
        "overlock_t.maskrcnn_1x_coco": _dense_cfg("maskrcnn1x_overlock_tiny_coco.pth"),
        "overlock_t.maskrcnn_3x_coco": _dense_cfg("maskrcnn3x_overlock_tiny_coco.pth"),
        "overlock_t.upernet_ade20k": _dense_cfg("upernet_overlock_tiny_ade20k.pth"),
        "overlock_s.in1k": _cfg("overlock_s_in1k_224.pth"),
        "overlock_s.reparam_in1k": _cfg("overlock_s_in1k_224_reparam.pth"),
        "overlock_s.maskrcnn_1x_coco": _dense_cfg("maskrcnn1x_overlock_small_coco.pth"),
        "overlock_s.maskrcnn_3x_coco": _dense_cfg("maskrcnn3x_overlock_small_coco.pth"),
        "overlock_s.upernet_ade20k": _dense_cfg("upernet_overlock_small_ade20k.pth"),
        "overlock_b.in1k": _cfg("overlock_b_in1k_224.pth", crop_pct=0.975),
        "overlock_b.reparam_in1k": _cfg("overlock_b_in1k_224_reparam.pth", crop_pct=0.975),
        "overlock_b.maskrcnn_1x_coco": _dense_cfg("maskrcnn1x_overlock_base_coco.pth"),
        "overlock_b.maskrcnn_3x_coco": _dense_cfg("maskrcnn3x_overlock_base_coco.pth"),
        "overlock_b.upernet_ade20k": _dense_cfg("upernet_overlock_base_ade20k.pth"),
        "test_overlock.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0),
    }
)


def _create_overlock(variant: str, pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    cfg = kwargs.get("pretrained_cfg")
    tag = cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", cfg)
    form = _TAG_ARGS.get(tag or "", {})
    kwargs = {**form, **kwargs}
    model = build(
        OverLoCK,
        variant,
        pretrained,
        checkpoint_filter_fn,
        getter_for="dense",
        **kwargs,
    )
    update_model_args(model, **{k: kwargs[k] for k in form})
    return model


@register_model
def test_overlock(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """Tiny OverLoCK for tests."""
    model_args = {
        "depths": (1, 1, 2, 1),
        "sub_depths": (2, 1),
        "embed_dims": (16, 24, 32, 48),
        "sub_num_heads": (2, 2),
        "projection": 64,
    }
    return _create_overlock("test_overlock", pretrained, **{**model_args, **kwargs})


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT."""
    model_args = {
        "depths": (2, 2, 3, 2),
        "sub_depths": (6, 2),
        "embed_dims": (56, 112, 256, 336),
        "sub_num_heads": (4, 6),
    }
    return _create_overlock("overlock_xt", pretrained, **{**model_args, **kwargs})


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T."""
    return _create_overlock("overlock_t", pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S."""
    model_args = {
        "depths": (6, 6, 8, 3),
        "sub_depths": (16, 3),
        "embed_dims": (64, 128, 320, 512),
        "sub_num_heads": (8, 16),
    }
    return _create_overlock("overlock_s", pretrained, **{**model_args, **kwargs})


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B."""
    model_args = {
        "depths": (8, 8, 10, 4),
        "sub_depths": (20, 4),
        "embed_dims": (80, 160, 384, 576),
        "sub_num_heads": (6, 9),
    }
    return _create_overlock("overlock_b", pretrained, **{**model_args, **kwargs})
