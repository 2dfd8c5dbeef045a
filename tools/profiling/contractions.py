"""Costs of PyTorch's rarer contractions: recurrent layers, quantised, grouped, sparse and old-fashioned products.

Importing this module adds them to ``vizoo.backbones.ops.cost.COSTS``, for both engines.  A recurrent layer costs what
its plain operators cost, whatever a device fuses.  A quantised product has 2 other FLOPs for each output: its scale and
its bias.  A product with a sparse pattern of 2 in 4 counts as a dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from vizoo.backbones.ops.cost import COSTS, Cost


def _mm(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(a) * b[-1])


def _linear(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * out[-1], other=2 * prod(out))


def _plain_linear(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * out[-1], other=prod(out))


def _conv(x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * prod(w[1:]))


def _transposed(x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * prod(w[1:]))


def _overridden_conv(x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return (_transposed if args[4] else _conv)(x, w, out=out)


def _backward(macs: int, gradients: Any) -> Cost:
    """Each gradient of a product of two costs a forward pass; ``gradients`` says which of them are needed."""
    return Cost(macs=macs * sum(map(bool, gradients)))


# recurrent layers: gates, and other FLOPs of a unit without its biases, where a sigmoid or tanh is 4

_RELU, _TANH, _LSTM, _GRU = (1, 2), (1, 5), (4, 28), (3, 19)
_MODES = (_RELU, _TANH, _LSTM, _GRU)  # as cuDNN, MIOpen and oneDNN number them


def _steps(kind: tuple[int, int], tokens: int, weights: Any) -> Cost:
    """Cost of all steps; ``weights`` are shapes of those of input and state, biases and projections, by layer."""
    gates, flops = kind
    products, biases = [w for w in weights if len(w) == 2], [b for b in weights if len(b) == 1]
    rows = products[0][0]  # of all weights but projections
    units = sum(w[0] == rows for w in products) // 2 * rows // gates
    return Cost(
        macs=tokens * sum(map(prod, products)),
        other=tokens * (flops * units + sum(b[0] for b in biases)),
        acts=tokens * sum(w[0] for w in products),
    )


def _rnn(kind: tuple[int, int]) -> Callable[..., Cost]:
    """Of ``(input, hx, params, has_biases, ...)``, or with the batch sizes of packed sequences after the input."""

    def cost(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
        weights = next(args[i - 1] for i, value in enumerate(args) if isinstance(value, bool))
        return _steps(kind, prod(x[:-1]), weights)

    return cost


def recurrent_backward(
    forward: Cost, x: Any, h: Any, weights: Any, layers: int, directions: int, needs_x: bool, needs_h: bool, needs: Any
) -> Cost:
    """Cost of the backward pass of a recurrent layer, by PyTorch's steps.

    Args:
        forward: Cost of the forward pass.
        x: Shape of the input.
        h: Shape of the first states.
        weights: Shapes of the weights and biases, layer after layer.
        layers: Number of layers.
        directions: 1 or 2.
        needs_x: Whether the input needs a gradient.
        needs_h: Whether the first states need one.
        needs: Whether each of the weights needs one.

    Returns:
        The cost.
    """
    tokens, each, macs, flows = prod(x[:-1]), len(weights) // (layers * directions), 0, needs_x
    later = tokens if needs_h else tokens - h[1]  # steps that have one before them
    for at in range(0, len(weights), each * directions):
        layer = range(at, at + each * directions)
        if not (flows or needs_h or any(needs[i] for i in layer)):
            continue
        macs += sum(tokens * prod(weights[i]) for i in layer if needs[i] and len(weights[i]) == 2)
        for i in range(at, at + each * directions, each):
            into, states, *others = weights[i : i + each]
            macs += (tokens * prod(into) if flows else 0) + later * prod(states)
            macs += sum(tokens * prod(w) for w in others if len(w) == 2)  # projections
        flows = True
    return Cost(macs=macs, other=2 * forward.other, acts=2 * (forward.acts or 0))


def _rnn_cell(kind: tuple[int, int]) -> Callable[..., Cost]:
    def cost(x: Any, hx: Any, *weights: Any, out: Any = None, **kwargs: Any) -> Cost:
        return _steps(kind, prod(x[:-1]), [w for w in (*weights, *kwargs.values()) if w is not None])

    return cost


def _onednn_rnn(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _steps(_MODES[args[8]], prod(x[:-1]), args[: 4 if args[11] else 2])


def _onednn_rnn_backward(x: Any, w: Any, u: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    cost = _steps(_MODES[args[11]], prod(x[:-1]), (w, u))
    return Cost(macs=2 * cost.macs, other=2 * cost.other)


def _cudnn_rnn(mode: int) -> Callable[..., Cost]:
    """Of ``(input, weights, ...)``; ``mode`` is the place of the mode."""
    return lambda x, weights, *args, out=None, **kwargs: _steps(_MODES[args[mode - 2]], prod(x[:-1]), weights)


def _cudnn_rnn_backward(x: Any, weights: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    cost = _steps(_MODES[args[8]], prod(x[:-1]), weights)
    return Cost(macs=cost.macs * (1 + args[-1][3]), other=2 * cost.other)  # the gradients of weights are optional


def _mps_lstm_backward(*args: Any, out: Any = None, **kwargs: Any) -> Cost:
    cost = _rnn(_LSTM)(args[5], *args[6:])
    return Cost(macs=2 * cost.macs, other=2 * cost.other)


def _quantized_rnn(kind: tuple[int, int]) -> Callable[..., Cost]:
    """Of ``(input, hx, ...)``; the weights are packed, so their shapes come from those of input and states."""

    def cost(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
        at = next(i for i, value in enumerate(args) if isinstance(value, bool))  # has_biases
        hidden, rows = out[-1] // (1 + args[at + 4]), out[-1] // (1 + args[at + 4]) * kind[0]
        layers = [(rows, x[-1]), *[(rows, out[-1])] * (args[at + 1] - 1)]
        one = [shape for w in layers for shape in (w, (rows, hidden), *[(rows,)] * (2 * args[at]))]
        return _steps(kind, prod(x[:-1]), one * (1 + args[at + 4]))

    return cost


def _quantized_cell(kind: tuple[int, int]) -> Callable[..., Cost]:
    def cost(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
        rows = kind[0] * out[-1]
        return _steps(kind, prod(x[:-1]), [(rows, x[-1]), (rows, out[-1]), (rows,), (rows,)])

    return cost


# quantised layers


def _packed_shape(packed: Any) -> Any:
    """Shape of the weight of a packed convolution; unpacking copies it, which is no part of the model."""
    with torch._C._DisableTorchDispatch():
        return packed.unpack()[0].shape


def _packed_conv(x: Any, packed: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * prod(_packed_shape(packed)[1:]), other=2 * prod(out))


def _packed_transposed(x: Any, packed: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * prod(_packed_shape(packed)[1:]), other=2 * prod(out))


def _packed_accumulated(x: Any, accumulated: Any, packed: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _packed_conv(x, packed, out=out)


def _onednn_conv(x: Any, scale: Any, zero: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * prod(w[1:]), other=2 * prod(out))


# other products


def _grouped_mm(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    if len(a) == len(b) == 2:  # groups of what is summed over
        return Cost(macs=prod(a) * b[-1])
    return Cost(macs=prod(out) * a[-1])


def _addbmm(x: Any, a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(a) * b[-1], other=prod(out))


def _addr(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out), other=prod(out))


def _addmm_activation(x: Any, a: Any, b: Any, *args: Any, out: Any = None, use_gelu: bool = False, **kw: Any) -> Cost:
    return Cost(macs=prod(a) * b[-1], other=(9 if use_gelu else 2) * prod(out))


def _foreach_mm(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=sum(prod(x) * y[-1] for x, y in zip(a, b, strict=True)))


def _trilinear(
    a: Any, b: Any, c: Any, skip_a: Any, skip_b: Any, skip_c: Any, sums: Any, *args: Any, out: Any = None
) -> Cost:
    """Two products: of the first two, summed where the third has no axis, and of that with the third."""
    first, second, third = (_with_axes(shape, skip) for shape, skip in ((a, skip_a), (b, skip_b), (c, skip_c)))
    space = [max(n) for n in zip(first, second, strict=True)]
    left = [1 if i in sums and i in skip_c else n for i, n in enumerate(space)]
    return Cost(macs=prod(space) + prod(max(n) for n in zip(left, third, strict=True)))


def _bilinear(a: Any, b: Any, w: Any, bias: Any = None, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    rows = prod(a[:-1])
    return Cost(macs=rows * (prod(w) + w[0] * w[2]), other=rows * w[0] if bias is not None else 0)


def _linear_loss(x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    """Of a linear layer and its cross entropy at once, with the gradients that it computes beside."""
    needed = [flag for flag in args[-3:-1] if flag is True]  # of input and weight
    scores = prod(x[:-1]) * w[0]
    return Cost(macs=prod(x) * w[0] * (1 + len(needed)), other=5 * scores * (3 if needed else 1), acts=scores)


def _with_axes(shape: Any, axes: Any) -> list[int]:
    """A shape with axes of size 1 put in where they are in the result."""
    given = iter(shape)
    return [1 if i in axes else next(given) for i in range(len(shape) + len(axes))]


def _pdist(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * x[-1])


def _pdist_backward(grad: Any, x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=2 * prod(grad) * x[-1])  # for both points of a pair


def _cdist_backward(grad: Any, a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(grad) * a[-1])  # for the points of one side


def _conv_tbc(x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out[:2]) * prod(w), other=prod(out))


def _conv_tbc_backward(grad: Any, x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=2 * prod(grad[:2]) * prod(w), other=prod(grad))


def _linear_backward(x: Any, grad: Any, w: Any, mask: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _backward(prod(x) * w[0], mask[:2])


def _matmul_backward(grad: Any, a: Any, b: Any, mask: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _backward(prod(grad) * a[-1], mask)


def _mkldnn_input_gradient(size: Any, grad: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(grad) * w[-1])


def _sparse_reduced_backward(
    x: Any, grad: Any, w: Any, reduce: str, places: Any, mask: Any, *args: Any, out: Any = None, **kwargs: Any
) -> Cost:
    return _backward(prod(x) * w[-1], mask)


def _linear_combination(x: Any, coefficients: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * coefficients[-1])


def _mkldnn_weight_gradient(grad: Any, x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * grad[-1])


def _semi_structured_addmm(x: Any, a: Any, meta: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * b[-2], other=prod(out))


def _sampled(x: Any, a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(x) * a[-1], other=prod(x))


def _semi_structured_mm(a: Any, meta: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * b[-2])


def _cslt(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=prod(out) * b[-2])


def _slow_conv_backward(grad: Any, x: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _backward(prod(grad) * prod(w[1:]), args[-1][:2])


def _mps_conv_backward(x: Any, grad: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _backward(prod(grad) * prod(w[1:]), args[-1][:2])


def _mps_transposed_backward(x: Any, grad: Any, w: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _backward(prod(x) * prod(w[1:]), args[-1][:2])


def _deform_conv2d_backward(
    grad: Any, x: Any, w: Any, offset: Any, mask: Any, *args: Any, out: Any = None, **kwargs: Any
) -> Cost:
    columns = prod(w[2:]) * x[1] * grad[0] * prod(grad[2:])
    return Cost(macs=2 * prod(grad) * prod(w[1:]), other=2 * (8 + bool(args[-1])) * columns + prod(grad))


_OVERRIDDEN = "aten::_scaled_dot_product_fused_attention_overrideable"
_KINDS = {"lstm": _LSTM, "gru": _GRU, "rnn_tanh": _TANH, "rnn_relu": _RELU}
_NAMES: list[tuple[Callable[..., Cost], str]] = [
    (_plain_linear, "aten::mkldnn_linear mkl::_mkl_linear aten::_sparse_semi_structured_linear"),
    (_mm, "aten::_int_mm aten::_scaled_mm_v2 aten::_sparse_sparse_matmul aten::hspmm quantized::matmul"),
    (
        _linear,
        """aten::_weight_int8pack_mm aten::_weight_int4pack_mm aten::_weight_int4pack_mm_for_cpu
        aten::_weight_int4pack_mm_with_scales_and_zeros aten::_dyn_quant_matmul_4bit aten::_mixed_dtypes_linear
        onednn::linear_dynamic_fp16 onednn::linear_relu_dynamic_fp16 onednn::qlinear_pointwise
        quantized::int4mm_packed_weight_cpu quantized::linear quantized::linear_relu quantized::linear_leaky_relu
        quantized::linear_tanh quantized::linear_dynamic quantized::linear_relu_dynamic quantized::linear_dynamic_fp16
        quantized::linear_relu_dynamic_fp16 quantized::linear_dynamic_fp16_unpacked_weight
        quantized::linear_with_input_q_dq_qweight_dq_output_fp32
        quantized::linear_with_input_q_dq_qweight_dq_relu_output_fp32 _quantized::linear _quantized::linear_dynamic
        _quantized::wrapped_fbgemm_linear_fp16_weight _quantized::wrapped_quantized_linear
        _quantized::_wrapped_quantized_linear_prepacked sparse::qlinear sparse::qlinear_relu sparse::qlinear_dynamic
        sparse::qlinear_relu_dynamic""",
    ),
    (
        _packed_conv,
        """quantized::conv1d quantized::conv2d quantized::conv3d quantized::conv1d_relu quantized::conv2d_relu
        quantized::conv3d_relu quantized::conv1d_dynamic quantized::conv2d_dynamic quantized::conv3d_dynamic
        _quantized::conv2d _quantized::conv2d_relu _quantized::conv3d _quantized::conv3d_relu""",
    ),
    (
        _packed_transposed,
        """quantized::conv_transpose1d quantized::conv_transpose2d quantized::conv_transpose3d
        quantized::conv_transpose1d_dynamic quantized::conv_transpose2d_dynamic quantized::conv_transpose3d_dynamic
        _quantized::conv_transpose1d _quantized::conv_transpose2d""",
    ),
    (_packed_accumulated, "quantized::conv2d_add quantized::conv2d_add_relu"),
    (
        _onednn_conv,
        """onednn::qconv_pointwise onednn::qconv1d_pointwise onednn::qconv2d_pointwise
        onednn::qconv3d_pointwise""",
    ),
    (
        _conv,
        """aten::_conv_depthwise2d aten::conv_depthwise3d aten::slow_conv_dilated2d aten::slow_conv_dilated3d
        aten::_slow_conv2d_forward aten::slow_conv3d_forward aten::cudnn_convolution_relu
        aten::cudnn_convolution_add_relu aten::miopen_convolution aten::miopen_convolution_relu
        aten::miopen_convolution_add_relu aten::miopen_depthwise_convolution aten::mkldnn_convolution
        aten::_mps_convolution aten::_nnpack_spatial_convolution""",
    ),
    (
        _transposed,
        """aten::slow_conv_transpose2d aten::slow_conv_transpose3d aten::cudnn_convolution_transpose
        aten::miopen_convolution_transpose aten::_mps_convolution_transpose mkldnn::_convolution_transpose_pointwise""",
    ),
    (_grouped_mm, "aten::_grouped_mm aten::_scaled_grouped_mm aten::_scaled_grouped_mm_v2"),
    (_addbmm, "aten::addbmm aten::addmm_ aten::_sparse_addmm"),
    (
        COSTS["aten::scaled_dot_product_attention"],
        f"{_OVERRIDDEN} aten::_scaled_dot_product_attention_math_for_mps aten::_triton_scaled_dot_attention",
    ),
]
CONTRACTIONS: dict[str, Callable[..., Cost]] = {
    **{f"aten::{name}": _rnn(kind) for name, kind in _KINDS.items()},
    **{f"aten::{name}_cell": _rnn_cell(kind) for name, kind in _KINDS.items()},
    **{f"aten::quantized_{name}": _quantized_rnn(kind) for name, kind in _KINDS.items()},
    **{f"aten::quantized_{name}_cell": _quantized_cell(kind) for name, kind in _KINDS.items()},
    **{f"quantized::quantized_{name}_cell_dynamic": _quantized_cell(kind) for name, kind in _KINDS.items()},
    "aten::mkldnn_rnn_layer": _onednn_rnn,
    "aten::mkldnn_rnn_layer_backward": _onednn_rnn_backward,
    "aten::_cudnn_rnn": _cudnn_rnn(6),
    "aten::_cudnn_rnn_backward": _cudnn_rnn_backward,
    "aten::miopen_rnn": _cudnn_rnn(5),
    "aten::miopen_rnn_backward": _cudnn_rnn_backward,
    "aten::_lstm_mps": _rnn(_LSTM),
    "aten::lstm_mps_backward": _mps_lstm_backward,
    **{name: cost for cost, names in _NAMES for name in names.split()},
    "aten::addr": _addr,
    "aten::_addmm_activation": _addmm_activation,
    "aten::_foreach_mm": _foreach_mm,
    "torch_nn::_linear_cross_entropy_batch_chunked": _linear_loss,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": _linear_loss,
    "aten::bilinear": _bilinear,
    "aten::_trilinear": _trilinear,
    "aten::_compute_linear_combination": _linear_combination,
    "aten::_sparse_mm_reduce_impl": _mm,
    "aten::_sparse_mm_reduce_impl_backward": _sparse_reduced_backward,
    "aten::_triton_multi_head_attention": COSTS["aten::_native_multi_head_attention"],
    **dict.fromkeys(("aten::pdist", "aten::_pdist_forward"), _pdist),
    "aten::_pdist_backward": _pdist_backward,
    "aten::_cdist_backward": _cdist_backward,
    "aten::conv_tbc": _conv_tbc,
    "aten::conv_tbc_backward": _conv_tbc_backward,
    "aten::linear_backward": _linear_backward,
    "aten::matmul_backward": _matmul_backward,
    "aten::mkldnn_linear_backward": _linear_backward,
    "aten::mkldnn_linear_backward_input": _mkldnn_input_gradient,
    "aten::mkldnn_linear_backward_weights": _mkldnn_weight_gradient,
    "aten::sparse_sampled_addmm": _sampled,
    "aten::_cslt_sparse_mm": _cslt,
    "aten::_sparse_semi_structured_mm": _semi_structured_mm,
    "aten::_sparse_semi_structured_addmm": _semi_structured_addmm,
    "aten::_slow_conv2d_backward": _slow_conv_backward,
    "aten::convolution_overrideable": _overridden_conv,
    "aten::convolution_backward_overrideable": COSTS["aten::convolution_backward"],
    "aten::mps_convolution_backward": _mps_conv_backward,
    "aten::mps_convolution_transpose_backward": _mps_transposed_backward,
    "torchvision::_deform_conv2d_backward": _deform_conv2d_backward,
    f"{_OVERRIDDEN}_backward": COSTS["aten::_scaled_dot_product_flash_attention_backward"],
}
_IN_PLACE = ("addbmm", "baddbmm", "addmv", "addr")  # operators of their own
COSTS.update(CONTRACTIONS)
COSTS.update({f"aten::{name}_": COSTS[f"aten::{name}"] for name in _IN_PLACE})
