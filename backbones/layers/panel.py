"""What ``explain`` of a model returns: pictures of what the model sees in an image, as data that a tool draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Panel", "seen_by"]


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


def seen_by(model: nn.Module, image: Tensor, layers: Sequence[nn.Module]) -> list[tuple[tuple[Any, ...], Any]]:
    """Run a model in evaluation mode without gradients, and keep what some of its layers get and give.

    Args:
        model: The model; its mode is restored.
        image: What it takes.
        layers: Modules of the model, each of which runs at least once.

    Returns:
        Of the last call of each layer the positional arguments and the output.
    """
    kept: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        kept[layer] = (args, out)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [kept[layer] for layer in layers]
