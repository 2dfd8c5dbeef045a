"""Attention to tokens and prompts of which every token keeps some (TCPA).

The softmax runs over all tokens and prompts; each token then keeps the prompts chosen for it alone, without
renormalisation:

    out = softmax(scale * q [k; k_p]^T) * [1; chosen] [v; v_p]

With ``N`` tokens, ``P`` prompts and ``h`` heads of ``d`` channels that is ``2 B h N (N + P) d`` multiply-accumulates.

The reference stores every weight.  The fused form, for programs that have to consist of PyTorch's own operators, moves
``chosen`` into the logits, where ``-inf`` takes an unchosen prompt away from numerator and denominator alike, and adds
one sink key with the value 0 and the logit ``logsumexp(q k_p^T)`` over the unchosen prompts, which brings the
denominator back: the same numbers on ``scaled_dot_product_attention``, with a bias for each pair and head.

The other two forms keep nothing for each pair of tokens.  On CPUs, PyTorch's flash attention takes the tokens and plain
products the few prompts; the log-sums of both merge them.  Flash attention's gradient with the merged output and
log-sum is that of its part.  The Triton kernels do all in one.  Second derivatives are those of the reference, and
transforms of ``torch.func`` see the fused form.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import in_order, same_strides, tokens_first
from .attention import attention
from .backend import KernelModule, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_prompt_attention_kernels")
MAX_HEAD_SIZE = 128  # of the Triton kernels


def reference_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, chosen: Tensor, scale: float, drop: float = 0.0
) -> Tensor:
    """Attention to tokens and prompts whose weights of unchosen prompts are dropped after the softmax; in words.

    Args:
        q: Queries ``[B, h, N, d]``.
        k: Keys of the tokens ``[B, h, N, d]``.
        v: Values of the tokens, likewise.
        k_prompt: Keys of the prompts ``[B or 1, h, P, d]``.
        v_prompt: Values of the prompts, likewise.
        chosen: ``[B, N, P]``, True where a token keeps a prompt.
        scale: Factor of the logits.
        drop: Dropout rate of the weights.

    Returns:
        ``[B, h, N, d]``.
    """
    n = k.shape[2]
    q = q * scale
    weight = torch.cat([q @ k.transpose(-2, -1), q @ k_prompt.transpose(-2, -1)], -1).softmax(-1)
    if drop > 0.0:  # even a rate of 0 draws, which vmap refuses
        weight = F.dropout(weight, drop)
    return weight[..., :n] @ v + (weight[..., n:] * chosen.unsqueeze(1)) @ v_prompt


def _fused_form(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, chosen: Tensor, scale: float, drop: float
) -> Tensor:
    batch, heads, n, _ = k.shape
    chosen = chosen.unsqueeze(1)
    logits = ((q * scale) @ k_prompt.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    sink = torch.logsumexp(logits.masked_fill(chosen, -math.inf), -1, keepdim=True).to(q.dtype)
    left_out = torch.zeros_like(chosen, dtype=q.dtype).masked_fill(~chosen, -math.inf).expand(-1, heads, -1, -1)
    bias = F.pad(torch.cat([left_out, sink], -1), [n, 0])  # 0 for tokens
    k = F.pad(torch.cat([k, k_prompt.expand(batch, -1, -1, -1)], 2), [0, 0, 0, 1])
    v = F.pad(torch.cat([v, v_prompt.expand(batch, -1, -1, -1)], 2), [0, 0, 0, 1])
    return attention(q, k, v, bias, drop, scale)


def _prompt_logits(q: Tensor, k_prompt: Tensor, scale: float) -> Tensor:
    """``[B, h, N, P]`` in float32, or float64 where the queries are float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) * scale) @ k_prompt.to(dtype).transpose(-2, -1)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, chosen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = same_strides(q, k, v)
    tokens, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    logits = _prompt_logits(q, k_prompt, scale)
    joint = torch.logaddexp(lse, logits.logsumexp(-1))
    weight = logits.sub_(joint.unsqueeze(-1)).exp_().mul_(chosen.unsqueeze(1))
    prompts = weight @ v_prompt.to(weight.dtype)
    out = tokens_first(q)
    out.copy_(prompts.addcmul_(tokens.to(weight.dtype), lse.sub(joint).exp_().unsqueeze(-1)))
    return out, joint.contiguous()


def _flash_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    chosen: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, k, v), dout = same_strides(q, k, v), in_order(dout)
    # the tokens' part is the gradient of attention whose output and log-sum have the prompts in them already
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, False, scale=scale)
    weight = _prompt_logits(q, k_prompt, scale).sub_(lse.unsqueeze(-1)).exp_()
    wide, kept = dout.to(weight.dtype), chosen.unsqueeze(1)
    dlogits = (wide @ v_prompt.to(weight.dtype).transpose(-2, -1)).mul_(kept)
    dlogits.sub_((wide * out).sum(-1, keepdim=True)).mul_(weight).mul_(scale)
    dv_prompt = weight.mul_(kept).transpose(-2, -1) @ wide
    dk_prompt = dlogits.transpose(-2, -1) @ q.to(weight.dtype)
    if k_prompt.shape[0] < q.shape[0]:
        dk_prompt, dv_prompt = dk_prompt.sum(0, keepdim=True), dv_prompt.sum(0, keepdim=True)
    dq.add_(dlogits @ k_prompt.to(weight.dtype))
    dq, dk, dv, dk_prompt, dv_prompt = (in_order(t.to(q.dtype)) for t in (dq, dk, dv, dk_prompt, dv_prompt))
    return dq, dk, dv, dk_prompt, dv_prompt


