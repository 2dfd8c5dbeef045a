"""Seconds of each module in a forward pass, by hooks that are there for this measurement only."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vizoo.tools.profiling.timing import SPIN, Measurement, quiet, seconds_between, time_mark, wait

MIN_PASSES, MAX_PASSES = 5, 50
EMPTY_CALLS, REPEATS = 200, 7  # what the cost of hooks is measured with
CLOSE = 0.10  # how far the sum of the modules may be from the pass without hooks


class ModuleTimes(NamedTuple):
    """Seconds of the modules of a model.

    Attributes:
        seconds: Of a pass by path, with what is inside; None for modules that were not called.
        measurement: Of the whole pass with its hooks.
    """

    seconds: dict[str, float | None]
    measurement: Measurement


class HookCost(NamedTuple):
    """Seconds that the hooks of one call add to what they see of it, and to what is around it in all."""

    inside: float
    whole: float


class _Spans:
    """Hooks that note when modules begin and end.

    Args:
        modules: What is hooked.
        device: Where it computes.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.open: list[tuple[int, Any]] = []  # modules that run now, and how many calls had ended before
        self.done: list[tuple[int, Any, Any, int]] = []  # module, begin, end, calls inside

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks for a time."""
        handles = []
        try:
            for i, module in enumerate(self.modules):
                handles.append(module.register_forward_pre_hook(self._before(i)))
                handles.append(module.register_forward_hook(self._after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, i: int) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any) -> None:
            self.open.append((i, (len(self.done), time_mark(self.device))))

        return begin

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        end = time_mark(self.device)
        i, (before, begin) = self.open.pop()
        self.done.append((i, begin, end, len(self.done) - before))

    def seconds(self, cost: HookCost) -> dict[int, float]:
        """Seconds of each module that was called, without what its hooks and those inside it cost."""
        found: dict[int, float] = {}
        for i, begin, end, inside in self.done:
            found[i] = found.get(i, 0.0) + seconds_between(begin, end) - cost.inside - inside * cost.whole
        return {i: max(0.0, seconds) for i, seconds in found.items()}


def hook_cost(device: torch.device) -> HookCost:
    """What a pair of hooks costs here, from modules that do nothing."""
    modules: list[nn.Module] = [nn.Identity() for _ in range(EMPTY_CALLS)]
    x = torch.zeros(1, device=device)

    def call() -> None:
        for module in modules:
            module(x)

    plain: list[float] = []
    hooked: list[float] = []
    seen: list[float] = []
    for _ in range(REPEATS):
        plain.append(_pass_seconds(call, device, EMPTY_CALLS * 1e-4) / EMPTY_CALLS)
        spans = _Spans(modules, device)
        with spans.hooked():
            hooked.append(_pass_seconds(call, device, EMPTY_CALLS * 1e-4) / EMPTY_CALLS)
        seen += spans.seconds(HookCost(0.0, 0.0)).values()
    own = statistics.median(plain)
    return HookCost(statistics.median(seen) - own, statistics.median(hooked) - own)


def _pass_seconds(call: Callable[[], Any], device: torch.device, host: float) -> float:
    """Seconds of a call; on a GPU of its work, which is queued while the GPU spins for longer than the host needs."""
    if device.type == "cuda":
        torch.cuda._sleep(int(SPIN * 1.5 * host))
    begin = time_mark(device)
    call()
    end = time_mark(device)
    wait(device)
    return seconds_between(begin, end)


def module_times(
    model: nn.Module, call: Callable[[], Any], batch: int, device: torch.device, min_time: float = 2.0
) -> ModuleTimes | str:
    """Seconds of each module of a model in a forward pass, with and without hooks in turn.

    On a GPU they are the seconds of its work between two events.  What a pair of hooks costs is measured and taken
    off.

    Args:
        model: An uncompiled module in evaluation mode.
        call: A pass of it, already warm.
        batch: Images of that pass.
        device: Where it computes.
        min_time: Least seconds of passes, unless there are 50 before; there are five at the least.

    Returns:
        The medians over the passes, or why there are none.
    """
    named = dict(model.named_modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in named.values()):
        return "modules: hooks do not see into TorchScript"
    paths, modules = list(named), list(named.values())
    cost = hook_cost(device)
    plain: list[float] = []
    hooked: list[float] = []
    passes: list[dict[int, float]] = []
    start = time.perf_counter()
    call()
    wait(device)
    host = time.perf_counter() - start
    with quiet():
        while len(plain) < MIN_PASSES or (len(plain) < MAX_PASSES and time.perf_counter() - start < min_time):
            plain.append(_pass_seconds(call, device, host))
            spans = _Spans(modules, device)
            with spans.hooked():
                hooked.append(_pass_seconds(call, device, 2 * host))
            passes.append(spans.seconds(cost))
    called = {i: statistics.median(p.get(i, 0.0) for p in passes) for i in passes[0]}
    if len(modules) > 1 and len(called) <= 1:
        return "modules: an exported program calls none"
    seconds = {path: called.get(i) for i, path in enumerate(paths)}
    _fill_lists(model, seconds)
    return ModuleTimes(seconds, _summary(model, seconds, plain, hooked, batch, cost))


def _fill_lists(model: nn.Module, seconds: dict[str, float | None]) -> None:
    """Lists of modules are never called, their children are."""
    for path, module in reversed(list(model.named_modules())):
        if seconds[path] is None:
            inside = [seconds.get(f"{path}.{name}" if path else name) for name, _ in module.named_children()]
            known = [s for s in inside if s is not None]
            seconds[path] = sum(known) if known else None


def _summary(
    model: nn.Module,
    seconds: dict[str, float | None],
    plain: list[float],
    hooked: list[float],
    batch: int,
    cost: HookCost,
) -> Measurement:
    named = dict(model.named_modules())
    leaves = sum(seconds[path] or 0.0 for path, m in named.items() if next(m.children(), None) is None)
    unhooked = statistics.median(plain)
    covered = (seconds[""] or 0.0) / unhooked if unhooked else 0.0
    quality = []
    if abs(covered - 1) > CLOSE:
        quality.append(f"their own seconds sum to {covered:.0%} of the pass without hooks")
    details = {
        "unhooked": unhooked,
        "covered": covered,
        "leaves": leaves / unhooked if unhooked else 0.0,
        "hook_seconds": cost.whole,
        "passes": len(plain),
    }
    parts = {"leaves": leaves, "between": max(0.0, (seconds[""] or 0.0) - leaves)}
    return Measurement("modules", "s", batch, [hooked], parts, quality, details)
