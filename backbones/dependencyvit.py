"""DependencyViT: plain vision transformer with reversed attention, whose messages make a tree of the tokens.

Paper: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", M. Ding, Y. Shen, L. Fan,
Z. Chen, Z. Chen, P. Luo, J. Tenenbaum, C. Gan, CVPR 2023, https://arxiv.org/abs/2304.03282.

This is a reconstruction.  No official code or weights were released (github.com/dingmyu/DependencyViT holds a licence
only).  It follows the paper's abstract and Figure 2 and an independent re-implementation with untrained weights (draft
pull request 2062 of pytorch-image-models, by an author who had the paper's appendix and reports about 2 % less than the
paper).  **No accuracy of the paper is claimed for these models.**

Our choices, where neither source says anything, are arguments: biases of the message controller and an open gate at the
start (``gate_bias``, ``gate_init``), how messages enter the pooling (``message_pool``), what the Lite models prune by
(``prune_score``), where and how much (``prune_blocks``, ``prune_ratio``), LayerScale (``init_values``).  Also ours:
messages are kept as logarithms in float32; pruned tokens are counted from the original number of tokens, so that
rounding does not add up; kept tokens stay in order; maps show a pruned token in its last state; the small Lite model;
the tree parser in ``layers/dependency.py``.  Attention dropout, which the re-implementation offers, is left out.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Optional, Tuple  # noqa: UP035 - TorchScript

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    is_exporting,
    register_notrace_module,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .layers import Dependency, Panel, ReversedAttention, Tree, dependency_tree, saliency, subtrees
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import COUNT, Range, check_multiple, check_patches, checked, need, scaled
from .layers.panel import seen_by
from .layers.resampling import position_map
from .layers.reversed_attention import SCORES
from .ops.reversed_attention import dependency_mask

__all__ = ["DependencyViT"]

ABOUT = About(
    "DependencyViT",
    "no official code or weights; a reconstruction from the paper's abstract and Figure 2 and from draft pull "
    "request 2062 of github.com/huggingface/pytorch-image-models, Apache-2.0.",
    (
        (
            'M. Ding, Y. Shen, L. Fan, Z. Chen, Z. Chen, P. Luo, J. Tenenbaum, C. Gan, "Visual Dependency '
            'Transformers: Dependency Tree Emerges from Reversed Attention", CVPR 2023',
            "2304.03282",
        ),
    ),
    golden=("reversed_*",),
    limits=(
        "There are no weights: train first.  No accuracy of the paper is claimed.",
        "Pruning in half precision can keep other tokens than in float32: of those of a fresh "
        "``test_dependencyvit_lite`` 99.9 % are the same in bfloat16, 99.98 % in float16.",
        "``dependency_tree(..., method='edmonds')`` takes at most 1,024 tokens, ``vizoo show`` at most 4,096: every "
        "block has a dependency of each token on each other one.",
    ),
    example="""
        # the tree of the tokens, the parts into which it falls, and what each token receives
        from vizoo.backbones.layers import dependency_tree, saliency, subtrees

        model.set_record_dependency()
        model(image)
        dependency = model.get_dependency()  # masks [B, layers, N (parent), N (child)], made only here
        tree = dependency_tree(dependency)  # tree.parents [B, N], -1 for the root
        parts, (received, foreground) = subtrees(dependency, tree, k=5), saliency(dependency)
    """,
)

MOST_TOKENS = 4096  # of a picture: every block has a dependency of each on each other one
MESSAGE_POOLS = ("message", "message_mean", "avg")
_norm_layer = partial(LayerNorm, eps=1e-6)


def put_back(x: Tensor, index: Tensor | None, dense: Tensor) -> Tensor:
    """Put tokens ``[B, K, C]`` at their positions ``[B, K]`` of a map ``[B, H, W, C]``; None stands for all of it."""
    if index is None:
        return x.reshape(dense.shape)
    place = index.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return dense.flatten(1, 2).scatter(1, place, x.to(dense.dtype)).reshape(dense.shape)


@register_notrace_module
class DenseMap(nn.Module):
    """The map of all tokens: those that are left, and every pruned one in its last state."""

    def forward(self, x: Tensor, log_message: Tensor | None, index: Tensor | None, dense: Tensor) -> Tensor:
        """Tokens ``[B, K, C]``, messages and positions ``[B, K]``, earlier states ``[B, H, W, C]`` -> the last."""
        return put_back(x, index, dense)


@register_notrace_module
class WeightedMap(nn.Module):
    """The map of the tokens that are left, weighted so that its plain average is the pooling by messages.

    Pruned tokens are zero.

    Args:
        message_pool: ``message``: the average is ``sum_i M_i x_i / sum_i M_i``; ``message_mean``: ``mean_i M_i x_i``;
            ``avg``: ``mean_i x_i``; each over the tokens that are left.
    """

    message_pool: torch.jit.Final[str]

    @checked(message_pool=MESSAGE_POOLS)
    def __init__(self, message_pool: str = "message"):
        super().__init__()
        self.message_pool = message_pool

    def forward(self, x: Tensor, log_message: Tensor, index: Tensor | None, dense: Tensor) -> Tensor:
        """Tokens ``[B, K, C]``, messages and positions ``[B, K]``, any map ``[B, H, W, C]`` -> the last."""
        total = dense.shape[1] * dense.shape[2]
        if self.message_pool == "message":
            weight = log_message.softmax(-1) * total
        elif self.message_pool == "message_mean":
            weight = log_message.exp() * (total / x.shape[1])
        else:
            weight = torch.full_like(log_message, total / x.shape[1])
        x = (x * weight.unsqueeze(-1)).to(x.dtype)
        return put_back(x, index, torch.zeros_like(dense, dtype=x.dtype))


@register_notrace_module  # counts by the size of its input
class TokenPruning(nn.Module):
    """Keep the tokens with the highest scores, in the order of the image.

    Args:
        pruned: Share of the original tokens that is gone afterwards: ``floor(N * (1 - pruned))`` stay, at least one.
    """

    def __init__(self, pruned: float):
        super().__init__()
        # a fraction: whole numbers round alike everywhere, in exported programs too
        self.parts, self.whole = Fraction(1 - pruned).limit_denominator(10**6).as_integer_ratio()

    def extra_repr(self) -> str:
        """Share that is kept for ``print(model)``."""
        return f"kept={self.parts / self.whole:g}"

    def forward(
        self,
        x: Tensor,
        score: Tensor,
        log_message: Tensor,
        index: Tensor | None,
        dense: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prune.

        Args:
            x: Tokens ``[B, K, C]``.
            score: Ranks them ``[B, K]``; of equals the lower position stays.
            log_message: Logarithm of their messages ``[B, K]``.
            index: Their positions ``[B, K]``, ascending; None when all are there.
            dense: Map of the earlier states ``[B, H, W, C]``.

        Returns:
            Tokens ``[B, k, C]``, logarithm of messages and positions ``[B, k]`` of those that stay; the map with the
            states of all that came in.
        """
        count = dense.shape[1] * dense.shape[2] * self.parts // self.whole
        if torch.jit.is_scripting() or not is_exporting():
            count = max(1, count)
            order = torch.sort(score.detach(), stable=True, dim=1, descending=True)[1]
        else:  # the size is free; ONNX has no stable sort, but its own puts the lower of equals first
            count = torch.sym_max(1, count)  # type: ignore[assignment]
            order = torch.sort(score.detach(), dim=1, descending=True)[1]
        order = order[:, :count].sort(dim=1)[0]
        dense = put_back(x, index, dense)
        index = order if index is None else index.gather(1, order)
        x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        return x, log_message.gather(1, order), index, dense


