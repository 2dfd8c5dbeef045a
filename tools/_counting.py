"""Counting engine of the profiler.

The primary count runs the model once on the meta device under ``FlopCounterMode`` (contractions) and a dispatch mode
that sees every operator: it sums the other FLOPs, activations and bytes, and names each operator nobody can price.
The second engine is fvcore's trace on the CPU with complete handlers; both read ``vizoo.backbones.ops._cost.COSTS``.

Constants of the other FLOPs are conventions, per element: norm 5 (batch norm in evaluation 2), softmax 5, GELU 8,
SiLU 5, bilinear sample 8 (4 multiply-adds), everything else elementwise 1, sums and means 1 per input element.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops._cost import COSTS, Cost, first_shape, register_cost


class ModuleCost(NamedTuple):
    """Cost of one module with everything inside it."""

    macs: int
    other: int
    acts: int


class Count(NamedTuple):
    """What one call of a model costs.

    Attributes:
        params: Parameters, shared ones once.
        trainable: Parameters that require a gradient.
        buffers: Elements of buffers.
        state_bytes: Bytes of parameters and buffers.
        macs: Multiply-accumulates of contractions: convolutions, linear layers, attention products.
        flops_other: FLOPs of everything else, by the constants of this module.
        acts: Elements written by contractions, attention scores included whether stored or not.
        bytes: Bytes read and written by all operators that are no views: a lower bound of memory traffic.
        kernels: Number of those operators.
        largest: Elements of the largest tensor written.
        uncounted: Operators nobody can price, with their number of calls; empty for an exact count.
        modules: Cost by module path, ``""`` for the whole model.
        ops: Multiply-accumulates and calls by operator.
        engine: ``meta``, ``fake`` or the device the model was run on.
    """

    params: int
    trainable: int
    buffers: int
    state_bytes: int
    macs: int
    flops_other: int
    acts: int
    bytes: int
    kernels: int
    largest: int
    uncounted: dict[str, int]
    modules: dict[str, ModuleCost]
    ops: dict[str, tuple[int, int]]
    engine: str

    @property
    def flops(self) -> int:
        """``2 * macs + flops_other``."""
        return 2 * self.macs + self.flops_other


# prices


def _numel(shape: Any) -> int:
    return math.prod(shape) if shape is not None else 0


def _per_output(n: int) -> Callable[..., Cost]:
    return lambda *args, out=None, **kwargs: Cost(other=n * _numel(out))


def _per_input(n: int) -> Callable[..., Cost]:
    return lambda x, *args, out=None, **kwargs: Cost(other=n * _numel(x))


def _embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    _scale: Any = 0,
    _mode: int = 0,
    _sparse: Any = 0,
    samples: Any = None,
    *rest: Any,
    out: Any = None,
    **kwargs: Any,
) -> Cost:
    samples = kwargs.get("per_sample_weights", samples)
    return Cost(other=_numel(indices) * weight[-1] * (1 if samples is None else 2))


def _sdpa_other(q: Any, k: Any, v: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    scores = _numel(q[:-1]) * k[-2]
    return Cost(other=6 * scores, acts=scores + _numel(q[:-1]) * v[-1])  # softmax and scaling


def _bias(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=_numel(out))


def _conv(x: Any, w: Any, bias: Any = None, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(other=_numel(out) if bias is not None else 0)


def _free(*args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost()


_ELEMENTWISE = """
abs acos add addcdiv addcmul asin atan atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max
clamp_min cos cosh cumsum cumprod div elu eq erf erfc exp exp2 expm1 floor floor_divide fmod ge gt hardtanh isinf
isnan isfinite le leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or logical_xor lt masked_fill
maximum minimum mul ne neg pow reciprocal relu remainder round rsqrt rsub sgn sign sin sinh sqrt sub tan threshold
trunc where square heaviside nan_to_num threshold_backward bernoulli native_dropout dropout mish_backward relu6
xlogy
""".split()  # noqa: SIM905 - a table of words
_FIVE = """
silu hardswish hardsigmoid sigmoid tanh softplus log_sigmoid mish logit prelu _prelu_kernel selu celu
""".split()  # noqa: SIM905 - a table of words
_REDUCTIONS = """
sum mean amax amin max min prod any all argmax argmin var std var_mean std_mean norm linalg_vector_norm logsumexp
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d
max_pool2d_with_indices max_pool2d adaptive_max_pool2d topk sort cummax _mkldnn_transpose nanmean count_nonzero
""".split()  # noqa: SIM905 - a table of words
_FREE = """
empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like ones ones_like full full_like new_full
new_zeros new_ones arange linspace eye scalar_tensor lift_fresh lift_fresh_copy copy copy_ _to_copy clone contiguous
cat stack constant_pad_nd reflection_pad2d replication_pad2d roll flip index index_put index_put_ index_select
gather scatter slice_scatter select_scatter embedding repeat repeat_interleave fill fill_ zero_ tril triu
tril_indices triu_indices _unsafe_view rand randn randint rand_like randn_like randperm uniform_ normal_ resize_
set_ _local_scalar_dense pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im unfold_backward slice_backward
select_backward _unsafe_index unsafe_split split_with_sizes_copy bernoulli_ one_hot nonzero unique_dim _unique2
broadcast_tensors meshgrid bucketize searchsorted diag_embed _reshape_copy _reshape_alias view_copy permute_copy
is_same_size item isin detach alias_copy tile rot90 unsqueeze_copy _assert_async _assert_tensor_metadata
_functional_assert_async scatter_add_ index_fill masked_select numpy_T as_strided_
""".split()  # noqa: SIM905 - a table of words
_NORMS = {
    "native_layer_norm": 5,
    "native_group_norm": 5,
    "_fused_rms_norm": 5,
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_functional": 5,
    "_native_batch_norm_legit_no_training": 2,
    "cudnn_batch_norm": 5,
    "_batch_norm_with_update": 5,
    "_batch_norm_no_update": 2,
    "_softmax": 5,
    "_safe_softmax": 5,
    "_log_softmax": 5,
    "gelu": 8,
    "glu": 6,
    "upsample_bilinear2d": 8,
    "_upsample_bilinear2d_aa": 8,
    "grid_sampler_2d": 8,
    "upsample_bicubic2d": 32,
    "_upsample_bicubic2d_aa": 32,
    "upsample_linear1d": 4,
    "upsample_trilinear3d": 16,
    "upsample_nearest2d": 0,
    "_upsample_nearest_exact2d": 0,
}


def _native_batch_norm(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    training = args[4] if len(args) > 4 else kwargs.get("training", False)
    return Cost(other=(5 if training else 2) * _numel(out))


def _fft(x: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    dims = args[0] if args and isinstance(args[0], (list, tuple)) else [-1]
    total = max(_numel(x), _numel(out))
    return Cost(other=int(sum(5 * total * math.log2(max(x[d], 2)) for d in dims)))


@functools.cache
def _prices() -> dict[str, Callable[..., Cost]]:
    """Other FLOPs by operator name without overload, for operators that have no entry in ``COSTS``."""
    prices: dict[str, Callable[..., Cost]] = {}
    prices.update(dict.fromkeys(_ELEMENTWISE, _per_output(1)))
    prices.update(dict.fromkeys(_FIVE, _per_output(5)))
    prices.update(dict.fromkeys(_REDUCTIONS, _per_input(1)))
    prices.update(dict.fromkeys(_FREE, _free))
    prices.update({name: _per_output(n) for name, n in _NORMS.items()})
    prices.update(dict.fromkeys(("native_batch_norm", "cudnn_batch_norm"), _native_batch_norm))
    prices.update(dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag))
    prices.update(dict.fromkeys(("addmm", "baddbmm"), _bias))
    prices.update(
        dict.fromkeys(("convolution", "_convolution", "cudnn_convolution", "convolution_overrideable"), _conv)
    )
    prices.update(dict.fromkeys(("mm", "bmm", "_scaled_mm"), lambda *args, out=None, **kwargs: Cost()))
    sdpa = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    prices.update({f"_scaled_dot_product_{name}": _sdpa_other for name in sdpa})
    prices.update(dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _fft))
    aten = {f"aten::{name}": price for name, price in prices.items()}
    aten.update({f"aten::{name}_": price for name, price in prices.items() if name in _ELEMENTWISE + _FIVE})
    aten["torchvision::nms"] = lambda boxes, *args, out=None, **kwargs: Cost(other=16 * boxes[0] ** 2)
    aten["torchvision::roi_align"] = lambda x, *args, out=None, **kwargs: Cost(
        other=8 * _numel(out) * max(1, kwargs.get("sampling_ratio", args[4] if len(args) > 4 else 2)) ** 2
    )
    aten["prim::device"] = _free
    return aten


def _deform_conv2d(x: Any, weight: Any, offset: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    taps, positions = weight[2] * weight[3], out[0] * out[2] * out[3]
    return Cost(
        macs=_numel(out) * weight[1] * taps,
        other=2 * 4 * taps * x[1] * positions,  # four corners, multiply and add
    )


def _linear_pointwise(
    x: Any, w: Any, bias: Any, attr: str = "none", *args: Any, out: Any = None, **kwargs: Any
) -> Cost:
    n = _numel(out)
    return Cost(macs=_numel(x) * w[0], other=n * ((bias is not None) + (8 if attr == "gelu" else attr != "none")))


def _conv_pointwise(
    x: Any,
    w: Any,
    bias: Any,
    padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    attr: str = "none",
    *args: Any,
    out: Any = None,
    **kwargs: Any,
) -> Cost:
    n = _numel(out)
    return Cost(macs=n * _numel(w[1:]), other=n * ((bias is not None) + (8 if attr == "gelu" else attr != "none")))


@functools.cache
def _register() -> None:
    """Enter the operators of other libraries into the one registry; once."""
    import torchvision  # noqa: F401 - defines the operator

    register_cost("torchvision::deform_conv2d")(_deform_conv2d)
    if torch.backends.mkldnn.is_available():
        register_cost("mkldnn::_linear_pointwise")(_linear_pointwise)
        register_cost("mkldnn::_convolution_pointwise")(_conv_pointwise)


# the dispatch mode


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _shapes(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.shape, value)


class _Recorder(TorchDispatchMode):
    """Prices every operator that is no contraction, and names those it cannot."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.uncounted: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.other: defaultdict[str, int] = defaultdict(int)
        self.acts: defaultdict[str, int] = defaultdict(int)
        self.bytes = self.kernels = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            self.calls[str(func)] += 1
            return out
        name = func._schema.name
        contraction = func._overloadpacket in self.counter.flop_registry
        if _is_view(func) and not contraction:
            return out
        self.calls[name] += 1
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.kernels += 1
        self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        self.largest = max([self.largest, *(t.numel() for t in written)])
        price = COSTS.get(name) or _prices().get(name)
        if price is None:
            if not contraction and not _backward(name):
                self.uncounted[name] += 1
            return out
        cost = price(*_shapes(args), **_shapes(kwargs), out=first_shape(_shapes(out)))
        acts = (cost.acts if cost.acts is not None else written[0].numel()) if contraction and written else 0
        for path in self.counter.mod_tracker.parents:
            self.other[path] += cost.other
            self.acts[path] += acts
        return out


