"""Counts and measures one model, or says in one line why it cannot; compares several."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from vizoo.tools.common import Failure, UserError, explain, one_line, read_spec, resolve_device, short
from vizoo.tools.options import DTYPES, MEASURES, read_size
from vizoo.tools.profiling import counting, timing
from vizoo.tools.profiling.counting import Count, copied, differences, fvcore_counts
from vizoo.tools.profiling.machine import environment
from vizoo.tools.profiling.measures import Measured, Session, check_graph
from vizoo.tools.profiling.record import Record
from vizoo.tools.profiling.target import Target, evaluating, find_target
from vizoo.tools.profiling.timing import Comparison, Conditions, random_like


def profile(
    model: Any,
    inputs: Any = None,
    *,
    size: int | Sequence[int] | None = None,
    measure: str | Sequence[str] = "count",
    device: str = "cpu",
    dtype: str = "fp32",
    amp: bool = False,
    channels_last: bool = False,
    compile: bool | str | None = False,
    graph: bool = False,
    batch: int | None = None,
    weights: str | None = None,
    fused: bool = True,
    reparam: bool = False,
    features: bool = False,
    fvcore: bool = False,
    check: bool = False,
    min_time: float = 2.0,
    max_time: float = 10.0,
    model_kwargs: dict[str, Any] | None = None,
    step: Callable[[str], None] | None = None,
) -> Record:
    """Count and measure one model.

    Args:
        model: A target as commands take it, or any ``nn.Module``.
        inputs: Positional inputs of a module at batch 1, or the only one; None draws one image.
        size: Side, or height and width, in pixels; None is the model's own.
        measure: Any of ``count, latency, throughput, memory, train, modules, roofline, energy``, or ``all``.  Counts
            are always made.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``fp32``, ``tf32``, ``bf16`` or ``fp16`` of weights and input; with ``amp`` that of autocast.
            ``int8`` is dynamic quantisation of linear layers on a CPU, and float32 for all else.
        amp: Keep float32 weights and run under autocast.
        channels_last: Model and image in channels_last memory.
        compile: ``torch.compile``; a string is its mode.
        graph: Replay a CUDA graph of the call.
        batch: Images at once; None is 1, and for throughput 8 on a CPU or 64 on a GPU.
        weights: File of weights to load into a named model.
        fused: Build a named model with fused attention and kernels, or in plain PyTorch.
        reparam: Merge branches for inference where the model can.
        features: The backbone of a named model, as ``features_only``.
        fvcore: Also fvcore's own total.
        check: Compare both engines and check that the cost is linear in the batch; differences become notes.
        min_time: Least seconds of sampling.
        max_time: Most seconds of sampling.
        model_kwargs: Arguments of ``timm.create_model``.
        step: Called with a text when a new part begins, for a progress bar.

    Returns:
        The result.

    Raises:
        UserError: For an unknown name, device, dtype or mode, a size the model cannot take, or a bad combination.
        Failure: If it cannot be run on the device: a kernel or memory is missing.
    """
    return _fill(Record(), SimpleNamespace(**locals()))


def attempt(model: Any, **options: Any) -> Record:
    """As :func:`profile`, but a model that cannot be built, counted or measured is a result that says why.

    Args:
        model: A timm name, or any ``nn.Module``.
        **options: As of :func:`profile`.

    Returns:
        The result, perhaps with ``failure``.
    """
    asked = inspect.signature(profile).bind(model, **options)
    asked.apply_defaults()
    result = Record()
    try:
        return _fill(result, SimpleNamespace(**asked.arguments))
    except (Exception, SystemExit) as e:
        known = (1, f"{result.name!r} ended the process: {e!r}") if isinstance(e, SystemExit) else explain(e)
        if known is None:
            raise
        result.bad_input, result.failure = known[0] == 2, known[1]
        return result


def _fill(result: Record, asked: SimpleNamespace) -> Record:
    """Do what the arguments of :func:`profile` ask; what is known stays in the result if the rest fails."""
    model, tell = asked.model, asked.step or (lambda text: None)
    asked.weights = None if asked.weights is None else os.fspath(asked.weights)
    result.target = _asked_for(model, asked)
    how, timed = check_conditions(**vars(asked))
    size = result.target["size"]
    result.conditions = {
        "device": str(how.device),
        **{name: getattr(asked, name) for name in ("dtype", "amp", "channels_last")},
        "compile": None if not asked.compile else "default" if asked.compile is True else asked.compile,
        "graph": how.graph,
        "threads": torch.get_num_threads() if how.device.type == "cpu" else None,
        "batch": how.batch if timed else None,
        **{name: getattr(asked, name) for name in ("fused", "reparam", "features")},
    }
    result.environment = environment(how.device)
    tell("building")
    kwargs = {**(asked.model_kwargs or {}), **({"features_only": True} if asked.features else {})}
    real = bool(timed or asked.check or asked.fvcore or asked.weights)
    with timing.fused(asked.fused):
        target = find_target(model, asked.inputs, size, kwargs, real, asked.reparam, asked.weights)
    result.target = target.to_dict() | {"kwargs": result.target["kwargs"]}
    with evaluating(target.net):
        tell("counting")
        result.counts = _counted(target)
        if asked.check or asked.fvcore:
            _second_engine(result, target, asked.check, asked.fvcore)
        if timed:
            _measure(result, target, how, timed, tell)
    return result


def _asked_for(model: Any, asked: SimpleNamespace) -> dict[str, Any]:
    """The target of a record as far as it is known before it is built."""
    text = model if isinstance(model, str) else type(model).__name__
    spec = read_spec(model) if isinstance(model, str) else None
    size = spec.size if spec and spec.size else asked.size
    return {
        "spec": text,
        "kind": spec.kind if spec else "module",
        "name": text,
        "size": None if size is None else list(read_size(size, "size")),
        "inputs": [],
        "weights": asked.weights,
        "kwargs": _plain(asked.model_kwargs or {}),
    }


def _plain(value: Any) -> Any:
    """A value of an argument as JSON can hold it; as text where it is of another kind, or no finite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return getattr(value, "__qualname__", None) or repr(value)


