"""Panels as one picture: aligned, titles whole, outlines closed, bars only where asked for, at most 1,600 pixels."""

from __future__ import annotations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from vizoo.backbones.layers import Panel
from vizoo.tools.pictures import draw
from vizoo.tools.pictures.draw import cell_borders, draw_panels, strongest

HEAT = torch.linspace(0, 1, 12).view(3, 4)
PANELS = [
    Panel(title="a heat map with a title that is too long for one line of its panel by far", heat=HEAT, bar="share"),
    Panel(title="no bar", heat=HEAT, limits=(0, 1), outline=HEAT > 0.5),
    Panel(title="diverging", heat=HEAT - 0.5, limits=(-0.5, 0.5), area=(-0.2, 0.1, 0.5, 1.3)),
    Panel(title="parts", parts=torch.arange(12).view(3, 4) - 1),
    Panel(title="tree", lines=torch.rand(300, 2, 2), strength=torch.rand(300), bar="strength", names=("R",),
          points=torch.tensor([[0.5, 0.5]])),
    Panel(title="windows", boxes=torch.tensor([[0.1, 0.1, 0.3, 0.4], [-0.1, 0.0, 0.5, 0.6]])),
    Panel(title="a path", lines=torch.rand(3, 2, 2), points=torch.rand(4, 2)),
    Panel(title="a spectrum", heat=HEAT, alone=True, bar="log amplitude"),
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    found = []
    monkeypatch.setattr(draw, "save_figure", lambda figure, path: found.append(figure))
    return found


def drawn_labels(axes):
    """Matplotlib has ticks beyond the ends of an axis as well, and leaves them out."""
    low, high = axes.get_xlim()
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [axes.xaxis.label, *(label for tick, label in ticks if low <= tick <= high)]


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("shape", [(3, 48, 64), (1, 90, 20), (3, 20, 300)])
def test_panels_are_aligned_and_whole(count, shape, figures):
    draw_panels(torch.rand(shape), PANELS[:count], "", "a model: an image " * 12)
    (figure,) = figures
    assert figure.get_size_inches()[0] * figure.dpi <= 1600
    assert figure.get_size_inches()[1] * figure.dpi <= 3000
    images = [axes for axes in figure.axes if not axes.axison]
    assert len(images) == count + 1
    places = [axes.get_position(original=True) for axes in images]
    assert len({(round(p.width, 9), round(p.height, 9)) for p in places}) == 1
    assert len({round(p.x0, 9) for p in places}) * len({round(p.y0, 9) for p in places}) >= count + 1
    assert len(figure.axes) - len(images) == sum(bool(p.bar) for p in PANELS[:count])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # places the labels of bars
    renderer = canvas.get_renderer()
    width, height = (figure.get_size_inches() * figure.dpi).tolist()
    bars = [label for axes in figure.axes if axes.axison for label in drawn_labels(axes)]
    boxes = [text.get_window_extent(renderer) for text in [*figure.texts, *bars]]
    for box in boxes:
        assert -1 <= box.x0 <= box.x1 <= width + 1
        assert -1 <= box.y0 <= box.y1 <= height + 1
    titles = boxes[: len(figure.texts)]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])


def test_every_kind_of_panel_changes_the_picture(tmp_path):
    seen = set()
    for i, panel in enumerate(PANELS):
        draw_panels(torch.rand(3, 30, 40), [panel], tmp_path / f"{i}.png", "title")
        with Image.open(tmp_path / f"{i}.png") as picture:
            assert picture.size[0] <= 1600
            seen.add(picture.tobytes())
    assert len(seen) == len(PANELS)


def test_outline_runs_along_cells_and_is_closed():
    """Every corner of the grid is met an even number of times, also on the image's edge."""
    inside = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    found = cell_borders(inside)
    assert len(found) == 8 + 4
    corners, times = found.flatten(0, 1).unique(dim=0, return_counts=True)
    assert (times % 2 == 0).all()
    assert corners.min() == 0
    assert corners.max() == 3
    everywhere = cell_borders(torch.ones(2, 5, dtype=torch.bool))
    assert len(everywhere) == 2 * (2 + 5)
    assert not len(cell_borders(torch.zeros(2, 5, dtype=torch.bool)))


def test_trees_are_thinned_to_the_strongest_edges(figures):
    lines, strength = torch.rand(300, 2, 2), torch.rand(300)
    kept, weight = strongest(lines, strength)
    assert len(kept) == draw.MOST_LINES
    assert weight.min() >= strength.sort(descending=True)[0][draw.MOST_LINES - 1]
    assert torch.equal(kept[-1], lines[strength.argmax()])
    assert torch.equal(strongest(lines[:3], None)[0], lines[:3])
    draw_panels(torch.rand(3, 30, 40), [PANELS[4]], "", "")
    assert f"(strongest {draw.MOST_LINES} of 300)" in " ".join(figures[0].texts[-1].get_text().split())


def test_what_is_beyond_the_image_is_shown_a_little(figures):
    """All panels show the same part, so that they stay aligned."""
    draw_panels(torch.rand(3, 30, 40), [PANELS[5], PANELS[1]], "", "")
    assert [axes.get_ylim() for axes in figures[0].axes] == [(1.0, pytest.approx(-0.1))] * 3
    draw_panels(torch.rand(3, 30, 40), [PANELS[2]], "", "")
    assert figures[1].axes[0].get_xlim() == (0.0, pytest.approx(1 + draw.BEYOND))
