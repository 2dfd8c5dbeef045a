"""Counting engine of the profiler.

The primary count runs the model once on the meta device under ``FlopCounterMode`` (contractions) and a dispatch mode
that sees every operator: it sums the other FLOPs, activations and bytes, and names each operator nobody can price.
It runs in inference mode, where fused attention stays one operator on every device, so that counts do not depend on
the kernel behind it.  Whatever is computed where none of them looks (NumPy, threads, extensions) makes the count
partial, with the reason.  The second engine is fvcore's trace on the CPU with complete handlers; both read
``vizoo.backbones.ops.cost.COSTS``; what is no contraction is priced by :mod:`vizoo.tools.profiling.prices`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import random
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import _StopRecomputationError
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from vizoo.backbones.ops.backend import is_transforming, whole_operators
from vizoo.backbones.ops.cost import COSTS, Cost, find_operator, flop_formulas
from vizoo.tools.common import UserError
from vizoo.tools.profiling.fused import flex_as_operator, run_flex_attention, run_recurrent
from vizoo.tools.profiling.meta import Kernels
from vizoo.tools.profiling.packed import PackedLayers, packed_weights
from vizoo.tools.profiling.prices import PRICES, of_complex, price_of

CELLS = ("macs", "flops_other", "acts", "bytes")  # figures of a count that may be partial; weights never are


class ModuleCost(NamedTuple):
    """Cost of one module with everything inside it; ``out`` is the shape of its (last) first output."""

    params: int
    macs: int
    other: int
    acts: int
    out: tuple[int, ...] | None


class Count(NamedTuple):
    """What one call of a model costs.

    Attributes:
        params: Parameters, shared ones once.
        trainable: Parameters that require a gradient.
        buffers: Elements of buffers.
        state_bytes: Bytes of parameters and buffers by dtype.
        macs: Multiply-accumulates of contractions: convolutions, linear layers, attention products.
        flops_other: FLOPs of everything else, by :mod:`vizoo.tools.profiling.prices`.
        acts: Elements written by contractions, attention scores included whether stored or not.
        bytes: Bytes read and written by all operators that are no views: a lower bound of memory traffic.
        kernels: Number of those operators.
        largest: Elements of the largest tensor written.
        uncounted: Operators nobody can price, with their number of calls.
        modules: Cost by module path, ``""`` for the whole model, in the order of ``named_modules``.
        ops: Multiply-accumulates, other FLOPs and calls by operator.
        engine: ``meta``, ``fake`` or the device the model was run on.
        reasons: Why the count does not hold for every input of these shapes or misses a part, one line each; empty
            for a complete count.
        doubts: The reasons by figure, for each of :data:`CELLS`; a figure without any is complete.
    """

    params: int
    trainable: int
    buffers: int
    state_bytes: dict[str, int]
    macs: int
    flops_other: int
    acts: int
    bytes: int
    kernels: int
    largest: int
    uncounted: dict[str, int]
    modules: dict[str, ModuleCost]
    ops: dict[str, tuple[int, int, int]]
    engine: str
    reasons: list[str]
    doubts: dict[str, list[str]]

    @property
    def status(self) -> str:
        """``complete``, or ``partial`` when there are ``reasons``."""
        return "partial" if self.reasons else "complete"

    @property
    def statuses(self) -> dict[str, str]:
        """``complete`` or ``partial`` by figure: ``params`` and each of :data:`CELLS`."""
        return {"params": "complete", **{cell: "partial" if self.doubts[cell] else "complete" for cell in CELLS}}

    @property
    def flops(self) -> int:
        """``2 * macs + flops_other``."""
        return 2 * self.macs + self.flops_other

    def by_module(self, depth: int = 1, sort: str = "", top: int = 0) -> list[dict[str, Any]]:
        """Costs of the modules down to a depth.

        Args:
            depth: Number of name parts shown; 0 is the whole model.
            sort: ``macs``, ``params``, ``acts`` or ``other`` for the most expensive first; empty for the model's order.
            top: Most rows; 0 for all.

        Returns:
            Rows with ``module, params, macs, share, acts, other, out``.

        Raises:
            ValueError: If ``sort`` is none of these.
        """
        if sort not in ("", "macs", "params", "acts", "other"):
            raise ValueError(f"got sort={sort!r}, need macs, params, acts or other")
        rows: list[dict[str, Any]] = [
            {"module": path, **cost._asdict(), "share": cost.macs / max(1, self.macs)}
            for path, cost in self.modules.items()
            if (path.count(".") + 1 if path else 0) <= depth
        ]
        if sort:
            rows.sort(key=lambda row: -row[sort])
        return rows[:top] if top else rows

    def by_op(self, top: int = 0) -> list[dict[str, Any]]:
        """Rows with ``op, calls, macs, share, other``, the most expensive first.

        Args:
            top: Most rows; 0 for all.

        Returns:
            The rows.
        """
        rows: list[dict[str, Any]] = [
            {"op": name, "calls": calls, "macs": macs, "share": macs / max(1, self.macs), "other": other}
            for name, (macs, other, calls) in self.ops.items()
        ]
        rows.sort(key=lambda row: (-row["macs"], -row["other"], row["op"]))
        return rows[:top] if top else rows


# the dispatch mode


def _shapes(value: Any) -> Any:
    """Arguments of an operator with tensors replaced by shapes; a quicker ``tree_map``, for they are plain lists."""
    if isinstance(value, Tensor):
        return value.shape
    return [_shapes(v) for v in value] if type(value) in (list, tuple) else value


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator moves no data: views, questions about a tensor, memory that is not written."""
    returns, short = func._schema.returns, func._schema.name.partition("::")[2]
    alias = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    unwritten = short in ("_unsafe_view", "lift_fresh") or short.startswith(("empty", "new_empty"))
    return alias or unwritten or torch.Tag.inplace_view in func.tags or func.namespace == "prim"


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


