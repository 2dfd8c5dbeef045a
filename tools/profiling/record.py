"""A record: what one target costs under one set of conditions, and files of records.

Its form as JSON is ``record.schema.json``, schema 1; a file of records has one on each line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import Failure, UserError, append_json_line, json_lines, short
from vizoo.tools.profiling.counting import Count, ModuleCost
from vizoo.tools.profiling.recording import CELLS
from vizoo.tools.profiling.timing import Measurement

SCHEMA = 1
SORTED = ("macs", "params", "acts", "other", "time")  # of modules: the most expensive first


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

    @property
    def doubts(self) -> list[str]:
        """What makes a measurement doubtful, with its kind."""
        return [f"{m.kind.replace('_', ' ')}: {text}" for m in self.measurements for text in m.quality]

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
            rows.append({"bytes": None, **row, "seconds": seconds, "ceiling": ceiling})
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

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Record:
        """The record of a dictionary that fits schema 1."""
        failure = d["failure"] or {"reason": "", "bad_input": False}
        counts, total = dict(d["counts"] or {}), None
        if counts:
            total, statuses, _ = counts.pop("fvcore_total"), counts.pop("statuses"), counts.pop("status")
            doubts = {cell: counts["reasons"] if statuses[cell] == "partial" else [] for cell in CELLS}
            modules = {m["path"]: ModuleCost(**_chosen(m, ModuleCost._fields)) for m in d["modules"]}
            ops = {o["op"]: (o["macs"], o["other"], o["calls"]) for o in d["ops"]}
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


OPERATOR = ("op", "calls", "macs", "other", "bytes", "seconds", "ceiling")  # of a record as JSON


def _chosen(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


@functools.cache
def _validator() -> Any:
    """Of the schema that is shipped beside this file."""
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("record.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


def check_record(d: Any) -> None:
    """Check that a value fits schema 1.

    Args:
        d: What JSON holds.

    Raises:
        ValueError: With the first place that does not fit, and why.
    """
    from jsonschema.exceptions import best_match

    if isinstance(d, dict) and d.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema {short(d['schema'])}, this vizoo reads {SCHEMA}")
    error = best_match(_validator().iter_errors(d))
    if error is not None:
        place = "/".join(map(str, error.absolute_path))
        raise ValueError(f"{place}: {short(error.message)}" if place else short(error.message))


def read_records(path: str | Path, name: str = "file") -> list[Record]:
    """Read a file of records; a last line that a killed process left unfinished is no record.

    Args:
        path: The file.
        name: Argument name for messages.

    Returns:
        The records in their order.

    Raises:
        UserError: If it cannot be read, or a line is no record of schema 1; the message says which and why.
    """
    return [Record.from_dict(d) for d in read_plain(path, name)]


def read_plain(path: str | Path, name: str) -> Iterator[dict[str, Any]]:
    """As :func:`read_records`, as plain values one by one, for a file of thousands."""
    for number, d in json_lines(path, name):
        try:
            check_record(d)
        except ValueError as e:
            raise UserError(f"{name} {short(str(path))}: line {number} is no record: {e}") from None
        yield d


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


def newest(records: Sequence[Record]) -> Record | None:
    """The last of some records that did not fail; None if there is none."""
    return next((r for r in reversed(records) if not r.failure), None)


def conditions_of(record: Record) -> tuple[Any, ...]:
    """What two records have in common if their times may be compared: target, size, conditions and machine."""
    return (
        record.target["spec"],
        record.size,
        json.dumps(record.target["kwargs"], sort_keys=True),
        *sorted((k, str(v)) for k, v in record.conditions.items()),
        record.environment["fingerprint"],
    )