class Messages:
    """What travels beside the tokens from block to block, so that a block takes tokens and returns tokens.

    A block reads the first three and leaves the same three, as they are after it, in ``after``.  It overwrites nothing
    that it reads: run again, as by activation checkpointing, it computes the same.  This is neither a tuple nor a
    dataclass, of which sharding tools would hand a copy to the block.

    Args:
        log_message: Logarithm of the messages of the tokens ``[B, K]``; None in front of the first block.
        index: Positions of the tokens ``[B, K]``; None when all are there.
        dense: Map of the states of pruned tokens ``[B, H, W, C]``; elsewhere its values mean nothing.
    """

    def __init__(
        self,
        log_message: Optional[Tensor],  # noqa: UP045 - TorchScript
        index: Optional[Tensor],  # noqa: UP045 - TorchScript
        dense: Tensor,
    ):
        self.log_message = log_message
        self.index = index
        self.dense = dense
        after: Optional[Tuple[Tensor, Optional[Tensor], Tensor]] = None  # noqa: UP006, UP045 - TorchScript
        self.after = after

    def to(self, device: torch.device, non_blocking: bool = False) -> "Messages":
        """Move to the device of the next block: what tools that spread a model over devices call on its inputs."""
        log_message, index = self.log_message, self.index
        if log_message is not None:
            self.log_message = log_message.to(device, non_blocking=non_blocking)
        if index is not None:
            self.index = index.to(device, non_blocking=non_blocking)
        self.dense = self.dense.to(device, non_blocking=non_blocking)
        return self


