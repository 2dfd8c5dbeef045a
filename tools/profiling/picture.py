"""Profiles for people: the table and its notes, where the cost of a model sits, speed over cost as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vizoo.tools.common import Table, console, save_figure
from vizoo.tools.profiling.result import Profile, what_differs, where

MARKERS = "osD^vP*X"


def _names(profiles: Sequence[Profile]) -> list[str]:
    """Names of the models, with the conditions that are not those of all."""
    said = {"dtype": "{}", "batch": "batch {}", "threads": "{} threads"}
    differing = what_differs(profiles)
    return [
        ", ".join([p.model, *(said[k].format(v) for k, v in d.items() if v)])
        for p, d in zip(profiles, differing, strict=True)
    ]


def print_notes(profiles: Sequence[Profile]) -> None:
    """Print what is doubtful on standard error."""
    for name, p in zip(_names(profiles), profiles, strict=True):
        for note in p.notes:
            console(stderr=True).print(f"{name}: {note}", style="yellow", soft_wrap=True, markup=False)


def operators_table(p: Profile, top: int = 0) -> Table:
    """What each operator of a model costs; ``top`` limits the rows."""
    rows = [
        [r["op"], f"{r['calls']:,}", f"{r['macs'] / 1e9:.4f}", f"{r['share']:.1%}", f"{r['other'] / 1e9:.4f}"]
        for r in p.by_op(top)
    ]
    columns = ["operator", "calls", "GMACs", "share", "other GFLOPs"]
    return Table(columns, rows, (1, 2, 3, 4), above=[f"operators of {p.model}"])


def modules_table(p: Profile, depth: int = 1, sort: str = "", top: int = 0) -> Table:
    """What each module of a model costs; arguments as of :meth:`Profile.by_module`."""
    rows = [
        [
            r["module"],
            f"{r['params'] / 1e6:.3f}",
            f"{r['macs'] / 1e9:.4f}",
            f"{r['share']:.1%}",
            f"{r['acts'] / 1e6:.3f}",
            f"{r['other'] / 1e9:.4f}",
            "x".join(map(str, r["out"] or ())),
        ]
        for r in p.by_module(depth, sort, top)
    ]
    columns = ["module", "params M", "GMACs", "share", "acts M", "other GFLOPs", "output"]
    return Table(columns, rows, range(1, 6), above=[f"modules of {p.model}"])


def _heights(profiles: Sequence[Profile]) -> tuple[str, list[float]]:
    """What is drawn over the cost: speed where all have one, else latency, else parameters."""
    first = profiles[0]
    batches = {(p.latency_batch, p.throughput_batch) for p in profiles}
    if all(p.throughput for p in profiles):
        batch = f", batch {first.throughput_batch}" if len(batches) == 1 else ""
        return f"images/s{batch}", [p.throughput or 0.0 for p in profiles]
    if all(p.latency for p in profiles):
        batch = f", batch {first.latency_batch}" if len(batches) == 1 else ""
        return f"latency, ms{batch}", [1e3 * p.latency.median for p in profiles if p.latency]
    return "parameters, M", [p.params / 1e6 for p in profiles]


def plot(profiles: Sequence[Profile], path: Path) -> None:
    """Draw cost against speed: images a second where measured, else latency, else parameters; over GMACs.

    Args:
        profiles: At least one result.
        path: Picture file; the ending picks the format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    label, values = _heights(profiles)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    differing = what_differs(profiles)
    families: dict[str, list[int]] = {}
    for i, p in enumerate(profiles):
        families.setdefault(f"{p.model.split('_')[0]}, {differing[i]}", []).append(i)
    for members in families.values():  # a thin line joins the sizes of a family
        members.sort(key=lambda i: profiles[i].macs)
        axes.plot([profiles[i].macs / 1e9 for i in members], [values[i] for i in members], color="0.8", zorder=1)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (p, name) in enumerate(zip(profiles, _names(profiles), strict=True)):
        name += " (partial count)" if p.reasons else ""
        marker = MARKERS[i // 10 % len(MARKERS)]
        axes.scatter(p.macs / 1e9, values[i], s=45, color=colors[i % 10], marker=marker, label=name, zorder=2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.set_xlabel("GMACs (multiply-accumulates of one image, 1e9)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    conditions, threads = where(profiles)[:2], profiles[0].config.get("threads")
    shown = conditions and threads and "threads" not in differing[0]
    conditions += [f"{threads} thread{'s' * (threads != 1)}"] * bool(shown)
    axes.set_title(", ".join(conditions) or "counts", fontsize=9)
    save_figure(figure, path, dpi=150)
