"""Global response norm in training: every channel is scaled by its norm over the map, relative to all channels' mean.

    n[c] = sqrt(sum over y, x of in[c, y, x]^2)    r[c] = n[c] / (mean over channels of n + 1e-6)
    out[c] = (gamma[c] * r[c] + 1) * in[c] + beta[c]

Nothing is multiplied but map by channel, so that the bytes count.  The gradient needs, of each image, one sum of
``dout * in`` for each channel, and is then ``factor * dout + slope * in``: two passes, image by image, so that the
second finds the map in the cache.  PyTorch's own operators take nine.

In compiled inference the feed-forward network around it, ``fc2(norm(h + dwconv(h)))`` with ``h = gelu(fc1(x))``, is one
operator too, which works on a few images at a time, so that the hidden map stays in the cache.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import empty_map
from .backend import fuses_gelu, trains_by_onednn
from .cost import Cost, register_cost
from .operators import operator

_CHUNK_BYTES = 6 << 20  # largest hidden map worked on at once, as in conv_ffn


def reference_response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Global response norm with its residual, whose gradient at a channel of zeros is that of the residual.

    Args:
        x: Map ``[B, C, H, W]``.
        gamma: ``[1, C, 1, 1]``.
        beta: ``[1, C, 1, 1]``.

    Returns:
        ``[B, C, H, W]``.
    """
    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return torch.addcmul(beta, x, response_factor(gamma, norm))


def response_factor(gamma: Tensor, norm: Tensor) -> Tensor:
    """What a map is multiplied by, from its norms, both ``[B, C, 1, 1]``."""
    return gamma * (norm / _mean_norm(norm)) + 1


def _mean_norm(norm: Tensor) -> Tensor:
    return norm.mean(dim=1, keepdim=True) + 1e-6


def _by_image(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Output and norms ``[B, C, 1, 1]``."""
    out, norm = empty_map(x), x.new_empty((*x.shape[:2], 1, 1))
    for image, found, to in zip(x.split(1), norm.split(1), out.split(1), strict=True):
        torch.sum(torch.mul(image, image, out=to), dim=(2, 3), keepdim=True, out=found)
        torch.addcmul(beta, image, response_factor(gamma, found.sqrt_()), out=to)
    return out, norm


@operator
def _response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return _by_image(x, gamma, beta)


@torch.library.register_fake("vizoo::response_norm")
def _(x, gamma, beta):
    return empty_map(x), x.new_empty((*x.shape[:2], 1, 1))


@operator
def _response_norm_backward(dout: Tensor, x: Tensor, gamma: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = empty_map(x), torch.empty_like(norm)
    total, factor = _mean_norm(norm), response_factor(gamma, norm)
    for b in range(x.shape[0]):
        dimage, image, to, n, m = (t[b : b + 1] for t in (dout, x, dx, norm, total))
        torch.sum(torch.mul(dimage, image, out=to), dim=(2, 3), keepdim=True, out=sums[b : b + 1])
        dratio = sums[b : b + 1] * gamma / m
        dnorm = dratio - (dratio * n).mean(dim=1, keepdim=True) / m
        slope = torch.where(n > 0, dnorm / n, 0)
        torch.mul(dimage, factor[b : b + 1], out=to).addcmul_(image, slope)
    return dx, (sums * (norm / total)).sum(0, keepdim=True), dout.sum((0, 2, 3)).reshape(gamma.shape)


@torch.library.register_fake("vizoo::response_norm_backward")
def _(dout, x, gamma, norm):
    return empty_map(x), torch.empty_like(gamma), torch.empty_like(gamma)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _):
    *tensors, norm = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return tuple(plain_gradients(reference_response_norm, tensors, dout, ctx.needs_input_grad))
    return _response_norm_backward(dout, *tensors[:2], norm)


torch.library.register_autograd("vizoo::response_norm", _differentiate, setup_context=_save)


@register_cost("vizoo::response_norm", torch.ops.vizoo.response_norm)
def _(x, gamma, beta, out=None) -> Cost:
    return Cost(other=4 * prod(x), acts=0)


@register_cost("vizoo::response_norm_backward", torch.ops.vizoo.response_norm_backward)
def _(dout, x, gamma, norm, out=None) -> Cost:
    return Cost(other=6 * prod(x), acts=0)


def trains_response_norm(x: Tensor, gamma: Tensor) -> bool:
    """Whether :func:`response_norm` may take this call: eager training in float32 on a CPU."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which makes few passes of the plain operators itself
        and type(x) is Tensor
        and gamma.dtype == x.dtype
        and x.dim() == 4
        and trains_by_onednn(x)
    )


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """:func:`reference_response_norm` in few passes over the map, forward and backward, image by image.

    Args:
        x: Map ``[B, C, H, W]``.
        gamma: ``[1, C, 1, 1]``.
        beta: ``[1, C, 1, 1]``.

    Returns:
        ``[B, C, H, W]``, in the memory format of ``x``.
    """
    return _response_norm(x, gamma, beta)[0]


