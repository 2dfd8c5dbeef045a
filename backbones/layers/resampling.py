"""Resizing of maps that exports at any size and, where PyTorch is asked for it, adds up in a fixed order on a GPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import (
    is_exporting,
    register_notrace_function,
    register_notrace_module,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
)
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops.backend import without_autocast

__all__ = ["RegionPool", "position_map", "region_mean", "resize", "resize_smoothly"]


def _fixed_order(x: Tensor) -> bool:
    """Whether ``torch.use_deterministic_algorithms`` forbids the gradients of PyTorch's resizing, which use atomics."""
    return x.device.type != "cpu" and torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()


def _region_weights(x: Tensor, axis: int, regions: int) -> Tensor:
    """Weights ``[regions, L]`` of adaptive average pooling along an axis of length ``L``."""
    L, region = x.shape[axis], torch.arange(regions, device=x.device).unsqueeze(1)
    position = torch.arange(L, device=x.device)
    first, last = region * L // regions, ((region + 1) * L + regions - 1) // regions
    inside = (position >= first) & (position < last)
    return (inside / (last - first)).to(x.dtype)


@register_notrace_function
def region_mean(x: Tensor, rows: int, cols: int) -> Tensor:
    """Adaptive average pooling of a map ``[B, C, H, W]`` to ``[B, C, rows, cols]``."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        # PyTorch's own does not export to ONNX for any size
        if isinstance(x.shape[2], torch.SymInt) or isinstance(x.shape[3], torch.SymInt) or _fixed_order(x):
            return _region_weights(x, 2, rows) @ x @ _region_weights(x, 3, cols).t()
    return F.adaptive_avg_pool2d(x, (rows, cols))


@register_notrace_module  # picks its form by its input
class RegionPool(nn.AdaptiveAvgPool2d):
    """:func:`region_mean` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C, *output_size]``."""
        if torch.jit.is_scripting():
            return F.adaptive_avg_pool2d(x, self.output_size)
        return region_mean(x, *to_2tuple(self.output_size))


@register_notrace_function
def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing of a map in its own dtype: autocast gives float32, which spreads to all that reads the map."""
    return F.interpolate(x, size=[height, width], mode="bilinear", align_corners=False).to(x.dtype)


@register_notrace_function
def resize_smoothly(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing of a map in float32 or float64, with antialiasing where it becomes smaller."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if _fixed_order(x):
            return _by_matrices(_smooth, x, height, width)
    return _smooth(x, height, width)


def _smooth(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=[height, width], mode="bilinear", align_corners=False, antialias=True)


def _by_matrices(form: Callable[[Tensor, int, int], Tensor], x: Tensor, height: int, width: int) -> Tensor:
    """Separable resizing by its two matrices, which are what it makes of unit vectors."""
    H, W = x.shape[2], x.shape[3]
    eye = torch.eye(max(H, W), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        rows, cols = form(eye[None, None, :H, :H], height, H), form(eye[None, None, :W, :W], W, width)
    with without_autocast(x):
        return rows @ x @ cols


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    return resample_abs_pos_embed_nhwc(x.permute(0, 2, 3, 1), [height, width]).permute(0, 3, 1, 2)


@register_notrace_function
def position_map(pos_embed: Tensor, H: int, W: int) -> Tensor:
    """Position embedding ``[1, h, w, C]`` at ``H x W`` tokens, by timm's bicubic resampling."""
    if torch.jit.is_scripting() or not is_exporting():
        same = pos_embed.shape[1] == H and pos_embed.shape[2] == W
    else:  # a size that is free in the exported program is resampled to, which changes nothing at the table's own
        same = statically_known_true(pos_embed.shape[1] == H) and statically_known_true(pos_embed.shape[2] == W)
    if same:
        return pos_embed
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if _fixed_order(pos_embed):
            wide = pos_embed.permute(0, 3, 1, 2).float()
            return _by_matrices(_bicubic, wide, H, W).permute(0, 2, 3, 1).to(pos_embed.dtype)
    return resample_abs_pos_embed_nhwc(pos_embed, [H, W])