def check_conditions(
    device: str = "cpu",
    measure: str | Sequence[str] = "count",
    dtype: str = "fp32",
    amp: bool = False,
    channels_last: bool = False,
    compile: bool | str | None = False,
    graph: bool = False,
    batch: int | None = None,
    min_time: float = 2.0,
    max_time: float = 10.0,
    **others: Any,
) -> tuple[Conditions, list[str]]:
    """Check how a model is to be measured; the arguments are those of :func:`profile`, of which others do not matter.

    Returns:
        The conditions, and what is measured.

    Raises:
        UserError: For what is unknown or does not go together.
    """
    asked = list(measure) if isinstance(measure, Iterable) and not isinstance(measure, str) else [measure]
    for name in asked:
        if name not in (*MEASURES, "all"):
            raise UserError(f"measure {name!r}: allowed are {', '.join(MEASURES)} and all")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    if batch is not None and not (isinstance(batch, Integral) and batch >= 1):
        raise UserError(f"batch {short(batch)}: need a whole number, at least 1")
    if not 0 <= min_time <= max_time:
        raise UserError(f"--min-time {min_time:g} --max-time {max_time:g}: need 0 <= min <= max seconds")
    place = resolve_device(device)
    batch = None if batch is None else int(batch)
    how = Conditions(place, dtype, amp, channels_last, compile, batch, min_time, max_time, graph)
    timed = [name for name in MEASURES[1:] if name in asked or "all" in asked]
    if timed and place.type == "meta":
        raise UserError(f"measure {timed[0]}: the meta device computes nothing; give cpu or cuda")
    check_graph(graph and bool(timed), place)
    if amp and dtype not in ("bf16", "fp16"):
        raise UserError(f"amp with dtype {dtype}: give dtype bf16 or fp16")
    if dtype == "int8":
        if place.type != "cpu":
            raise UserError(f"dtype int8 on {place}: dynamic quantisation runs on a CPU")
        if "train" in timed:
            raise UserError("dtype int8 with measure train: a quantised model has no gradients; give fp32 or bf16")
    return how, timed