def following(state: Messages) -> Messages:
    """What goes into the block after the one that got ``state``."""
    after = state.after
    assert after is not None
    return Messages(after[0], after[1], after[2])


def recompute(block: nn.Module, x: Tensor, state: Messages) -> tuple[Tensor, Messages]:
    """Run a block whose activations are computed again in the backward pass, as a function of tensors alone."""

    def run(x: Tensor, log_message: Tensor | None, index: Tensor | None, dense: Tensor) -> tuple[Tensor | None, ...]:
        inner = Messages(log_message, index, dense)
        out = block(x, inner)
        assert inner.after is not None
        return out, *inner.after

    out, *after = checkpoint(run, x, state.log_message, state.index, state.dense)
    return out, Messages(*after)


class Block(nn.Module):
    """Pre-norm block of reversed attention and feed-forward network, with pruning in between in the Lite models.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        qkv_bias: Bias of the query, key and value projection.
        tau: Temperature of the head selector.
        gate_bias: Biases of the message controller.
        gate_init: What its last bias starts from.
        pruned: Share of the original tokens that is gone after this block; 0 for a block that keeps all.
        prune_score: What they are ranked by: ``message`` or ``received``.
        init_values: What LayerScale starts from; 0 or None leaves it out (timm's ``create_model`` drops None).
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        tau: float = 0.1,
        gate_bias: bool = True,
        gate_init: float = 4.0,
        pruned: float = 0.0,
        prune_score: str = "message",
        init_values: float | None = 1e-6,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = _norm_layer(dim, **dd)
        self.attn = ReversedAttention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            tau=tau,
            gate_bias=gate_bias,
            gate_init=gate_init,
            score=prune_score if pruned else "message",
            **dd,
        )
        self.ls1 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.prune: nn.Module | None = TokenPruning(pruned) if pruned else None
        self.norm2 = _norm_layer(dim, **dd)
        self.mlp = Mlp(dim, scaled(dim, mlp_ratio=mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.recorded: tuple[Tensor, Tensor | None, tuple[int, int]] | None = None  # messages, positions, map size

    def forward(self, x: Tensor, state: Messages) -> Tensor:
        """Run the block.

        Args:
            x: Tokens ``[B, K, C]``.
            state: Their messages and positions; ``after`` is set.

        Returns:
            Tokens ``[B, k, C]``, fewer if the block prunes.
        """
        index, dense = state.index, state.dense
        out, message, score = self.attn(self.norm1(x), state.log_message)
        x = x + self.drop_path1(self.ls1(out))
        if self.attn.record and not torch.jit.is_scripting():
            self.recorded = (message.detach(), index, (dense.shape[1], dense.shape[2]))
        if self.prune is not None:
            x, message, index, dense = self.prune(x, score, message, index, dense)
        state.after = (message, index, dense)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DependencyViT(nn.Module):
    """Plain vision transformer with reversed attention, without class token; one stride, 16 by default.

    ``forward_features`` gives the map whose plain average is the pooling by messages, so timm's pooling needs no state.

    Args:
        img_size: Image size that the position embedding is made for.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the feed-forward networks over ``embed_dim``.
        qkv_bias: Bias of the query, key and value projections.
        init_values: What LayerScale starts from; 0 or None leaves it out (timm's ``create_model`` drops None).
        tau: Temperature of the head selector.
        gate_bias: Biases of the message controllers.
        gate_init: What their last biases start from; 4 opens the gates.
        message_pool: Weights of the tokens in the map: ``message``, ``message_mean`` or ``avg``, see
            :class:`WeightedMap`.
        prune_blocks: Blocks, counted from 1, after whose attention tokens are pruned.
        prune_ratio: Share of the original tokens that goes each time.
        prune_score: Which go: those of the smallest ``message``, or of the least mass ``received`` in that block.
        dynamic_img_size: Accept any image size: positions are interpolated, images padded to whole patches.
        dense_taps: Compute the maps of the modules ``taps`` in every pass, where tokens are pruned; feature wrappers
            that hook modules need it, ``features_only`` takes care.  Without pruning they cost nothing.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    dynamic_img_size: torch.jit.Final[bool]
    dense_taps: torch.jit.Final[bool]

    @checked(embed_dim=Range(2), message_pool=MESSAGE_POOLS, prune_score=SCORES)
    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        init_values: float | None = 1e-6,
        tau: float = 0.1,
        gate_bias: bool = True,
        gate_init: float = 4.0,
        message_pool: str = "message",
        prune_blocks: Sequence[int] = (),
        prune_ratio: float = 0.16,
        prune_score: str = "message",
        dynamic_img_size: bool = True,
        dense_taps: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(embed_dim=embed_dim, num_heads=num_heads)
        check_patches(img_size, patch_size)
        rising = list(prune_blocks) == sorted(set(prune_blocks).intersection(range(1, depth + 1)))
        need(rising, f"rising numbers from 1 to depth={depth}", prune_blocks=tuple(prune_blocks))
        count = len(prune_blocks)
        left = not count or 0 < prune_ratio * count < 1
        need(left, f"a number above 0 and below 1/{count}, so that tokens are left", prune_ratio=prune_ratio)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.dynamic_img_size = dynamic_img_size
        self.dense_taps = dense_taps or not prune_blocks
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
        self.pos_embed = nn.Parameter(torch.empty(1, *self.patch_embed.grid_size, embed_dim, **dd))
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        pruned = {block: prune_ratio * (i + 1) for i, block in enumerate(prune_blocks)}
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                tau=tau,
                gate_bias=gate_bias,
                gate_init=gate_init,
                pruned=pruned.get(i + 1, 0.0),
                prune_score=prune_score,
                init_values=init_values,
                drop_path=rates[i],
                **dd,
            )
            for i in range(depth)
        )
        self.taps = nn.ModuleList(DenseMap() for _ in range(depth))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"taps.{i}"} for i in range(depth)
        ]
        self.norm: nn.Module = _norm_layer(embed_dim, **dd)
        self.to_map: nn.Module = WeightedMap(message_pool)
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal for linear layers and positions, open gates.

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
        for block in self.blocks:
            block.attn.message_controller.open_gate()  # type: ignore[union-attr, operator]
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay would only shrink."""
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed|^pos_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

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
        """Change the image size that positions are made for, or the patch size: parameters are resampled.

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
        if self.pos_embed.shape[1:3] != self.patch_embed.grid_size:
            resampled = position_map(self.pos_embed.detach(), *self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, size, patch_size=patch_size)

    @torch.jit.ignore
    def set_record_dependency(self, enable: bool = True) -> None:
        """Keep what :meth:`get_dependency` needs of every later pass: queries, keys and weights, no ``N x N`` matrix.

        Args:
            enable: False stops and forgets.
        """
        for block in self.blocks:
            block.attn.record = enable  # type: ignore[union-attr, assignment]
            block.attn.recorded = block.recorded = None  # type: ignore[union-attr, assignment]

    @torch.jit.ignore
    def get_dependency(self, layers: int | Sequence[int] | None = None) -> Dependency:
        """Soft dependency masks of the last pass after :meth:`set_record_dependency`, made now, one head at a time.

        Args:
            layers: Blocks, counted from 0, negative from the end; a number ``k`` means the last ``k``, None all.

        Returns:
            Masks, messages and how far each token came, at the positions of the whole map.

        Raises:
            ValueError: If nothing is recorded, or ``layers`` is out of range.
        """
        records = [(block.attn.recorded, block.recorded) for block in self.blocks]  # type: ignore[union-attr]
        if any(sent is None or state is None for sent, state in records):
            raise ValueError("nothing is recorded: call set_record_dependency(True), then run the model")
        depth = len(records)
        last = depth if layers is None else layers
        chosen = list(range(-last, 0) if isinstance(last, int) else last)
        if not chosen or any(i not in range(-depth, depth) for i in chosen):
            raise ValueError(
                f"got layers={layers}, need 1 to {depth}, or a list of numbers from {-depth} to {depth - 1}"
            )
        masks: dict[int, Tensor] = {}
        message = reached = None
        for i, (sent, state) in enumerate(records):
            q, k, weight = sent  # type: ignore[misc]
            log_message, index, (H, W) = state  # type: ignore[misc]
            B = log_message.shape[0]
            if index is None:
                index = torch.arange(H * W, device=q.device).expand(B, -1)
            if message is None or reached is None:
                message, reached = log_message.new_zeros(B, H * W), index.new_zeros(B, H * W)
            message = message.scatter(1, index, log_message.exp())
            reached = reached.scatter(1, index, i + 1)
            if {i, i - depth}.intersection(chosen):
                mask = dependency_mask(q, k, weight)
                rows = mask.new_zeros(B, H * W, mask.shape[2]).scatter(1, index.unsqueeze(2).expand_as(mask), mask)
                columns = index.unsqueeze(1).expand_as(rows)
                masks[i] = rows.new_zeros(B, H * W, H * W).scatter(2, columns, rows)
        assert message is not None and reached is not None
        return Dependency(torch.stack([masks[i % depth] for i in chosen], 1), message, reached, (H, W))

    @torch.jit.ignore
    @checked(method=("greedy", "edmonds"), layers=COUNT, parts=COUNT)
    def explain(
        self, image: Tensor, method: str = "greedy", layers: int | None = None, parts: int = 5, min_size: int = 4
    ) -> list[Panel]:
        """The dependency tree of the tokens, its parts and the saliency.

        Args:
            image: ``[1, in_chans, H, W]``, normalised, of at most 4,096 tokens.
            method: Parser of the tree, as of :func:`vizoo.backbones.layers.dependency_tree`.
            layers: Take the mean of the last so many blocks; None for all.
            parts: Into how many parts the tree is cut.
            min_size: Tokens below a cut, at least.

        Returns:
            A panel for each.

        Raises:
            ValueError: If a setting is out of range or there are too many tokens.
        """
        depth = len(self.blocks)
        need(layers is None or layers <= depth, f"1 to {depth}", layers=layers)
        tokens = [n // p for n, p in zip(image.shape[2:], self.patch_embed.patch_size, strict=True)]
        need(tokens[0] * tokens[1] <= MOST_TOKENS, f"at most {MOST_TOKENS:,} tokens", tokens=tuple(tokens))
        records = [block.attn.record for block in self.blocks]  # type: ignore[union-attr]
        try:
            self.set_record_dependency()
            seen_by(self, image, ())
            found = self.get_dependency(layers)
        finally:
            self.set_record_dependency(False)
            for block, record in zip(self.blocks, records, strict=True):
                block.attn.record = record  # type: ignore[union-attr, assignment]
        found = Dependency(found.masks.float(), found.message.float(), found.reached, found.size)
        tree = dependency_tree(found, method)
        labels = subtrees(found, tree, parts, min_size)[0]
        scaled_map, foreground = (m[0] for m in saliency(found))
        return [
            _tree_panel(found, tree),
            Panel(
                title=f"{int(labels.max()) + 1} parts: subtrees of {' x '.join(map(str, found.size))} tokens",
                parts=labels,
            ),
            Panel(
                title=f"Saliency: what tokens receive; foreground {float(foreground.float().mean()):.0%}",
                heat=scaled_map,
                outline=foreground,
            ),
        ]

    def _embed(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to tokens with positions ``[B, H, W, C]``."""
        x = self.patch_embed(x)
        if self.dynamic_img_size:
            return x + position_map(self.pos_embed, x.shape[1], x.shape[2])
        return x + self.pos_embed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Outputs of the blocks as maps, pruned tokens in their last state; arguments as for timm's plain transformer.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Blocks: all for None, the last ``k`` for a number ``k``, else those listed, in network order.
            return_prefix_tokens: Changes nothing, for there are none.
            norm: Apply the final norm to the feature of the last block.
            stop_early: Leave out the blocks after the last one listed.
            output_fmt: ``NCHW``, ``NHWC`` or ``NLC``.
            intermediates_only: Return the features alone.
            output_dict: Return a dictionary with ``image_intermediates`` and ``image_features``; not in TorchScript.

        Returns:
            The features; unless ``intermediates_only``, also the final map in front of them.

        Raises:
            ValueError: If ``output_fmt`` is something else.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"got output_fmt={output_fmt}, need 'NCHW', 'NHWC' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        features: list[Tensor] = []
        dense = self._embed(x)
        x = dense.flatten(1, 2)
        state = Messages(None, None, dense)
        last = 0
        if torch.jit.is_scripting() or not stop_early:  # noqa: SIM108 - TorchScript would compile both sides
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            last = i
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, state = recompute(block, x, state)
            else:
                x = block(x, state)
                state = following(state)
            if i in take_indices:
                feature = put_back(x, state.index, state.dense)
                if norm and i == self.depth - 1:
                    feature = self.norm(feature)
                if output_fmt == "NCHW":
                    feature = feature.permute(0, 3, 1, 2).contiguous()
                elif output_fmt == "NLC":
                    feature = feature.flatten(1, 2)
                features.append(feature)
        if intermediates_only:
            if not torch.jit.is_scripting() and output_dict:
                return {"image_intermediates": features}
            return features
        final = self._finish(x, state) if last == self.depth - 1 else put_back(x, state.index, state.dense)
        if not torch.jit.is_scripting() and output_dict:
            return {"image_intermediates": features, "image_features": final}
        return final, features

    def _finish(self, x: Tensor, state: Messages) -> Tensor:
        log_message = state.log_message
        assert log_message is not None
        return self.to_map(self.norm(x), log_message, state.index, state.dense)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need; without its norm the final map is the last block's.

        Args:
            indices: Blocks to keep the features of, as in :meth:`forward_intermediates`.
            prune_norm: Remove the final norm and the weights by messages.
            prune_head: Remove the classifier.

        Returns:
            The blocks as positive numbers.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        prune_end = max_index < len(self.blocks) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
            self.to_map = DenseMap().train(self.training)
        self.blocks = self.blocks[: max_index + 1]
        self.taps = self.taps[: max_index + 1]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the normed, weighted map ``[B, H, W, num_features]``."""
        dense = self._embed(x)
        x = dense.flatten(1, 2)
        state = Messages(None, None, dense)
        for block, tap in zip(self.blocks, self.taps):  # noqa: B905 - TorchScript knows no strict
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, state = recompute(block, x, state)
            else:
                x = block(x, state)
                state = following(state)
            if self.dense_taps:
                tap(x, state.log_message, state.index, state.dense)
        return self._finish(x, state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, H, W, num_features]`` to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)


def _tree_panel(dependency: Dependency, tree: Tree) -> Panel:
    """Lines from every token of an image to its parent, and a star at the root."""
    (rows, columns), parents = dependency.size, tree.parents[0]
    token = torch.arange(rows * columns, device=parents.device)
    places = torch.stack([(token // columns + 0.5) / rows, (token % columns + 0.5) / columns], 1)
    children = token[parents >= 0]
    strength = dependency.masks[0].mean(0)[parents[children], children]
    return Panel(
        title=f"Dependency tree, {int(tree.depth[0].max())} levels below the root (star)",
        lines=torch.stack([places[children], places[parents[children]]], 1),
        strength=strength,
        bar="what a token sends to its parent",
        points=places[parents < 0],
        names=("\N{BLACK STAR}",),
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Checkpoints of another image or patch size, resampled to those of the model.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict, dense=True)
    positions: Any = model.pos_embed
    if "pos_embed" in state_dict:
        state_dict["pos_embed"] = position_map(state_dict["pos_embed"], *positions.shape[1:3])
    patches: Any = model.get_parameter("patch_embed.proj.weight")
    weight = state_dict.get("patch_embed.proj.weight")
    if weight is not None and weight.shape[2:] != patches.shape[2:]:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, list(patches.shape[2:]))
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "description": "Reconstruction from the paper's description; no official code or weights exist.",
        "paper_name": "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
        "paper_ids": "arXiv:2304.03282",
        **kwargs,
    }


_test_cfg = _cfg(input_size=(3, 96, 96), pool_size=(6, 6), crop_pct=1.0)
default_cfgs = generate_default_cfgs(
    {
        "dependencyvit_tiny.untrained": _cfg(),
        "dependencyvit_small.untrained": _cfg(),
        "dependencyvit_lite_tiny.untrained": _cfg(),
        "dependencyvit_lite_small.untrained": _cfg(),
        "test_dependencyvit.untrained": _test_cfg,
        "test_dependencyvit_lite.untrained": _test_cfg,
    }
)

_LITE = {"prune_blocks": (2, 5, 8, 11)}
_SMALL = {"embed_dim": 384}
# LayerScale of 1, so that tests see what the blocks do
_TEST: dict[str, Any] = {"img_size": 96, "embed_dim": 40, "depth": 4, "num_heads": 4, "init_values": 1.0}


def _create_dependencyvit(variant: str, pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    if kwargs.get("features_only") and kwargs.get("feature_cls", "getter") in ("hook", "fx"):
        kwargs.setdefault("dense_taps", True)
    return build(DependencyViT, variant, pretrained, checkpoint_filter_fn, taps=None, rounds=None, **kwargs)


@register_model
def test_dependencyvit(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """Tiny DependencyViT for tests."""
    return _create_dependencyvit("test_dependencyvit", pretrained, **{**_TEST, **kwargs})


@register_model
def test_dependencyvit_lite(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """Tiny DependencyViT-Lite for tests."""
    model_args = {**_TEST, "prune_blocks": (1, 3)}
    return _create_dependencyvit("test_dependencyvit_lite", pretrained, **{**model_args, **kwargs})


@register_model
def dependencyvit_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-T."""
    return _create_dependencyvit("dependencyvit_tiny", pretrained, **kwargs)


@register_model
def dependencyvit_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-S."""
    return _create_dependencyvit("dependencyvit_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def dependencyvit_lite_tiny(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-Lite-T: 16 % of the tokens go after the attention of blocks 2, 5, 8 and 11."""
    return _create_dependencyvit("dependencyvit_lite_tiny", pretrained, **{**_LITE, **kwargs})


@register_model
def dependencyvit_lite_small(pretrained: bool = False, **kwargs: Any) -> DependencyViT:
    """DependencyViT-Lite-S, pruned likewise."""
    return _create_dependencyvit("dependencyvit_lite_small", pretrained, **{**_LITE, **_SMALL, **kwargs})
