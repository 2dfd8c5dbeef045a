"""Data of ``vizoo train --task detection`` and ``--task segmentation``: COCO, ADE20K and VOC folders, checked first."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from vizoo.tools._check_data import check_coco, check_masks
from vizoo.tools.common import UserError

IGNORED = 255  # value of mask pixels that count neither in the loss nor in the metrics
PARTS = ("train", "val")
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}  # of images/ and annotations/ (ADE20K)


@dataclass
class Parts:
    """Training and held-out data, and the names of the classes in the order of their ids."""

    train: Any
    val: Any
    classes: list[str]

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``, as a model knows it that was trained with another order."""
        names = dict(zip(order, self.classes, strict=True))
        self.classes = [names[i] for i in range(len(names))]
        self.train.reorder(order)
        self.val.reorder(order)


class Boxes(Dataset):
    """A COCO annotation file and its images.

    Args:
        file: Annotations.
        folder: Images.
        masks: Whether to read the outlines too.
        transform: Of torchvision's v2; takes image and target.
        drop_empty: Leave out images without an object, as in training.
    """

    def __init__(self, file: Path, folder: Path, masks: bool, transform: Any, drop_empty: bool) -> None:
        data = json.loads(file.read_text(encoding="utf-8"))
        categories = sorted(data["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        label = {c["id"]: i + 1 for i, c in enumerate(categories)}  # 0 is the background
        found: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            x, y, w, h = annotation["bbox"]
            if w >= 1 and h >= 1 and not (masks and not annotation.get("segmentation")):
                found[annotation["image_id"]].append({**annotation, "label": label[annotation["category_id"]]})
        self.images = sorted(data["images"], key=lambda image: image["id"])
        if drop_empty:
            self.images = [i for i in self.images if any(not a.get("iscrowd") for a in found[i["id"]])]
        self.found, self.folder, self.masks, self.transform = found, folder, masks, transform
        self.drop_crowds = drop_empty

    def __len__(self) -> int:
        return len(self.images)

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``."""
        for rows in self.found.values():
            for row in rows:
                row["label"] = order[row["label"] - 1] + 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Image ``[3, H, W]``; boxes ``[n, 4]``, labels ``[n]``, iscrowd ``[n]`` and masks ``[n, H, W]``."""
        record = self.images[index]
        image = read_image(self.folder / record["file_name"])
        height, width = image.shape[1:]
        rows = [a for a in self.found[record["id"]] if not (self.drop_crowds and a.get("iscrowd"))]
        corners = torch.tensor([a["bbox"] for a in rows], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
            "labels": torch.tensor([a["label"] for a in rows], dtype=torch.int64),
            "iscrowd": torch.tensor([int(bool(a.get("iscrowd"))) for a in rows], dtype=torch.int64),
        }
        if self.masks:
            masks = [outline(a["segmentation"], height, width) for a in rows]
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
        reduce_zero_label: Values are one more than the class, and 0 is no class (ADE20K).
        transform: Of torchvision's v2; takes image and mask.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], reduce_zero_label: bool, transform: Any) -> None:
        self.pairs, self.reduce_zero_label, self.transform = list(pairs), reduce_zero_label, transform
        self.order: np.ndarray | None = None  # of the ids, where it is another one than that of the files

    def __len__(self) -> int:
        return len(self.pairs)

    def reorder(self, order: Sequence[int]) -> None:
        """Give class ``i`` the id ``order[i]``."""
        self.order = np.array(order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image ``[3, h, w]`` and class ids ``[H, W]``, 255 where there is none; the same size in training."""
        image_file, mask_file = self.pairs[index]
        with Image.open(mask_file) as f:
            ids = np.array(f).astype(np.int64)
        if self.reduce_zero_label:
            ids = np.where((ids == 0) | (ids == IGNORED), IGNORED, ids - 1)
        if self.order is not None:
            ids = np.where(ids == IGNORED, IGNORED, self.order[np.minimum(ids, len(self.order) - 1)])
        image, mask = self.transform(read_image(image_file), tv_tensors.Mask(torch.from_numpy(ids)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def read_image(file: Path) -> tv_tensors.Image:
    """RGB image ``[3, H, W]``, upright, in bytes."""
    with Image.open(file) as f:
        upright = ImageOps.exif_transpose(f)
        assert upright is not None
        return tv_tensors.Image(torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous())


def outline(shape: Any, height: int, width: int) -> np.ndarray:
    """Mask ``[H, W]`` of a COCO segmentation: polygons, or run lengths, compressed or not."""
    from pycocotools import mask as coco

    if isinstance(shape, list):
        shape = coco.merge(coco.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = coco.frPyObjects(shape, height, width)
    found: np.ndarray = coco.decode(shape)
    return found


def detection_parts(root: str, masks: bool, hflip: float, checked: bool) -> Parts:
    """Open a folder in the layout of COCO.

    Args:
        root: Holds ``annotations/instances_train*.json`` and ``instances_val*.json``, and the images of each in a
            folder with the rest of that name, such as ``train2017/``.
        masks: Whether to read the outlines too.
        hflip: Probability of a mirrored training image.
        checked: Whether to look at every record first.

    Returns:
        The data.

    Raises:
        UserError: Without pycocotools, for another layout, bad records, or classes that differ between the two files.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("COCO files need pycocotools: install it with pip install 'vizoo[detection]'")
    files, folders = {}, {}
    for part in PARTS:
        matches = sorted(Path(root).glob(f"annotations/instances_{part}*.json"))
        if len(matches) != 1:
            raise UserError(
                f"--data {root!r}: {len(matches)} files annotations/instances_{part}*.json, need one; its images are "
                f"in the folder named like the rest, such as {part}2017/"
            )
        files[part] = matches[0]
        name = matches[0].stem.removeprefix("instances_")
        folders[part] = next(
            (d for d in (Path(root, name), Path(root, "images", name)) if d.is_dir()), Path(root, name)
        )
        if checked:
            _check(check_coco, files[part], folders[part])
    flip: list[Any] = [v2.RandomHorizontalFlip(hflip)] if hflip else []
    train, val = v2.Compose([*flip, *_TO_FLOAT]), v2.Compose(_TO_FLOAT)
    first = Boxes(files["train"], folders["train"], masks, train, True)
    second = Boxes(files["val"], folders["val"], masks, val, False)
    if first.classes != second.classes:
        raise UserError(f"--data {root!r}: {files['val'].name} has other categories than {files['train'].name}")
    if not len(first):
        raise UserError(f"--data {root!r}: no image of {files['train'].name} has an object")
    return Parts(first, second, first.classes)


_TO_FLOAT: list[Any] = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]


def segmentation_parts(
    root: str,
    classes: int | None,
    reduce_zero_label: bool,
    crop: int,
    scale: tuple[float, float],
    hflip: float,
    statistics: tuple[Sequence[float], Sequence[float]],
    checked: bool,
) -> Parts:
    """Open a folder in the layout of ADE20K or of Pascal VOC.

    Args:
        root: Holds ``images/`` and ``annotations/`` with the folders ``training`` and ``validation``; or
            ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/train.txt`` and ``val.txt``; and perhaps
            ``classes.txt`` with a name on every line.
        classes: Their number; None for the lines of ``classes.txt``.
        reduce_zero_label: Values of masks are one more than the class, and 0 is no class.
        crop: Side of training crops in pixels.
        scale: Smallest and largest factor of the random size.
        hflip: Probability of a mirrored training image.
        statistics: Mean and standard deviation of the backbone's images.
        checked: Whether to look at every mask first.

    Returns:
        The data.

    Raises:
        UserError: For another layout, an unknown number of classes or bad masks.
    """
    base = Path(root)
    listed = base / "classes.txt"
    names = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
    names = [n.strip() for n in names if n.strip()]
    if classes is None and not names:
        raise UserError(f"--num-classes is missing: {str(listed)!r}, which could tell, does not exist")
    if classes is not None and names and classes != len(names):
        raise UserError(f"--num-classes {classes}: {str(listed)!r} has {len(names)} lines")
    names = names or [f"class {i}" for i in range(classes or 0)]
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for part in PARTS:
        images, masks, stems = _layout(base, root, part)
        suffix = next((s for s in (".jpg", ".png", ".jpeg") if any(images.glob(f"**/*{s}"))), ".jpg")
        if stems is None:
            both = ((images, suffix), (masks, ".png"))  # a mask without an image is an error too
            stems = sorted({p.relative_to(d).as_posix().removesuffix(s) for d, s in both for p in d.rglob(f"*{s}")})
        if checked:
            _check(check_masks, images, masks, len(names), suffix, ".png", reduce_zero_label, IGNORED, stems)
        pairs[part] = [(images / f"{s}{suffix}", masks / f"{s}.png") for s in stems]
    normalize = [*_TO_FLOAT, v2.Normalize(*statistics)]
    padded = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}  # the mean colour, after normalisation
    cut = [v2.RandomCrop(crop, pad_if_needed=True, fill=padded), v2.RandomHorizontalFlip(hflip)]  # type: ignore[arg-type]
    train, val = v2.Compose([_RandomSize(scale), *normalize, *cut]), v2.Compose([_ShortSide(crop), *normalize])
    return Parts(Masks(pairs["train"], reduce_zero_label, train), Masks(pairs["val"], reduce_zero_label, val), names)


def _layout(base: Path, root: str, part: str) -> tuple[Path, Path, list[str] | None]:
    """Folders of images and masks, and the names in a list, if there is one."""
    for name in FOLDERS[part]:
        if Path(base, "images", name).is_dir():
            return Path(base, "images", name), Path(base, "annotations", name), None
    listed = base / "ImageSets" / "Segmentation" / f"{part}.txt"
    if listed.is_file():
        return base / "JPEGImages", base / "SegmentationClass", listed.read_text(encoding="utf-8").split()
    raise UserError(
        f"--data {root!r}: neither images/{FOLDERS[part][1]} (ADE20K) nor "
        f"ImageSets/Segmentation/{part}.txt (VOC) exists"
    )


def _check(function: Any, *args: Any) -> None:
    try:
        function(*args)
    except ValueError as e:
        raise UserError(f"--data: {e}") from None


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
