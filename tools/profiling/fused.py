"""Layers that count as one operator on every device, forward and backward: FlexAttention and recurrent layers.

Of attention the full matrix of scores is counted: blocks that a mask skips on a GPU are not taken off.  What modifies
a score is run once, on a score without axes, and costs that for every score; so does the mask, and 1 more.  The
backward pass of a recurrent layer goes through all steps, for the gradients that are needed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vizoo.backbones.ops.cost import COSTS, Cost
from vizoo.tools.profiling.contractions import recurrent_backward
from vizoo.tools.profiling.prices import price_of

_MODULE = "torch.nn.attention.flex_attention"


@contextlib.contextmanager
def flex_as_operator() -> Iterator[None]:
    """Let ``flex_attention`` reach its operator on every device, and neither compile nor warn; restore that."""
    module = sys.modules.get(_MODULE)  # its import is slow, and a model that uses it has done it
    if module is None:
        yield
        return
    make_mask = getattr(module, "_create_empty_block_mask", None)

    def unseen_mask(q: Tensor, k: Tensor) -> Any:
        assert make_mask is not None
        with _disable_current_modes(), getattr(q, "fake_mode", contextlib.nullcontext()):
            return make_mask(q, k)

    others: dict[str, Any] = {
        "_create_empty_block_mask": unseen_mask,
        "_validate_device": lambda *args: None,
        "_warn_once": lambda *args, **kwargs: None,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
    }
    with mock.patch.multiple(module, **{name: other for name, other in others.items() if hasattr(module, name)}):
        yield


class _Prices(TorchDispatchMode):
    """Sums the other FLOPs of what runs in it, and keeps what that makes."""

    def __init__(self) -> None:
        super().__init__()
        self.other = 0
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        price = price_of(func, func._schema.name)
        if isinstance(out, Tensor):
            self.made.append(out)
            shapes = [a.shape if isinstance(a, Tensor) else a for a in args]
            self.other += price(*shapes, out=out.shape).other if price is not None else 0
        return out


class _Fused(torch.autograd.Function):
    """Results of ``run``, whose backward pass is charged as one operator; its gradients hold no numbers.

    ``run`` charges the forward pass, before anything is saved: a checkpoint that runs it again stops it there.
    """

    @staticmethod
    def forward(ctx: Any, recorder: Any, name: str, back: Callable[..., Cost], run: Any, *inputs: Tensor) -> Any:
        ctx.recorder, ctx.name, ctx.back = recorder, name, back
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        with _disable_current_modes():
            return run()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            ctx.recorder.tell(f"gradients of {ctx.name} in {{where}} have a graph: differentiating them is not counted")
        needed, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        with _disable_current_modes():  # nobody asks for numbers of gradients
            found = [torch.zeros_like(t) if need else None for t, need in zip(saved, needed, strict=True)]
        given = [*saved, *(g for g in grads if g is not None)]
        ctx.recorder.charge(f"{ctx.name}_backward", ctx.back(*needed), given, [t for t in found if t is not None])
        return None, None, None, None, *found


def run_flex_attention(recorder: Any, op: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Any:
    """Run the operator of ``flex_attention`` and charge its cost.

    Args:
        recorder: What records the count.
        op: The operator.
        q: Queries ``[B, heads, queries, d]``.
        k: Keys ``[B or 1, groups, keys, d]``.
        v: Values ``[B or 1, groups, keys, dv]``.
        *args: Its other arguments: what modifies a score, blocks of the mask with the mask itself at the end, scale,
            options, and buffers of both functions.

    Returns:
        What the operator returns: output, logarithms of sums and largest scores; empty where there are no numbers.
    """

    def run() -> Any:
        if recorder.engine == "real":
            out = op.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd](q, k, v, *args)
        else:
            rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
            out = _laid_out_as(q, v.shape[-1]), rows, torch.empty_like(rows)
        recorder.origins.write(out, True)
        recorder.charge(name, cost, [q, k, v, *buffers], [out[0]])
        return out

    modified, flops = _modified_once(recorder, q, args[0], args[1][-1], *args[4:])
    flops *= q.shape[:-1].numel() * k.shape[-2]
    cost = COSTS["aten::scaled_dot_product_attention"](q.shape, k.shape, v.shape)
    back = COSTS["aten::_scaled_dot_product_flash_attention_backward"](None, q.shape, k.shape, v.shape)
    cost, back = cost._replace(other=cost.other + flops), back._replace(other=back.other + 2 * flops)
    name, buffers = "higher_order::flex_attention", [t for found in args[4:] for t in found if isinstance(t, Tensor)]
    return _Fused.apply(recorder, name, lambda *needed: back, run, q, k, v, modified)


def _laid_out_as(q: Tensor, d: int) -> Tensor:
    """An empty output with the layout of the queries."""
    B, h, n, _ = q.shape
    return q.new_empty(B, n, h, d).transpose(1, 2) if q.stride(1) < q.stride(2) else q.new_empty(B, h, n, d)


def _modified_once(
    recorder: Any, q: Tensor, score_mod: Any, mask: Any, score_buffers: Any = (), mask_buffers: Any = ()
) -> tuple[Tensor, int]:
    """One modified score, and the FLOPs of modifying and masking a score."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.nn.attention.flex_attention import noop_mask

    with _disable_current_modes(), TransformGetItemToIndex(), _Prices() as prices:
        places = [q.new_zeros((), dtype=torch.int) for _ in range(4)]
        modified = score_mod(q.new_zeros(()), *places, *score_buffers)
        mask(*places, *mask_buffers)
    recorder.origins.write(prices.made, True)
    return modified, prices.other + (mask is not noop_mask)


def run_recurrent(recorder: Any, func: Any, x: Tensor, *args: Any) -> Any:
    """Run a recurrent layer and charge its cost, by :mod:`vizoo.tools.profiling.contractions`.

    Args:
        recorder: What records the count.
        func: ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: The input, or the data of packed sequences.
        *args: Its other arguments.

    Returns:
        What the function returns: output and states; empty where there are no numbers.
    """
    at = next(i for i, value in enumerate(args) if isinstance(value, bool))  # where it says whether there are biases
    weights, layers, directions = args[at - 1], args[at + 1], 1 + args[at + 4]
    states = [args[at - 2]] if isinstance(args[at - 2], Tensor) else args[at - 2]
    name, shapes = f"aten::{func.__name__}", [w.shape for w in weights]

    def run() -> Any:
        made = (*x.shape[:-1], directions * states[0].shape[-1]), *(h.shape for h in states)
        out = func(x, *args) if recorder.engine == "real" else tuple(map(x.new_empty, made))
        recorder.charge(name, cost, [x, *states, *weights], list(out))
        return out

    def back(needs_x: bool, *needs: bool) -> Cost:
        needed = needs_x, needs[0], needs[len(states) :]
        return recurrent_backward(cost, x.shape, states[0].shape, shapes, layers, directions, *needed)

    cost = COSTS[name](x.shape, shapes, *args[at:])
    with _without_onednn():
        return _Fused.apply(recorder, name, back, run, x, *states, *weights)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Without its warnings of what it does not support."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
