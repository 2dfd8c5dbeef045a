"""``vizoo show``: what a model sees in an image, as a picture."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vizoo.tools.common import (
    Failure,
    UserError,
    build_model,
    check_output,
    resolve_model,
    run_tool,
    taking,
)
from vizoo.tools.options import WINDOW, KeyValues, Parser, add, add_alias, check_outputs, number

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vizoo.backbones.layers import Panel

PHOTOS = ("china", "flower")  # that scikit-learn ships
VIEWS = ("explain", "grad-cam", "receptive-field")
MOST_RATIO = 16  # of the sides of an image: a picture of a thinner one shows nothing
MOST_PIXELS = 2**22  # of an image for a model: it keeps some hundred bytes of each
EXAMPLES = """\
examples:
  vizoo show --model nat_tiny --pretrained
      what a model of the zoo has to show (here neighbourhoods and their attention), over a photo of scikit-learn
  vizoo show photo.jpg --model overlock_t --pretrained --point 420 130
      kernels at a place of the photo, 420 pixels from the left and 130 from the top
  vizoo show flower --model resnet50 --pretrained --view grad-cam receptive-field
      of any model of timm: where it sees its class, and what one place of its last map depends on
  vizoo show photo.jpg --model dependencyvit_lite_small --checkpoint lite.pth --img-size 384 --explain-kwargs parts=6
      with settings of the model's explain(); a wrong one names those that there are
  vizoo show chest.dcm --model medusa_resnet50 --checkpoint model_best.pth.tar --num-classes 2 --window 600 1500
      of your own network, with a DICOM image shown by a window"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo show",
        description="Draw what a model sees in an image, over the image.",
        epilog=EXAMPLES,
    )
    image = "PNG, JPEG, DICOM (.dcm), ...; or 'china' or 'flower', photos of scikit-learn (china)"
    p.add_argument("image", metavar="IMAGE", nargs="?", default=PHOTOS[0], help=image)
    add(p, "--model", "", required=True)
    add(p, "--pretrained", "else, and without --checkpoint, untrained ones")
    add(p, "--checkpoint", "for example model_best.pth.tar of a run")
    add(p, "--num-classes", "of the checkpoint; the model's")
    add(p, "--model-kwargs")
    add(p, "--img-size", "the model's; of the shorter side")
    add(p, "--window", WINDOW)
    p.add_argument(
        "--view",
        choices=VIEWS,
        nargs="+",
        metavar="VIEW",
        help="explain: what the model itself has to show; grad-cam: where it sees a class; receptive-field: what a "
        "place of its last map depends on (explain if the model can, else the others)",
    )
    p.add_argument(
        "--point",
        type=number(float, 0),
        nargs=2,
        metavar=("X", "Y"),
        help="place in the image, in pixels from its upper left corner (the middle)",
    )
    p.add_argument("--class", dest="target", type=number(int, 0), metavar="N", help="of grad-cam (the most likely one)")
    p.add_argument(
        "--explain-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="settings of explain"
    )
    add(p, "--plot", ".png; show.png", default="show.png")
    add_alias(p, "--out", "plot")
    return p


class Input(NamedTuple):
    """An image as a model takes it.

    Attributes:
        pixels: ``[1, C, H, W]`` from 0 to 1.
        normed: The same, normalised for the model.
        point: Row and column of the place that was asked for, as fractions of it.
    """

    pixels: torch.Tensor
    normed: torch.Tensor
    point: tuple[float, float]


