"""Records for people: the table with its conventions, rows of CSV files, modules and operators, notes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from vizoo.tools.common import Rows, Table, console
from vizoo.tools.options import STATE
from vizoo.tools.profiling.record import Record
from vizoo.tools.profiling.timing import Measurement, quantile

FOOTNOTE = """\
GMACs: multiply-accumulates of convolutions, linear layers and attention of one image, in 1e9; papers of this field
print them as FLOPs.  GFLOPs = 2 GMACs + other GFLOPs (norms, softmax, activations, biases, by fixed costs per element).
acts: elements written by those contractions, attention scores included.  Counted by vizoo profile."""
FVCORE = "fvcore G: fvcore's total in 1e9: a multiply-accumulate counts one, and norms and pooling are in it."
LATENCY = ("median_ms", "p10_ms", "p90_ms", "iqr_ms", "n", "first_ms", "host_ms", "device_ms")
TRAIN = ("forward", "backward", "optimizer")  # parts of a training step
COUNTED = ("params", "macs", "flops_other", "acts", "bytes", "kernels")
CONDITIONS = ("device", "dtype", "amp", "channels_last", "compile", "graph", "threads", "fused", "reparam", "features")
COLUMNS = [
    "model", "height", "width", *COUNTED, "fvcore_total", "status", "partial", "reasons", "latency_batch",
    *(f"latency_{k}" for k in LATENCY), "throughput_batch", "throughput", "peak_bytes", "cpu_use", "train_batch",
    "train_ms", *(f"train_{k}_ms" for k in TRAIN), "train_peak_bytes", "joules", "copy_bytes_s", "matmul_flops_s",
    *CONDITIONS, "vizoo", "commit", "python", "torch", "timm", "cuda", "machine", "fingerprint", "instructions",
    "cores", "load", *STATE, "date", "notes",
]  # fmt: skip
KNEE = 0.95  # share of the best throughput that is as good as it


def to_row(r: Record) -> dict[str, Any]:
    """One flat row for CSV files; times in milliseconds, memory in bytes, empty where something is not known."""
    counts = {key: getattr(r.counts, key) if r.counts else None for key in COUNTED}
    latency, train = r.latency, r.measured("train")
    return {
        "model": r.name,
        "height": r.size[0] if r.size else "",
        "width": r.size[1] if r.size else "",
        **counts,
        "fvcore_total": r.fvcore_total,
        "status": r.status,
        "partial": " ".join(k for k, status in r.statuses.items() if status == "partial"),
        "reasons": "; ".join(r.reasons),
        "latency_batch": _batch(latency),
        **(_latency(latency) if latency else {}),
        "throughput_batch": _batch(r.measured("throughput")),
        "throughput": r.throughput,
        "peak_bytes": _median(r.memory),
        "cpu_use": latency.details.get("cpu_use") if latency else None,
        "train_batch": _batch(train),
        "train_ms": 1e3 * train.median if train else None,
        **({f"train_{k}_ms": 1e3 * train.parts[k] for k in TRAIN} if train else {}),
        "train_peak_bytes": _median(r.measured("train_memory")),
        "joules": _median(r.measured("energy")),
        "copy_bytes_s": _median(r.measured("copy")),
        "matmul_flops_s": _median(r.measured("matmul")),
        **{key: r.conditions[key] for key in CONDITIONS},
        **{key: r.environment[key] for key in COLUMNS if key in r.environment},
        "notes": "; ".join([*r.notes, *r.doubts]),
    }


def _latency(m: Measurement) -> dict[str, Any]:
    samples = m.samples[0] if len(m.samples) == 1 else [s for process in m.samples for s in process]
    quantiles = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    found = {f"latency_{name}_ms": 1e3 * quantile(samples, q) for name, q in quantiles.items()}
    told = {key: m.details.get(key) for key in ("first", "host", "device")}
    return {
        **found,
        "latency_iqr_ms": 1e3 * (quantile(samples, 0.75) - quantile(samples, 0.25)),
        "latency_n": len(samples),
        **{f"latency_{key}_ms": None if value is None else 1e3 * value for key, value in told.items()},
    }


def _batch(m: Measurement | None) -> int | None:
    return m.batch if m else None


def _median(m: Measurement | None) -> float | None:
    return m.median if m else None


def to_rows(records: Sequence[Record]) -> Rows:
    """A flat row of each record for CSV files."""
    return Rows(COLUMNS, [to_row(r) for r in records])


# the table

SAID = {  # conditions of which there may be several, and how a name tells them
    "size": "{}",
    "dtype": "{}",
    "batch": "batch {}",
    "compile": "compile {}",
    "graph": "graph {}",
    "threads": "{} threads",
}


def batches(r: Record) -> list[int]:
    """How many images were run at once."""
    found = [m.batch for m in r.measurements if m.batch] or [r.conditions["batch"]]
    return list(dict.fromkeys(n for n in found if n))


def _condition(r: Record, key: str) -> str:
    if key == "size":
        return f"{r.size[0]}x{r.size[1]}" if r.size else ""
    if key == "batch":
        return "/".join(map(str, batches(r)))
    value = r.conditions[key]
    if isinstance(value, bool) or (key, value) == ("compile", None):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def what_differs(records: Sequence[Record]) -> list[dict[str, str]]:
    """The conditions that are not those of all records.

    Args:
        records: What is shown together.

    Returns:
        For each of them some of the keys of :data:`SAID` but for ``size`` as text, the same keys in all.
    """
    found = [{key: _condition(r, key) for key in SAID if key != "size"} for r in records]
    whole = [d for d, r in zip(found, records, strict=True) if not r.failure]
    keys = [k for k in SAID if k != "size" and len({d[k] for d in whole}) > 1]
    return [{k: d[k] for k in keys} for d in found]


def names(records: Sequence[Record]) -> list[str]:
    """Names of the targets, with the conditions that are not those of all."""
    return [
        ", ".join([r.name, *(SAID[k].format(v) for k, v in d.items() if v)])
        for r, d in zip(records, what_differs(records), strict=True)
    ]


def _scaled(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _counted(r: Record, cell: str, scale: float, digits: int) -> str:
    if r.counts is None:
        return ""
    return _scaled(getattr(r.counts, cell), scale, digits) + "*" * bool(r.counts.doubts.get(cell))


def _of(kind: str, scale: float, digits: int) -> Callable[[Record], str]:
    return lambda r: _scaled(_median(r.measured(kind)), scale, digits)


_HEADS = {"macs": "GMACs", "flops_other": "other GFLOPs", "acts": "acts M"}  # of figures that may be partial
_TABLE: dict[str, Callable[[Record], str]] = {  # text by header; a star tells a partial figure
    "model": lambda r: r.name,
    "size": lambda r: _condition(r, "size"),
    **{key: lambda r, key=key: _condition(r, key) for key in ("dtype", "batch", "compile", "graph")},  # type: ignore[misc]
    "params M": lambda r: _counted(r, "params", 1e6, 2),
    _HEADS["macs"]: lambda r: _counted(r, "macs", 1e9, 3),
    _HEADS["flops_other"]: lambda r: _counted(r, "flops_other", 1e9, 3),
    _HEADS["acts"]: lambda r: _counted(r, "acts", 1e6, 2),
    "fvcore G": lambda r: _scaled(r.fvcore_total, 1e9, 3),
    "peak MB": _of("memory", 1e6, 0),
    "ms p50": _of("latency", 1e-3, 1),
    "± IQR": lambda r: f"{_latency(r.latency)['latency_iqr_ms']:.1f}" if r.latency else "",
    "img/s": _of("throughput", 1, 1),
    "train ms": _of("train", 1e-3, 1),
    "train MB": _of("train_memory", 1e6, 0),
    "hooked ms": _of("modules", 1e-3, 1),
    "copy GB/s": _of("copy", 1e9, 1),
    "GFLOP/s": _of("matmul", 1e9, 1),
    "J": _of("energy", 1, 3),
    "threads": lambda r: _condition(r, "threads") if r.measurements else "",
}
_OF_MEASURES = {
    "memory": ["peak MB"],
    "latency": ["ms p50", "± IQR"],
    "throughput": ["img/s"],
    "train": ["train ms", "train MB"],
    "modules": ["hooked ms"],
    "roofline": ["copy GB/s", "GFLOP/s"],
    "energy": ["J"],
}


def headers(
    measures: Sequence[str], fvcore: bool = False, threads: bool = False, several: Sequence[str] = ()
) -> list[str]:
    """Columns of a table that is begun before its last row is known.

    Args:
        measures: What is measured.
        fvcore: Whether fvcore's total is asked for.
        threads: Whether threads matter where it is measured.
        several: Conditions that there are several of: ``dtype``, ``batch``, ``compile``, ``graph``.

    Returns:
        Their heads.
    """
    timed = [head for measure, heads in _OF_MEASURES.items() if measure in measures for head in heads]
    wanted = ["model", "size", *several, "params M", *_HEADS.values(), *["fvcore G"] * fvcore, *timed]
    return [*wanted, *["threads"] * bool(timed and threads)]


def where(records: Sequence[Record]) -> list[str]:
    """The machine and the conditions that all records were measured under; empty when nothing was measured."""
    r = next((r for r in records if r.measurements), None)
    if r is None:
        return []
    c, differing = r.conditions, what_differs(records)[0]
    dtype = " ".join(["" if "dtype" in differing else c["dtype"], *["autocast"] * c["amp"]]).strip()
    compiled = bool(c["compile"]) and "compile" not in differing
    found = [f"{r.environment['machine']} ({c['device']})", *[dtype] * bool(dtype)]
    found += ["channels_last"] * c["channels_last"] + [f"compiled {c['compile']}"] * compiled
    return found + ["CUDA graph"] * bool(c["graph"] and "graph" not in differing)


_MEANINGS = {  # of columns of measurements, with their batch
    "latency": "ms: median of one call{}",
    "throughput": "img/s{}",
    "memory": "peak MB: weights, input and activations{}",
    "train": "train ms: forward, backward and optimizer{}",
    "modules": "hooked ms: a call whose modules are timed{}",
    "copy": "copy GB/s and GFLOP/s: measured, read and written bytes and products",
    "energy": "J: joules an image{}",
}


def _conditions(records: Sequence[Record]) -> str:
    """One line with the conditions of the measurement, empty when nothing was measured."""
    parts = where(records)
    if not parts:
        return ""
    r = next(r for r in records if r.measurements)
    several = "batch" in what_differs(records)[0]
    for kind, text in _MEANINGS.items():
        if m := r.measured(kind):
            parts.append(text.format("" if several or not m.batch else f", batch {m.batch}"))
    first = r.latency.details.get("first") if r.latency else None
    if r.conditions["compile"] and first is not None:
        parts.append(f"first call with compilation {first:.1f} s")
    parts.append(f"torch {r.environment['torch']}, {r.environment['date'][:10]}")
    return "; ".join(parts) + "."


def _partial(r: Record) -> list[str]:
    """Why figures of the table are partial, and which of them if not all."""
    found = []
    for reason in r.counts.reasons if r.counts else ():
        touched = [head for cell, head in _HEADS.items() if r.counts and reason in r.counts.doubts[cell]]
        of = "" if len(touched) in (0, len(_HEADS)) else f" of {' and '.join(touched)}"
        found.append(f"* {r.name}: partial count{of}: {reason}.")
    return found


def knees(records: Sequence[Record]) -> list[str]:
    """Where larger batches stop to pay: the smallest one with 95 % of the best throughput, of three batches or more."""

    def alike(r: Record) -> str:
        return repr((r.target, {**r.conditions, "batch": None}))

    found, timed = [], sorted((r for r in records if r.throughput), key=alike)
    for _, group in itertools.groupby(timed, alike):
        sweep = sorted(group, key=lambda r: batches(r))
        best = max(r.throughput or 0.0 for r in sweep)
        knee = next(r for r in sweep if (r.throughput or 0.0) >= KNEE * best)
        if len({tuple(batches(r)) for r in sweep}) >= 3:
            found.append(
                f"{knee.name}: batch {_condition(knee, 'batch')} has {(knee.throughput or 0.0) / best:.0%} of the best"
                f" throughput of {len(sweep)} batches, {best:.1f} img/s."
            )
    return found


def footnotes(records: Sequence[Record]) -> list[str]:
    """Why counts are partial, where batches stop to pay, and the conventions of the columns that are shown."""
    partial = [text for r in records for text in _partial(r)]
    total = any(r.fvcore_total is not None for r in records)
    told = [*dict.fromkeys(partial), *knees(records), _conditions(records), FOOTNOTE, FVCORE if total else ""]
    return list(filter(None, told))


def _row(r: Record, heads: Sequence[str]) -> list[str]:
    """Cells of a table for a terminal: a reason takes the place of the figures that are missing."""
    cells = [_TABLE[head](r) for head in heads]
    while r.failure and cells and not cells[-1]:
        cells.pop()
    return [*cells, *[r.failure] * bool(r.failure)]


def table(records: Sequence[Record], heads: Sequence[str] = (), noted: bool = False) -> Table:
    """Records for people.

    Args:
        records: At least one.
        heads: Columns as of :func:`headers`; none for all that a record fills.
        noted: With a column of what was doubtful or failed, which a terminal shows elsewhere.

    Returns:
        The table with its conventions.
    """
    differing = what_differs(records)[0]
    rest = [
        h
        for h in _TABLE
        if (h in differing or h not in SAID or h in ("size", "threads")) and any(map(_TABLE[h], records))
    ]
    columns = list(heads or rest)
    numeric = [i for i, head in enumerate(columns) if head not in ("model", "size", "dtype", "compile", "graph")]
    notes = ["; ".join([*r.notes, *r.doubts, *[r.failure] * bool(r.failure)]) for r in records]
    if not noted:
        rows = [_row(r, columns) for r in records]
    elif any(notes):
        rows = [[*(_TABLE[head](r) for head in columns), note] for r, note in zip(records, notes, strict=True)]
        columns = [*columns, "note"]
    else:
        rows = [[_TABLE[head](r) for head in columns] for r in records]
    return Table(columns, rows, numeric, below=footnotes(records))


def print_notes(records: Sequence[Record]) -> None:
    """Print what is doubtful on standard error."""
    for name, r in zip(names(records), records, strict=True):
        for note in (*r.notes, *r.doubts):
            console(stderr=True).print(f"{name}: {note}", style="yellow", soft_wrap=True, markup=False)


# where the cost sits


def _milliseconds(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of a column of times; none where nothing was timed."""
    if all(row["seconds"] is None for row in rows):
        return [[] for _ in rows]
    return [["" if row["seconds"] is None else f"{1e3 * row['seconds']:.3f}"] for row in rows]


