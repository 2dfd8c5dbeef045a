"""Detection and segmentation data, checked before anything is done with it: every bad record is named with its file.

A COCO file has one parser, :func:`read_coco`; whoever gets a record from it need not look at its numbers again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vizoo.tools.common import UserError, check_file, read_json, short
from vizoo.tools.data.images import MOST_PIXELS, ImageError, check_header, list_files, read_mask

SHOWN = 10  # records named in a message
FULL_CHECK_LIMIT = 20_000  # more files are not opened, only looked for
RARE = 1e-3  # empty annotations below this share are no error: COCO has some itself, and every loader drops them
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
    data = read_json(file, "annotation file")
    if not isinstance(data, dict):
        raise UserError(f"{what} is no COCO file: got a {type(data).__name__}, need an object")
    for key, needed in (("images", True), ("categories", True), ("annotations", labelled)):
        found = data.get(key) or []
        if not isinstance(found, list) or (needed and not found):
            raise UserError(f"{what} has no {key!r}, a list that is not empty")
    bad: list[tuple[str, str]] = []
    pictures = {p.id: p for p in _records("image", data["images"], _picture, bad)}
    known = {i for r in data["images"] if isinstance(r, dict) and _is_id(i := r.get("id"))}  # bad ones are told once
    categories = dict(_records("category", data["categories"], _category, bad))
    first: dict[str, int | str] = {}
    for key, name in categories.items():
        if first.setdefault(name, key) != key:
            bad.append((f"category {key}", f"category {first[name]} has the name {short(name)} too"))
    no_category = f"is none of the file's {len(categories)} categories"

    def annotation(record: dict[str, Any]) -> Annotation | None:
        _need_known(record, "image_id", known, "is no image of the file")
        _need_known(record, "category_id", categories, no_category)
        picture = pictures.get(record["image_id"])
        return None if picture is None else _annotation(record, picture)

    if folder is not None:
        bad += _picture_problems(list(pictures.values()), folder, as_stored)
    annotations = [a for a in _records("annotation", data.get("annotations") or [], annotation, bad) if a]
    empty = [
        (f"annotation {a.id}", "the segmentation is empty" if not a.empty else f"bbox {list(a.bbox)} is below a pixel")
        for a in annotations
        if a.empty or (a.outlined and not a.segmentation)
    ]
    _refuse(what, bad + (empty if len(empty) > RARE * len(annotations) else []))
    for kind, keys in (("image", pictures), ("category", categories)):
        if len({*map(type, keys)}) > 1:
            raise UserError(f"{what}: {kind} ids are whole numbers and text, need one of both")
    return Coco(
        str(file), [pictures[k] for k in sorted(pictures)], annotations, {k: categories[k] for k in sorted(categories)}
    )


def _records(
    kind: str, records: list[Any], parse: Callable[[dict[str, Any]], Any], bad: list[tuple[str, str]]
) -> Iterator[Any]:
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


def _picture_problems(pictures: Sequence[Picture], folder: str | Path, as_stored: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with images by their headers; over 20,000 are only looked for."""
    _need_folder("image", folder)
    opened = len(pictures) <= FULL_CHECK_LIMIT

    def problem(image: Picture) -> str | None:
        return _image_problem(Path(folder, image.file_name), image.size if opened else None, None, as_stored)

    for image, reason in zip(pictures, _map(problem, pictures), strict=True):
        if reason:
            yield f"image {image.id}", reason


def _image_problem(path: Path, size: tuple[int, int] | None, turned: bool | None, as_stored: bool) -> str | None:
    try:
        if size is None:
            check_file(path, "image")
        elif check_header(path, size, turned) and not as_stored:
            return f"image {short(str(path))}: its labels are for its stored pixels, but its EXIF orientation turns it"
    except UserError as e:
        return str(e)
    return None


def _need_folder(what: str, folder: str | Path) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"{what} folder {short(str(folder))} does not exist")


