"""Global response norm in training: every channel is scaled by its norm over the map, relative to all channels' mean.

    n[c] = sqrt(sum over y, x of in[c, y, x]^2)    r[c] = n[c] / (mean over channels of n + 1e-6)
    out[c] = (gamma[c] * r[c] + 1) * in[c] + beta[c]

Nothing is multiplied but map by channel, so that the bytes count.  The gradient needs, of each image, one sum of
``dout * in`` for each channel, and is then ``factor * dout + slope * in``: two passes, image by image, so that the
second finds the map in the cache.  PyTorch's own operators take nine.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import empty_map
from .backend import trains_by_onednn
from .cost import Cost, register_cost
from .operators import operator

EPS = 1e-6


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
    return torch.addcmul(beta, x, _factor(gamma, norm))


def _factor(gamma: Tensor, norm: Tensor) -> Tensor:
    return gamma * (norm / (norm.mean(dim=1, keepdim=True) + EPS)) + 1


@operator
def _response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Output and norms ``[B, C, 1, 1]``."""
    out, norm = empty_map(x), x.new_empty((*x.shape[:2], 1, 1))
    for image, found, to in zip(x.split(1), norm.split(1), out.split(1), strict=True):
        torch.sum(torch.mul(image, image, out=to), dim=(2, 3), keepdim=True, out=found)
        torch.addcmul(beta, image, _factor(gamma, found.sqrt_()), out=to)
    return out, norm


@torch.library.register_fake("vizoo::response_norm")
def _(x, gamma, beta):
    return empty_map(x), x.new_empty((*x.shape[:2], 1, 1))


@operator
def _response_norm_backward(dout: Tensor, x: Tensor, gamma: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = empty_map(x), torch.empty_like(norm)
    total = norm.mean(dim=1, keepdim=True) + EPS
    factor = _factor(gamma, norm)
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