def operators_table(r: Record, top: int = 0) -> Table:
    """What each operator of a model costs; ``top`` limits the rows."""
    found = r.by_op(top)
    times = _milliseconds(found)
    ceilings = [
        ["" if o["ceiling"] is None else f"{o['ceiling']:.0%}"] * len(t) for o, t in zip(found, times, strict=True)
    ]
    rows = [
        [o["op"], f"{o['calls']:,}", f"{o['macs'] / 1e9:.4f}", f"{o['share']:.1%}", f"{o['other'] / 1e9:.4f}", *t, *c]
        for o, t, c in zip(found, times, ceilings, strict=True)
    ]
    timed = ["ms", "of ceiling"] * any(times)
    columns = ["operator", "calls", "GMACs", "share", "other GFLOPs", *timed]
    return Table(columns, rows, range(1, len(columns)), above=[f"operators of {r.name}"])


def modules_table(r: Record, depth: int = 1, sort: str = "", top: int = 0) -> Table:
    """What each module of a model costs; arguments as of :meth:`Record.by_module`."""
    found = r.by_module(depth, sort, top)
    times = _milliseconds(found)
    rows = [
        [
            m["module"],
            f"{m['params'] / 1e6:.3f}",
            f"{m['macs'] / 1e9:.4f}",
            f"{m['share']:.1%}",
            f"{m['acts'] / 1e6:.3f}",
            f"{m['other'] / 1e9:.4f}",
            *t,
            "x".join(map(str, m["out"] or ())),
        ]
        for m, t in zip(found, times, strict=True)
    ]
    columns = ["module", "params M", "GMACs", "share", "acts M", "other GFLOPs", *["ms"] * any(times), "output"]
    return Table(columns, rows, range(1, len(columns) - 1), above=[f"modules of {r.name}"])


def parts_table(r: Record) -> Table | None:
    """What memory and a training step consist of; None where neither was measured."""
    kinds = {"memory": ("MB", 1e-6), "train_memory": ("MB", 1e-6), "train": ("ms", 1e3)}
    rows = [
        [m.kind.replace("_", " "), name, f"{value * kinds[m.kind][1]:,.1f}", kinds[m.kind][0]]
        for m in r.measurements
        if m.kind in kinds
        for name, value in m.parts.items()
    ]
    return Table(["measured", "part", "", "unit"], rows, (2,), above=[f"parts of {r.name}"]) if rows else None
