"""Timing engine of the profiler: warm-up, medians with their spread, and a word when the machine was busy."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only

from vizoo.tools.options import DTYPES
from vizoo.tools.profiling.precision import float32_products
from vizoo.tools.profiling.state import flushes_denormal

WARMUP_CALLS, WARMUP_SECONDS, MIN_RUNS = 10, 1.0, 100
SETTLED = 0.02  # relative change of the last five medians that ends the warm-up
SPREAD = 0.05  # interquartile range over median that ends the sampling early
NOISY, BUSY = 0.10, 0.80
TRIMMED, CONFIDENCE = 0.1, 0.99  # share of the rounds left out at either end, and level of the interval of a ratio
RESAMPLED = 2000  # draws of the bootstrap of several processes
EVENTS = 25  # calls whose time on a GPU is taken by events
SPIN = 2e9  # clocks of a GPU that are a second at least


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile of samples, linear between them."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Measurement(NamedTuple):
    """One measured figure: an item of ``measurements`` of a record.

    Attributes:
        kind: ``latency, throughput, memory, train, train_memory, modules, copy, matmul`` or ``energy``.
        unit: ``s, images/s, bytes, bytes/s, FLOP/s`` or ``J``.
        batch: Images at once; None where there are none.
        samples: Samples in the unit, by process.
        parts: What it consists of, in the unit.
        quality: What makes it doubtful, one line each; empty when nothing does.
        details: What else is known of it, JSON-ready.
    """

    kind: str
    unit: str
    batch: int | None
    samples: list[list[float]]
    parts: dict[str, float]
    quality: list[str]
    details: dict[str, Any]

    @property
    def median(self) -> float:
        """Median of the medians of the processes."""
        return statistics.median(map(statistics.median, self.samples))

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % confidence interval of the median.

        Of one process it lies between two order statistics, by the binomial distribution; fewer than six samples have
        none, and give the smallest and the largest.  Of several processes it is a bootstrap of processes, then of the
        samples in each, with a fixed seed.
        """
        if len(self.samples) == 1:
            return _median_interval(self.samples[0])
        import numpy as np

        rng, n = np.random.default_rng(0), len(self.samples)
        medians = []
        for process in self.samples:  # the median of samples drawn again is one of them: its rank is a beta variable
            half = (len(process) + 1) / 2
            ranks = np.floor(rng.beta(half, half, (RESAMPLED, n)) * len(process)).astype(int)
            medians.append(np.sort(process)[np.minimum(ranks, len(process) - 1)])
        drawn = np.take_along_axis(np.stack(medians), rng.integers(n, size=(1, RESAMPLED, n)), 0)[0]
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """The item of a record, with ``median`` and ``ci95``."""
        return {**self._asdict(), "median": self.median, "ci95": list(self.ci95)}

    @classmethod
    def from_dict(cls, item: Mapping[str, Any]) -> Measurement:
        """The measurement of an item of a record; its median and interval are computed anew."""
        return cls(**{name: item[name] for name in cls._fields})


