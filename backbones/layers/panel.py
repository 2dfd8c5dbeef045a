"""What ``explain`` of a model returns: pictures of what the model sees in an image, as data that a tool draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Panel", "cell_at", "evaluating", "seen_by", "tiled"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture; whatever is given lies over the image, in the order of the attributes.

    All places are fractions of the image's height and width, rows before columns, from its upper left corner.

    Attributes:
        title: What it shows, in words.
        heat: Values ``[h, w]`` whose cells tile the image, or ``area`` of it.
        area: Top, left, bottom and right edge of ``heat``, perhaps beyond the image.
        parts: Labels ``[h, w]`` of the cells of the image: integers from 0, each with a colour of its own; -1 for none.
        outline: ``[h, w]``, True in cells of the image around which a line is drawn.
        boxes: ``[n, 4]``: top, left, bottom and right edge of each, perhaps beyond the image.
        lines: ``[n, 2, 2]``: from a row and column to another.
        strength: ``[n]`` of the lines; of many lines the strongest are drawn.
        points: Rows and columns ``[n, 2]``.
        names: Of the points, a character or two of each; empty for dots.
        bar: What the numbers of ``heat``, or of the lines' strength, are; "" where their size says nothing, and then
            there is no colour bar.
        limits: Values at both ends of the colours; None for the least and largest of ``heat``.
        alone: Whether ``heat`` is no map of the image (a spectrum, a kernel): it is drawn without the image.
    """

    title: str
    heat: Tensor | None = None
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    parts: Tensor | None = None
    outline: Tensor | None = None
    boxes: Tensor | None = None
    lines: Tensor | None = None
    strength: Tensor | None = None
    points: Tensor | None = None
    names: Sequence[str] = ()
    bar: str = ""
    limits: tuple[float, float] | None = None
    alone: bool = False


def tiled(image: Tensor, cells: Tensor, sides: tuple[int, int]) -> tuple[float, float, float, float]:
    """The :attr:`Panel.area` of cells that tile an image from its upper left corner.

    Args:
        image: ``[..., height, width]``.
        cells: ``[h, w]``.
        sides: Height and width of a cell in pixels.

    Returns:
        Top, left, bottom and right edge: below 1 where the model left out the last rows or columns of pixels, above 1
        where it padded them.
    """
    (height, width), (h, w) = image.shape[-2:], cells.shape
    return 0.0, 0.0, h * sides[0] / height, w * sides[1] / width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode without gradients; the mode of each of its modules is restored.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():  # some may be frozen in a model that trains
            module.training = training


def seen_by(model: nn.Module, image: Tensor, layers: Sequence[nn.Module]) -> list[tuple[tuple[Any, ...], Any]]:
    """Run a model in evaluation mode without gradients, and keep what some of its layers get and give.

    Args:
        model: The model; its modes are restored.
        image: What it takes.
        layers: Modules of the model, each of which runs at least once.

    Returns:
        Of the last call of each layer the positional arguments and the output.
    """
    kept: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        kept[layer] = (args, out)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with evaluating(model):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[layer] for layer in layers]


def cell_at(point: Sequence[float], cells: Sequence[int], sides: Sequence[float]) -> tuple[int, int]:
    """The cell of a grid that holds a point.

    Args:
        point: Row and column as fractions of the image.
        cells: Rows and columns of the grid.
        sides: Height and width of a cell as fractions of the image.

    Returns:
        Its row and column.
    """
    row, col = (min(int(p / side), n - 1) for p, n, side in zip(point, cells, sides, strict=True))
    return row, col
