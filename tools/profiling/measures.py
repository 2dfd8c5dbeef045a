"""Everything that is measured of a model: each measure by its name, in an order in which none disturbs the next."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from vizoo.tools.common import Failure, UserError, one_line
from vizoo.tools.profiling.energy import energy
from vizoo.tools.profiling.memory import inference_parts, peak_memory
from vizoo.tools.profiling.modules import module_times
from vizoo.tools.profiling.roofline import OpTime, roofline
from vizoo.tools.profiling.state import Watch
from vizoo.tools.profiling.step import TrainingStep, step_memory, step_times, training
from vizoo.tools.profiling.timing import (
    Conditions,
    Measurement,
    Stats,
    back_to_back_samples,
    compiled,
    measure,
    random_like,
)

MEASURES = ("latency", "throughput", "memory", "train", "modules", "roofline", "energy")
UNGRAPHED = {  # modes of torch.compile that replay a CUDA graph, whose memory no call allocates, and the same without
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
BEFORE_CAPTURE = 3  # calls on a stream of their own before a graph is captured
Result = TypeVar("Result")


class Measured(NamedTuple):
    """Measurements of one model; what was not asked for is missing.

    Attributes:
        notes: What is doubtful or was changed on the way.
        state: Of the device and PyTorch's settings while it was timed: :func:`vizoo.tools.profiling.state.state`.
        measurements: Every measured figure.
        modules: Seconds of each module by path; None for those that were not called.
        ops: Seconds of each operator and its share of the ceiling.
    """

    notes: list[str]
    state: dict[str, Any]
    measurements: list[Measurement]
    modules: dict[str, float | None]
    ops: dict[str, OpTime]


def check_graph(graph: bool, device: torch.device) -> None:
    """Refuse a CUDA graph on another device.

    Raises:
        UserError: If there is one.
    """
    if graph and device.type != "cuda":
        raise UserError(f"--graph: needs CUDA, got --device {device}")


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph, which is replayed.

    Args:
        call: The call, whose inputs stay where they are.
        device: Where it computes.

    Returns:
        What replays it, and returns the same tensors each time.

    Raises:
        UserError: If that is no CUDA device.
        Failure: If the call cannot be captured: it waits for the device, or works on the host.
    """
    check_graph(True, device)
    enabled = gc.isenabled()
    gc.disable()  # what it collects may give memory back within the graph
    try:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(BEFORE_CAPTURE):
                    call()
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as e:
        raise Failure(f"--graph: the model cannot be captured in a CUDA graph: {one_line(e)}") from e
    finally:
        if enabled:
            gc.enable()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


