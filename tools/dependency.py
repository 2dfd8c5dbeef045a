"""``vizoo dependency``: the tree, the parts and the saliency that a DependencyViT sees in an image, as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config

from vizoo.backbones.layers import Dependency, Tree, dependency_tree, saliency, subtrees
from vizoo.tools.common import UserError, check_output, resolve_model, run_tool, save_figure
from vizoo.tools.options import Parser, add, number
from vizoo.tools.show import add_picture, image_panels, load_model, need_finite, read_input

EXAMPLES = """\
examples:
  vizoo dependency photo.jpg --checkpoint output/train/run/model_best.pth.tar --num-classes 10
      tree, parts and saliency of your own dependencyvit_tiny
  vizoo dependency photo.jpg --model dependencyvit_lite_small --checkpoint lite.pth --img-size 384 --parts 6
      of a pruned model on a larger image, in six parts
  vizoo dependency china --method edmonds --layers 4
      a photo of scikit-learn, untrained weights, which see nothing yet: best spanning tree of the last four layers"""
PHOTOS = ("china", "flower")  # that scikit-learn ships
MOST_TOKENS = 4096  # each of every layer has a dependency on each other one


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo dependency",
        description="Draw an image with the dependency tree of its tokens, its parts and its saliency.",
        epilog=EXAMPLES,
    )
    p.add_argument("image", metavar="IMAGE", help="PNG, JPEG, DICOM (.dcm), ...; or 'china' or 'flower'")
    add(p, "--model", "a dependencyvit_* model; dependencyvit_tiny", default="dependencyvit_tiny")
    add_picture(p, "dependency.png")
    p.add_argument("--method", choices=["greedy", "edmonds"], default="greedy", help="parser of the tree (greedy)")
    p.add_argument("--layers", type=number(int, 1), metavar="K", help="take the mean of the last K layers (all)")
    p.add_argument("--parts", type=number(int, 1), default=5, metavar="K", help="parts to cut the tree into (5)")
    p.add_argument("--min-size", type=number(int, 1), default=4, metavar="N", help="tokens below a cut, at least (4)")
    return p


def _dependency(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    name = resolve_model(args.model)
    check_output(args.plot, "--plot", ".png")
    torch.manual_seed(0)  # of untrained weights
    model = load_model(name, args)
    if not hasattr(model, "get_dependency"):
        raise UserError(f"--model {args.model!r} has no dependency tree; allowed: dependencyvit_*")
    depth = len(model.blocks)
    if args.layers is not None and args.layers > depth:
        raise UserError(f"--layers {args.layers}: from 1 to {depth}, the layers of {name}")
    step = max(model.patch_embed.patch_size)
    photo = str(files("sklearn.datasets.images") / f"{args.image}.jpg") if args.image in PHOTOS else args.image
    data = resolve_data_config({}, model=model)
    data["input_size"] = (model.in_chans, *data["input_size"][1:])
    x, normed = read_input(photo, data, args.img_size, args.window, step, MOST_TOKENS * step**2)
    model.set_record_dependency()
    with torch.inference_mode():
        model(normed)
        found = model.get_dependency(args.layers)
    need_finite((found.masks,), args.checkpoint or name)
    try:
        tree = dependency_tree(found, args.method)
    except ValueError as e:
        raise UserError(f"--method {args.method}: {e}") from None
    parts = subtrees(found, tree, args.parts, args.min_size)
    trained = "" if args.checkpoint else ", untrained"
    draw_dependency(x[0], found, tree, parts, Path(args.plot), f"{name}{trained}\n{Path(photo).name}")
    if not args.checkpoint:
        print("no --checkpoint: these are untrained weights, which see nothing in an image", file=sys.stderr)
    size, root = "x".join(map(str, found.size)), divmod(int(tree.rank[0].argmin()), found.size[1])
    print(
        f"{args.plot}: {args.method} tree of {size} tokens, root at row {root[0]}, column {root[1]}, "
        f"depth {tree.depth[0].max()}, {parts[0].max() + 1} parts"
    )
    return 0


def draw_dependency(
    image: torch.Tensor, dependency: Dependency, tree: Tree, parts: torch.Tensor, path: Path, title: str
) -> None:
    """Draw an image beside its dependency tree, its parts and its saliency, all over the image.

    Args:
        image: ``[C, H, W]`` from 0 to 1.
        dependency: Of the image, as a batch of one.
        tree: Parsed from it.
        parts: Labels of the tokens ``[1, h, w]``.
        path: PNG file to write.
        title: Above the image.
    """
    height, width = image.shape[1:]
    figure, panels, extent = image_panels(image, 4, (14, 3.4 * height / width + 1.6), title)
    _draw_tree(figure, panels[1], tree, dependency.size, (height, width))
    _draw_parts(figure, panels[2], parts[0], extent)
    _draw_saliency(figure, panels[3], dependency, extent)
    save_figure(figure, path)


def _draw_tree(figure: Any, axes: Any, tree: Tree, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """Lines from each token to its parent, and a star at the root."""
    from matplotlib.collections import LineCollection

    (rows, columns), (height, width) = grid, size
    token = torch.arange(rows * columns)
    place = torch.stack([(token % columns + 0.5) * width / columns, (token // columns + 0.5) * height / rows], 1)
    parents, depth = tree.parents[0], tree.depth[0]
    deepest = max(1, int(depth.max()))
    children = token[parents >= 0][depth[parents >= 0].argsort(descending=True)]  # near the root last, on top
    lines = LineCollection(
        list(torch.stack([place[children], place[parents[children]]], 1).numpy()),
        array=depth[children].numpy(),
        cmap="plasma_r",
        clim=(1, deepest),
        linewidths=(0.4 + 0.8 * (1 - (depth[children] - 1) / deepest)).numpy(),
    )
    axes.add_collection(lines)
    axes.plot(*place[parents < 0][0].tolist(), marker="*", color="white", markeredgecolor="black", markersize=13)
    axes.set_title(f"tree: root (star), {deepest} levels below it", fontsize=9)
    figure.colorbar(lines, ax=axes, orientation="horizontal", shrink=0.8, label="edges to the root")


def _draw_parts(figure: Any, axes: Any, parts: torch.Tensor, extent: Any) -> None:
    """A colour for each part; ``parts`` is ``[h, w]``."""
    from matplotlib import colormaps

    count = int(parts.max()) + 1
    colours = colormaps["tab10" if count <= 10 else "tab20"].resampled(max(count, 2))
    look: dict[str, Any] = {"cmap": colours, "alpha": 0.55, "extent": extent, "interpolation": "nearest"}
    labels = axes.imshow(parts.numpy(), vmin=-0.5, vmax=count - 0.5, **look)
    axes.set_title(f"parts: {count} subtrees", fontsize=9)
    figure.colorbar(labels, ax=axes, orientation="horizontal", shrink=0.8, ticks=range(count), label="part")


def _draw_saliency(figure: Any, axes: Any, dependency: Dependency, extent: Any) -> None:
    """What each token receives, and an outline of the foreground."""
    scaled, foreground = saliency(dependency)
    shown = axes.imshow(scaled[0].numpy(), cmap="magma", alpha=0.6, extent=extent, interpolation="nearest")
    if foreground.any() and min(dependency.size) > 1:
        edge: dict[str, Any] = {"levels": [0.5], "colors": "cyan", "linewidths": 0.9}
        axes.contour(foreground[0].float().numpy(), extent=extent, origin="upper", **edge)
    axes.set_title(f"saliency: foreground {float(foreground.float().mean()):.0%}", fontsize=9)
    figure.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.8, label="received, scaled")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a dependency tree; returns the exit status: 0 done, 1 not finite or not written, 2 bad input."""
    return run_tool(_dependency, argv, "dependency")


if __name__ == "__main__":
    raise SystemExit(main())
