"""Flow-Attention as modules: self-attention in place of a transformer's, and attention to other tokens (Flowformer)."""

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.flow_attention import flow_attention, flows
from .checks import check_multiple, checked
from .plain import project

__all__ = ["FlowAttention", "FlowCrossAttention"]


@register_notrace_module  # checks the shapes of its input
class FlowAttention(nn.Module):
    """Flow-Attention (Flowformer): softmax attention's place at a cost that is linear in the tokens.

    Every token takes in and gives out the same amount of a flow; what it takes when all give the same is its
    allocation, what it gives when all take the same decides its share in a competition.  There is no position in it,
    and prefix tokens take part like any other.  The flow is computed in float32 at least, also under autocast; a
    CPU runs it in plain PyTorch operators.

    The module replaces the attention of other timm models: ``block.attn = FlowAttention(dim, num_heads)``.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        qkv_bias: Bias of the query, key and value projection.
        eps_outer: Add the constant of the products to their results too: the official code for images does, its
            general form does not.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        eps_outer: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.eps_outer = eps_outer
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def extra_repr(self) -> str:
        """Heads and constants for ``print(model)``."""
        return f"num_heads={self.num_heads}, eps_outer={self.eps_outer}"

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        t = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return t[0], t[1], t[2]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens ``[B, N, C]`` or a map ``[B, H, W, C]``.
            attn_mask: Must be None, for there are no pairs to mask; here so that callers of timm's ``Attention`` need
                no change.
            is_causal: Whether a token sees itself and those before it only; those of a map are in row-major order.
            key_padding_mask: ``[B, N]``, True for padding, which takes no part and gets the bias of ``proj``.

        Returns:
            Same shape as ``x``.

        Raises:
            ValueError: If a mask of pairs is given, or the other one does not fit.
        """
        if attn_mask is not None:
            raise ValueError("Flow-Attention takes no mask of pairs: got attn_mask, need None (or key_padding_mask)")
        shape = x.shape
        q, k, v = self._heads(x.flatten(1, -2))
        out = flow_attention(
            q,
            k,
            v,
            causal=is_causal,
            eps_outer=self.eps_outer,
            query_padding_mask=key_padding_mask,
            key_padding_mask=key_padding_mask,
        )
        out = out.transpose(1, 2).flatten(2)
        return (self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)).reshape(shape)

    def flows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the flow makes of each token, without a causal mask.

        Args:
            x: Tokens ``[B, N, C]`` or a map ``[B, H, W, C]``.

        Returns:
            In float32 at least: the inverse of each token's incoming flow ``[B, num_heads, N]``, its allocation, and
            its competition, whose mean over the tokens is 1.
        """
        q, k, _ = self._heads(x.flatten(1, -2))
        return flows(q, k, eps_outer=self.eps_outer)

    def weights_at(self, x: Tensor, token: int) -> Tensor:
        """How much one token takes of the value of each, which the pass itself never computes.

        Args:
            x: Tokens ``[B, N, C]`` or a map ``[B, H, W, C]``.
            token: Position of the token, in row-major order.

        Returns:
            ``[B, num_heads, N]`` in float32 at least; they add up to about the token's allocation, not to 1.
        """
        q, k, _ = self._heads(x.flatten(1, -2))
        incoming, allocation, competition = flows(q, k, eps_outer=self.eps_outer)
        wide = competition.dtype
        meets = (q[:, :, token : token + 1].to(wide).sigmoid() * k.to(wide).sigmoid()).sum(-1)
        return meets * competition * (incoming * allocation)[:, :, token : token + 1]


@register_notrace_module  # checks the shapes of its input
class FlowCrossAttention(nn.Module):
    """Flow-Attention of tokens to others, the general form: projections of their own, any widths, causal or not.

    With ``eps_outer=False``, and ``proj_drop=0.05`` in training, it is ``Flow_Attention`` and ``Flow_Attention_Causal``
    of the official ``Flow_Attention.py``, whose state dicts load as they are.

    Args:
        dim: Channels of the queries.
        num_heads: Heads.
        source_dim: Channels of keys and values; None for ``dim``.
        hidden_dim: Channels of all heads together, a multiple of ``num_heads``; None for ``dim``.
        out_dim: Channels of the output; None for ``dim``.
        qkv_bias: Biases of the query, key and value projections.
        proj_drop: Dropout rate of the output.
        eps_outer: As in :class:`FlowAttention`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        source_dim: int | None = None,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        eps_outer: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_dim is None:
            check_multiple(dim=dim, num_heads=num_heads)
            hidden_dim = dim
        else:
            check_multiple(hidden_dim=hidden_dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.eps_outer = eps_outer
        self.query_projection = nn.Linear(dim, hidden_dim, bias=qkv_bias, **dd)
        self.key_projection = nn.Linear(source_dim or dim, hidden_dim, bias=qkv_bias, **dd)
        self.value_projection = nn.Linear(source_dim or dim, hidden_dim, bias=qkv_bias, **dd)
        self.out_projection = nn.Linear(hidden_dim, out_dim or dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        """Heads and constants for ``print(model)``."""
        return f"num_heads={self.num_heads}, eps_outer={self.eps_outer}"

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        is_causal: bool = False,
        query_padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            queries: Tokens ``[B, n, dim]``.
            keys: Tokens ``[B, m, source_dim]``.
            values: Tokens of the same shape as ``keys``; None for ``keys`` themselves.
            is_causal: Whether token ``i`` sees the first ``i`` keys only, and a key the queries from its own on; needs
                ``n = m``.
            query_padding_mask: ``[B, n]``, True for padding, which takes no part and gets the bias of the output.
            key_padding_mask: ``[B, m]``, True for padding, which takes no part.

        Returns:
            ``[B, n, out_dim]``.

        Raises:
            ValueError: If shapes or masks do not fit.
        """
        if values is None:
            values = keys
        if torch.jit.is_scripting():
            q, k, v = self.query_projection(queries), self.key_projection(keys), self.value_projection(values)
        else:
            q, k = project(self.query_projection, queries), project(self.key_projection, keys)
            v = project(self.value_projection, values)
        out = flow_attention(
            self._split(q),
            self._split(k),
            self._split(v),
            causal=is_causal,
            eps_outer=self.eps_outer,
            query_padding_mask=query_padding_mask,
            key_padding_mask=key_padding_mask,
        )
        out = out.transpose(1, 2).flatten(2)
        out = self.out_projection(out) if torch.jit.is_scripting() else project(self.out_projection, out)
        return self.proj_drop(out)

    def _split(self, x: Tensor) -> Tensor:
        """``[B, N, h * d]`` to ``[B, h, N, d]``."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)