class Calls:
    """Calls of a model with random inputs of any batch.

    Args:
        model: A module in evaluation mode, on its device and in its dtype.
        inputs: Positional inputs at batch 1.
        how: The conditions.
    """

    def __init__(self, model: torch.nn.Module, inputs: Sequence[Any], how: Conditions) -> None:
        self.model, self.single, self.how = model, inputs, how
        self.watch = Watch(how.device)
        self.breaks = 0  # of the graphs that were compiled
        self._last: tuple[int, list[Any], Callable[[], Any]] | None = None

    def inputs(self, n: int) -> list[Any]:
        """Inputs of ``n`` times the batch."""
        tensors = [random_like(x, n, self.how.device, self.how.weights) for x in self.single]
        if self.how.channels_last:
            last = torch.channels_last
            tensors = tree_map_only(
                torch.Tensor, lambda x: x.contiguous(memory_format=last) if x.dim() == 4 else x, tensors
            )
        return tensors

    def prepared(self, n: int) -> tuple[list[Any], Callable[[], Any]]:
        """Inputs of ``n`` images and the call with them, compiled for their shapes or captured where asked for."""
        if self._last is None or self._last[0] != n:
            self._last = None  # before there are new ones: both may not fit into memory
            tensors = self.inputs(n)
            call = self._call(self._compiled(), tensors)
            self._last = n, tensors, captured(call, self.how.device) if self.how.graph else call
        return self._last[1:]

    def _compiled(self) -> Callable[..., Any]:
        how = self.how.compile
        return compiled(self.model, mode=how if isinstance(how, str) else None) if how else self.model

    def _call(self, run: Callable[..., Any], tensors: Sequence[Any]) -> Callable[[], Any]:
        """The call; under autocast it casts weights each time, as one that enters autocast itself."""

        def cast_and_run() -> Any:
            try:
                return run(*tensors)
            finally:
                torch.clear_autocast_cache()

        return cast_and_run if self.how.amp else lambda: run(*tensors)

    def eager(self, n: int) -> tuple[list[Any], Callable[[], Any]]:
        """Inputs of ``n`` images and the plain call with them."""
        self._last = None
        tensors = self.inputs(n)
        return tensors, self._call(self.model, tensors)

    def time(self, n: int) -> tuple[Stats, Callable[[], Any]]:
        """Time the call with ``n`` images; also returns it."""
        with _memory_errors():
            call, before, how = self.prepared(n)[1], self._graph_breaks(), self.how
            stats = measure(call, how.device, min_time=how.min_time, max_time=how.max_time, tick=self.tick)
        self.breaks = max(self.breaks, self._graph_breaks() - before)
        return stats, call

    def tick(self, share: float) -> None:
        """Look at the device, but for the warm-up, whose clocks are not those of the samples."""
        if share:
            self.watch.look()

    def _graph_breaks(self) -> int:
        """Graph breaks of whatever was compiled by now."""
        return sum(torch._dynamo.utils.counters["graph_break"].values()) if self.how.compile else 0

    def halved(self, n: int, attempt: Callable[[int], Result]) -> tuple[Result, int, list[str]]:
        """Try with ``n`` images, or with half as many and so on where memory is too small.

        Returns:
            What the attempt returned, how many images at once, and a note if they are fewer.
        """
        batch = n
        while True:
            try:
                with _memory_errors():
                    found = attempt(batch)
            except torch.cuda.OutOfMemoryError:
                if batch == 1:
                    raise
            else:
                return found, batch, [f"out of memory: batch reduced to {batch}"] * (batch < n)
            self._last = None  # here, for the error above kept what it had met
            if self.how.device.type == "cuda":
                torch.cuda.empty_cache()
            batch //= 2

    def speed(self, n: int) -> Measurement:
        """Images a second in calls of ``n`` images."""
        stats, call = self.time(n)
        cuda = self.how.device.type == "cuda"
        seconds = back_to_back_samples(call, self.how.device) if cuda else stats.samples
        speeds = [[n / s for s in seconds]]
        return Measurement("throughput", "images/s", n, speeds, {}, stats.warnings, stats.details)

    def memory(self, n: int) -> Measurement:
        """Peak memory of a call with ``n`` images; on a CPU that of the uncompiled model."""
        eager = self.how.device.type != "cuda"
        self._without_graphs()
        with _memory_errors():
            tensors, call = self.prepared(n)
            plain = self._call(self.model, tensors)
            found = peak_memory(plain if eager else call, self.model, tensors, self.how.device)
            opaque = bool(self.how.compile) and not eager
            parts, quality = inference_parts(found, None if opaque else plain, self.model, tensors, self.how.device)
        details = {"how": found.how, "reserved": found.reserved}
        return Measurement("memory", "bytes", n, [[found.peak]], parts, quality, details)

    def _without_graphs(self) -> None:
        """A graph that is replayed allocates nothing."""
        cuda = self.how.device.type == "cuda"
        if cuda and (self.how.graph or self.how.compile in UNGRAPHED):
            plain = UNGRAPHED.get(str(self.how.compile), self.how.compile)
            self.how, self._last = self.how._replace(compile=plain, graph=False), None

    def step(self, n: int, eager: bool = False) -> TrainingStep:
        """A training step with ``n`` images, inside ``training``."""
        return TrainingStep(self.model, self.model if eager else self._compiled(), self.inputs(n), self.how)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """What the allocator of a CPU raises is an error of its own kind, as on a GPU."""
    try:
        yield
    except RuntimeError as e:
        if "DefaultCPUAllocator" in str(e):
            raise torch.cuda.OutOfMemoryError(str(e)) from e
        raise