def _backward(name: str) -> bool:
    """Whether the operator belongs to a backward pass, whose other FLOPs are not priced."""
    return name.endswith("_backward") or "_backward_" in name or name == "aten::embedding_dense_backward"


# running a model without touching it


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device; nothing of their size is allocated."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _untouched(model: nn.Module, train: bool) -> Iterator[None]:
    """Run in evaluation (or training) mode without attention fast paths; restore modes and random state."""
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    state = {k: v.detach().clone() for k, v in model.named_buffers() if train and v.device.type != "meta"}
    grads = {p: p.grad for p in model.parameters()} if train else {}
    frozen = [] if train else [p for p in model.parameters() if p.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng():
            model.train(train)
            for p in grads:
                p.grad = None
            for p in frozen:  # the module tracker cannot follow views of parameters without a graph
                p.requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        for name, value in state.items():
            model.get_buffer(name).copy_(value)
        for p, grad in grads.items():
            p.grad = grad
        for p in frozen:
            p.requires_grad_(True)


def _run(model: nn.Module, args: Any, kwargs: Any, backward: bool) -> tuple[FlopCounterMode, _Recorder]:
    counter = FlopCounterMode(display=False)
    recorder = _Recorder(counter)
    with _untouched(model, backward), torch.set_grad_enabled(backward), recorder, counter:
        out = model(*args, **kwargs)
        if backward:
            parts = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.backward(parts, [torch.empty_like(t) for t in parts])
    return counter, recorder


def _to_meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().to("meta").requires_grad_(t.requires_grad), value)


