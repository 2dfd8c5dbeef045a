"""Peak memory of one call: what the allocators say, kernels' own buffers included, and what it consists of."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARK = "vizoo mark "  # names of the events that order what a tape notes among the allocations
RETURNED, KEPT, GRADIENT = "returned", "kept", "gradient"  # what is noted of blocks


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


def nbytes(values: Any) -> int:
    """Bytes of all tensors in a value."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, torch.Tensor))


def weights_of(model: Any) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def peak_memory(fn: Callable[[], Any], model: Any, inputs: Sequence[Any], device: Any) -> Memory:
    """Peak memory of one call.

    Args:
        fn: The call, which is made once before that one.
        model: The module it runs, whose weights are told apart.
        inputs: Its tensors, and whatever else is there before it.
        device: CPU or CUDA.

    Returns:
        The peak.  The allocator of the device tells it: tensors, and what operators take for themselves, as columns of
        images and oneDNN's scratchpads.  Where PyTorch's CPU allocator cannot be heard, the growth of the process is
        sampled every millisecond.
    """
    device = torch.device(device)
    given = nbytes([weights_of(model), inputs])
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
    heard = _heard(fn)
    if heard is None:
        grown, how = _resident_growth(fn), "resident set"
    else:
        grown, how = _highest([size for size, _ in heard if isinstance(size, int)]), "cpu allocator"
    return Memory(given + grown, grown, how)


class Tape:
    """Notes, between the allocations of a call, what is known of blocks of memory at that time.

    Attributes:
        notes: What was noted of which addresses, in order; None for all that are alive.
    """

    def __init__(self) -> None:
        self.notes: list[tuple[str, frozenset[int] | None]] = []

    def note(self, text: str, tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Note something of the memory of tensors, or of everything that is alive."""
        places = None if tensors is None else frozenset(filter(None, map(_address, tensors)))
        self.notes.append((text, places))
        with record_function(f"{MARK}{len(self.notes) - 1}"):
            pass


def _address(t: torch.Tensor) -> int:
    """Where the storage of a tensor begins; 0 where it has none of its own."""
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return 0


class _Returns(TorchDispatchMode):
    """Notes what operators return: the rest is what they take for themselves."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tape.note(RETURNED, [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


class Block(NamedTuple):
    """A block of memory that a call allocated: its bytes, and what was noted of it."""

    size: int
    notes: set[str]


class Peak(NamedTuple):
    """When a call needs most memory.

    Attributes:
        blocks: What is alive then, beside what was there before the call.
        after: What had been noted before.
        totals: Bytes of all blocks of which each was noted, whether they are alive at the peak or not.
    """

    blocks: list[Block]
    after: set[str]
    totals: dict[str, int]


def blocks_at_peak(fn: Callable[[Tape], Any], device: Any) -> Peak | None:
    """The blocks that are alive when a call needs most memory.

    Args:
        fn: The call; it may note what it knows.
        device: CPU or CUDA, whose allocator is heard.

    Returns:
        The blocks; those of tensors that operators return are noted :data:`RETURNED`.  None where PyTorch does not
        tell them.
    """
    tape = Tape()

    def call() -> None:
        with _Returns(tape):
            fn(tape)

    heard = _heard(call, torch.device(device).type)
    if heard is None:
        return None
    alive: dict[int, Block] = {}
    size = most = 0
    noted: set[str] = set()
    totals: dict[str, int] = {}
    peak = Peak([], set(), totals)
    for what, place in heard:
        if isinstance(what, str):
            text, places = tape.notes[int(what.removeprefix(MARK))]
            noted.add(text)
            for block in [alive[a] for a in (alive if places is None else places & alive.keys())]:
                totals[text] = totals.get(text, 0) + block.size * (text not in block.notes)
                block.notes.add(text)
            continue
        size += what
        if what > 0:
            alive[place] = Block(what, set())
        else:
            alive.pop(place, None)
        if size > most:
            most, peak = size, Peak(list(alive.values()), set(noted), totals)
    return peak


def inference_parts(
    memory: Memory, fn: Callable[[], Any] | None, model: Any, inputs: Sequence[Any], device: Any
) -> tuple[dict[str, float], list[str]]:
    """What the peak of a forward pass consists of.

    Args:
        memory: Its peak.
        fn: The call, uncompiled; None where it is compiled, so that nobody sees into it.
        model: Its module.
        inputs: Its tensors.
        device: CPU or CUDA.

    Returns:
        Bytes of ``weights``, buffers among them, ``input``, ``activations`` (what operators returned) and
        ``workspace`` (what they had taken for themselves, and what an allocator rounds up), which add up to the peak,
        and what cannot be told.
    """
    parts: dict[str, float] = {"weights": nbytes(weights_of(model)), "input": nbytes(inputs)}
    peak = None if fn is None or memory.how == "resident set" else blocks_at_peak(lambda tape: fn(), device)
    if peak is None:
        return {**parts, "activations": memory.activations}, ["activations and workspace cannot be told apart here"]
    returned = min(memory.activations, sum(b.size for b in peak.blocks if RETURNED in b.notes))
    return {**parts, "activations": returned, "workspace": memory.activations - returned}, []


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


def _heard(fn: Callable[[], Any], device: str = "cpu") -> list[tuple[int | str, int]] | None:
    """Allocations of a call and the marks of a tape between them, in order.

    Returns:
        Bytes, negative where they were given back, and address of each allocation; the name of each mark and 0.  None
        where PyTorch does not tell them: it is a private interface of its profiler, of which there is one, and another
        may be running.
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
        found = list(_events(recorded.kineto_results.experimental_event_tree(), device))
        heard = [(what, place) for _, what, place in sorted(found, key=lambda event: event[0])]
    except (AttributeError, AssertionError, RuntimeError, TypeError):
        heard = None
    if failed:
        raise failed[0]
    return heard


def _events(nodes: Sequence[Any], device: str) -> Iterator[tuple[int, int | str, int]]:
    """Time, bytes or name, and address of the allocations on a device and the marks in a tree of events."""
    left = list(nodes)
    while left:
        node = left.pop()
        left += node.children
        kind, fields = node.typed
        if kind == torch._C._profiler._EventType.Allocation and fields.device.type == device:
            yield node.start_time_ns, fields.alloc_size, fields.ptr
        elif node.name.startswith(MARK):
            yield node.start_time_ns, node.name, 0


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
