"""Scanpath data: the JSON of the STI data set, the official prepared samples, and a search task made on the spot."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.tools._images import UnreadableImage, read_image
from vizoo.tools.common import UserError

AMAZON_GRID = (6, 14)
# objects of a shelf: its grid, width and height of a cell, space above (all in pixels of a 1680x1050 screen)
SHELVES = {22: ((2, 11), (152, 449), 152), 27: ((3, 9), (186, 305), 135)}
SHELF_SCREEN = (1680, 1050)
PARTS = ("train", "val", "test")


@dataclasses.dataclass(eq=False)
class Scene:
    """Objects in known places.

    Attributes:
        name: Of the layout.
        boxes: ``[N, 4]`` in pixels x1, y1, x2, y2.
        coords: Rows and columns ``[N, 2]``.
        screen: Width and height in pixels.
        image: File with the whole scene, or None.
        crops: Objects ``[N, C, h, w]``, uint8 or float, or None.
    """

    name: str
    boxes: Tensor
    coords: Tensor
    screen: tuple[int, int]
    image: Path | None = None
    crops: Tensor | None = None


@dataclasses.dataclass(eq=False)
class Trial:
    """One person looking for one object.

    Attributes:
        scene: Where.
        target: The object searched for.
        sequence: The objects looked at.
        viewer: Who.
        task: Kind of scene; each is split on its own.
    """

    scene: Scene
    target: int
    sequence: list[int]
    viewer: str
    task: str


@dataclasses.dataclass
class Scanpaths:
    """Trials of one file.

    Attributes:
        trials: In the order of the file.
        grid: Rows and columns of the largest scene.
        note: What was left out, for the log.
    """

    trials: list[Trial]
    grid: tuple[int, int]
    note: str = ""


def grid_boxes(grid: tuple[int, int], cell: tuple[float, float], top: float = 0.0) -> tuple[Tensor, Tensor]:
    """Boxes ``[N, 4]``, and rows and columns ``[N, 2]``, of a grid of cells of width and height ``cell``."""
    index = torch.arange(grid[0] * grid[1])
    row, column = index // grid[1], index % grid[1]
    width, height = cell
    corners = (column * width, top + row * height, (column + 1) * width, top + (row + 1) * height)
    return torch.stack([c.float() for c in corners], 1), torch.stack((row, column), 1).float()


def assign(points: Tensor, boxes: Tensor) -> list[int]:
    """The object of each fixation: the box that holds it, else the nearest box centre.

    Args:
        points: Fixations ``[T, 2]`` as x, y in pixels.
        boxes: ``[N, 4]``.

    Returns:
        ``T`` indices.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    inside = ((points[:, None] >= low) & (points[:, None] < high)).all(-1)
    far = (points[:, None] - (low + high) / 2).norm(dim=-1)
    chosen: list[int] = torch.where(inside.any(1), inside.int().argmax(1), far.argmin(1)).tolist()
    return chosen


def load_scanpaths(path: str, images: str | None = None, grid: tuple[int, int] | None = None) -> Scanpaths:
    """Read a file of human scanpaths.

    Args:
        path: ``.json`` of the STI data set (an object: image name to fixations, ground truth and size), or the
            official samples (a list) as ``.json``, ``.pkl`` or ``.pickle``; pickles may hold numbers, text and NumPy
            arrays, nothing else is loaded from them.
        images: Folder of the images of STI data; without it every object looks the same.
        grid: Rows and columns of a scene; None for those of the known data sets.

    Returns:
        The trials.

    Raises:
        UserError: For a file that cannot be read or a record that makes no sense; it names both.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--data {path!r}: no such file; give 'search' or a .json, .pkl or .pickle of scanpaths")
    try:
        if file.suffix in (".pkl", ".pickle"):
            with file.open("rb") as f:
                content = _NumbersOnly(f).load()
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as e:
        raise UserError(f"--data {path!r}: cannot read it: {(str(e) or type(e).__name__).splitlines()[0]}") from None
    if isinstance(content, dict):
        return _read_sti(content, path, images, grid or AMAZON_GRID)
    if images:
        raise UserError(f"--images {images!r}: the samples of {path!r} bring their crops along")
    if not isinstance(content, list) or not content:
        raise UserError(
            f"--data {path!r}: holds {type(content).__name__}, need an object of images or a list of samples"
        )
    return _read_samples(content, path, grid)


class _NumbersOnly(pickle.Unpickler):
    """Loads containers, text, numbers and NumPy arrays; refuses to import anything else."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how old protocols write the bytes of an array
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}; only NumPy arrays are loaded")


