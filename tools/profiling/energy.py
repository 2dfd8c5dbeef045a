"""Joules of an image: NVML's counter of a GPU, or RAPL's of the processor packages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vizoo.tools.profiling.state import nvml_energy
from vizoo.tools.profiling.timing import Measurement, quiet, wait

POWERCAP = Path("/sys/class/powercap")
WINDOW, WINDOWS = 2.0, 3  # seconds of calls whose energy is a sample, and number of samples
UNTOLD = "energy: neither NVML nor RAPL tells it here"


class Counter(NamedTuple):
    """Where energy is read.

    Attributes:
        source: ``NVML`` or ``RAPL``, and of what.
        read: Joules of each domain until now.
        wraps: Joules after which the counter of each domain begins again at 0; None where it does not.
    """

    source: str
    read: Callable[[], list[float]]
    wraps: list[float | None]

    def between(self, before: list[float], after: list[float]) -> float:
        """Joules from one reading to the next, within which no domain wraps around twice."""
        spent = 0.0
        for a, b, wrap in zip(before, after, self.wraps, strict=True):
            spent += b - a if b >= a or wrap is None else b - a + wrap
        return spent


def find_counter(device: torch.device) -> Counter | str:
    """The counter of a device, or why there is none."""
    if device.type == "cuda":
        joules = nvml_energy(device)
        if joules is None or joules() is None:
            return f"{UNTOLD} (vizoo[gpu] asks NVML)"
        return Counter("NVML, the whole card", lambda: [joules() or 0.0], [None])
    return _rapl()


def _rapl() -> Counter | str:
    """The packages of the processor; domains within them, and that of the whole platform, count the same again."""
    files: list[Path] = []
    wraps: list[float | None] = []
    for domain in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            if not (domain / "name").read_text(encoding="utf-8").startswith("package"):
                continue
            file = domain / "energy_uj"
            int(file.read_text(encoding="utf-8"))
            wraps.append(int((domain / "max_energy_range_uj").read_text(encoding="utf-8")) / 1e6)
        except (OSError, ValueError) as e:
            return f"{UNTOLD}: {domain / 'energy_uj'}: {getattr(e, 'strerror', None) or e}"
        files.append(file)
    if not files:
        return UNTOLD

    def read() -> list[float]:
        return [int(file.read_text(encoding="utf-8")) / 1e6 for file in files]

    return Counter(f"RAPL, {len(files)} processor package{'s' * (len(files) > 1)}", read, wraps)


def energy(
    call: Callable[[], Any],
    batch: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement | str:
    """Joules of an image in calls that follow each other; what else the device does is in it.

    Args:
        call: The call, already warm.
        batch: Images of a call.
        device: Where it computes.
        clock: Wall clock in seconds.

    Returns:
        Three samples of two seconds each, or why there are none.
    """
    counter = find_counter(device)
    if isinstance(counter, str):
        return counter
    samples: list[float] = []
    watts: list[float] = []
    with quiet():
        for _ in range(WINDOWS):
            before, start, calls = counter.read(), clock(), 0
            while clock() - start < WINDOW:
                call()
                wait(device)
                calls += 1
            joules, seconds = counter.between(before, counter.read()), clock() - start
            samples.append(joules / (calls * batch))
            watts.append(joules / seconds)
    quality = [] if min(samples) > 0 else ["the counter stood still while it was read"]
    details = {"source": counter.source, "watts": sum(watts) / len(watts)}
    return Measurement("energy", "J", batch, [samples], {}, quality, details)