def _show(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    import torch

    from vizoo.tools.pictures.draw import draw_panels

    name = resolve_model(args.model)
    check_output(args.plot, "--plot", ".png")
    check_outputs(args.num_classes)
    torch.manual_seed(0)  # of untrained weights
    model = _build(name, args)
    views = check_views(model, args)
    seen = read_input(args.image, model, args.img_size, args.window, args.point)
    size = "x".join(map(str, seen.pixels.shape[2:]))
    with taking(name, f"{size} (--img-size)"):
        panels = [panel for view in views for panel in _panels(view, model, seen, args)]
    need_finite(panels, args.checkpoint or name)
    trained = bool(args.checkpoint or args.pretrained)
    title = f"{name}{'' if trained else ', untrained'}: {Path(args.image).name} as {size}"
    draw_panels(seen.pixels[0], panels, args.plot, title)
    if not trained:
        print("neither --pretrained nor --checkpoint: untrained weights, which have not learnt to see", file=sys.stderr)
    print("\n  ".join([f"{args.plot}: {name} over {args.image}, {size}", *(p.title for p in panels)]))
    return 0


def _build(name: str, args: argparse.Namespace) -> Any:
    """The model in evaluation mode, with the weights and arguments that the options say."""
    from timm.models import get_pretrained_cfg

    kwargs = dict(args.model_kwargs)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    config = get_pretrained_cfg(name, allow_unregistered=True)
    if args.img_size and config and config.fixed_input_size:
        kwargs.setdefault("img_size", args.img_size)
    return build_model(name, pretrained=args.pretrained, checkpoint_path=args.checkpoint or "", **kwargs).eval()


def check_views(model: Any, args: argparse.Namespace) -> list[str]:
    """The views that are drawn.

    Args:
        model: The model.
        args: Options of the command.

    Returns:
        Some of ``VIEWS``.

    Raises:
        UserError: For a view or an option that this model or these views do not have.
    """
    own = hasattr(model, "explain")
    classless = args.target is None and not getattr(model, "num_classes", 1)
    views = args.view or ([VIEWS[0]] if own else list(VIEWS[2:] if classless else VIEWS[1:]))
    if "explain" in views and not own:
        raise UserError(f"--view explain: {args.model!r} has no explain(); allowed: {', '.join(VIEWS[1:])}")
    allowed = list(inspect.signature(model.explain).parameters)[1:] if "explain" in views else []
    unknown = args.explain_kwargs.keys() - set(allowed) | args.explain_kwargs.keys() & {"point"}
    if unknown:
        known = ", ".join(a for a in allowed if a != "point") or "none"
        raise UserError(f"--explain-kwargs {sorted(unknown)[0]!r} is unknown; allowed for {args.model!r}: {known}")
    if args.point and "point" not in allowed and "receptive-field" not in views:
        raise UserError(f"--point: what {args.model!r} shows by {', '.join(views)} does not depend on a point")
    if args.target is not None and "grad-cam" not in views:
        raise UserError("--class is for --view grad-cam")
    return list(dict.fromkeys(views))


def _panels(view: str, model: Any, seen: Input, args: argparse.Namespace) -> list[Panel]:
    """What one view shows."""
    from timm.data import ImageNetInfo

    from vizoo.tools.pictures.views import grad_cam, receptive_field

    if view == "grad-cam":
        names = ImageNetInfo() if args.pretrained and getattr(model, "num_classes", 0) == 1000 else None
        classes = [names.index_to_description(i) for i in range(1000)] if names else []
        return [grad_cam(model, seen.normed, args.target, classes)]
    if view == "receptive-field":
        return [receptive_field(model, seen.normed, seen.point)]
    settings = dict(args.explain_kwargs)
    if "point" in inspect.signature(model.explain).parameters:
        settings["point"] = seen.point
    try:
        panels: list[Panel] = model.explain(seen.normed, **settings)
    except ValueError as e:
        raise UserError(f"{args.model} cannot explain {args.image!r}: {e}") from None
    return panels


def read_input(
    path: str, model: Any, size: int | None, window: tuple[float, float] | None, point: Sequence[float] | None
) -> Input:
    """Read an image at the scale that a model takes it; a model of one size gets the middle of the image.

    Args:
        path: Of the image, or one of ``PHOTOS``.
        model: A timm model; its first parameter tells how many channels an image has, its configuration the size.
        size: Shorter side in pixels; None means the model's.
        window: As in :func:`vizoo.tools.data.images.read_image`.
        point: Column and row in pixels of the image; None for the middle.

    Returns:
        The image.

    Raises:
        UserError: If the image cannot be read, is over 16 times as long as wide, or becomes too large; or if the point
            lies outside of what the model gets.
    """
    import torch.nn.functional as F
    from timm.data import resolve_data_config
    from torchvision.transforms.functional import normalize, pil_to_tensor

    from vizoo.tools.data.images import read_image

    data = resolve_data_config({}, model=model)
    chans = getattr(model, "in_chans", None) or next(p for p in model.parameters() if p.ndim == 4).shape[1]
    photo = str(files("sklearn.datasets.images") / f"{path}.jpg") if path in PHOTOS else path
    image = read_image(photo, "L" if chans == 1 else "RGB", window)
    if max(image.size) > MOST_RATIO * min(image.size):
        raise UserError(f"IMAGE {path!r} is {image.width}x{image.height} pixels: sides of at most 1 to {MOST_RATIO}")
    height, width = _target(image, model, data["input_size"][1:], size)
    if height * width > MOST_PIXELS:
        raise UserError(f"--img-size {size} makes {width}x{height} pixels of {path!r}; at most {MOST_PIXELS:,}")
    cut = _middle(image, width / height)
    place = _place(point, cut, image, path)
    x = pil_to_tensor(image.crop(cut)).float()[None] / 255
    x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (list(data[k])[:chans] for k in ("mean", "std"))
    dtype = next(model.parameters()).dtype
    return Input(x, normalize(x, mean, std).to(dtype), place)


def _target(image: Image, model: Any, own: Sequence[int], size: int | None) -> tuple[int, int]:
    """Height and width for the model: the image's shape where the model takes any, in whole cells of its last map."""
    scale = (size or min(own)) / min(own)
    if (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size") or own[0] != own[1]:
        return round(own[0] * scale), round(own[1] * scale)
    stride = max((info["reduction"] for info in getattr(model, "feature_info", ())), default=1)
    scale = min(own) * scale / min(image.size) / stride
    height, width = (max(1, round(n * scale)) * stride for n in (image.height, image.width))
    return height, width


def _middle(image: Image, ratio: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest middle part as wide as high by a ratio, but for rounding."""
    width, height = image.size
    if abs(width / height / ratio - 1) < 0.1:  # whole cells change the ratio a little: then all is shown
        return 0, 0, width, height
    wide, high = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _place(
    point: Sequence[float] | None, cut: tuple[int, int, int, int], image: Image, path: str
) -> tuple[float, float]:
    """Row and column of a point of the image as fractions of the part that the model gets."""
    if point is None:
        return 0.5, 0.5
    left, top, right, bottom = cut
    if not (left <= point[0] < right and top <= point[1] < bottom):
        part = "" if cut == (0, 0, *image.size) else " that the model gets"
        columns, rows = f"columns {left} to {right - 1}", f"rows {top} to {bottom - 1}"
        raise UserError(f"--point {point[0]:g} {point[1]:g} lies outside of {path!r}: {columns} and {rows}{part}")
    return (point[1] - top) / (bottom - top), (point[0] - left) / (right - left)


def need_finite(panels: Sequence[Panel], weights: str) -> None:
    """Draw no picture of what a broken network says.

    Args:
        panels: Of the network.
        weights: Where its weights are from, for the message.

    Raises:
        Failure: If one of the values is NaN or infinite.
    """
    import torch

    values = [v for p in panels for v in vars(p).values() if isinstance(v, torch.Tensor)]
    if not all(v.isfinite().all() for v in values):
        raise Failure(f"the network gives NaN or infinite values; the weights of {weights!r} may be broken")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what a model sees; returns the exit status: 0 done, 1 not finite or not written, 2 bad input."""
    return run_tool(_show, argv, "show")


if __name__ == "__main__":
    raise SystemExit(main())
