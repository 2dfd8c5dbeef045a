"""Child process of ``vizoo bench --suite gpu``: measures one job after the other and answers each with one line.

Jobs come as JSON on standard input and results leave by a pipe of their own, so that whatever libraries print cannot
be taken for a result, and the parent alone writes the record.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vizoo.tools.common import build_model, one_line
from vizoo.tools.gpu.cases import Case, cases
from vizoo.tools.profiling.machine import device_name
from vizoo.tools.profiling.memory import Memory, peak_memory
from vizoo.tools.profiling.sides import TOLERANCE
from vizoo.tools.profiling.timing import back_to_back, compiled, fused, measure

READY, FATAL = "ready", "fatal"  # keys of what is told beside the results
SECONDS = 0.06  # of warm-up and of sampling for an operator, each
HOST_CALLS = 20


class Child:
    """What the jobs of one process share.

    Args:
        dry: Tiny shapes on the CPU.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.cuda = self.device.type == "cuda"
        self.cases = {case.name: case for case in cases(dry)}
        self.prepared = functools.lru_cache(maxsize=1)(self._prepare)  # forms of a case follow each other
        self.compiled = functools.lru_cache(maxsize=1)(self._compile)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Measure a job; a ``warm`` one only fills the caches of compiled code on the disk."""
        if job["section"] != "ops":
            self.prepared.cache_clear()
        return getattr(self, job["section"])(job)

    def milliseconds(self, fn: Callable[[], Any]) -> float:
        """Median time that a call keeps a GPU busy; the time of one call in a dry run, which is no measurement."""
        if self.cuda:
            stats = measure(fn, self.device, warmup=2, min_time=SECONDS, max_time=SECONDS)
            return 1e3 * statistics.median(stats.device or stats.samples)
        start = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give memory back.

        Raises:
            RuntimeError: If a kernel before has broken this process.
        """
        self._wait()
        if self.cuda:
            torch.cuda.empty_cache()

    def _host_us(self, fn: Callable[[], Any]) -> float:
        """Microseconds that the processor needs to issue a call: what small calls cannot be faster than."""
        self._wait()
        start = time.perf_counter()
        for _ in range(HOST_CALLS if self.cuda else 1):
            fn()
        seconds = time.perf_counter() - start
        self._wait()
        return 1e6 * seconds / (HOST_CALLS if self.cuda else 1)

    def _memory(self, fn: Callable[[], Any], model: torch.nn.Module, inputs: Sequence[Tensor]) -> Memory | None:
        return peak_memory(fn, model, inputs, self.device) if self.cuda else None

    # environment

    def env(self, job: dict[str, Any]) -> dict[str, Any]:
        """Versions, the device, and what it reaches in a copy and in products of matrices."""
        import platform
        from importlib import metadata

        from vizoo.backbones.ops.backend import backends

        row: dict[str, Any] = {"python": platform.python_version(), "device": device_name(self.device)}
        for name in ("torch", "triton", "timm", "natten"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                row[name] = metadata.version(name)
        row["torch"] = torch.__version__
        row["backends"] = {name: usable or reason for name, usable, reason in backends()}
        if self.cuda:
            card = torch.cuda.get_device_properties(0)
            row.update(sms=card.multi_processor_count, memory=card.total_memory, cuda=torch.version.cuda)
            row["capability"] = f"{card.major}.{card.minor}"
        source = torch.zeros(2**30 if self.cuda else 2**20, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        row["bytes_per_s"] = 2e3 * source.numel() / self.milliseconds(functools.partial(target.copy_, source))
        del source, target
        row["flops_per_s"] = {}
        for dtype, side in (("bfloat16", 8192), ("float32", 4096)):
            n = side if self.cuda else 64
            a, b = (torch.randn(n, n, device=self.device, dtype=getattr(torch, dtype)) for _ in range(2))
            row["flops_per_s"][dtype] = 2e3 * n**3 / self.milliseconds(functools.partial(torch.mm, a, b))
        return row

    # operators

    def _prepare(self, name: str, dtype: str) -> tuple[list[Any], Tensor, list[Tensor], Tensor]:
        """Inputs of a case, the gradient of its output, and output and gradients of two images in float64."""
        case = self.cases[name]
        torch.manual_seed(0)
        inputs = [
            t.to(getattr(torch, dtype)).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in case.inputs(case.batch, self.device)
        ]
        ends = [0, case.batch - 1]  # an offset that overflows shows in the last image
        wide = [
            (t[ends] if i in case.images else t).detach() if isinstance(t, Tensor) else t for i, t in enumerate(inputs)
        ]
        wide = [t.double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in wide]
        out = case.reference(*wide)
        upstream = torch.randn(out.shape, device=self.device).to(getattr(torch, dtype))
        grads = torch.autograd.grad(out, _leaves(wide), upstream.double())
        whole = torch.zeros(case.batch, *out.shape[1:], device=self.device, dtype=getattr(torch, dtype))
        whole[ends] = upstream
        return inputs, out.detach(), list(grads), whole

    def _compile(self, name: str, form: str) -> Callable[..., Tensor]:
        return compiled(self.cases[name].forms[form], backend="inductor" if self.cuda else "eager")

    def _form(self, case: Case, name: str) -> Callable[..., Tensor]:
        return case.forms[name] if name in case.forms else self.compiled(case.name, name.removesuffix(" compiled"))

    def ops(self, job: dict[str, Any]) -> dict[str, Any]:
        """Errors of one form against float64, then its times; what is wrong gets no time."""
        case, dtype = self.cases[job["item"]], job["dtype"]
        form = self._form(case, job["form"])
        inputs, truth, grads, upstream = self.prepared(case.name, dtype)
        leaves, ends = _leaves(inputs), [0, case.batch - 1]

        def forward() -> Tensor:
            with torch.no_grad():
                return form(*inputs)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(form(*inputs), leaves, upstream, allow_unused=True)

        out, found = forward(), both()
        self._wait()
        if job.get("warm"):
            return {}
        row: dict[str, Any] = {"batch": case.batch}
        row["bytes"] = sum(t.numel() * t.element_size() for t in (*_tensors(inputs), out))
        row["flops"] = case.batch * case.flops
        if job["form"] not in case.floors:
            shared = [i not in case.images for i, t in enumerate(inputs) if _is_leaf(t)]
            mine = [g if g is None or s else g[ends] for g, s in zip(found, shared, strict=True)]
            errors = [_error(a, b) for a, b in zip(mine, grads, strict=True)]
            row.update(error=_error(out[ends], truth), gradient_error=max(errors))
            if not torch.isfinite(out).all() or not max(row["error"], row["gradient_error"]) <= TOLERANCE[dtype]:
                row["failed"] = f"outputs or gradients differ by more than {TOLERANCE[dtype]:g}, or are not finite"
                return row
        del out, found
        row["forward_ms"], row["both_ms"] = self.milliseconds(forward), self.milliseconds(both)
        row["host_us"] = self._host_us(forward)
        memory = self._memory(both, torch.nn.Module(), leaves)
        row["peak_bytes"] = memory and memory.activations
        return row

    # models

    def _model(self, job: dict[str, Any]) -> tuple[torch.nn.Module, Tensor, Callable[[], Any]]:
        """A model, its images, and one call of it: inference, or a training step."""
        words = job["mode"].split()
        arguments: dict[str, Any] = {"deploy": True} if "merged" in words else {}
        torch.manual_seed(0)
        with fused("plain" not in words):
            model = build_model(job["item"], **arguments).to(self.device)
        size = model.pretrained_cfg["input_size"]
        x = torch.randn(job["batch"], *((3, 64, 64) if self.dry else size), device=self.device)
        if "channels_last" in words:
            last = torch.channels_last
            model, x = model.to(memory_format=last), x.contiguous(memory_format=last)
        model.train("train" in words)
        call: Any = model
        if "compiled" in words:
            mode = "reduce-overhead" if "reduce-overhead" in words and self.cuda else None
            call = compiled(model, backend="inductor" if self.cuda else "eager", mode=mode)
        autocast = functools.partial(torch.autocast, self.device.type, dtype=torch.bfloat16)

        def infer() -> Any:
            with torch.inference_mode(), autocast():
                return call(x)

        if "train" not in words:
            return model, x, infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def step() -> None:
            with autocast():
                out = call(x)
            optimizer.zero_grad(set_to_none=True)
            _first(out).float().square().mean().backward()
            optimizer.step()

        return model, x, step

    def _recorded(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A call as a CUDA graph, which is replayed without the host's work; the call itself in a dry run."""
        if not self.cuda:
            return call
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what libraries do once, and may not do while a graph is recorded
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Any:
            graph.replay()
            return out

        return replay

    def models(self, job: dict[str, Any]) -> dict[str, Any]:
        """Images a second and peak memory of one model in one mode; of a CUDA graph also that it gives the same."""
        model, x, call = self._model(job)
        start = time.perf_counter()
        out = call()
        self._wait()
        row: dict[str, Any] = {"first_s": time.perf_counter() - start, "size": list(x.shape[-2:])}
        if job.get("warm"):
            return {}
        if "graph" in job["mode"].split():
            call = self._recorded(call)
            row["error"] = _error(_first(call()), _first(out).double())
            if not row["error"] <= TOLERANCE["bfloat16"]:
                return {**row, "failed": f"the CUDA graph's outputs differ by more than {TOLERANCE['bfloat16']:g}"}
        del out
        call()  # an optimizer's state and second compilations belong to no measurement
        seconds = back_to_back(call, self.device, 0.1) if self.cuda else self.milliseconds(call) / 1e3
        memory = self._memory(call, model, [x])
        return {**row, "ms": 1e3 * seconds, "images_per_s": len(x) / seconds, "peak_bytes": memory and memory.peak}

    graphs = compile = models  # the same measurement in sections of their own

    def profile(self, job: dict[str, Any]) -> dict[str, Any]:
        """Kernels of one forward pass that take the most time."""
        from torch.profiler import ProfilerActivity, profile

        _, _, call = self._model(job)
        call()
        call()
        self._wait()
        kind = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        with profile(activities=[ProfilerActivity.CPU, kind][1 - self.cuda :]) as recorded:
            call()
            self._wait()
        key = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        found = [e for e in recorded.key_averages() if getattr(e, key) > 0]
        found = [e for e in found if not self.cuda or str(e.device_type).endswith("CUDA")]
        found.sort(key=lambda e: -getattr(e, key))
        top = [[e.key[:90], e.count, round(getattr(e, key), 1)] for e in found[:20]]
        return {"total_us": sum(getattr(e, key) for e in found), "kernels": sum(e.count for e in found), "top": top}


def _is_leaf(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def _leaves(inputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in inputs if _is_leaf(t)]


def _tensors(inputs: Sequence[Any]) -> Iterator[Tensor]:
    return (t for t in inputs if isinstance(t, Tensor))


def _first(outputs: Any) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor))


def _error(x: Tensor | None, reference: Tensor) -> float:
    """``||x - reference|| / ||reference||``; an absent gradient is zero."""
    difference = reference if x is None else x.detach().double() - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-30))


def main(argv: Sequence[str]) -> int:
    """Answer jobs until standard input ends.

    Args:
        argv: Number of the pipe for results, and ``dry`` or ``gpu``.

    Returns:
        The exit status.
    """
    with os.fdopen(int(argv[0]), "w", encoding="utf-8") as results:

        def send(row: dict[str, Any]) -> None:
            results.write(json.dumps(row) + "\n")
            results.flush()

        child = Child(argv[1] == "dry")
        gc.freeze()  # the collections around measurements need not walk through what was imported
        send({READY: True})
        for line in sys.stdin:
            try:
                row = child.run(json.loads(line))
            except Exception as e:  # whatever fails costs this job only
                row = {"failed": f"{type(e).__name__}: {one_line(e)}"}
            try:
                child.clear()
            except RuntimeError:  # an illegal access: nothing works in this process any more
                send({**row, FATAL: True})
                return 1
            send(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
