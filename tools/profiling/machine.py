"""What a figure was measured on: processor, device, versions, commit, clocks, threads, and processes for these."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from vizoo.tools.common import Failure
from vizoo.tools.profiling.state import allowed_cores, state

PACKAGES: tuple[str, ...] = ("torch", "torchvision", "timm", "triton", "natten", "fvcore", "numpy", "onnxruntime")
PACKAGES += ("nvidia-ml-py", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation")
ISOLATED = True  # whether groups of cases get processes; a test may look at one process only
Case = TypeVar("Case")
Result = TypeVar("Result")


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the GPU; of the processor for any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def commit() -> str:
    """Commit of the checkout this package runs from, with ``+`` for uncommitted changes; empty outside one."""
    return _commit(Path(__file__).resolve())


def _commit(file: Path) -> str:
    """Commit of the checkout that a file of this folder belongs to.

    A repository around an installed or vendored copy is not ours: ours has this project's metadata and this file at
    the places where they are here.
    """
    root, place = file.parents[2], file.relative_to(file.parents[2]).as_posix()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # hooks say where *their* git is

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return "" if done.returncode else done.stdout.strip()

    with contextlib.suppress(OSError, UnicodeError):
        ours = '\nname = "vizoo"\n' in (root / "pyproject.toml").read_text(encoding="utf-8")
        if ours and git("ls-files", "--full-name", "--", place) == place:
            return git("describe", "--always", "--dirty=+", "--exclude=*")
    return ""


def default_threads() -> int:
    """Physical cores that this process may use: those of the machine, its affinity and its control group's quota."""
    import psutil

    allowed = len(allowed_cores()) or 1
    limits = [psutil.cpu_count(logical=False) or allowed, allowed]
    with contextlib.suppress(OSError, ValueError):  # "max 100000" without a quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        limits.append(int(quota) // int(period))
    return max(1, min(limits))


def versions() -> dict[str, str]:
    """What a figure depends on: ``vizoo``, its ``commit``, ``python``, ``torch`` and ``timm``."""
    import timm

    import vizoo

    return {
        "vizoo": vizoo.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine with its fingerprint, load, :func:`state` and date of a measurement on a device."""
    import psutil

    return {
        **versions(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "machine": device_name(device),
        "fingerprint": fingerprint(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "load": round(psutil.getloadavg()[0], 2),
        **state(device),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def fingerprint(device: torch.device) -> str:
    """What a device, its machine and PyTorch are, as 12 hexadecimal digits; equal ones may compare times."""
    import psutil

    memory = round(psutil.virtual_memory().total / 2**30)
    parts = (device_name(device), cpu_name(), torch.backends.cpu.get_cpu_capability(), psutil.cpu_count(logical=False))
    more = (memory, platform.system(), platform.machine(), torch.__version__)
    return hashlib.sha256(json.dumps([*parts, *more]).encode()).hexdigest()[:12]


def installation() -> dict[str, Any]:
    """Versions, devices and backends of this machine.

    Returns:
        ``versions`` by package (None when absent), ``cpu``, ``cores`` this process may use, ``memory_gib``, ``gpus``,
        and ``backends``: name to ``usable`` and ``reason``.
    """
    import psutil

    import vizoo
    from vizoo.backbones.ops.backend import backends

    found: dict[str, str | None] = {"vizoo": vizoo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return {
        "versions": found,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(allowed_cores()),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {b.name: {"usable": b.usable, "reason": b.reason} for b in backends()},
    }


def _begin(threads: int) -> None:
    """Set the threads of a new process, which ends with the one that started it, however that one ends."""
    torch.set_num_interop_threads(1)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def run_cases(
    threads: Sequence[int],
    cases: Sequence[Case],
    work: Callable[..., Result],
    *args: Any,
    group: Callable[[Case], Any] | None = None,
) -> Iterator[tuple[Case, int, Result | Failure]]:
    """Results of some work for every case with every number of CPU threads, as soon as each is known.

    Args:
        threads: Numbers of threads.  One is set here for the time of the work; several get a fresh process each, for
            OpenMP keeps the pool of its first size.
        cases: First argument of the work, one after the other.
        work: Function of a module.
        *args: Its further arguments; where there are processes they and the cases can be sent to one.
        group: Cases that follow each other share a process where this is the same of them, and no others do; None is
            a process for each number of threads, and none if there is one number.

    Yields:
        The case, the number of threads, and what the work returned; a failure if its process died, after which the
        next case has a new one.
    """
    if len(threads) == 1 and (group is None or not ISOLATED):
        before = torch.get_num_threads()
        torch.set_num_threads(threads[0])
        try:
            for case in cases:
                yield case, threads[0], work(case, *args)
        finally:
            torch.set_num_threads(before)
        return
    for n in threads:
        for _, together in itertools.groupby(cases, group or (lambda case: None)):
            yield from _in_processes(n, list(together), work, args)


def _in_processes(
    n: int, cases: list[Case], work: Callable[..., Result], args: Sequence[Any]
) -> Iterator[tuple[Case, int, Result | Failure]]:
    """Results of cases in one process, and in a new one after each that died."""
    # a server that has imported everything and run nothing starts a process at once
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["vizoo.tools.profiling.profile"])
    while cases:
        with ProcessPoolExecutor(1, mp_context=server, initializer=_begin, initargs=(n,)) as pool:
            alive = True
            while cases and alive:
                case = cases.pop(0)
                try:
                    found: Result | Failure = pool.submit(work, case, *args).result()
                except BrokenProcessPool:
                    some = f"{n} thread{'s' * (n > 1)}"
                    why = f"the process with {some} died: memory ran out perhaps, or the model ended it"
                    found, alive = Failure(why), False
                yield case, n, found