def _median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The smallest interval between order statistics that holds the median with 95 %; both ends where there is none."""
    from scipy.stats import binom

    ordered, n = sorted(samples), len(samples)
    outside = max(0, int(binom.ppf(0.025, n, 0.5)) - 1)  # samples that are left out at either end
    return ordered[outside], ordered[n - 1 - outside]


class Stats(NamedTuple):
    """Seconds of repeated calls.

    Attributes:
        samples: Every call, in order: what a caller waits for it, the end of its work on a GPU included.
        cpu_use: Processor time over wall time and threads; None on a GPU.
        first: Seconds of the very first call, compilation and autotuning included.
        warmup: Number of calls before the samples.
        host: Seconds until each call returned, which on a GPU is when its work was launched; None on a CPU.
        device: Seconds that some further calls kept a GPU busy, by events; None on a CPU.
    """

    samples: list[float]
    cpu_use: float | None
    first: float
    warmup: int
    host: list[float] | None = None
    device: list[float] | None = None

    def quantile(self, q: float) -> float:
        """The ``q`` quantile, linear between samples."""
        return quantile(self.samples, q)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def median(self) -> float:
        """Median seconds, the headline."""
        return self.quantile(0.5)

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds."""
        return self.quantile(0.75) - self.quantile(0.25)

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers doubtful; empty when nothing does."""
        found = []
        if self.cpu_use is not None and self.cpu_use < BUSY:
            found.append(f"machine busy or too many threads: used {self.cpu_use:.0%} of them, numbers unreliable")
        if self.n > 3 and self.iqr > NOISY * self.median:
            found.append(f"noisy: interquartile range {self.iqr / self.median:.0%} of the median")
        if self.host and self.device and (host := quantile(self.host, 0.5)) > (device := quantile(self.device, 0.5)):
            found.append(f"launch-bound: {1e3 * host:.2f} ms to launch, {1e3 * device:.2f} ms of work on the GPU")
        return found

    @property
    def details(self) -> dict[str, Any]:
        """What a measurement tells beside its samples, in seconds."""
        return {
            "n": self.n,
            "warmup": self.warmup,
            "first": self.first,
            "cpu_use": self.cpu_use,
            "host": quantile(self.host, 0.5) if self.host else None,
            "device": quantile(self.device, 0.5) if self.device else None,
        }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection and no slow denormal numbers while timing."""
    enabled, flushed = gc.isenabled(), flushes_denormal()
    gc.collect()
    gc.disable()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
        if enabled:
            gc.enable()


def measure(
    fn: Callable[[], Any],
    device: Any = "cpu",
    warmup: int = WARMUP_CALLS,
    min_time: float = 2.0,
    max_time: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
    tick: Callable[[float], None] | None = None,
) -> Stats:
    """Time repeated calls.

    Warm-up runs at least ``warmup`` calls and a second, and until the last five running medians move less than 2 %.
    Sampling stops at 100 calls or ``min_time`` once the interquartile range is below 5 % of the median, and at
    ``max_time`` in any case.  On CUDA a sample ends when the work of its call has, and up to 25 further calls tell how
    long the GPU itself was busy.

    Args:
        fn: Function without arguments.
        device: Where it computes.
        warmup: Least number of warm-up calls.
        min_time: Least seconds of sampling, unless 100 calls come first.
        max_time: Most seconds of warm-up and of sampling, each; at least three samples are taken all the same.
        clock: Wall clock in seconds.
        cpu_clock: Processor clock in seconds.
        tick: Called after each call with the share of ``max_time`` that has passed, for a progress bar.

    Returns:
        The samples and their statistics.

    Raises:
        ValueError: If a time or a number of calls is negative, or ``max_time`` is below ``min_time``.
    """
    if warmup < 0 or min_time < 0 or max_time < min_time:
        raise ValueError(
            f"got warmup={warmup}, min_time={min_time}, max_time={max_time}; need 0 <= min_time <= max_time"
        )
    device = torch.device(device)

    def call() -> float:
        return _once(fn, device, clock)[0]

    first = call()
    calls = _warm_up(call, warmup, max_time, clock, tick)
    with quiet():
        samples, host, cpu_use = _sample(fn, device, min_time, max_time, clock, cpu_clock, tick)
        if device.type != "cuda":
            return Stats(samples, cpu_use, first, calls)
        busy = _event_times(fn, device, quantile(host, 0.5), max_time)
        return Stats(samples, None, first, calls, host, busy)


