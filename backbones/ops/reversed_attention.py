"""Reversed attention: every token sends its value, weighted, to the tokens it attends to (DependencyViT).

    S[i, j] = scale * q_i . k_j               i: sender, child; j: receiver, parent
    F[i, j] = softmax over receivers j of S[i, j]
    out_j   = sum over senders i of F[i, j] * weight_i * v_i

Ordinary attention gathers with ``F @ v``; this scatters with ``F^T``, which is not normalised again.  With ``h`` heads
it costs ``2 B h N^2 d`` multiply-accumulates.  The weights only scale the values, so everything below works on
``u = weight * v`` and ``out = F^T u``:

    d u_i  = sum_j F[i, j] dout_j             ordinary attention with dout as values
    d S_ij = F[i, j] * (u_i . dout_j - u_i . d u_i)

No form but the folded eager one keeps an ``N x N`` matrix.  ``blocks`` goes through the senders in blocks whose scores
fit a CPU's cache.  ``sdpa`` is exact on every backend of PyTorch: attention ``F z`` is linear in ``z`` and pulls a
cotangent ``u`` back to ``F^T u``, so the forward pass is that pull-back, and the backward pass is attention over
``dout`` and its own pull-back of ``u``.  The Triton kernels keep scores on the chip.  Products are done in the dtype of
the inputs.  All sums run in a fixed order.  Second derivatives, and all under transforms of ``torch.func``, are those
of the folded eager form.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import tokens_first
from .backend import KernelModule, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_reversed_attention_kernels")
BLOCK_SCORES = 2**18  # scores of a block for each thread: 1 MiB, measured best from 2^17 to 2^19
EAGER_SCORES = 2**19  # up to here inference is as fast in plain operators, without the call of an operator
MAX_HEAD_SIZE = 128  # of the Triton kernels


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, need one shape [B, h, N, d]")
    if q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"got q {list(q.shape)}, need at least one token and one channel")
    if weight is not None and weight.shape != q.shape[:3]:
        raise ValueError(f"got weight {list(weight.shape)}, need [B, h, N] = {list(q.shape[:3])}")


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _factor(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _probabilities(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Of every sender over the receivers: ``[..., N, N]`` in float32, or float64 when ``q`` is float64."""
    dtype = _score_dtype(q)
    return ((q.to(dtype) * _factor(q, scale)) @ k.to(dtype).transpose(-2, -1)).softmax(-1)


def _written_form(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float | None) -> Tensor:
    received = _probabilities(q, k, scale).to(v.dtype).transpose(-2, -1)  # [B, h, receiver, sender]
    if weight is not None:
        received = received * weight.to(v.dtype).unsqueeze(-2)
    return received @ v


def reference_reversed_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Reversed attention as it is written: softmax over receivers, transpose, weight each sender, sum over senders.

    Scores and softmax are computed in float32, or in float64 when ``q`` is float64.

    Args:
        q: Queries of the senders ``[B, h, N, d]``.
        k: Keys of the receivers, same shape.
        v: Values of the senders, same shape.
        weight: Weights of the senders ``[B, h, N]``; None means 1.
        scale: Factor of the scores; None means ``d ** -0.5``.

    Returns:
        ``[B, h, N, d]`` in the dtype of ``v``: what each receiver collects.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(q, k, v, weight)
    if not torch.jit.is_scripting():
        with without_autocast(v):
            return _written_form(q, k, v, weight, scale)
    return _written_form(q, k, v, weight, scale)


