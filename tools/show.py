"""``vizoo show``: what a model attends to in an image, as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torchvision.transforms.functional import normalize, pil_to_tensor

from vizoo.tools.common import Failure, UserError, build_model, check_output, resolve_model, run_tool, save_figure
from vizoo.tools.data.images import read_image
from vizoo.tools.options import WINDOW, Parser, add, add_alias, check_outputs

MOST_RATIO = 16  # of the sides of an image: a picture of a thinner one shows nothing
MOST_PIXELS = 2**22  # of an image for a model: it keeps some hundred bytes of each
EXAMPLES = """\
examples:
  vizoo show photo.jpg --model medusa_resnet50 --pretrained
      the global map and the map of every scale over the photo
  vizoo show chest.dcm --model medusa_resnet50 --checkpoint model_best.pth.tar --num-classes 2 --window 600 1500
      of your own network, with a DICOM image shown by a window"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo show",
        description="Draw the attention maps of a medusa_* model over an image.",
        epilog=EXAMPLES,
    )
    p.add_argument("image", metavar="IMAGE", help="PNG, JPEG, DICOM (.dcm), ...")
    add(p, "--model", "a medusa_* model", required=True)
    add(p, "--pretrained", "or --checkpoint")
    add_picture(p, "attention.png")
    return p


def add_picture(parser: argparse.ArgumentParser, file: str) -> None:
    """Add the options of a command that draws what a trained model sees in an image.

    Args:
        parser: The parser.
        file: Default of ``--plot``.
    """
    add(parser, "--checkpoint", "for example model_best.pth.tar of a run")
    add(parser, "--num-classes", "of the checkpoint; the model's")
    add(parser, "--model-kwargs")
    add(parser, "--img-size", "the model's; of the shorter side")
    add(parser, "--window", WINDOW)
    add(parser, "--plot", f".png; {file}", default=file)
    add_alias(parser, "--out", "plot")


def _show(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    name = resolve_model(args.model)
    check_output(args.plot, "--plot", ".png")
    if not args.checkpoint and not args.pretrained:
        raise UserError("--checkpoint is missing: give one, or --pretrained for the published weights")
    model = load_model(name, args, args.pretrained)
    if not hasattr(model, "attention_maps"):
        raise UserError(f"--model {args.model!r} has no attention maps to draw; allowed: medusa_*")
    data = resolve_data_config({}, model=model)
    x, normed = read_input(args.image, data, args.img_size, args.window)
    with torch.inference_mode():
        whole, local = model.attention_maps(normed)
    need_finite((whole, *local), args.checkpoint or name)
    draw_attention(x[0], whole[0], [m[0] for m in local], Path(args.plot), f"{name}\n{Path(args.image).name}")
    size = "x".join(map(str, x.shape[2:]))
    print(f"{args.plot}: global map and {len(local)} maps of {name} over {args.image}, {size}")
    return 0


def load_model(name: str, args: argparse.Namespace, pretrained: bool = False) -> Any:
    """Build a model with the weights and arguments that the options say.

    Args:
        name: Of the model.
        args: ``checkpoint``, ``num_classes`` and ``model_kwargs``.
        pretrained: Load the published weights.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: As :func:`vizoo.tools.common.build_model`, and for ``--num-classes 0``.
    """
    check_outputs(args.num_classes)
    kwargs = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    return build_model(name, pretrained=pretrained, checkpoint_path=args.checkpoint or "", **kwargs).eval()


def read_input(
    path: str,
    data: dict[str, Any],
    size: int | None,
    window: tuple[float, float] | None,
    multiple: int = 1,
    most: int = MOST_PIXELS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an image at the scale that a model takes it.

    Args:
        path: Of the image.
        data: The model's data configuration.
        size: Shorter side in pixels; None means the model's.
        window: As in :func:`vizoo.tools.data.images.read_image`.
        multiple: Both sides are rounded to a multiple of this.
        most: Pixels for the model.

    Returns:
        ``[1, C, H, W]`` from 0 to 1, and the same normalised for the model.

    Raises:
        UserError: If the image cannot be read, is over 16 times as long as wide, or becomes too large.
    """
    chans, size = data["input_size"][0], size or data["input_size"][-1]
    image = read_image(path, "L" if chans == 1 else "RGB", window)
    if max(image.size) > MOST_RATIO * min(image.size):
        raise UserError(f"IMAGE {path!r} is {image.width}x{image.height} pixels: sides of at most 1 to {MOST_RATIO}")
    scale = size / min(image.size) / multiple
    height, width = (max(1, round(n * scale)) * multiple for n in (image.height, image.width))
    if height * width > most:
        raise UserError(f"--img-size {size} makes {width}x{height} pixels of {path!r}; at most {most:,}")
    x = pil_to_tensor(image).float()[None] / 255
    x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return x, normalize(x, data["mean"][:chans], data["std"][:chans])


def need_finite(values: Sequence[torch.Tensor], weights: str) -> None:
    """Draw no picture of what a broken network says.

    Args:
        values: Of the network.
        weights: Where its weights are from, for the message.

    Raises:
        Failure: If one of the values is NaN or infinite.
    """
    if not all(v.isfinite().all() for v in values):
        raise Failure(f"the network gives NaN or infinite values; the weights of {weights!r} may be broken")


def image_panels(image: torch.Tensor, count: int, size: tuple[float, float], title: str) -> tuple[Any, Any, Any]:
    """Draw an image several times in a row.

    Args:
        image: ``[C, H, W]`` from 0 to 1.
        count: How often.
        size: Width and height of the picture in inches.
        title: Above the first one.

    Returns:
        The figure, its panels, and the extent of whatever is drawn over an image.
    """
    from matplotlib.figure import Figure

    pixels = image.permute(1, 2, 0).squeeze(2) if image.shape[0] == 1 else image.permute(1, 2, 0)
    extent = (0, image.shape[2], image.shape[1], 0)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(1, count)
    for axes in panels:
        axes.imshow(pixels.numpy(), cmap="gray", extent=extent)
        axes.set_axis_off()
    panels[0].set_title(title, fontsize=9)
    return figure, panels, extent


def draw_attention(
    image: torch.Tensor, global_map: torch.Tensor, local: Sequence[torch.Tensor], path: Path, title: str
) -> None:
    """Draw an image, and over it the global map of a MEDUSA and the map of every scale.

    Args:
        image: ``[C, H, W]`` from 0 to 1.
        global_map: ``[1, S, S]`` in (0, 1).
        local: Of each scale ``[1, h, w]``, or ``[C, h, w]``, of which the mean is drawn.
        path: PNG file to write.
        title: Above the image.
    """
    maps = {"global": global_map.mean(0)}
    maps.update({f"scale {i}, {m.shape[1]}x{m.shape[2]}": m.mean(0) for i, m in enumerate(local, start=1)})
    n = len(maps) + 1
    size = (2.9 * n, 2.6 * image.shape[1] / image.shape[2] + 1.1)
    figure, panels, extent = image_panels(image, n, size, title)
    for axes, (name, values) in zip(panels[1:], maps.items(), strict=True):
        shown = axes.imshow(values.numpy(), cmap="magma", alpha=0.6, extent=extent, interpolation="bilinear")
        axes.set_title(f"{name}\n{values.min():.2f} to {values.max():.2f}", fontsize=9)
        figure.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.8)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw attention maps; returns the exit status: 0 done, 1 not finite or not written, 2 bad input."""
    return run_tool(_show, argv, "show")


if __name__ == "__main__":
    raise SystemExit(main())
