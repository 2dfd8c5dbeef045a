"""Subspace attention (ULSAM, Sec. 3): its logits, one number per position and group of channels, and what they do.

    logits[n] = bias[n] + sum over channels c of group n of weight[c] * max over 3x3 of relu(scale[c] * x[c] + shift[c])

Positions outside the map count as 0.  With ``N = H * W`` positions and ``C`` channels the affine map and the sum cost
``C N`` multiply-accumulates each.  The attention of a group is the softmax of its logits, after their norm and a ReLU,
over all positions: ``out = x + attention * x``.

The reference writes the activated and the pooled map, and its backward pass keeps an eight-byte index per element.  For
inference on a CPU the fast form takes the maximum of three neighbours along rows, then along columns, as contiguous
vector operations over a zero-framed buffer that stays in the cache.  The Triton kernels store the logits and, for the
backward pass, one byte per element: which of the nine neighbours was the largest.  The gradient is gathered with it in
a fixed order, so it is deterministic.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import dense_map, empty_map, memory_format
from .backend import KernelModule, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_ulsam_kernels")
MAX_CHANNELS = 2048  # of a group, for the logits by the kernels: a program holds all of them
MAX_POSITIONS = 1024  # of a map, for the attention by the kernels: a program holds all of them
_CHUNK = 1 << 18  # elements of the framed buffer, a few images: it should stay in a core's cache


def _check(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    if x.dim() != 4 or weight.dim() != 2 or weight.shape[0] * weight.shape[1] != x.shape[1]:
        raise ValueError(f"got x {list(x.shape)} and weight {list(weight.shape)}, need [B, g * G, H, W] and [g, G]")
    if list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"got bias {list(bias.shape)}, need [{weight.shape[0]}]")
    if (scale is None) != (shift is None):
        raise ValueError("got one of scale and shift, need both or none")
    if scale is not None and shift is not None and not (scale.shape == shift.shape == (x.shape[1],)):
        raise ValueError(f"got scale {list(scale.shape)} and shift {list(shift.shape)}, need [{x.shape[1]}]")


def _plain_form(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    a = x
    if scale is not None and shift is not None:
        a = x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    a = F.max_pool2d(F.relu(a), 3, stride=1, padding=1)
    weight = weight.reshape(weight.shape[0], weight.shape[1], 1, 1)
    return F.conv2d(a, weight.to(a.dtype), bias.to(a.dtype), groups=weight.shape[0]).to(x.dtype)


def reference_ulsam_logits(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Affine map, ReLU, 3x3 maximum, and a weighted sum over the channels of each group.

    Args:
        x: Map ``[B, g * G, H, W]``, groups of ``G`` consecutive channels.
        weight: Weights of the sum ``[g, G]``.
        bias: ``[g]``.
        scale: Factor of every channel ``[g * G]``; None for no affine map.
        shift: Summand of every channel ``[g * G]``, with ``scale`` only.

    Returns:
        Logits ``[B, g, H, W]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(x, weight, bias, scale, shift)
    return _plain_form(x, weight, bias, scale, shift)


def _shifted_form(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The separable maximum, for inference: a few images at a time, in float32 at least."""
    B, C, H, W = x.shape
    g, last = weight.shape[0], memory_format(x) == torch.channels_last
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)
    x = x.permute(0, 2, 3, 1) if last else x.contiguous()
    frame = (H + 1, W + 1, C) if last else (C, H + 1, W + 1)  # zeros below and on the right border the next row too
    affine = (C,) if last else (C, 1, 1)
    step = C if last else 1  # from a position to its right neighbour, and to the one below
    row = (W + 1) * step
    size = C * (H + 1) * (W + 1)
    chunk = min(B, _CHUNK // size + 1)
    buffer = x.new_zeros(chunk * size + 2 * (row + step), dtype=dtype)
    framed = buffer[row + step :][: chunk * size].view(chunk, *frame)
    inside = framed[:, :H, :W] if last else framed[:, :, :H, :W]
    out = x.new_empty(B, g, H, W)
    for first in range(0, B, chunk):
        part = x[first : first + chunk].to(dtype)
        n = part.shape[0]
        if scale is not None and shift is not None:
            part = (part * scale.to(dtype).view(affine)).add_(shift.to(dtype).view(affine))
        torch.clamp_min(part, 0, out=inside[:n])
        flat = buffer[: n * size + 2 * (row + step)]
        lines = torch.maximum(flat[: -2 * step], flat[step:-step])
        torch.maximum(lines, flat[2 * step :], out=lines)
        peaks = torch.maximum(lines[: -2 * row], lines[row:-row])
        torch.maximum(peaks, lines[2 * row :], out=peaks)
        if last:
            sums = peaks.view(n, H + 1, W + 1, g, -1).mul_(weight).sum(-1).permute(0, 3, 1, 2)
        else:
            sums = (weight.unsqueeze(1) @ peaks.view(n, g, C // g, -1)).view(n, g, H + 1, W + 1)
        out[first : first + n] = sums[:, :, :H, :W] + bias.view(g, 1, 1)
    return out


@operator
def _ulsam_logits(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, save: bool, triton_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and the places of the maxima for the backward pass, empty unless ``save``."""
    if not triton_kernel:
        with without_autocast(x):
            return _shifted_form(x, weight, bias, scale, shift), x.new_empty(0, dtype=torch.int8)
    x = dense_map(x)
    return kernels.kernel_forward(x, weight, bias, scale, shift, save)


@torch.library.register_fake("vizoo::ulsam_logits")
def _(x, weight, bias, scale, shift, save, triton_kernel):
    logits = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    if save:
        return logits, empty_map(x, torch.int8)
    return logits, x.new_empty(0, dtype=torch.int8)


@operator
def _ulsam_logits_backward(
    dlogits: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, place: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``x``, and the sums that make those of the parameters, one tensor: see ``kernel_backward``."""
    return kernels.kernel_backward(dlogits, dense_map(x), weight, scale, place)


@torch.library.register_fake("vizoo::ulsam_logits_backward")
def _(dlogits, x, weight, scale, place):
    sums = x.new_empty(weight.shape[0] + x.shape[1] * (1 if scale is None else 2), dtype=torch.float32)
    return empty_map(x), sums


def _save(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, _, _ = inputs
    ctx.save_for_backward(x, weight, scale, shift, output[1])
    ctx.dtypes = [t.dtype for t in (weight, bias)]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the places would be a map that nobody reads


def _differentiate(ctx, dlogits, _):
    x, weight, scale, shift, place = ctx.saved_tensors
    if torch.is_grad_enabled():
        bias = dlogits.new_zeros(weight.shape[0], dtype=ctx.dtypes[1])  # adds nothing to the gradients of the others
        tensors, needed = (x, weight, bias, scale, shift), ctx.needs_input_grad
        dx, dweight, _, *affine = plain_gradients(_plain_form, tensors, dlogits, [*needed[:2], False, *needed[3:5]])
        return dx, dweight, dlogits.sum((0, 2, 3)).to(ctx.dtypes[1]), *affine, None, None
    dx, sums = _ulsam_logits_backward(dlogits, x, weight, scale, place)
    g, C = weight.shape[0], x.shape[1]
    dbias, product, total = sums.split([g, C, sums.shape[0] - g - C])
    dbias = dbias.to(ctx.dtypes[1])
    if scale is None:
        return dx, product.reshape(weight.shape).to(ctx.dtypes[0]), dbias, None, None, None, None
    dweight = (product * scale + total * shift).reshape(weight.shape).to(ctx.dtypes[0])
    per_channel = weight.reshape(-1)
    dscale, dshift = (product * per_channel).to(scale.dtype), (total * per_channel).to(shift.dtype)
    return dx, dweight, dbias, dscale, dshift, None, None


torch.library.register_autograd("vizoo::ulsam_logits", _differentiate, setup_context=_save)


def _elements(x) -> int:
    return x[0] * x[1] * x[2] * x[3]


@register_cost("vizoo::ulsam_logits", torch.ops.vizoo.ulsam_logits)
def _(x, weight, bias, scale, shift, save, triton_kernel, out=None) -> Cost:
    return Cost(macs=_elements(x) * (1 if scale is None else 2), other=9 * _elements(x))


@register_cost("vizoo::ulsam_logits_backward", torch.ops.vizoo.ulsam_logits_backward)
def _(dlogits, x, weight, scale, place, out=None) -> Cost:
    return Cost(macs=_elements(x) * (2 if scale is None else 4), other=9 * _elements(x))


def _dtype_limits(x: Tensor) -> str:
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return ""
    return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"


def _kernel_limits(x: Tensor, g: int) -> str:
    """What the Triton kernels cannot do with ``g`` groups of a map; empty if nothing."""
    if limits := _dtype_limits(x):
        return limits
    G = x.shape[1] // g
    return f"the kernels take groups of up to {MAX_CHANNELS} channels, not {G}" if G > MAX_CHANNELS else ""


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def ulsam_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_ulsam_logits` by a separable maximum or Triton kernels: same result and errors.

    Args:
        x: Map ``[B, g * G, H, W]``, groups of ``G`` consecutive channels.
        weight: Weights of the sum ``[g, G]``.
        bias: ``[g]``.
        scale: Factor of every channel ``[g * G]``; None for no affine map.
        shift: Summand of every channel ``[g * G]``, with ``scale`` only.
        backend: ``"torch"``, ``"triton"`` (no float64), or ``"auto"``: Triton where it can run.

    Returns:
        Logits ``[B, g, H, W]`` in the dtype of ``x``.

    Raises:
        ValueError: If the shapes do not fit each other, or ``backend`` cannot run.
    """
    _check(x, weight, bias, scale, shift)
    if not torch.jit.is_scripting():
        save = _needs_grad(x, weight, bias, scale, shift)
        if use_triton(backend, x, _kernel_limits(x, weight.shape[0])):
            return _ulsam_logits(x, weight, bias, scale, shift, save, True)[0]
        if x.device.type == "cpu" and not (torch.compiler.is_compiling() or plain_only()):
            if type(x) is Tensor and not save and x.numel() > 0:
                return _ulsam_logits(x, weight, bias, scale, shift, False, False)[0]
            x = x.contiguous(memory_format=torch.channels_last)  # where pooling is 3 to 6 times faster
    return _plain_form(x, weight, bias, scale, shift)


def subspace_maps(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax of the positive part of logits ``[B, g, H, W]`` over all positions, in ``dtype``."""
    return logits.relu().flatten(2).softmax(-1).to(dtype).reshape(logits.shape)


def reference_subspace_attention(x: Tensor, logits: Tensor) -> Tensor:
    """``x + attention * x`` with one map of attention for every group of channels.

    Args:
        x: Map ``[B, g * G, H, W]``, groups of ``G`` consecutive channels.
        logits: ``[B, g, H, W]``, before the ReLU.

    Returns:
        Map in the shape and dtype of ``x``.
    """
    groups = x.unflatten(1, [logits.shape[1], x.shape[1] // logits.shape[1]])  # a view in any memory format
    # one rounding: 1 + attention would lose most of the attention in half precision
    return torch.addcmul(groups, groups, subspace_maps(logits, x.dtype).unsqueeze(2)).flatten(1, 2)


@operator
def _subspace_attention(x: Tensor, logits: Tensor) -> Tensor:
    return kernels.attention_forward(dense_map(x), logits)


@torch.library.register_fake("vizoo::subspace_attention")
def _(x, logits):
    return empty_map(x)


@operator
def _subspace_attention_backward(dout: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    dense = partial(torch.Tensor.contiguous, memory_format=memory_format(x))
    return kernels.attention_backward(dense(dout), dense(x), logits)


@torch.library.register_fake("vizoo::subspace_attention_backward")
def _(dout, x, logits):
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return empty_map(x), dlogits


def _differentiate_attention(ctx, dout):
    if torch.is_grad_enabled():
        return tuple(plain_gradients(reference_subspace_attention, ctx.saved_tensors, dout, ctx.needs_input_grad))
    return _subspace_attention_backward(dout, *ctx.saved_tensors)


def _save_attention(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


torch.library.register_autograd("vizoo::subspace_attention", _differentiate_attention, setup_context=_save_attention)


@register_cost("vizoo::subspace_attention", torch.ops.vizoo.subspace_attention)
def _(x, logits, out=None) -> Cost:
    return Cost(other=2 * _elements(x) + 6 * _elements(logits), acts=0)


@register_cost("vizoo::subspace_attention_backward", torch.ops.vizoo.subspace_attention_backward)
def _(dout, x, logits, out=None) -> Cost:
    return Cost(other=4 * _elements(x) + 10 * _elements(logits), acts=0)


def _attention_limits(x: Tensor) -> str:
    """What the Triton kernels cannot do with a map; empty if nothing."""
    if limits := _dtype_limits(x):
        return limits
    N = x.shape[2] * x.shape[3]
    return f"the kernels take maps of up to {MAX_POSITIONS} positions, not {N}" if N > MAX_POSITIONS else ""


def subspace_attention(x: Tensor, logits: Tensor, backend: str = "auto") -> Tensor:
    """:func:`reference_subspace_attention` by one Triton kernel, with one for its gradients: same result.

    Args:
        x: Map ``[B, g * G, H, W]``, groups of ``G`` consecutive channels.
        logits: ``[B, g, H, W]``, before the ReLU.
        backend: ``"torch"``, ``"triton"`` (no float64, up to 1024 positions), or ``"auto"``: Triton where it can run.

    Returns:
        Map in the shape and dtype of ``x``.

    Raises:
        ValueError: If ``backend`` cannot run.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if use_triton(backend, x, _attention_limits(x)):
            return _subspace_attention(x, logits)
    return reference_subspace_attention(x, logits)
