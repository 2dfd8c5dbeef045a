"""A record: what one target costs under one set of conditions, and files of records.

Its form as JSON is ``record.schema.json``, schema 1; a file of records has one on each line.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import (
    Failure,
    Rows,
    Table,
    UserError,
    append_json_line,
    append_table,
    json_lines,
    markdown_text,
    read_json,
    short,
    write_json,
)
from vizoo.tools.options import STATE
from vizoo.tools.profiling.counting import Count, ModuleCost, OpCost
from vizoo.tools.profiling.recording import CELLS
from vizoo.tools.profiling.timing import Measurement, quantile

SCHEMA = 1
OPERATOR = ("op", "calls", "macs", "other", "bytes", "seconds", "ceiling")  # of a record as JSON
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


@dataclasses.dataclass
class Record:
    """What one target costs under one set of conditions, as counted and measured.

    Attributes:
        target: What it is: ``spec, kind, name, size, inputs, weights, kwargs``.
        conditions: Device, dtype and whatever else it was run with.
        environment: Machine, versions, and the state of the device; times may be compared where ``fingerprint`` is the
            same.
        counts: Counts of one image; None if it could not be counted.
        fvcore_total: Total as fvcore counts, with its norms and pooling.
        measurements: What was measured.
        seconds: Seconds of modules by path, with what is inside.
        operators: Seconds of operators by name, of all their calls, and the share of what the machine can do.
        notes: What was doubtful or changed while measuring.
        failure: Why it could not be counted or measured as asked for; empty if it could.
        bad_input: Whether that is for what was given: a size, an argument, a file.
        command: What makes the record again, in a shell.
    """

    target: dict[str, Any] = dataclasses.field(default_factory=dict)
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Count | None = None
    fvcore_total: int | None = None
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    operators: dict[str, tuple[float, float | None]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""
    bad_input: bool = False
    command: str = ""

    @property
    def name(self) -> str:
        """Name of the target."""
        name: str = self.target["name"]
        return name

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None for inputs that are no image."""
        size = self.target["size"]
        return (size[0], size[1]) if size else None

    @property
    def counted(self) -> Count:
        """The counts.

        Raises:
            Failure: If there are none.
        """
        if self.counts is None:
            raise Failure(f"{self.name!r} was not counted: {self.failure}")
        return self.counts

    @property
    def params(self) -> int:
        """Parameters, shared ones once."""
        return self.counted.params

    @property
    def macs(self) -> int:
        """Multiply-accumulates of contractions."""
        return self.counted.macs

    @property
    def flops_other(self) -> int:
        """FLOPs of everything that is no contraction."""
        return self.counted.flops_other

    @property
    def acts(self) -> int:
        """Elements written by contractions."""
        return self.counted.acts

    @property
    def bytes(self) -> int:
        """Bytes moved by all operators, a lower bound of memory traffic."""
        return self.counted.bytes

    @property
    def uncounted(self) -> dict[str, int]:
        """Operators nobody could price, with their calls."""
        return self.counted.uncounted

    @property
    def status(self) -> str:
        """``complete``, ``partial`` when the counts miss something or hold for some inputs only, or ``failed``."""
        return "failed" if self.failure else self.counted.status

    @property
    def reasons(self) -> list[str]:
        """Why the counts are partial and the rest failed, one line each."""
        return [*(self.counts.reasons if self.counts else ()), *[self.failure] * bool(self.failure)]

    @property
    def statuses(self) -> dict[str, str]:
        """``complete``, ``partial`` or ``failed`` by figure: ``params, macs, flops_other, acts, bytes``."""
        return self.counts.statuses if self.counts else dict.fromkeys(("params", *CELLS), "failed")

    def measured(self, kind: str) -> Measurement | None:
        """The measurement of a kind, such as ``latency``; None if it was not measured."""
        return next((m for m in self.measurements if m.kind == kind), None)

    @property
    def latency(self) -> Measurement | None:
        """Seconds of one call."""
        return self.measured("latency")

    @property
    def throughput(self) -> float | None:
        """Images a second."""
        found = self.measured("throughput")
        return found.median if found else None

    @property
    def memory(self) -> Measurement | None:
        """Peak memory of a call in bytes, and what it consists of."""
        return self.measured("memory")

    def by_module(self, depth: int = 1, sort: str = "", top: int = 0) -> list[dict[str, Any]]:
        """Costs of the modules down to a depth.

        Args:
            depth: Number of name parts shown; 0 is the whole model.
            sort: ``macs``, ``params``, ``acts``, ``other`` or ``time`` for the most expensive first; empty for the
                model's order.
            top: Most rows; 0 for all.

        Returns:
            Rows with ``module, params, macs, share, acts, other, out, seconds``, the last but one the shape of the
            output, the last None where it was not measured.

        Raises:
            ValueError: If ``sort`` is none of these.
        """
        timed = sort == "time"
        rows = [
            {**row, "module": row["module"] or self.name, "seconds": self.seconds.get(row["module"])}
            for row in self.counted.by_module(depth, "" if timed else sort, 0 if timed else top)
        ]
        if timed:
            rows.sort(key=lambda row: -(row["seconds"] or 0))
        return rows[:top] if top else rows

    def by_op(self, top: int = 0) -> list[dict[str, Any]]:
        """Costs of the operators.

        Args:
            top: Most rows; 0 for all.

        Returns:
            Rows with ``op, calls, macs, share, other, bytes, seconds, ceiling``, the most expensive first; the last
            two None where they were not measured.
        """
        rows = []
        for row in self.counted.by_op():
            seconds, ceiling = self.operators.get(row["op"], (None, None))
            rows.append({**row, "seconds": seconds, "ceiling": ceiling})
        if self.operators:
            rows.sort(key=lambda row: -(row["seconds"] or 0))
        return rows[:top] if top else rows

    def to_dict(self, depth: int | None = None) -> dict[str, Any]:
        """Everything, JSON-ready, by schema 1.

        Args:
            depth: Number of name parts of modules that are kept; None for all.

        Returns:
            The record.
        """
        return {
            "schema": SCHEMA,
            "target": self.target,
            "conditions": self.conditions,
            "environment": self.environment,
            "counts": self._plain_counts(),
            "measurements": [m.to_dict() for m in self.measurements],
            "modules": self._plain_modules(depth),
            "ops": [_chosen(row, OPERATOR) for row in self.by_op()] if self.counts else [],
            "notes": self.notes,
            "failure": {"reason": self.failure, "bad_input": self.bad_input} if self.failure else None,
            "command": self.command,
        }

    def _plain_counts(self) -> dict[str, Any] | None:
        if self.counts is None:
            return None
        own = ("status", "statuses", *(name for name in Count._fields if name not in ("modules", "ops", "doubts")))
        return {**{name: getattr(self.counts, name) for name in own}, "fvcore_total": self.fvcore_total}

    def _plain_modules(self, depth: int | None) -> list[dict[str, Any]]:
        return [
            {
                "path": path,
                **cost._asdict(),
                "out": None if cost.out is None else list(cost.out),
                "seconds": self.seconds.get(path),
            }
            for path, cost in (self.counts.modules.items() if self.counts else ())
            if depth is None or (path.count(".") + 1 if path else 0) <= depth
        ]

    def to_row(self) -> dict[str, Any]:
        """One flat row for CSV files; times in milliseconds, memory in bytes, empty where something is not known."""
        return to_row(self)

    def table(self) -> str:
        """The row of this record as a Markdown table with its conventions."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The row of this record as a Markdown table with its conventions."""
        return markdown_text([table([self], noted=True)])

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file, in one step."""
        write_json(path, [self.to_dict()])

    def to_csv(self, path: str | Path) -> None:
        """Append the flat row to a CSV file, in one step."""
        append_table(path, *to_rows([self]))

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Record:
        """The record of a dictionary that fits schema 1."""
        failure = d["failure"] or {"reason": "", "bad_input": False}
        counts, total = dict(d["counts"] or {}), None
        if counts:
            total, statuses, _ = counts.pop("fvcore_total"), counts.pop("statuses"), counts.pop("status")
            doubts = {cell: counts["reasons"] if statuses[cell] == "partial" else [] for cell in CELLS}
            modules = {m["path"]: ModuleCost(**_chosen(m, ModuleCost._fields)) for m in d["modules"]}
            ops = {o["op"]: OpCost(**_chosen(o, OpCost._fields)) for o in d["ops"]}
            counts = {**counts, "doubts": doubts, "modules": modules, "ops": ops}
        return cls(
            target=d["target"],
            conditions=d["conditions"],
            environment=d["environment"],
            counts=Count(**counts) if counts else None,
            fvcore_total=total,
            measurements=[Measurement.from_dict(m) for m in d["measurements"]],
            seconds={m["path"]: m["seconds"] for m in d["modules"] if m["seconds"] is not None},
            operators={o["op"]: (o["seconds"], o["ceiling"]) for o in d["ops"] if o["seconds"] is not None},
            notes=d["notes"],
            failure=failure["reason"],
            bad_input=failure["bad_input"],
            command=d["command"],
        )


def _chosen(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


# rows and the table


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
        "notes": "; ".join(r.notes),
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
    legend = FOOTNOTE if any(r.counts for r in records) else ""
    told = [*dict.fromkeys(partial), *knees(records), _conditions(records), legend, FVCORE if total else ""]
    return list(filter(None, told))


def _row(r: Record, heads: Sequence[str]) -> list[str]:
    """Cells of a table for a terminal: a reason takes the place of the figures that are missing."""
    cells = [_TABLE[head](r) for head in heads]
    while r.failure and cells and (not cells[-1] or heads[len(cells) - 1] == "threads"):
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
    notes = ["; ".join([*r.notes, *[r.failure] * bool(r.failure)]) for r in records]
    if not noted:
        rows = [_row(r, columns) for r in records]
    elif any(notes):
        rows = [[*(_TABLE[head](r) for head in columns), note] for r, note in zip(records, notes, strict=True)]
        columns = [*columns, "note"]
    else:
        rows = [[_TABLE[head](r) for head in columns] for r in records]
    return Table(columns, rows, numeric, below=footnotes(records))


# files


@functools.cache
def _validator() -> Any:
    """Of the schema that is shipped beside this file."""
    import fastjsonschema

    schema = json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))
    return fastjsonschema.compile(schema)


def check_record(d: Any) -> None:
    """Check that a value fits schema 1.

    Args:
        d: What JSON holds.

    Raises:
        ValueError: With the first place that does not fit, and why.
    """
    from fastjsonschema import JsonSchemaValueException

    if isinstance(d, dict) and d.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema {short(d['schema'])}, this vizoo reads {SCHEMA}")
    try:
        _validator()(d)
    except JsonSchemaValueException as e:
        text = e.message.replace("data", "it", 1)
        raise ValueError(text if len(text) <= 200 else f"{text[:200]}...") from None


def read_records(path: str | Path, name: str = "file") -> list[Record]:
    """Read a file of records; a last line that a killed process left unfinished is no record.

    Args:
        path: The file: ``.json`` with a list of them, as of ``--out``, or else one on each line, as of ``--save``.
        name: Argument name for messages.

    Returns:
        The records in their order.

    Raises:
        UserError: If it cannot be read, or one of them does not fit schema 1; the message says which and why.
    """
    listed = Path(path).suffix == ".json"
    found, what = (read_json(path, name), "item") if listed else (dict(json_lines(path, name)), "line")
    if not isinstance(found, dict | list):
        raise UserError(f"{name} {short(str(path))}: holds no list of records")
    numbered = enumerate(found, 1) if isinstance(found, list) else found.items()
    records = []
    for number, d in numbered:
        try:
            check_record(d)
        except ValueError as e:
            raise UserError(f"{name} {short(str(path))}: {what} {number} is no record: {e}") from None
        records.append(Record.from_dict(d))
    return records


def append_record(path: str | Path, record: Record, depth: int | None = None) -> None:
    """Add a record to a file, whole or not at all.

    Args:
        path: The file, which may be new.
        record: The record.
        depth: As of :meth:`Record.to_dict`.

    Raises:
        Failure: If it cannot be written.
    """
    append_json_line(path, record.to_dict(depth))