def class_ids(
    path: str | Path, num_classes: int, reduce_zero_label: bool = False, ignore_index: int = 255
) -> tuple[np.ndarray, bool]:
    """Read a mask and check its values.

    Args:
        path: The mask.
        num_classes: Classes; values are 0 to ``num_classes - 1`` or ``ignore_index``.
        reduce_zero_label: Values are 1 to ``num_classes`` instead, and 0 is ignored.
        ignore_index: Value of pixels without a class.

    Returns:
        Class ids ``[H, W]`` from 0, ``ignore_index`` where there is none, int64; and whether the mask was turned.

    Raises:
        UnreadableImage: As :func:`vizoo.tools.data.images.read_mask`.
        ImageError: For another value.
    """
    values, turned = read_mask(path)
    ids = values.astype(np.int64)
    ignored = ids == ignore_index
    if reduce_zero_label:
        ignored |= ids == 0
        ids -= 1
    wrong = ids[~ignored & ((ids < 0) | (ids >= num_classes))]
    if wrong.size:
        first = int(reduce_zero_label)
        need = f"{first} to {num_classes - 1 + first} or {ignore_index}"
        raise ImageError(f"mask {short(str(path), 500)} holds class id {wrong[0] + first}, need {need}")
    ids[ignored] = ignore_index
    return ids, turned


def check_masks(
    image_folder: str | Path,
    mask_folder: str | Path,
    num_classes: int,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    reduce_zero_label: bool = False,
    ignore_index: int = 255,
    names: Sequence[str] | None = None,
    as_stored: bool = False,
) -> None:
    """Check images and their masks of class ids, one file with the same name for each.

    Args:
        image_folder: Images, also in sub-folders.
        mask_folder: Masks, gray or with a palette, in the same sub-folders.
        num_classes: Classes; values of a mask are 0 to ``num_classes - 1`` or ``ignore_index``.
        image_suffix: Ending of the images' names.
        mask_suffix: What replaces it in the masks' names.
        reduce_zero_label: Values are 1 to ``num_classes`` instead, and 0 is ignored.
        ignore_index: Value of pixels without a class.
        names: The images to check, without ending; None for all of the folder.
        as_stored: Whether the reader takes an image as it is stored if its mask was drawn so; mmseg does not.

    Raises:
        UserError: For a missing folder or one without images; or names the first ten bad files and how many there are.
    """
    _need_folder("image", image_folder)
    _need_folder("mask", mask_folder)
    if names is None:
        names = list_names(image_folder, image_suffix)
    if not names:
        raise UserError(f"image folder {short(str(image_folder))} holds no image that ends in {image_suffix!r}")
    opened = len(names) <= FULL_CHECK_LIMIT

    def problem(name: str) -> tuple[str | None, bool]:
        """Why a pair is bad, and whether it is merely empty."""
        image, mask = Path(image_folder, name + image_suffix), Path(mask_folder, name + mask_suffix)
        try:
            check_file(image, "image")
            check_file(mask, "mask")
            if not opened:
                return None, False
            ids, turned = class_ids(mask, num_classes, reduce_zero_label, ignore_index)
        except UserError as e:
            return str(e), False
        wrong = _image_problem(image, ids.shape[::-1], turned or None, as_stored)  # type: ignore[arg-type]
        if wrong:
            return wrong, False
        return (
            (f"mask {short(str(mask))} holds no class at all", True) if (ids == ignore_index).all() else (None, False)
        )

    found = [(name, *result) for name, result in zip(names, _map(problem, names), strict=True)]
    empty = [(name, reason) for name, reason, is_empty in found if reason and is_empty]
    bad = [(name, reason) for name, reason, is_empty in found if reason and not is_empty]
    _refuse(f"mask folder {short(str(mask_folder))}", bad + (empty if len(empty) > RARE * len(names) else []))


def list_names(folder: str | Path, suffix: str) -> list[str]:
    """Names of the files in a folder and its sub-folders that end alike, without that ending, sorted."""
    found = (p.relative_to(folder).as_posix() for p in list_files(folder))
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def _map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _refuse(file: str, bad: list[tuple[str, str]]) -> None:
    if not bad:
        return
    records = "; ".join(f"{record}: {reason}" for record, reason in bad[:SHOWN])
    more = f"; ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise UserError(f"{file} has {len(bad)} bad record{'s' * (len(bad) > 1)}: {records}{more}")
