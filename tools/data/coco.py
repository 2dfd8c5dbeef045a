"""COCO files: one parser and check of their records; whoever gets a record need not look at its numbers again."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vizoo.tools.common import UserError, read_json, short
from vizoo.tools.data.checks import SHOWN, Bad, are_few, image_problem, in_threads, need_folder, refuse
from vizoo.tools.data.images import MOST_PIXELS

SLACK = 1.0  # pixels that a box may stand out by rounding
LARGEST_ID = 2**63 - 1


@dataclass(slots=True)
class Picture:
    """An image of a COCO file."""

    id: int | str
    file_name: str
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


@dataclass(slots=True)
class Annotation:
    """An object of a COCO file.

    Attributes:
        id: Of the record.
        image_id: Its image.
        category_id: Its class.
        bbox: x, y, width and height in pixels.
        crowd: Whether it stands for a group.
        segmentation: Polygons as lists of x, y, x, y, ...; or run lengths with ``size`` (height, width) and ``counts``,
            compressed to text or not; None without an outline.
        outlined: Whether the record speaks of an outline, perhaps an empty one.
    """

    id: int | str
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    crowd: bool
    segmentation: list[list[float]] | dict[str, Any] | None
    outlined: bool

    @property
    def empty(self) -> bool:
        """Whether the box is thinner than a pixel; such objects are left out, as in mmdet."""
        return self.bbox[2] < 1 or self.bbox[3] < 1


@dataclass(slots=True)
class Coco:
    """A COCO file, sorted by ids of images and categories; every reference leads to a record of the file."""

    file: str
    images: list[Picture]
    annotations: list[Annotation]
    categories: dict[int | str, str]


def read_coco(
    file: str | Path, labelled: bool = True, folder: str | Path | None = None, as_stored: bool = True
) -> Coco:
    """Read a COCO annotation file and check every record of it.

    Args:
        file: JSON with ``images``, ``annotations`` and ``categories``.  Ids are whole numbers, or text; polygons may
            reach beyond their image by no more than its size, boxes by no more than a pixel.
        labelled: Whether there must be annotations.
        folder: Look also at the images in this folder: by their headers; over 20,000 are only looked for.
        as_stored: Whether the reader takes an image as it is stored if its labels were drawn so.

    Returns:
        Its records.

    Raises:
        UserError: For a file that cannot be read; or names the first ten bad records and how many there are.
    """
    what = f"annotation file {short(str(file))}"
    data = _read_lists(file, what, labelled)
    bad: Bad = []
    images = {p.id: p for p in _records("image", data["images"], _picture, bad)}
    categories = dict(_records("category", data["categories"], _category, bad))
    bad += _repeated_names(categories)
    if folder is not None:
        bad += _picture_problems(list(images.values()), folder, as_stored)
    annotations = _annotations(data, images, categories, bad)
    refuse(what, bad, _empty(annotations), len(annotations))
    for kind, keys in (("image", images), ("category", categories)):
        if len({*map(type, keys)}) > 1:
            raise UserError(f"{what}: {kind} ids are whole numbers and text, need one of both")
    return Coco(str(file), [images[k] for k in sorted(images)], annotations, dict(sorted(categories.items())))


def _read_lists(file: str | Path, what: str, labelled: bool) -> dict[str, list[Any]]:
    """The lists of records of a file."""
    data = read_json(file, "annotation file")
    if not isinstance(data, dict):
        raise UserError(f"{what} is no COCO file: got a {type(data).__name__}, need an object")
    lists = {key: data.get(key) or [] for key in ("images", "categories", "annotations")}
    for key, found in lists.items():
        if not isinstance(found, list) or (not found and (labelled or key != "annotations")):
            raise UserError(f"{what} has no {key!r}, a list that is not empty")
    return lists


def _repeated_names(categories: dict[int | str, str]) -> Iterator[tuple[str, str]]:
    first: dict[str, int | str] = {}
    for key, name in categories.items():
        if first.setdefault(name, key) != key:
            yield f"category {key}", f"category {first[name]} has the name {short(name)} too"


def _picture_problems(pictures: Sequence[Picture], folder: str | Path, as_stored: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with images by their headers; over 20,000 are only looked for."""
    need_folder("image", folder)
    opened = are_few(pictures)

    def problem(image: Picture) -> str | None:
        return image_problem(Path(folder, image.file_name), image.size if opened else None, None, as_stored)

    for image, reason in zip(pictures, in_threads(problem, pictures), strict=True):
        if reason:
            yield f"image {image.id}", reason