def _numbers(value: Any, shape: tuple[int | None, ...], where: str, need: str) -> np.ndarray:
    """Finite numbers of a shape, where None is any length of at least 1."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{where}: got {str(value)[:60]}, need {need}") from None
    fits = array.ndim == len(shape) and all(n == (m or n) and n for n, m in zip(array.shape, shape, strict=True))
    if not fits or not np.isfinite(array).all():
        raise UserError(f"{where}: got {str(value)[:60]}, need {need}")
    return array


def _field(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where}: {key!r} is missing")
    return record[key]


def _read_sti(content: dict[str, Any], path: str, images: str | None, grid: tuple[int, int]) -> Scanpaths:
    trials = []
    for name, record in content.items():
        where = f"{path}: record {name!r}"
        size = _field(record, "size", where)
        width, height = (
            _numbers(_field(size, k, f"{where}, size"), (), f"{where}, size", f"a positive {k}").item()
            for k in ("width", "height")
        )
        if min(width, height) <= 0:
            raise UserError(f"{where}, size: got {width:g}x{height:g}, need a positive width and height")
        boxes, coords = grid_boxes(grid, (width / grid[1], height / grid[0]))
        truth = _field(record, "ground_truth", where)
        if not isinstance(truth, list) or not truth:
            raise UserError(f"{where}, ground_truth: got {str(truth)[:60]}, need a list with the target's box")
        sides = ("xmin", "xmax", "ymin", "ymax")
        values = [_field(truth[0], k, f"{where}, ground_truth") for k in sides]
        x1, x2, y1, y2 = _numbers(values, (4,), f"{where}, ground_truth", "four numbers").tolist()
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise UserError(f"{where}, ground_truth: box {values} as {sides} is not inside {width:g}x{height:g}")
        (target,) = assign(torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2]]), boxes)
        image = Path(images) / name if images else None
        if image and not image.is_file():
            raise UserError(f"{where}: no image {str(image)!r}")
        scene = Scene(name, boxes, coords, (round(width), round(height)), image)
        fixations = _field(record, "fixations", where)
        if not isinstance(fixations, dict) or not fixations:
            raise UserError(f"{where}, fixations: got {str(fixations)[:60]}, need viewer: [[x, y], ...]")
        for viewer, points in fixations.items():
            xy = _numbers(points, (None, 2), f"{where}, fixations of viewer {viewer!r}", "[[x, y], ...] in pixels")
            sequence = assign(torch.from_numpy(xy).float(), boxes)
            trials.append(Trial(scene, target, sequence, str(viewer), "sti"))
    if not trials:
        raise UserError(f"{path}: holds no record")
    lengths = np.array([len(t.sequence) for t in trials])
    longest = lengths.mean() + 3 * lengths.std()
    kept = [t for t in trials if len(t.sequence) <= longest]
    note = f"{len(trials) - len(kept)} of {len(trials)} left out: over {longest:.1f} fixations (mean + 3 deviations)"
    return Scanpaths(kept, grid, note)


def _read_samples(content: list[Any], path: str, grid: tuple[int, int] | None) -> Scanpaths:
    trials: list[Trial] = []
    scenes: dict[Any, Scene] = {}
    largest = (0, 0)
    for i, record in enumerate(content):
        where = f"{path}: record {i}"
        crops = None
        if isinstance(record, dict) and record.get("question_img_feature") is not None:
            crops = _crops(record["question_img_feature"], where)
        n = len(crops) if crops is not None else math.prod(grid) if grid else None
        if n is None:
            raise UserError(f"{where}: 'question_img_feature' is missing; give the rows and columns with --grid")
        shelf, boxes, coords = _shelf(n, grid, where)
        largest = max(largest, shelf, key=math.prod)
        target = _objects(_field(record, "package_target", where), n, f"{where}, package_target")
        if len(set(target)) != 1:
            raise UserError(f"{where}, package_target: got {len(target)} objects, need one")
        sequence = _objects(_field(record, "package_seq", where), n, f"{where}, package_seq")
        for axis in ("X", "Y"):
            if record.get(axis) is not None:
                _numbers(record[axis], (len(sequence),), f"{where}, {axis}", f"{len(sequence)} pixels, one a fixation")
        layout, task = str(record.get("layout_id", i)), str(record.get("id", n))
        # the crops of a layout hang on the target too, so only equal ones are shared
        key = (task, layout, None if crops is None else hash(crops.numpy().tobytes()))
        screen = SHELF_SCREEN if n in SHELVES else (2560, 1600)
        scene = scenes.setdefault(key, Scene(layout, boxes, coords, screen, crops=crops))
        trials.append(Trial(scene, target[0], sequence, str(record.get("sub_id", "")), task))
    return Scanpaths(trials, largest)


def _shelf(n: int, grid: tuple[int, int] | None, where: str) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Grid, boxes and coordinates of a shelf of ``n`` objects."""
    if grid is not None and math.prod(grid) != n:
        raise UserError(f"{where}: {n} objects do not fill --grid {grid[0]} {grid[1]}")
    if n in SHELVES and grid in (None, SHELVES[n][0]):
        shelf, cell, top = SHELVES[n]
        return (shelf, *grid_boxes(shelf, cell, top))
    if grid is None and n != math.prod(AMAZON_GRID):
        raise UserError(f"{where}: {n} objects, known are 22, 27 and 84; give their rows and columns with --grid")
    shelf = grid or AMAZON_GRID
    return (shelf, *grid_boxes(shelf, (2560 / shelf[1], 1600 / shelf[0])))


