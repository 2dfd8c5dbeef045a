"""Scanpath data: the JSON of the STI data set, the official prepared samples, and a search task made on the spot."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.heads.checkpoints import NUMPY_GLOBALS
from vizoo.tools.common import UserError, check_file, one_line, read_json, short
from vizoo.tools.data.images import MOST_PIXELS, read_image
from vizoo.tools.options import PARTS

AMAZON_GRID = (6, 14)
# objects of a shelf: its grid, width and height of a cell, space above (all in pixels of a 1680x1050 screen)
SHELVES = {22: ((2, 11), (152, 449), 152), 27: ((3, 9), (186, 305), 135)}
SHELF_SCREEN = (1680, 1050)
OTHER_SCREEN = (2560, 1600)
MARGIN = 0.1  # of the screen's sides: eye trackers report fixations a little outside; further off, it is no gaze
LARGEST_SCREEN = 100_000  # pixels of a side
MOST_OBJECTS = 4096  # of a scene
MOST_CROPS = 2**20  # of the search task: some 2 GB
LARGEST_NUMBER = 1e9


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
            arrays, nothing else is loaded from them.  Fixations may lie outside the screen by a tenth of its sides.
        images: Folder of the images of STI data; without it every object looks the same.
        grid: Rows and columns of a scene; None for those of the known data sets.

    Returns:
        The trials.

    Raises:
        UserError: For a file that cannot be read or a record that makes no sense; it names both.
    """
    if grid is not None:
        _check_grid(grid)
    pickled = Path(path).suffix in (".pkl", ".pickle")
    content = _read_pickle(path) if pickled else read_json(path, "--data")
    if isinstance(content, dict):
        return _read_sti(content, path, images, grid or AMAZON_GRID)
    if not isinstance(content, list) or not content:
        raise UserError(
            f"--data {path!r}: holds {type(content).__name__}, need an object of images or a list of samples"
        )
    if images:
        raise UserError(f"--images {images!r}: the samples of {path!r} bring their crops along")
    return _read_samples(content, path, grid)


def _check_grid(grid: tuple[int, int]) -> None:
    if math.prod(grid) > MOST_OBJECTS:
        raise UserError(f"--grid {grid[0]} {grid[1]}: at most {MOST_OBJECTS} objects")


def _read_pickle(path: str) -> Any:
    data = check_file(path, "--data").read_bytes()
    try:
        for opcode, index, _ in pickletools.genops(data):
            if "PUT" in opcode.name and index and index > len(data):  # memory for all values before is taken at once
                raise pickle.UnpicklingError(f"it keeps a value number {index}")
        return _NumbersOnly(io.BytesIO(data)).load()
    except Exception as e:  # what it holds is called, so it raises what it likes
        reason = one_line(e, 200)
        raise UserError(f"--data {path!r}: cannot read it: {reason}") from None


