"""Seconds of each operator beside what the machine can do, as measured: copies of any size, and products.

The ceiling of a call is the time in which the machine could do it: its FLOPs at the rate of the best product, or its
bytes at the rate of the best copy in as much memory, whichever takes longer.  Small working sets are in a cache, so
the rate of copies is a curve over their size.
"""

from __future__ import annotations

import bisect
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vizoo.tools.profiling.counting import listed_calls
from vizoo.tools.profiling.meta import Kernels
from vizoo.tools.profiling.recording import OpCall
from vizoo.tools.profiling.timing import SPIN, Measurement, quiet, seconds_between, time_mark, wait

SIZES = [2**n for n in range(15, 29)]  # bytes of memory that copies work in: 32 KiB to 256 MiB
SLOWEST = 0.5  # seconds of a product after which no larger one is tried
TRIES, EACH = 5, 0.02  # runs of a kernel at the least, and seconds
LAUNCH = 2e-4  # seconds in which a host launches an operator
MIN_PASSES, MAX_PASSES = 3, 20
ABOVE, MINOR = 1.05, 0.005  # a share that cannot be, and the share of the time below which nobody asks


class Ceilings(NamedTuple):
    """What a machine can do.

    Attributes:
        sizes: Bytes of memory, ascending.
        rates: Bytes a second, read and written, of the best copy in so much memory or more.
        product: FLOPs a second of the best product.
        tried: FLOPs a second of each product.
    """

    sizes: list[int]
    rates: list[float]
    product: float
    tried: dict[str, float]

    def rate(self, place: int) -> float:
        """Bytes a second in so many bytes of memory, linear between sizes."""
        i = bisect.bisect_left(self.sizes, place)
        if i == 0 or i == len(self.sizes):
            return self.rates[min(i, len(self.rates) - 1)]
        share = (place - self.sizes[i - 1]) / (self.sizes[i] - self.sizes[i - 1])
        return self.rates[i - 1] + share * (self.rates[i] - self.rates[i - 1])

    def seconds(self, call: OpCall) -> float:
        """The least seconds that a call could take."""
        return max(call.flops / self.product, call.bytes / self.rate(call.place))


class OpTime(NamedTuple):
    """Seconds of all calls of an operator in a pass, and their share of what the machine can do."""

    seconds: float
    ceiling: float | None


class Roofline(NamedTuple):
    """Operators of a model against the ceilings.

    Attributes:
        ops: Times by operator.
        measurements: Of kind ``copy`` and ``matmul``.
    """

    ops: dict[str, OpTime]
    measurements: list[Measurement]


