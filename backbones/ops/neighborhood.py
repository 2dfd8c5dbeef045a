"""Temporary stand-in: the operator is built on another branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _window(L: int, K: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(L, device=device)
    g, r = torch.div(i, d, rounding_mode="floor"), i % d
    n = torch.div(L - r + d - 1, d, rounding_mode="floor")
    s = torch.minimum(torch.clamp(g - K // 2, min=0), n - K)
    j = s.unsqueeze(1) + torch.arange(K, device=device)
    return j * d + r.unsqueeze(1), j - g.unsqueeze(1) + K - 1


def reference_neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
) -> Tensor:
    B, H, W, h, d = q.shape
    K = kernel_size
    ph, pw = max(K * dilation - H, 0), max(K * dilation - W, 0)
    if ph > 0 or pw > 0:
        Hp, Wp = H + ph, W + pw
        kp = torch.zeros(h, d, dtype=k.dtype, device=k.device) if pad_k is None else pad_k
        vp = torch.zeros(h, v.shape[4], dtype=v.dtype, device=v.device) if pad_v is None else pad_v
        inside = F.pad(torch.ones(H, W, dtype=torch.bool, device=q.device), [0, pw, 0, ph]).reshape(1, Hp, Wp, 1, 1)
        q = F.pad(q, [0, 0, 0, 0, 0, pw, 0, ph])
        k = torch.where(inside, F.pad(k, [0, 0, 0, 0, 0, pw, 0, ph]), kp)
        v = torch.where(inside, F.pad(v, [0, 0, 0, 0, 0, pw, 0, ph]), vp)
    else:
        Hp, Wp = H, W
    rows, bi = _window(Hp, K, dilation, q.device)
    cols, bj = _window(Wp, K, dilation, q.device)
    idx = (rows.reshape(Hp, 1, K, 1) * Wp + cols.reshape(1, Wp, 1, K)).reshape(-1)
    s = d**-0.5 if scale is None else scale
    kk = k.reshape(B, Hp * Wp, h, d).index_select(1, idx).reshape(B, Hp, Wp, K * K, h, d)
    vv = v.reshape(B, Hp * Wp, h, v.shape[4]).index_select(1, idx).reshape(B, Hp, Wp, K * K, h, v.shape[4])
    a = torch.einsum("bywhd,bywnhd->bywhn", q * s, kk)
    if rpb is not None:
        bias = rpb[:, bi.reshape(Hp, 1, K, 1), bj.reshape(1, Wp, 1, K)].reshape(h, Hp, Wp, K * K)
        a = a + bias.permute(1, 2, 0, 3)
    out = torch.einsum("bywhn,bywnhe->bywhe", a.softmax(-1), vv)
    return out[:, :H, :W]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    return reference_neighborhood_attention(q, k, v, kernel_size, stride, dilation, rpb, scale, pad_k, pad_v)
