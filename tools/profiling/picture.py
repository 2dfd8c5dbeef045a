"""Speed or size over cost as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vizoo.tools.common import save_figure
from vizoo.tools.profiling.record import Record, batches, names, what_differs, where

MARKERS = "osD^vP*X"


def _heights(profiles: Sequence[Record]) -> tuple[str, list[float]]:
    """What is drawn over the cost: speed where all have one, else latency, else parameters."""
    together = {tuple(batches(p)) for p in profiles}
    batch = f", batch {batches(profiles[0])[0]}" if len(together) == 1 and batches(profiles[0]) else ""
    if all(p.throughput for p in profiles):
        return f"images/s{batch}", [p.throughput or 0.0 for p in profiles]
    if all(p.latency for p in profiles):
        return f"latency, ms{batch}", [1e3 * p.latency.median for p in profiles if p.latency]
    return "parameters, M", [p.params / 1e6 for p in profiles]


def plot(profiles: Sequence[Record], path: Path) -> None:
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
        families.setdefault(f"{p.name.split('_')[0]}, {differing[i]}", []).append(i)
    for members in families.values():  # a thin line joins the sizes of a family
        members.sort(key=lambda i: profiles[i].macs)
        axes.plot([profiles[i].macs / 1e9 for i in members], [values[i] for i in members], color="0.8", zorder=1)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (p, name) in enumerate(zip(profiles, names(profiles), strict=True)):
        name += " (partial count)" if p.reasons else ""
        marker = MARKERS[i // 10 % len(MARKERS)]
        axes.scatter(p.macs / 1e9, values[i], s=45, color=colors[i % 10], marker=marker, label=name, zorder=2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.set_xlabel("GMACs (multiply-accumulates of one image, 1e9)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    conditions, threads = where(profiles)[:2], profiles[0].conditions.get("threads")
    shown = conditions and threads and "threads" not in differing[0]
    conditions += [f"{threads} thread{'s' * (threads != 1)}"] * bool(shown)
    axes.set_title(", ".join(conditions) or "counts", fontsize=9)
    save_figure(figure, path, dpi=150)
