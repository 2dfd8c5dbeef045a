"""Panels beside each other: what a model sees in an image, as one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vizoo.backbones.layers import Panel
from vizoo.tools.common import save_figure

WIDTH, DPI = 16.0, 100  # inches and pixels an inch: 1,600 pixels
COLUMNS, PANEL = 4, 5.0  # panels beside each other, and the widest, in inches
HIGH, NARROW = 7.0, 2.8  # inches: the highest image, and the least width of a panel, for its title
GAP, LINE, BAR, LABEL = 0.12, 0.17, 0.12, 0.42  # inches: between panels, of a line of text, of a bar, under a bar
INSET = 0.3  # inches: room for half a number on each side of a bar
CHARACTER = 0.074  # inches of a character of a title
BEYOND = 0.15  # shares of the image that are shown beyond its edges, at most
MOST_LINES = 60  # of a tree: more hide the image


def draw_panels(image: Tensor, panels: Sequence[Panel], path: str | Path, title: str) -> None:
    """Draw an image, and beside it every panel.

    Args:
        image: ``[C, H, W]`` from 0 to 1.
        panels: At least one.
        path: PNG file to write, at most 1,600 pixels wide.
        title: Above all.
    """
    from matplotlib.figure import Figure

    image, panels = image.detach().float().cpu(), [_on_cpu(p) for p in panels]
    rows = math.ceil((len(panels) + 1) / COLUMNS)
    columns = math.ceil((len(panels) + 1) / rows)
    limits = _limits(panels)
    ratio = image.shape[1] / image.shape[2] * (limits[2] - limits[0]) / (limits[3] - limits[1])
    inner = min(min(PANEL, WIDTH / columns) - GAP, HIGH / ratio)
    height, width = inner * ratio, max(inner + GAP, NARROW)
    texts = ["", *(textwrap.fill(_title(p), int((width - GAP) / CHARACTER)) for p in panels)]
    above = LINE * max(t.count("\n") + 1 for t in texts) + 0.08
    below = BAR + LABEL if any(p.bar for p in panels) else 0.0
    heading = textwrap.fill(title, int((columns * width - GAP) / CHARACTER / 1.1))
    head = LINE * 1.2 * (heading.count("\n") + 1) + 0.1
    size = (columns * width, head + rows * (above + height + below + GAP))
    figure = Figure(figsize=size, dpi=DPI)
    figure.text(GAP / 2 / size[0], 1 - 0.06 / size[1], heading, va="top", fontsize=11)

    def place(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / size[0], 1 - (top + high) / size[1], wide / size[0], high / size[1]))

    for i, (panel, text) in enumerate(zip((Panel(title=""), *panels), texts, strict=True)):
        left, top = GAP / 2 + i % columns * width, head + i // columns * (above + height + below + GAP) + above
        axes = place(left, top, inner, height)
        axes.set_axis_off()
        figure.text(left / size[0], 1 - (top - 0.06) / size[1], text, va="bottom", fontsize=9.5)
        coloured = _draw(axes, image, panel)
        if not panel.alone:
            axes.set_xlim(limits[1], limits[3])
            axes.set_ylim(limits[2], limits[0])
        if panel.bar and coloured is not None:
            where = place(left + INSET, top + height + 0.05, width - GAP - 2 * INSET, BAR)
            bar = figure.colorbar(coloured, cax=where, orientation="horizontal")
            bar.set_label(panel.bar, fontsize=8, labelpad=1)
            bar.ax.locator_params(nbins=5)
            bar.ax.tick_params(labelsize=8, length=2, pad=1)
    save_figure(figure, path)


def _on_cpu(panel: Panel) -> Panel:
    tensors: dict[str, Any] = {k: v.detach().cpu() for k, v in vars(panel).items() if isinstance(v, Tensor)}
    return replace(panel, **tensors)


def _title(panel: Panel) -> str:
    count = 0 if panel.lines is None else len(panel.lines)
    return f"{panel.title} (strongest {MOST_LINES} of {count})" if count > MOST_LINES else panel.title


def _limits(panels: Sequence[Panel]) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of what is shown: the image, and what panels have a little beyond it."""
    edges = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    edges += [p.boxes for p in panels if p.boxes is not None and len(p.boxes)]
    edges += [torch.tensor([p.area]) for p in panels if p.heat is not None and not p.alone]
    all_edges = torch.cat([e.float() for e in edges])
    low, high = all_edges[:, :2].amin(0).clamp_min(-BEYOND), all_edges[:, 2:].amax(0).clamp_max(1 + BEYOND)
    top, left, bottom, right = [*low.tolist(), *high.tolist()]
    return top, left, bottom, right


def _draw(axes: Any, image: Tensor, panel: Panel) -> Any:
    """Draw one panel; returns what its colour bar explains."""
    coloured = None
    if not panel.alone:
        _draw_image(axes, image, gray=panel.heat is not None or panel.parts is not None)
    if panel.heat is not None:
        coloured = _draw_heat(axes, panel)
    if panel.parts is not None:
        _draw_parts(axes, panel.parts)
    if panel.outline is not None:
        _draw_outline(axes, panel.outline)
    if panel.boxes is not None:
        _draw_boxes(axes, panel.boxes)
    if panel.lines is not None:
        drawn = _draw_lines(axes, panel.lines, panel.strength)
        coloured = coloured or drawn
    if panel.points is not None:
        _draw_points(axes, panel.points, panel.names)
    return coloured


