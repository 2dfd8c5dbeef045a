"""Prices of operators that are no contraction: one cost function for each.

The constants are conventions, in FLOPs per element: norm 5 (batch norm in evaluation 2), softmax 5, GELU 8, SiLU and
its kin 5, sigmoid 4, bilinear sample 8 (4 multiply-adds), everything else elementwise 1, sums and means 1 per input
element, FFT ``5 N log2 N``, the backward of each twice its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vizoo.backbones.ops.cost import COSTS, Cost, find_operator


def _numel(shape: Any) -> int:
    return math.prod(shape) if shape is not None else 0


def _per_output(n: int) -> Callable[..., Cost]:
    return lambda *args, out=None, **kwargs: Cost(other=n * _numel(out))


def _per_input(n: int) -> Callable[..., Cost]:
    return lambda x, *args, out=None, **kwargs: Cost(other=n * _numel(x))


def _batch_norm(*args: Any, out: Any = None, training: bool = False, **kwargs: Any) -> Cost:
    training = args[5] if len(args) > 5 else training
    return Cost(other=(5 if training else 2) * _numel(out))


def _embedding_bag(weight: Any, indices: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    samples = args[4] if len(args) > 4 else kwargs.get("per_sample_weights")
    return Cost(other=_numel(indices) * weight[-1] * (1 if samples is None else 2))


def _embedding_bag_backward(grad: Any, indices: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=2 * _numel(indices) * grad[-1])


def _sample_weights_backward(grad: Any, weight: Any, indices: Any, *args: Any, out: Any = None) -> Cost:
    return Cost(other=2 * _numel(indices) * grad[-1])


def _fft(x: Any, dims: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    full: Any = x if _numel(x) >= _numel(out) else out  # the real side of a real transform
    return Cost(other=int(5 * _numel(full) * sum(math.log2(max(full[d], 1)) for d in dims)))


def _conv(x: Any, weight: Any, bias: Any = None, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=_numel(out) if bias is not None else 0)


def _free(*args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost()


def _roi_align(x: Any, rois: Any, scale: Any, h: int, w: int, ratio: int = -1, *a: Any, out: Any = None) -> Cost:
    return Cost(other=8 * _numel(out) * max(ratio, 2) ** 2)  # an adaptive ratio is taken for 2


_TABLE = {  # FLOPs of one element of the first output
    32: "upsample_bicubic2d _upsample_bicubic2d_aa",
    16: "upsample_trilinear3d grid_sampler_3d",
    8: "gelu upsample_bilinear2d _upsample_bilinear2d_aa grid_sampler_2d",
    6: "glu",
    5: """native_layer_norm native_group_norm _fused_rms_norm _native_batch_norm_legit _batch_norm_with_update
    _native_batch_norm_legit_functional _softmax _safe_softmax _log_softmax silu hardswish mish softplus elu selu
    celu _prelu_kernel log_sigmoid_forward""",
    4: "sigmoid tanh hardsigmoid logit upsample_linear1d",
    3: "_weight_norm_interface _weight_norm",
    2: "_native_batch_norm_legit_no_training _batch_norm_no_update addcmul addcdiv lerp native_dropout",
    1: "addmm cumsum cumprod floor_divide bernoulli threshold linspace isin",
    0: """mm bmm _scaled_mm copy clone _to_copy fill zero zeros zeros_like ones ones_like full full_like new_full
    new_zeros new_ones arange eye scalar_tensor cat stack constant_pad_nd reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d roll flip index index_put _index_put_impl index_select index_fill index_copy
    _unsafe_index _unsafe_index_put gather scatter scatter_add index_add slice slice_scatter select select_scatter
    masked_select masked_scatter nonzero embedding embedding_renorm embedding_dense repeat repeat_interleave take tril
    triu tril_indices triu_indices diag_embed rand randn randint rand_like randn_like randperm uniform normal random
    resize set _local_scalar_dense pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im unfold _reshape_copy
    view_copy permute_copy alias_copy split_with_sizes_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact2d bucketize searchsorted lift_fresh_copy _assert_async _assert_tensor_metadata
    _functional_assert_async _pin_memory max_unpool2d _unique2 unique_dim equal
    _pack_padded_sequence""",
}
_REDUCTIONS = """sum nansum mean nanmean amax amin aminmax max min prod any all argmax argmin var std var_mean std_mean
norm linalg_vector_norm logsumexp count_nonzero avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
_adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d topk sort
median kthvalue cummax allclose
multinomial"""
_CONSTANTS = {f"aten::{name}": n for n, names in _TABLE.items() for name in names.split()}
_BACKWARD = {  # twice the forward, for one element of the first gradient
    **{name: 2 * n for name, n in _CONSTANTS.items()},
    **{f"aten::{name}": 2 for name in _REDUCTIONS.split()},
    **dict.fromkeys(("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::log_sigmoid"), 10),
}
PRICES: dict[str, Callable[..., Cost]] = {
    **{name: _per_output(n) for name, n in _CONSTANTS.items()},
    **{f"aten::{name}": _per_input(1) for name in _REDUCTIONS.split()},
    **{f"aten::{lib}_batch_norm": _batch_norm for lib in ("native", "cudnn", "miopen")},
    **dict.fromkeys(("aten::_embedding_bag", "aten::_embedding_bag_forward_only"), _embedding_bag),
    "aten::_embedding_bag_backward": _embedding_bag_backward,
    "aten::_embedding_bag_per_sample_weights_backward": _sample_weights_backward,
    **dict.fromkeys(("aten::convolution", "aten::_convolution", "aten::cudnn_convolution"), _conv),
    **dict.fromkeys(("aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c"), _fft),
    "torchvision::nms": lambda boxes, *args, out=None, **kwargs: Cost(other=16 * boxes[0] ** 2),  # every pair
    "torchvision::roi_align": _roi_align,
}


def price_of(func: Any, name: str) -> Callable[..., Cost] | None:
    """Cost function of an operator; None when nobody knows it.

    Args:
        func: The operator.
        name: Its name in the schema.

    Returns:
        Function of the arguments with tensors replaced by shapes, and of ``out``, the shape of the first output.
    """
    plain = name.removesuffix("_")  # in place
    price = COSTS.get(name) or PRICES.get(name) or PRICES.get(plain)
    if price is not None:
        return price
    forward = plain.removesuffix("_data").removesuffix("_backward")
    if forward != plain and (forward in _BACKWARD or _is_pointwise(find_operator(forward))):
        return _per_output(_BACKWARD.get(forward, 2))
    packet = find_operator(plain) or func._overloadpacket  # some operators in place lack the tag of the plain one
    return _per_output(1) if _is_pointwise(packet) else None


def _is_pointwise(packet: Any) -> bool:
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
