"""Logits of subspace attention (ULSAM, Sec. 3): one number per position and group of channels.

    logits[n] = bias[n] + sum over channels c of group n of weight[c] * max over 3x3 of relu(scale[c] * x[c] + shift[c])

Positions outside the map count as 0.  With ``N = H * W`` positions and ``C`` channels the affine map and the sum cost
``C N`` multiply-accumulates each.

The reference writes the activated and the pooled map, and its backward pass keeps an eight-byte index per element.  For
inference on a CPU the fast form takes the maximum of three neighbours along rows, then along columns, as contiguous
vector operations over a zero-framed buffer that stays in the cache.  The Triton kernels store the logits and, for the
backward pass, one byte per element: which of the nine neighbours was the largest.  The gradient is gathered with it in
a fixed order, so it is deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import HAS_TRITON, on_device, plain_only, use_triton, without_autocast
from ._cost import Cost, register_cost
from ._derivative import plain_gradients

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


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _shifted_form(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The separable maximum, for inference: a few images at a time, in float32 at least."""
    B, C, H, W = x.shape
    g, last = weight.shape[0], _is_channels_last(x)
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


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    @triton.jit
    def _ulsam_logits_fwd_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        logits_ptr,
        place_ptr,
        g,
        G,
        H,
        W,
        stride_b,
        stride_c,
        stride_n,
        INDEX: tl.constexpr,
        SAVE: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """One tile of positions of one group: the place of the maximum is 0 to 8 row by row, 9 for none above 0."""
        N = H * W
        tiles = tl.cdiv(N, BLOCK_N)
        pid = tl.program_id(0)
        b, group = (pid // tiles // g).to(tl.int64), pid // tiles % g
        n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = n // W, n % W
        x_ptr += b * stride_b
        place_ptr += b * stride_b
        acc = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, G, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m_c = c < G
            scale = tl.load(scale_ptr + group * G + c, mask=m_c, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + group * G + c, mask=m_c, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + group * G + c, mask=m_c, other=0.0).to(tl.float32)
            element = (group * G + c).to(INDEX)[:, None] * stride_c + n.to(INDEX)[None, :] * stride_n
            best = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
            place = tl.full((BLOCK_C, BLOCK_N), 9, tl.int32)
            for k in tl.static_range(9):
                i, j = row + (k // 3 - 1), col + (k % 3 - 1)
                m_cn = m_c[:, None] & ((n < N) & (i >= 0) & (i < H) & (j >= 0) & (j < W))[None, :]
                step = (
                    (k // 3 - 1) * W + (k % 3 - 1)
                ) * stride_n  # added last: one address then serves all nine places
                x = tl.load(x_ptr + element + step, mask=m_cn, other=0.0).to(tl.float32)
                a = x * scale[:, None] + shift[:, None]
                better = m_cn & ((a > best) | (a != a))  # as in PyTorch the first of equals wins, and NaN over all
                best = tl.where(better, a, best)
                place = tl.where(better, k, place)
            acc += tl.sum(best * weight[:, None], 0)
            if SAVE:
                tl.store(place_ptr + element, place.to(tl.int8), mask=m_c[:, None] & (n < N)[None, :])
        logits = acc + tl.load(bias_ptr + group).to(tl.float32)
        tl.store(logits_ptr + (b * g + group) * N + n, logits.to(logits_ptr.dtype.element_ty), mask=n < N)

    @triton.jit
    def _ulsam_logits_bwd_kernel(
        dlogits_ptr,
        x_ptr,
        weight_ptr,
        scale_ptr,
        place_ptr,
        dx_ptr,
        total_ptr,
        product_ptr,
        g,
        G,
        H,
        W,
        stride_b,
        stride_c,
        stride_n,
        INDEX: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """What reaches each element from the nine windows over it; its sum, and that of it times ``x``, per tile."""
        N = H * W
        tiles = tl.cdiv(N, BLOCK_N)
        pid = tl.program_id(0)
        b, group = (pid // tiles // g).to(tl.int64), pid // tiles % g
        n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = n // W, n % W
        x_ptr += b * stride_b
        place_ptr += b * stride_b
        gradients = dlogits_ptr + (b * g + group) * N
        dx_ptr += b * stride_b
        sums = (b * tiles + pid % tiles) * (g * G)
        total_ptr += sums
        product_ptr += sums
        for first in range(0, G, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            m_c = c < G
            element = (group * G + c).to(INDEX)[:, None] * stride_c + n.to(INDEX)[None, :] * stride_n
            d = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
            for k in tl.static_range(9):  # centre of the window whose k-th place this element is
                i, j = row - (k // 3 - 1), col - (k % 3 - 1)
                m_n = (n < N) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
                m_cn = m_c[:, None] & m_n[None, :]
                step = ((k // 3 - 1) * W + (k % 3 - 1)) * stride_n
                place = tl.load(place_ptr + element - step, mask=m_cn, other=9)
                dlogits = tl.load(gradients + i * W + j, mask=m_n, other=0.0).to(tl.float32)
                d += tl.where(place == k, dlogits[None, :], 0.0)
            m_cn = m_c[:, None] & (n < N)[None, :]
            x = tl.load(x_ptr + element, mask=m_cn, other=0.0).to(tl.float32)
            factor = tl.load(weight_ptr + group * G + c, mask=m_c, other=0.0).to(tl.float32)
            factor *= tl.load(scale_ptr + group * G + c, mask=m_c, other=0.0).to(tl.float32)
            tl.store(dx_ptr + element, (d * factor[:, None]).to(dx_ptr.dtype.element_ty), mask=m_cn)
            entry = group * G + c
            tl.store(total_ptr + entry, tl.sum(d, 1), mask=m_c)
            tl.store(product_ptr + entry, tl.sum(d * x, 1), mask=m_c)


_BLOCKS = {"BLOCK_C": 16, "BLOCK_N": 64}


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _launch(kernel, x: Tensor, g: int, **arguments) -> None:
    B, C, H, W = x.shape
    with on_device(x):
        kernel[(B * g * triton.cdiv(H * W, _BLOCKS["BLOCK_N"]),)](
            x_ptr=x,
            g=g,
            G=C // g,
            H=H,
            W=W,
            stride_b=x.stride(0),
            stride_c=x.stride(1),
            stride_n=x.stride(3),
            INDEX=index_type(x),
            **arguments,
            **_BLOCKS,
        )


@torch.library.custom_op("vizoo::ulsam_logits", mutates_args=())
def _ulsam_logits(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, save: bool, triton_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and the places of the maxima for the backward pass, empty unless ``save``."""
    if not triton_kernel:
        with without_autocast(x):
            return _shifted_form(x, weight, bias, scale, shift), x.new_empty(0, dtype=torch.int8)
    x = x.contiguous(memory_format=_memory_format(x))
    logits = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    place = torch.empty_like(x, dtype=torch.int8) if save else x.new_empty(0, dtype=torch.int8)
    _launch(
        _ulsam_logits_fwd_kernel,
        x,
        weight.shape[0],
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        scale_ptr=x.new_ones(x.shape[1]) if scale is None else scale.contiguous(),
        shift_ptr=x.new_zeros(x.shape[1]) if shift is None else shift.contiguous(),
        logits_ptr=logits,
        place_ptr=place,
        SAVE=save,
    )
    return logits, place


@_ulsam_logits.register_fake
def _(x, weight, bias, scale, shift, save, triton_kernel):
    logits = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    if save:
        return logits, torch.empty_like(x, dtype=torch.int8, memory_format=_memory_format(x))
    return logits, x.new_empty(0, dtype=torch.int8)


@torch.library.custom_op("vizoo::ulsam_logits_backward", mutates_args=())
def _ulsam_logits_backward(
    dlogits: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``x``, and for every channel the sums that make those of the parameters."""
    x = x.contiguous(memory_format=_memory_format(x))
    dx = torch.empty_like(x)
    tiles = triton.cdiv(x.shape[2] * x.shape[3], _BLOCKS["BLOCK_N"])
    total, product = (x.new_empty(x.shape[0] * tiles, x.shape[1], dtype=torch.float32) for _ in range(2))
    _launch(
        _ulsam_logits_bwd_kernel,
        x,
        weight.shape[0],
        dlogits_ptr=dlogits.contiguous(),
        weight_ptr=weight.contiguous(),
        scale_ptr=x.new_ones(x.shape[1]) if scale is None else scale.contiguous(),
        place_ptr=place,
        dx_ptr=dx,
        total_ptr=total,
        product_ptr=product,
    )
    return dx, total.sum(0), product.sum(0)


@_ulsam_logits_backward.register_fake
def _(dlogits, x, weight, scale, place):
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=_memory_format(x)), sums, torch.empty_like(sums)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, scale, shift, _, _ = inputs
    ctx.save_for_backward(x, weight, scale, shift, output[1])
    ctx.dtypes = [t.dtype for t in (weight, bias)]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dlogits, _):
    x, weight, scale, shift, place = ctx.saved_tensors
    if torch.is_grad_enabled():
        bias = dlogits.new_zeros(weight.shape[0], dtype=ctx.dtypes[1])  # adds nothing to the gradients of the others
        tensors, needed = (x, weight, bias, scale, shift), ctx.needs_input_grad
        dx, dweight, _, *affine = plain_gradients(_plain_form, tensors, dlogits, [*needed[:2], False, *needed[3:5]])
        return dx, dweight, dlogits.sum((0, 2, 3)).to(ctx.dtypes[1]), *affine, None, None
    dx, total, product = _ulsam_logits_backward(dlogits, x, weight, scale, place)
    dbias = dlogits.sum((0, 2, 3), dtype=torch.float32).to(ctx.dtypes[1])
    if scale is None:
        return dx, product.reshape(weight.shape).to(ctx.dtypes[0]), dbias, None, None, None, None
    dweight = (product * scale + total * shift).reshape(weight.shape).to(ctx.dtypes[0])
    per_channel = weight.reshape(-1)
    dscale, dshift = (product * per_channel).to(scale.dtype), (total * per_channel).to(shift.dtype)
    return dx, dweight, dbias, dscale, dshift, None, None


_ulsam_logits.register_autograd(_differentiate, setup_context=_save)


def _elements(x) -> int:
    return x[0] * x[1] * x[2] * x[3]


@register_cost("vizoo::ulsam_logits", torch.ops.vizoo.ulsam_logits)
def _(x, weight, bias, scale, shift, save, triton_kernel, out=None) -> Cost:
    return Cost(macs=_elements(x) * (1 if scale is None else 2), other=9 * _elements(x))


@register_cost("vizoo::ulsam_logits_backward", torch.ops.vizoo.ulsam_logits_backward)
def _(dlogits, x, weight, scale, place, out=None) -> Cost:
    return Cost(macs=_elements(x) * (2 if scale is None else 4), other=9 * _elements(x))


def kernel_limits(x: Tensor) -> str:
    """What the Triton kernels cannot do with a map in the dtype of ``x``; empty if nothing."""
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return ""
    return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"


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
        if use_triton(backend, x, kernel_limits(x)):
            return _ulsam_logits(x, weight, bias, scale, shift, save, True)[0]
        if x.device.type == "cpu" and not (torch.compiler.is_compiling() or plain_only()):
            if type(x) is Tensor and not save and x.numel() > 0:
                return _ulsam_logits(x, weight, bias, scale, shift, False, False)[0]
            x = x.contiguous(memory_format=torch.channels_last)  # where pooling is 3 to 6 times faster
    return _plain_form(x, weight, bias, scale, shift)