def _annotations(
    data: dict[str, list[Any]], images: dict[int | str, Picture], categories: dict[int | str, str], bad: Bad
) -> list[Annotation]:
    """The good annotations of good images; the bad ones go to ``bad``."""
    # of a bad image too: that is told once, and not with each of its annotations
    known = {i for r in data["images"] if isinstance(r, dict) and _is_id(i := r.get("id"))}
    no_category = f"is none of the file's {len(categories)} categories"

    def parse(record: dict[str, Any]) -> Annotation | None:
        _need_known(record, "image_id", known, "is no image of the file")
        _need_known(record, "category_id", categories, no_category)
        image = images.get(record["image_id"])
        return None if image is None else _annotation(record, image)

    return [a for a in _records("annotation", data["annotations"], parse, bad) if a]


def _empty(annotations: Sequence[Annotation]) -> Bad:
    """Annotations without an object."""
    return [
        (f"annotation {a.id}", f"bbox {list(a.bbox)} is below a pixel" if a.empty else "the segmentation is empty")
        for a in annotations
        if a.empty or (a.outlined and not a.segmentation)
    ]


def _records(kind: str, records: list[Any], parse: Callable[[dict[str, Any]], Any], bad: Bad) -> Iterator[Any]:
    """The good records of a list; the others go to ``bad``."""
    seen: set[Hashable] = set()
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            bad.append((f"{kind} number {i}", f"got {short(record)}, need an object"))
            continue
        key = record.get("id")
        name = f"{kind} {key}" if _is_id(key) else f"{kind} number {i}"
        try:
            if not _is_id(key):
                raise ValueError(f"id {short(key)} is no whole number and no text")
            if key in seen:
                raise ValueError("its id is used twice")
            seen.add(key)
            yield parse(record)
        except ValueError as e:
            bad.append((name, str(e)))


def _is_id(value: Any) -> bool:
    return (type(value) is int and abs(value) <= LARGEST_ID) or (type(value) is str and 0 < len(value) <= 200)


def _are_numbers(values: Any, low: float, high: float) -> bool:
    """Whether a list holds nothing but numbers between two; text, ``true`` and infinite ones are none."""
    return {*map(type, values)} <= {int, float} and low <= min(values) and max(values) <= high


def _picture(record: dict[str, Any]) -> Picture:
    name, sides = record.get("file_name"), [record.get(k) for k in ("width", "height")]
    if type(name) is not str or not name:
        raise ValueError(f"file_name={short(name)}: need a name")
    width, height = (side if type(side) is int else 0 for side in sides)
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        need = f"whole numbers above 0 of at most {MOST_PIXELS:,} pixels"
        raise ValueError(f"width={short(sides[0])}, height={short(sides[1])}: need {need}")
    return Picture(record["id"], name, width, height)


def _category(record: dict[str, Any]) -> tuple[int | str, str]:
    name = record.get("name")
    if type(name) is not str or not name.strip() or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"name {short(name)} is no text")
    return record["id"], name


def _need_known(record: dict[str, Any], key: str, known: Container[Any], what: str) -> None:
    value = record.get(key)
    if not _is_id(value) or value not in known:
        raise ValueError(f"{key} {short(value)} {what}")


