"""Deformable 2x2 stride-2 convolution, version 1, channels-last: the token merging of LITv2 (LITv1, Sec. 3.3).

Tap ``(i, j)`` of output ``(oy, ox)`` samples the map bilinearly at ``(2 oy + i + dy, 2 ox + j + dx)``; neighbours
outside the map are zero, and so is a sample one pixel outside or further, without a gradient of its offset, as in the
official kernel (mmcv's).  Along an axis, with ``f = d - floor(d)``, the two weights are ``1 - f`` and ``f``: at whole
offsets, where training starts, the slope is that towards the next pixel.

The samples of all outputs are a map of ``2 (H // 2) x 2 (W // 2)``, over which the convolution is an ordinary one.
Each sample is a weighted sum of four rows of the token matrix, so all of them are one weighted row gather, in PyTorch
after some thirty small operators on the offsets, in a Triton kernel at once.  With ``M``
output tokens this costs ``32 M C`` FLOPs of sampling and the ``4 M C O`` multiply-accumulates of the convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import differentiable, plain_gradients
from .backend import KernelModule, plain_only, use_triton
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_deform_merge_kernels")


def _neighbours(start: Tensor, d: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Linear weight (0 outside the map) and index (clamped into it) of both neighbours of ``start + d``: ``[..., 2]``.

    The fraction comes from ``d`` alone, so that it is as exact on a large map as on a small one.
    """
    low = d.floor()
    f = d - low
    near = start + low
    far = near + 1
    zero = torch.zeros_like(f)
    # chosen, not multiplied by 0, which would turn infinite offsets into NaN; NaN itself stays
    w_near = torch.where((near < 0) | (near > size - 1), zero, 1 - f)
    rim = (far == 0) & (f == 0)  # exactly one pixel outside: the weight is 0, and the slope too
    w_far = torch.where((far < 0) | (far > size - 1) | rim, zero, f)
    c = torch.stack([near, far], dim=-1)
    return torch.stack([w_near, w_far], dim=-1), c.long().clamp(0, size - 1)  # in this order NaN is a valid index


