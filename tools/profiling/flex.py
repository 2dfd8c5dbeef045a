"""FlexAttention while a model is counted: one operator on every device, forward and backward, whatever its mask.

The full matrix of scores is counted, as of any attention: blocks that a mask skips on a GPU are not taken off.  What
modifies a score is run once, on a score without axes, and costs that for every score; so does the mask, and 1 more.
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
from vizoo.tools.profiling.prices import price_of

_MODULE = "torch.nn.attention.flex_attention"


@contextlib.contextmanager
def flex_as_operator() -> Iterator[None]:
    """Let ``flex_attention`` reach its operator on every device, and neither compile nor warn; restore that."""
    module = sys.modules.get(_MODULE)  # its import is slow, and a model that uses it has done it
    if module is None:
        yield
        return
    make_mask = module._create_empty_block_mask

    def unseen_mask(q: Tensor, k: Tensor) -> Any:
        with _disable_current_modes(), getattr(q, "fake_mode", contextlib.nullcontext()):
            return make_mask(q, k)

    others = {
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


class _Attention(torch.autograd.Function):
    """Attention at a given cost; the one modified score leads gradients to what modifies it."""

    @staticmethod
    def forward(ctx: Any, recorder: Any, cost: Cost, run: Callable[[], Any], modified: Any, *qkv: Tensor) -> Any:
        ctx.recorder, ctx.cost, ctx.modified = recorder, cost, modified
        ctx.save_for_backward(*qkv)
        out, sums, largest = run()
        ctx.mark_non_differentiable(largest)
        return out, sums, largest

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [*ctx.saved_tensors, grads[0]]
        with _disable_current_modes():  # nobody asks for numbers of gradients
            found = [torch.zeros_like(t) for t in ctx.saved_tensors]
            modified = torch.zeros_like(ctx.modified)
        ctx.recorder.origins.write([modified], True)
        ctx.recorder.charge("higher_order::flex_attention_backward", ctx.cost, given, found)
        return None, None, None, modified, *found


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
        with _disable_current_modes():
            if recorder.engine == "real":
                return op.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd](q, k, v, *args)
            rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
            return _laid_out_as(q, v.shape[-1]), rows, torch.empty_like(rows)

    score_mod, block_mask, buffers = args[0], args[1], [t for a in args[4:] for t in a if isinstance(t, Tensor)]
    modified, flops = _modified_once(recorder, q, score_mod, block_mask[-1], *args[4:])
    scores = q.shape[:-1].numel() * k.shape[-2]
    cost = COSTS["aten::scaled_dot_product_attention"](q.shape, k.shape, v.shape)
    back = COSTS["aten::_scaled_dot_product_flash_attention_backward"](None, q.shape, k.shape, v.shape)
    back = back._replace(other=back.other + 2 * flops * scores)
    out = _Attention.apply(recorder, back, run, modified, q, k, v)
    recorder.origins.write(out, True)
    recorder.charge(
        "higher_order::flex_attention", cost._replace(other=cost.other + flops * scores), [q, k, v, *buffers], [out[0]]
    )
    return out


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
