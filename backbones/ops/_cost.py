"""What one call of an operator costs: the single registry that both engines of the profiler read.

Operators register their cost here, beside their kernel; nothing in this file imports a tool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


class Cost(NamedTuple):
    """Cost of one operator call.

    Attributes:
        macs: Multiply-accumulates of contractions, the profiler's headline; one is 2 FLOPs.
        other: FLOPs that belong to no contraction: softmax, norm, activation, interpolation, bias.
        acts: Elements of contraction results, scores of attention included; None means the first output.
    """

    macs: int = 0
    other: int = 0
    acts: int | None = None


CostFn = Callable[..., Cost]
COSTS: dict[str, CostFn] = {}


def register_cost(name: str, op: Any = None) -> Callable[[CostFn], CostFn]:
    """Register the cost of an operator for every engine of the profiler.

    The decorated function receives the operator's arguments in schema order, each tensor replaced by its shape
    (``torch.Size`` or tuple) and every other argument as its value, and ``out``, the shape of the first output.

    Args:
        name: Qualified operator name without overload, for example ``"vizoo::hifi_attention"``.
        op: The operator packet (``torch.ops.vizoo.hifi_attention``) for ``FlopCounterMode``; None looks it up by name.
            An operator that already has a formula keeps it.

    Returns:
        A decorator that returns the function unchanged.
    """

    def decorate(fn: CostFn) -> CostFn:
        COSTS[name] = fn
        namespace, _, short = name.partition("::")
        packet = op if op is not None else getattr(getattr(torch.ops, namespace), short, None)
        if packet is not None and packet not in flop_registry:  # a second registration would raise

            @register_flop_formula(packet)
            def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
                return 2 * COSTS[name](*args, out=first_shape(out_shape), **kwargs).macs

        return fn

    return decorate


def first_shape(shapes: Any) -> Any:
    """Shape of the first output: ``shapes`` itself, or its first entry when an operator returns several tensors."""
    nested = isinstance(shapes, (tuple, list)) and not isinstance(shapes, torch.Size) and bool(shapes)
    return shapes[0] if nested and not isinstance(shapes[0], int) else shapes
