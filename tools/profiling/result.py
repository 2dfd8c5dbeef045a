"""What a model costs as a result: its figures, its rows and files, and the table with its conventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import Failure, Record, Table, append_table, markdown_text, write_json
from vizoo.tools.options import STATE
from vizoo.tools.profiling.counting import Count
from vizoo.tools.profiling.memory import Memory
from vizoo.tools.profiling.recording import CELLS
from vizoo.tools.profiling.timing import Stats

FOOTNOTE = """\
GMACs: multiply-accumulates of convolutions, linear layers and attention of one image, in 1e9; papers of this field
print them as FLOPs.  GFLOPs = 2 GMACs + other GFLOPs (norms, softmax, activations, biases, by fixed costs per element).
acts: elements written by those contractions, attention scores included.  Counted by vizoo profile."""
FVCORE = "fvcore G: fvcore's total in 1e9: a multiply-accumulate counts one, and norms and pooling are in it."
LATENCY = ("median_ms", "p10_ms", "p90_ms", "iqr_ms", "n", "first_ms", "host_ms", "device_ms")
COLUMNS = [
    "model", "height", "width", "params", "macs", "flops_other", "acts", "bytes", "kernels", "fvcore_total", "status",
    "partial", "reasons", "latency_batch", *(f"latency_{k}" for k in LATENCY), "throughput_batch", "throughput",
    "peak_bytes", "cpu_use", "device", "dtype", "amp", "channels_last", "compile", "threads", "fused", "reparam",
    "features", "vizoo", "commit", "python", "torch", "timm", "cuda", "machine", "instructions", "cores", "load",
    *STATE, "date", "notes",
]  # fmt: skip


@dataclasses.dataclass
class Profile:
    """What one model costs, as counted and measured.

    Attributes:
        model: Name.
        size: Height and width in pixels; None for inputs that are no image.
        config: Device, dtype and the other conditions of the measurement.
        environment: Versions and machine.
        counts: Counts of one image; None if it could not be counted.
        latency: Seconds of one call at ``latency_batch``.
        throughput: Images a second at ``throughput_batch``.
        memory: Peak memory at ``throughput_batch``, or at ``latency_batch`` when no throughput was asked for.
        fvcore_total: Total as fvcore counts, with its norms and pooling.
        notes: What was doubtful or changed while measuring.
        failure: Why it could not be counted or measured as asked for; empty if it could.
        bad_input: Whether that is for what was given: a size, an argument, a file.
    """

    model: str = ""
    size: tuple[int, int] | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Count | None = None
    latency: Stats | None = None
    latency_batch: int | None = None
    throughput: float | None = None
    throughput_batch: int | None = None
    memory: Memory | None = None
    fvcore_total: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""
    bad_input: bool = False

    @property
    def counted(self) -> Count:
        """The counts.

        Raises:
            Failure: If there are none.
        """
        if self.counts is None:
            raise Failure(f"{self.model!r} was not counted: {self.failure}")
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

    @property
    def measured(self) -> bool:
        """Whether anything was run on a device."""
        return self.latency is not None or self.throughput is not None or self.memory is not None

    def by_module(self, depth: int = 1, sort: str = "", top: int = 0) -> list[dict[str, Any]]:
        """Costs of the modules down to a depth.

        Args:
            depth: Number of name parts shown; 0 is the whole model.
            sort: ``macs``, ``params``, ``acts`` or ``other`` for the most expensive first; empty for the model's order.
            top: Most rows; 0 for all.

        Returns:
            Rows with ``module, params, macs, share, acts, other, out``, the last the shape of the output.
        """
        rows = self.counted.by_module(depth, sort, top)
        return [{**row, "module": row["module"] or self.model} for row in rows]

    def by_op(self, top: int = 0) -> list[dict[str, Any]]:
        """Rows with ``op, calls, macs, share, other``, the most expensive first; ``top`` limits them."""
        return self.counted.by_op(top)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready; times in milliseconds, memory in bytes; None where something failed."""
        c = self.counts
        names = ("params", "trainable", "buffers", "state_bytes", *CELLS, "kernels", "uncounted")
        return {
            "model": self.model,
            "environment": self.environment,  # near the beginning, where a file of ours is told by
            "size": list(self.size) if self.size else None,
            "status": self.status,
            "statuses": self.statuses,
            "reasons": self.reasons,
            **{name: getattr(c, name) if c else None for name in names},
            "largest_tensor": c.largest if c else None,
            "modules": {path: m._asdict() for path, m in c.modules.items()} if c else None,
            "ops": c.by_op() if c else None,
            "fvcore_total": self.fvcore_total,
            "latency_batch": self.latency_batch,
            "latency": self.latency.to_dict() if self.latency else None,
            "throughput_batch": self.throughput_batch,
            "throughput": self.throughput,
            "memory": self.memory._asdict() if self.memory else None,
            "config": self.config,
            "notes": self.notes,
        }

    def to_row(self) -> dict[str, Any]:
        """One flat row for CSV files; times in milliseconds, memory in bytes."""
        d = self.to_dict()
        latency, memory = d["latency"] or {}, d["memory"] or {}
        return {
            "model": self.model,
            "height": self.size[0] if self.size else "",
            "width": self.size[1] if self.size else "",
            **{k: d[k] for k in ("params", "macs", "flops_other", "acts", "bytes", "kernels", "fvcore_total")},
            "status": self.status,
            "partial": " ".join(k for k, status in self.statuses.items() if status == "partial"),
            "reasons": "; ".join(self.reasons),
            "latency_batch": d["latency_batch"],
            **{f"latency_{k}": latency.get(k) for k in LATENCY},
            "throughput_batch": d["throughput_batch"],
            "throughput": d["throughput"],
            "peak_bytes": memory.get("peak"),
            "cpu_use": latency.get("cpu_use"),
            **self.config,
            **self.environment,
            "notes": "; ".join(self.notes),
        }

    def table(self) -> str:
        """The row of this model as a Markdown table with its conventions."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The row of this model as a Markdown table with its conventions."""
        return markdown_text([table([self], noted=True)])

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file, in one step."""
        write_json(path, [self.to_dict()])

    def to_csv(self, path: str | Path) -> None:
        """Append the flat row to a CSV file, in one step."""
        append_table(path, *to_record([self]))


def what_differs(profiles: Sequence[Profile]) -> list[dict[str, str]]:
    """The conditions that are not those of all profiles.

    Args:
        profiles: Results that are shown together.

    Returns:
        For each of them some of ``dtype``, ``batch`` and ``threads`` as text, the same keys in all.
    """
    found = [
        {
            "dtype": p.config["dtype"],
            "batch": _TABLE["batch"](p),
            "threads": str(p.config.get("threads") or ""),
        }
        for p in profiles
    ]
    whole = [d for d, p in zip(found, profiles, strict=True) if not p.failure]
    keys = [k for k in ("dtype", "batch", "threads") if len({d[k] for d in whole}) > 1]
    return [{k: d[k] for k in keys} for d in found]


def _scaled(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _counted(p: Profile, cell: str, scale: float, digits: int) -> str:
    if p.counts is None:
        return ""
    return _scaled(getattr(p.counts, cell), scale, digits) + "*" * bool(p.counts.doubts.get(cell))


_HEADS = {"macs": "GMACs", "flops_other": "other GFLOPs", "acts": "acts M"}  # of figures that may be partial
_TABLE: dict[str, Callable[[Profile], str]] = {  # text by header; a star tells a partial figure
    "model": lambda p: p.model,
    "size": lambda p: f"{p.size[0]}x{p.size[1]}" if p.size else "",
    "dtype": lambda p: p.config["dtype"],
    "batch": lambda p: "/".join(dict.fromkeys(str(n) for n in (p.latency_batch, p.throughput_batch) if n)),
    "params M": lambda p: _counted(p, "params", 1e6, 2),
    _HEADS["macs"]: lambda p: _counted(p, "macs", 1e9, 3),
    _HEADS["flops_other"]: lambda p: _counted(p, "flops_other", 1e9, 3),
    _HEADS["acts"]: lambda p: _counted(p, "acts", 1e6, 2),
    "fvcore G": lambda p: _scaled(p.fvcore_total, 1e9, 3),
    "peak MB": lambda p: f"{p.memory.peak / 1e6:.0f}" if p.memory else "",
    "ms p50": lambda p: f"{1e3 * p.latency.median:.1f}" if p.latency else "",
    "± IQR": lambda p: f"{1e3 * p.latency.iqr:.1f}" if p.latency else "",
    "img/s": lambda p: f"{p.throughput:.1f}" if p.throughput else "",
    "threads": lambda p: str(p.config.get("threads") or "") if p.measured else "",
}
_OF_MODES = {"memory": ["peak MB"], "latency": ["ms p50", "± IQR"], "throughput": ["img/s"]}


def headers(
    modes: Sequence[str], fvcore: bool = False, threads: bool = False, several: Sequence[str] = ()
) -> list[str]:
    """Columns of a table that is begun before its last row is known.

    Args:
        modes: What is measured.
        fvcore: Whether fvcore's total is asked for.
        threads: Whether threads matter where it is measured.
        several: Conditions that there are several of: ``dtype``, ``batch``.

    Returns:
        Their heads.
    """
    timed = [head for mode, heads in _OF_MODES.items() if mode in modes for head in heads]
    wanted = ["model", "size", *several, "params M", *_HEADS.values(), *["fvcore G"] * fvcore, *timed]
    return [*wanted, *["threads"] * bool(timed and threads)]


def where(profiles: Sequence[Profile]) -> list[str]:
    """The machine and the conditions that all profiles were measured under; empty when nothing was measured."""
    p = next((p for p in profiles if p.measured), None)
    if p is None:
        return []
    c, differing = p.config, what_differs(profiles)[0]
    dtype = " ".join(["" if "dtype" in differing else c["dtype"], *["autocast"] * c["amp"]]).strip()
    found = [f"{p.environment['machine']} ({c['device']})", *[dtype] * bool(dtype)]
    return found + ["channels_last"] * c["channels_last"] + [f"compiled {c['compile']}"] * bool(c["compile"])


def _conditions(profiles: Sequence[Profile]) -> str:
    """One line with the conditions of the measurement, empty when nothing was measured."""
    parts = where(profiles)
    if not parts:
        return ""
    p = next(p for p in profiles if p.measured)
    several = "batch" in what_differs(profiles)[0]
    if p.latency:
        parts.append("ms: median of one call" + ("" if several else f", batch {p.latency_batch}"))
    if p.throughput and not several:
        parts.append(f"img/s: batch {p.throughput_batch}")
    if p.memory:
        batch = "" if several else f", batch {p.throughput_batch or p.latency_batch}"
        parts.append(f"peak MB: weights, input and activations{batch}")
    if p.config["compile"] and p.latency:
        parts.append(f"first call with compilation {p.latency.first:.1f} s")
    parts.append(f"torch {p.environment['torch']}, {p.environment['date'][:10]}")
    return "; ".join(parts) + "."


def _partial(p: Profile) -> list[str]:
    """Why figures of the table are partial, and which of them if not all."""
    found = []
    for reason in p.counts.reasons if p.counts else ():
        touched = [head for cell, head in _HEADS.items() if p.counts and reason in p.counts.doubts[cell]]
        of = "" if len(touched) in (0, len(_HEADS)) else f" of {' and '.join(touched)}"
        found.append(f"* {p.model}: partial count{of}: {reason}.")
    return found


def footnotes(profiles: Sequence[Profile]) -> list[str]:
    """Why counts are partial, and the conventions of the columns that are shown."""
    partial = [text for p in profiles for text in _partial(p)]
    total = any(p.fvcore_total is not None for p in profiles)
    return list(filter(None, [*dict.fromkeys(partial), _conditions(profiles), FOOTNOTE, FVCORE if total else ""]))


def _row(p: Profile, heads: Sequence[str]) -> list[str]:
    """Cells of a table for a terminal: a reason takes the place of the figures that are missing."""
    cells = [_TABLE[head](p) for head in heads]
    while p.failure and cells and not cells[-1]:
        cells.pop()
    return [*cells, *[p.failure] * bool(p.failure)]


def table(profiles: Sequence[Profile], heads: Sequence[str] = (), noted: bool = False) -> Table:
    """Profiles for people.

    Args:
        profiles: At least one result.
        heads: Columns as of :func:`headers`; none for all that a profile fills.
        noted: With a column of what was doubtful or failed, which a terminal shows elsewhere.

    Returns:
        The table with its conventions.
    """
    differing = what_differs(profiles)[0]
    rest = [h for h in _TABLE if (h in differing or h not in ("dtype", "batch")) and any(map(_TABLE[h], profiles))]
    columns = list(heads or rest)
    numeric = [i for i, head in enumerate(columns) if head not in ("model", "size", "dtype")]
    notes = ["; ".join([*p.notes, *[p.failure] * bool(p.failure)]) for p in profiles]
    if not noted:
        rows = [_row(p, columns) for p in profiles]
    elif any(notes):
        rows = [[*(_TABLE[head](p) for head in columns), note] for p, note in zip(profiles, notes, strict=True)]
        columns = [*columns, "note"]
    else:
        rows = [[_TABLE[head](p) for head in columns] for p in profiles]
    return Table(columns, rows, numeric, below=footnotes(profiles))


def to_record(profiles: Sequence[Profile]) -> Record:
    """A flat row of each profile for CSV files."""
    return Record(COLUMNS, [p.to_row() for p in profiles])
