"""HiLo attention as a module (LITv2, Sec. 3.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, register_notrace_module, use_fused_attn
from torch import Tensor, nn

from ..ops.hilo import hifi_attention, lofi_attention, reference_hifi_attention, reference_lofi_attention
from .checks import COUNT, check_multiple, checked
from .plain import project

__all__ = ["HiLo"]


@register_notrace_module  # pads by the size of its input
class HiLo(nn.Module):
    """High-frequency heads attend inside windows, low-frequency heads to the average of every window.

    ``int(num_heads * alpha)`` heads are low-frequency (Lo-Fi), the others high-frequency (Hi-Fi); the output is
    ``[Hi-Fi, Lo-Fi]`` along the channels.  ``alpha=0`` leaves windows only, ``alpha=1`` pooled attention only, and a
    window of 1 is plain multi-head attention.  Maps that are no multiple of the window are zero-padded at the bottom
    and right without a mask, as the released dense models were trained.

    The module replaces the attention of other timm models: ``block.attn = HiLo(dim, num_heads)``.

    Args:
        dim: Channels, a multiple of ``num_heads``.
        num_heads: Heads of both kinds together.
        qkv_bias: Bias of the query, key and value projections.
        window_size: Side of the windows and of the pooling, at least 1.
        alpha: Share of low-frequency heads, 0 to 1.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fused_attn: torch.jit.Final[bool]
    has_lofi: torch.jit.Final[bool]
    has_hifi: torch.jit.Final[bool]

    @checked(window_size=COUNT)
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        window_size: int = 2,
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.dim = dim
        self.window_size = window_size
        self.fused_attn = use_fused_attn()
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        l_dim, h_dim = self.l_heads * head_dim, self.h_heads * head_dim
        self.has_lofi, self.has_hifi = self.l_heads > 0, self.h_heads > 0
        if self.has_lofi:
            self.l_q = nn.Linear(dim, l_dim, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * l_dim, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(l_dim, l_dim, **dd)
        if self.has_hifi:
            self.h_qkv = nn.Linear(dim, 3 * h_dim, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(h_dim, h_dim, **dd)

    def extra_repr(self) -> str:
        """Head split and window for ``print(model)``."""
        return f"h_heads={self.h_heads}, l_heads={self.l_heads}, window_size={self.window_size}"

    def parts(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """An output ``[..., dim]`` of the module as that of the Hi-Fi heads and that of the Lo-Fi heads."""
        high = self.dim // (self.h_heads + self.l_heads) * self.h_heads
        return out[..., :high], out[..., high:]

    def _hifi(self, x: Tensor) -> Tensor:
        qkv = self.h_qkv(x) if torch.jit.is_scripting() else project(self.h_qkv, x)
        if self.fused_attn:
            out = hifi_attention(qkv, self.h_heads, self.window_size)
        else:
            out = reference_hifi_attention(qkv, self.h_heads, self.window_size)
        return self.h_proj(out) if torch.jit.is_scripting() else project(self.h_proj, out)

    def _lofi(self, x: Tensor) -> Tensor:
        pooled = x
        if self.window_size > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        q = self.l_q(x) if torch.jit.is_scripting() else project(self.l_q, x)
        kv = self.l_kv(pooled) if torch.jit.is_scripting() else project(self.l_kv, pooled)
        out = lofi_attention(q, kv, self.l_heads) if self.fused_attn else reference_lofi_attention(q, kv, self.l_heads)
        return self.l_proj(out) if torch.jit.is_scripting() else project(self.l_proj, out)

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
            raise ValueError("HiLo takes no attention mask: got attn_mask or is_causal")
        shape = x.shape
        if x.dim() == 3:
            N = shape[1]
            H = int(N**0.5) if size is None else size[0]
            W = H if size is None else size[1]
            if H * W != N:
                raise ValueError(f"got {N} tokens for a {H}x{W} map; give size=(H, W), without prefix tokens")
            x = x.reshape(shape[0], H, W, shape[2])
        H, W, s = x.shape[1], x.shape[2], self.window_size
        pad_h, pad_w = (s - H % s) % s, (s - W % s) % s
        padded = is_exporting() or pad_h > 0 or pad_w > 0  # exported graphs keep height and width free
        if padded:
            x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h])
        if self.has_hifi:
            out = self._hifi(x)
            if self.has_lofi:
                out = torch.cat([out, self._lofi(x)], dim=-1)
        else:
            out = self._lofi(x)
        if padded:
            out = out[:, :H, :W].contiguous()
        return out.reshape(shape)
