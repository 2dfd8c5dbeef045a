"""NiNformer: a transformer whose attention is replaced by a gate that a small MLP-Mixer computes.

Paper: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", A. N. Abdullah, T.
Aydin, Neural Computing and Applications 2025, https://arxiv.org/abs/2403.02411.  Official code, without weights:
github.com/Abdullah-Nazhat/NiNformer.

``ninformer_cifar`` is the official model.

Our choices: the three models at the widths and depth of DeiT, with its rule that every feed-forward network is twice as
wide as the tokens; other image sizes, by resizing what token mixing reads and gives or by windows; LayerScale, a final
norm and truncated normal weights as options.

Deviations: under autocast the gate is multiplied, and added to the tokens, in float32, for it has no bound.
"""

import math
from collections.abc import Sequence
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
    register_notrace_function,
    register_notrace_module,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .layers import Panel
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import ANY, check_patches, check_positions, checked, scaled
from .layers.mlp import Mlp
from .layers.panel import seen_by, tiled
from .layers.plain import project, tensors
from .ops.backend import autocast_dtype

__all__ = ["NiNformer"]

ABOUT = About(
    "NiNformer",
    "github.com/Abdullah-Nazhat/NiNformer, commit 0ec85d4, BSD-3-Clause; no weights.",
    (
        (
            'A. N. Abdullah, T. Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated '
            'Gating Function", Neural Computing and Applications 2025',
            "2403.02411",
        ),
    ),
    limits=(
        "There are no weights: train first.  No accuracy of the paper is claimed.",
        "A model takes images of one size, ``img_size``.  ``dynamic_img_size=True`` lets it take any, by resizing what "
        "token mixing reads and gives, which the paper does not do.",
    ),
)


