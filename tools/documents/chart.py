"""The picture of the front page: published accuracy over measured images per second, the zoo's models and timm's."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vizoo.tools.common import UserError, read_text, save_figure
from vizoo.tools.options import DTYPES

RECORDS = "throughput-*.csv"  # written by ``vizoo profile --mode throughput --out``
PUBLISHED = "timm-top1.csv"  # top-1 of timm's models and where it is published
FAMILIES = {  # beginnings of names, the first that fits, and what the legend says
    "litv2": "LITv2",
    "overlock": "OverLoCK (merged)",
    "nat_": "NAT",
    "dinat_s_": "DiNAT_s",
    "dinat_": "DiNAT",
    "halo_": "HaloNet",
    "mobilenetv1": "ULSAM (MobileNetV1)",
}


class Point(NamedTuple):
    """One model of the picture.

    Attributes:
        name: Architecture.
        speed: Images per second.
        top1: Published ImageNet-1k accuracy in percent, at the size that was timed.
        family: Of the zoo, as in the legend; None for a model of timm.
        record: Row of the file that holds the conditions.
    """

    name: str
    speed: float
    top1: float
    family: str | None
    record: dict[str, str]


def read_points(folder: Path, zoo: Sequence[Any]) -> list[Point]:
    """Join the last record of throughput, by its name, with published accuracies.

    Args:
        folder: Holds ``throughput-*.csv`` and ``timm-top1.csv``.
        zoo: The zoo's models with their published accuracies, of :func:`vizoo.tools.models.list_zoo`.

    Returns:
        Models with both figures, ours first.

    Raises:
        UserError: If there is no record, or a model has no published accuracy at its size.
    """
    files = sorted(folder.glob(RECORDS))
    if not files:
        raise UserError(f"{folder}: no {RECORDS} there")
    ours = {e.name: (e.size[0], e.paper_top1) for e in zoo}
    table = csv.DictReader(read_text(folder / PUBLISHED, "file").splitlines())
    theirs = {(row["model"].partition(".")[0], int(row["size"])): float(row["top1"]) for row in table}
    points = []
    for row in csv.DictReader(read_text(files[-1], "file").splitlines()):
        name, size = row["model"], int(row["height"])
        family = next((text for start, text in FAMILIES.items() if name.startswith(start)), None)
        known = ours.get(name, (0, None))
        top1 = known[1] if known[0] == size else theirs.get((name, size))
        if top1 is None:
            raise UserError(f"{files[-1].name}: no published accuracy of {name!r} at {size} pixels")
        points.append(Point(name, float(row["throughput"]), top1, family if name in ours else None, row))
    return sorted(points, key=lambda p: (p.family is None, p.speed))


def conditions(points: Sequence[Point]) -> str:
    """Where and how the points were measured, one line.

    Raises:
        UserError: If they were not measured alike.
    """
    keys = ("machine", "threads", "dtype", "throughput_batch", "torch")
    seen = {tuple(p.record[key] for key in keys) for p in points}
    if len(seen) != 1:
        raise UserError(f"the records of throughput differ in {', '.join(keys)}: {len(seen)} kinds")
    machine, threads, dtype, batch, torch = seen.pop()
    return f"{machine}, {threads} threads, {DTYPES[dtype]}, batches of {batch}, PyTorch {torch.partition('+')[0]}"


def draw_chart(folder: Path, zoo: Sequence[Any], path: Path) -> None:
    """Draw the picture.

    Args:
        folder: As for :func:`read_points`.
        zoo: Likewise.
        path: PNG file to write.

    Raises:
        UserError: As :func:`read_points` and :func:`conditions`.
        Failure: As :func:`vizoo.tools.common.save_figure`.
    """
    from adjustText import adjust_text
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    points = read_points(folder, zoo)
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    series: dict[str | None, list[Point]] = defaultdict(list)
    for p in points:
        series[p.family].append(p)
    texts = []
    for colour, family in enumerate(FAMILIES.values()):
        texts += _draw_series(axes, series[family], family, {"color": f"C{colour}", "marker": "o"})
    texts += _draw_series(axes, series[None], "timm", {"color": "0.4", "marker": "s", "linestyle": "", "markersize": 5})
    axes.xaxis.set_major_locator(FixedLocator([4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.09)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"images per second: {conditions(points)}")
    axes.set_ylabel("published top-1 on ImageNet-1k (%)")
    axes.legend(frameon=False, loc="lower left")
    figure.canvas.draw()  # places the axes, which the labels need to know
    where = ([p.speed for p in points], [p.top1 for p in points])
    adjust_text(texts, *where, ax=axes, arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6})
    save_figure(figure, path, dpi=110)


def _draw_series(axes: Any, points: Sequence[Point], label: str, form: dict[str, Any]) -> list[Any]:
    """Draw the points of one family, slow to fast; returns their labels."""
    if not points:
        return []
    axes.plot([p.speed for p in points], [p.top1 for p in points], label=label, **form)
    return [axes.text(p.speed, p.top1, short_name(p.name), fontsize=8, color=form["color"]) for p in points]


def short_name(name: str) -> str:
    """A name without its patch, window and image size."""
    return re.sub(r"(_patch\d+)?(_window\d+)?(_224)?$", "", name)