class _NumbersOnly(pickle.Unpickler):
    """Loads containers, text, numbers and NumPy arrays; imports nothing, whatever is asked for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"it wants to import {module}.{name}; only NumPy arrays are loaded")
        found = NUMPY_GLOBALS[module, name]
        # of functions a new one: a pickle can set attributes of what it is given
        return found if isinstance(found, type) else lambda *args: found(*args)


def _members(value: Any) -> Sequence[Any] | None:
    """Members of a list or an array, None for anything else."""
    if isinstance(value, np.ndarray):
        return value if value.ndim and value.dtype.kind in "iufO" else None  # type: ignore[return-value]
    return value if isinstance(value, list | tuple) else None


def _numbers(value: Any, shape: tuple[int | None, ...], where: str, need: str) -> np.ndarray:
    """Numbers of a shape, where None is any length of at least 1; no text, no ``true``, none that is not finite.

    The shape is looked at first, as a file of a kilobyte can hold lists in lists of billions of members.
    """
    found: list[Any] = [value]
    fits = True
    for length in shape:
        lists = [members for v in found if (members := _members(v)) is not None]
        fits &= len(lists) == len(found) and all(0 < len(v) == (length or len(v)) for v in lists)
        found = [v for members in lists for v in members] if fits else []
    numbers: Any = (int, float, np.integer, np.floating)
    fits &= all(isinstance(v, numbers) and not isinstance(v, bool) and abs(v) <= LARGEST_NUMBER for v in found)
    if not fits:
        raise UserError(f"{where}: got {short(value, 60)}, need {need}")
    return np.array(found, np.float64).reshape([length or -1 for length in shape])


def _field(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where}: {key!r} is missing")
    return record[key]


def _read_sti(content: dict[str, Any], path: str, images: str | None, grid: tuple[int, int]) -> Scanpaths:
    trials: list[Trial] = []
    for name, record in content.items():
        trials += _sti_trials(record, name, f"{path}: record {name!r}", images, grid)
    if not trials:
        raise UserError(f"{path}: holds no record")
    lengths = np.array([len(t.sequence) for t in trials])
    longest = lengths.mean() + 3 * lengths.std()
    kept = [t for t in trials if len(t.sequence) <= longest]
    note = f"{len(trials) - len(kept)} of {len(trials)} left out: over {longest:.1f} fixations (mean + 3 deviations)"
    return Scanpaths(kept, grid, note)


def _sti_trials(record: Any, name: str, where: str, images: str | None, grid: tuple[int, int]) -> Iterator[Trial]:
    """What the viewers of one image did."""
    width, height = size = _sti_size(record, where)
    boxes, coords = grid_boxes(grid, (width / grid[1], height / grid[0]))
    (target,) = assign(_sti_target(record, size, where), boxes)
    image = Path(images) / name if images else None
    if image:
        try:
            read_image(image)  # now, as the first epoch that needs it may be hours away
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    scene = Scene(name, boxes, coords, (round(width), round(height)), image)
    fixations = _field(record, "fixations", where)
    if not isinstance(fixations, dict) or not fixations:
        raise UserError(f"{where}, fixations: got {short(fixations, 60)}, need viewer: [[x, y], ...]")
    for viewer, points in fixations.items():
        who = f"{where}, fixations of viewer {viewer!r}"
        xy = _numbers(points, (None, 2), who, "[[x, y], ...] in pixels")
        _check_gaze(xy, scene.screen, who)
        yield Trial(scene, target, assign(torch.from_numpy(xy).float(), boxes), str(viewer), "sti")


def _sti_size(record: Any, where: str) -> tuple[float, float]:
    """Width and height of an image."""
    size = _field(record, "size", where)
    width, height = (
        _numbers(_field(size, k, f"{where}, size"), (), f"{where}, size", f"a positive {k}").item()
        for k in ("width", "height")
    )
    if not 1 <= min(width, height) <= max(width, height) <= LARGEST_SCREEN:
        need = f"a positive width and height of at most {LARGEST_SCREEN:,} pixels"
        raise UserError(f"{where}, size: got {width:g}x{height:g}, need {need}")
    return width, height


def _sti_target(record: Any, size: tuple[float, float], where: str) -> Tensor:
    """Centre ``[1, 2]`` of the target's box."""
    width, height = size
    truth = _field(record, "ground_truth", where)
    if not isinstance(truth, list) or not truth:
        raise UserError(f"{where}, ground_truth: got {short(truth, 60)}, need a list with the target's box")
    sides = ("xmin", "xmax", "ymin", "ymax")
    values = [_field(truth[0], k, f"{where}, ground_truth") for k in sides]
    x1, x2, y1, y2 = _numbers(values, (4,), f"{where}, ground_truth", "four numbers").tolist()
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise UserError(f"{where}, ground_truth: box {values} as {sides} is not inside {width:g}x{height:g}")
    return torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2]])


