"""Records for people beyond their table: notes, and where the cost of a model sits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vizoo.tools.common import Table, console
from vizoo.tools.profiling.record import Record, names


def print_notes(records: Sequence[Record]) -> None:
    """Print what is doubtful on standard error."""
    for name, r in zip(names(records), records, strict=True):
        for note in r.notes:
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
