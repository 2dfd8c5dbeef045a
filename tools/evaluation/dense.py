"""``vizoo evaluate`` of a detector or a segmentor: figures of every class, truth and prediction side by side."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vizoo.backbones.layers.checkpoint import unwrap
from vizoo.tools.common import Table, UserError, check_weights, compute_device, one_line, save_figure
from vizoo.tools.data.dense import IGNORED, Boxes, Masks
from vizoo.tools.evaluation.results import add_results, check_results, write_results
from vizoo.tools.options import Parser, add
from vizoo.tools.training.dense import (
    build,
    build_train_parser,
    check_options,
    figures,
    open_parts,
    segment,
    statistics,
)
from vizoo.tools.training.optimizer import precision
from vizoo.tools.training.options import stored_arguments
from vizoo.tools.training.run import load_training_checkpoint, match_classes, say_unnamed, skipped_text
from vizoo.tools.training.task import processes

PICTURED = 4  # images of a picture
SHOWN = 0.5  # score from which a picture shows a box
EXAMPLES = """\
examples:
  vizoo evaluate output/train/first
      the best epoch on the held-out images
  vizoo evaluate output/train/first --data other --plot predictions.png --out figures.json
      on the held-out part of another folder with the same classes"""


def build_parser(task: str) -> Parser:
    """Command-line options.

    Args:
        task: ``"detection"`` or ``"segmentation"``.

    Returns:
        The parser.
    """
    p = Parser(prog="vizoo evaluate", description=f"Measure a model of 'vizoo train --task {task}'.", epilog=EXAMPLES)
    add_results(p, task, f"truth and prediction of {PICTURED} images")
    add(p, "--data", "the run's; another folder with the same classes")
    add(p, "--batch-size", "the run's; of a detector")
    add(p, "--workers", "the run's")
    add(p, "--check-data", "the run's")
    add(p, "--skip-unreadable")
    return p


def evaluate_dense(task: str, argv: list[str]) -> dict[str, Any]:
    """Measure a run; returns the figures.

    Args:
        task: ``"detection"`` or ``"segmentation"``.
        argv: Arguments.
    """
    args = build_parser(task).parse_args(argv)
    options, records = stored_arguments(build_train_parser(task), args.run, task)
    options["task"] = task
    check_options(options)
    check_results(args)
    device = compute_device(args.device)
    given = ("data", "batch_size", "workers", "check_data")
    options["skip_unreadable"] |= args.skip_unreadable
    options |= {k: getattr(args, k) for k in given if getattr(args, k) is not None}
    file = Path(args.checkpoint or Path(args.run) / "model_best.pth.tar")
    checkpoint = load_training_checkpoint(file, "--checkpoint")
    parts = open_parts(options, statistics(options["model"]))
    trained = checkpoint.get("classes") or records.get("classes")
    parts.reorder(match_classes(trained, parts.classes, f"--data {options['data']!r}", f"RUN {args.run!r}"))
    model = build(options, len(parts.classes), False)
    try:
        model.load_state_dict(unwrap(checkpoint))
    except (AttributeError, RuntimeError, TypeError) as e:
        raise UserError(f"--checkpoint {str(file)!r} does not fit the run: {one_line(e)}") from None
    check_weights(model, file)
    with processes(str(device)) as world:
        if world.primary:
            say_unnamed(trained, str(file))
        model.to(world.device)
        autocast, _ = precision(argparse.Namespace(**options), world.device)
        with autocast():
            place = (options["batch_size"], options["workers"], world.device, world)
            found = figures(model, parts.val, parts.classes, *place)
    result = {k: options[k] for k in ("task", "arch", "model", "data")}
    result |= {"images": len(parts.val), "skipped": parts.val.skipped, **found}
    return write_results(args, result, _tables, functools.partial(_draw, model, parts, world.device))


def _draw(model: nn.Module, parts: Any, device: torch.device, result: dict[str, Any], path: Path) -> None:
    draw_predictions(model, parts.val, parts.classes, device, path)


def _tables(result: dict[str, Any]) -> list[Table]:
    """The classes for people."""
    head = f"{result['arch']} on {result['model']}, {result['images']:,} images"
    head += f"{skipped_text(result['skipped'])} of {result['data']}"
    about = ("task", "arch", "model", "data", "images", "skipped", "classes")
    figures = {k: v for k, v in result.items() if k not in about}
    head += ": " + ", ".join(f"{k} {'-' if v is None else f'{v:.2f}'}" for k, v in figures.items())
    columns = [k for k in result["classes"][0] if k != "name"]
    rows = [[row["name"], *("" if row[k] is None else f"{row[k]:.2f}" for k in columns)] for row in result["classes"]]
    return [Table(["class", *(f"{k} (%)" for k in columns)], rows, range(1, len(columns) + 1), [head])]


def draw_predictions(
    model: nn.Module, data: Boxes | Masks, classes: Sequence[str], device: torch.device, path: Path
) -> None:
    """Draw truth and prediction side by side for some images, spread over the data.

    Args:
        model: The model.
        data: Images with truth.
        classes: Names.
        device: Where the model is.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    chosen = range(0, len(data), -(-len(data) // PICTURED))
    figure = Figure(figsize=(9, 3.6 * len(chosen)), dpi=130, layout="constrained")
    draw: Any = _draw_boxes if isinstance(data, Boxes) else _draw_masks
    model.eval()
    for axes, index in zip(figure.subplots(len(chosen), 2, squeeze=False), chosen, strict=True):
        with torch.inference_mode():
            panels = draw(model, data, index, classes, device)
        for panel, title, image in zip(axes, ("truth", "prediction"), panels, strict=True):
            panel.imshow(image.permute(1, 2, 0).numpy())
            panel.set_title(title, fontsize=9)
            panel.set_axis_off()
    if isinstance(data, Masks):
        from matplotlib.patches import Patch

        handles = [Patch(color=_fraction(_colour(i)), label=name) for i, name in enumerate(classes[:20])]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save_figure(figure, path)


def _colour(index: int) -> tuple[int, int, int]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["tab20"](index * 2 % 20 + index // 10 % 2, bytes=True)
    return int(red), int(green), int(blue)


def _fraction(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def _draw_boxes(
    model: nn.Module, data: Boxes, index: int, classes: Sequence[str], device: torch.device
) -> list[Tensor]:
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image, target = data[index]
    (found,) = model([image.to(device)])
    found = {k: v.cpu() for k, v in found.items()}
    kept = found["scores"] >= SHOWN
    panels = []
    for boxes, labels, scores, masks in (
        (target["boxes"], target["labels"], None, target.get("masks")),
        (
            found["boxes"][kept],
            found["labels"][kept],
            found["scores"][kept],
            found["masks"][kept] if "masks" in found else None,
        ),
    ):
        panel = (image * 255).round().to(torch.uint8)
        colours = [_colour(int(i) - 1) for i in labels]
        names = [classes[int(i) - 1] for i in labels]
        if scores is not None:
            names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
        if masks is not None and len(masks):
            outlines = masks.flatten(0, 1) > 0.5 if masks.dim() == 4 else masks.bool()
            panel = draw_segmentation_masks(panel, outlines, alpha=0.4, colors=colours)  # type: ignore[arg-type]
        if len(boxes):
            panel = draw_bounding_boxes(panel, boxes, names, colours, width=2)  # type: ignore[arg-type]
        panels.append(panel)
    return panels


def _draw_masks(
    model: nn.Module, data: Masks, index: int, classes: Sequence[str], device: torch.device
) -> list[Tensor]:
    from torchvision.utils import draw_segmentation_masks

    image, ids = data[index]
    called = segment(model, image.to(device), ids.shape).masked_fill(ids == IGNORED, IGNORED)
    picture = data.read(index)[0].as_subclass(Tensor)
    colours = [_colour(i) for i in range(len(classes))]
    each = [torch.stack([m == i for i in range(len(classes))]) for m in (ids, called)]
    return [draw_segmentation_masks(picture, m, alpha=0.6, colors=colours) for m in each]  # type: ignore[arg-type]