def _counted(target: Target, **how: Any) -> Count:
    """Counts on the meta device, or where that cannot settle them of real weights and random inputs."""
    found: Count | None = None
    try:
        try:
            found = counting.count(target.net, *target.inputs, **how)
            settled = found.engine not in ("meta", "fake") or len(found.reasons) <= len(found.uncounted)
            if settled or target.anew is None or "engine" in how:
                return found
        except (AssertionError, ValueError):  # what the model itself checks
            raise
        except Exception:
            if target.anew is None or "engine" in how:
                raise
        net = target.anew()
        inputs = [random_like(x, 1, "cpu", _dtype(net)) for x in target.inputs]
        return counting.count(net, *inputs, **{**how, "engine": "real"})
    except Exception as e:
        if found is not None:
            return found
        if explain(e) is not None:
            raise
        at = f" at size {target.size[0]}x{target.size[1]}" if target.size else ""
        raise UserError(f"{target.name!r} cannot run{at}: {one_line(e)}") from e


def count(model: Any, *args: Any, **kwargs: Any) -> Count:
    """Count what one call of a model costs, named as in the command, or of any module.

    Args:
        model: A timm name, or any module, as of :func:`vizoo.tools.profiling.counting.count`.
        *args: Inputs of the call; none with a name: one image of the model's own size.
        **kwargs: ``backward`` and ``engine`` as of that function, with a name ``size`` as of :func:`profile`; others
            are keyword inputs of the call.

    Returns:
        The counts for exactly these inputs.

    Raises:
        UserError: For an unknown name, what is neither name nor module, or a named model that cannot run.
        ValueError: If ``engine`` is unknown.
        Exception: What a module raises, if it cannot be run on these inputs at all.
    """
    if isinstance(model, torch.nn.Module):
        return counting.count(model, *args, **kwargs)
    real = kwargs.get("engine") == "real"
    target = find_target(model, args or None, kwargs.pop("size", None), real=real)
    if real and not args:
        target = target._replace(inputs=[random_like(x, 1, "cpu", _dtype(target.net)) for x in target.inputs])
    with evaluating(target.net):
        return _counted(target, **kwargs)