def dependency_mask(q: Tensor, k: Tensor, weight: Tensor, scale: float | None = None) -> Tensor:
    """Soft dependency mask: what every receiver gets from every sender, summed over the heads, one head at a time.

    Column ``i`` sums to the sum over heads of ``weight[:, :, i]``.

    Args:
        q: Queries of the senders ``[B, h, N, d]``.
        k: Keys of the receivers, same shape.
        weight: Weights of the senders ``[B, h, N]``.
        scale: Factor of the scores; None means ``d ** -0.5``.

    Returns:
        ``[B, N (receiver, parent), N (sender, child)]`` in float32, or in float64 when ``q`` is float64.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(q, k, q, weight)
    with without_autocast(q):
        mask = q.new_zeros(q.shape[0], q.shape[2], q.shape[2], dtype=_score_dtype(q))
        for head in range(q.shape[1]):
            sent = _probabilities(q[:, head], k[:, head], scale) * weight[:, head].to(mask.dtype).unsqueeze(-1)
            mask = mask + sent.transpose(-2, -1)
    return mask


def _fold(v: Tensor, weight: Tensor | None) -> Tensor:
    """Values times weights, in float32 at least: so is then the sum that the gradient of a weight is."""
    return v if weight is None else (v * weight.unsqueeze(-1).to(_score_dtype(v))).to(v.dtype)


def _folded_form(q: Tensor, k: Tensor, u: Tensor, scale: float) -> Tensor:
    return _probabilities(q, k, scale).to(u.dtype).transpose(-2, -1) @ u


def _blocks(heads: int, N: int) -> tuple[int, int]:
    """Heads and senders of a block."""
    scores = BLOCK_SCORES * torch.get_num_threads()
    if scores <= N * N:
        return 1, min(N, max(16, scores // N))
    return min(heads, max(1, scores // (N * N))), N


def _stacked(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """``[B, h, N, d]`` -> contiguous ``[B * h, N, d]`` in ``dtype``."""
    return [t.to(dtype).reshape(-1, t.shape[2], t.shape[3]).contiguous() for t in tensors]


def _blocks_forward(q: Tensor, k: Tensor, u: Tensor, scale: float) -> Tensor:
    shape, dtype = u.shape, u.dtype
    q, k, u = _stacked(_score_dtype(q), q, k, u)
    heads, N, _ = q.shape
    group, rows = _blocks(heads, N)
    out, scores = torch.empty_like(u), q.new_empty(group, rows, N)
    for b in range(0, heads, group):
        keys, part = k[b : b + group].transpose(1, 2), out[b : b + group]
        for i in range(0, N, rows):
            queries = q[b : b + group, i : i + rows]
            p = scores[: queries.shape[0], : queries.shape[1]]
            torch.baddbmm(p, queries, keys, beta=0, alpha=scale, out=p)
            p = torch.softmax(p, -1, out=p).transpose(1, 2)
            torch.baddbmm(part, p, u[b : b + group, i : i + rows], beta=int(i > 0), out=part)
    return out.reshape(shape).to(dtype)


def _blocks_backward(dout: Tensor, q: Tensor, k: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtypes = u.shape, (q.dtype, k.dtype, u.dtype)
    q, k, u, dout = _stacked(_score_dtype(q), q, k, u, dout)
    heads, N, _ = q.shape
    group, rows = _blocks(heads, N)
    q = q * scale
    dq, dk, du = torch.empty_like(q), torch.zeros_like(k), torch.empty_like(u)
    for b in range(0, heads, group):
        keys, grads, part = k[b : b + group], dout[b : b + group], dk[b : b + group]
        for i in range(0, N, rows):
            block = (slice(b, b + group), slice(i, i + rows))
            p = torch.bmm(q[block], keys.transpose(1, 2)).softmax(-1)
            du[block] = torch.bmm(p, grads)
            delta = (u[block] * du[block]).sum(-1, keepdim=True)
            ds = torch.bmm(u[block], grads.transpose(1, 2)).sub_(delta).mul_(p)
            dq[block] = torch.bmm(ds, keys)
            part.baddbmm_(ds.transpose(1, 2), q[block])
    dq, dk, du = (t.reshape(shape).to(dtype) for t, dtype in zip((dq.mul_(scale), dk, du), dtypes, strict=True))
    return dq, dk, du


def _sdpa_pull(q: Tensor, k: Tensor, z: Tensor, u: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention over ``z``, and its gradients of ``q``, ``k`` and ``z`` for the cotangent ``u``."""
    common = torch.promote_types(q.dtype, u.dtype)
    with torch.inference_mode(False), torch.enable_grad():
        # tensors made in inference mode cannot be differentiated, their copies can
        leaves = [(t.clone() if t.is_inference() else t.detach()).to(common).requires_grad_() for t in (q, k, z)]
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=scale)
        return out.detach(), torch.autograd.grad(out, leaves, u.to(common))


@operator
def _reversed_attention(q: Tensor, k: Tensor, u: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum of each sender's scores ``[B, h, N]`` that the kernels keep, else empty."""
    if form == "triton":
        return kernels.kernel_forward(q, k, u, scale)
    with without_autocast(u):
        out = _sdpa_pull(q, k, u, u, scale)[1][2].to(u.dtype) if form == "sdpa" else _blocks_forward(q, k, u, scale)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32)


@torch.library.register_fake("vizoo::reversed_attention")
def _(q, k, u, scale, form):
    if form == "triton":
        return tokens_first(u), q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.empty_like(u, memory_format=torch.contiguous_format), q.new_empty(0, dtype=torch.float32)


