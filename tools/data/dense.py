"""Data of ``vizoo train --task detection`` and ``--task segmentation``: COCO, ADE20K and VOC folders, checked first."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from vizoo.tools.common import UserError, read_text, short
from vizoo.tools.data.checks import ClassIds, MaskFolder, check_masks, list_names
from vizoo.tools.data.coco import Annotation, Coco, Picture, read_coco
from vizoo.tools.data.folders import reordered, say_skipped, unreadable
from vizoo.tools.data.images import read_image, read_mask

IGNORED = 255  # value of mask pixels that count neither in the loss nor in the metrics
PARTS = ("train", "val")
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}  # of images/ and annotations/ (ADE20K)
TO_FLOAT: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]


@dataclass
class Parts:
    """Training and held-out data, and the names of the classes in the order of their ids."""

    train: Any
    val: Any
    classes: list[str]

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out of each part because they cannot be read."""
        return {"train": self.train.skipped, "val": self.val.skipped}

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``, as a model knows it that was trained with another order."""
        self.classes = reordered(self.classes, order)
        self.train.reorder(order)
        self.val.reorder(order)


class Boxes(Dataset):
    """The images and objects of a COCO file.

    Args:
        coco: The file.
        folder: Images.
        masks: Whether to read the outlines too.
        transform: Of torchvision's v2; takes image and target.
        drop_empty: Leave out images without an object, as in training.
        skipped: Images that were left out because they cannot be read.
    """

    def __init__(
        self, coco: Coco, folder: Path, masks: bool, transform: Any, drop_empty: bool, skipped: int = 0
    ) -> None:
        self.classes = list(coco.categories.values())
        self.label = {key: i for i, key in enumerate(coco.categories, 1)}  # 0 is the background
        found: dict[Any, list[Annotation]] = {image.id: [] for image in coco.images}
        for annotation in coco.annotations:
            if annotation.image_id in found and not annotation.empty and (annotation.segmentation or not masks):
                found[annotation.image_id].append(annotation)
        self.images = coco.images
        if drop_empty:
            self.images = [i for i in self.images if any(not a.crowd for a in found[i.id])]
        self.found, self.folder, self.masks, self.transform = found, folder, masks, transform
        self.drop_crowds, self.skipped = drop_empty, skipped

    def __len__(self) -> int:
        return len(self.images)

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``."""
        self.label = {key: order[label - 1] + 1 for key, label in self.label.items()}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Image ``[3, H, W]``; boxes ``[n, 4]``, labels ``[n]``, iscrowd ``[n]`` and masks ``[n, H, W]``.

        Raises:
            ImageError: As :func:`vizoo.tools.data.images.read_image`.
        """
        record = self.images[index]
        image = _tensor(_read_picture(self.folder, record))
        height, width = image.shape[1:]
        rows = [a for a in self.found[record.id] if not (self.drop_crowds and a.crowd)]
        corners = torch.tensor([a.bbox for a in rows], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
            "labels": torch.tensor([self.label[a.category_id] for a in rows], dtype=torch.int64),
            "iscrowd": torch.tensor([int(a.crowd) for a in rows], dtype=torch.int64),
        }
        if self.masks:
            masks = [outline(a.segmentation, height, width) for a in rows]
            stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        image, target = self.transform(image, target)
        target["boxes"] = target["boxes"].as_subclass(torch.Tensor)
        if self.masks:
            target["masks"] = target["masks"].as_subclass(torch.Tensor)
        return image.as_subclass(torch.Tensor), target


class Masks(Dataset):
    """Images and their masks of class ids.

    Args:
        pairs: Image and mask files.
        ids: What the masks may hold.
        transform: Of torchvision's v2; takes image and mask.
        skipped: Pairs that were left out because they cannot be read.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], ids: ClassIds, transform: Any, skipped: int = 0) -> None:
        self.pairs, self.ids, self.transform, self.skipped = list(pairs), ids, transform, skipped
        self.order: np.ndarray | None = None  # of the ids, where it is another one than that of the files

    def __len__(self) -> int:
        return len(self.pairs)

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``."""
        self.order = np.array(order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image ``[3, h, w]`` and class ids ``[H, W]``, 255 where there is none; the same size in training.

        Raises:
            ImageError: As :meth:`read`.
        """
        image, mask = self.transform(*self.read(index))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image ``[3, H, W]`` in bytes and class ids ``[H, W]`` before the transform.

        Raises:
            ImageError: As :func:`vizoo.tools.data.images.read_image` and :class:`vizoo.tools.data.checks.ClassIds`.
        """
        image_file, mask_file = self.pairs[index]
        ids, turned = self.ids.read(mask_file)
        if self.order is not None:
            ids = np.where(ids == IGNORED, IGNORED, self.order[np.minimum(ids, len(self.order) - 1)])
        height, width = ids.shape
        image = read_image(image_file, size=(width, height), turned=turned or None)
        return _tensor(image), tv_tensors.Mask(torch.from_numpy(ids))


def _read_picture(folder: Path, record: Picture) -> Image.Image:
    return read_image(folder / record.file_name, size=record.size)


def _tensor(image: Image.Image) -> tv_tensors.Image:
    return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def outline(shape: Any, height: int, width: int) -> np.ndarray:
    """Mask ``[H, W]`` of a COCO segmentation: polygons, or run lengths, compressed or not."""
    from pycocotools import mask as coco

    if isinstance(shape, list):
        shape = coco.merge(coco.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = coco.frPyObjects(shape, height, width)
    found: np.ndarray = coco.decode(shape)
    return found


def detection_parts(root: str, masks: bool, hflip: float, checked: bool, skip_unreadable: bool = False) -> Parts:
    """Open a folder in the layout of COCO; the numbers of every record are checked.

    Args:
        root: Holds ``annotations/instances_train*.json`` and ``instances_val*.json``, and the images of each in a
            folder with the rest of that name, such as ``train2017/``.
        masks: Whether to read the outlines too.
        hflip: Probability of a mirrored training image.
        checked: Whether to look at every image first.
        skip_unreadable: Decode every image, and leave out those that cannot be read; ``skipped`` of the data counts
            them.

    Returns:
        The data.

    Raises:
        UserError: Without pycocotools, for another layout, bad records, or classes that differ between the two files.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("COCO files need pycocotools: install it with pip install 'vizoo[detection]'")
    opened = {part: _open_coco(root, part, checked, skip_unreadable) for part in PARTS}
    flip: list[Any] = [v2.RandomHorizontalFlip(hflip)] if hflip else []
    transforms = {"train": v2.Compose([*flip, *TO_FLOAT]), "val": v2.Compose(TO_FLOAT)}
    train, val = (
        Boxes(coco, folder, masks, transforms[part], part == "train", skipped)
        for part, (coco, folder, skipped) in opened.items()
    )
    names = [Path(coco.file).name for coco, _, _ in opened.values()]
    if train.classes != val.classes:
        raise UserError(f"--data {root!r}: {names[1]} has other categories than {names[0]}")
    if not len(train):
        raise UserError(f"--data {root!r}: no image of {names[0]} has an object")
    return Parts(train, val, train.classes)


