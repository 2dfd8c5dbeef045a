"""What one run of a model is seen to do: operators with their costs, and what no mode sees, by name.

``FlopCounterMode`` counts contractions; :class:`Recorder`, a dispatch mode beside it, prices every other operator, and
says which nobody can price; :class:`Watch` sees what makes no operator.  :class:`Origins` follows where numbers come
from, so that a count can say when it holds for the numbers given only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _StopRecomputationError
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from vizoo.backbones.ops.backend import is_transforming
from vizoo.backbones.ops.cost import COSTS, Cost, find_operator, flop_formulas
from vizoo.tools.profiling.fused import run_flex_attention, run_recurrent
from vizoo.tools.profiling.meta import Kernels
from vizoo.tools.profiling.prices import PRICES, of_complex, price_of

CELLS = ("macs", "flops_other", "acts", "bytes")  # figures of a count that may be partial; weights never are


def _shapes(value: Any) -> Any:
    """Arguments of an operator with tensors replaced by shapes; a quicker ``tree_map``, for they are plain lists."""
    if isinstance(value, Tensor):
        return value.shape
    return [_shapes(v) for v in value] if type(value) in (list, tuple) else value


@functools.cache
def is_view(func: Any) -> bool:
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


def new_counter(engine: str) -> FlopCounterMode:
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
        sparse = next((t for t in given if t.layout in SPARSE), None) if real else None
        if sparse is not None:
            values = sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()
            n = n * values.numel() // max(1, sparse.numel())
        return n

    return flops


# what a count must say about itself

SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_GOING_BACK = {torch.autograd.backward, torch.autograd.grad, Tensor.backward}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
ELSEWHERE = "made by another thread, NumPy, an extension or a kernel, and not counted"
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
_PICKING = {  # they read of their first argument what they return
    f"aten::{name}"
    for name in ("index", "_unsafe_index", "index_select", "embedding", "gather", "take", "masked_select")
}
_OVERWRITING = {f"aten::{name}_" for name in ("copy", "fill", "zero", "normal", "uniform", "random", "bernoulli")}
_SAME_EVERYWHERE = {  # their paths for a device cost what the others cost
    "torch", "timm", "torchvision", "vizoo", "mmengine", "mmcv", "mmdet", "mmseg",
}  # fmt: skip
_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _storage(t: Tensor) -> Any:
    """Storage of a tensor; None where it has none of its own."""
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return None


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in a value, however it is nested."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (int, float, str, type(None))):  # most arguments of operators
        return []
    return [t for value in tree_leaves(values) for t in ([value] if isinstance(value, Tensor) else _held(value))]


def _held(value: Any) -> list[Tensor]:
    """Tensors in a value that PyTorch takes for a leaf: mappings of other classes, data classes."""
    if isinstance(value, Mapping):
        return tensors_in(list(value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
    return []


def parts_of(t: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor wraps, such as numbers and scales of a quantised one; itself if it wraps none."""
    if not is_traceable_wrapper_subclass(t):
        return [t]
    return [part for name in t.__tensor_flatten__()[0] for part in parts_of(getattr(t, name))]


def _stored(t: Tensor) -> int:
    """Bytes that the numbers of a tensor take in memory: those of an expanded or overlapping one are there once."""
    size = t.element_size()
    try:
        own = size * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n)
        return min(own, t.untyped_storage().nbytes())
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return size * t.numel()


def _moved(func: Any, name: str, args: Any, kwargs: Any, out: list[Tensor]) -> tuple[int, int]:
    """Bytes that an operator reads and writes, and those of the memory where it does: what it changes is one place.

    Args:
        func: The operator.
        name: Its name in the schema.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: The tensors that it returned.

    Returns:
        Both numbers.
    """
    short = name.partition("::")[2]
    written = sum(map(_stored, out))
    if short.endswith("_like") or short.startswith("new_"):  # they ask for a shape
        return written, written
    targets = {a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write}
    values = [v for key, v in kwargs.items() if key not in targets]
    given = tensors_in([*args[name in _OVERWRITING :], *values])
    sizes = list(map(_stored, given))
    if name in _PICKING and sizes:
        sizes[0] = min(sizes[0], written)
    places = {id(t): size for t, size in (*zip(given, sizes, strict=True), *((t, _stored(t)) for t in out))}
    return sum(sizes) + written, sum(places.values())