def _dtype(net: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def _second_engine(result: Record, target: Target, check: bool, fvcore: bool) -> None:
    net, dtype = target.net, _dtype(target.net)
    try:
        one = [random_like(x, 1, "cpu", dtype) for x in target.inputs]
        total = fvcore_counts(net, *one, contractions=False).get("", 0) if fvcore else None
        second = fvcore_counts(net, *one) if check else {}
    except Exception as e:  # whatever a trace raises
        raise Failure(f"{result.name!r}: the second engine cannot trace it: {one_line(e)}") from e
    result.fvcore_total = total
    if check:
        wrong = differences(result.counted, second)
        result.notes += [f"engines differ: multiply-accumulates of {text}" for text in wrong]
        where = "meta" if result.counted.engine in ("meta", "fake") else "cpu"
        try:
            three = counting.count(net, *(random_like(x, 3, where, dtype) for x in target.inputs)).macs
        except Exception as e:  # a program for one batch
            result.notes.append(f"the batch cannot be changed: {one_line(e)}")
            return
        if three != 3 * result.macs:
            result.notes.append(f"not linear in the batch: {three:,} multiply-accumulates for 3 images")


def _measure(
    result: Record, target: Target, how: Conditions, measures: Sequence[str], tell: Callable[[str], None]
) -> None:
    try:
        net = target.net if target.own else copied(target.net)
        session = Session(how.placed(net), target.inputs, how)
        try:
            with how.entered():
                session.run(measures, tell)
        finally:
            _keep(session.measured, result)
    except torch.cuda.OutOfMemoryError:
        raise Failure(f"{result.name!r}: one image does not fit into the memory of {how.device}") from None
    except (UserError, Failure):
        raise
    except Exception as e:  # an operator that lacks the dtype, a compiler that is not there
        options = {"amp": how.amp, "channels-last": how.channels_last, "compile": how.compile}
        given = "".join(f" --{name}" for name, value in options.items() if value)
        text = f"{result.name!r} cannot run on {how.device} with --dtype {how.dtype}{given}: {one_line(e)}"
        raise Failure(text) from e


def _keep(found: Measured, result: Record) -> None:
    result.measurements = found.measurements
    result.operators = {op: (time.seconds, time.ceiling) for op, time in found.ops.items()}
    result.seconds = {path: seconds for path, seconds in found.modules.items() if seconds is not None}
    result.environment |= found.state
    result.notes += found.notes


def compare(*targets: Any, inputs: Any = None, device: str = "cpu", batch: int = 1, **how: Any) -> Comparison:
    """Time models or functions in turn, A, B, B, A, A, B ..., so that a drift of the machine meets all alike.

    Args:
        *targets: Names of timm, or modules, at least two; or one mapping of names to these or to functions, perhaps
            with the inputs behind it.
        inputs: Positional inputs of modules and functions, or the only one; None draws images for models.
        device: Where models of a name are run; modules and functions run where they are.
        batch: Images at once for models of a name.
        **how: ``rounds``, ``warmup``, ``tick``, ``clock``, ``least``: of :func:`vizoo.tools.profiling.timing.compare`.

    Returns:
        The samples by name, and how far the outputs are apart.

    Raises:
        UserError: As :func:`profile`.
        ValueError: If there are fewer than two.
    """
    if targets and isinstance(targets[0], Mapping):
        named, inputs = dict(targets[0]), targets[1] if len(targets) > 1 else inputs
    else:
        named = _by_name(targets)
    place = check_conditions(device, "latency", batch=batch)[0].device
    with contextlib.ExitStack() as stack:
        calls = {name: _call(target, inputs, place, batch, stack) for name, target in named.items()}
        return timing.compare(calls, device=_busy(named.values(), inputs, place), **how)


def _busy(targets: Iterable[Any], inputs: Any, device: torch.device) -> torch.device:
    """The device to wait for: a GPU, if anything that was given is on one."""
    tensors = [t for target in targets if isinstance(target, torch.nn.Module) for t in target.parameters()]
    given = [t.device for t in (*tensors, *tree_leaves(inputs)) if hasattr(t, "device")]
    return next((place for place in given if place.type == "cuda"), device)


def _by_name(targets: Sequence[Any]) -> dict[str, Any]:
    """Targets by their names; a second one of a name says so."""
    found: dict[str, Any] = {}
    names: list[str] = []
    for target in targets:
        name = target if isinstance(target, str) else type(target).__name__
        n = names.count(name)
        names.append(name)
        found[f"{name} {n + 1}" if n else name] = target
    return found


def _call(target: Any, inputs: Any, device: torch.device, batch: int, stack: contextlib.ExitStack) -> Callable[[], Any]:
    """The call of one side of a comparison; models are in evaluation mode until the stack is left."""
    given: Any = () if inputs is None else inputs if isinstance(inputs, Sequence) else (inputs,)
    if not isinstance(target, str | torch.nn.Module):
        if not callable(target):
            raise UserError(f"target {short(target)}: give a name of timm or vizoo, an nn.Module or a function")
        return functools.partial(target, *given)
    found = find_target(target, inputs, real=True)
    net = found.net.to(device) if found.own else found.net
    if inputs is None:
        where = next((p.device for p in net.parameters()), device)
        given = [random_like(x, batch, where, _dtype(net)) for x in found.inputs]
    stack.enter_context(evaluating(net))

    @torch.inference_mode()
    def call() -> Any:
        return net(*given)

    return call