def reference_response_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor | None,
) -> Tensor:
    """Linear, GELU, depthwise convolution that keeps the map's size, global response norm, Linear.

    Args:
        x: Map ``[B, H, W, C]``.
        w1: First linear weight ``[M, C]``.
        b1: ``[M]`` or None.
        wd: Depthwise weight ``[M, 1, K, K]``, odd ``K``, with its residual.
        bd: ``[M]`` or None.
        gamma: Of the norm ``[1, M, 1, 1]``.
        beta: Of the norm ``[1, M, 1, 1]``.
        w2: Second linear weight ``[O, M]``.
        b2: ``[O]`` or None.

    Returns:
        ``[B, H, W, O]``.
    """
    t = F.gelu(F.linear(x, w1, b1)).permute(0, 3, 1, 2)
    t = reference_response_norm(F.conv2d(t, wd, bd, padding=wd.shape[2] // 2, groups=wd.shape[0]), gamma, beta)
    return F.linear(t.permute(0, 2, 3, 1), w2, b2)


@operator
def _response_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor | None,
) -> Tensor:
    """:func:`reference_response_ffn` for a call that ``use_compiled_onednn`` has found to fit."""
    if x.numel() == 0:
        return reference_response_ffn(x, w1, b1, wd, bd, gamma, beta, w2, b2)
    ops, hidden, half = torch.ops.mkldnn, wd.shape[0], wd.shape[2] // 2
    gelu: Any = ("gelu", [], "none") if fuses_gelu(x) else ("none", [], "")
    out = []
    for chunk in x.split(max(1, _CHUNK_BYTES // (x.shape[1] * x.shape[2] * hidden * x.element_size()))):
        t = ops._linear_pointwise(chunk, w1, b1, *gelu)
        t = (t if gelu[0] == "gelu" else torch.ops.aten.gelu_(t)).permute(0, 3, 1, 2)
        t = ops._convolution_pointwise(t, wd, bd, [half] * 2, [1, 1], [1, 1], hidden, "none", [], "")
        out.append(ops._linear_pointwise(_by_image(t, gamma, beta)[0].permute(0, 2, 3, 1), w2, b2, "none", [], ""))
    return out[0] if len(out) == 1 else torch.cat(out)


response_ffn = torch.ops.vizoo.response_ffn


@torch.library.register_fake("vizoo::response_ffn")
def _(x, w1, b1, wd, bd, gamma, beta, w2, b2):
    return x.new_empty((*x.shape[:-1], w2.shape[0]))


@register_cost("vizoo::response_ffn", torch.ops.vizoo.response_ffn)
def _(x, w1, b1, wd, bd, gamma, beta, w2, b2, out=None) -> Cost:
    tokens, hidden = prod(x[:-1]), wd[0]
    biases = hidden * ((b1 is not None) + (bd is not None)) + w2[0] * (b2 is not None)
    return Cost(
        macs=tokens * (prod(w1) + prod(wd) + prod(w2)),
        other=tokens * (12 * hidden + biases),  # GELU, norm, biases
        acts=tokens * (2 * hidden + w2[0]),
    )
