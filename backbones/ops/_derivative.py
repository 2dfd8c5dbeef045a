"""Gradients that can be differentiated again: what every operator with kernels of its own does under ``create_graph``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
