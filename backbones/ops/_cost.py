"""What one call of an operator costs: the single registry that the profiler's two engines read.

Operators register their cost here, beside their kernel; nothing in this file imports a tool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.flop_counter import flop_registry, register_flop_formula


class Cost(NamedTuple):
    """Cost of one operator call.

    Attributes:
        macs: Multiply-accumulates of contractions (profiler headline; 1 MAC = 2 FLOPs).
        other: FLOPs that belong to no contraction (softmax, norm, interpolation...).
    """

    macs: int = 0
    other: int = 0


CostFn = Callable[..., Cost]
COSTS: dict[str, CostFn] = {}


def register_cost(name: str, op: Any = None) -> Callable[[CostFn], CostFn]:
    """Register the cost of an operator for every engine of the profiler.

    The decorated function receives the operator's arguments in schema order, with each tensor replaced by its shape
    (``tuple[int, ...]``) and every other argument as its value, and the keyword ``out`` with the shape of the first
    output.  It returns a :class:`Cost`.

    Args:
        name: Qualified operator name without overload, for example ``"vizoo::hifi_attention"``.
        op: The operator packet (``torch.ops.vizoo.hifi_attention``) for ``FlopCounterMode``; None when the operator
            exists only for the tracing engine.

    Returns:
        A decorator that returns the function unchanged.
    """

    def decorate(fn: CostFn) -> CostFn:
        COSTS[name] = fn
        if op is not None and op not in flop_registry:  # a second registration would raise

            @register_flop_formula(op)
            def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
                shapes = [tuple(a) if hasattr(a, "__len__") and not isinstance(a, str) else a for a in args]
                return 2 * fn(*shapes, out=out_shape, **kwargs).macs

        return fn

    return decorate
