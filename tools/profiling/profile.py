"""Counts and measures one model, or says in one line why it cannot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config

from vizoo.tools.common import Failure, UserError, build_model, explain, one_line, resolve_device, resolve_models
from vizoo.tools.options import DTYPES, MODES, read_size
from vizoo.tools.profiling.counting import Count, count, differences, fvcore_counts, unwrap
from vizoo.tools.profiling.machine import environment
from vizoo.tools.profiling.result import Profile
from vizoo.tools.profiling.timing import Conditions, measure_model, random_like


def profile(
    model: Any,
    inputs: Sequence[Any] | None = None,
    *,
    size: int | Sequence[int] | None = None,
    mode: str | Sequence[str] = "count",
    device: str = "cpu",
    dtype: str = "fp32",
    amp: bool = False,
    channels_last: bool = False,
    compile: bool | str = False,
    batch: int | None = None,
    fvcore: bool = False,
    check: bool = False,
    min_time: float = 2.0,
    max_time: float = 10.0,
    model_kwargs: dict[str, Any] | None = None,
    step: Any = None,
) -> Profile:
    """Count and measure one model.

    Args:
        model: A timm name, or any ``nn.Module``.
        inputs: Positional inputs of a module at batch 1; None draws one image.
        size: Side, or height and width, in pixels; None is the model's own.
        mode: Any of ``count``, ``memory``, ``latency``, ``throughput``, or ``all``.  Counts are always made.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``fp32``, ``tf32``, ``bf16`` or ``fp16`` of weights and input; with ``amp`` that of autocast.
        amp: Keep float32 weights and run under autocast.
        channels_last: Model and image in channels_last memory.
        compile: ``torch.compile``; a string is its mode.
        batch: Images at once for latency and throughput; None is 1, and 8 on a CPU or 64 on a GPU.
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
    how = Conditions(resolve_device(device), dtype, amp, channels_last, compile, batch, min_time, max_time)
    timed = _timed([mode] if isinstance(mode, str) else mode, how)
    tell = step or (lambda text: None)
    tell("building")
    kwargs = dict(model_kwargs or {})
    real = bool(timed or check or fvcore or kwargs.get("checkpoint_path"))
    return _profiled(_build(model, inputs, size, kwargs, real), how, timed, check, fvcore, tell)


def _timed(asked: Sequence[str], how: Conditions) -> list[str]:
    """Check the modes and conditions that were asked for; the modes in which the model is run."""
    modes = list(MODES) if "all" in asked else list(asked)
    for name in modes:
        if name not in MODES:
            raise UserError(f"mode {name!r}: allowed are {', '.join(MODES)} and all")
    if how.dtype not in DTYPES:
        raise UserError(f"dtype {how.dtype!r}: allowed are {', '.join(DTYPES)}")
    if how.batch is not None and how.batch < 1:
        raise UserError(f"batch {how.batch}: at least 1")
    timed = [m for m in modes if m != "count"]
    if timed and how.device.type == "meta":
        raise UserError(f"mode {timed[0]}: the meta device computes nothing; give cpu or cuda")
    if how.amp and how.dtype not in ("bf16", "fp16"):
        raise UserError(f"amp with dtype {how.dtype}: give dtype bf16 or fp16")
    return timed


class _Subject(NamedTuple):
    """What is profiled.

    Attributes:
        net: The module; without real weights on the meta device.
        name: Of the model, or of the module's class.
        size: Height and width of the image; None for inputs that the caller gave.
        inputs: Positional inputs at batch 1.
        own: Whether it was built here; a module of the caller is neither moved nor converted.
        anew: Builds it with real weights; None for inputs that the caller gave.
    """

    net: torch.nn.Module
    name: str
    size: tuple[int, int] | None
    inputs: Sequence[Any]
    own: bool
    anew: Callable[[], torch.nn.Module] | None


def _build(model: Any, inputs: Sequence[Any] | None, size: Any, kwargs: dict[str, Any], real: bool) -> _Subject:
    """Build a named model, or take a module; without ``real`` the weights are on the meta device."""
    place: dict[str, Any] = {} if real else {"device": "meta"}
    own = isinstance(model, str)
    name = resolve_models([model])[0] if own else ""
    net = build_model(name, **kwargs, **place) if own else unwrap(model)
    name = name or type(net).__name__
    if inputs is not None:
        return _Subject(net, name, None, inputs, own, None)
    config = get_model_input_config(net)
    chans, *given = config["input_size"]
    side = (given[0], given[1]) if size is None else read_size(size, "size")
    if own and config["fixed_input_size"] and side != tuple(given):
        net = build_model(name, **{**kwargs, "img_size": side}, **place)

    def anew() -> torch.nn.Module:
        return _build(model, None, size, kwargs, real=True).net.eval()

    return _Subject(net, name, side, (torch.empty(1, chans, *side, device="meta"),), own, anew)