class OpCall(NamedTuple):
    """One call of an operator.

    Attributes:
        op: Its name.
        flops: Two for each multiply-accumulate, and the others.
        bytes: Read and written.
        place: Bytes of the memory that it reads or writes.
        seconds: Of the call; None where it was not timed.
    """

    op: str
    flops: int
    bytes: int
    place: int
    seconds: float | None


class Origins:
    """Where the numbers of each tensor come from: constants, the input, or nobody who was seen.

    Args:
        constants: Tensors of the model.
        inputs: Tensors given to it.
    """

    def __init__(self, constants: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.known: dict[int, tuple[StorageWeakRef, bool | None]] = {}  # from the input; None before it is written
        self.left = False  # did numbers of the input reach Python, from where they may come back
        self.write((part for t in constants for part in parts_of(t)), False)
        self.write((part for t in inputs for part in parts_of(t)), True)

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
            self.write(tensors_in(out), None)
            return [], False
        python = [out] if short == "lift_fresh" else tensors_in(args[1]) if "index" in short and len(args) > 1 else []
        self.write([t for t in python if self.unseen(t) is not None], self.left)  # numbers of Python: x[[0, 2]]
        if is_view(func):
            return [], False
        places = _written(func)
        written = tensors_in([args[i] if i < len(args) else kwargs.get(name) for i, name in places]) if places else []
        unread = {id(t) for t in written}
        if short.endswith("_like") or short.startswith("new_"):  # they ask for a shape
            unread = {id(t) for t in given}
        elif kwargs.get("beta") == 0:  # then the first term of the sum is not read
            unread.add(id(args[0]))
        read = [t for t in given if id(t) not in unread] if unread else given
        data = any(self.data(t) is not False for t in read) or any(self.data(t) is True for t in written)
        self.write((*tensors_in(out), *written), data)
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
        return [t for t in tensors_in(args[1]) if t.dtype in (torch.bool, torch.uint8)]
    return [] if _VALUE_TAGS.isdisjoint(func.tags) else given


class Recorder(TorchDispatchMode):
    """Prices what ``FlopCounterMode`` does not count, and names what nobody can price or nobody saw.

    Args:
        counter: The mode that counts contractions.
        origins: Where the numbers of the model and its inputs come from.
        engine: What the model runs on.
        operators: What runs each operator; None for the quick way on the meta device.
    """

    supports_higher_order_operators = True

    def __init__(
        self, counter: FlopCounterMode, origins: Origins, engine: str, operators: Kernels | None = None
    ) -> None:
        super().__init__()
        self.counter, self.origins, self.engine = counter, origins, engine
        self.uncounted: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.other_of_op: Counter[str] = Counter()
        self.bytes_of_op: Counter[str] = Counter()
        self.listed: list[OpCall] = []  # every call, where operators are timed
        self.other: defaultdict[str, int] = defaultdict(int)
        self.acts: defaultdict[str, int] = defaultdict(int)
        self.bytes = self.kernels = self.largest = 0
        self.told: defaultdict[str, Counter[str]] = defaultdict(Counter)  # calls by module, by what is said of them
        self.doubts: set[str] = set()  # those of them that another engine may settle
        self.cells: dict[str, tuple[str, ...]] = {}  # the figures that each concerns
        self.unseen: dict[int, tuple[Any, str]] = {}  # storages that no operator wrote, and who read them where
        self.operators = operators or Kernels()

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
        for t in tensors_in(values):
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
            self.origins.write(tensors_in(out), True)
            return out
        name = func._schema.name
        given = [] if is_view(func) else [t for v in (*args, *kwargs.values()) for t in tensors_in(v)]
        read, data = self.origins.follow(func, args, kwargs, given, out)
        self.look(read, f"{name} in {{where}} reads")
        if any(self.origins.data(t) for t in _deciding(func, args, given)):
            self.origins.left = True
            self.tell(f"{name} in {{where}} asks for numbers of the input: counted for those given, others may differ")
        if is_view(func):
            return out
        if name == "aten::scaled_dot_product_attention" and out.device.type == "meta" and out.dim() == 4:
            out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as fused kernels lay it out, so no copies follow
            self.origins.write([out], data)
        written = tensors_in(out)
        price = price_of(func, name)
        first = written[0].shape if written else None
        shapes = {**{k: _shapes(v) for k, v in kwargs.items()}, "out": first}
        cost = price(*_shapes(args), **shapes) if price else Cost()
        known = func._overloadpacket in flop_registry and name not in COSTS
        if price is None and not known:
            self._unpriced(name)
        product = known or bool(cost.macs)
        if cost.macs and func._overloadpacket not in self.counter.flop_registry:  # defined since the run began
            self.counter.flop_registry = new_counter(self.engine).flop_registry
        if product:
            self._check_stored(name, given)
        if any(t.is_complex() for t in given):
            cost = cost._replace(other=of_complex(name, cost.other))
        if cost.acts is None:
            cost = cost._replace(acts=written[0].numel() if product and written else 0)
        moved, place = _moved(func, name, args, kwargs, written)
        moved = moved if cost.bytes is None else cost.bytes
        self._add(name, cost, moved, written)
        if self.operators.seconds is not None:
            formula = self.counter.flop_registry.get(func._overloadpacket)
            products = formula(*args, **kwargs, out_val=out) if formula else 2 * cost.macs
            self.listed.append(OpCall(name, products + cost.other, moved, place, self.operators.seconds))
        return out

    def _check_stored(self, name: str, given: list[Tensor]) -> None:
        """Say where a product is counted for numbers that it may not have."""
        sparse = sum(t.layout in SPARSE for t in given)
        if sparse and self.engine != "real":
            self.tell(f"{name} in {{where}} reads sparse tensors: counted as dense", doubt=True, cells=("macs",))
        elif sparse > 1:
            self.tell(f"{name} in {{where}} multiplies sparse tensors: one is counted as dense", cells=("macs",))

    def charge(self, name: str, cost: Cost, given: list[Tensor], written: list[Tensor]) -> None:
        """Add a call of an operator that no mode sees, with its multiply-accumulates."""
        for path in set(self.counter.mod_tracker.parents):
            self.counter.flop_counts[path][name] += 2 * cost.macs
        self.origins.write(written, True)
        self._add(name, cost, sum(map(_stored, (*given, *written))) if cost.bytes is None else cost.bytes, written)

    def _add(self, name: str, cost: Cost, moved: int, written: list[Tensor]) -> None:
        self.calls[name] += 1
        self.other_of_op[name] += cost.other
        self.bytes_of_op[name] += moved
        self.kernels += 1
        self.bytes += moved
        self.largest = max([self.largest, *(t.numel() for t in written)])
        for path in set(self.counter.mod_tracker.parents):
            self.other[path] += cost.other
            self.acts[path] += cost.acts or 0

    def _unpriced(self, name: str) -> None:
        self.uncounted[name] += 1
        text = f"operator {name} has no cost formula: {{calls}} in {{where}}"
        self.tell(text, cells=("macs", "flops_other", "acts"))  # its bytes are those of its tensors


class Watch(TorchFunctionMode):
    """Sees what makes no operator: numbers that leave PyTorch, questions about the device, errors that a model catches.

    Args:
        recorder: Where it is told.
        engine: What the model runs on.
    """

    def __init__(self, recorder: Recorder, engine: str) -> None:
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
                origins.write([t for t in tensors_in(out) if origins.unseen(t) is not None], origins.left)
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
def watch_threads(recorder: Recorder) -> Iterator[None]:
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


class Modules(ModuleTracker):
    """Follows modules also without a graph and in transforms of ``torch.func``, where hooks on gradients raise.

    A module whose inputs need no gradient is left, on the way back, when its parameters have theirs.
    """

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        if not self._has_way_back():
            super()._fw_pre_hook(mod, None)
            return
        given = [t for t in tensors_in(input) if t.requires_grad]
        ends = given or [p for p in mod.parameters() if p.requires_grad]
        has_leaves = any(t.is_leaf for t in ends)  # their gradients may be asked for inside the model
        super()._fw_pre_hook(mod, None if has_leaves else ends)
        if has_leaves:
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