@operator
def _prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, chosen: Tensor, scale: float, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the log-sum of each token's logits ``[B, h, N]``, and for kernels ``chosen`` as bits ``[B, N, P / 32]``.

    The log-sum of the kernels is in base 2.
    """
    if form == "triton":
        return kernels.kernel_forward(q, k, v, k_prompt, v_prompt, chosen=chosen, scale=scale)
    with without_autocast(q):
        return *_flash_forward(q, k, v, k_prompt, v_prompt, chosen, scale), q.new_empty(0, dtype=torch.int32)


@torch.library.register_fake("vizoo::prompt_attention")
def _(q, k, v, k_prompt, v_prompt, chosen, scale, form):
    if form == "triton":
        return kernels.empty_outputs(q, chosen)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return tokens_first(q), lse, q.new_empty(0, dtype=torch.int32)


@operator
def _prompt_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    chosen: Tensor,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if form == "triton":
        return kernels.kernel_backward(dout, out, lse, kept, q, k, v, k_prompt, v_prompt, scale=scale)
    with without_autocast(q):
        return _flash_backward(dout, out, lse, q, k, v, k_prompt, v_prompt, chosen, scale)


@torch.library.register_fake("vizoo::prompt_attention_backward")
def _(dout, out, lse, kept, q, k, v, k_prompt, v_prompt, chosen, scale, form):
    return tuple(tokens_first(t) for t in (q, k, v, k_prompt, v_prompt))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.form = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dout, *_):
    *results, q, k, v, k_prompt, v_prompt, chosen = ctx.saved_tensors
    tensors = q, k, v, k_prompt, v_prompt
    if torch.is_grad_enabled():  # create_graph=True
        form = partial(reference_prompt_attention, chosen=chosen, scale=ctx.scale)
        with without_autocast(dout):
            gradients = plain_gradients(form, tensors, dout, ctx.needs_input_grad[:5])
        return *gradients, None, None, None
    return *_prompt_attention_backward(dout, *results, *tensors, chosen, ctx.scale, ctx.form), None, None, None


torch.library.register_autograd("vizoo::prompt_attention", _differentiate, setup_context=_save)


@register_cost("vizoo::prompt_attention", torch.ops.vizoo.prompt_attention)
def _(q, k, v, k_prompt, *rest, out=None) -> Cost:
    # what the fused form counts in plain operators, so that a model's counts are the same on every device
    B, h, N, D = q
    scores, again = B * h * N * (N + k_prompt[2] + 1), B * h * N * k_prompt[2]  # with its sink, and logits for that
    return Cost(macs=(2 * scores + again) * D, other=5 * scores, acts=scores + again + B * h * N * D)


@register_cost("vizoo::prompt_attention_backward", torch.ops.vizoo.prompt_attention_backward)
def _(dout, o, lse, kept, q, k, v, k_prompt, *rest, out=None) -> Cost:
    B, h, N, D = q  # the gradients' products; the recomputed weights are not counted, so that no path counts more
    scores, again = B * h * N * (N + k_prompt[2] + 1), B * h * N * k_prompt[2]
    return Cost(macs=2 * (2 * scores + again) * D, other=5 * scores)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    chosen: Tensor,
    scale: float,
    drop: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_prompt_attention` without the weights of all pairs in memory: same result.

    Exported, traced and scripted graphs, transforms of ``torch.func``, dropout, and devices without a form of their own
    take ``scaled_dot_product_attention`` with a bias, where each token needs an unchosen prompt.

    Args:
        q: Queries ``[B, h, N, d]``.
        k: Keys of the tokens ``[B, h, N, d]``.
        v: Values of the tokens, likewise.
        k_prompt: Keys of the prompts ``[B or 1, h, P, d]``.
        v_prompt: Values of the prompts, likewise.
        chosen: ``[B, N, P]``, True where a token keeps a prompt.
        scale: Factor of the logits.
        drop: Dropout rate of the weights.
        backend: ``"torch"``, ``"triton"`` (``scale > 0``, no dropout, no float64, ``d`` a multiple of 16 up to 128), or
            ``"auto"``: Triton where it can run.

    Returns:
        ``[B, h, N, d]``.

    Raises:
        ValueError: If ``backend`` is unknown or cannot run.
    """
    if not torch.jit.is_scripting():
        kernels = use_triton(backend, v, _kernel_limits(v, scale, drop))
        form = "triton" if kernels else "flash" if v.device.type == "cpu" and drop == 0 else "fused"
        if form != "fused" and not plain_only() and v.numel() > 0:
            tensors = [t.to(v.dtype) for t in (q, k, v, k_prompt, v_prompt)]  # autocast norms queries in float32
            return _prompt_attention(*tensors, chosen, scale, form)[0]
    return _fused_form(q, k, v, k_prompt, v_prompt, chosen, scale, drop)


def _kernel_limits(v: Tensor, scale: float, drop: float) -> str:
    """What the Triton kernels cannot do with these values; empty if nothing."""
    if scale <= 0:
        return f"the kernels take positive scales, not {scale}"
    if drop > 0:
        return "the kernels have no dropout"
    if v.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {v.dtype}"
    if v.shape[3] > MAX_HEAD_SIZE or v.shape[3] % 16 != 0:
        return f"the kernels take 16 channels per head, 32 and so on up to {MAX_HEAD_SIZE}, not {v.shape[3]}"
    return ""