def _once(fn: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds until a call's work is done, and until the call returned."""
    start = clock()
    fn()
    returned = clock()
    wait(device)
    return clock() - start, returned - start


def _warm_up(
    call: Callable[[], float],
    least: int,
    max_time: float,
    clock: Callable[[], float],
    tick: Callable[[float], None] | None,
) -> int:
    """Call until the times settle; the number of calls, with one before these."""
    calls, begin = 1, clock()
    recent: list[float] = []
    medians: list[float] = []
    while True:
        enough = calls >= least and clock() - begin >= min(WARMUP_SECONDS, max_time)
        settled = len(medians) >= 5 and max(medians[-5:]) - min(medians[-5:]) <= SETTLED * medians[-1]
        if (enough and settled) or (clock() - begin >= max_time and calls > 1):
            return calls
        recent.append(call())
        medians.append(statistics.median(recent[-10:]))
        calls += 1
        if tick:
            tick(0.0)


def _sample(
    fn: Callable[[], Any],
    device: torch.device,
    min_time: float,
    max_time: float,
    clock: Callable[[], float],
    cpu_clock: Callable[[], float],
    tick: Callable[[float], None] | None,
) -> tuple[list[float], list[float], float]:
    """Seconds of each call, seconds until each returned, and processor time over wall time and threads of the calls."""
    samples: list[float] = []
    host: list[float] = []
    begin, cpu = clock(), 0.0
    while True:
        cpu_begin = cpu_clock()
        done, returned = _once(fn, device, clock)
        cpu += cpu_clock() - cpu_begin
        samples.append(done)
        host.append(returned)
        elapsed = clock() - begin
        if tick:
            tick(min(1.0, elapsed / max_time) if max_time else 1.0)
        if len(samples) < 3:
            continue
        stats = Stats(samples, None, 0.0, 0)
        enough = len(samples) >= MIN_RUNS or elapsed >= min_time
        if elapsed >= max_time or (enough and stats.iqr <= SPREAD * stats.median):
            return samples, host, cpu / max(sum(samples), 1e-9) / torch.get_num_threads()


def _event_times(fn: Callable[[], Any], device: torch.device, host: float, most: float) -> list[float]:
    """Seconds that calls keep a GPU busy, by an event pair around each.

    The GPU first spins for longer than the host needs to launch a call, so that it need not wait for work within one.

    Args:
        fn: The call.
        device: A CUDA device.
        host: Seconds until a call returns.
        most: Seconds after which no further call is made; there are three at the least.

    Returns:
        Seconds of at most 25 calls.
    """
    found: list[float] = []
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while len(found) < 3 or (len(found) < EVENTS and sum(found) < most):
            torch.cuda._sleep(int(SPIN * 1.5 * host))
            before.record()
            fn()
            after.record()
            torch.cuda.synchronize(device)
            found.append(before.elapsed_time(after) / 1e3)
    return found


class Comparison(NamedTuple):
    """Alternating timings of several functions.

    Attributes:
        seconds: Samples by name.
        cpu_use: Processor time over wall time and threads; None on a GPU.
        difference: Largest absolute difference of each output from the first function's; infinite for other shapes.
    """

    seconds: dict[str, list[float]]
    cpu_use: float | None
    difference: dict[str, float]

    def median(self, name: str) -> float:
        """Median seconds of one function."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Speed of the first function relative to ``name``, from the ratio of their times in each round.

        What slows both in a round, as a processor that cools down, leaves its ratio alone.

        Args:
            name: The other function.

        Returns:
            Median of the ratios, above 1 where the first function is faster, and a 99 % confidence interval: Student's
            for the mean of their logarithms without the tenth of them at either end (Tukey and McLaughlin).  A single
            round says nothing: from 0 to infinity.
        """
        import numpy as np
        from scipy.stats.mstats import trimmed_mean_ci

        first, other = (np.asarray(self.seconds[k]) for k in (next(iter(self.seconds)), name))
        ratios = other / first
        ratio = float(np.median(ratios))
        if len(ratios) < 2:
            return ratio, 0.0, math.inf
        low, high = np.exp(trimmed_mean_ci(np.log(ratios), limits=(TRIMMED, TRIMMED), alpha=1 - CONFIDENCE))
        return ratio, min(ratio, float(low)), max(ratio, float(high))


def compare(
    functions: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any] = (),
    rounds: int = 20,
    warmup: int = 3,
    device: Any = "cpu",
    tick: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    least: float = 0.0,
) -> Comparison:
    """Time functions in turn, A, B, B, A, A, B ..., in one process, so that a drift of the machine meets all alike.

    Args:
        functions: At least two functions by name; the first is the one the others are compared with.
        inputs: Positional arguments of every function.
        rounds: Timed calls of each.
        warmup: Calls of each before that.
        device: Where they compute; CUDA is synchronised around each call.
        tick: Called after each round.
        clock: What the samples are read from, in seconds.
        least: Seconds that a sample takes at least: a shorter call is repeated before the other function's turn, and
            the sample is the mean.

    Returns:
        The samples, and how far the outputs are apart.

    Raises:
        ValueError: If there are fewer than two functions or no rounds.
    """
    if len(functions) < 2 or rounds < 1:
        raise ValueError(f"got {len(functions)} functions and rounds={rounds}, need two functions and one round")
    device = torch.device(device)
    difference = _difference({name: f(*inputs) for name, f in functions.items()})

    def run(f: Callable[..., Any], calls: int) -> float:
        """Seconds of a number of calls."""
        wait(device)
        start = clock()
        for _ in range(calls):
            f(*inputs)
        wait(device)
        return clock() - start

    calls = dict.fromkeys(functions, 1)
    for _ in range(warmup):
        for name, f in functions.items():
            calls[name] = max(1, math.ceil(least / max(run(f, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    wall = cpu = 0.0
    with quiet():
        for i in range(rounds):
            for name, f in list(functions.items())[:: -1 if i % 2 else 1]:
                c, t = time.process_time(), time.perf_counter()
                seconds[name].append(run(f, calls[name]) / calls[name])
                wall += time.perf_counter() - t
                cpu += time.process_time() - c
            if tick:
                tick()
    use = None if device.type == "cuda" else cpu / wall / torch.get_num_threads()
    return Comparison(seconds, use, difference)


def wait(device: torch.device) -> None:
    """Until the work of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_mark(device: torch.device) -> Any:
    """A point of time: of the host, or on a GPU an event in its queue, whose device is the current one."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two marks; those on a GPU must have been reached."""
    seconds: float = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
    return seconds


def _difference(outputs: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of each output from the first one."""

    def tensors(out: Any) -> list[torch.Tensor]:
        return [t.detach().double() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]

    reference = tensors(next(iter(outputs.values())))
    return {name: _distance(tensors(out), reference) for name, out in outputs.items()}


def _distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Largest absolute difference; infinite where the shapes are not the same."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return math.inf
    return max([float((a - b).abs().max()) for a, b in zip(some, others, strict=True) if a.numel()], default=0.0)


def back_to_back(fn: Callable[[], Any], device: Any, seconds: float = 0.2) -> float:
    """Seconds a call on CUDA when calls follow each other without synchronisation.

    Args:
        fn: The call, already warm.
        device: A CUDA device.
        seconds: Least length of one measurement.

    Returns:
        Median of :func:`back_to_back_samples`.
    """
    return statistics.median(back_to_back_samples(fn, device, seconds))


def back_to_back_samples(fn: Callable[[], Any], device: Any, seconds: float = 0.2) -> list[float]:
    """Seconds a call in five runs of calls without synchronisation; arguments as of :func:`back_to_back`."""
    calls = 1
    found: list[float] = []
    with torch.cuda.device(device):  # events are recorded on the current one
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        while len(found) < 5:
            pair[0].record()
            for _ in range(calls):
                fn()
            pair[1].record()
            torch.cuda.synchronize(device)
            elapsed = pair[0].elapsed_time(pair[1]) / 1e3
            if elapsed < seconds:
                calls = math.ceil(calls * min(10.0, 1.2 * seconds / max(elapsed, 1e-6)))
            else:
                found.append(elapsed / calls)
    return found


# whole models


class Images(list[Any]):
    """An input with one entry for each image, as detectors take it; the entries are of one image."""


register_pytree_node(Images, lambda images: (list(images), None), lambda images, _: Images(images))


def random_like(x: Any, batch: int, device: Any, dtype: torch.dtype) -> Any:
    """Input of ``batch`` times the batch: random where it is floating, for zeros would flatter; else repeated.

    Args:
        x: A tensor, or tensors in lists, mappings and the like; what is no tensor stays as it is.
        batch: Factor of the first dimension, and of the number of :class:`Images`.
        device: Of the new tensors.
        dtype: Of the floating ones.

    Returns:
        What has the form of ``x``.
    """
    if isinstance(x, Images):
        return Images(random_like(image, 1, device, dtype) for _ in range(batch) for image in x)
    return tree_map_only(torch.Tensor, lambda t: _random_like(t, batch, device, dtype), x)


def _random_like(x: torch.Tensor, batch: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
    if not x.is_floating_point():
        return x.to(device).repeat(batch, *[1] * (x.dim() - 1)) if x.dim() else x.to(device)
    shape = (batch * x.shape[0], *x.shape[1:]) if x.dim() else ()
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


class Conditions(NamedTuple):
    """How a model is run while it is measured.

    Attributes:
        device: Where.
        dtype: ``fp32``, ``tf32``, ``bf16`` or ``fp16`` of weights and input; with ``amp`` that of autocast.
            ``int8`` is float32 but for the products of linear layers (:func:`quantized`).
        amp: Keep float32 weights and run under autocast.
        channels_last: Model and images in channels_last memory.
        compile: ``torch.compile``; a string is its mode.
        batch: Images at once; None is 1 for latency, and 8 on a CPU or 64 on a GPU for throughput.
        min_time: As in :func:`measure`.
        max_time: As in :func:`measure`.
        graph: Calls replay a CUDA graph.
    """

    device: torch.device = torch.device("cpu")
    dtype: str = "fp32"
    amp: bool = False
    channels_last: bool = False
    compile: bool | str | None = False
    batch: int | None = None
    min_time: float = 2.0
    max_time: float = 10.0
    graph: bool = False

    @property
    def kind(self) -> torch.dtype:
        """The ``dtype`` of torch."""
        kind: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return kind

    @property
    def weights(self) -> torch.dtype:
        """Dtype of weights and floating inputs."""
        return torch.float32 if self.amp else self.kind

    def placed(self, net: torch.nn.Module) -> torch.nn.Module:
        """A module on the device, in the dtype and the memory format of these conditions."""
        net = net.to(self.device, self.weights)
        net = quantized(net) if self.dtype == "int8" else net
        return net.to(memory_format=torch.channels_last) if self.channels_last else net  # type: ignore[call-overload, no-any-return]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inference mode, autocast if asked for, and :func:`float32_products`; convolution algorithms are searched."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            with (
                float32_products(tf32=self.dtype == "tf32"),
                torch.inference_mode(),
                torch.autocast(self.device.type, dtype=self.kind if self.amp else None, enabled=self.amp),
            ):
                yield
        finally:
            torch.backends.cudnn.benchmark = before


def quantized(net: torch.nn.Module) -> torch.nn.Module:
    """A module whose linear layers multiply in int8: PyTorch's dynamic quantisation, one scale for each output.

    Layers with fewer than 32 inputs or outputs stay as they are: classifiers of few classes, and TransNeXt's networks
    of positions, whose results are kept from pass to pass while the layers are plain.

    Args:
        net: On a CPU, in float32; it is changed.

    Returns:
        The module, or what replaces it.
    """
    quantization = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but torchao's has no fast operator on a CPU
        found = {name: m for name, m in net.named_modules() if type(m) is torch.nn.Linear}
        wide = [name for name, m in found.items() if min(m.in_features, m.out_features) >= 32]
        layers = dict.fromkeys(wide, quantization.per_channel_dynamic_qconfig)
        return quantization.quantize_dynamic(net, layers, torch.qint8, inplace=True)  # type: ignore[no-any-return]


@contextlib.contextmanager
def fused(enable: bool) -> Iterator[None]:
    """Models built inside use fused attention and kernels, or do not."""
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enable, experimental=enable and before[1])
    try:
        yield
    finally:
        set_fused_attn(*before)


def compiled(module: Any, **options: Any) -> Any:
    """A module, or a function, compiled for the shapes that it is called with first.

    Whatever was compiled before is forgotten: a second shape is otherwise compiled for any shape.

    Args:
        module: What is compiled.
        **options: Further ones of ``torch.compile``.

    Returns:
        What runs compiled.
    """
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False, **options)
