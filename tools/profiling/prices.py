"""Prices of operators that are no contraction: one cost function for each.

The constants are conventions, in FLOPs per element: norm 5 (batch norm in evaluation 2), softmax 5, GELU 8, SiLU and
its kin 5, sigmoid 4, bilinear sample 8 (4 multiply-adds), quantising 2 and doing as if 4, losses 3 per input element
(with logarithms 5), everything else elementwise 1, sums, means and histograms 1 per input element, FFT ``5 N log2 N``,
the backward of each twice its forward.  What moves data, asks a question or draws random numbers is free.  Linear
algebra is priced by :mod:`vizoo.tools.profiling.solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vizoo.backbones.ops.cost import COSTS, Cost, find_operator
from vizoo.tools.profiling import contractions  # noqa: F401  (it fills COSTS)
from vizoo.tools.profiling.solvers import SOLVERS


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


def _nms(boxes: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=16 * boxes[0] ** 2)  # every pair


def _quantized_bag(weight: Any, indices: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=3 * _numel(indices) * out[-1])  # scale, offset and sum


def _nll_loss(x: Any, target: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=2 * _numel(target))


def _nll_loss_backward(grad: Any, x: Any, target: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=2 * _numel(target))


def _ctc_loss(x: Any, targets: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    longest = targets[-1] if len(targets) == 2 else -(-_numel(targets) // x[1])  # or their mean, when they are joined
    return Cost(other=8 * x[0] * x[1] * (2 * longest + 1))  # a sum of three in logarithms for each state and step


def _ctc_loss_backward(grad: Any, x: Any, targets: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=2 * _ctc_loss(x, targets).other)


def _fused_cell(each: int, biases: int) -> Callable[..., Cost]:
    """Gates of a recurrent cell: ``each`` a unit, and so many biases of input and state."""

    def cost(gates: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
        given = sum(b is not None for b in (*args[2:4], *kwargs.values()))
        return Cost(other=_numel(out) * (each + biases * given))

    return cost


def _fused_cell_backward(each: int, place: int) -> Callable[..., Cost]:
    return lambda *args, out=None, **kwargs: Cost(other=2 * each * _numel(args[place]))


def _foreach(price: Callable[..., Cost]) -> Callable[..., Cost]:
    return lambda tensors, *args, out=None, **kwargs: Cost(other=sum(price(t, out=t).other for t in tensors))


_TABLE = {  # FLOPs of one element of the first output
    72: "_upsample_lanczos2d_aa",
    32: "upsample_bicubic2d _upsample_bicubic2d_aa",
    16: "upsample_trilinear3d grid_sampler_3d",
    8: """gelu upsample_bilinear2d _upsample_bilinear2d_aa grid_sampler_2d _grid_sampler_2d_cpu_fallback
    cudnn_grid_sampler""",
    6: "glu glu_jvp glu_backward_jvp",
    5: """native_layer_norm native_group_norm _fused_rms_norm _native_batch_norm_legit _batch_norm_with_update
    _native_batch_norm_legit_functional _batch_norm_with_update_functional _softmax _safe_softmax _log_softmax
    _masked_softmax _sparse_softmax _sparse_log_softmax _nested_tensor_softmax_with_shape silu hardswish mish softplus
    elu selu celu _prelu_kernel log_sigmoid_forward rrelu_with_noise rrelu_with_noise_functional linalg_cross
    affine_grid_generator cudnn_affine_grid_generator batch_norm_backward_elemt""",
    4: """sigmoid tanh hardsigmoid logit upsample_linear1d fake_quantize_per_tensor_affine_cachemask
    fake_quantize_per_channel_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    _fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine
    _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional""",
    3: "_weight_norm_interface _weight_norm",
    2: """_native_batch_norm_legit_no_training _batch_norm_no_update batch_norm_elemt quantized_batch_norm addcmul
    addcdiv lerp native_dropout _fused_dropout _masked_scale _add_relu renorm polar quantize_per_tensor
    quantize_per_tensor_dynamic quantize_per_channel dequantize _transform_bias_rescale_qkv logspace""",
    1: """addmm cumsum cumprod logcumsumexp _logcumsumexp floor_divide bernoulli threshold linspace isin poisson
    binomial _standard_gamma _standard_gamma_grad _sample_dirichlet _dirichlet_grad bartlett_window blackman_window
    hamming_window hann_window kaiser_window __irshift__ __ilshift__ leaky_relu _conj_physical""",
    0: """mm bmm _scaled_mm copy clone _to_copy fill zero zeros zeros_like ones ones_like full full_like new_full
    new_zeros new_ones arange range eye scalar_tensor cat stack _stack _chunk_cat block_diag constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d roll flip
    rot90 index index_put _index_put_impl index_select index_fill index_copy index_reduce _unsafe_index
    _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate gather scatter scatter_add scatter_reduce
    index_add put slice slice_scatter select select_scatter as_strided_scatter diagonal_scatter masked_select
    masked_scatter nonzero nonzero_static embedding embedding_renorm embedding_dense _embedding_bag_dense repeat
    repeat_interleave take tril triu tril_indices triu_indices diag_embed diagonal complex rand randn randint
    randint_like rand_like randn_like randperm uniform normal normal_functional random cauchy exponential geometric
    log_normal _philox_uniform _philox_normal _philox_key_split _philox_key_fold_in resize resize_as _resize_output set
    _local_scalar_dense pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im unfold _reshape_copy view_copy
    permute_copy alias_copy split_with_sizes_copy unsafe_split unsafe_split_with_sizes upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    bucketize searchsorted lift lift_fresh_copy _lazy_clone _assert_async _assert_tensor_metadata
    _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size _make_dep_token _pin_memory from_file record_stream max_unpool2d
    max_unpool3d _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive equal hash_tensor fft_fftfreq
    fft_rfftfreq lu_unpack _copy_from _copy_from_and_resize shallow_copy_data _fill_mem_eff_dropout_mask
    _efficientzerotensor _new_zeros_with_same_feature_meta batch_norm_gather_stats batch_norm_gather_stats_with_counts
    batch_norm_update_stats _histogramdd_bin_edges _cudnn_rnn_flatten_weight _cudnn_init_dropout_state to_mkldnn
    _mkldnn_reshape _mkldnn_transpose mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight _coalesce _coalesced
    _to_dense _to_sparse _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc sparse_mask _sparse_mask_projection
    copy_sparse_to_sparse resize_as_sparse sparse_resize sparse_resize_and_clear _spdiags sparse_coo_tensor
    _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors sparse_compressed_tensor
    _sparse_compressed_tensor_with_dims _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo
    to_padded_tensor _nested_from_padded _nested_from_padded_tensor _nested_from_padded_and_nested_example
    _nested_tensor_from_mask _nested_tensor_from_tensor_list _nested_tensor_size _nested_tensor_strides
    _nested_tensor_storage_offsets _nested_compute_contiguous_strides_offsets _nested_get_offsets _nested_get_lengths
    _nested_get_min_seqlen _nested_get_max_seqlen _nested_get_jagged_dummy _nested_select
    _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward _pack_padded_sequence int_repr
    _make_per_tensor_quantized_tensor _make_per_channel_quantized_tensor _empty_affine_quantized
    _empty_per_channel_affine_quantized q_per_channel_scales q_per_channel_zero_points _convert_weight_to_int4pack
    _convert_weight_to_int4pack_for_cpu _dyn_quant_pack_4bit_weight _cslt_compress _to_sparse_semi_structured
    _sparse_semi_structured_tile _sparse_semi_structured_apply _sparse_semi_structured_apply_dense""",
}
_BY_INPUT = {  # FLOPs of one element of the first input
    5: "binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss",
    3: """mse_loss smooth_l1_loss huber_loss multi_margin_loss multilabel_margin_loss_forward batch_norm_stats
    batch_norm_backward_reduce""",
    1: """sum nansum mean nanmean amax amin aminmax _aminmax max min prod any all _is_all_true _is_any_true argmax
    argmin var std var_mean std_mean norm native_norm linalg_vector_norm linalg__powsum _powsum dist logsumexp
    count_nonzero trace avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    mkldnn_adaptive_avg_pool2d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d mkldnn_max_pool3d
    quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d fractional_max_pool3d topk sort median nanmedian mode kthvalue cummax cummin _cummax_helper
    _cummin_helper allclose multinomial histc histogram bincount _histogramdd_from_bin_cts _histogramdd_from_bin_tensors
    segment_reduce _sparse_sum _sparse_csr_sum _sparse_csr_prod _nested_sum""",
}
_SPACES = ("quantized", "_quantized", "onednn")
_QUANTIZED = {  # of the namespaces of quantised operators
    5: "layer_norm group_norm instance_norm softmax hardswish elu celu qbatch_norm2d",
    4: "sigmoid",
    2: """batch_norm batch_norm_relu batch_norm1d batch_norm1d_relu batch_norm2d batch_norm2d_relu batch_norm3d
    batch_norm3d_relu add_relu mul_relu add_scalar_relu mul_scalar_relu qadd_relu""",
    1: "add mul add_scalar mul_scalar clamp dropout leaky_relu prelu relu6 threshold qadd qmul max_pool1d max_pool2d",
    0: "cat cat_relu embedding_byte embedding_4bit linear_prepack_fp16_legacy",
}
_FREE = (  # ends of names of what only lays data out anew
    "_copy", "_prepack", "_prepack_fp16", "_prepack_legacy", "_unpack", "_unpack_fp16", "_prepack_with_rowwise_min_max",
    "_reorder_linear_weight", "_reorder_convolution_weight", "_reorder_convolution_transpose_weight",
    "_reorder_mkldnn_rnn_layer_weight", "_pack_gemm_matrix_fp16",
)  # fmt: skip
_PRODUCTS = {"mul", "div", "square", "reciprocal", "prod", "cumprod"}
_CONSTANTS = {
    **{f"aten::{name}": n for n, names in _TABLE.items() for name in names.split()},
    **{f"{space}::{name}": n for n, names in _QUANTIZED.items() for name in names.split() for space in _SPACES},
}
_INPUTS = {f"aten::{name}": n for n, names in _BY_INPUT.items() for name in names.split()}
_BACKWARD = {  # twice the forward, for one element of the first gradient
    **{name: 2 * n for name, n in (_CONSTANTS | _INPUTS).items()},
    **dict.fromkeys((f"aten::{lib}batch_norm" for lib in ("", "native_", "cudnn_", "miopen_")), 10),
    "aten::log_sigmoid": 10,
    "aten::multilabel_margin_loss": 6,
    **dict.fromkeys(("aten::max_pool2d", "aten::adaptive_avg_pool3d", "aten::_segment_reduce"), 2),
    **{f"torchvision::_{pool}": n for pool, n in (("roi_align", 16), ("ps_roi_align", 16), ("roi_pool", 2))},
    "torchvision::_ps_roi_pool": 2,
}
PRICES: dict[str, Callable[..., Cost]] = {
    **{name: _per_output(n) for name, n in _CONSTANTS.items()},
    **{name: _per_input(n) for name, n in _INPUTS.items()},
    **{f"aten::{name}": price for name, price in SOLVERS.items()},
    **{f"aten::{lib}_batch_norm": _batch_norm for lib in ("native", "cudnn", "miopen")},
    **dict.fromkeys(("aten::_embedding_bag", "aten::_embedding_bag_forward_only"), _embedding_bag),
    "aten::_embedding_bag_backward": _embedding_bag_backward,
    "aten::_embedding_bag_per_sample_weights_backward": _sample_weights_backward,
    **dict.fromkeys(("aten::convolution", "aten::_convolution", "aten::cudnn_convolution"), _conv),
    **dict.fromkeys(("aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c"), _fft),
    **dict.fromkeys(("aten::nll_loss_forward", "aten::nll_loss2d_forward"), _nll_loss),
    **dict.fromkeys(("aten::nll_loss_backward", "aten::nll_loss2d_backward"), _nll_loss_backward),
    **{f"aten::{lib}_ctc_loss": _ctc_loss for lib in ("", "_cudnn", "miopen")},
    "aten::_ctc_loss": _ctc_loss,
    "aten::_ctc_loss_backward": _ctc_loss_backward,
    "aten::_thnn_fused_lstm_cell": _fused_cell(28, 4),
    "aten::_thnn_fused_gru_cell": _fused_cell(19, 3),
    "aten::_thnn_fused_lstm_cell_backward_impl": _fused_cell_backward(28, 2),
    "aten::_thnn_fused_gru_cell_backward": _fused_cell_backward(19, 0),
    "flex_lib::zeros_and_scatter": _free,  # gradients of what modifies scores of FlexAttention
    "aten::_foreach_powsum": _foreach(_per_input(1)),
    **dict.fromkeys(("torchvision::nms", "torchvision::qnms"), _nms),
    **{f"quantized::embedding_bag_{kind}": _quantized_bag for kind in ("byte", "4bit")},
    **{f"quantized::embedding_bag_{bits}_rowwise_offsets": _quantized_bag for bits in ("byte", "4bit", "2bit")},
    **dict.fromkeys(("torchvision::roi_align", "torchvision::qroi_align", "torchvision::ps_roi_align"), _roi_align),
    **dict.fromkeys(("torchvision::roi_pool", "torchvision::ps_roi_pool"), _per_input(1)),
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
    if plain.endswith(_FREE) or _asks(func._schema):
        return _free
    forward = plain.removesuffix("_data").removesuffix("_backward")
    if forward != plain and (forward in _BACKWARD or _is_pointwise(find_operator(forward))):
        return _per_output(_BACKWARD.get(forward, 2))
    if plain.startswith("aten::_foreach_"):
        one = price_of(func, plain.replace("_foreach_", "", 1))
        return _foreach(one) if one is not None else None
    packet = find_operator(plain) or func._overloadpacket  # some operators in place lack the tag of the plain one
    return _per_output(1) if _is_pointwise(packet) else None


def of_complex(name: str, other: int) -> int:
    """Other FLOPs of an operator on complex numbers, from those that it has on real ones.

    An addition is 2 and so is whatever is no product, a multiplication or division 6, and linear algebra, as many of
    both, 4; the price of an FFT is one of complex numbers.

    Args:
        name: Name of the operator in its schema.
        other: Its other FLOPs on real numbers.

    Returns:
        Its other FLOPs.
    """
    short = name.partition("::")[2].removesuffix("_")
    return other * (4 if short in SOLVERS else 6 if short in _PRODUCTS else 1 if short.startswith("_fft") else 2)


def _asks(schema: Any) -> bool:
    """Whether an operator makes and changes no tensor."""
    makes = any("Tensor" in str(value.type) for value in schema.returns)
    return not makes and not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _is_pointwise(packet: Any) -> bool:
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )
