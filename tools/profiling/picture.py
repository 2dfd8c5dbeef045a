"""Accuracy over speed, or speed or size over cost, as a picture: of the README and of ``vizoo profile --plot``."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vizoo.tools.common import save_figure
from vizoo.tools.profiling.published import FAMILIES, accuracies, accuracy, family, zoo
from vizoo.tools.profiling.record import SAID, Record, batches, what_differs, where

MOST = 10  # families with a colour of their own
REST = "timm"  # the families of others, where there are more
MARKERS = "oD^vP*Xh<>"
STEPS = (1, 1.5, 2, 3, 4, 6, 8)  # of ticks within a power of ten,
FEW = (1, 2, 5)  # and where there are more than two of them


class _Axis(NamedTuple):
    """What is drawn along an axis.

    Attributes:
        label: With its unit.
        value: Of a record; None where it has none.
        log: Whether its scale is logarithmic where values are far apart; else it begins at ``low``.
        low: Least value that is shown; None for that of the records.
    """

    label: str
    value: Callable[[Record], float | None]
    log: bool = False
    low: float | None = 0


def _axes(records: Sequence[Record]) -> tuple[_Axis, _Axis]:
    """The first pair of figures that all records have."""
    known = accuracies()

    def top1(r: Record) -> float | None:
        found = accuracy(r.target, known)
        return found.top1 if found else None

    speed = _Axis("images per second", lambda r: r.throughput, log=True)
    seconds = _Axis("latency, ms", lambda r: 1e3 * r.latency.median if r.latency else None)
    published = _Axis("published top-1 on ImageNet-1k (%)", top1, low=None)
    cost = _Axis("GMACs (multiply-accumulates of one image, 1e9)", lambda r: r.macs / 1e9)
    size = _Axis("parameters, M", lambda r: r.params / 1e6)
    pairs = [(speed, published), (seconds, published), (cost, speed), (cost, seconds), (cost, size)]
    return next((x, y) for x, y in pairs if all(axis.value(r) is not None for axis in (x, y) for r in records))


def short_name(name: str) -> str:
    """A name without its patch, window and image size."""
    return re.sub(r"(_patch\d+)?(_window\d+)?(_224)?$", "", name)


def _series(records: Sequence[Record]) -> dict[str, list[int]]:
    """Indices of the records of each family under each set of conditions, by what a legend says; the zoo's first."""
    found: dict[str, list[int]] = defaultdict(list)
    of = [(family(r.name), differing) for r, differing in zip(records, what_differs(records), strict=True)]
    for i in sorted(range(len(records)), key=lambda i: (of[i][0] not in FAMILIES.values(), of[i][0])):
        told = [SAID[key].format(value) for key, value in of[i][1].items() if value]
        found[", ".join([of[i][0], *told])].append(i)
    if len(found) <= MOST:
        return found
    ours = {text: members for text, members in found.items() if records[members[0]].name in zoo()}
    rest = [i for text, members in found.items() if text not in ours for i in members]
    return {**ours, **({REST: rest} if rest else {})}


def _said(records: Sequence[Record]) -> str:
    """Where and how all records were measured; empty if they were not."""
    differing = what_differs(records)[0]
    told = where(records)
    if not told:
        return ""
    first = next(r for r in records if r.measurements)
    threads, batch = first.conditions["threads"], batches(first)
    told += [f"{threads} thread{'s' * (threads != 1)}"] * bool(threads and "threads" not in differing)
    told += [f"batch {'/'.join(map(str, batch))}"] * bool(batch and "batch" not in differing)
    told += ["branches merged"] * all(r.conditions["reparam"] for r in records)
    versions = {r.environment["torch"].partition("+")[0] for r in records}
    return ", ".join([*told, *(f"PyTorch {v}" for v in versions if len(versions) == 1)])


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw published accuracy over speed where all have both, else speed over cost, else size over cost.

    Lines join models of one family that were measured alike; every point is named.

    Args:
        records: At least one that was counted.
        path: Picture file; the ending picks the format.

    Raises:
        Failure: As :func:`vizoo.tools.common.save_figure`.
    """
    from adjustText import adjust_text
    from matplotlib.figure import Figure

    x, y = _axes(records)
    at = [(x.value(r) or 0.0, y.value(r) or 0.0) for r in records]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots()
    for axis, values, part in zip((x, y), zip(*at, strict=True), (axes.xaxis, axes.yaxis), strict=True):
        _scale(axes, axis, values, part)
    texts = []
    for k, (label, members) in enumerate(_series(records).items()):
        form: dict[str, Any] = {"color": f"C{k % 10}", "marker": MARKERS[k // 10 % len(MARKERS)]}
        if label == REST:
            form = {"color": "0.4", "marker": "s", "linestyle": "", "markersize": 5}
        members.sort(key=lambda i: at[i])
        axes.plot([at[i][0] for i in members], [at[i][1] for i in members], label=label, **form)
        texts += [axes.text(*at[i], _name(records, i), fontsize=8, color=form["color"]) for i in members]
    axes.margins(x=0.09)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.set_title(_said(records) or "counts", fontsize=9, loc="left", color="0.35")
    axes.legend(frameon=False, loc="best")
    figure.canvas.draw()  # places the axes, which the labels need to know
    adjust_text(
        texts,
        *([p[k] for p in at] for k in (0, 1)),
        ax=axes,
        arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6},
    )
    save_figure(figure, path, dpi=110)


def _name(records: Sequence[Record], i: int) -> str:
    """Name of a record's model, with its size where it is there in several."""
    r = records[i]
    sizes = Counter(other.size for other in records if other.name == r.name)
    size = f" {r.size[0]}x{r.size[1]}" if r.size and len(sizes) > 1 else ""
    return short_name(r.name) + size + "*" * bool(r.counts and r.counts.reasons)


def _scale(axes: Any, axis: _Axis, values: Sequence[float], part: Any) -> None:
    """Scale and ticks of an axis."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    set_scale, set_limits = getattr(axes, f"set_{part.axis_name}scale"), getattr(axes, f"set_{part.axis_name}lim")
    if axis.log and min(values) > 0 and max(values) > 3 * min(values):
        set_scale("log")
        steps = FEW if max(values) > 100 * min(values) else STEPS
        powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
        part.set_major_locator(FixedLocator([step * 10**k for k in powers for step in steps]))
        part.set_minor_locator(NullLocator())
        part.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif axis.low is not None:
        set_limits(axis.low, 1.12 * max(values) or 1)