@operator
def _reversed_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, lse: Tensor, scale: float, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    if form == "triton":
        return kernels.kernel_backward(dout, q, k, u, lse, scale)
    with without_autocast(u):
        if form == "sdpa":
            du, (dq, dk, _) = _sdpa_pull(q, k, dout, u, scale)
        else:
            dq, dk, du = _blocks_backward(dout, q, k, u, scale)
    dq, dk, du = (g.to(t.dtype).contiguous() for g, t in zip((dq, dk, du), (q, k, u), strict=True))
    return dq, dk, du


@torch.library.register_fake("vizoo::reversed_attention_backward")
def _(dout, q, k, u, lse, scale, form):
    if form == "triton":
        return tuple(tokens_first(t) for t in (q, k, u))
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, u))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.form = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _):
    if torch.is_grad_enabled():  # create_graph=True
        *tensors, _ = ctx.saved_tensors
        with without_autocast(dout):
            gradients = plain_gradients(partial(_folded_form, scale=ctx.scale), tensors, dout, ctx.needs_input_grad[:3])
        return *gradients, None, None
    return *_reversed_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.form), None, None


torch.library.register_autograd("vizoo::reversed_attention", _differentiate, setup_context=_save)


@register_cost("vizoo::reversed_attention", torch.ops.vizoo.reversed_attention)
def _(q, k, u, scale, form, out=None) -> Cost:
    B, h, N, D = q
    return Cost(macs=2 * B * h * N * N * D, other=5 * B * h * N * N, acts=B * h * N * (N + D))


@register_cost("vizoo::reversed_attention_backward", torch.ops.vizoo.reversed_attention_backward)
def _(dout, q, *rest, out=None) -> Cost:
    B, h, N, D = q  # the gradients' products; the recomputed scores are not counted, so that no path counts more
    return Cost(macs=4 * B * h * N * N * D, other=5 * B * h * N * N)


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_reversed_attention` without its ``N x N`` matrices: same result and errors.

    Exported, traced and scripted graphs, transforms of ``torch.func``, and small inference on a CPU see plain
    operators: ``softmax(S)^T @ (weight * v)``.

    Args:
        q: Queries of the senders ``[B, h, N, d]``.
        k: Keys of the receivers, same shape.
        v: Values of the senders, same shape.
        weight: Weights of the senders ``[B, h, N]``; None means 1.
        scale: Factor of the scores; None means ``d ** -0.5``.
        backend: ``"torch"``, which is ``"sdpa"`` on devices other than CPUs; ``"sdpa"``, PyTorch's own attention and
            its gradients; ``"triton"`` (no float64, ``d <= 128``); or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, h, N, d]`` in the dtype of ``v``.

    Raises:
        ValueError: If the shapes do not fit each other, or ``backend`` cannot run.
    """
    _check(q, k, v, weight)
    factor, u = _factor(q, scale), _fold(v, weight)
    if not torch.jit.is_scripting():
        form = _choose(backend, q, u)
        if form == "triton":
            common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), u.dtype)
            return _reversed_attention(q.to(common), k.to(common), u.to(common), factor, form)[0].to(v.dtype)
        if form != "eager":
            return _reversed_attention(q, k, u, factor, form)[0]
        with without_autocast(u):
            return _folded_form(q, k, u, factor)
    return _folded_form(q, k, u, factor)


def _choose(backend: str, q: Tensor, u: Tensor) -> str:
    """The form for this call: with ``"auto"`` the fastest, as measured."""
    if backend not in ("auto", "torch", "sdpa", "triton"):
        raise ValueError(f"got backend={backend!r}, need 'auto', 'torch', 'sdpa' or 'triton'")
    triton_kernel = backend != "sdpa" and use_triton(backend, u, _kernel_limits(q, u))
    if plain_only() or u.numel() == 0:
        return "eager"
    if triton_kernel:
        return "triton"
    if backend == "sdpa" or u.device.type not in ("cpu", "meta"):
        return "sdpa"
    B, h, N, _ = q.shape
    return "eager" if B * h * N * N <= EAGER_SCORES and not torch.is_grad_enabled() else "blocks"


def _kernel_limits(q: Tensor, u: Tensor) -> str:
    """What the Triton kernels cannot do with these tensors; empty if nothing."""
    for x in (q, u):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    if q.shape[3] > MAX_HEAD_SIZE:
        return f"the kernels take up to {MAX_HEAD_SIZE} channels per head, not {q.shape[3]}"
    return ""
