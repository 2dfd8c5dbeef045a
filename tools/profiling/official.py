"""Official code of the families, or timm's models of the same definition, as the other side of a benchmark.

Nothing of the official code is part of this package.  An adapter puts the folder on the import path for the time of
the import and replaces compiled extensions that no longer build by the torchvision operator of the same definition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.tools.common import UserError


@contextlib.contextmanager
def _importing(folder: Path, stubs: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Make the modules of ``folder`` importable; forget them afterwards, so that two checkouts never mix."""
    before = dict(sys.modules)
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old import paths of timm
            yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update({name: before[name] for name in stubs if name in before})
        for name in list(sys.modules):
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if name not in before and (name in stubs or origin.startswith(str(folder))):
                del sys.modules[name]


class _DeformConv2dPack(nn.Module):
    """The official compiled layer's parameters around torchvision's operator."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, **_: Any):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride)
        self.weight, self.bias, self.stride = conv.weight, conv.bias, stride
        self.conv_offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, stride=self.stride)


def _litv2(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    stub = "mm_modules.DCN.modules.deform_conv2d"
    parents: dict[str, dict[str, Any]] = {"mm_modules": {}, "mm_modules.DCN": {}, "mm_modules.DCN.modules": {}}
    with _importing(checkout / "classification", {**parents, stub: {"DeformConv2dPack": _DeformConv2dPack}}):
        from models.litv2 import LITv2  # type: ignore[import-not-found]
    if reparam:
        raise UserError(f"--reparam: {name!r} has no branches to merge")
    base = name.startswith("litv2_b")
    alphas = {"00": 0.0, "02": 0.2, "04": 0.4, "05": 0.5, "07": 0.7, "10": 1.0}
    return LITv2(
        img_size=size,
        embed_dim=128 if base else 96,
        depths=[2, 2, 6, 2] if name.startswith("litv2_s") else [2, 2, 18, 2],
        num_heads=[4, 8, 16, 32] if base else [3, 6, 12, 24],
        alpha=alphas[name[-2:]] if "alpha" in name else 0.9,
        local_ws=[0, 0, 2, 1],
    )


def _na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """The operator of NATTEN 0.17 that later releases dropped, by one gather, as the official code runs without it."""
    import torch

    B, G, H, W, _ = attn.shape
    rows, cols = (
        (torch.arange(n, device=value.device) - kernel_size // 2).clamp(0, n - kernel_size)[:, None]
        + torch.arange(kernel_size, device=value.device)
        for n in (H, W)
    )
    windows = value[:, :, rows[:, None, :, None], cols[None, :, None, :]]  # [B, G, H, W, K, K, C]
    return (attn.unsqueeze(-2).to(value.dtype) @ windows.flatten(4, 5)).squeeze(-2)


def _overlock(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    def untouched(function: Any) -> Any:
        return function

    stubs: dict[str, dict[str, Any]] = {
        "natten": {},
        "natten.functional": {"na2d_av": _na2d_av},
        "mmengine": {},
        "mmengine.runner": {"load_checkpoint": None},
        "timm.models.registry": {"register_model": untouched},
    }
    with _importing(checkout, stubs), contextlib.redirect_stdout(io.StringIO()):
        from models import overlock  # type: ignore[import-not-found]

        return getattr(overlock, name)(deploy=reparam, use_ds=False)


class _NeighborhoodAttention2D(nn.Module):
    """The module of NATTEN 0.14, whose bias and CPU kernels later releases dropped, by one gather of all windows."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int | None, qkv_bias: bool, **_: Any):
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation or 1
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def window(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and rows of the bias for each position of an axis, both ``[size, kernel_size]``."""
        K, D = self.kernel_size, self.dilation
        i = torch.arange(size, device=device)
        t, r = i // D, i % D
        start = torch.minimum((t - K // 2).clamp(min=0), (size - r + D - 1) // D - K)
        j = start[:, None] + torch.arange(K, device=device)
        return j * D + r[:, None], j - t[:, None] + K - 1

    def forward(self, x: Tensor) -> Tensor:
        B, H0, W0, C = x.shape
        h, K, least = self.num_heads, self.kernel_size, self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - W0), 0, max(0, least - H0)))
        H, W = x.shape[1:3]
        q, k, v = self.qkv(x).reshape(B, H * W, 3, h, C // h).permute(2, 0, 3, 1, 4)
        (rows, bias_rows), (cols, bias_cols) = self.window(H, x.device), self.window(W, x.device)
        index = (rows[:, None, :, None] * W + cols[None, :, None, :]).reshape(H * W, K * K)
        bias = self.rpb[:, bias_rows[:, None, :, None], bias_cols[None, :, None, :]].reshape(h, H * W, 1, K * K)
        attn = (q * (C // h) ** -0.5).unsqueeze(3) @ k[:, :, index].transpose(3, 4) + bias
        out = (attn.softmax(-1) @ v[:, :, index]).squeeze(3).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(out[:, :H0, :W0])


def _nat(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    if reparam:
        raise UserError(f"--reparam: {name!r} has no branches to merge")

    def untouched(function: Any) -> Any:
        return function

    stubs: dict[str, dict[str, Any]] = {
        "natten": {"NeighborhoodAttention2D": _NeighborhoodAttention2D},
        "timm.models.registry": {"register_model": untouched},
    }
    flat = "isotropic" in name or name.startswith("vitrpb")
    file = "isotropic" if flat else "dinats" if name.startswith("dinat_s_") else name.split("_")[0]
    with _importing(checkout / "classification", stubs):
        model = getattr(importlib.import_module(file), name)()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # the constructor sets the rate of the recipe, ours is 0
    return model


_MODELS = {
    "litv2": ("classification/models/litv2.py", _litv2),
    "overlock": ("models/overlock.py", _overlock),
    **dict.fromkeys(("nat", "dinat", "vitrpb"), ("classification/nat.py", _nat)),
}


def _require(checkout: Path, file: str) -> None:
    if not (checkout / file).is_file():
        raise UserError(f"--official {str(checkout)!r}: no {file} there; give a checkout of the official code")


def official_model(checkout: Path, name: str, size: int, reparam: bool = False) -> nn.Module:
    """The official model of one of our names, with weights as its constructor draws them.

    Args:
        checkout: Folder of the official repository.
        name: Our name without tag.
        size: Side of the square input in pixels.
        reparam: Its merged form.

    Returns:
        The model.

    Raises:
        UserError: If the folder is not that repository, or the family has no official code.
    """
    family = name.split("_")[0]
    if family not in _MODELS or name.startswith("test_"):
        raise UserError(f"--official: no official code is known for {name!r}; known families: {', '.join(_MODELS)}")
    file, build = _MODELS[family]
    _require(checkout, file)
    return build(checkout, name, size, reparam)


def official_hilo(checkout: Path, **arguments: Any) -> nn.Module:
    """The official stand-alone HiLo layer, called as ``layer(tokens, H, W)``.

    Args:
        checkout: Folder of the official repository.
        **arguments: ``dim, num_heads, qkv_bias, window_size, alpha``.

    Returns:
        The layer.

    Raises:
        UserError: If the folder is not that repository.
    """
    _require(checkout, "hilo.py")
    with _importing(checkout, {}):
        from hilo import HiLo  # type: ignore[import-not-found]
    layer: nn.Module = HiLo(**arguments)
    return layer


class _Subspace(nn.Module):
    """Attention of one subspace in the official order, with the official names."""

    def __init__(self, dim: int, bn_momentum: float):
        super().__init__()
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=bn_momentum)
        self.conv_point = nn.Conv2d(dim, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=bn_momentum)

    def attention(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, stride=1, padding=1)
        out = F.relu(self.bn_point(self.conv_point(out)))
        return F.softmax(out.flatten(2), dim=2).reshape(out.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).expand(x.shape) * x + x


class ULSAMLoop(nn.Module):
    """ULSAM as the official code runs it, one small network after the other, with the official names.

    Written from the description of each step, since the official repository has no licence.

    Args:
        dim: Channels, a multiple of ``num_splits``.
        num_splits: Subspaces.
        bn_momentum: Momentum of the norms.
    """

    def __init__(self, dim: int, num_splits: int = 4, bn_momentum: float = 0.9):
        super().__init__()
        self.subspaces = nn.ModuleList(_Subspace(dim // num_splits, bn_momentum) for _ in range(num_splits))

    def attention(self, x: Tensor) -> Tensor:
        """Maps ``[B, num_splits, H, W]`` of ``x`` ``[B, dim, H, W]``."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([s.attention(p) for s, p in zip(self.subspaces, parts, strict=True)], dim=1)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([s(p) for s, p in zip(self.subspaces, parts, strict=True)], dim=1)


TIMM = {
    "halo_26t": "halonet26t",
    "halo_se33ts": "sehalonet33ts",
    "halo_50ts": "halonet50ts",
    "halo_eca26ts": "eca_halonext26ts",
    "halo_regnetz_b": "haloregnetz_b",
    "halo_h1": "halonet_h1",
}


def timm_model(name: str) -> nn.Module | None:
    """The model of timm with the state dict of one of ours.

    Args:
        name: Our name without tag.

    Returns:
        The model; None if timm has none.
    """
    import timm
    from timm.models.byoanet import model_cfgs

    if name not in TIMM:
        return None
    if name != "halo_h1":
        return timm.create_model(TIMM[name])
    cfg: Any = model_cfgs["halonet_h1"]  # 8 heads in every stage; the paper has 4 in the first
    attention = {**cfg.self_attn_kwargs, "num_heads": 4}
    first = dataclasses.replace(cfg.blocks[0], self_attn_layer="halo", self_attn_kwargs=attention)
    return timm.create_model(TIMM[name], blocks=(first, *cfg.blocks[1:]))
