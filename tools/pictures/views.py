"""What any timm model sees in an image: Grad-CAM and the effective receptive field.

Grad-CAM is written here, since captum's takes channels-first maps only, and grad-cam's needs OpenCV.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.backbones.layers import Panel
from vizoo.backbones.layers.panel import cell_at
from vizoo.tools.common import UserError

FINEST = 96  # cells of the longer side of a receptive field: single pixels are noise


class Level(NamedTuple):
    """What a module gave, and how it, or its gradient, becomes ``[B, C, H, W]``."""

    value: Tensor
    to_map: Callable[[Tensor], Tensor]


def grad_cam(model: nn.Module, image: Tensor, target: int | None = None, classes: Sequence[str] = ()) -> Panel:
    """Where a classifier sees a class: the deepest map whose places the class depends on, weighed by its gradients.

    Of a transformer that answers by its class token, the last map has no such place, and the one before is taken.
    Source: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", R. Selvaraju et al.,
    ICCV 2017, Eq. 1 and 2.

    Args:
        model: A timm model in evaluation mode.
        image: ``[1, C, H, W]``, normalised.
        target: The class; None for the most likely one.
        classes: Names of the classes, if there are any.

    Returns:
        A heat map from 0 to 1 that tiles the image.

    Raises:
        UserError: If the model has no classes or no maps, or ``target`` is none of its classes.
    """
    with torch.enable_grad():
        x = image.clone().requires_grad_()
        out, levels = _levels(model, x)
        logits = out.get("main") if isinstance(out, dict) else out
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not getattr(model, "num_classes", 1):
            raise UserError(f"--view grad-cam: {type(model).__name__} gives no classes")
        count = logits.shape[1]
        if target is not None and target >= count:
            raise UserError(f"--class {target}: the model has classes 0 to {count - 1}")
        best = int(logits[0].argmax()) if target is None else target
        if not levels:
            raise UserError(f"--view grad-cam: {type(model).__name__} has no maps")
        gradients = torch.autograd.grad(logits[0, best], [value for value, _ in levels], allow_unused=True)
    slopes = [torch.zeros_like(v) if g is None else g for (v, _), g in zip(levels, gradients, strict=True)]
    at = max((i for i, slope in enumerate(slopes) if levels[i].to_map(slope).any()), default=-1)
    weight = levels[at].to_map(slopes[at]).float().mean((2, 3), keepdim=True)
    found = (levels[at].to_map(levels[at].value).detach().float() * weight).sum(1)[0].relu()
    name = f"class {best}" + (f", {classes[best]}" if classes else "")
    share = float(logits[0].detach().float().softmax(0)[best])
    title = f"Grad-CAM of {name} ({share:.1%}), {found.shape[0]}x{found.shape[1]} map"
    if not found.any():
        title += ": nothing speaks for it" if slopes[at].any() else ": the class depends on nothing"
    return Panel(title=title, heat=found / found.max().clamp_min(torch.finfo(torch.float32).tiny), limits=(0.0, 1.0))


def receptive_field(model: nn.Module, image: Tensor, point: tuple[float, float] = (0.5, 0.5)) -> Panel:
    """Which pixels one place of the last map depends on: the absolute gradients of its channels' sum.

    Source: "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", W. Luo et al., NeurIPS
    2016, Sec. 2; here of one image.

    Args:
        model: A timm model in evaluation mode.
        image: ``[1, C, H, W]``, normalised.
        point: Row and column of the place as fractions.

    Returns:
        A heat map from 0 to 1 that tiles the image, the point, and the square around it that has half of the gradients.

    Raises:
        UserError: If the model has no maps.
    """
    with torch.enable_grad():
        x = image.clone().requires_grad_()
        _, levels = _levels(model, x)
        if not levels:
            raise UserError(f"--view receptive-field: {type(model).__name__} has no maps")
        value, to_map = levels[-1]
        last = to_map(value)
        row, column = cell_at(point, last.shape[2:], [1 / n for n in last.shape[2:]])
        (gradient,) = torch.autograd.grad(last[0, :, row, column].float().sum(), x, allow_unused=True)
    if gradient is None:
        raise UserError(f"--view receptive-field: the last map of {type(model).__name__} does not depend on the image")
    pixels = gradient[0].float().abs().sum(0)
    centre = (row + 0.5) / last.shape[2], (column + 0.5) / last.shape[3]
    side, box = _half(pixels, centre)
    height, width = pixels.shape
    step = max(1, -(-max(height, width) // FINEST))
    heat = F.adaptive_avg_pool2d(pixels[None], (max(1, height // step), max(1, width // step)))[0]
    return Panel(
        title=f"Effective receptive field of one place of the {last.shape[2]}x{last.shape[3]} map: "
        f"half of it within {side}x{side} pixels",
        heat=(heat / heat.max().clamp_min(torch.finfo(torch.float32).tiny)).sqrt(),
        bar="gradient, square root of its share of the largest",
        limits=(0.0, 1.0),
        boxes=torch.tensor([box]),
        points=torch.tensor([centre]),
    )


def _half(pixels: Tensor, centre: tuple[float, float]) -> tuple[int, tuple[float, float, float, float]]:
    """Side of the smallest square around a place that has half of ``[H, W]``, and its edges as fractions."""
    height, width = pixels.shape
    sums = F.pad(pixels.double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
    row, column = centre[0] * height, centre[1] * width
    for side in range(1, 2 * max(height, width) + 1):
        top, left = (round(p - side / 2) for p in (row, column))
        t, b = (min(max(n, 0), height) for n in (top, top + side))
        l, r = (min(max(n, 0), width) for n in (left, left + side))
        if sums[b, r] - sums[t, r] - sums[b, l] + sums[t, l] >= sums[-1, -1] / 2:
            break
    return side, (t / height, l / width, b / height, r / width)


def _levels(model: nn.Module, x: Tensor) -> tuple[Any, list[Level]]:
    """Run a model; of each level that its features are taken from, what it gave, the deepest last.

    Models whose levels give no single map (branches, class attention) are searched for other modules that do.
    """
    channels = {i["module"]: i["num_chs"] for i in getattr(model, "feature_info", ()) if i.get("module")}
    known = dict(model.named_modules())
    out, levels = _run(model, x, {name: known[name] for name in channels if name in known}, channels)
    if not levels:
        out, levels = _run(model, x, {name: known[name] for name in known if name}, {})
    return out, [level for level in levels if not _is_shuffled(level, model, x)]


def _is_shuffled(level: Level, model: nn.Module, x: Tensor) -> bool:
    """Whether a model has the tokens of a level in an order of its own (Hiera): its own map has them in another one."""
    if level.value.ndim != 3 or not hasattr(model, "forward_intermediates"):
        return False
    mine = level.to_map(level.value).detach()
    with torch.no_grad():
        maps = [m for m in model.forward_intermediates(x, intermediates_only=True) if m.shape == mine.shape]  # type: ignore[operator]
    sums = [m.sum(1).flatten() for m in maps]
    other = mine.sum(1).flatten()
    return any(torch.allclose(s.sort()[0], other.sort()[0]) and not torch.allclose(s, other) for s in sums)


def _run(
    model: nn.Module, x: Tensor, modules: dict[str, nn.Module], channels: dict[str, int]
) -> tuple[Any, list[Level]]:
    """Run a model; of those outputs of the modules that are maps or tokens, in the order of the calls, the levels."""
    levels: list[Level] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            to_map = _mapper(out, channels.get(name), model, x) if isinstance(out, Tensor) else None
            if to_map:
                levels.append(Level(out, to_map))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return out, levels


def _mapper(value: Tensor, channels: int | None, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What turns the output of a level, or its gradient, into ``[B, C, H, W]``; None where there are no places."""
    size = x.shape[2:]
    if value.ndim == 4:
        nchw = value.shape[1] == channels if channels else _is_grid(value.shape[2:], size)
        nhwc = value.shape[3] == channels if channels else _is_grid(value.shape[1:3], size)
        if nhwc and (not nchw or str(getattr(model, "output_fmt", "")).endswith("NHWC")):
            return lambda t: t.permute(0, 3, 1, 2)
        return (lambda t: t) if nchw else None
    if value.ndim != 3 or value.shape[2] != (channels or value.shape[2]):
        return None
    for prefix in dict.fromkeys((getattr(model, "num_prefix_tokens", 0), 0, 1)):
        grid = next(_grids(value.shape[1] - prefix, size), None)
        if grid:
            return functools.partial(_tokens_to_map, prefix=prefix, grid=grid)
    return None


def _tokens_to_map(x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    return x[:, prefix:].transpose(1, 2).unflatten(2, grid)


def _is_grid(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a map may be one of an image: its cells are almost square, and one in the middle is no token."""
    return shape[0] * shape[1] > 1 and any(grid == tuple(shape) for grid in _grids(shape[0] * shape[1], size))


def _grids(count: int, size: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows and columns of so many square patches of an image, at least two."""
    for stride, up in itertools.product(range(1, max(size) + 1), (False, True)):
        rows, columns = (-(-n // stride) if up else n // stride for n in size)
        if rows * columns == count > 1:
            yield rows, columns