def _corners(offset: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Row index in a flattened map and bilinear weight of the four corners of every sample.

    Args:
        offset: ``[B, Ho, Wo, 8]``, channel ``2 t`` is ``dy`` and ``2 t + 1`` is ``dx`` of tap ``t``.
        H: Rows of the map.
        W: Columns of the map.

    Returns:
        Index ``[B, 2 Ho, 2 Wo, 4]`` (int64, inside the sample's own map) and weight, same shape, float32 or float64.
    """
    B, Ho, Wo = offset.shape[0], offset.shape[1], offset.shape[2]
    dtype = torch.float64 if offset.dtype == torch.float64 else torch.float32  # half precision cannot hold coordinates
    d = offset.to(dtype).reshape(B, Ho, Wo, 2, 2, 2).permute(0, 1, 3, 2, 4, 5)  # [B, Ho, i, Wo, j, (dy, dx)]
    d = d.reshape(B, 2 * Ho, 2 * Wo, 2)
    rows = torch.arange(2 * Ho, device=offset.device, dtype=dtype).unsqueeze(1)
    cols = torch.arange(2 * Wo, device=offset.device, dtype=dtype)
    wy, cy = _neighbours(rows, d[..., 0], H)  # [B, 2 Ho, 2 Wo, 2]
    wx, cx = _neighbours(cols, d[..., 1], W)
    index = cy.unsqueeze(-1) * W + cx.unsqueeze(-2)  # [B, 2 Ho, 2 Wo, 2 (y), 2 (x)]
    weight = wy.unsqueeze(-1) * wx.unsqueeze(-2)
    return index.flatten(3), weight.flatten(3)


def _check(x: Tensor, offset: Tensor) -> None:
    if offset.shape[1] != x.shape[1] // 2 or offset.shape[2] != x.shape[2] // 2 or offset.shape[3] != 8:
        raise ValueError(
            f"got offset {list(offset.shape)} for a {x.shape[1]}x{x.shape[2]} map, "
            f"need [B, {x.shape[1] // 2}, {x.shape[2] // 2}, 8]"
        )


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape[1] != x.shape[3] or weight.shape[2] != 2 or weight.shape[3] != 2:
        raise ValueError(f"got weight {list(weight.shape)} for {x.shape[3]} channels, need [O, {x.shape[3]}, 2, 2]")


def _gather_form(x: Tensor, offset: Tensor) -> Tensor:
    B, H, W, C = x.shape
    index, corner = _corners(offset, H, W)
    rows, cols = index.shape[1], index.shape[2]
    taps = torch.gather(x.reshape(B, H * W, C), 1, index.reshape(B, rows * cols * 4, 1).expand(-1, -1, C))
    taps = taps.reshape(B, rows, cols, 4, C)
    return (taps * corner.unsqueeze(-1).to(x.dtype)).sum(dim=3)


def reference_deform_sample(x: Tensor, offset: Tensor) -> Tensor:
    """The samples over which a deformable 2x2 stride-2 convolution is an ordinary one, by one gather of all corners.

    Args:
        x: Map ``[B, H, W, C]``.
        offset: Sampling offsets in pixels ``[B, H // 2, W // 2, 8]``; ``dy`` before ``dx``, taps row-major.

    Returns:
        ``[B, 2 * (H // 2), 2 * (W // 2), C]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shape of ``offset`` does not fit ``x``.
    """
    _check(x, offset)
    return _gather_form(x, offset)


def _rows_form(x: Tensor, offset: Tensor) -> Tensor:
    """One weighted row gather over the tokens of all images, which has no second derivative."""
    B, H, W, C = x.shape
    index, corner = _corners(offset, H, W)
    first = torch.arange(B, device=x.device).mul(H * W).reshape(B, 1, 1, 1)
    taps = F.embedding_bag(
        (index + first).reshape(-1, 4),
        x.reshape(B * H * W, C),
        mode="sum",
        per_sample_weights=corner.reshape(-1, 4).to(x.dtype),
    )
    return taps.reshape(B, index.shape[1], index.shape[2], C)


@operator
def _deform_sample(x: Tensor, offset: Tensor) -> Tensor:
    return kernels.kernel_forward(x, offset)


@torch.library.register_fake("vizoo::deform_sample")
def _(x, offset):
    return x.new_empty(x.shape[0], 2 * offset.shape[1], 2 * offset.shape[2], x.shape[3])


@operator
def _deform_sample_backward(dout: Tensor, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.kernel_backward(dout, x, offset)


@torch.library.register_fake("vizoo::deform_sample_backward")
def _(dout, x, offset):
    return x.new_empty(x.shape), offset.new_empty(offset.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout):
    if torch.is_grad_enabled():
        return tuple(plain_gradients(_gather_form, ctx.saved_tensors, dout, ctx.needs_input_grad))
    return _deform_sample_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("vizoo::deform_sample", _differentiate, setup_context=_save)


@register_cost("vizoo::deform_sample", torch.ops.vizoo.deform_sample)
def _(x, offset, out=None) -> Cost:
    return Cost(other=8 * math.prod(out), acts=0)


@register_cost("vizoo::deform_sample_backward", torch.ops.vizoo.deform_sample_backward)
def _(dout, x, offset, out=None) -> Cost:
    return Cost(other=24 * math.prod(dout), acts=0)


def _kernel_limits(x: Tensor) -> str:
    """What the Triton kernels cannot do with a map in the dtype of ``x``; empty if nothing."""
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return ""
    return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"


def deform_sample(x: Tensor, offset: Tensor, backend: str = "auto") -> Tensor:
    """:func:`reference_deform_sample` with one weighted row gather: same result and errors.

    Args:
        x: Map ``[B, H, W, C]``.
        offset: Sampling offsets in pixels ``[B, H // 2, W // 2, 8]``; ``dy`` before ``dx``, taps row-major.
        backend: ``"torch"``, ``"triton"`` (no float64), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, 2 * (H // 2), 2 * (W // 2), C]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shape of ``offset`` does not fit ``x``, or ``backend`` cannot run.
    """
    _check(x, offset)
    if not torch.jit.is_scripting():
        if use_triton(backend, x, _kernel_limits(x)):
            return _deform_sample(x, offset)
        if plain_only():
            return _gather_form(x, offset)
        return differentiable(_rows_form, _gather_form, x, offset)
    return _rows_form(x, offset)


def _convolve(samples: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(samples.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)


def reference_deform_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Deformable 2x2 stride-2 convolution: :func:`reference_deform_sample` and a convolution.

    Args:
        x: Map ``[B, H, W, C]``.
        offset: Sampling offsets in pixels ``[B, H // 2, W // 2, 8]``; ``dy`` before ``dx``, taps row-major.
        weight: ``[O, C, 2, 2]``.
        bias: ``[O]`` or None.

    Returns:
        ``[B, H // 2, W // 2, O]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shapes of ``offset`` or ``weight`` do not fit ``x``.
    """
    _check_weight(x, weight)
    return _convolve(reference_deform_sample(x, offset), weight, bias)


def deform_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`reference_deform_merge` by :func:`deform_sample`: same arguments, result and errors."""
    _check_weight(x, weight)
    return _convolve(deform_sample(x, offset), weight, bias)
