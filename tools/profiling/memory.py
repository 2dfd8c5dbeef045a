"""Peak memory of one call: what the allocators say, kernels' own buffers included."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves


class Memory(NamedTuple):
    """Peak memory of one call in bytes.

    Attributes:
        peak: Everything, weights included.
        activations: Peak without weights and input.
        how: ``cuda allocator``, ``cpu allocator`` or ``resident set`` of the process.
        reserved: Peak that CUDA's allocator had reserved; None elsewhere.
    """

    peak: int
    activations: int
    how: str
    reserved: int | None = None


def peak_memory(fn: Callable[[], Any], model: Any, inputs: Sequence[Any], device: Any) -> Memory:
    """Peak memory of one call.

    Args:
        fn: The call, which is made once before that one.
        model: The module it runs, whose weights are told apart.
        inputs: Its tensors.
        device: CPU or CUDA.

    Returns:
        The peak.  The allocator of the device tells it: tensors, and what operators take for themselves, as columns of
        images and oneDNN's scratchpads.  Where PyTorch's CPU allocator cannot be heard, the growth of the process is
        sampled every millisecond.
    """
    device = torch.device(device)
    tensors = [*model.parameters(), *model.buffers(), *(t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))]
    given = sum(t.numel() * t.element_size() for t in tensors)
    fn()  # what is allocated once, as tables and workspaces, is no part of a call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what larger calls before have reserved
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        grown = torch.cuda.max_memory_allocated(device) - before
        return Memory(given + grown, grown, "cuda allocator", torch.cuda.max_memory_reserved(device))
    heard = _allocations(fn)
    grown, how = (_resident_growth(fn), "resident set") if heard is None else (_highest(heard), "cpu allocator")
    return Memory(given + grown, grown, how)


def _highest(steps: Sequence[int]) -> int:
    """Highest sum of the first steps."""
    return max(itertools.accumulate(steps, initial=0))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Before PyTorch's profiler runs for the first time: it writes to standard error, unless it is told not to."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _allocations(fn: Callable[[], Any]) -> list[int] | None:
    """Bytes of each allocation of a call, negative where they were given back, in order.

    Returns:
        None where PyTorch does not tell them: it is a private interface of its profiler, of which there is one, and
        another may be running.
    """
    from torch.autograd.profiler import profile

    failed: list[Exception] = []
    try:
        if torch._C._autograd._profiler_enabled():
            return None
        with _silent(), profile(profile_memory=True) as recorded:
            try:
                fn()
            except Exception as e:
                failed.append(e)
        events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
        heard = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    except (AttributeError, AssertionError, RuntimeError, TypeError):
        heard = None
    if failed:
        raise failed[0]
    return heard


def _resident_growth(fn: Callable[[], Any]) -> int:
    import psutil

    process, stop = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not stop.wait(1e-3):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        fn()
        seen.append(process.memory_info().rss)
    finally:
        stop.set()
        watcher.join()
    return max(seen) - seen[0]
