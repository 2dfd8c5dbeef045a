"""Handlers with which fvcore, the second engine, counts every contraction of a trace, to the last digit.

They read shapes and values from the trace.  What fvcore brings itself is rounded (``einsum``), wrong for operands that
are broadcast, complex or have one dimension (``matmul``, ``linear``), or missing.  Operators that the dispatcher takes
apart, and a trace does not, are taken apart here on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops.cost import COSTS, find_operator, flop_formulas

Handler = Callable[[Any, Any], int]

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "aten::add": lambda a, b, *rest: a + b,
    "aten::sub": lambda a, b, *rest: a - b,
    "aten::mul": lambda a, b: a * b,
    "aten::floor_divide": lambda a, b: a // b,
    "aten::remainder": lambda a, b: a % b,
    "aten::neg": lambda a: -a,
}


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.type().sizes())


def _empty(value: Any) -> torch.Tensor:
    return torch.empty(_shape(value), dtype=value.type().dtype(), device="meta")


def _read(value: Any, tensor: Callable[[Any], Any] = _shape) -> Any:
    """What ``tensor`` makes of a traced tensor, or the value of a traced constant or of arithmetic on sizes."""
    node = value.node()
    kind, inputs = node.kind(), list(node.inputs())
    if kind == "aten::size" and len(inputs) == 2:
        return _shape(inputs[0])[_read(inputs[1])]
    if kind in ("prim::NumToTensor", "aten::Int", "aten::ScalarImplicit", "aten::IntImplicit"):
        return _read(inputs[0])
    if kind in _ARITHMETIC and value.isCompleteTensor() and not value.type().sizes():
        return _ARITHMETIC[kind](*map(_read, inputs))
    if value.isCompleteTensor():
        return tensor(value)
    if kind in ("prim::ListConstruct", "prim::TupleConstruct"):
        return [_read(v, tensor) for v in inputs]
    return value.toIValue()


def _arguments(inputs: Any, outputs: Any, tensor: Callable[[Any], Any] = _shape) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a traced operator."""
    schema = torch._C.parse_schema(outputs[0].node().schema())
    named = [(a, _read(v, tensor)) for a, v in zip(schema.arguments, inputs, strict=False)]
    return [v for a, v in named if not a.kwarg_only], {a.name: v for a, v in named if a.kwarg_only}


def _times(inputs: Any) -> int:
    """Products of real numbers in one of the numbers of a contraction: four of complex ones."""
    of_lists = [v for i in inputs if i.node().kind() == "prim::ListConstruct" for v in i.node().inputs()]
    tensors = [v for v in (*inputs, *of_lists) if v.isCompleteTensor()]
    return 4 if any(v.type().dtype().is_complex for v in tensors) else 1


def _counted(macs: Callable[..., int]) -> Handler:
    """Handler for a function of the arguments, tensors as shapes, and of ``out``, the shape of the first output."""

    def handler(inputs: Any, outputs: Any) -> int:
        args, kwargs = _arguments(inputs, outputs)
        return _times(inputs) * macs(*args, **{**kwargs, "out": _read(outputs[0])})

    return handler


def _refused(inputs: Any, outputs: Any) -> int:
    raise ValueError("it calls a function of TorchScript, which fvcore does not see into")


def _apart(inputs: Any, outputs: Any) -> int:
    """Count an operator by what PyTorch makes of it."""
    schema = torch._C.parse_schema(outputs[0].node().schema())
    op = getattr(find_operator(schema.name), schema.overload_name or "default")
    args, kwargs = _arguments(inputs, outputs, _empty)
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with torch.no_grad(), counter:
        op(*args, **kwargs)
    return _times(inputs) * counter.get_total_flops() // 2


def _addmm(x: Any, a: Any, b: Any, out: Any = None, **kwargs: Any) -> int:
    return prod(a) * b[-1]


def _rows(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> int:
    """Each number of the result is the product of a row of the first operand and something as long."""
    return prod(out) * x[-1]


def _einsum(equation: str, shapes: Any, path: Any = None, out: Any = None) -> int:
    """Products of two operands at a time, by the path of the call or from left to right.

    A product counts the ranges of all its labels if it sums over one that both operands have; else it is elementwise,
    or an outer one.  A label to be summed that is left in one operand alone is summed before.
    """
    terms, kept = _labels(equation, shapes)
    # a label of size 1 is none: it is broadcast
    operands = [{c: n for c, n in zip(term, s, strict=True) if n != 1} for term, s in zip(terms, shapes, strict=True)]
    left = Counter(c for operand in operands for c in operand if c not in kept)
    steps, macs = list(path or []), 0
    while len(operands) > 1:
        i, j = sorted((steps.pop(0), steps.pop(0))) if path else (0, 1)
        b, a = operands.pop(j), operands.pop(i)
        alone = {c for c in (a.keys() ^ b.keys()) - kept if left[c] == 1}
        left -= Counter((a.keys() & b.keys()) - kept)
        summed = {c for c in (a.keys() & b.keys()) - kept if left[c] == 1}
        together = {c: n for c, n in {**a, **b}.items() if c not in alone}
        macs += prod(together.values()) if summed else 0
        operands.insert(len(operands) if path else 0, {c: n for c, n in together.items() if c not in summed})
    return macs


def _labels(equation: str, shapes: Sequence[Any]) -> tuple[list[list[str]], set[str]]:
    """Labels of each operand, those of an ellipsis numbered from its end, and the labels of the result."""
    given, arrow, kept = equation.replace(" ", "").partition("->")
    terms = []
    for term, shape in zip(given.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        covered = len(shape) - len(before) - len(after) if dots else 0
        terms.append([*before, *(f".{n}" for n in range(covered, 0, -1)), *after])
    every = Counter(c for term in terms for c in term)
    dotted = {c for c in every if c.startswith(".")}
    if not arrow:
        return terms, dotted | {c for c, n in every.items() if n == 1}
    return terms, set(kept.replace("...", "")) | (dotted if "..." in kept else set())


_ROWS = "linear matmul linalg_matmul mm bmm cov corrcoef"
_APART = """_convolution_mode inner tensordot bilinear chain_matmul linalg_multi_dot linalg_vecdot linalg_matrix_power
matrix_power pdist"""
_NO_CONTRACTION = """batch_norm layer_norm group_norm instance_norm rms_norm adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d upsample_nearest2d upsample_bilinear2d grid_sampler"""


def handlers(contractions: bool) -> dict[str, Handler]:
    """Handlers by the operator's name.

    Args:
        contractions: Count contractions only; False leaves out what switches fvcore's own norms and pooling off.

    Returns:
        Functions of the inputs and outputs of a traced operator.
    """
    found = {"prim::CallFunction": _refused, **{name: _counted(_macs_of(name)) for name in COSTS}}
    found |= {f"aten::{name}": _apart for name in _APART.split()}
    found |= {f"aten::{name}": _counted(_rows) for name in _ROWS.split()}
    own: dict[str, Callable[..., int]] = {"addmm": _addmm, "einsum": _einsum}
    found |= {f"aten::{name}": _counted(macs) for name, macs in own.items()}
    # fvcore ignores a handler of None where it has a default
    found |= {f"aten::{name}": lambda inputs, outputs: 0 for name in _NO_CONTRACTION.split() if contractions}
    return found


def _macs_of(name: str) -> Callable[..., int]:
    return lambda *args, **kwargs: COSTS[name](*args, **kwargs).macs