class Session:
    """Measures of one model, each a method, and what they found, which stays if a later one fails.

    Args:
        model: As of :func:`measure_model`.
        inputs: As of it.
        how: As of it.
    """

    def __init__(self, model: torch.nn.Module, inputs: Sequence[Any], how: Conditions) -> None:
        self.calls, self.how = Calls(model, inputs, how), how
        self.small = how.batch or 1  # images of a call that is waited for
        self.large = self.trained = how.batch or (64 if how.device.type == "cuda" else 8)
        self.notes: list[str] = []
        self.found: list[Measurement] = []
        self.modules: dict[str, float | None] = {}
        self.ops: dict[str, OpTime] = {}

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement; what makes it doubtful is a note too, with its kind."""
        self.found.append(measurement)
        self.notes += [f"{measurement.kind}: {doubt}" for doubt in measurement.quality]

    def run(self, measures: Sequence[str], step: Callable[[str], None]) -> None:
        """Measure, in the order of :data:`_ORDER`.

        Args:
            measures: Any of :data:`MEASURES`.
            step: Called with a text when a new part begins.

        Raises:
            UserError: If a CUDA graph is asked for elsewhere.
            Failure: If the model cannot be captured, or trained.
            torch.cuda.OutOfMemoryError: If a single image does not fit, into the memory of a CPU too.
        """
        cuda = self.how.device.type == "cuda"
        check_graph(self.how.graph, self.how.device)
        # events are recorded on the current device
        with torch.cuda.device(self.how.device) if cuda else contextlib.nullcontext():
            for name, text, part in _ORDER:
                if name in measures:
                    step(text.format(small=self.small, large=self.large))
                    part(self)

    @property
    def measured(self) -> Measured:
        """What was found."""
        breaks, watch = self.calls.breaks, self.calls.watch
        notes = [*self.notes, *[f"compiled in pieces: {breaks} graph breaks"] * bool(breaks), *watch.notes]
        return Measured(notes, watch.record, self.found, self.modules, self.ops)

    def latency(self) -> None:
        """Seconds of one call."""
        s, _ = self.calls.time(self.small)
        self.add(Measurement("latency", "s", self.small, [s.samples], {}, s.warnings, s.details))

    def throughput(self) -> None:
        """Images a second; calls of a CPU whose latency is known at this batch are not made again."""
        known = next((m for m in self.found if m.kind == "latency" and m.batch == self.large), None)
        if known is not None and self.how.device.type != "cuda":
            speeds = [[self.large / s for s in process] for process in known.samples]
            self.found.append(known._replace(kind="throughput", unit="images/s", samples=speeds))
            return
        found, self.large, notes = self.calls.halved(self.large, self.calls.speed)
        self.add(found)
        self.notes += notes

    def energy(self) -> None:
        """Joules of an image, in calls as of the throughput."""
        run = functools.partial(_warm, self.calls)
        found, batch, notes = self.calls.halved(self.large, lambda n: energy(run(n), n, self.how.device))
        self._add_or_note(found)
        self.notes += notes

    def train(self) -> None:
        """Seconds of a training step."""
        calls = self.calls

        def attempt(n: int) -> Measurement:
            with training(calls.model):
                return step_times(calls.step(n), n, calls.tick)

        found, self.trained, notes = calls.halved(self.large, attempt)
        self.add(found)
        self.notes += notes + ["train: steps are no CUDA graph"] * self.how.graph

    def train_memory(self) -> None:
        """Memory of a training step, at the batch that was timed."""
        calls, cpu = self.calls, self.how.device.type != "cuda"
        calls._without_graphs()
        opaque = bool(self.how.compile) and not cpu
        with _memory_errors(), training(calls.model):
            self.add(step_memory(calls.step(self.trained, cpu), calls.model, self.trained, opaque))

    def module(self) -> None:
        """Seconds of each module."""
        if self.how.compile:
            self.notes.append("modules: a compiled model has none while it runs")
            return
        with _memory_errors():
            call = self.calls.eager(self.small)[1]
            call()
            found = module_times(self.calls.model, call, self.small, self.how.device, self.how.min_time)
        if isinstance(found, str):
            self.notes.append(found)
            return
        self.modules = found.seconds
        self.add(found.measurement)

    def roofline(self) -> None:
        """Seconds of each operator, and what the machine can do."""
        inputs, how = self.calls.eager(self.small)[0], self.how
        try:
            with _memory_errors():
                found = roofline(self.calls.model, inputs, self.small, how.device, how.kind, how.min_time)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:  # whatever a model raises into which no mode can look
            self.notes.append(f"roofline: its operators cannot be timed one by one: {one_line(e)}")
            return
        self.ops = found.ops
        for measurement in found.measurements:
            self.add(measurement)
        self.notes += ["roofline: operators are those of the uncompiled model"] * bool(how.compile)

    def memory(self) -> None:
        """Peak of a call."""
        many = any(m.kind == "throughput" for m in self.found)
        self.add(self.calls.memory(self.large if many else self.small))
        cuda = self.how.device.type == "cuda"
        self.notes += ["memory is that of the uncompiled model"] * bool(self.how.compile and not cuda)
        graphs = cuda and (self.how.graph or self.how.compile in UNGRAPHED)
        self.notes += ["memory is that without CUDA graphs"] * graphs

    def _add_or_note(self, found: Measurement | str) -> None:
        if isinstance(found, str):
            self.notes.append(found)
        else:
            self.add(found)


def _warm(calls: Calls, n: int) -> Callable[[], Any]:
    """The call with ``n`` images, after it was made once."""
    call = calls.prepared(n)[1]
    call()
    return call


_ORDER: list[tuple[str, str, Callable[[Session], None]]] = [  # measure, what is told, and what does it:
    # first what is timed as it is, then what hooks and modes look into, and what needs PyTorch's profiler last
    ("latency", "latency, batch {small}", Session.latency),
    ("throughput", "throughput, batch {large}", Session.throughput),
    ("energy", "energy, batch {large}", Session.energy),
    ("train", "training step, batch {large}", Session.train),
    ("modules", "modules, batch {small}", Session.module),
    ("roofline", "operators, batch {small}", Session.roofline),
    ("memory", "memory", Session.memory),
    ("train", "memory of a training step", Session.train_memory),
]


def measure_model(
    model: torch.nn.Module,
    inputs: Sequence[Any],
    measures: Sequence[str],
    how: Conditions,
    step: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure a model, inside ``how.entered()``; afterwards it is as it was.

    Args:
        model: A module in evaluation mode, on the device and in the dtype of ``how``.
        inputs: Positional inputs at batch 1, of which only shapes and dtypes matter where they are floating.
        measures: Any of :data:`MEASURES`.
        how: The conditions.
        step: Called with a text when a new part begins.

    Returns:
        The measurements.  A batch that does not fit into a GPU's memory is halved, with a note.

    Raises:
        Exception: As :meth:`Session.run`.
    """
    session = Session(model, inputs, how)
    session.run(measures, step)
    return session.measured