@contextlib.contextmanager
def _evaluating(net: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    before = {m: m.training for m in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _profiled(
    subject: _Subject, how: Conditions, timed: Sequence[str], check: bool, fvcore: bool, tell: Callable[[str], None]
) -> Profile:
    with _evaluating(subject.net):
        tell("counting")
        counts = _counted(subject)
        config = {
            "device": str(how.device),
            "dtype": how.dtype,
            "amp": how.amp,
            "channels_last": how.channels_last,
            "compile": how.compile,
            "threads": torch.get_num_threads() if how.device.type == "cpu" else None,
        }
        result = Profile(subject.name, subject.size, config, {}, counts)
        if check or fvcore:
            _second_engine(result, subject, check, fvcore)
        result.environment = environment(how.device)
        if timed:
            _measure(result, subject, how, timed, tell)
    return result


def _counted(subject: _Subject) -> Count:
    """Counts on the meta device, or where that cannot settle them of real weights and random inputs."""
    found: Count | None = None
    try:
        try:
            found = count(subject.net, *subject.inputs)
            settled = found.engine not in ("meta", "fake") or len(found.reasons) <= len(found.uncounted)
            if settled or subject.anew is None:
                return found
        except (AssertionError, ValueError):  # what the model itself checks
            raise
        except Exception:
            if subject.anew is None:
                raise
        net = subject.anew()
        return count(net, *(random_like(x, 1, "cpu", _dtype(net)) for x in subject.inputs), engine="real")
    except Exception as e:
        if found is not None:
            return found
        if explain(e) is not None:
            raise
        at = f" at size {subject.size[0]}x{subject.size[1]}" if subject.size else ""
        raise UserError(f"{subject.name!r} cannot run{at}: {one_line(e)}") from e


def _dtype(net: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def _second_engine(result: Profile, subject: _Subject, check: bool, fvcore: bool) -> None:
    net, dtype = subject.net, _dtype(subject.net)
    try:
        one = [random_like(x, 1, "cpu", dtype) for x in subject.inputs]
        total = fvcore_counts(net, *one, contractions=False).get("", 0) if fvcore else None
        second = fvcore_counts(net, *one) if check else {}
    except Exception as e:  # whatever a trace raises
        raise Failure(f"{result.model!r}: the second engine cannot trace it: {one_line(e)}") from e
    result.fvcore_total = total
    if check:
        wrong = differences(result.counts, second)
        result.notes += [f"engines differ: multiply-accumulates of {text}" for text in wrong]
        where = "meta" if result.counts.engine in ("meta", "fake") else "cpu"
        three = count(net, *(random_like(x, 3, where, dtype) for x in subject.inputs)).macs
        if three != 3 * result.macs:
            result.notes.append(f"not linear in the batch: {three:,} multiply-accumulates for 3 images")


def _measure(
    result: Profile, subject: _Subject, how: Conditions, modes: Sequence[str], tell: Callable[[str], None]
) -> None:
    try:
        net = subject.net if subject.own else copy.deepcopy(subject.net)
        net = net.to(how.device, how.weights)
        if how.channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with how.entered():
            found = measure_model(net, subject.inputs, modes, how, tell)
    except torch.cuda.OutOfMemoryError:
        raise Failure(f"{result.model!r}: one image does not fit into the memory of {how.device}") from None
    except Exception as e:  # an operator that lacks the dtype, a compiler that is not there
        options = {"amp": how.amp, "channels-last": how.channels_last, "compile": how.compile}
        given = "".join(f" --{name}" for name, value in options.items() if value)
        text = f"{result.model!r} cannot run on {how.device} with --dtype {how.dtype}{given}: {one_line(e)}"
        raise Failure(text) from e
    result.latency, result.latency_batch = found.latency, found.latency_batch
    result.throughput, result.throughput_batch = found.throughput, found.throughput_batch
    result.memory = found.memory
    result.environment |= found.state
    result.notes += found.notes