def best_seconds(fn: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of a kernel over some runs."""
    fn()
    found: list[float] = []
    while len(found) < TRIES or sum(found) < EACH:
        found.append(_timed(fn, device)[1])
    return min(found)


def _timed(fn: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a kernel returns, and its seconds; a GPU spins until it has been launched."""
    if device.type == "cuda":
        wait(device)
        torch.cuda._sleep(int(SPIN * LAUNCH))
    begin = time_mark(device)
    out = fn()
    end = time_mark(device)
    wait(device)
    return out, seconds_between(begin, end)


def _copies(size: int, device: torch.device) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Bytes moved by kernels that work in so much memory, and the kernels: copying, changing, reading."""
    n = size // 4
    x = torch.ones(n, device=device)
    half, other = x[: n // 2], x[n // 2 :]
    yield size, lambda: other.copy_(half)
    yield 2 * size, lambda: x.mul_(1.0)
    yield size, x.sum


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Products by name with their FLOPs, the smaller ones first."""
    conv, generator = nn.functional.conv2d, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    large = (4096, 8192) if device.type == "cuda" else ()
    for n in (256, 512, 768, 1024, *large):
        a, b = random(n, n), random(n, n)
        yield f"{n}x{n}x{n}", 2 * n**3, lambda a=a, b=b: a @ b  # type: ignore[misc]
        yield f"{n}x{n}x{n} linear", 2 * n**3, lambda a=a, b=b: nn.functional.linear(a, b)  # type: ignore[misc]
    images = 64 if device.type == "cuda" else 8
    for c, side, k in ((64, 56, 3), (256, 14, 3), (256, 28, 1)):
        x, w = random(images, c, side, side), random(c, c, k, k)
        flops = 2 * images * c * c * k * k * side * side
        yield f"{images}x{c}x{side}x{side} conv {k}x{k}", flops, lambda x=x, w=w, k=k: conv(x, w, padding=k // 2)  # type: ignore[misc]


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int, tf32: str) -> Ceilings:
    """Ceilings with so many threads, which the caller has set, as TF32 is; measured once in a process."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), quiet():
        best = []
        for size in SIZES:
            best.append(max(moved / best_seconds(fn, device) for moved, fn in _copies(size, device)))
        rates = [max(best[i:]) for i in range(len(best))]
        tried: dict[str, float] = {}
        for name, flops, fn in _products(device, dtype):
            seconds = best_seconds(fn, device)
            tried[name] = flops / seconds
            if seconds > SLOWEST:
                break
    return Ceilings(SIZES, rates, max(tried.values()), tried)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What this machine can do with the threads and settings that are set now; measured once in a process.

    Args:
        device: CPU or CUDA.
        dtype: Of the products.

    Returns:
        The ceilings.  Where products in half precision are slower than in single, operators that compute in single
        precision all the same are measured by these.
    """
    tf32 = str(torch.backends.cuda.matmul.allow_tf32)
    found = _measured(device, dtype, torch.get_num_threads(), tf32)
    if dtype is torch.float32:
        return found
    single = _measured(device, torch.float32, torch.get_num_threads(), tf32)
    both = [[max(pair) for pair in zip(found.rates, single.rates, strict=True)]]
    return Ceilings(found.sizes, both[0], max(found.product, single.product), found.tried)


class TimedKernels(Kernels):
    """Runs operators and times each.

    Args:
        device: Where they compute.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seconds = device, 0.0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator returns for its arguments."""
        out, self.seconds = _timed(lambda: func(*args, **kwargs), self.device)
        return out


def roofline(
    model: nn.Module,
    inputs: Sequence[Any],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    min_time: float = 2.0,
) -> Roofline:
    """Seconds of each operator of a model and their share of the ceilings, in passes of its own that time every call.

    Args:
        model: A module in evaluation mode; it is run uncompiled.
        inputs: Its inputs.
        batch: Images in them.
        device: Where it computes.
        dtype: Of its products.
        min_time: Least seconds of passes, of which there are 3 to 20.

    Returns:
        Medians over the passes.
    """
    limits = ceilings(device, dtype)
    passes: list[list[OpCall]] = []
    start = time.perf_counter()
    with quiet():
        for calls in listed_calls(model, inputs, TimedKernels(device)):
            passes.append(calls)
            if len(passes) > MAX_PASSES or (len(passes) > MIN_PASSES and time.perf_counter() - start > min_time):
                break
    ops = _by_op(passes[1:], limits)  # the first warms up
    return Roofline(ops, _measurements(limits, ops, batch, dtype))


def _by_op(passes: Sequence[Sequence[OpCall]], limits: Ceilings) -> dict[str, OpTime]:
    """Times of operators from the medians of their calls; of their sums where passes are not alike."""
    alike = all([c.op for c in calls] == [c.op for c in passes[0]] for calls in passes)
    spent: defaultdict[str, float] = defaultdict(float)
    least: defaultdict[str, float] = defaultdict(float)
    moved: defaultdict[str, int] = defaultdict(int)
    for i, call in enumerate(passes[0]):
        least[call.op] += limits.seconds(call)
        moved[call.op] += call.flops + call.bytes
        spent[call.op] += statistics.median(calls[i].seconds or 0.0 for calls in passes) if alike else 0.0
    if not alike:
        sums = [_sums(calls) for calls in passes]
        spent.update({op: statistics.median(s.get(op, 0.0) for s in sums) for op in spent})
    shares = {op: least[op] / seconds if seconds > 0 and moved[op] else None for op, seconds in spent.items()}
    return {op: OpTime(seconds, shares[op]) for op, seconds in spent.items()}


def _sums(calls: Sequence[OpCall]) -> dict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for call in calls:
        found[call.op] += call.seconds or 0.0
    return found


def _measurements(limits: Ceilings, ops: dict[str, OpTime], batch: int, dtype: torch.dtype) -> list[Measurement]:
    total = sum(op.seconds for op in ops.values())
    above = [
        f"{name} at {op.ceiling:.0%} of its ceiling, which is too low"
        for name, op in ops.items()
        if op.ceiling is not None and op.ceiling > ABOVE and op.seconds > MINOR * total
    ]
    curve = {str(size): rate for size, rate in zip(limits.sizes, limits.rates, strict=True)}
    copy = Measurement("copy", "bytes/s", None, [[limits.rates[-1]]], {}, [], {"by_size": curve})
    details = {"dtype": str(dtype).removeprefix("torch."), "tried": limits.tried, "op_seconds": total}
    return [copy, Measurement("matmul", "FLOP/s", batch, [[max(limits.tried.values())]], {}, above, details)]