def _open_coco(root: str, part: str, checked: bool, skip_unreadable: bool) -> tuple[Coco, Path, int]:
    """A part's file, the folder of its images, and how many of them are left out."""
    matches = sorted(Path(root).glob(f"annotations/instances_{part}*.json"))
    if len(matches) != 1:
        raise UserError(
            f"--data {root!r}: {len(matches)} files annotations/instances_{part}*.json, need one; its images are "
            f"in the folder named like the rest, such as {part}2017/"
        )
    name = matches[0].stem.removeprefix("instances_")
    folder = next((d for d in (Path(root, name), Path(root, "images", name)) if d.is_dir()), Path(root, name))
    coco = read_coco(matches[0], folder=folder if checked and not skip_unreadable else None)
    total = len(coco.images)
    if skip_unreadable:
        readers = [functools.partial(_read_picture, folder, image) for image in coco.images]
        coco.images = _readable(coco.images, [folder / image.file_name for image in coco.images], readers)
    return coco, folder, total - len(coco.images)


def _readable(items: Sequence[Any], files: Sequence[Path], readers: Sequence[Callable[[], Any]]) -> list[Any]:
    """The items whose files can be read; how many cannot is printed.

    Raises:
        UserError: If none can.
    """
    bad = unreadable(list(zip(files, readers, strict=True)))
    say_skipped(bad, len(items))
    kept = [item for item, file in zip(items, files, strict=True) if str(file) not in bad]
    if not kept:
        raise UserError(f"none of {len(items):,} images can be read: {next(iter(bad.values()))}")
    return kept


@dataclass(frozen=True)
class Crops:
    """How images of segmentation are prepared.

    Attributes:
        side: Of training crops, and the shorter one of held-out images, in pixels.
        scale: Smallest and largest factor of the random size of training images.
        hflip: Probability of a mirrored training image.
        mean: Of the backbone's images, for each channel.
        std: Their standard deviation.
    """

    side: int
    scale: tuple[float, float]
    hflip: float
    mean: Sequence[float]
    std: Sequence[float]

    def transforms(self) -> dict[str, v2.Compose]:
        """Transform of images and masks of each part."""
        normalize = [*TO_FLOAT, v2.Normalize(self.mean, self.std)]
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}  # the mean colour, after normalisation
        crop = v2.RandomCrop(self.side, pad_if_needed=True, fill=fill)  # type: ignore[arg-type]
        train = [_RandomSize(self.scale), *normalize, crop, v2.RandomHorizontalFlip(self.hflip)]
        return {"train": v2.Compose(train), "val": v2.Compose([_ShortSide(self.side), *normalize])}


