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
import functools
import itertools
import logging
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops.backend import whole_operators
from vizoo.tools.common import Failure, UserError
from vizoo.tools.profiling.boxes import detects, most_boxes
from vizoo.tools.profiling.fused import flex_as_operator
from vizoo.tools.profiling.meta import Kernels
from vizoo.tools.profiling.packed import PackedLayers, packed_weights
from vizoo.tools.profiling.recording import (
    CELLS,
    ELSEWHERE,
    SPARSE,
    Modules,
    OpCall,
    Origins,
    Recorder,
    Watch,
    new_counter,
    parts_of,
    tensors_in,
    watch_threads,
)


class ModuleCost(NamedTuple):
    """Cost of one module with everything inside it; ``out`` is the shape of its (last) first output."""

    params: int
    macs: int
    other: int
    acts: int
    out: tuple[int, ...] | None


class OpCost(NamedTuple):
    """Cost of all calls of an operator."""

    macs: int
    other: int
    calls: int
    bytes: int


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
        ops: Cost by operator.
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
    ops: dict[str, OpCost]
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
        """Rows with ``op, calls, macs, share, other, bytes``, the most expensive first.

        Args:
            top: Most rows; 0 for all.

        Returns:
            The rows.
        """
        rows: list[dict[str, Any]] = [
            {"op": name, **cost._asdict(), "share": cost.macs / max(1, self.macs)} for name, cost in self.ops.items()
        ]
        rows.sort(key=lambda row: (-row["macs"], -row["other"], row["op"]))
        return rows[:top] if top else rows


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
    given = {id(t): moved(t) for t in tensors_in((args, kwargs))}
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
    meta = any(t.is_meta for t in (*tensors_in((args, kwargs)), *tensors))
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
    with _same_afterwards(tensors_in((args, kwargs))), torch.no_grad():
        ours.eval()(*args, **kwargs)  # which changes no statistics
    for module, mode in training.items():
        module.training = mode
    return ours


class _Run(NamedTuple):
    """What one engine saw."""

    counter: FlopCounterMode
    recorder: Recorder
    shapes: dict[str, tuple[int, ...] | None]


def _run(call: _Call, mode: Any, engine: str, most: bool = False, operators: Kernels | None = None) -> _Run:
    model, args, kwargs, constants = call
    counter = new_counter(engine)
    counter.mod_tracker = Modules()
    recorder = Recorder(counter, Origins(constants, tensors_in((args, kwargs))), engine, operators)
    paths = {id(m): path for path, m in model.named_modules()}
    shapes: dict[str, tuple[int, ...] | None] = {}
    counting = threading.get_ident()

    def note(module: nn.Module, given: Any, out: Any) -> None:
        if id(module) not in paths:
            return
        if threading.get_ident() != counting:
            recorder.tell(f"{paths[id(module)]} runs in another thread: what it computes is not counted")
        first = next(iter(tensors_in(out)), None)
        shapes[paths[id(module)]] = None if first is None else tuple(first.shape)

    backward = mode is torch.enable_grad
    model.train(backward)
    if not backward:  # the counter's module tracker cannot follow views of parameters without a graph
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        for p in model.parameters():
            p.requires_grad_(False) if p.is_leaf else p.detach_()
    hook = register_module_forward_hook(note)  # scripted modules take none of their own
    try:
        around = _same_afterwards(constants), watch_threads(recorder), flex_as_operator(), mode()
        with contextlib.ExitStack() as stack:
            packed = [PackedLayers()] if engine != "real" and packed_weights(model) else []
            for context in (*around, *packed, Watch(recorder, engine), recorder, counter):
                stack.enter_context(context)
            if most:
                stack.enter_context(most_boxes(recorder))
            out = model(*args, **kwargs)
            if backward:
                # views, for the hooks of a tensor that the engine starts from alone do not run
                parts = [torch.ops.aten.alias(t) for t in tensors_in(out) if t.requires_grad]
                if not parts and any(p.requires_grad for p in model.parameters()):
                    recorder.tell("the model returns nothing that needs a gradient: no backward pass is counted")
                torch.autograd.backward(parts, [torch.ones_like(t) for t in parts])
    finally:
        hook.remove()
    recorder.look(out, "the model returns")
    return _Run(counter, recorder, shapes)