def _on_meta(model: nn.Module, args: Any, kwargs: Any, backward: bool) -> Any:
    return _run(meta_copy(model), _to_meta(args), _to_meta(kwargs), backward)


def _on_fake(model: nn.Module, args: Any, kwargs: Any, backward: bool) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        memo: dict[int, Any] = {}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(mode.from_tensor(p.detach()), requires_grad=p.requires_grad)
        for b in model.buffers():
            memo[id(b)] = mode.from_tensor(b.detach())
        fake = copy.deepcopy(model, memo)
        to_fake = functools.partial(tree_map_only, Tensor, mode.from_tensor)
        return _run(fake, to_fake(args), to_fake(kwargs), backward)


def count(model: nn.Module, *args: Any, backward: bool = False, engine: str = "auto", **kwargs: Any) -> Count:
    """Count what one call ``model(*args, **kwargs)`` costs, without changing the model.

    Args:
        model: Any module; ``torch.compile`` and data-parallel wrappers are looked through.
        *args: Its inputs: tensors, or tuples, lists and dicts of them, on any device, meta included.
        backward: Also count the backward pass, in training mode.
        engine: ``meta`` (nothing is computed), ``fake``, ``real`` (the model's own device), or ``auto``: the first of
            them that can run the model.
        **kwargs: Its keyword inputs.

    Returns:
        The counts for exactly these inputs: divide by the batch for one image.

    Raises:
        ValueError: If ``engine`` is unknown.
        RuntimeError: If the model cannot be run on these inputs at all.
    """
    engines = {"meta": _on_meta, "fake": _on_fake, "real": _run}
    if engine not in ("auto", *engines):
        raise ValueError(f"got engine={engine!r}, need auto, {', '.join(engines)}")
    _register()
    model = unwrap(model)
    params = list(model.parameters())
    buffers = list(model.buffers())
    on_meta = any(t.device.type == "meta" for t in (*params, *buffers))
    order = [engine] if engine != "auto" else ["meta"] if on_meta else list(engines)
    for i, name in enumerate(order):
        try:
            counter, recorder = engines[name](model, args, kwargs, backward)
            break
        except Exception:
            if i == len(order) - 1:
                raise
    totals = counter.get_flop_counts()
    prefix = type(model).__name__
    modules = {
        path.removeprefix(prefix).removeprefix("."): ModuleCost(
            sum(totals.get(path, {}).values()) // 2, recorder.other[path], recorder.acts[path]
        )
        for path in {*totals, *recorder.other}
        if path != "Global"
    }
    by_op = {f"{packet}".replace(".", "::"): flops // 2 for packet, flops in totals.get("Global", {}).items()}
    ops = {name: (by_op.get(name, 0), calls) for name, calls in recorder.calls.items()}
    return Count(
        params=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        buffers=sum(b.numel() for b in buffers),
        state_bytes=sum(t.numel() * t.element_size() for t in (*params, *buffers)),
        macs=counter.get_total_flops() // 2,
        flops_other=recorder.other["Global"],
        acts=recorder.acts["Global"],
        bytes=recorder.bytes,
        kernels=recorder.kernels,
        largest=recorder.largest,
        uncounted=dict(recorder.uncounted),
        modules=modules,
        ops=ops,
        engine=name if name != "real" else str(next((t.device for t in (*params, *buffers)), "cpu")),
    )


# the second engine


def _traced(value: Any) -> Any:
    """Shape of a traced tensor, or the value of a traced constant."""
    if value.isCompleteTensor():
        return tuple(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_traced(v) for v in value.node().inputs()]
    return value.toIValue()


def _registry_handler(name: str) -> Callable[[Any, Any], int]:
    def handler(inputs: Any, outputs: Any) -> int:
        return COSTS[name](*map(_traced, inputs), out=_traced(outputs[0])).macs

    return handler


def _sdpa_macs(inputs: Any, outputs: Any) -> int:
    q, k, v = (_traced(i) for i in inputs[:3])
    return math.prod(q[:-2]) * q[-2] * k[-2] * (q[-1] + v[-1])


def _baddbmm_macs(inputs: Any, outputs: Any) -> int:
    a, b = (_traced(i) for i in inputs[1:3])
    return math.prod(a) * b[-1]


def _cdist_macs(inputs: Any, outputs: Any) -> int:
    a, b = (_traced(i) for i in inputs[:2])
    return math.prod(a) * b[-2]


_NO_CONTRACTION = """
batch_norm layer_norm group_norm instance_norm rms_norm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
upsample_nearest2d upsample_bilinear2d grid_sampler
""".split()  # noqa: SIM905 - a table of words


def fvcore_analysis(model: nn.Module, inputs: tuple[Any, ...], contractions: bool = True) -> Any:
    """Analysis by fvcore of a model with complete handlers.

    Args:
        model: A module on the CPU in evaluation mode.
        inputs: Its positional inputs, tensors on the CPU.
        contractions: Count contractions only, as :func:`count` does; False keeps fvcore's own norms and pooling, which
            is the total that papers using fvcore print.

    Returns:
        A ``fvcore.nn.FlopCountAnalysis``.
    """
    from fvcore.nn import FlopCountAnalysis

    _register()
    analysis = FlopCountAnalysis(unwrap(model), inputs)
    handlers: Mapping[str, Any] = {
        "aten::scaled_dot_product_attention": _sdpa_macs,
        "aten::baddbmm": _baddbmm_macs,
        "aten::cdist": _cdist_macs,
        **{name: _registry_handler(name) for name in COSTS},
    }
    if contractions:
        # a handler of None would leave fvcore's default in place
        handlers = {**handlers, **{f"aten::{name}": lambda inputs, outputs: 0 for name in _NO_CONTRACTION}}
    for name, handler in handlers.items():
        analysis.set_op_handle(name, handler)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def fvcore_macs(model: nn.Module, *inputs: Any, contractions: bool = True) -> int:
    """Multiply-accumulates of one call by the second engine; the model is left as it was.

    Args:
        model: A module on the CPU.
        *inputs: Its inputs on the CPU.
        contractions: As in :func:`fvcore_analysis`.

    Returns:
        The total.
    """
    model = unwrap(model)
    with _untouched(model, False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore traces with torch.jit, which warns
        return int(fvcore_analysis(model, inputs, contractions).total())