def _annotation(record: dict[str, Any], image: Picture) -> Annotation:
    box, crowd, area = record.get("bbox"), record.get("iscrowd", 0), record.get("area", 0)
    limit = 4.0 * MOST_PIXELS
    if type(box) is not list or len(box) != 4 or not _are_numbers(box, -limit, limit):
        raise ValueError(f"bbox {short(box)} is not four numbers x, y, width, height")
    x, y, w, h = box
    if w < 0 or h < 0 or min(x, y) < -SLACK or x + w > image.width + SLACK or y + h > image.height + SLACK:
        raise ValueError(f"bbox {short(box)} lies outside its image of {image.width}x{image.height} pixels")
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        raise ValueError(f"iscrowd {short(crowd)} is neither 0 nor 1")
    if area is not None and not _are_numbers([area], 0, limit):
        raise ValueError(f"area {short(area)} is no number from 0 on")
    shape = record.get("segmentation")
    if shape is not None and shape != []:
        _check_run_lengths(shape, image) if isinstance(shape, dict) else _check_polygons(shape, image)
    return Annotation(
        id=record["id"],
        image_id=image.id,
        category_id=record["category_id"],
        bbox=(x, y, w, h),
        crowd=bool(crowd),
        segmentation=shape or None,
        outlined="segmentation" in record,
    )


def _check_polygons(shape: Any, image: Picture) -> None:
    if type(shape) is not list or any(type(p) is not list for p in shape):
        raise ValueError(f"segmentation {short(shape)} is no list of polygons and no object with run lengths")
    for polygon in shape:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of the segmentation has fewer than 3 points, or half a point")
        sides = ((polygon[0::2], image.width), (polygon[1::2], image.height))
        if not all(_are_numbers(values, -side, 2 * side) for values, side in sides):
            raise ValueError(
                f"a polygon of the segmentation holds what is no number, or lies beyond its image of "
                f"{image.width}x{image.height} pixels by more than the image: {short(polygon)}"
            )


def _check_run_lengths(shape: dict[str, Any], image: Picture) -> None:
    size, counts = shape.get("size"), shape.get("counts")
    if type(size) is not list or [*map(type, size)] != [int, int] or size != [image.height, image.width]:
        raise ValueError(
            f"mask of size {short(size)} (height, width) in an image of {image.width}x{image.height} pixels"
        )
    pixels = image.width * image.height
    if type(counts) is str:
        total = _decoded_sum(counts, pixels)
    elif (
        type(counts) is list and counts and {*map(type, counts)} == {int} and 0 <= min(counts) <= max(counts) <= pixels
    ):
        total = sum(counts)
    else:
        raise ValueError(f"run lengths {short(counts)} are no text and no list of whole numbers of 0 to {pixels:,}")
    if total != pixels:
        raise ValueError(f"run lengths add up to {total:,} pixels in an image of {image.width}x{image.height}")


def _decoded_sum(text: str, pixels: int) -> int:
    """Sum of COCO's compressed run lengths: groups of 5 bits, the lowest first, each but the first three a difference.

    Raises:
        ValueError: If the text is no such code.
    """
    wrong = ValueError(f"run lengths {short(text)} are no compressed counts of COCO")
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63:
        raise wrong
    ends = np.flatnonzero(codes < 32)
    starts = np.r_[0, ends[:-1] + 1]
    lengths = ends - starts + 1
    if not ends.size or ends[-1] != codes.size - 1 or lengths.max() > 7:
        raise wrong
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << 5 * place, starts)
    values -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    counts = values.copy()
    counts[1::2], counts[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    if counts.min() < 0 or counts.max() > pixels:
        raise wrong
    return int(counts.sum())


def check_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> None:
    """Check a COCO annotation file and its images for a reader that turns every image upright, as mmdet does.

    Args:
        annotation_file: As for :func:`read_coco`.
        image_folder: Folder that ``file_name`` of the images is relative to.
        classes: Names of the classes that are trained; None for all.  Others are left out in training, so only names
            that the file does not have are an error.
        labelled: Whether there must be annotations.

    Raises:
        UserError: As :func:`read_coco`; for classes that the file does not have; and for images that are missing or
            have another size than their record, upright.
    """
    data = read_coco(annotation_file, labelled, image_folder, as_stored=False)
    names = list(data.categories.values())
    absent = [c for c in classes or () if c not in names]
    if absent:
        raise UserError(
            f"annotation file {short(data.file)} has no category {absent[0]!r}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, which the classes ask for; "
            f"it has {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        )
