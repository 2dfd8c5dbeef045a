"""Derivatives of every order for operators whose fast form has the first one only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def plain_gradients(
    form: Callable[..., Tensor], tensors: Sequence[Tensor | None], dout: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of a plain form of an operator, as part of the graph.

    A backward pass runs with gradients enabled only under ``create_graph=True``; kernels have no second derivative
    then, PyTorch's own operators have.

    Args:
        form: The operator in differentiable PyTorch, a function of ``tensors``.
        tensors: Its inputs; None stays None.
        dout: Gradient of its output.
        needed: Which inputs need a gradient.

    Returns:
        A gradient for each of ``tensors``, None where none is needed.
    """
    # views keep the inputs apart: one may have been made from another
    views = [t if t is None else t.view_as(t) for t in tensors]
    wanted = [v for v, need in zip(views, needed, strict=True) if need and v is not None]
    found = iter(torch.autograd.grad(form(*views), wanted, dout, create_graph=True, allow_unused=True))
    return [next(found) if need and v is not None else None for v, need in zip(views, needed, strict=True)]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Any, plain: Any, *tensors: Tensor) -> Tensor:
        ctx.forms = fast, plain
        ctx.save_for_backward(*tensors)
        ctx.inner = _record(fast, tensors, ctx.needs_input_grad[2:])
        return ctx.inner[1].detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        fast, plain = ctx.forms
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *plain_gradients(plain, ctx.saved_tensors, dout, needed)
        # let go of it now, as autograd lets go of what a node has saved; a second pass records it again
        leaves, out = ctx.inner or _record(fast, ctx.saved_tensors, needed)
        ctx.inner = None
        found = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], dout, allow_unused=True))
        return None, None, *(next(found) if t.requires_grad else None for t in leaves)


def _record(fast: Any, tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Tensor], Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        return leaves, fast(*leaves)


def differentiable(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``fast(*tensors)``, with the second derivatives of ``plain``.

    Args:
        fast: The form that runs, differentiable once.
        plain: The same in operators that are differentiable as often as one likes.
        *tensors: Arguments of both.

    Returns:
        What ``fast`` returns.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not wanted or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return fast(*tensors)
    return _Twice.apply(fast, plain, *tensors)