def _check_gaze(points: np.ndarray, screen: tuple[int, int], where: str) -> None:
    """Refuse fixations ``[T, 2]`` that are off the screen by more than a tenth of its sides."""
    far = MARGIN * np.array(screen)
    off = (points < -far) | (points > np.array(screen) + far)
    if off.any():
        x, y = points[off.any(1)][0]
        raise UserError(f"{where}: got ({x:g}, {y:g}), far outside the screen of {screen[0]}x{screen[1]} pixels")


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
        need = f"{len(sequence)} pixels, one a fixation"
        axes = {
            axis: _numbers(record[axis], (len(sequence),), f"{where}, {axis}", need)
            for axis in ("X", "Y")
            if record.get(axis) is not None
        }
        screen = SHELF_SCREEN if n in SHELVES else OTHER_SCREEN
        if grid is None and len(axes) == 2:  # a grid that is given may be of a screen that nobody told us
            _check_gaze(np.stack([axes["X"], axes["Y"]], 1), screen, f"{where}, X and Y")
        layout, task, viewer = (_label(record, k, v, where) for k, v in (("layout_id", i), ("id", n), ("sub_id", "")))
        # the crops of a layout hang on the target too, so only equal ones are shared
        key = (task, layout, None if crops is None else hash(crops.numpy().tobytes()))
        scene = scenes.setdefault(key, Scene(layout, boxes, coords, screen, crops=crops))
        trials.append(Trial(scene, target[0], sequence, viewer, task))
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
    return (shelf, *grid_boxes(shelf, (OTHER_SCREEN[0] / shelf[1], OTHER_SCREEN[1] / shelf[0])))


def _label(record: dict[str, Any], key: str, default: Any, where: str) -> str:
    value = record.get(key, default)
    if not isinstance(value, str | int | float | np.generic):
        raise UserError(f"{where}, {key}: got {short(value, 60)}, need text or a number")
    return str(value) if isinstance(value, str) else short(value)


def _objects(value: Any, n: int, where: str) -> list[int]:
    """Zero-based indices of one-based objects."""
    values = [value] if _members(value) is None else value
    array = _numbers(values, (None,), where, "object numbers")
    if (array != array.round()).any() or array.min() < 1 or array.max() > n:
        raise UserError(f"{where}: got {short(value, 60)}, need whole numbers from 1 to {n}")
    return [int(v) - 1 for v in array]


def _crops(value: Any, where: str) -> Tensor:
    """Crops ``[N, 3, h, w]`` of arrays ``[h, w, 3]`` of one size; whole numbers are divided by 255."""
    where = f"{where}, question_img_feature"
    shape: list[int] = []
    first: Any = value
    while (members := _members(first)) is not None and len(members) and len(shape) < 5:
        shape.append(len(members))
        first = members[0]
    if len(shape) != 4 or shape[3] != 3 or shape[0] > MOST_OBJECTS or math.prod(shape[:3]) > MOST_PIXELS:
        limits = f"{MOST_OBJECTS:,} crops and {MOST_PIXELS:,} pixels"
        raise UserError(f"{where}: got {shape}, need finite numbers [N, h, w, 3] of at most {limits}")
    try:
        array = np.stack([np.asarray(crop) for crop in value])
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{where}: need N crops [h, w, 3] of one size ({e})") from None
    with np.errstate(over="ignore"):
        pixels = array.astype(np.float32) if array.dtype.kind in "uif" else None
    if array.ndim != 4 or pixels is None or not np.isfinite(pixels).all():
        raise UserError(f"{where}: got {list(array.shape)} of {array.dtype}, need finite numbers [N, h, w, 3]")
    crops = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
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

    Raises:
        UserError: For a grid or a number of trials that no memory holds.
    """
    _check_grid(grid)
    if n * math.prod(grid) > MOST_CROPS:
        need = f"at most {MOST_CROPS:,} crops in all"
        raise UserError(f"--trials {n} of --grid {grid[0]} {grid[1]}: {need}")
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
    image = read_image(path).resize((size[1], size[0]))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _cut(scene: Scene, size: tuple[int, int]) -> Tensor:
    """Crops ``[N, 3, h, w]`` of a scene's image as bytes; blank ones, as small as may be, when there is no image."""
    if scene.image is None:
        return torch.zeros(len(scene.boxes), 3, *size, dtype=torch.uint8)
    image = read_image(scene.image)
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
