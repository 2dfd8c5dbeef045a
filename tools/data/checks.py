"""Files and folders of images and masks, looked at before anything is done with them: every bad one is named."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vizoo.tools.common import UserError, check_file, short
from vizoo.tools.data.images import ImageError, check_header, list_files, read_mask

SHOWN = 10  # records named in a message
FULL_CHECK_LIMIT = 20_000  # files
RARE = 1e-3  # empty annotations below this share are no error: COCO has some itself, and every loader drops them

Bad = list[tuple[str, str]]  # names of records, and what is wrong with them


def refuse(file: str, bad: Bad, empty: Bad, total: int) -> None:
    """End with the first ten bad records of a file or folder and how many there are.

    Args:
        file: What holds them.
        bad: The bad records.
        empty: Records that are merely empty; a few of them are no error.
        total: How many records could be empty.

    Raises:
        UserError: If a record is bad, or more than one of 1,000 is empty.
    """
    bad = bad + (empty if len(empty) > RARE * total else [])
    if not bad:
        return
    records = "; ".join(f"{record}: {reason}" for record, reason in bad[:SHOWN])
    more = f"; ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise UserError(f"{file} has {len(bad)} bad record{'s' * (len(bad) > 1)}: {records}{more}")


def need_folder(what: str, folder: str | Path) -> None:
    """Refuse a folder that does not exist.

    Args:
        what: What it should hold, for the message.
        folder: The folder.

    Raises:
        UserError: If it does not exist.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{what} folder {short(str(folder))} does not exist")


def are_few(files: Sized) -> bool:
    """Whether files are few enough for each to be looked at closely."""
    return len(files) <= FULL_CHECK_LIMIT


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results of a function that reads files, in the order of the items."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


def image_problem(path: Path, size: tuple[int, int] | None, turned: bool | None, as_stored: bool) -> str | None:
    """What the header of an image tells is wrong with it.

    Args:
        path: The image.
        size: Width and height that its labels were drawn for; None only looks for the file.
        turned: As in :func:`vizoo.tools.data.images.read_image`.
        as_stored: Whether the reader takes an image as it is stored if its labels were drawn so.

    Returns:
        The message, None for a good image.
    """
    try:
        if size is None:
            check_file(path, "image")
        elif check_header(path, size, turned) and not as_stored:
            return f"image {short(str(path))}: its labels are for its stored pixels, but its EXIF orientation turns it"
    except UserError as e:
        return str(e)
    return None


@dataclass(frozen=True)
class ClassIds:
    """What the values of masks mean.

    Attributes:
        classes: Their number; values are 0 to ``classes - 1`` or ``ignored``.
        reduce_zero_label: Values are 1 to ``classes`` instead, and 0 is ignored (ADE20K).
        ignored: Value of pixels without a class.
    """

    classes: int
    reduce_zero_label: bool = False
    ignored: int = 255

    def read(self, path: str | Path) -> tuple[np.ndarray, bool]:
        """Read a mask and check its values.

        Args:
            path: The mask.

        Returns:
            Class ids ``[H, W]`` from 0, ``ignored`` where there is none, int64; and whether the mask was turned.

        Raises:
            UnreadableImage: As :func:`vizoo.tools.data.images.read_mask`.
            ImageError: For another value.
        """
        values, turned = read_mask(path)
        ids = values.astype(np.int64)
        ignored = ids == self.ignored
        if self.reduce_zero_label:
            ignored |= ids == 0
            ids -= 1
        wrong = ids[~ignored & ((ids < 0) | (ids >= self.classes))]
        if wrong.size:
            first = int(self.reduce_zero_label)
            need = f"{first} to {self.classes - 1 + first} or {self.ignored}"
            raise ImageError(f"mask {short(str(path), 500)} holds class id {wrong[0] + first}, need {need}")
        ids[ignored] = self.ignored
        return ids, turned


@dataclass(frozen=True)
class MaskFolder:
    """Images and their masks, two files of the same name.

    Attributes:
        images: Folder of images, also in sub-folders.
        masks: Folder of masks, gray or with a palette, in the same sub-folders.
        image_suffix: Ending of the images' names.
        mask_suffix: What replaces it in the masks' names.
        names: The images, without ending; None for all of the folder.
    """

    images: str | Path
    masks: str | Path
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    names: Sequence[str] | None = None

    def listed(self) -> Sequence[str]:
        """Names of the images.

        Raises:
            UserError: If there is none.
        """
        names = list_names(self.images, self.image_suffix) if self.names is None else self.names
        if not names:
            folder = short(str(self.images))
            raise UserError(f"image folder {folder} holds no image that ends in {self.image_suffix!r}")
        return names

    def pair(self, name: str) -> tuple[Path, Path]:
        """Files of an image and its mask."""
        return Path(self.images, name + self.image_suffix), Path(self.masks, name + self.mask_suffix)


def check_masks(folder: MaskFolder, ids: ClassIds, as_stored: bool = False) -> None:
    """Check images and their masks of class ids; over 20,000 are only looked for.

    Args:
        folder: The files.
        ids: What the masks may hold.
        as_stored: Whether the reader takes an image as it is stored if its mask was drawn so; mmseg does not.

    Raises:
        UserError: For a missing folder or one without images; or names the first ten bad files and how many there are.
    """
    need_folder("image", folder.images)
    need_folder("mask", folder.masks)
    names = folder.listed()
    known = ids if are_few(names) else None
    problem = functools.partial(_pair_problem, ids=known, as_stored=as_stored)
    bad: Bad = []
    empty: Bad = []
    for name, (reason, is_empty) in zip(names, in_threads(problem, map(folder.pair, names)), strict=True):
        if reason:
            (empty if is_empty else bad).append((name, reason))
    refuse(f"mask folder {short(str(folder.masks))}", bad, empty, len(names))


def _pair_problem(pair: tuple[Path, Path], ids: ClassIds | None, as_stored: bool) -> tuple[str | None, bool]:
    """Why an image and its mask are bad, and whether the mask is merely empty; without ``ids`` no file is opened."""
    image, mask = pair
    try:
        check_file(image, "image")
        check_file(mask, "mask")
        if ids is None:
            return None, False
        found, turned = ids.read(mask)
    except UserError as e:
        return str(e), False
    height, width = found.shape
    wrong = image_problem(image, (width, height), turned or None, as_stored)
    if wrong is None and (found == ids.ignored).all():
        return f"mask {short(str(mask))} holds no class at all", True
    return wrong, False


def list_names(folder: str | Path, suffix: str) -> list[str]:
    """Names of the files in a folder and its sub-folders that end alike, without that ending, sorted."""
    found = (p.relative_to(folder).as_posix() for p in list_files(folder))
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))
