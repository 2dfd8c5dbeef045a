"""What any timm model sees in an image: Grad-CAM and the effective receptive field."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.backbones.layers import Panel
from vizoo.tools.common import UserError

FINEST = 96  # cells of the longer side of a receptive field: single pixels are noise


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
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.shape[1]:
            raise UserError(f"--view grad-cam: {type(model).__name__} gives no classes")
        count = logits.shape[1]
        if target is not None and target >= count:
            raise UserError(f"--class {target}: the model has classes 0 to {count - 1}")
        best = int(logits[0].argmax()) if target is None else target
        if not levels:
            raise UserError(f"--view grad-cam: {type(model).__name__} has no maps")
        gradients = torch.autograd.grad(logits[0, best], [value for value, _ in levels], allow_unused=True)
    for (value, to_map), gradient in zip(reversed(levels), reversed(gradients), strict=True):
        if gradient is not None and to_map(gradient).any():
            weight = to_map(gradient).float().mean((2, 3), keepdim=True)
            found = (to_map(value).detach().float() * weight).sum(1)[0].relu()
            name = f"class {best}" + (f", {classes[best]}" if classes else "")
            share = float(logits[0].detach().float().softmax(0)[best])
            title = f"Grad-CAM of {name} ({share:.1%}), {found.shape[0]}x{found.shape[1]} map"
            return Panel(title=title, heat=found / found.max().clamp_min(torch.finfo(torch.float32).tiny))
    raise UserError(f"--view grad-cam: no map of {type(model).__name__} has places that the class depends on")


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
        row, column = (min(int(p * n), n - 1) for p, n in zip(point, last.shape[2:], strict=True))
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
        title=f"effective receptive field of one place of the {last.shape[2]}x{last.shape[3]} map: "
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


def _levels(model: nn.Module, x: Tensor) -> tuple[Any, list[tuple[Tensor, Any]]]:
    """Run a model; of each level that its features are taken from, the output, and what makes a map of it."""
    infos = [info for info in getattr(model, "feature_info", ()) if info.get("module")]
    kept: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: kept.__setitem__(name, out)

    known = dict(model.named_modules())
    names = list(dict.fromkeys(info["module"] for info in infos if info["module"] in known))
    handles = [known[name].register_forward_hook(keep(name)) for name in names]
    try:
        out = model(x)
    finally:
        for handle in handles:
            handle.remove()
    channels = {info["module"]: info["num_chs"] for info in infos}
    found = [(kept[n], _mapper(kept[n], channels[n], model, x)) for n in names if isinstance(kept.get(n), Tensor)]
    levels = [(value, to_map) for value, to_map in found if to_map is not None]
    if levels or not hasattr(model, "forward_head"):
        return out, levels
    last = model.forward_features(x)  # type: ignore[operator]
    if isinstance(last, Tensor):
        to_map = _mapper(last, getattr(model, "num_features", 0), model, x)
        return model.forward_head(last), [(last, to_map)] if to_map else []  # type: ignore[operator]
    return out, []


def _mapper(value: Tensor, channels: int, model: nn.Module, x: Tensor) -> Any:
    """What turns the output of a level, or its gradient, into ``[B, C, H, W]``; None where there are no places."""
    if value.ndim == 4:
        last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        if value.shape[1] != channels or (last and value.shape[3] == channels):
            return (lambda t: t.permute(0, 3, 1, 2)) if value.shape[3] == channels else None
        return lambda t: t
    if value.ndim != 3 or value.shape[2] != channels:
        return None
    count, size = value.shape[1] - getattr(model, "num_prefix_tokens", 0), x.shape[2:]
    grid = next(_grids(count, size), None)
    return grid and (lambda t: t[:, t.shape[1] - count :].transpose(1, 2).unflatten(2, grid))


def _grids(count: int, size: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows and columns of so many square patches of an image."""
    for stride, up in itertools.product(range(1, max(size) + 1), (False, True)):
        rows, columns = (-(-n // stride) if up else n // stride for n in size)
        if rows * columns == count:
            yield rows, columns
