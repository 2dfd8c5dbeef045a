"""Halo attention as a module with timm's parameters (HaloNet)."""

from typing import Any

import torch
from timm.layers import make_divisible, register_notrace_module, trunc_normal_, use_fused_attn
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from ..ops.halo import halo_attention, halo_weights, reference_halo_attention
from .checks import check_multiple, checked, need
from .plain import project

__all__ = ["HaloAttention", "swap_halo"]


class RelativeTables(nn.Module):
    """Embeddings of relative rows and columns, shared by the heads.

    Args:
        win_size: Side ``w`` of a window; a table has ``2 w - 1`` rows.
        dim_head: Query channels of a head.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        win_size: int,
        dim_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * win_size - 1, dim_head, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * win_size - 1, dim_head, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of the size of a query channel."""
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The rows' and the columns' table, each ``[2 * win_size - 1, dim_head]``."""
        return self.height_rel, self.width_rel


@register_notrace_module  # pads by the size of its input
class HaloAttention(nn.Module):
    """Every block of queries attends to the block grown by a halo of keys; parameters are those of timm's ``HaloAttn``.

    Maps of any size are taken: queries are padded to whole blocks at the bottom and right, and the output is cropped.
    With ``stride=2`` a block has a quarter of the queries, or, for an odd block or ``avg_down``, the output is
    averaged.  There is no output projection.

    Args:
        dim: Input channels.
        dim_out: Output channels, a multiple of ``num_heads``; None for ``dim``.
        feat_size: Not used; here so that timm's blocks need no change.
        stride: 1 or 2.
        num_heads: Attention heads.
        dim_head: Query and key channels of a head; None for ``dim_out * qk_ratio``, rounded to a multiple of 8, over
            ``num_heads``.
        block_size: Side ``b`` of a block of queries, in pixels of the input.
        halo_size: Pixels by which the window of a block exceeds it on every side.
        qk_ratio: Query and key channels over output channels.
        qkv_bias: Bias of the projections.
        avg_down: Realise ``stride=2`` by averaging 2x2 outputs.
        scale_pos_embed: Scale the relative terms like the products of queries and keys.
        pad_mode: ``"zero"``: off-map keys are zero vectors that take part in the softmax, as in timm; ``"mask"``: they
            take no part.
        rel_index: ``"array"``: neighbouring queries are one step apart in the tables, also with ``stride=2``, as in
            timm; ``"pixel"``: ``stride`` steps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fused_attn: torch.jit.Final[bool]

    @checked(stride=(1, 2))
    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        pad_mode: str = "zero",
        rel_index: str = "array",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dim_out = dim_out or dim
        check_multiple(dim_out=dim_out, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        pooled = stride > 1 and (avg_down or block_size % stride > 0)
        self.dim_out = dim_out
        self.num_heads = num_heads
        self.dim_head = dim_head or make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        need(self.dim_head, "at least one channel for each head", qk_ratio=qk_ratio, num_heads=num_heads)
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = stride
        self.query_stride = 1 if pooled else stride
        self.scale_pos_embed = scale_pos_embed
        self.pad_mode = pad_mode
        self.rel_index = rel_index
        self.fused_attn = use_fused_attn()
        dim_qk = num_heads * self.dim_head
        self.q = nn.Conv2d(dim, dim_qk, 1, stride=self.query_stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, dim_qk + dim_out, 1, bias=qkv_bias, **dd)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.dim_head, **dd)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True) if pooled else nn.Identity()  # ceil: as the shortcut rounds
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of the size of an input channel for the projections, and new tables."""
        for proj in (self.q, self.kv):
            trunc_normal_(proj.weight, std=proj.in_channels**-0.5)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        self.pos_embed.reset_parameters()

    def extra_repr(self) -> str:
        """Window and heads for ``print(model)``."""
        return f"block_size={self.block_size}, halo_size={self.halo_size}, num_heads={self.num_heads}"

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H / s, W / s, h, d]``, keys and values ``[B, H, W, h, d]`` of a map ``[B, dim, H, W]``."""
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        h = self.num_heads
        q = self.q(x) if torch.jit.is_scripting() else project(self.q, x)
        kv = self.kv(x) if torch.jit.is_scripting() else project(self.kv, x)
        q = q.permute(0, 2, 3, 1).unflatten(-1, [h, self.dim_head])
        kv = kv.permute(0, 2, 3, 1).unflatten(-1, [h, self.dim_head + self.dim_out // h])
        return q, kv[..., : self.dim_head], kv[..., self.dim_head :]

    def forward(self, x: Tensor) -> Tensor:
        """Attend over a map ``[B, dim, H, W]``; returns ``[B, dim_out, ceil(H / stride), ceil(W / stride)]``.

        The output has the memory format of the input; channels-last needs no copies.
        """
        channels_first = x.is_contiguous()
        q, k, v = self._heads(x)
        rows, cols = self.pos_embed()
        b, r, s = self.block_size, self.halo_size, self.query_stride
        scaled, pad_mode, rel_index = self.scale_pos_embed, self.pad_mode, self.rel_index
        if self.fused_attn:
            out = halo_attention(q, k, v, rows, cols, b, r, s, None, scaled, pad_mode, rel_index)
        else:
            out = reference_halo_attention(q, k, v, rows, cols, b, r, s, None, scaled, pad_mode, rel_index)
        out = self.pool(out.flatten(3).permute(0, 3, 1, 2))
        return out.contiguous() if channels_first else out

    def weights_at(self, x: Tensor, row: int, col: int) -> Tensor:
        """Attention of one query over its window, before the output is averaged if it is.

        Args:
            x: Map ``[B, dim, H, W]``.
            row: Row of the query, counted in queries: with ``query_stride=2`` every second of the map has one.
            col: Its column.

        Returns:
            ``[B, num_heads, w, w]`` in float32 at least; the window of ``w x w`` starts ``halo_size`` before the block.
        """
        q, k, _ = self._heads(x)
        rows, cols = self.pos_embed()
        b, r, s = self.block_size, self.halo_size, self.query_stride
        scaled, pad_mode, rel_index = self.scale_pos_embed, self.pad_mode, self.rel_index
        return halo_weights(q, k, rows, cols, row, col, b, r, s, None, scaled, pad_mode, rel_index)


def _from_timm(old: HaloAttn) -> HaloAttention:
    new = HaloAttention(
        old.q.in_channels,
        old.dim_out_v,
        stride=1 if old.block_stride == 1 and isinstance(old.pool, nn.Identity) else 2,
        num_heads=old.num_heads,
        dim_head=old.dim_head_qk,
        block_size=old.block_size,
        halo_size=old.halo_size,
        qkv_bias=old.q.bias is not None,
        avg_down=not isinstance(old.pool, nn.Identity),
        scale_pos_embed=old.scale_pos_embed,
        device="meta",
    )
    new.q, new.kv = old.q, old.kv
    new.pos_embed.height_rel, new.pos_embed.width_rel = old.pos_embed.height_rel, old.pos_embed.width_rel
    return new.train(old.training)


def swap_halo(model: nn.Module) -> nn.Module:
    """Replace every timm ``HaloAttn`` inside a model by :class:`HaloAttention`, which takes maps of any size.

    Parameters stay the same objects under the same names, so state dicts, optimizers and outputs do not change::

        model = swap_halo(timm.create_model("haloregnetz_b", pretrained=True))
        model(torch.randn(1, 3, 240, 320))  # timm's attention takes multiples of 224 only

    Args:
        model: Any model; it is changed in place.

    Returns:
        The same model; a new module if ``model`` itself is a ``HaloAttn``.
    """
    if type(model) is HaloAttn:
        return _from_timm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is HaloAttn:
                setattr(parent, name, _from_timm(child))
    return model
