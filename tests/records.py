"""Records of schema 1 as plain values, for tests of what is drawn of them."""

from __future__ import annotations

from typing import Any

from vizoo.tools.profiling.record import check_record


def measurement(kind: str, unit: str, median: float, batch: int | None = 8, **more: Any) -> dict[str, Any]:
    return {
        **{"kind": kind, "unit": unit, "batch": batch, "samples": [[0.99 * median, median, 1.01 * median]]},
        **{"median": median, "ci95": [0.99 * median, 1.01 * median], "parts": {}, "quality": [], "details": {}, **more},
    }


def record(name: str, speed: float = 10.0, macs: int = 10**9, **changed: Any) -> dict[str, Any]:
    """A record of schema 1; ``changed`` replaces its parts, or some of ``target``, ``conditions``, ``environment``."""
    seconds = 8 / speed
    cost = {"acts": macs // 300, "other": macs // 50, "out": [1, 8]}
    paths = [("", 1.0), ("stem", 0.1), ("stages.0", 0.9), ("stages.0.attn", 0.5), ("stages.0.tiny", 0.001)]
    found: dict[str, Any] = {
        "schema": 1,
        "target": {
            **{"spec": name, "kind": "timm", "name": name, "size": [224, 224], "inputs": [[1, 3, 224, 224]]},
            **{"weights": None, "kwargs": {}},
        },
        "conditions": {
            **{"device": "cpu", "dtype": "fp32", "amp": False, "channels_last": False, "compile": None, "graph": False},
            **{"threads": 1, "batch": 8, "fused": True, "reparam": False, "features": False},
        },
        "environment": {
            **{"fingerprint": "0123456789ab", "machine": "Test CPU", "vizoo": "0", "commit": "", "torch": "2.14.1+cpu"},
            **{"date": "2026-11-29T12:00:00+00:00", "clock_mhz": 3000.0 + speed},
        },
        "counts": {
            **{"status": "complete", "reasons": [], "params": macs // 100, "trainable": macs // 100, "buffers": 0},
            **{"statuses": dict.fromkeys(("params", "macs", "flops_other", "acts", "bytes"), "complete")},
            **{"state_bytes": {"float32": macs // 25}, "macs": macs, "flops_other": macs // 50, "acts": macs // 300},
            **{"bytes": macs // 9, "kernels": 9, "largest": 9, "uncounted": {}, "engine": "meta", "fvcore_total": None},
        },
        "measurements": [
            measurement("latency", "s", seconds),
            measurement("throughput", "images/s", speed),
            measurement("memory", "bytes", 3e8, parts={"weights": 1e8, "activations": 2e8}),
            measurement("train", "s", 3 * seconds, parts={"forward": seconds, "backward": 2 * seconds}),
            measurement("modules", "s", seconds),
            measurement("copy", "bytes/s", 1e10, None),
            measurement("matmul", "FLOP/s", 1e11, None),
        ],
        "modules": [
            {"path": path, "params": int(macs / 100 * f), "macs": int(macs * f), "seconds": seconds * f, **cost}
            for path, f in paths
        ],
        "ops": [
            {"op": op, "calls": 3, "macs": int(macs * m), "other": 9, "bytes": macs // 9, "seconds": t, "ceiling": 0.5}
            for op, m, t in (("aten.convolution", 0.9, 0.8), ("aten.addmm", 0.1, 0.1), ("aten.gelu", 0, 0.1))
        ],
        "notes": [],
        "failure": None,
        "command": f"vizoo profile {name}",
    }
    for key, value in changed.items():
        merged = key in ("target", "conditions", "environment")
        found[key] = {**found[key], **value} if merged else value
    check_record(found)
    return found


def failed(name: str, reason: str) -> dict[str, Any]:
    gone = {"counts": None, "measurements": [], "modules": [], "ops": []}
    return record(name, **gone, failure={"reason": reason, "bad_input": False})