def _objects(value: Any, n: int, where: str) -> list[int]:
    """Zero-based indices of one-based objects."""
    array = np.atleast_1d(_numbers(np.atleast_1d(np.asarray(value, object)).tolist(), (None,), where, "object numbers"))
    if (array != array.round()).any() or array.min() < 1 or array.max() > n:
        raise UserError(f"{where}: got {str(value)[:60]}, need whole numbers from 1 to {n}")
    return [int(v) - 1 for v in array]


def _crops(value: Any, where: str) -> Tensor:
    """Crops ``[N, 3, h, w]`` of arrays ``[h, w, 3]`` of one size; whole numbers are divided by 255."""
    where = f"{where}, question_img_feature"
    try:
        array = np.stack([np.asarray(crop) for crop in value])
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: need N crops [h, w, 3] of one size ({e})") from None
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype.kind not in "uif" or not np.isfinite(array).all():
        raise UserError(f"{where}: got {list(array.shape)} of {array.dtype}, need finite numbers [N, h, w, 3]")
    crops = torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
    return crops / 255 if array.dtype.kind in "ui" else crops


def split(trials: Sequence[Trial], seed: int, by: str = "layout") -> dict[str, list[Trial]]:
    """80, 10 and 10 per cent of each task for training, validation and test.

    Args:
        trials: All of them.
        seed: Of the shuffle.
        by: ``"layout"`` keeps all viewers of a scene in one part; ``"scanpath"`` shuffles trials, as the official code.

    Returns:
        Trials of the parts, by name.

    Raises:
        UserError: If a part would be empty.
    """
    groups: dict[str, dict[Any, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for i, trial in enumerate(trials):
        groups[trial.task][trial.scene.name if by == "layout" else i].append(trial)
    parts: dict[str, list[Trial]] = {name: [] for name in PARTS}
    for task in sorted(groups):
        members = list(groups[task].values())
        random.Random(seed).shuffle(members)
        first, second = round(0.8 * len(members)), round(0.9 * len(members))
        for name, group in zip(PARTS, (members[:first], members[first:second], members[second:]), strict=True):
            parts[name] += [trial for together in group for trial in together]
    for name, chosen in parts.items():
        if not chosen:
            unit = "layouts" if by == "layout" else "scanpaths"
            raise UserError(f"--split-by {by}: too few {unit} for a {name} part; need at least 10 of each task")
    return parts


def search_task(n: int, grid: tuple[int, int] = (3, 5), side: tuple[int, int] = (32, 24), seed: int = 0) -> Scanpaths:
    """A synthetic viewer who goes row by row to the target and stops, over random crops.

    Args:
        n: Number of trials, each on a layout of its own.
        grid: Rows and columns.
        side: Height and width of a crop.
        seed: Of layouts and targets.

    Returns:
        The trials.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes, coords = grid_boxes(grid, (side[1], side[0]))
    screen = (side[1] * grid[1], side[0] * grid[0])
    targets = torch.randint(math.prod(grid), (n,), generator=generator).tolist()
    trials = []
    for i, target in enumerate(targets):
        crops = torch.randint(256, (math.prod(grid), 3, *side), generator=generator, dtype=torch.uint8)
        scene = Scene(f"layout {i}", boxes, coords, screen, crops=crops)
        trials.append(Trial(scene, target, list(range(target + 1)), "synthetic", "search"))
    return Scanpaths(trials, grid)


class Batches(torch.utils.data.Dataset):
    """Trials as tensors.

    Args:
        trials: The trials.
        crop_size: Height and width of crops; None gives whole images of ``image_size`` and boxes.
        image_size: Height and width.
    """

    def __init__(
        self, trials: Sequence[Trial], crop_size: tuple[int, int] | None, image_size: tuple[int, int] = (800, 1280)
    ) -> None:
        self.trials, self.crop_size, self.image_size = trials, crop_size, image_size

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: int) -> dict[str, Any]:
        trial = self.trials[index]
        scene = trial.scene
        if self.crop_size is not None:
            if scene.crops is None:
                scene.crops = _cut(scene, self.crop_size)  # once for all viewers
            x = scene.crops if scene.crops.is_floating_point() else scene.crops.float() / 255
            if tuple(x.shape[2:]) != self.crop_size:
                x = F.interpolate(x, self.crop_size, mode="bilinear", antialias=True)
        else:
            if scene.image is None:
                raise UserError("a model with a backbone looks at whole images; give their folder with --images")
            x = _pixels(scene.image, self.image_size).float() / 255
        scale = torch.tensor([self.image_size[1] / scene.screen[0], self.image_size[0] / scene.screen[1]]).repeat(2)
        boxes = scene.boxes * scale
        return {"x": x, "boxes": boxes, "coords": scene.coords, "target": trial.target, "sequence": trial.sequence}


def _pixels(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        image = read_image(path).resize((size[1], size[0]))
    except UnreadableImage as e:
        raise UserError(f"{path}: {e}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _cut(scene: Scene, size: tuple[int, int]) -> Tensor:
    """Crops ``[N, 3, h, w]`` of a scene's image as bytes; blank ones, as small as may be, when there is no image."""
    if scene.image is None:
        return torch.zeros(len(scene.boxes), 3, *size, dtype=torch.uint8)
    try:
        image = read_image(scene.image)
    except UnreadableImage as e:
        raise UserError(f"{scene.image}: {e}") from None
    zoom = (image.width / scene.screen[0], image.height / scene.screen[1]) * 2
    crops = [
        image.resize((size[1], size[0]), box=tuple(v * z for v, z in zip(box, zoom, strict=True)))
        for box in scene.boxes.tolist()
    ]
    return torch.from_numpy(np.stack([np.array(c) for c in crops])).permute(0, 3, 1, 2).contiguous()


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack trials; shorter scanpaths are padded with -1, smaller scenes with masked objects.

    Args:
        rows: Items of :class:`Batches`.

    Returns:
        ``x`` crops ``[B, N, C, h, w]`` or images ``[B, C, H, W]``; ``boxes`` ``[B, N, 4]``, ``coords`` ``[B, N, 2]``,
        ``target`` ``[B]``, ``sequence`` ``[B, T]`` and ``object_mask`` ``[B, N]``, None when all scenes are equal.
    """
    most = max(len(row["coords"]) for row in rows)
    counts = torch.tensor([len(row["coords"]) for row in rows])

    def stack(key: str) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True)

    images = rows[0]["x"].ndim == 3
    mask = torch.arange(most) < counts[:, None]
    paths = [torch.tensor(row["sequence"]) for row in rows]
    return {
        "x": torch.stack([row["x"] for row in rows]) if images else stack("x"),
        "boxes": stack("boxes"),
        "coords": stack("coords"),
        "target": torch.tensor([row["target"] for row in rows]),
        "sequence": torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1),
        "object_mask": None if mask.all() else mask,
    }
