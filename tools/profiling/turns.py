"""One side of ``vizoo compare``: a process with a model that it runs when it is told to, while the other side waits.

It is started by the path of this file, for the vizoo that it measures may be of another revision than this file; its
tools are those beside this file in any case.  Words and answers are lines of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SETTLING = 1.5  # most seconds of the warm-up, and of the samples that tell how long a call takes
LEAST = 0.05  # seconds of a turn at the least, if the model is that quick


class Side(NamedTuple):
    """What a process runs.

    Attributes:
        target: As of :func:`vizoo.tools.profiling.target.find_target`.
        size: Height and width; None for the target's own.
        batch: Images at once.
        dtype: Of weights and input; with ``amp`` that of autocast.
        device: Where.
        threads: Of a CPU.
        compile: Mode of ``torch.compile``; None for none.
        graph: The call is a CUDA graph that is replayed.
        channels_last: Model and images in channels-last memory.
        amp: Under autocast.
        reparam: Branches are merged where the model can.
        input: Shapes of the inputs; None for the target's own.
        weights: File of weights.
    """

    target: str
    size: tuple[int, int] | None = None
    batch: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    compile: str | None = None
    graph: bool = False
    channels_last: bool = False
    amp: bool = False
    reparam: bool = False
    input: str | None = None
    weights: str | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """As of a record, but for the batch."""
        threads = self.threads if self.device == "cpu" else None
        always = {"fused": True, "features": False}
        given = ("device", "dtype", "amp", "channels_last", "compile", "graph", "reparam")
        return {**{key: getattr(self, key) for key in given}, "threads": threads, **always}


def _take_tools(folder: Path) -> None:
    """Make ``vizoo.tools`` the folder given, whatever vizoo is imported."""
    import vizoo

    file = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location("vizoo.tools", file, submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["vizoo.tools"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vizoo.tools = module  # type: ignore[attr-defined]


def _call(side: Side) -> tuple[Callable[[], Any], Any, Any]:
    """The call of a side, with the weights and inputs of a fixed seed; the target, and its conditions."""
    import torch

    from vizoo.tools.profiling.measures import Calls
    from vizoo.tools.profiling.target import find_target
    from vizoo.tools.profiling.timing import Conditions

    torch.manual_seed(0)
    target = find_target(side.target, side.input, side.size, real=True, reparam=side.reparam, weights=side.weights)
    device = torch.device(side.device)
    how = Conditions(device, side.dtype, side.amp, side.channels_last, side.compile, side.batch, graph=side.graph)
    return Calls(how.placed(target.net.eval()), target.inputs, how).prepared(side.batch)[1], target, how


def _plain(t: Any) -> Any:
    """A tensor as real numbers in float64 on the CPU."""
    import torch

    t = t.detach().cpu()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def _serve(asked: Mapping[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Build the model, leave its outputs in a file, and take turns until nobody asks for any more."""
    import torch
    from torch.utils._pytree import tree_leaves

    from vizoo.tools.profiling.machine import environment
    from vizoo.tools.profiling.state import Watch
    from vizoo.tools.profiling.timing import Stats, measure, quiet

    side = Side(**asked["side"])
    torch.set_num_interop_threads(1)
    torch.set_num_threads(side.threads)
    call, target, how = _call(side)
    clock = time.process_time if asked["cpu_time"] else time.perf_counter

    def once() -> float:
        start = clock()
        call()
        if how.device.type == "cuda":
            torch.cuda.synchronize(how.device)
        return clock() - start

    with how.entered():
        leaves = [t for t in tree_leaves(call()) if isinstance(t, torch.Tensor)]
        torch.save([_plain(t) for t in leaves], asked["outputs"])
        say({"target": target.to_dict(), "environment": environment(how.device)})
        sys.stdin.readline()  # the other side may be at work
        warm = measure(call, how.device, min_time=0.0, max_time=SETTLING, clock=clock)
        calls = max(1, round(LEAST / max(warm.median, 1e-9)))
        say({})
        watch, taken, cpu, wall = Watch(how.device), [], 0.0, 0.0
        with quiet():
            while sys.stdin.readline().strip():
                once()  # the other side has emptied the caches
                begin = time.process_time(), time.perf_counter()
                seconds = [once() for _ in range(calls)]
                cpu, wall = cpu + time.process_time() - begin[0], wall + time.perf_counter() - begin[1]
                say({"seconds": statistics.median(seconds)})
                taken += seconds
                watch.look()
        use = None if how.device.type == "cuda" or asked["cpu_time"] or not wall else cpu / wall / side.threads
        notes = Stats(taken, use, warm.first, warm.warmup).warnings if taken else []
        say({"state": watch.record, "notes": [*notes, *watch.notes]})


def main() -> None:
    """Serve the side that the first argument describes; what fails is the last answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a model prints

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    asked = json.loads(sys.argv[1])
    sys.path[:] = asked["path"]
    _take_tools(Path(asked["tools"]))
    from vizoo.tools.common import explain, named

    try:
        _serve(asked, say)
    except Exception as e:  # whatever a model raises
        status, text = explain(e) or (1, f"{asked['side']['target']!r} cannot run: {named(e)}")
        say({"error": text, "status": status})


if __name__ == "__main__":
    main()
