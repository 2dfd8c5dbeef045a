"""ContMix: convolution with kernels made from the context, one pair for every position and group (OverLoCK, Sec. 3.3).

The affinity of a query to the 49 pooled context regions goes through a linear map to the logits of a small (``k1``)
and a large (``k2``) kernel.  Both steps are linear, so they are one product with ``M = key @ weight_proj^T``:

    logits[n] = q[n] @ M + bias + rpb[true relative offsets]    weights = softmax over each kernel's offsets
    out[n]    = sum over the window of n of weights * v

Windows are shifted at the border, not padded (see ``na2d_av``).  The first half of the channels of ``v`` and ``out``
belongs to the small kernel, the second to the large one; each half holds ``G`` groups of ``C`` channels.  With
``N = H * W`` queries and ``S = k1^2 + k2^2`` the operator costs ``2 N S C`` multiply-accumulates per group.

The Triton kernels take and return the layout of the surrounding convolutions.  Where a map has few distinct windows
they keep logits and weights in registers, with an online softmax, and their backward pass recomputes them from ``q``,
``M`` and the stored log-sum; elsewhere they write the weights of one kernel size at a time.  Everything is added up in
a fixed order: they are deterministic.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import empty_map, memory_format
from .backend import KernelModule, use_compiled_onednn, use_triton, without_autocast
from .cost import Cost, register_cost
from .na2d_av import check_window, kernel_limits, na2d_av, reference_na2d_av, window_starts
from .operators import operator

kernels = KernelModule("_contmix_kernels")


def working_size(H: int, W: int, kernel_size: int) -> tuple[int, int]:
    """Size to which a map smaller than the window is resized before ContMix: the official rule.

    The short side becomes ``kernel_size`` and the long side keeps the aspect ratio, truncated in double precision in
    the official order of operations.  Where that truncation would fall below the window (the official code then
    raises), the side is ``kernel_size``.

    Args:
        H: Rows of the map.
        W: Columns of the map.
        kernel_size: Side ``K`` of the large kernel.

    Returns:
        Rows and columns, both at least ``kernel_size``; ``(H, W)`` itself when the window fits.
    """
    if kernel_size <= H and kernel_size <= W:  # min() would bind exported programs to one orientation
        return H, W
    if H < W:
        return kernel_size, max(kernel_size, int(kernel_size / H * W))
    return max(kernel_size, int(kernel_size / W * H)), kernel_size


def _check(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> None:
    if q.dim() != 4 or M.dim() != 4:
        raise ValueError(
            f"got q {list(q.shape)} and M {list(M.shape)}, need [B, G * C, H, W] and [B, G, C, k1^2 + k2^2]"
        )
    B, G, C, S = M.shape[0], M.shape[1], M.shape[2], k1 * k1 + k2 * k2
    H, W = q.shape[2], q.shape[3]
    check_window(H, W, k1, "k1")
    check_window(H, W, k2, "k2")
    if q.shape[0] != B or q.shape[1] != G * C or M.shape[3] != S:
        raise ValueError(
            f"got M {list(M.shape)} for q {list(q.shape)}, k1={k1}, k2={k2}; need [B, G, C, {S}], q [B, G * C, H, W]"
        )
    if list(v.shape) != [B, 2 * G * C, H, W]:
        raise ValueError(f"got v {list(v.shape)}, need {[B, 2 * G * C, H, W]}, twice the channels of q")
    if list(bias.shape) != [S]:
        raise ValueError(f"got bias {list(bias.shape)}, need [{S}] (k1^2 + k2^2)")
    if list(rpb1.shape) != [G, 2 * k1 - 1, 2 * k1 - 1]:
        raise ValueError(f"got rpb1 {list(rpb1.shape)}, need {[G, 2 * k1 - 1, 2 * k1 - 1]} ([G, 2 k1 - 1, 2 k1 - 1])")
    if list(rpb2.shape) != [G, 2 * k2 - 1, 2 * k2 - 1]:
        raise ValueError(f"got rpb2 {list(rpb2.shape)}, need {[G, 2 * k2 - 1, 2 * k2 - 1]} ([G, 2 k2 - 1, 2 k2 - 1])")


def _window_steps(L: int, kernel_size: int, device: torch.device) -> Tensor:
    """First relative offset, plus ``K - 1``, in the window of each position on an axis: ``[L]``, 0 to ``K - 1``."""
    return window_starts(L, kernel_size, device) - torch.arange(L, device=device) + kernel_size - 1


def _gather_rpb(rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """Relative position bias of every query and offset: ``[G, 2K-1, 2K-1]`` -> ``[G, H*W, K*K]``.

    The index is key position minus query position plus ``K - 1``, with the window that is shifted at the border.
    """
    G, K = rpb.shape[0], kernel_size
    offset = torch.arange(K, device=rpb.device)
    rows = _window_steps(H, K, rpb.device).unsqueeze(1) + offset  # [H, K]
    cols = _window_steps(W, K, rpb.device).unsqueeze(1) + offset  # [W, K]
    index = rows.reshape(H, 1, K, 1) * (2 * K - 1) + cols.reshape(1, W, 1, K)
    return rpb.reshape(G, -1).index_select(1, index.reshape(-1)).reshape(G, H * W, K * K)


def _expand_rpb(rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """:func:`_gather_rpb` by copies of whole windows of the table, of which there are ``K * K``."""
    G, K = rpb.shape[0], kernel_size
    windows = rpb.unfold(1, K, 1).unfold(2, K, 1).reshape(G, K * K, K * K)
    index = _window_steps(H, K, rpb.device).unsqueeze(1) * K + _window_steps(W, K, rpb.device)  # [H, W]
    return windows.index_select(1, index.reshape(-1))


def _logit_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def contmix_kernels(
    logits: Tensor, rpb1: Tensor, rpb2: Tensor, H: int, W: int, k1: int, k2: int
) -> tuple[Tensor, Tensor]:
    """The kernels of every position: relative position bias and softmax (OverLoCK, Sec. 3.3).

    Args:
        logits: Logits of both kernels for every query ``[B, G, H * W, k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        H: Rows of the map.
        W: Columns of the map.
        k1: Side of the small window.
        k2: Side of the large window.

    Returns:
        The small kernels ``[B, G, H, W, k1^2]`` and the large ones ``[B, G, H, W, k2^2]`` in float32, or in float64 if
        the logits are, over the window of each position, which is shifted at the border.
    """
    B, G, logits = logits.shape[0], logits.shape[1], logits.to(_logit_dtype(logits))
    small = logits[..., : k1 * k1] + _gather_rpb(rpb1.to(logits.dtype), H, W, k1)
    large = logits[..., k1 * k1 :] + _gather_rpb(rpb2.to(logits.dtype), H, W, k2)
    return small.softmax(-1).reshape(B, G, H, W, k1 * k1), large.softmax(-1).reshape(B, G, H, W, k2 * k2)


def _gather_form(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    B, H, W = q.shape[0], q.shape[2], q.shape[3]
    G, C = M.shape[1], M.shape[2]
    dtype = _logit_dtype(q)
    queries = q.reshape(B, G, C, H * W).transpose(2, 3).to(dtype)
    logits = queries @ M.to(dtype) + bias.to(dtype)  # [B, G, N, k1^2 + k2^2]
    values = v.reshape(B, 2, G, C, H, W).permute(1, 0, 2, 4, 5, 3)  # [2, B, G, H, W, C]
    small, large = contmix_kernels(logits, rpb1, rpb2, H, W, k1, k2)
    out1, out2 = reference_na2d_av(small, values[0], k1), reference_na2d_av(large, values[1], k2)
    return torch.stack([out1, out2], dim=1).permute(0, 1, 2, 5, 3, 4).reshape(v.shape)


def contmix_from_logits(logits: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    """The second half of ContMix: relative position bias, softmax and weighted sums (OverLoCK, Sec. 3.3).

    Args:
        logits: Logits of both kernels for every query ``[B, G, H * W, k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window.
        k2: Side of the large window.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.
    """
    B, G, H, W = logits.shape[0], logits.shape[1], v.shape[2], v.shape[3]
    values = v.reshape(B, 2, G, -1, H, W).permute(1, 0, 2, 4, 5, 3)  # [2, B, G, H, W, C]
    small, large = contmix_kernels(logits, rpb1, rpb2, H, W, k1, k2)
    out1 = na2d_av(small.to(v.dtype), values[0], k1, "torch")
    out2 = na2d_av(large.to(v.dtype), values[1], k2, "torch")
    return torch.stack([out1, out2], dim=1).permute(0, 1, 2, 5, 3, 4).reshape(v.shape)


def reference_contmix(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> Tensor:
    """Softmax weights from query and context, and their sum over two windows per query (OverLoCK, Sec. 3.3).

    Logits and softmax are computed in float32, or in float64 when ``q`` is float64.

    Args:
        q: Queries ``[B, G * C, H, W]``, channels laid out as ``[G, C]``.
        M: Context of every group ``[B, G, C, k1^2 + k2^2]``: pooled keys times the kernel projection, times the scale.
        bias: Bias of the kernel projection ``[k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window: odd, at least 3 and at most ``H`` and ``W``.
        k2: Side of the large window, likewise; ``working_size`` says how a smaller map is enlarged first.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.

    Raises:
        ValueError: If a window does not fit the map, or the shapes do not fit each other.
    """
    _check(q, M, bias, rpb1, rpb2, v, k1, k2)
    if not torch.jit.is_scripting():
        with without_autocast(q):
            return _gather_form(q, M, bias, rpb1, rpb2, v, k1, k2)
    return _gather_form(q, M, bias, rpb1, rpb2, v, k1, k2)


def _matmul_half(queries: Tensor, M: Tensor, bias: Tensor, rpb: Tensor, values: Tensor, kernel_size: int) -> Tensor:
    """One kernel size: queries ``[B, G, N, C]``, ``M`` ``[B, G, C, K*K]``, values ``[B, G, C, H, W]`` -> the last."""
    B, G, C, H, W = values.shape
    table = _expand_rpb(rpb.to(queries.dtype), H, W, kernel_size) + bias.to(queries.dtype)  # [G, N, K*K]
    weights = (queries @ M).add_(table).softmax(-1).to(values.dtype)
    weights = weights.reshape(B, G, H, W, kernel_size * kernel_size)
    return na2d_av(weights, values.permute(0, 1, 3, 4, 2), kernel_size, "torch").permute(0, 1, 4, 2, 3)


def _matmul_form(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    B, H, W = q.shape[0], q.shape[2], q.shape[3]
    G, C, dtype = M.shape[1], M.shape[2], _logit_dtype(q)
    queries = q.reshape(B, G, C, H * W).transpose(2, 3).to(dtype)
    M1, M2 = M.to(dtype).split([k1 * k1, k2 * k2], dim=3)
    bias1, bias2 = bias.split([k1 * k1, k2 * k2])
    v1, v2 = v.reshape(B, 2, G, C, H, W).unbind(1)
    small = _matmul_half(queries, M1, bias1, rpb1, v1, k1)
    large = _matmul_half(queries, M2, bias2, rpb2, v2, k2)
    return torch.stack([small, large], dim=1).reshape(v.shape)


def _skew_sum(t: Tensor, L: int, kernel_size: int) -> Tensor:
    """Adjoint of the relative index on one axis, by sums in a fixed order: ``[..., K, L]`` -> ``[..., 2K - 1]``.

    Entry ``(p, i)`` goes to ``p + step(i)``; the step falls from ``K - 1`` at the first position to 0 at the last, and
    is ``(K - 1) / 2`` at every position in between.
    """
    K, half = kernel_size, (kernel_size - 1) // 2
    inner = t[..., half : L - half].sum(-1, keepdim=True)
    steps = torch.cat([t[..., :half], inner, t[..., L - half :]], dim=-1).flip(-1).transpose(-1, -2)  # [..., step, p]
    skewed = F.pad(steps, [0, K]).flatten(-2)[..., :-K]  # row ``step`` moves right by ``step``
    return skewed.unflatten(-1, (K, 2 * K - 1)).sum(-2)


def _rpb_gradient(ds: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """Gradient of the table from that of the logits, summed over the batch: ``[G, K*K, N]`` -> ``[G, 2K-1, 2K-1]``."""
    t = ds.reshape(ds.shape[0], kernel_size, kernel_size, H, W)
    t = _skew_sum(t.transpose(2, 3), W, kernel_size)  # [G, p, H, 2K - 1]
    return _skew_sum(t.permute(0, 3, 1, 2), H, kernel_size).transpose(1, 2)


def _dense(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What the kernels take: maps in the memory format of the values."""
    maps = (t.contiguous(memory_format=memory_format(v)) for t in (q, v))
    return next(maps), *(t.contiguous() for t in (M, bias, rpb1, rpb2)), next(maps)


@operator
def _contmix(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> tuple[Tensor, Tensor]:
    return kernels.kernel_forward(_dense(q, M, bias, rpb1, rpb2, v), k1, k2)


@torch.library.register_fake("vizoo::contmix")
def _(q, M, bias, rpb1, rpb2, v, k1, k2):
    lse = q.new_empty(M.shape[0], 2, M.shape[1], q.shape[2] * q.shape[3], dtype=torch.float32)
    return empty_map(v), lse


@operator
def _contmix_backward(
    dout: Tensor,
    q: Tensor,
    M: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    k1: int,
    k2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, W = q.shape[2], q.shape[3]
    dout, out = (t.contiguous(memory_format=memory_format(v)) for t in (dout, out))
    dq, dM, dv, dlogits = kernels.kernel_backward(dout, out, lse, _dense(q, M, bias, rpb1, rpb2, v), k1, k2)
    drpb1, drpb2 = (
        _rpb_gradient(d.transpose(1, 2), H, W, K).contiguous() for d, K in zip(dlogits, (k1, k2), strict=True)
    )
    return dq, dM, torch.cat([d.sum((0, 1)) for d in dlogits]), drpb1, drpb2, dv


@torch.library.register_fake("vizoo::contmix_backward")
def _(dout, q, M, bias, rpb1, rpb2, v, out, lse, k1, k2):
    plain = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (M, bias, rpb1, rpb2))
    dq, dv = (torch.empty_like(t, memory_format=memory_format(v)) for t in (q, v))
    return dq, *plain, dv


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.k1, ctx.k2 = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _):
    if torch.is_grad_enabled():
        *tensors, _, _ = ctx.saved_tensors
        form = functools.partial(_matmul_form, k1=ctx.k1, k2=ctx.k2)
        return *plain_gradients(form, tensors, dout, ctx.needs_input_grad[:6]), None, None
    return *_contmix_backward(dout, *ctx.saved_tensors, ctx.k1, ctx.k2), None, None


torch.library.register_autograd("vizoo::contmix", _differentiate, setup_context=_save)


@operator
def _contmix_products(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> Tensor:
    return _matmul_form(q, M, bias, rpb1, rpb2, v, k1, k2).contiguous()


@torch.library.register_fake("vizoo::contmix_products")
def _(q, M, bias, rpb1, rpb2, v, k1, k2):
    return v.new_empty(v.shape)


@register_cost("vizoo::contmix_products", torch.ops.vizoo.contmix_products)
@register_cost("vizoo::contmix", torch.ops.vizoo.contmix)
def _(q, M, bias, rpb1, rpb2, v, k1, k2, out=None) -> Cost:
    B, G, C, S = M
    return Cost(macs=2 * B * G * q[2] * q[3] * S * C, other=5 * B * G * q[2] * q[3] * S)


@register_cost("vizoo::contmix_backward", torch.ops.vizoo.contmix_backward)
def _(dout, q, M, *rest, out=None) -> Cost:
    B, G, C, S = M  # the gradients' products; the recomputed logits are not counted, so that no path counts more
    return Cost(macs=4 * B * G * q[2] * q[3] * S * C, other=5 * B * G * q[2] * q[3] * S)


def contmix(
    q: Tensor,
    M: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    v: Tensor,
    k1: int,
    k2: int,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_contmix` by matrix products or fused Triton kernels: same result and errors.

    Args:
        q: Queries ``[B, G * C, H, W]``, channels laid out as ``[G, C]``.
        M: Context of every group ``[B, G, C, k1^2 + k2^2]``, with the scale.
        bias: Bias of the kernel projection ``[k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window.
        k2: Side of the large window.
        backend: ``"torch"``, ``"triton"`` (no float64, ``C <= 64``), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.

    Raises:
        ValueError: If a window does not fit the map, the shapes do not fit each other, or ``backend`` cannot run.
    """
    _check(q, M, bias, rpb1, rpb2, v, k1, k2)
    if not torch.jit.is_scripting():
        if use_triton(backend, v, kernel_limits(q, M.shape[2]) or kernel_limits(v, M.shape[2])):
            common = torch.promote_types(torch.promote_types(q.dtype, M.dtype), v.dtype)
            tables = (t.float() for t in (bias, rpb1, rpb2))
            return _contmix(q.to(common), M.to(common), *tables, v.to(common), k1, k2)[0].to(v.dtype)
        if backend == "auto" and use_compiled_onednn(q, M):  # the compiler computes a softmax anew for each use
            return torch.ops.vizoo.contmix_products(q, M, bias, rpb1, rpb2, v, k1, k2)
        with without_autocast(q):
            return _matmul_form(q, M, bias, rpb1, rpb2, v, k1, k2)
    return _matmul_form(q, M, bias, rpb1, rpb2, v, k1, k2)