def resizing(grid: tuple[int, int], H: int, W: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What makes a token-mixing network one for another grid, which sums over the tokens as before.

    Bicubic resizing with antialiasing is a product with a matrix ``R [h * w, H * W]``.  The first layer sums over
    tokens: its rows are resized, scaled by the ratio of the numbers of tokens, and shifted so that each has its old
    sum, together the matrix ``P``.  A map that is constant over the tokens therefore has the same hidden activations at
    every grid.  The second layer has one row for each token: rows and bias are resized alone.

    Args:
        grid: ``(h, w)``.
        H: Rows of the other grid.
        W: Columns of the other grid.
        like: For device and dtype.

    Returns:
        ``P`` and ``R``, both ``[h * w, H * W]``, in float32 at least: the weights ``w1 @ P`` and ``R.t() @ w2`` are
        those for ``H * W`` tokens.
    """
    tokens = grid[0] * grid[1]
    dtype = torch.promote_types(like.dtype, torch.float32)
    maps = torch.eye(tokens, device=like.device, dtype=dtype).reshape(tokens, 1, grid[0], grid[1])
    R = F.interpolate(maps, size=[H, W], mode="bicubic", align_corners=False, antialias=True).reshape(tokens, H * W)
    P = R * (tokens / (H * W))
    return P + (1 - P.sum(1, keepdim=True)) / (H * W), R


def resize_token_weights(
    w1: Tensor, w2: Tensor, b2: Tensor, grid: tuple[int, int], H: int, W: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a token-mixing network for another grid, by :func:`resizing`.

    Args:
        w1: Weight of the first layer ``[f, h * w]``.
        w2: Weight of the second ``[h * w, f]``.
        b2: Its bias ``[h * w]``.
        grid: ``(h, w)``.
        H: Rows of the other grid.
        W: Columns of the other grid.

    Returns:
        The three for ``H * W`` tokens; themselves when the grid is the same.
    """
    if grid[0] == H and grid[1] == W:
        return w1, w2, b2
    P, R = resizing(grid, H, W, w1)
    wide = P.dtype
    return (w1.to(wide) @ P).to(w1.dtype), (R.t() @ w2.to(wide)).to(w2.dtype), (b2.to(wide) @ R).to(b2.dtype)


def is_known(side: int, own: int) -> bool:
    """Whether a side is that of the grid, and not one that the exporter does not know and only has an example of."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if isinstance(side, torch.SymInt):
            return False
    return side == own


@register_notrace_module  # picks its path by the size of its input
class TokenMixing(nn.Module):
    """Feed-forward network over the tokens of a grid, the same for every channel.

    Args:
        grid: Rows and columns that the weights are for.
        hidden_dim: Hidden units.
        window: Other maps are mixed in windows of the grid (True), with resized weights (False), or in windows if both
            sides are above 1.5 times those of the grid (None).
        drop: Dropout rate after each of the two layers.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        hidden_dim: int,
        window: bool | None = None,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.grid = grid
        self.window = window
        self.mlp = Mlp(grid[0] * grid[1], hidden_dim, drop=drop, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Grid and window for ``print(model)``."""
        return f"grid={self.grid}, window={self.window}"

    def _windowed(self, H: int, W: int) -> bool:
        if self.window is None:
            return 3 * self.grid[0] < 2 * H and 3 * self.grid[1] < 2 * W
        return bool(self.window)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        B, H, W, C = x.shape
        h, w = self.grid
        if is_known(H, h) and is_known(W, w):
            return self.mlp(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(B, H, W, C)
        if self._windowed(H, W):
            rows, cols = (H + h - 1) // h, (W + w - 1) // w
            x = F.pad(x, [0, 0, 0, cols * w - W, 0, rows * h - H])
            x = x.reshape(B, rows, h, cols, w, C).permute(0, 1, 3, 5, 2, 4).reshape(B * rows * cols, C, h * w)
            x = self.mlp(x).reshape(B, rows, cols, C, h, w).permute(0, 1, 4, 2, 5, 3)
            return x.reshape(B, rows * h, cols * w, C)[:, :H, :W]
        # the layers stay as they are: what they read and give is resized, the same products in another order
        P, R = resizing(self.grid, H, W, x)
        hidden = self.mlp.hidden(x.flatten(1, 2).transpose(1, 2) @ P.t().to(x.dtype))
        x = self.mlp.fc2(hidden) if torch.jit.is_scripting() else project(self.mlp.fc2, hidden)
        return self.mlp.drop(x @ R.to(x.dtype)).transpose(1, 2).reshape(B, H, W, C)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resize the weights for another grid, once and for all."""
        if grid == self.grid:
            return
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        w1, _, w2, b2 = tensors(fc1, fc2)
        resized = resize_token_weights(w1.detach(), w2.detach(), b2.detach(), self.grid, *grid)
        fc1.weight, fc2.weight, fc2.bias = (nn.Parameter(t, requires_grad=w1.requires_grad) for t in resized)
        fc1.in_features = fc2.out_features = grid[0] * grid[1]
        self.grid = grid


@register_notrace_function
def gated(u: Tensor, v: Tensor) -> Tensor:
    """``u * v``, in float32 under autocast: the product has no bound, float16 has."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if autocast_dtype(u) is not None:
            return u.float() * v.float()
    return u * v


class Block(nn.Module):
    """Gate generated by a token and channel mixer, then a feed-forward network; both read one LayerNorm (Sec. 3).

    Args:
        dim: Channels.
        hidden_dim: Hidden units of the three feed-forward networks.
        grid: Rows and columns of the token map.
        window: As in :class:`TokenMixing`.
        proj_drop: Dropout rate in the feed-forward networks.
        init_values: What LayerScale starts from; 0 or None leaves it out.
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        grid: tuple[int, int],
        window: bool | None = None,
        proj_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.token_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.token_mixing = TokenMixing(grid, hidden_dim, window=window, drop=proj_drop, **dd)
        self.channel_norm = LayerNorm(dim, eps=1e-5, **dd)
        self.channel_mixing = Mlp(dim, hidden_dim, drop=proj_drop, **dd)
        self.ls1 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = Mlp(dim, hidden_dim, drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def gate(self, x: Tensor) -> Tensor:
        """The mixer's output for normed tokens ``[B, H, W, C]``: what their projection is multiplied by."""
        x = x + self.token_mixing(self.token_norm(x))
        return x + self.channel_mixing(self.channel_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        n = self.norm(x)
        u = self.proj(n) if torch.jit.is_scripting() else project(self.proj, n)
        x = x + self.drop_path1(self.ls1(gated(u, self.gate(n))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm(x))))


class NiNformer(nn.Module):
    """Plain network of gated blocks, without class token and position embedding; one stride, 16 by default.

    Args:
        img_size: Image size that the token-mixing weights are for.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dim: Channels.
        depth: Blocks.
        mlp_ratio: Hidden units of every feed-forward network, the token-mixing ones included, over ``embed_dim``.
        init_values: What LayerScale on both branches starts from; 0 or None leaves it out.
        final_norm: Whether a LayerNorm follows the last block.
        dynamic_img_size: Accept any image size, padded to whole patches.  Resized weights are made in every pass;
            :meth:`set_input_size` makes them once.
        window: How maps of another size are mixed: in windows of the grid (True), with resized weights (False), or in
            windows if both sides are above 1.5 times those of the grid (None).
        weight_init: ``reset`` for PyTorch's defaults, as the official code, ``vit`` for truncated normal.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the feed-forward networks.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(weight_init=("reset", "vit"))
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 2.0,
        init_values: float | None = None,
        final_norm: bool = False,
        dynamic_img_size: bool = False,
        window: bool | None = None,
        weight_init: str = "reset",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_patches(img_size, patch_size)
        hidden_dim = scaled(embed_dim, mlp_ratio=mlp_ratio)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.weight_init = weight_init
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,  # type: ignore[arg-type]
            in_chans=in_chans,
            embed_dim=embed_dim,
            output_fmt="NHWC",
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_size,
            **dd,
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        grid: Any = self.patch_embed.grid_size
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    hidden_dim,
                    grid,
                    window=window,
                    proj_drop=proj_drop_rate,
                    init_values=init_values,
                    drop_path=rates[i],
                    **dd,
                )
                for i in range(depth)
            )
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.norm: nn.Module = LayerNorm(embed_dim, eps=1e-5, **dd) if final_norm else nn.Identity()
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as ``weight_init`` says.

        Args:
            needs_reset: First give every layer PyTorch's default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if self.weight_init == "vit" and isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay would only shrink: none beyond norms and biases."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

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
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size that the weights are for, or the patch size: parameters are resampled.

        Args:
            img_size: Side, or height and width, in pixels; None keeps it.
            patch_size: Side, or height and width, of a patch; None keeps it.

        Raises:
            ValueError: If a patch is larger than the image, or a side is below 1.
        """
        size = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        check_patches(size, patch)
        self.patch_embed.set_input_size(img_size=size, patch_size=patch)
        for block in self.blocks:
            block.token_mixing.set_grid(self.patch_embed.grid_size)  # type: ignore[union-attr, operator]
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, size, patch_size=patch_size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the blocks as maps.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Blocks: all for None, the last ``k`` for a number ``k``, else those listed, in network order.
            norm: Apply the final norm, if there is one, to the feature of the last block.
            stop_early: Leave out the blocks after the last one listed.
            output_fmt: ``NCHW``, ``NHWC`` or ``NLC``.
            intermediates_only: Return the features alone.

        Returns:
            The features; unless ``intermediates_only``, also the final map in front of them.

        Raises:
            ValueError: If ``output_fmt`` is something else.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"got output_fmt={output_fmt}, need 'NCHW', 'NHWC' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        features: list[Tensor] = []
        x = self.patch_embed(x)
        last = 0
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript would compile both sides
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            last = i
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 - TorchScript
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == self.depth - 1 else x
                if output_fmt == "NCHW":
                    feature = feature.permute(0, 3, 1, 2).contiguous()
                elif output_fmt == "NLC":
                    feature = feature.flatten(1, 2)
                features.append(feature)
        if intermediates_only:
            return features
        if last == self.depth - 1:
            x = self.norm(x)
        return x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need.

        Args:
            indices: Blocks to keep the features of, as in :meth:`forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            The blocks as positive numbers.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        prune_end = max_index < len(self.blocks) - 1
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the final map ``[B, H, W, num_features]``."""
        x = self.patch_embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 - TorchScript
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, H, W, num_features]`` to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)

    @torch.jit.ignore
    @checked(blocks=ANY)
    def explain(self, image: Tensor, blocks: Sequence[int] | None = None) -> list[Panel]:
        """The gates of some blocks (Sec. 3): what the projected tokens are multiplied by.

        Args:
            image: ``[1, in_chans, height, width]``, normalised.
            blocks: The blocks, from 0, negative ones from the end; None for the first, the middle and the last.

        Returns:
            For each block the mean of the gate over the channels at each token.

        Raises:
            ValueError: If there is no such block.
        """
        count = len(self.blocks)
        if blocks is None:
            blocks = sorted({0, count // 2, count - 1})
        check_positions(count, blocks=blocks)
        chosen: list[Any] = [self.blocks[i] for i in blocks]
        # the gate is the sum of what the last residual connection of Block.gate adds
        seen = seen_by(self, image, [layer for b in chosen for layer in (b.channel_norm, b.channel_mixing)])
        panels = []
        for i, ((mixed,), _), (_, out) in zip(blocks, seen[::2], seen[1::2], strict=True):
            heat = (mixed[0].float() + out[0].float()).mean(-1)
            most = float(heat.abs().max())
            area = tiled(image, heat, to_2tuple(self.patch_embed.patch_size))
            title, bar = f"Gate of block {i % count} of 0 to {count - 1}", "mean over the channels"
            panels.append(Panel(title=title, heat=heat, area=area, bar=bar, limits=(-most, most)))
        return panels


_OFFICIAL_NAMES = (
    ("patcher.", "patch_embed.proj."),
    ("classifier.", "head.fc."),
    ("model.", "blocks."),
    (".mgu.proj.", ".proj."),
    (".mgu.Mixer.token_mix.0.", ".token_norm."),
    (".mgu.Mixer.token_mix.2.", ".token_mixing.mlp."),
    (".mgu.Mixer.channel_mix.0.", ".channel_norm."),
    (".mgu.Mixer.channel_mix.1.", ".channel_mixing."),
    (".ffn.", ".mlp."),
    (".net.0.", ".fc1."),
    (".net.3.", ".fc2."),
)


def _grid_of(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many tokens: a square if it is one, else the pair nearest in shape to ``grid``."""
    if tokens == grid[0] * grid[1]:
        return grid
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    rows = [h for h in range(1, tokens + 1) if tokens % h == 0]
    best = min(rows, key=lambda h: abs(math.log(h * h / tokens) - math.log(grid[0] / grid[1])))
    return best, tokens // best


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official checkpoints, or ours of another image or patch size, for ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load.

    Returns:
        A state dict for ``model``.  Token-mixing weights of another grid are resized; the number of tokens alone tells
        which grid: a square one, else the one nearest in shape to that of the model.
    """
    state_dict = unwrap(state_dict)
    if any(k.startswith("model.") for k in state_dict):
        renamed = {}
        for key, value in state_dict.items():
            for old, new in _OFFICIAL_NAMES:
                key = key.replace(old, new, 1) if old.startswith(".") or key.startswith(old) else key
            renamed[key] = value
        state_dict = renamed
    patches: Any = model.get_parameter("patch_embed.proj.weight")
    weight = state_dict.get("patch_embed.proj.weight")
    if weight is not None and weight.shape[2:] != patches.shape[2:]:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, list(patches.shape[2:]))
    grid: Any = model.patch_embed.grid_size  # type: ignore[union-attr]
    for i in range(len(model.blocks)):  # type: ignore[arg-type]
        names = [f"blocks.{i}.token_mixing.mlp.{n}" for n in ("fc1.weight", "fc2.weight", "fc2.bias")]
        if all(n in state_dict for n in names):
            w1, w2, b2 = (state_dict[n] for n in names)
            resized = resize_token_weights(w1, w2, b2, _grid_of(w1.shape[1], grid), grid[0], grid[1])
            state_dict.update(zip(names, resized, strict=True))
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "bsd-3-clause",
        "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "paper_ids": "arXiv:2403.02411",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "ninformer_cifar.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0),
        "ninformer_tiny_patch16_224.untrained": _cfg(),
        "ninformer_small_patch16_224.untrained": _cfg(),
        "ninformer_base_patch16_224.untrained": _cfg(),
        "test_ninformer.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6), crop_pct=1.0),
    }
)


def _create_ninformer(variant: str, pretrained: bool = False, **kwargs: Any) -> NiNformer:
    return build(NiNformer, variant, pretrained, checkpoint_filter_fn, taps=None, rounds=None, **kwargs)


@register_model
def test_ninformer(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """Tiny NiNformer for tests."""
    model_args = {"img_size": 96, "embed_dim": 40, "depth": 3}
    return _create_ninformer("test_ninformer", pretrained, **{**model_args, **kwargs})


@register_model
def ninformer_cifar(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """The official model: 32x32 images, 10 classes, dropout 0.5."""
    model_args = {"img_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 4, "proj_drop_rate": 0.5}
    return _create_ninformer("ninformer_cifar", pretrained, **{**model_args, **kwargs})


@register_model
def ninformer_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """NiNformer of DeiT-Ti's width and depth."""
    return _create_ninformer("ninformer_tiny_patch16_224", pretrained, **kwargs)


@register_model
def ninformer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """NiNformer of DeiT-S' width and depth; to be trained with ``drop_path_rate=0.1``."""
    return _create_ninformer("ninformer_small_patch16_224", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def ninformer_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """NiNformer of DeiT-B's width and depth; to be trained with ``drop_path_rate=0.2``."""
    return _create_ninformer("ninformer_base_patch16_224", pretrained, **{"embed_dim": 768, **kwargs})
