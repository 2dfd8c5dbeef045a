"""Detection and segmentation data, checked before training starts: every bad record is named with its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHOWN = 10  # records named in a message
FULL_CHECK_LIMIT = 20_000  # more files are not opened, only looked for
RARE = 1e-3  # empty annotations below this share are no error: COCO has some itself, and every loader drops them
SLACK = 1.0  # pixels that a box may stand out by rounding


def check_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> None:
    """Check a COCO annotation file and its images.

    Args:
        annotation_file: JSON with ``images``, ``annotations`` and ``categories``.
        image_folder: Folder that ``file_name`` of the images is relative to.
        classes: Names of the classes that are trained; None for all.  Others are left out in training, so only names
            that the file does not have are an error.
        labelled: Whether there must be annotations.

    Raises:
        ValueError: For a file that cannot be read; or names the first ten bad records and how many there are.
    """
    data = _read_json(annotation_file)
    for key, needed in (("images", True), ("categories", True), ("annotations", labelled)):
        if needed and (not isinstance(data.get(key), list) or not data[key]):
            raise ValueError(f"annotation file {str(annotation_file)!r} has no {key!r}, a list that is not empty")
    names = [c.get("name") for c in data["categories"]]
    absent = [c for c in classes or () if c not in names]
    if absent:
        raise ValueError(
            f"annotation file {str(annotation_file)!r} has no category {absent[0]!r}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, which the classes ask for; "
            f"it has {', '.join(map(str, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}"
        )
    images = {i.get("id"): i for i in data["images"]}
    bad = list(_twice("image", data["images"]))
    bad += [
        (f"image {i.get('id')}", reason)
        for i, reason in zip(
            data["images"], _image_problems(data["images"], Path(image_folder), str(image_folder)), strict=True
        )
        if reason
    ]
    annotations = data.get("annotations") or []
    ids = {c.get("id") for c in data["categories"]}
    empty: list[tuple[str, str]] = []
    bad += _twice("annotation", annotations)
    for annotation in annotations:
        record = f"annotation {annotation.get('id')}"
        reason = _reference_problem(annotation, images, ids) or _box_problem(annotation, images)
        if reason:
            bad.append((record, reason))
        elif reason := _empty_problem(annotation):
            empty.append((record, reason))
    if len(empty) > RARE * len(annotations):
        bad += empty
    _refuse(f"annotation file {str(annotation_file)!r}", bad)


def _read_json(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"annotation file {str(file)!r} does not exist")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"annotation file {str(file)!r} is no JSON: {e}") from None
    if not isinstance(data, dict):
        raise ValueError(f"annotation file {str(file)!r} is no COCO file: got a {type(data).__name__}, need an object")
    return data


def _twice(kind: str, records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    seen: set[Any] = set()
    for record in records:
        if record.get("id") in seen or record.get("id") is None:
            yield f"{kind} {record.get('id')}", "the id is missing or used twice"
        seen.add(record.get("id"))


def _image_problems(images: list[dict[str, Any]], folder: Path, name: str) -> Iterator[str | None]:
    if not folder.is_dir():
        raise ValueError(f"image folder {name!r} does not exist")
    opened = len(images) <= FULL_CHECK_LIMIT

    def problem(image: dict[str, Any]) -> str | None:
        file, size = image.get("file_name"), (image.get("width"), image.get("height"))
        if not isinstance(file, str) or not all(isinstance(side, int) and side > 0 for side in size):
            return f"file_name={file!r}, width={size[0]!r}, height={size[1]!r}: need a name and numbers above 0"
        path = folder / file
        if not path.is_file():
            return f"image {str(path)!r} does not exist"
        if not opened:
            return None
        found = _size(path)
        if isinstance(found, str):
            return found
        if found not in (size, size[::-1]):  # cameras store portraits lying
            return f"image {str(path)!r} is {found[0]}x{found[1]}, the record says {size[0]}x{size[1]}"
        return None

    return iter(_map(problem, images))


def _reference_problem(annotation: dict[str, Any], images: dict[Any, Any], ids: set[Any]) -> str | None:
    if annotation.get("image_id") not in images:
        return f"image_id {annotation.get('image_id')!r} is no image of the file"
    if annotation.get("category_id") not in ids:
        return f"category_id {annotation.get('category_id')!r} is none of the file's {len(ids)} categories"
    return None


def _box_problem(annotation: dict[str, Any], images: dict[Any, Any]) -> str | None:
    image, box = images[annotation["image_id"]], annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"bbox {box!r} is not four numbers x, y, width, height"
    x, y, w, h = box
    width, height = image.get("width"), image.get("height")
    if not (_is_number(width) and _is_number(height)):
        return None  # reported with the image
    if w < 0 or h < 0 or min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        return f"bbox {box} lies outside its image of {width}x{height} pixels"
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        if list(shape.get("size", [])) != [height, width]:
            return f"mask of size {shape.get('size')} (height, width) in an image of {width}x{height} pixels"
    elif shape and any(not isinstance(p, list) or len(p) < 6 or len(p) % 2 for p in shape):
        return "a polygon of the segmentation has fewer than 3 points, or half a point"
    return None


def _empty_problem(annotation: dict[str, Any]) -> str | None:
    _, _, w, h = annotation["bbox"]
    if w == 0 or h == 0:
        return f"bbox {annotation['bbox']} is empty"
    if "segmentation" in annotation and not annotation["segmentation"]:
        return "the segmentation is empty"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_masks(
    image_folder: str | Path,
    mask_folder: str | Path,
    num_classes: int,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    reduce_zero_label: bool = False,
    ignore_index: int = 255,
    names: Sequence[str] | None = None,
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

    Raises:
        ValueError: For a missing folder or one without images; or names the first ten bad files and how many there are.
    """
    for what, folder in (("image", image_folder), ("mask", mask_folder)):
        if not Path(folder).is_dir():
            raise ValueError(f"{what} folder {str(folder)!r} does not exist")
    if names is None:
        paths = sorted(Path(image_folder).rglob(f"*{image_suffix}"))
        names = [p.relative_to(image_folder).as_posix().removesuffix(image_suffix) for p in paths]
    if not names:
        raise ValueError(f"image folder {str(image_folder)!r} holds no image that ends in {image_suffix!r}")
    first, last = (1, num_classes) if reduce_zero_label else (0, num_classes - 1)
    ignored = {ignore_index, 0} if reduce_zero_label else {ignore_index}
    opened = len(names) <= FULL_CHECK_LIMIT

    def problem(name: str) -> tuple[str | None, bool]:
        """Why a pair is bad, and whether it is merely empty."""
        image, mask = Path(image_folder, name + image_suffix), Path(mask_folder, name + mask_suffix)
        for what, path in (("image", image), ("mask", mask)):
            if not path.is_file():
                return f"{what} {str(path)!r} does not exist", False
        if not opened:
            return None, False
        size, mask_size = _size(image), _size(mask)
        for found in (size, mask_size):
            if isinstance(found, str):
                return found, False
        if size != mask_size:
            return f"mask {str(mask)!r} is {_text(mask_size)} pixels, its image {_text(size)}", False
        try:
            with Image.open(mask) as file:
                values = np.unique(np.asarray(file)) if len(file.getbands()) == 1 else None
        except OSError as e:
            return f"mask {str(mask)!r} cannot be read: {e}", False
        if values is None:
            return f"mask {str(mask)!r} has several channels, need one that holds class ids", False
        classes = [int(v) for v in values if int(v) not in ignored]
        wrong = [v for v in classes if not first <= v <= last]
        if wrong:
            return f"mask {str(mask)!r} holds class id {wrong[0]}, need {first} to {last} or {ignore_index}", False
        return (None, False) if classes else (f"mask {str(mask)!r} holds no class at all", True)

    found = [(name, *result) for name, result in zip(names, _map(problem, names), strict=True)]
    empty = [(name, reason) for name, reason, is_empty in found if reason and is_empty]
    bad = [(name, reason) for name, reason, is_empty in found if reason and not is_empty]
    _refuse(f"mask folder {str(mask_folder)!r}", bad + (empty if len(empty) > RARE * len(names) else []))


def _text(size: Any) -> str:
    return f"{size[0]}x{size[1]}"


def _size(path: Path) -> tuple[int, int] | str:
    """Width and height by the file's header, or why it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as e:
        return f"image {str(path)!r} cannot be read: {e}"


def _map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _refuse(file: str, bad: list[tuple[str, str]]) -> None:
    if not bad:
        return
    lines = [f"  {record}: {reason}" for record, reason in bad[:SHOWN]]
    more = [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    raise ValueError("\n".join([f"{file} has {len(bad)} bad record{'s' * (len(bad) > 1)}:", *lines, *more]))