def _draw_image(axes: Any, image: Tensor, gray: bool) -> None:
    pixels = image.mean(0) if gray or image.shape[0] == 1 else image.permute(1, 2, 0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0), aspect="auto")


def _draw_heat(axes: Any, panel: Panel) -> Any:
    assert panel.heat is not None
    low, high = panel.limits or (None, None)
    diverging = low is not None and high is not None and low == -high
    look: dict[str, Any] = {"vmin": low, "vmax": high, "cmap": "RdBu_r" if diverging else "magma"}
    values = panel.heat.float().numpy()
    if panel.alone:
        return axes.imshow(values, aspect="equal", interpolation="nearest", **look)
    top, left, bottom, right = panel.area
    extent = (left, right, bottom, top)
    return axes.imshow(values, alpha=0.65, extent=extent, aspect="auto", interpolation="nearest", **look)


def _draw_parts(axes: Any, parts: Tensor) -> None:
    """A colour for each label of ``[h, w]``; the numbers say nothing, so there is no bar."""
    import numpy as np
    from matplotlib import colormaps

    palette = colormaps["tab10" if int(parts.max()) < 9 else "tab20"].colors  # type: ignore[attr-defined]
    colours = [c for c in palette if max(c) - min(c) > 0.1]  # the image below is gray
    labels = parts.numpy()
    pixels = np.asarray(colours)[labels % len(colours)]
    shown = np.dstack([pixels, 0.6 * (labels >= 0)])
    axes.imshow(shown, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")


def cell_borders(inside: Tensor) -> Tensor:
    """The borders between cells inside and outside; what lies beyond the map is outside, so every outline is closed.

    Args:
        inside: ``[h, w]`` (bool).

    Returns:
        ``[n, 2, 2]``: from a row and column of the grid's corners to another.
    """
    h, w = inside.shape
    wide = torch.zeros(h + 2, w + 2, dtype=torch.bool)
    wide[1:-1, 1:-1] = inside
    row, column = (wide[1:, 1:-1] != wide[:-1, 1:-1]).nonzero().unbind(1)  # borders above a cell
    flat = torch.stack([torch.stack([row, column], 1), torch.stack([row, column + 1], 1)], 1)
    row, column = (wide[1:-1, 1:] != wide[1:-1, :-1]).nonzero().unbind(1)  # borders left of a cell
    upright = torch.stack([torch.stack([row, column], 1), torch.stack([row + 1, column], 1)], 1)
    return torch.cat([flat, upright])


def _draw_outline(axes: Any, inside: Tensor) -> None:
    from matplotlib.collections import LineCollection

    ends = cell_borders(inside.bool()) / torch.tensor(inside.shape)
    lines = LineCollection(list(ends.flip(-1).numpy()), colors="cyan", linewidths=1.4, capstyle="projecting")
    lines.set_clip_on(False)  # half of a line on the image's edge lies outside
    axes.add_collection(lines)


def _draw_boxes(axes: Any, boxes: Tensor) -> None:
    """The first box stands out; many are thin, so that the image is seen."""
    from matplotlib.patches import Rectangle

    thin = len(boxes) > 8
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        colour = "cyan" if thin or i == 0 else "yellow"
        shape = Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=0.7 if thin else 1.6)
        # half of a line on the image's edge lies outside; a box that reaches far beyond would cross other panels
        shape.set_clip_on(min(top, left) < -BEYOND or max(bottom, right) > 1 + BEYOND)
        axes.add_patch(shape)


def strongest(lines: Tensor, strength: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lines that are drawn, the strongest last.

    Args:
        lines: ``[n, 2, 2]``.
        strength: ``[n]``; None for equal ones, which keep their order.

    Returns:
        At most ``MOST_LINES`` of both.
    """
    if strength is None:
        return lines[:MOST_LINES], torch.ones(min(len(lines), MOST_LINES))
    order = strength.float().argsort(stable=True)[-MOST_LINES:]
    return lines[order], strength.float()[order]


def _draw_lines(axes: Any, lines: Tensor, strength: Tensor | None) -> Any:
    from matplotlib.collections import LineCollection

    ends, weight = strongest(lines, strength)
    look: dict[str, Any] = {"colors": "yellow", "linewidths": 1.4}
    if strength is not None and len(weight):
        span = (weight - weight.min()) / (weight.max() - weight.min()).clamp_min(torch.finfo(torch.float32).tiny)
        look = {"array": weight.numpy(), "cmap": "plasma", "linewidths": (0.8 + 1.6 * span).numpy()}
    drawn = LineCollection(list(ends.float().flip(-1).numpy()), **look)
    axes.add_collection(drawn)
    return drawn if strength is not None else None


def _draw_points(axes: Any, points: Tensor, names: Sequence[str]) -> None:
    if not names:
        axes.scatter(points[:, 1].numpy(), points[:, 0].numpy(), s=26, c="white", ec="black", lw=0.8, zorder=3)
        return
    look: dict[str, Any] = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "black", "lw": 0.8}
    for (row, column), name in zip(points.tolist(), names, strict=True):
        axes.text(column, row, name, ha="center", va="center", fontsize=8, bbox=look, zorder=3)
