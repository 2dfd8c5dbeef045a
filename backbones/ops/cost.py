"""What one call of an operator costs: the single registry that both engines of the profiler read.

Operators register their cost here, beside their kernel; nothing in this file imports a tool.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


class Cost(NamedTuple):
    """Cost of one operator call.

    Attributes:
        macs: Multiply-accumulates of contractions, the profiler's headline; one is 2 FLOPs.
        other: FLOPs that belong to no contraction: softmax, norm, activation, interpolation, bias.
        acts: Elements of contraction results, scores of attention included; None means the first output.
        bytes: Bytes read and written; None means inputs and outputs.
    """

    macs: int = 0
    other: int = 0
    acts: int | None = None
    bytes: int | None = None


CostFn = Callable[..., Cost]
COSTS: dict[str, CostFn] = {}  # by qualified name; filled by register_cost, and at the end of this file


def register_cost(name: str, op: Any = None) -> Callable[[CostFn], CostFn]:
    """Register the cost of an operator, forward or backward, for every engine of the profiler.

    The decorated function receives the operator's arguments as in its schema, each tensor replaced by its shape and
    every other argument as its value, and the keyword ``out``, the shape of the first output.  PyTorch leaves out
    trailing arguments that are at their defaults, so the function repeats the defaults of the schema.  A second
    registration of a name replaces the first.

    Args:
        name: Qualified operator name without overload, for example ``"vizoo::hifi_attention"``.
        op: The operator packet (``torch.ops.vizoo.hifi_attention``); None looks it up by name, now for every
            ``FlopCounterMode`` and again at each count, so an operator may also be defined later.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: If ``name`` has no namespace.
    """
    if "::" not in name:
        raise ValueError(f"got name {name!r}, need 'namespace::operator'")

    def decorate(fn: CostFn) -> CostFn:
        COSTS[name] = fn
        _tell_flop_counter(name, op)
        return fn

    return decorate


def _tell_flop_counter(name: str, op: Any = None) -> None:
    """Give PyTorch's counters, which work by dispatch, the formula of an operator for which they have none."""
    packet = op if op is not None else find_operator(name)
    if packet is not None and packet not in flop_registry:  # a second registration would raise
        register_flop_formula(packet)(_formula(name))


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of all registered operators that exist by now, as ``custom_mapping`` of ``FlopCounterMode``."""
    return {packet: _formula(name) for name in COSTS if (packet := find_operator(name)) is not None}


def first_shape(shapes: Any) -> Any:
    """Shape of the first output: ``shapes`` itself, or its first entry when an operator returns several tensors."""
    nested = isinstance(shapes, (tuple, list)) and not isinstance(shapes, torch.Size) and bool(shapes)
    return shapes[0] if nested and not isinstance(shapes[0], int) else shapes


def find_operator(name: str) -> Any:
    """The operator packet of a qualified name; None when it is not defined."""
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short, None)


def _formula(name: str) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * COSTS[name](*args, **{**kwargs, "out": first_shape(out_shape)}).macs

    return formula


def windows_cost(scores: int, q: Any, v: Any) -> Cost:
    """Cost of attention over windows.

    Args:
        scores: Pairs of a query and a key, times heads and images.
        q: Shape of the queries, channels last.
        v: Shape of the values, channels last.

    Returns:
        Cost of the forward pass.
    """
    return Cost(macs=scores * (q[-1] + v[-1]), other=5 * scores, acts=scores + prod(q[:-1]) * v[-1])


def windows_backward_cost(scores: int, q: Any, v: Any) -> Cost:
    """Cost of the backward pass of attention over windows; the arguments are those of :func:`windows_cost`."""
    return Cost(macs=scores * (3 * q[-1] + 2 * v[-1]), other=10 * scores, acts=2 * scores)


# contractions of other libraries that FlopCounterMode or fvcore does not know, or counts on some devices only


def _sdpa(q: Any, k: Any, v: Any, mask: Any = None, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    mask = kwargs.get("attn_mask", mask)
    masked = isinstance(mask, (tuple, list))  # a shape; the fused kernels have other arguments in its place
    scores = prod(q[:-1]) * k[-2]
    return Cost(
        macs=scores * (q[-1] + v[-1]),
        other=prod(q) + (6 if masked else 5) * scores,  # scaling, softmax, mask
        acts=scores + prod(q[:-1]) * v[-1],
    )


def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    scores = prod(q[:-1]) * k[-2]  # recomputed; then the gradients of v, of the scores, of q and of k
    return Cost(macs=scores * (3 * q[-1] + 2 * v[-1]), other=2 * (prod(q) + 5 * scores), acts=2 * scores)


def _conv_backward(
    grad: Any,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
    out: Any = None,
    **kwargs: Any,
) -> Cost:
    mask = args[2]  # which of the gradients of x, w and bias; PyTorch's own formula forgets the groups of that of w
    forward = prod(x if transposed else grad) * prod(w[1:])
    return Cost(macs=forward * (mask[0] + mask[1]), other=prod(grad) * mask[2])


def _baddbmm(x: Any, a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(a) * b[-1], other=prod(out))


def _addmv(x: Any, a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(a), other=prod(out))


def _vector_product(a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(a))


def _cdist(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * a[-1])


def _multi_head(q: Any, k: Any, v: Any, C: int, heads: int, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    queries, keys = prod(q[:-1]), prod(k[:-1])
    scores = heads * queries * k[-2]
    projections = 2 * (queries + keys) * C * C  # query and output, key and value
    return Cost(
        macs=projections + 2 * scores * (C // heads),
        other=5 * scores + queries * C,
        acts=3 * queries * C + 2 * keys * C + scores,
    )


def _encoder_layer(x: Any, C: int, heads: int, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    attention = _multi_head(x, x, x, C, heads)
    tokens, hidden = prod(x[:-1]), args[12][0]
    gelu = 8 if args[4] else 1
    return Cost(
        macs=attention.macs + 2 * tokens * C * hidden,
        other=attention.other + tokens * (12 * C + gelu * hidden),  # two norms, two residuals
        acts=(attention.acts or 0) + tokens * (hidden + C),
    )


def _deform_conv2d(x: Any, weight: Any, offset: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    taps = weight[2] * weight[3]
    samples = taps * x[1] * out[0] * out[2] * out[3]
    modulated = bool(args) and args[-1] is True
    return Cost(
        macs=prod(out) * weight[1] * taps,
        other=(8 + modulated) * samples + prod(out),  # four corners, multiply and add; mask; bias
    )


def _epilogue(n: int, bias: Any, activation: str) -> int:
    return n * ((bias is not None) + {"none": 0, "gelu": 8, "relu": 1, "add": 1, "sum": 1, "mul": 1}.get(activation, 5))


def _linear_pointwise(
    x: Any, w: Any, bias: Any, attr: Any = "none", *args: Any, out: Any = None, **kwargs: Any
) -> Cost:
    if bias is not None and len(bias) > 1:  # what is added stands before the weight
        bias, attr = attr, args[0]
    return Cost(macs=prod(x) * out[-1], other=_epilogue(prod(out), bias, attr))


def _conv_pointwise(x: Any, w: Any, bias: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    binary = bias is not None and len(bias) > 1  # then these are the input, or what is added to it, and the weight
    if binary:
        w, bias, args = bias, args[0], args[1:]
    attr = args[4] if len(args) > 4 else "none"  # after padding, stride, dilation and groups
    return Cost(macs=prod(out) * prod(w[1:]), other=_epilogue(prod(out), bias, attr))


def _natten(q: Any, k: Any, v: Any, kernel_size: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_cost(prod(q[:-1]) * prod(kernel_size), q, v)


def _natten_backward(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_backward_cost(prod(q[:-1]) * prod(args[3]), q, v)  # after the output, its gradient and the log-sum


def _permuted_scores(q: Any, kernel_size: Any, stride: Any, dilation: Any, *args: Any) -> int:
    # q is [images * dilation groups, padded tokens, heads, d]; the map's own size follows two padded ones
    return q[0] // prod(dilation) * prod(args[4]) * q[2] * prod(kernel_size)


def _natten_permuted(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_cost(_permuted_scores(q, *args), q, v)


def _natten_permuted_backward(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_backward_cost(_permuted_scores(q, *args[3:]), q, v)


def _natten_dense(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_cost(prod(q[:-1]) * k[1], q, v)  # its plain attention, when the window is the map


def _natten_dense_backward(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return windows_backward_cost(prod(q[:-1]) * k[1], q, v)


_FUSED = [
    f"aten::_scaled_dot_product_{f}_attention{cpu}"
    for f, cpu in (("flash", ""), ("flash", "_for_cpu"), ("efficient", ""), ("cudnn", ""))
]
_PERMUTED = ("hopper", "blackwell")
COSTS.update(
    {
        "aten::scaled_dot_product_attention": _sdpa,
        **dict.fromkeys(_FUSED, _sdpa),
        **{f"{name}_backward": _sdpa_backward for name in _FUSED},
        "aten::convolution_backward": _conv_backward,
        "aten::baddbmm": _baddbmm,
        "aten::addmv": _addmv,
        **dict.fromkeys(("aten::mv", "aten::dot", "aten::vdot"), _vector_product),
        **dict.fromkeys(("aten::cdist", "aten::_cdist_forward", "aten::_euclidean_dist"), _cdist),
        "aten::_native_multi_head_attention": _multi_head,
        "aten::_transformer_encoder_layer_fwd": _encoder_layer,
        "torchvision::deform_conv2d": _deform_conv2d,
        "natten::na2d_forward": _natten,
        "natten::na2d_backward": _natten_backward,
        **{f"natten::{arch}_na2d_forward": _natten_permuted for arch in _PERMUTED},
        **{f"natten::{arch}_na2d_backward": _natten_permuted_backward for arch in _PERMUTED},
        **{f"natten::{arch}fmha_forward": _natten_dense for arch in ("", "hopper_", "blackwell_")},
        **{f"natten::{arch}fmha_backward": _natten_dense_backward for arch in ("", "hopper_", "blackwell_")},
        "mkldnn::_linear_pointwise": _linear_pointwise,
        "mkldnn::_convolution_pointwise": _conv_pointwise,
        "mkldnn::_convolution_pointwise_": _conv_pointwise,
    }
)
for _name in COSTS:
    _tell_flop_counter(_name)