_nothing._get_raw = True  # type: ignore[attr-defined] # else the counter makes shapes of all arguments first


def _mapping() -> dict[Any, Callable[..., int]]:
    """Formulas for ``FlopCounterMode``; whatever has a price gets one, so that it is not taken apart."""
    priced = {packet: _nothing for name in PRICES if (packet := find_operator(name)) is not None}
    formulas = {**priced, **flop_formulas()}
    # some releases of PyTorch look for the overload, when they decide whether to take it apart, others for the packet
    overloads = {getattr(packet, name): f for packet, f in formulas.items() for name in packet.overloads()}
    return {op: f for op, f in {**formulas, **overloads}.items() if f is not _nothing or op not in flop_registry}


def _counter(engine: str) -> FlopCounterMode:
    """A counter whose formulas know more than shapes: numbers that are complex or not stored."""
    mapping = _mapping()
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counted = {op: f for op, f in counter.flop_registry.items() if mapping.get(op) is not _nothing}
    counter.flop_registry.update({op: _of_numbers(f, engine == "real") for op, f in counted.items()})
    return counter


def _of_numbers(formula: Callable[..., int], real: bool) -> Callable[..., int]:
    """A formula of products of tensors: of complex numbers they are four real ones, of stored zeros none."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        n = formula(*args, out_val=out_val, **kwargs)
        given = [t for t in args if isinstance(t, Tensor)]
        if any(t.is_complex() for t in given):
            n *= 4
        sparse = next((t for t in given if t.layout in _SPARSE), None) if real else None
        if sparse is not None:
            values = sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()
            n = n * values.numel() // max(1, sparse.numel())
        return n

    return flops


# what a count must say about itself

_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_GOING_BACK = {torch.autograd.backward, torch.autograd.grad, Tensor.backward}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_ELSEWHERE = "made by another thread, NumPy, an extension or a kernel, and not counted"
_NO_NUMBERS = "the model goes on in {where} after an error of tensors without numbers: others may take another path"
_LEAVING = {  # after these calls numbers are where no operator of PyTorch is needed
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.tolist, Tensor.__repr__,
    Tensor.__format__,
}  # fmt: skip
_FROM_PYTHON = {  # what they make of numbers, or of sizes, is no operator, or not on meta
    torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, torch._VF._pad_packed_sequence,
}  # fmt: skip
_DEVICE_QUESTIONS = {
    Tensor.get_device, Tensor.type,
    *(getattr(Tensor, name).__get__ for name in ("device", "is_meta", "is_cpu", "is_cuda", "is_xpu", "is_mps")),
}  # fmt: skip
_SAME_EVERYWHERE = {"torch", "timm", "torchvision", "vizoo"}  # their paths for a device cost what the others cost
_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _storage(t: Tensor) -> Any:
    """Storage of a tensor; None where it has none of its own."""
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return None


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (int, float, str, type(None))):  # most arguments of operators
        return []
    return [t for value in tree_leaves(values) for t in ([value] if isinstance(value, Tensor) else _held(value))]


def _held(value: Any) -> list[Tensor]:
    """Tensors in a value that PyTorch takes for a leaf: mappings of other classes, data classes."""
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    return []


def _parts(t: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor wraps, such as numbers and scales of a quantised one; itself if it wraps none."""
    if not is_traceable_wrapper_subclass(t):
        return [t]
    return [part for name in t.__tensor_flatten__()[0] for part in _parts(getattr(t, name))]


