"""Neighborhood attention as a module, and the transformer block of NAT, DiNAT and DiNAT_s around it."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale, register_notrace_module, trunc_normal_, use_fused_attn
from torch import Tensor, nn

from ..ops.neighborhood import (
    is_padded,
    neighborhood_attention,
    neighborhood_weights,
    reference_neighborhood_attention,
)
from .checks import Range, check_multiple, checked, scaled
from .mlp import Mlp
from .plain import project

__all__ = ["NeighborhoodAttention", "NeighborhoodBlock", "resize_rpb"]

norm_layer = partial(LayerNorm, eps=1e-5)


@register_notrace_module  # windows follow the size of its input
class NeighborhoodAttention(nn.Module):
    """Every token attends to the ``kernel_size x kernel_size`` tokens around it (NAT and DiNAT, Sec. 3).

    Windows are shifted inward at the border, so that each has all its tokens.  A ``dilation`` of ``d`` takes every
    ``d``-th token.  Maps smaller than ``kernel_size * dilation`` are zero-padded at the bottom and right before the
    projection, and the padded tokens are attended, as in NATTEN 0.14.

    The module replaces the attention of other timm models: ``block.attn = NeighborhoodAttention(dim, num_heads)``.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        kernel_size: Side ``K`` of the window.
        dilation: Distance of the tokens in a window.
        qkv_bias: Bias of the query, key and value projection.
        rpb: Add a learned bias ``[num_heads, 2K - 1, 2K - 1]`` for each relative position.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fused_attn: torch.jit.Final[bool]

    @checked(kernel_size=Range(2))
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        rpb: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads, side, side, **dd)) if rpb else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal relative position bias."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        """Heads and window for ``print(model)``."""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries, keys, values ``[B, H, W, h, d]`` of a map ``[B, H, W, C]``; key and value ``[h, d]`` beyond it."""
        B, H, W, C = x.shape
        h = self.num_heads
        pad_k: Tensor | None = None
        pad_v: Tensor | None = None
        if is_padded(H, W, self.kernel_size, self.dilation):  # what is the key and the value of a token of zeros?
            rows = torch.cat([x.reshape(B * H * W, C), x.new_zeros(1, C)])
            rows = self.qkv(rows) if torch.jit.is_scripting() else project(self.qkv, rows)
            qkv = rows[: B * H * W]
            _, pad_k, pad_v = rows[B * H * W].reshape(3, h, C // h).unbind(0)
        else:
            qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        q, k, v = qkv.reshape(B, H, W, 3, h, C // h).unbind(3)
        return q, k, v, pad_k, pad_v

    def forward(
        self,
        x: Tensor,
        size: list[int] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend over a map.

        Args:
            x: Map ``[B, H, W, C]``, or its tokens ``[B, N, C]`` in row-major order.
            size: ``(H, W)`` of the tokens; None means a square map.
            attn_mask: Must be None; here so that callers of timm's ``Attention`` need no change.
            is_causal: Must be False, likewise.

        Returns:
            Same shape as ``x``.

        Raises:
            ValueError: If the tokens do not fill the map, or a mask is given.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("neighborhood attention takes no attention mask: got attn_mask or is_causal")
        shape = x.shape
        if x.dim() == 3:
            N = shape[1]
            H = int(N**0.5) if size is None else size[0]
            W = H if size is None else size[1]
            if H * W != N:
                raise ValueError(f"got {N} tokens for a {H}x{W} map; give size=(H, W), without prefix tokens")
            x = x.reshape(shape[0], H, W, shape[2])
        q, k, v, pad_k, pad_v = self._heads(x)
        K = self.kernel_size
        if self.fused_attn:
            out = neighborhood_attention(q, k, v, K, dilation=self.dilation, rpb=self.rpb, pad_k=pad_k, pad_v=pad_v)
        else:
            out = reference_neighborhood_attention(
                q, k, v, K, dilation=self.dilation, rpb=self.rpb, pad_k=pad_k, pad_v=pad_v
            )
        out = out.flatten(3)
        return (self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)).reshape(shape)

    def weights_at(self, x: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
        """Attention of one token over its window.

        Args:
            x: Map ``[B, H, W, C]``.
            row: Row of the token.
            col: Its column.

        Returns:
            Weights ``[B, num_heads, K, K]`` in float32 at least; and rows and columns of the tokens that they are of
            ``[K, K, 2]``, some of them beyond a map smaller than ``kernel_size * dilation``.
        """
        q, k, _, pad_k, _ = self._heads(x)
        size, dilation = self.kernel_size, self.dilation
        return neighborhood_weights(q, k, row, col, size, dilation=dilation, rpb=self.rpb, pad_k=pad_k)


class NeighborhoodBlock(nn.Module):
    """Pre-norm transformer block with neighborhood attention (NAT, Sec. 3).

    Args:
        dim: Channels.
        num_heads: Attention heads.
        kernel_size: Side of the attention's window.
        dilation: Distance of the tokens in a window.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        qkv_bias: Bias of the query, key and value projection.
        ls_init_value: Initial layer scale; None for no layer scale.
        drop_path: Stochastic depth rate of both branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size=kernel_size, dilation=dilation, qkv_bias=qkv_bias, **dd
        )
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, scaled(dim, mlp_ratio=mlp_ratio), **dd)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]`` to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def resize_rpb(rpb: Tensor, kernel_size: int) -> Tensor:
    """Relative position bias of one window for another, bicubically as the authors made the 11x11 models.

    Args:
        rpb: ``[h, 2K - 1, 2K - 1]``.
        kernel_size: New side of the window.

    Returns:
        ``[h, 2 * kernel_size - 1, 2 * kernel_size - 1]``; ``rpb`` itself when it has that size.
    """
    side = 2 * kernel_size - 1
    if rpb.shape[-1] == side:
        return rpb
    return F.interpolate(rpb.float().unsqueeze(0), size=(side, side), mode="bicubic").squeeze(0).to(rpb.dtype)