def _on_meta(model: nn.Module, args: Any, kwargs: Any, mode: Any) -> _Run:
    given = any(not t.is_meta for t in tensors_in((args, kwargs)))  # then the numbers of these inputs are asked for
    most = not given and mode is not torch.enable_grad and detects(model)
    return _run(_copy(model, args, kwargs, lambda t: t.to("meta")), mode, "meta", most)


def _on_fake(model: nn.Module, args: Any, kwargs: Any, mode: Any) -> _Run:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

    tensors = FakeTensorMode(allow_non_fake_inputs=True)
    home = _device(model)

    def move(t: Tensor) -> Tensor:
        meta = t.device.type == "meta"
        if not (meta or t.is_inference()) or t.layout in SPARSE:
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
        except Failure:  # of a file, whatever runs it
            raise
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
    held: dict[nn.Module, dict[int, int]] = {}
    for path, module in reversed(list(model.named_modules())):
        key = f"{prefix}.{path}" if path else "Global"
        macs, other, acts = sum(totals.get(key, {}).values()) // 2, recorder.other[key], recorder.acts[key]
        if path not in run.shapes:  # a list of modules: it is never called, its children are
            children: list[Any] = [found[c] for name, _ in module.named_children() if (c := f"{path}.{name}") in found]
            macs, other, acts = (sum(c[i] for c in children) for i in (1, 2, 3))
        n = sum(_weights(module, held).values())
        found[path] = ModuleCost(n, macs, other, acts, run.shapes.get(path))
    return dict(reversed(found.items()))


def _weights(module: nn.Module, held: dict[nn.Module, dict[int, int]]) -> dict[int, int]:
    """Elements of the parameters in a module, shared ones once; ``held`` keeps those of the modules in it."""
    if module not in held:
        own = {id(p): p.numel() for p in module.parameters(recurse=False)}
        held[module] = functools.reduce(dict.__or__, (_weights(m, held) for m in module.children()), own)
    return held[module]


def _summed(model: nn.Module, run: _Run, engine: str, reasons: dict[str, tuple[str, ...]]) -> Count:
    counter, recorder, _ = run
    params, buffers = list(model.parameters()), list(model.buffers())
    flops_of_op = counter.get_flop_counts().get("Global", {})
    macs = {str(op).replace(".", "::"): flops // 2 for op, flops in flops_of_op.items()}
    state_bytes: Counter[str] = Counter()
    for t in (part for whole in (*params, *buffers) for part in parts_of(whole)):
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
        ops={
            name: OpCost(macs.get(name, 0), recorder.other_of_op[name], n, recorder.bytes_of_op[name])
            for name, n in recorder.calls.items()
        },
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
        reasons |= dict.fromkeys((f"{text}: {ELSEWHERE}" for text in unseen), CELLS)
    return _summed(model, run, used, reasons)


@torch.inference_mode(False)
def listed_calls(model: nn.Module, args: Sequence[Any], operators: Kernels) -> Iterator[list[OpCall]]:
    """Every call of an operator in passes of a copy of a model, which is made once.

    Args:
        model: Any module; it is run uncompiled, where it is.
        args: Its inputs.
        operators: What runs and times each operator.

    Yields:
        The calls of one more pass, with the costs that :func:`count` sees on the model's own device.
    """
    call = _copy(initialized(unwrap(model), args, {}), tuple(args), {}, torch.clone)
    while True:
        yield _run(call, torch.inference_mode, "real", operators=operators).recorder.listed


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