def segmentation_parts(
    root: str, classes: int | None, reduce_zero_label: bool, crops: Crops, checked: bool, skip_unreadable: bool = False
) -> Parts:
    """Open a folder in the layout of ADE20K or of Pascal VOC.

    Args:
        root: Holds ``images/`` and ``annotations/`` with the folders ``training`` and ``validation``; or
            ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/train.txt`` and ``val.txt``; and perhaps
            ``classes.txt`` with a name on every line.
        classes: Their number; None for the lines of ``classes.txt``.
        reduce_zero_label: Values of masks are one more than the class, and 0 is no class.
        crops: How images are prepared.
        checked: Whether to look at every mask first.
        skip_unreadable: Decode every image, and leave out pairs of which one cannot be read; ``skipped`` of the data
            counts them.

    Returns:
        The data.

    Raises:
        UserError: For another layout, an unknown number of classes, more classes than masks can hold, or bad masks.
    """
    if not Path(root).is_dir():
        raise UserError(f"--data {root!r} is no folder")
    names = _class_names(Path(root, "classes.txt"), classes, IGNORED - reduce_zero_label)
    ids = ClassIds(len(names), reduce_zero_label, IGNORED)
    transforms = crops.transforms()
    opened = {part: _open_pairs(root, part, ids, checked, skip_unreadable) for part in PARTS}
    train, val = (Masks(pairs, ids, transforms[part], skipped) for part, (pairs, skipped) in opened.items())
    return Parts(train, val, names)


def _class_names(file: Path, count: int | None, most: int) -> list[str]:
    """Names of ``count`` classes, or of as many as a file lists; made up where there is none."""
    lines = read_text(file, "classes").split("\n") if file.exists() else []
    names = [line.strip() for line in lines if line.strip()]
    if count is None and not names:
        raise UserError(f"--num-classes is missing: {str(file)!r}, which could tell, does not exist")
    if count is not None and names and count != len(names):
        raise UserError(f"--num-classes {count}: {str(file)!r} has {len(names)} lines")
    count = len(names) or count or 0
    if not 0 < count <= most:
        raise UserError(f"--num-classes {count}: need 1 to {most}, as {IGNORED} in a mask is no class")
    _refuse_twice(file, names)
    return names or [f"class {i}" for i in range(count)]


def _open_pairs(
    root: str, part: str, ids: ClassIds, checked: bool, skip_unreadable: bool
) -> tuple[list[tuple[Path, Path]], int]:
    """Files of a part's images and masks, and how many pairs are left out."""
    folder = _layout(root, part)
    names = folder.listed()
    total = len(names)
    if skip_unreadable:
        pairs = [folder.pair(name) for name in names]
        readers = [functools.partial(_read_pair, *pair) for pair in pairs]
        names = _readable(names, [image for image, _ in pairs], readers)
    if checked:
        check_masks(replace(folder, names=names), ids, as_stored=True)
    return [folder.pair(name) for name in names], total - len(names)


def _refuse_twice(file: Path, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{short(str(file))} names {short(name)} {times} times")


def _read_pair(image: Path, mask: Path) -> None:
    read_image(image)
    read_mask(mask)


def _layout(root: str, part: str) -> MaskFolder:
    """Where the images and masks of a part lie, and their names: those of a list, or else all there are."""
    listed = Path(root, "ImageSets", "Segmentation", f"{part}.txt")
    folder = next((name for name in FOLDERS[part] if Path(root, "images", name).is_dir()), None)
    names: list[str] | None = None
    if folder:
        images, masks = Path(root, "images", folder), Path(root, "annotations", folder)
    elif listed.is_file():
        images, masks = Path(root, "JPEGImages"), Path(root, "SegmentationClass")
        names = read_text(listed, "list").split()
        _refuse_twice(listed, names)
    else:
        raise UserError(
            f"--data {root!r}: neither images/{FOLDERS[part][1]} (ADE20K) nor "
            f"ImageSets/Segmentation/{part}.txt (VOC) exists"
        )
    suffix = next((s for s in (".jpg", ".png", ".jpeg") if list_names(images, s)), ".jpg")
    if names is None:  # a mask without an image is an error too
        names = sorted({*list_names(images, suffix), *list_names(masks, ".png")})
    return MaskFolder(images, masks, suffix, ".png", names)


class _RandomSize(torch.nn.Module):
    """Scale image and mask by one random factor."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[Any, Any]:
        """Scaled image ``[3, h, w]`` and mask ``[h, w]``."""
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        return v2.functional.resize(image, size, antialias=True), v2.functional.resize(mask, size)


class _ShortSide(torch.nn.Module):
    """Scale the image alone: shorter side ``side``, longer at most four times that."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[Any, Any]:
        """Scaled image ``[3, h, w]`` and the mask as it is ``[H, W]``."""
        return v2.functional.resize(image, [self.side], max_size=4 * self.side, antialias=True), mask