class _Origins:
    """Where the numbers of each tensor come from: constants, the input, or nobody who was seen.

    Args:
        constants: Tensors of the model.
        inputs: Tensors given to it.
    """

    def __init__(self, constants: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.known: dict[int, tuple[StorageWeakRef, bool | None]] = {}  # from the input; None before it is written
        self.left = False  # did numbers of the input reach Python, from where they may come back
        self.write((part for t in constants for part in _parts(t)), False)
        self.write((part for t in inputs for part in _parts(t)), True)

    def write(self, tensors: Iterable[Tensor], data: bool | None) -> None:
        """Note where the numbers of tensors come from now."""
        for t in tensors:
            if (storage := _storage(t)) is not None:
                self.known[storage._cdata] = StorageWeakRef(storage), data  # it keeps the address, not the memory

    def data(self, t: Tensor) -> bool | None:
        """Whether numbers come from the input; None for memory that nobody wrote, True where that is unknown."""
        storage = _storage(t)
        return True if storage is None else self.known.get(storage._cdata, (None, True))[1]

    def unseen(self, t: Tensor) -> Any:
        """The storage of a tensor that holds numbers which no operator wrote; None for any other tensor."""
        storage = _storage(t) if t.numel() else None
        return storage if storage is not None and self.known.get(storage._cdata, (None, None))[1] is None else None

    def follow(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], out: Any) -> tuple[list[Tensor], bool]:
        """Carry the origins through one operator.

        Args:
            func: The operator.
            args: Its arguments.
            kwargs: Its keyword arguments.
            given: All tensors in them.
            out: What it returned.

        Returns:
            The tensors whose numbers it read, and whether any of them comes from the input.
        """
        short = func._schema.name.partition("::")[2]
        if short.startswith(("empty", "new_empty")):
            self.write(_tensors(out), None)
            return [], False
        python = [out] if short == "lift_fresh" else _tensors(args[1]) if "index" in short and len(args) > 1 else []
        self.write([t for t in python if self.unseen(t) is not None], self.left)  # numbers of Python: x[[0, 2]]
        if _is_view(func):
            return [], False
        places = _written(func)
        written = _tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in places]) if places else []
        unread = {id(t) for t in written}
        if short.endswith("_like") or short.startswith("new_"):  # they ask for a shape
            unread = {id(t) for t in given}
        elif kwargs.get("beta") == 0:  # then the first term of the sum is not read
            unread.add(id(args[0]))
        read = [t for t in given if id(t) not in unread] if unread else given
        data = any(self.data(t) is not False for t in read) or any(self.data(t) is True for t in written)
        self.write((*_tensors(out), *written), data)
        if short == "_pack_padded_sequence":  # its sizes of batches come from the lengths alone
            self.write([out[1]], self.data(args[1]))
        return read, data


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _deciding(func: Any, args: Any, given: list[Tensor]) -> list[Tensor]:
    """The tensors whose numbers Python or the shape of the output depends on."""
    if func._schema.name == "aten::index":
        return [t for t in _tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
    return [] if _VALUE_TAGS.isdisjoint(func.tags) else given


class _Recorder(TorchDispatchMode):
    """Prices what ``FlopCounterMode`` does not count, and names what nobody can price or nobody saw."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode, origins: _Origins, engine: str) -> None:
        super().__init__()
        self.counter, self.origins, self.engine = counter, origins, engine
        self.uncounted: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.other_of_op: Counter[str] = Counter()
        self.other: defaultdict[str, int] = defaultdict(int)
        self.acts: defaultdict[str, int] = defaultdict(int)
        self.bytes = self.kernels = self.largest = 0
        self.told: defaultdict[str, Counter[str]] = defaultdict(Counter)  # calls by module, by what is said of them
        self.doubts: set[str] = set()  # those of them that another engine may settle
        self.cells: dict[str, tuple[str, ...]] = {}  # the figures that each concerns
        self.unseen: dict[int, tuple[Any, str]] = {}  # storages that no operator wrote, and who read them where
        self.operators = Kernels()

    def here(self) -> str:
        """The module that runs now."""
        names = self.counter.mod_tracker.parents - {"Global"}
        return max(names, key=len, default="").partition(".")[2] or "the model"

    def tell(self, text: str, doubt: bool = False, cells: tuple[str, ...] = CELLS) -> None:
        """Note something that happened in the module that runs now, and the figures that it makes partial.

        Args:
            text: What is said; ``{calls}`` and ``{where}`` are filled in.
            doubt: Whether another engine may settle it.
            cells: Some of :data:`CELLS`.
        """
        self.told[text][self.here()] += 1
        self.cells[text] = cells
        if doubt:
            self.doubts.add(text)

    def reasons(self) -> dict[str, tuple[str, ...]]:
        """What was told, one line each, with the figures that it concerns."""
        found = {}
        for text, calls in self.told.items():
            n, places = calls.total(), list(calls)
            where = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
            found[text.replace("{calls}", f"{n} call{'s' * (n > 1)}").replace("{where}", where)] = self.cells[text]
        return found

    def look(self, values: Any, reader: str) -> None:
        """Note tensors that hold numbers which no operator wrote; ``reader`` says who needs them."""
        for t in _tensors(values):
            if (storage := self.origins.unseen(t)) is not None:
                text = f"{reader.replace('{where}', self.here())} numbers that no operator wrote"
                self.unseen.setdefault(storage._cdata, (storage, text))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what we ask is no question of the model
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = self.operators.run(func, args, kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # a higher-order operator
            self.calls[str(func)] += 1
            if func not in flop_registry:
                self._unpriced(str(func))
            self.origins.write(_tensors(out), True)
            return out
        name = func._schema.name
        given = [] if _is_view(func) else [t for v in (*args, *kwargs.values()) for t in _tensors(v)]
        read, data = self.origins.follow(func, args, kwargs, given, out)
        self.look(read, f"{name} in {{where}} reads")
        if any(self.origins.data(t) for t in _deciding(func, args, given)):
            self.origins.left = True
            self.tell(f"{name} in {{where}} asks for numbers of the input: counted for those given, others may differ")
        if _is_view(func):
            return out
        if name == "aten::scaled_dot_product_attention" and out.device.type == "meta" and out.dim() == 4:
            out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as fused kernels lay it out, so no copies follow
            self.origins.write([out], data)
        written = _tensors(out)
        price = price_of(func, name)
        first = written[0].shape if written else None
        shapes = {**{k: _shapes(v) for k, v in kwargs.items()}, "out": first}
        cost = price(*_shapes(args), **shapes) if price else Cost()
        known = func._overloadpacket in flop_registry and name not in COSTS
        if price is None and not known:
            self._unpriced(name)
        product = known or bool(cost.macs)
        if cost.macs and func._overloadpacket not in self.counter.flop_registry:  # defined since the run began
            self.counter.flop_registry = _counter(self.engine).flop_registry
        if product:
            self._check_stored(name, given)
        if any(t.is_complex() for t in given):
            cost = cost._replace(other=of_complex(name, cost.other))
        if cost.acts is None:
            cost = cost._replace(acts=written[0].numel() if product and written else 0)
        self._add(name, cost, given, written)
        return out

    def _check_stored(self, name: str, given: list[Tensor]) -> None:
        """Say where a product is counted for numbers that it may not have."""
        sparse = sum(t.layout in _SPARSE for t in given)
        if sparse and self.engine != "real":
            self.tell(f"{name} in {{where}} reads sparse tensors: counted as dense", doubt=True, cells=("macs",))
        elif sparse > 1:
            self.tell(f"{name} in {{where}} multiplies sparse tensors: one is counted as dense", cells=("macs",))

    def charge(self, name: str, cost: Cost, given: list[Tensor], written: list[Tensor]) -> None:
        """Add a call of an operator that no mode sees, with its multiply-accumulates."""
        for path in set(self.counter.mod_tracker.parents):
            self.counter.flop_counts[path][name] += 2 * cost.macs
        self.origins.write(written, True)
        self._add(name, cost, given, written)

    def _add(self, name: str, cost: Cost, given: list[Tensor], written: list[Tensor]) -> None:
        moved = sum(t.numel() * t.element_size() for t in (*given, *written))
        self.calls[name] += 1
        self.other_of_op[name] += cost.other
        self.kernels += 1
        self.bytes += moved if cost.bytes is None else cost.bytes
        self.largest = max([self.largest, *(t.numel() for t in written)])
        for path in set(self.counter.mod_tracker.parents):
            self.other[path] += cost.other
            self.acts[path] += cost.acts or 0

    def _unpriced(self, name: str) -> None:
        self.uncounted[name] += 1
        text = f"operator {name} has no cost formula: {{calls}} in {{where}}"
        self.tell(text, cells=("macs", "flops_other", "acts"))  # its bytes are those of its tensors


class _Watch(TorchFunctionMode):
    """Sees what makes no operator: numbers that leave PyTorch, questions about the device, errors that a model catches.

    Args:
        recorder: Where it is told.
        engine: What the model runs on.
    """

    def __init__(self, recorder: _Recorder, engine: str) -> None:
        super().__init__()
        self.recorder, self.engine = recorder, engine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tell = self.recorder.tell
        if is_transforming() and torch.is_inference_mode_enabled() and _differentiates():
            raise RuntimeError("derivatives are zeros in inference mode")  # in some releases; so without it
        if self.engine == "meta" and func in _DEVICE_QUESTIONS:
            asking = str(sys._getframe(1).f_globals.get("__name__"))
            if asking.partition(".")[0] not in _SAME_EVERYWHERE:
                tell("the model asks in {where} where its tensors are: counted for the meta device", doubt=True)
        if func is torch.ops.higher_order.cond and not torch.is_grad_enabled():
            tell("numbers decide a branch in {where}: the dearer one is counted")
        if func in _LEAVING and self.recorder.origins.data(args[0]) is not False:
            text = f"numbers leave torch in {{where}} ({resolve_name(func)}): what is computed with them is not counted"
            tell(text)
            self.recorder.origins.left = True
            if self.engine != "real":
                tell(_NO_NUMBERS, doubt=True)
                raise NotImplementedError("a tensor without numbers")  # its address is 0, which would be read
        try:
            out = self._run(func, args, kwargs or {})
            if func in _FROM_PYTHON:
                origins = self.recorder.origins
                origins.write([t for t in _tensors(out) if origins.unseen(t) is not None], origins.left)
            return out
        except Exception as e:
            if self.engine != "real" and not isinstance(e, _StopRecomputationError):
                tell(_NO_NUMBERS, doubt=True)
            raise

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _GOING_BACK:
            with mock.patch.object(torch.autograd, "_engine_run_backward", self._go_back):
                return func(*args, **kwargs)
        if func in _RECURRENT and not kwargs and torch._C._functorch.peek_interpreter_stack() is None:
            return run_recurrent(self.recorder, func, *args, **kwargs)
        if not isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if func.name() == "flex_attention":
            return run_flex_attention(self.recorder, func, *args, **kwargs)
        branches = func is torch.ops.higher_order.cond and not torch.is_grad_enabled()
        if branches or func.name().startswith("triton_kernel_wrapper"):  # the counter knows them
            return func(*args, **kwargs)
        return _inside(func)(*args, **kwargs)

    def _go_back(self, *args: Any, **kwargs: Any) -> Any:
        with self:  # a mode is off while it looks at a call, but what is computed anew in this one is the model's
            return _engine_run_backward(*args, **kwargs)


def _differentiates() -> bool:
    """Whether a transform of ``torch.func`` that takes derivatives is at work."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp
    return any(level.key() in kinds for level in stack)


def _inside(func: HigherOrderOperator) -> Callable[..., Any]:
    """What a higher-order operator does, in plain operators, which are counted; itself where PyTorch has nothing."""
    plain = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd, func)
    asked = "_get_current_dispatch_mode"  # some refuse to run while anything watches
    module = sys.modules.get(plain.__module__)
    if not hasattr(module, asked):
        return plain

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(module, asked, return_value=None):
            return plain(*args, **kwargs)

    return unwatched


