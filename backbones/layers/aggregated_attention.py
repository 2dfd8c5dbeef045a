"""The two attentions of TransNeXt (Sec. 3): over a window and the pooled map at once, and over the whole map."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    register_notrace_function,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from ..ops.aggregated_attention import aggregated_attention, reference_aggregated_attention
from ..ops.attention import attention
from ..ops.neighborhood import at_least
from ..ops.position_bias import BiasCache, log_distances, position_bias, relative_positions, spread
from .checks import Range, check_multiple, checked, need
from .mixture_of_heads import MixtureOfHeads
from .plain import fuses, project, project_wide, tensors
from .resampling import region_mean, resize

__all__ = ["AggregatedAttention", "LengthScaledAttention"]

POSITION_DIM = 512  # hidden channels of the network that makes the bias of a relative position
register_notrace_function(relative_positions)


class _PositionedAttention(nn.Module):
    """What both attentions have: scaled cosine scores, a bias from relative positions, and perhaps a gate of heads.

    Args:
        dim: Channels.
        num_heads: Heads.
        pretrain_map: Rows and columns of the map in the training of the weights, by which distances are measured.
        bias_map: Rows and columns of the map for which the bias is made and then resized; None for the map at hand.
        shared_heads: Heads that every token uses; None for no gate.
        routed_heads: Heads that a token chooses among the others.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_map: int | tuple[int, int],
        bias_map: int | tuple[int, int] | None,
        shared_heads: int | None,
        routed_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_heads=num_heads)
        need(shared_heads is not None or routed_heads == 0, "0 without shared_heads", routed_heads=routed_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.pretrain_map = to_2tuple(pretrain_map)
        self.bias_map = None if bias_map is None else to_2tuple(bias_map)
        self.fused_attn = use_fused_attn()
        self.cache = BiasCache()  # a model gives its layers one for all
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.cpb_fc1 = nn.Linear(2, POSITION_DIM, **dd)
        self.cpb_fc2 = nn.Linear(POSITION_DIM, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.gates: nn.Module | None = None
        if shared_heads is not None:
            self.gates = MixtureOfHeads(dim, num_heads, shared_heads, routed_heads, **dd)

    def reset_parameters(self) -> None:
        """A temperature of ``1 / 0.24`` and a small query embedding."""
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)

    def extra_repr(self) -> str:
        """Heads for ``print(model)``."""
        return f"num_heads={self.num_heads}"

    def position_bias(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """Bias of the scores of a map ``[B, H, W, C]`` with its regions: ``[h, H * W, rows * cols]``, float32 at least.

        Sec. 3.3 of the paper: a network of the logarithms of the distances, which extrapolates to other maps.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if fuses(x, self.cpb_fc1, self.cpb_fc2):
                return self._kept_bias(x, rows, cols)
        return self._position_bias(x, rows, cols)

    @torch.jit.unused
    def _kept_bias(self, x: Tensor, rows: int, cols: int) -> Tensor:
        weights = tensors(self.cpb_fc1, self.cpb_fc2)
        if torch.compiler.is_compiling():
            if self.bias_map is not None:
                return self._position_bias(x, rows, cols)
            return position_bias(*weights, x.shape[1], x.shape[2], rows, cols, *self.pretrain_map)
        if _len_torch_dispatch_stack() > 0:  # counters see the network in every pass
            return self._position_bias(x, rows, cols)
        key = (x.shape[1:3], rows, cols, self.bias_map, self.pretrain_map)
        bias = self.cache.find(key, weights)
        if bias is None:
            bias = self._position_bias(x, rows, cols)
            self.cache.keep(key, weights, bias)
        return bias

    def _position_bias(self, x: Tensor, rows: int, cols: int) -> Tensor:
        H, W, sides = x.shape[1], x.shape[2], self.bias_map
        if sides is None:
            return self._bias_of(x, H, W, rows, cols)
        of_rows, of_cols = self._regions(sides[0], sides[1])
        bias = self._bias_of(x, sides[0], sides[1], of_rows, of_cols)  # resized over keys, then over queries
        bias = resize(bias.unflatten(2, (of_rows, of_cols)), rows, cols).flatten(2).transpose(1, 2)
        return resize(bias.unflatten(2, sides), H, W).flatten(2).transpose(1, 2)

    def _bias_of(self, x: Tensor, H: int, W: int, rows: int, cols: int) -> Tensor:
        down, row_index = relative_positions(H, rows, x.device)
        right, col_index = relative_positions(W, cols, x.device)
        distances = log_distances(down, right, self.pretrain_map)
        if torch.jit.is_scripting():
            table = self.cpb_fc2(F.relu(self.cpb_fc1(distances.to(x.dtype))))
        else:
            distances = distances.to(torch.promote_types(x.dtype, torch.float32))
            table = project_wide(self.cpb_fc2, F.relu(project_wide(self.cpb_fc1, distances)))
        return spread(table, row_index, col_index)

    def _regions(self, H: int, W: int) -> tuple[int, int]:
        """Rows and columns of the pooled map."""
        return H, W

    def _attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

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
            raise ValueError("the attentions of TransNeXt take no attention mask: got attn_mask or is_causal")
        shape = x.shape
        if x.dim() == 3:
            N = shape[1]
            H = int(N**0.5) if size is None else size[0]
            W = H if size is None else size[1]
            if H * W != N:
                raise ValueError(f"got {N} tokens for a {H}x{W} map; give size=(H, W), without prefix tokens")
            x = x.reshape(shape[0], H, W, shape[2])
        out = self._attend(x)
        if self.gates is not None:
            weights = self.gates(x).to(out.dtype)
            out = (out.unflatten(-1, (self.num_heads, -1)) * weights.unsqueeze(-1)).flatten(-2)
        out = self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)
        return out.reshape(shape)


@register_notrace_module  # pools by the size of its input
class AggregatedAttention(_PositionedAttention):
    """Every token attends to the tokens around it and to a pooled map, in one softmax (TransNeXt, Sec. 3.1 to 3.3).

    To the weights of the tokens around it, a learned query adds weights of its own (query-learnable-value attention).
    With ``shared_heads`` the heads are gated by :class:`MixtureOfHeads` before the last projection (MoH).

    The module replaces the attention of other timm models: ``block.attn = AggregatedAttention(dim, num_heads)``.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        sr_ratio: Side of the tokens' map over that of the pooled one, rounded down, which has one token at least.
        window_size: Side of the window, odd.
        fixed_pool_size: Side of the pooled map, whatever the tokens' map ("linear mode"); None for ``sr_ratio``.
        qkv_bias: Bias of the query, key and value projections.
        pretrain_map: Side, or rows and columns, of the map in the training of the weights, 2 at least: the unit of the
            position bias.
        bias_map: Side, or rows and columns, of the map for which the position bias is made and then resized to the map
            at hand, as in the official detectors; None makes it for the map at hand.
        shared_heads: Heads that every token uses; None for no gate.
        routed_heads: Heads that a token chooses among the others.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(pretrain_map=Range(2))
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 2,
        window_size: int = 3,
        fixed_pool_size: int | None = None,
        qkv_bias: bool = True,
        pretrain_map: int | tuple[int, int] = 14,
        bias_map: int | tuple[int, int] | None = None,
        shared_heads: int | None = None,
        routed_heads: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        need(window_size % 2 == 1, "an odd number", window_size=window_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, pretrain_map, bias_map, shared_heads, routed_heads, **dd)
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.fixed_pool_size = fixed_pool_size
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        taps = window_size**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, taps, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, taps, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, taps, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small tokens and biases, and what both attentions of TransNeXt begin with."""
        super().reset_parameters()
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def extra_repr(self) -> str:
        """Heads, window and pooling for ``print(model)``."""
        pool = (
            f"sr_ratio={self.sr_ratio}" if self.fixed_pool_size is None else f"fixed_pool_size={self.fixed_pool_size}"
        )
        return f"{super().extra_repr()}, window_size={self.window_size}, {pool}"

    def _regions(self, H: int, W: int) -> tuple[int, int]:
        if self.fixed_pool_size is not None:
            return self.fixed_pool_size, self.fixed_pool_size
        return at_least(H // self.sr_ratio, 1), at_least(W // self.sr_ratio, 1)

    def _pooled(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """Tokens ``[B, rows * cols, C]`` of the pooled map."""
        x = x.permute(0, 3, 1, 2)
        x = F.gelu(self.sr(x) if torch.jit.is_scripting() else project(self.sr, x))
        return self.norm(region_mean(x, rows, cols).flatten(2).transpose(1, 2))

    @torch.jit.ignore
    def weights_at(self, x: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
        """The softmax weights of one query of a map ``[B, H, W, C]``, for pictures, without those of the learned query.

        Args:
            x: The map.
            row: Row of the query.
            col: Its column.

        Returns:
            Those of the map ``[B, h, H, W]``, 0 outside the window, and of the pooled map ``[B, h, rows, cols]``.
        """
        rows, cols = self._regions(x.shape[1], x.shape[2])
        with torch.enable_grad():  # the weights of a sum of values are its derivatives by them
            kv, pooled_kv = (self.kv(t).detach().requires_grad_() for t in (x, self._pooled(x, rows, cols)))
            out = reference_aggregated_attention(
                self.q(x),
                kv,
                pooled_kv,
                self.num_heads,
                self.query_embedding,
                self.temperature,
                self.relative_pos_bias_local,
                self.position_bias(x, rows, cols),
                torch.zeros_like(self.learnable_tokens),
                torch.zeros_like(self.learnable_bias),
            )
            first = out[:, row, col].unflatten(-1, (self.num_heads, -1))[..., 0]  # channel of each head
            found = torch.autograd.grad(first.sum(), (kv, pooled_kv))
        near, far = (t.unflatten(-1, (2, self.num_heads, -1))[..., 1, :, 0] for t in found)
        return near.permute(0, 3, 1, 2), far.transpose(1, 2).unflatten(2, (rows, cols))

    def _attend(self, x: Tensor) -> Tensor:
        rows, cols = self._regions(x.shape[1], x.shape[2])
        q = self.q(x) if torch.jit.is_scripting() else project(self.q, x)
        kv = self.kv(x) if torch.jit.is_scripting() else project(self.kv, x)
        pooled = self._pooled(x, rows, cols)
        pooled = self.kv(pooled) if torch.jit.is_scripting() else project(self.kv, pooled)
        bias = self.position_bias(x, rows, cols)
        if self.fused_attn:
            return aggregated_attention(
                q,
                kv,
                pooled,
                self.num_heads,
                self.query_embedding,
                self.temperature,
                self.relative_pos_bias_local,
                bias,
                self.learnable_tokens,
                self.learnable_bias,
            )
        return reference_aggregated_attention(
            q,
            kv,
            pooled,
            self.num_heads,
            self.query_embedding,
            self.temperature,
            self.relative_pos_bias_local,
            bias,
            self.learnable_tokens,
            self.learnable_bias,
        )


@register_notrace_module  # the bias follows the size of its input
class LengthScaledAttention(_PositionedAttention):
    """Softmax attention over the map by cosines, scaled by the logarithm of its size (TransNeXt, Sec. 3.2 and 3.3).

    With ``shared_heads`` the heads are gated by :class:`MixtureOfHeads` before the last projection (MoH).

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads.
        qkv_bias: Bias of the query, key and value projection.
        pretrain_map: Side, or rows and columns, of the map in the training of the weights, 2 at least: the unit of the
            position bias.
        bias_map: Side, or rows and columns, of the map for which the position bias is made and then resized to the map
            at hand, as in the official detectors; None makes it for the map at hand.
        shared_heads: Heads that every token uses; None for no gate.
        routed_heads: Heads that a token chooses among the others.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(pretrain_map=Range(2))
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        pretrain_map: int | tuple[int, int] = 7,
        bias_map: int | tuple[int, int] | None = None,
        shared_heads: int | None = None,
        routed_heads: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, pretrain_map, bias_map, shared_heads, routed_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def weights_at(self, x: Tensor, row: int, col: int) -> Tensor:
        """The softmax weights ``[B, h, H, W]`` of one query of a map ``[B, H, W, C]``, for pictures.

        Args:
            x: The map.
            row: Row of the query.
            col: Its column.

        Returns:
            The weights.
        """
        q, k, _, bias = self._parts(x)
        i = row * x.shape[2] + col
        scores = q[:, :, i : i + 1] @ k.transpose(2, 3) + bias[:, :, i : i + 1]
        return scores.float().softmax(-1).squeeze(2).unflatten(2, x.shape[1:3])

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled queries, unit keys, values ``[B, h, N, d]``, and bias ``[1, h, N, N]`` of a map ``[B, H, W, C]``."""
        B, H, W, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        wide = torch.promote_types(q.dtype, torch.float32)
        length = torch.ones(H * W, dtype=wide, device=x.device).sum().log()
        q = F.normalize(q.to(wide), dim=-1) + self.query_embedding
        q = (q * F.softplus(self.temperature.to(wide)) * length).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        return q, k, v, self.position_bias(x, H, W).to(v.dtype).unsqueeze(0)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v, bias = self._parts(x)
        if not self.fused_attn:
            out = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
            return out.transpose(1, 2).reshape(x.shape)
        return attention(q, k, v, bias, scale=1.0).transpose(1, 2).reshape(x.shape)
