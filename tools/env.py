"""``vizoo env``: versions, devices and usable backends, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from vizoo.tools.common import run_tool
from vizoo.tools.options import Parser

PACKAGES: tuple[str, ...] = ("torch", "torchvision", "timm", "triton", "natten", "fvcore", "numpy", "onnxruntime")
PACKAGES += ("mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation")
EXAMPLES = """\
examples:
  vizoo env          what to paste into a bug report
  vizoo env --json   the same for programs"""


def environment() -> dict[str, Any]:
    """Versions, devices and backends of this machine.

    Returns:
        ``versions`` by package (None when absent), ``cpu``, ``cores`` this process may use, ``memory_gib``, ``gpus``,
        and ``backends``: name to ``usable`` and ``reason``.
    """
    import psutil
    import torch

    import vizoo
    from vizoo.backbones.ops.backend import backends

    versions: dict[str, str | None] = {"vizoo": vizoo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["cuda"] = torch.version.cuda
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {b.name: {"usable": b.usable, "reason": b.reason} for b in backends()},
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _run(argv: list[str]) -> int:
    p = Parser(
        prog="vizoo env",
        description="Print versions, devices and which backends can be used here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    args = p.parse_args(argv)
    env = environment()
    if args.json:
        print(json.dumps(env, indent=2))
        return 0
    print("versions  " + "  ".join(f"{k} {v}" for k, v in env["versions"].items() if v))
    print("absent    " + ", ".join(k for k, v in env["versions"].items() if v is None))
    print(f"system    {env['system']}")
    print(f"cpu       {env['cpu']}, {env['cpu_capability']}, {env['cores']} cores, {env['threads']} torch threads")
    print(f"memory    {env['memory_gib']} GiB")
    print("gpu       " + (", ".join(env["gpus"]) or "none"))
    print("backends")
    for name, b in env["backends"].items():
        print(f"  {name:8s}{'usable' if b['usable'] else 'no':8s}{b['reason']}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the environment; returns the exit status."""
    return run_tool(_run, argv, "env")


if __name__ == "__main__":
    raise SystemExit(main())