@contextlib.contextmanager
def _watch_threads(recorder: _Recorder) -> Iterator[None]:
    """Note threads that are started: PyTorch's modes, and so the count, do not reach into them."""
    before = threading.getprofile()

    def begin(frame: Any, event: str, arg: Any) -> None:
        sys.setprofile(None)  # of the new thread, whose very first event this is
        recorder.tell("a thread was started in {where}: what it computes is not counted")

    threading.setprofile(begin)
    try:
        yield
    finally:
        threading.setprofile(before)  # type: ignore[arg-type]


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


@contextlib.contextmanager
def _same_afterwards(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Run eagerly and without attention fast paths; restore that and all random states."""
    import numpy as np

    fast, python, numpy = torch.backends.mha.get_fastpath_enabled(), random.getstate(), np.random.get_state()
    cuda = {t.device for t in tensors if t.device.type == "cuda"}
    compiled = "torch._dynamo" in sys.modules  # else nothing can be compiled, and importing it is slow
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        quiet = warnings.catch_warnings()
        with torch.random.fork_rng(list(cuda)), eager, torch.jit.optimized_execution(False), quiet:
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")  # ours
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        np.random.set_state(numpy)


class _Call(NamedTuple):
    """A call of its own: a copy of a model and its inputs, and every other tensor that the copy holds."""

    model: nn.Module
    args: Any
    kwargs: Any
    constants: list[Tensor]


def _copy(model: nn.Module, args: Any, kwargs: Any, move: Callable[[Tensor], Tensor]) -> _Call:
    """Copy a call, with parameters, buffers and inputs put through ``move``; nothing else of their size is made."""

    def moved(t: Tensor) -> Tensor:
        return move(t.detach()).requires_grad_(t.requires_grad)

    memo: dict[int, Any] = {id(b): move(b.detach()) for b in model.buffers()}
    memo.update({id(p): nn.Parameter(move(p.detach()), p.requires_grad) for p in model.parameters()})
    for module in model.modules():  # results of an earlier call cannot be copied as they are
        memo.update({id(v): move(v.detach()) for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf})
    memo.update({id(packed): packed for packed in packed_weights(model)})  # a copy reads them, where there are none
    ours, made = _deepcopy(model, memo)
    _move_scripted(ours, move)
    given = {id(t): moved(t) for t in _tensors((args, kwargs))}
    try:
        args, kwargs = copy.deepcopy((args, kwargs), given)
    except Exception:  # something beside tensors that cannot be copied
        args, kwargs = tree_map_only(Tensor, moved, (args, kwargs))
    constants = [t for t in made.values() if isinstance(t, Tensor)]
    return _Call(ours, args, kwargs, [*constants, *ours.parameters(), *ours.buffers()])


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """A copy with what ``memo`` holds instead of the objects with these addresses, and all that was copied."""
    try:
        return copy.deepcopy(model, made := dict(memo)), made
    except Exception:  # locks, pools, handles of other libraries: they are shared, innermost first
        for module in reversed(list(model.modules())):
            for value in vars(module).values():
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    memo[id(value)] = value
        return copy.deepcopy(model, made := dict(memo)), made


def _move_scripted(model: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Move the weights of TorchScript to the meta device, which a copy of it takes along as they are."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            for name, p in list(module.named_parameters(recurse=False)):
                if (new := move(p.detach())).is_meta:
                    setattr(module, name, nn.Parameter(new, p.requires_grad))
            for name, b in list(module.named_buffers(recurse=False)):
                if (new := move(b.detach())).is_meta:
                    setattr(module, name, new)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model with weights of its own.

    Args:
        model: Any module; what cannot be copied, such as locks and pools, is shared with it.

    Returns:
        The copy.
    """
    return _copy(model, (), {}, torch.clone).model


def initialized(model: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    """A model without lazy modules, or a copy whose lazy modules one call has initialised.

    Args:
        model: Any module.
        args: Inputs of the call; with one on the meta device the copy is there too.
        kwargs: Its keyword inputs.

    Returns:
        The model itself if none of its modules is lazy.
    """
    if not any(isinstance(m, LazyModuleMixin) and m.has_uninitialized_params() for m in model.modules()):
        return model
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    meta = any(t.is_meta for t in (*_tensors((args, kwargs)), *tensors))
    memo: dict[int, Any] = {}
    for t in tensors:
        if is_lazy(t):  # its buffers cannot be copied
            lazy: Any = type(t)
            memo[id(t)] = lazy(t.requires_grad, "meta" if meta else t.device, t.dtype)
        elif meta:
            moved = t.detach().to("meta")
            memo[id(t)] = nn.Parameter(moved, t.requires_grad) if isinstance(t, nn.Parameter) else moved
    ours, _ = _deepcopy(model, memo)
    training = {m: m.training for m in ours.modules()}
    with _same_afterwards(_tensors((args, kwargs))), torch.no_grad():
        ours.eval()(*args, **kwargs)  # which changes no statistics
    for module, mode in training.items():
        module.training = mode
    return ours


class _Modules(ModuleTracker):
    """Follows modules also without a graph and in transforms of ``torch.func``, where hooks on gradients raise.

    A module whose inputs need no gradient is left, on the way back, when its parameters have theirs.
    """

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        given = [t for t in _tensors(input) if t.requires_grad]
        ends = given or [p for p in mod.parameters() if p.requires_grad]
        has_leaves = any(t.is_leaf for t in ends)  # their gradients may be asked for inside the model
        super()._fw_pre_hook(mod, None if has_leaves or not self._has_way_back() else ends)
        if has_leaves and self._has_way_back():
            self._leave_after(ends, self._get_mod_name(mod))

    def _leave_after(self, ends: list[Tensor], name: str) -> None:
        seen = itertools.count(1)

        def leave(grad: Tensor) -> None:
            if next(seen) % len(ends) == 0:
                self.parents.discard(name)

        self._hooks += [t.register_hook(leave) for t in ends]

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        super()._fw_post_hook(mod, input, output if self._has_way_back() else None)

    @staticmethod
    def _has_way_back() -> bool:
        return torch.is_grad_enabled() and not is_transforming()


class _Run(NamedTuple):
    """What one engine saw."""

    counter: FlopCounterMode
    recorder: _Recorder
    shapes: dict[str, tuple[int, ...] | None]


def _run(call: _Call, mode: Any, engine: str) -> _Run:
    model, args, kwargs, constants = call
    counter = _counter(engine)
    counter.mod_tracker = _Modules()
    recorder = _Recorder(counter, _Origins(constants, _tensors((args, kwargs))), engine)
    paths = {id(m): path for path, m in model.named_modules()}
    shapes: dict[str, tuple[int, ...] | None] = {}
    counting = threading.get_ident()

    def note(module: nn.Module, given: Any, out: Any) -> None:
        if id(module) not in paths:
            return
        if threading.get_ident() != counting:
            recorder.tell(f"{paths[id(module)]} runs in another thread: what it computes is not counted")
        first = next(iter(_tensors(out)), None)
        shapes[paths[id(module)]] = None if first is None else tuple(first.shape)

    backward = mode is torch.enable_grad
    model.train(backward)
    if not backward:  # the counter's module tracker cannot follow views of parameters without a graph
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        for p in model.parameters():
            p.requires_grad_(False) if p.is_leaf else p.detach_()
    hook = register_module_forward_hook(note)  # scripted modules take none of their own
    try:
        around = _same_afterwards(constants), _watch_threads(recorder), flex_as_operator(), mode()
        with contextlib.ExitStack() as stack:
            packed = [PackedLayers()] if engine != "real" and packed_weights(model) else []
            for context in (*around, *packed, _Watch(recorder, engine), recorder, counter):
                stack.enter_context(context)
            out = model(*args, **kwargs)
            if backward:
                # views, for the hooks of a tensor that the engine starts from alone do not run
                parts = [torch.ops.aten.alias(t) for t in _tensors(out) if t.requires_grad]
                if not parts and any(p.requires_grad for p in model.parameters()):
                    recorder.tell("the model returns nothing that needs a gradient: no backward pass is counted")
                torch.autograd.backward(parts, [torch.ones_like(t) for t in parts])
    finally:
        hook.remove()
    recorder.look(out, "the model returns")
    return _Run(counter, recorder, shapes)


def _on_meta(model: nn.Module, args: Any, kwargs: Any, mode: Any) -> _Run:
    return _run(_copy(model, args, kwargs, lambda t: t.to("meta")), mode, "meta")


def _on_fake(model: nn.Module, args: Any, kwargs: Any, mode: Any) -> _Run:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

    tensors = FakeTensorMode(allow_non_fake_inputs=True)
    home = _device(model)

    def move(t: Tensor) -> Tensor:
        meta = t.device.type == "meta"
        if not (meta or t.is_inference()) or t.layout in _SPARSE:
            return tensors.from_tensor(t)
        with unset_fake_temporarily():  # some releases make no fake tensor of one that is fake already
            plain = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return FakeTensor(tensors, plain, home if meta else t.device)

    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what it cannot do before it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with tensors:
            return _run(_copy(model, args, kwargs, move), mode, "fake")
    finally:
        log.setLevel(level)


def _on_device(model: nn.Module, args: Any, kwargs: Any, mode: Any) -> _Run:
    return _run(_copy(model, args, kwargs, torch.clone), mode, "real")


def _device(model: nn.Module) -> torch.device:
    """Where a model is, or would be."""
    devices = (t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta")
    return next(devices, torch.device("cpu"))


_ENGINES: dict[str, Callable[..., _Run]] = {"meta": _on_meta, "fake": _on_fake, "real": _on_device}


def _order(model: nn.Module, backward: bool) -> list[str]:
    """Engines in the order in which they are tried."""
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        return ["meta", "fake"]
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return ["real"]  # TorchScript compiles itself anew for what it is given, so it sees what it was made for
    return ["fake", "real"] if backward else list(_ENGINES)


@torch.inference_mode(False)  # copies that are made in it have no way back
def _run_on(engine: str, model: nn.Module, args: Any, kwargs: Any, backward: bool) -> _Run:
    if backward:
        return _ENGINES[engine](model, args, kwargs, torch.enable_grad)
    try:
        return _ENGINES[engine](model, args, kwargs, torch.inference_mode)
    except Exception as e:
        try:
            run = _ENGINES[engine](model, args, kwargs, torch.no_grad)  # for gradients or threads inside
        except Exception:
            raise e from None
        if "outside inferencemode" in str(e).lower():
            run.recorder.tell("another thread writes into tensors: what it computes is not counted")
        return run


def _first_settled(order: list[str], run_on: Callable[[str], _Run]) -> tuple[str, _Run]:
    """The first engine whose run leaves no doubt that another one may settle, else the last that can run it."""
    found: tuple[str, _Run] | None = None
    for engine in order:
        try:
            found = engine, run_on(engine)
        except Exception:
            if engine == order[-1] and found is None:
                raise
            continue
        if not found[1].recorder.doubts:
            break
    assert found is not None
    return found


def _of_modules(model: nn.Module, run: _Run) -> dict[str, ModuleCost]:
    """Cost of every module, in the order of ``named_modules``."""
    recorder, totals, prefix = run.recorder, run.counter.get_flop_counts(), type(model).__name__
    found: dict[str, ModuleCost] = {}
    for path, module in reversed(list(model.named_modules())):
        key = f"{prefix}.{path}" if path else "Global"
        macs, other, acts = sum(totals.get(key, {}).values()) // 2, recorder.other[key], recorder.acts[key]
        if path not in run.shapes:  # a list of modules: it is never called, its children are
            children: list[Any] = [found[c] for name, _ in module.named_children() if (c := f"{path}.{name}") in found]
            macs, other, acts = (sum(c[i] for c in children) for i in (1, 2, 3))
        n = sum(p.numel() for p in module.parameters())
        found[path] = ModuleCost(n, macs, other, acts, run.shapes.get(path))
    return dict(reversed(found.items()))


def _summed(model: nn.Module, run: _Run, engine: str, reasons: dict[str, tuple[str, ...]]) -> Count:
    counter, recorder, _ = run
    params, buffers = list(model.parameters()), list(model.buffers())
    flops_of_op = counter.get_flop_counts().get("Global", {})
    macs_of_op = {str(op).replace(".", "::"): flops // 2 for op, flops in flops_of_op.items()}
    state_bytes: Counter[str] = Counter()
    for t in (part for whole in (*params, *buffers) for part in _parts(whole)):
        state_bytes[str(t.dtype).removeprefix("torch.")] += t.numel() * t.element_size()
    return Count(
        params=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        buffers=sum(b.numel() for b in buffers),
        state_bytes=dict(state_bytes),
        macs=counter.get_total_flops() // 2,
        flops_other=recorder.other["Global"],
        acts=recorder.acts["Global"],
        bytes=recorder.bytes,
        kernels=recorder.kernels,
        largest=recorder.largest,
        uncounted=dict(recorder.uncounted),
        modules=_of_modules(model, run),
        ops={name: (macs_of_op.get(name, 0), recorder.other_of_op[name], n) for name, n in recorder.calls.items()},
        engine=engine if engine != "real" else str(next((t.device for t in (*params, *buffers)), "cpu")),
        reasons=list(reasons),
        doubts={cell: [text for text, cells in reasons.items() if cell in cells] for cell in CELLS},
    )


def count(model: nn.Module, *args: Any, backward: bool = False, engine: str = "auto", **kwargs: Any) -> Count:
    """Count what one call ``model(*args, **kwargs)`` costs, on a copy: the model and its inputs stay as they are.

    A count is complete when every operator was seen and priced and the count holds for all inputs of these shapes.
    Otherwise its status is ``partial`` and its ``reasons`` say what is missing and where: operators without a formula,
    numbers computed by NumPy, in threads or by extensions, paths that the numbers of the input decide.

    Args:
        model: Any module; ``torch.compile`` and data-parallel wrappers are looked through.
        *args: Its inputs: tensors, or tuples, lists and dicts of them, on any device, meta included.
        backward: Also count the backward pass, in training mode.
        engine: ``meta`` (nothing is computed), ``fake``, ``real`` (the model's own device), or ``auto``: the first of
            them that can run the model as a real device would.  A backward pass starts at ``fake``, which knows the
            device's fused attention.
        **kwargs: Its keyword inputs.

    Returns:
        The counts for exactly these inputs: divide by the batch for one image.

    Raises:
        ValueError: If ``engine`` is unknown.
        Exception: What the model raises, if it cannot be run on these inputs at all.
    """
    if engine not in ("auto", *_ENGINES):
        raise UserError(f"got engine={engine!r}, need auto, {', '.join(_ENGINES)}")
    model = initialized(unwrap(model), args, kwargs)
    order = _order(model, backward) if engine == "auto" else [engine]
    run_on = functools.partial(_run_on, model=model, args=args, kwargs=kwargs, backward=backward)
    used, run = _first_settled(order, run_on)
    reasons = run.recorder.reasons()
    if run.recorder.unseen:  # constants outside the model are no news: in a second run they are the same ones
        again = run_on(used).recorder.unseen
        unseen = [text for key, (_, text) in again.items() if key not in run.recorder.unseen]
        reasons |= dict.fromkeys((f"{text}: {_ELSEWHERE}" for text in unseen), CELLS)
    return _summed(model, run, used, reasons)


# the second engine


def fvcore_counts(model: nn.Module, *inputs: Any, contractions: bool = True) -> dict[str, int]:
    """Multiply-accumulates of one call by the second engine, with complete handlers; the model is left as it was.

    Args:
        model: A module with real weights; it is traced on the CPU.
        *inputs: Its positional inputs.
        contractions: Count contractions only, as :func:`count` does; False keeps fvcore's own norms and pooling, which
            is the total that papers using fvcore print.

    Returns:
        Counts by module path, the total at ``""``.

    Raises:
        ValueError: If it holds or calls TorchScript.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it scripts functions, which is deprecated
        from fvcore.nn import FlopCountAnalysis

        from vizoo.tools.profiling.handlers import handlers
    scripted = [path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(f"{scripted[0] or 'the model'} is TorchScript, which fvcore does not see into")
    call = _copy(initialized(unwrap(model), inputs, {}), inputs, {}, torch.clone)
    model = call.model.cpu().eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (plain := unwrap(child)) is not child:  # compiled functions cannot be traced
                setattr(parent, name, plain)
    with _same_afterwards(call.constants), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it traces, which is deprecated too
        analysis = FlopCountAnalysis(model, tree_map_only(Tensor, Tensor.cpu, call.args))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        for name, handler in handlers(contractions).items():
            analysis.set_op_handle(name, handler)
        with whole_operators():
            return {path: int(n) for path, n in analysis.by_module().items()}


def differences(first: Count, second: dict[str, int]) -> list[str]:
    """Where the two engines disagree, innermost modules only.

    Args:
        first: Result of :func:`count`.
        second: Result of :func:`fvcore_counts`.

    Returns:
        One text for each module that differs while its children agree; empty when the totals are equal.
    """
    if second.get("", 0) == first.macs:
        return []
    wrong = [path for path, cost in first.modules.items() if second.get(path, 0) != cost.macs]
    inner = [p for p in wrong if not any(q != p and q.startswith(f"{p}." if p else "") for q in wrong)]
    return [f"{p or 'the model'}: {first.modules[p].macs:,} and by fvcore {second.get(p, 0):,}" for p in inner or [""]]
