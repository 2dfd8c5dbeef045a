"""State of a device while it is measured: clocks, throttling, and PyTorch's settings that figures depend on."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vizoo.tools.options import STATE
from vizoo.tools.profiling.precision import float32_precision

SLOWED = {  # bits of NVML's clock event reasons that slow a GPU down; the others are its being idle, and settings
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability voltage",
}
PROCESSORS = Path("/sys/devices/system/cpu")
DRIFT = 0.03  # relative change of the clock that is worth a note
PAUSE, SHARE = 0.25, 0.05  # seconds between two looks at the least, and most of the time that looking may take


def state(device: torch.device) -> dict[str, Any]:
    """State of a device now.

    Args:
        device: CPU or CUDA.

    Returns:
        The keys of ``STATE``, None for what is unknown or belongs to the other kind of device: clocks in MHz (that of
        a CPU is the highest of the cores this process may use, for they are not all busy), temperature in degrees
        Celsius, power in watts, ``throttled`` (why a GPU runs below its clock, empty if it does not), how often the
        CPU was throttled since it was started, and settings.
    """
    found = {**dict.fromkeys(STATE), **(_gpu(device) if device.type == "cuda" else _cpu())}
    found["float32_products"] = float32_precision(device)
    found["flush_denormal"] = flushes_denormal()
    return found


def allowed_cores() -> list[int]:
    """Logical cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def flushes_denormal() -> bool:
    """Whether this thread takes numbers too small for full precision as 0."""
    return sys.float_info.min / 2 == 0


def _cpu() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # what psutil raises where a system tells no clock depends on the system
        import psutil

        cores = psutil.cpu_freq(percpu=True)
        cores = [cores[i] for i in allowed_cores() if i < len(cores)] or cores
        found["clock_mhz"] = round(max(c.current for c in cores)) or None
        found["max_clock_mhz"] = round(max(c.max for c in cores)) or None
    with contextlib.suppress(OSError, ValueError):
        counts = [int(p.read_text()) for p in PROCESSORS.glob("cpu*/thermal_throttle/*_throttle_count")]
        found["throttle_count"] = sum(counts) if counts else None
    with contextlib.suppress(OSError):
        found["governor"] = (PROCESSORS / "cpu0/cpufreq/scaling_governor").read_text().strip()
    return found


def _gpu(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"cudnn": torch.backends.cudnn.version(), "cudnn_benchmark": torch.backends.cudnn.benchmark}
    with contextlib.suppress(Exception):  # the extra is not installed, or its driver is not there
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = _ask("nvmlSystemGetDriverVersion")
        card, sm, memory = _card(device), pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
        reasons = _ask("nvmlDeviceGetCurrentClocksEventReasons", card)
        if reasons is None:  # what drivers before 535 call them
            reasons = _ask("nvmlDeviceGetCurrentClocksThrottleReasons", card)
        power = _ask("nvmlDeviceGetPowerUsage", card)
        found.update(
            clock_mhz=_ask("nvmlDeviceGetClockInfo", card, sm),
            max_clock_mhz=_ask("nvmlDeviceGetMaxClockInfo", card, sm),
            memory_clock_mhz=_ask("nvmlDeviceGetClockInfo", card, memory),
            temperature_c=_ask("nvmlDeviceGetTemperature", card, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else round(power / 1e3, 1),
            throttled=None if reasons is None else ", ".join(why for bit, why in SLOWED.items() if reasons & bit),
        )
    return found


def nvml_energy(device: torch.device) -> Callable[[], float | None] | None:
    """What reads the joules that a GPU has spent since its driver was loaded; None without NVML.

    Of a MIG slice they are those of the whole card; the answer is None where a card does not count them.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        card = _card(device)
    except Exception:  # the extra is not installed, or its driver is not there
        return None

    def joules() -> float | None:
        spent = _ask("nvmlDeviceGetTotalEnergyConsumption", card)
        return None if spent is None else spent / 1e3

    return joules


def _card(device: torch.device) -> Any:
    """NVML's handle of a GPU; of a MIG slice that of the whole, which alone has clocks, power and temperature."""
    import pynvml

    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # pynvml.NVMLError
        part = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)


def _ask(question: str, *args: Any) -> Any:
    """An answer of a function of NVML; None where the card, its driver or this release of the library has none."""
    import pynvml

    try:
        return getattr(pynvml, question)(*args)
    except Exception:  # pynvml.NVMLError, or the name is not there
        return None


class Watch:
    """Looks at the state of a device between the calls that are timed.

    Args:
        device: CPU or CUDA.
        clock: Wall clock in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seen: list[dict[str, Any]] = []
        self._next = clock()

    def look(self) -> None:
        """Read the state, if the last time is long enough ago."""
        start = self.clock()
        if start < self._next:
            return
        self.seen.append(state(self.device))
        end = self.clock()
        self._next = end + max(PAUSE, (end - start) / SHARE)

    def _known(self, key: str) -> list[Any]:
        return [found[key] for found in self.seen if found[key] is not None]

    @property
    def record(self) -> dict[str, Any]:
        """The last state, with the median of the clock and every reason why the device was slowed down."""
        last = dict(self.seen[-1] if self.seen else state(self.device))
        if clocks := self._known("clock_mhz"):
            last["clock_mhz"] = round(statistics.median(clocks))
        if self._known("throttled"):
            last["throttled"] = self._slowed()
        return last

    def _slowed(self) -> str:
        reasons = [why for text in self._known("throttled") for why in text.split(", ") if why]
        return ", ".join(dict.fromkeys(reasons))

    @property
    def notes(self) -> list[str]:
        """What makes the figures doubtful: a clock that changed by more than 3 %, and throttling."""
        found, clocks, counts = [], self._known("clock_mhz"), self._known("throttle_count")
        if len(clocks) >= 4:  # half of the looks against the other half: a single one may meet a core just woken up
            before, after = (statistics.median(half) for half in _halves(clocks))
            if abs(after - before) > DRIFT * before:
                found.append(f"the clock went from {before:.0f} to {after:.0f} MHz while measuring")
        if slowed := self._slowed():
            found.append(f"the device was slowed down while measuring: {slowed}")
        if counts and counts[-1] > counts[0]:
            found.append(f"the processor was throttled {counts[-1] - counts[0]} times while measuring: temperature")
        return found


def _halves(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and the last half, without the one between."""
    half = len(values) // 2
    return values[:half], values[-half:]
