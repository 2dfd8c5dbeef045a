"""Data sets and loaders of ``vizoo train``: handwritten digits or image folders, checked before training starts.

All randomness of step ``k`` of epoch ``e`` on process ``r`` follows from ``(seed, r, e, k)`` alone, see
:func:`seeded_batches`.  A resumed run therefore repeats an uninterrupted one without any stored generator state.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader
from torchvision import transforms

from vizoo.tools._images import ImageFolder, UnreadableImage, check_header, read_image
from vizoo.tools.common import UserError, progress

DIGITS_HELD_OUT = 360
FULL_CHECK_LIMIT = 20_000
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval")}


class Splits(NamedTuple):
    """Training and held-out images, both with a ``transform`` attribute that timm's loader sets."""

    train: Any
    held_out: Any
    classes: list[str]


class Digits(torch.utils.data.Dataset):
    """Handwritten digits of scikit-learn, 8x8 grey, drawn in the middle of a black 10x10 image."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, mode: str) -> None:
        self.images, self.targets, self.mode = images, targets, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return self.transform(image) if self.transform else image, int(self.targets[index])


def digits_splits(mode: str) -> Splits:
    """Split the digits into 1,437 training and 360 held-out images, the same in every run.

    Args:
        mode: Pillow mode, ``"L"`` or ``"RGB"``.

    Returns:
        Both splits; each class keeps its share.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.pad(np.rint(digits.images * (255 / 16)).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    parts = train_test_split(
        images, digits.target, test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )  # a fixed seed: runs with different --seed are compared on the same images
    return Splits(Digits(parts[0], parts[2], mode), Digits(parts[1], parts[3], mode), [str(i) for i in range(10)])


def folder_splits(
    root: str,
    train_split: str,
    val_split: str,
    mode: str,
    check: str,
    window: tuple[float, float] | None = None,
) -> Splits:
    """Open a folder with one sub-folder for each split and in it one sub-folder for each class.

    Args:
        root: Folder that holds the splits.
        train_split: Name of the training split; ``train`` also finds ``training``.
        val_split: Name of the held-out split; ``validation`` also finds ``val``, ``valid`` and ``eval``.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        check: ``full`` decodes every image, ``header`` opens it, ``none`` trusts it, ``auto`` decodes up to 20,000.
        window: Centre and width of the values that 16-bit gray and DICOM files show, instead of their own.

    Returns:
        Both splits with equal classes.

    Raises:
        UserError: For a missing folder, a split without classes, classes that differ, or an unreadable image.
    """
    train, held_out = (open_split(root, split, mode, window) for split in (train_split, val_split))
    ours, theirs = set(train.reader.class_to_idx), set(held_out.reader.class_to_idx)
    if ours != theirs:
        parts = [
            f"only in {Path(a.reader.root).name}/: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
            for a, names in ((train, ours - theirs), (held_out, theirs - ours))
            if names
        ]
        raise UserError(f"classes of the splits in {root!r} differ; {'; '.join(parts)}")
    if len(ours) < 2:
        raise UserError(f"{train.reader.root!r} holds one class, {next(iter(ours))!r}; training needs two or more")
    check_images([f for d in (train, held_out) for f, _ in d.reader.samples], check, window)
    return Splits(train, held_out, sorted(ours, key=lambda c: train.reader.class_to_idx[c]))


def open_split(root: str, split: str, mode: str, window: tuple[float, float] | None = None) -> Any:
    """Open one sub-folder with a folder for each class.

    Args:
        root: Folder that holds the splits.
        split: Name of one, see :func:`folder_splits`.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        window: As in :func:`folder_splits`.

    Returns:
        timm's data set; ``reader.class_to_idx`` are its classes.

    Raises:
        UserError: For a missing folder, a folder without classes or a class without images.
    """
    if not Path(root).is_dir():
        raise UserError(f"--data {root!r} is no folder; give 'digits' or a folder with train/ and val/")
    folder = _split_folder(Path(root), split)
    empty = [d.name for d in sorted(folder.iterdir()) if d.is_dir() and not any(p.is_file() for p in d.rglob("*"))]
    if empty:
        raise UserError(f"class folder {str(folder / empty[0])!r} holds no image")
    try:
        dataset = ImageDataset(str(folder), reader=ImageFolder(str(folder), mode, window), load_bytes=True)
    except RuntimeError:
        raise UserError(f"no image in {str(folder)!r}; expected one folder for each class with images") from None
    classes = dataset.reader.class_to_idx
    if "" in classes:
        stray = next(f for f, t in dataset.reader.samples if t == classes[""])
        raise UserError(f"image {stray!r} lies outside any class folder of {str(folder)!r}")
    return dataset


def reorder_classes(dataset: Any, order: Sequence[int]) -> None:
    """Give class ``i`` of a data set the index ``order[i]``, as a model knows it that was trained with another order.

    Args:
        dataset: Of :func:`digits_splits` or :func:`open_split`.
        order: New index of each class.
    """
    if isinstance(dataset, Digits):
        dataset.targets = np.array(order)[dataset.targets]
        return
    reader = dataset.reader
    reader.samples = [(file, order[target]) for file, target in reader.samples]
    reader.class_to_idx = {name: order[target] for name, target in reader.class_to_idx.items()}


def _split_folder(root: Path, split: str) -> Path:
    names = next((names for names in SPLIT_FOLDERS.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{str(root)!r} has no folder {' or '.join(repr(f'{n}/') for n in dict.fromkeys((split, *names)))}")


def check_images(files: list[str], how: str = "full", window: tuple[float, float] | None = None) -> None:
    """Open every image, so that a broken one is found now and not after hours.

    Args:
        files: Paths.
        how: ``full`` decodes every image, ``header`` opens it, ``none`` trusts it, ``auto`` decodes up to 20,000.
        window: As in :func:`vizoo.tools._images.read_image`.

    Raises:
        UserError: Names the first unreadable file and how many there are.
    """
    if how == "auto":
        how = "full" if len(files) <= FULL_CHECK_LIMIT else "header"
    if how == "none":
        return

    def problem(file: str) -> str | None:
        try:
            if how == "full":
                read_image(file, window=window)
            else:
                check_header(file)
        except UnreadableImage as e:
            return str(e)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress() as bar:
        reasons = bar.track(pool.map(problem, files), len(files), description="checking images")
        try:
            bad = [(file, reason) for file, reason in zip(files, reasons, strict=True) if reason]
        except ImportError as e:
            raise UserError(str(e)) from None
    if bad:
        more = f" (and {len(bad) - 1} more unreadable images)" if len(bad) > 1 else ""
        raise UserError(f"cannot read image {bad[0][0]!r}: {bad[0][1]}{more}")


def build_loaders(
    args: argparse.Namespace,
    splits: Splits,
    data_config: dict[str, Any],
    device: torch.device,
    num_classes: int,
    distributed: bool,
) -> tuple[Any, Any]:
    """Build timm's training and evaluation loaders.

    Args:
        args: Options of ``vizoo train``.
        splits: Both data sets.
        data_config: Of :func:`timm.data.resolve_data_config`.
        device: Where batches end up.
        num_classes: Width of mixed targets.
        distributed: Share the data between processes.

    Returns:
        Training loader and held-out loader.

    Raises:
        UserError: For augmentation options timm refuses.
    """
    shared = _shared(args, data_config, device, distributed)
    collate = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax:
        collate = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    try:
        train = create_loader(
            splits.train,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            interpolation=data_config["interpolation"] if args.no_aug else args.train_interpolation,
            collate_fn=collate,
            **shared,
        )
    except (AssertionError, KeyError, ValueError) as e:
        raise UserError(
            f"timm refuses the augmentation options (--aa {args.aa}, {type(e).__name__}: {e}); "
            "policies of --aa are rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0 and their variants"
        ) from None
    if (args.rotate or args.translate) and not args.no_aug:
        shift = transforms.RandomAffine(
            args.rotate, (args.translate,) * 2, interpolation=transforms.InterpolationMode.BILINEAR
        )
        splits.train.transform.transforms.insert(1, shift)  # after the crop: at full size, before the conversion
    held_out = held_out_loader(args, splits.held_out, data_config, device, distributed)
    if distributed:
        train.sampler.seed = args.seed  # torch's sampler shuffles by seed + epoch
    return train, held_out


def held_out_loader(
    args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], device: torch.device, distributed: bool = False
) -> Any:
    """Build timm's evaluation loader; arguments as for :func:`build_loaders`."""
    return create_loader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        **_shared(args, data_config, device, distributed),
    )


def _shared(
    args: argparse.Namespace, data_config: dict[str, Any], device: torch.device, distributed: bool
) -> dict[str, Any]:
    """What both loaders have in common."""
    return {
        **{k: data_config[k] for k in ("input_size", "mean", "std")},
        "num_workers": args.workers,
        "pin_memory": args.pin_mem,
        "device": device,
        "distributed": distributed,
        "persistent_workers": False,  # workers of an epoch start from its seed, so a resumed epoch is the same
        "worker_seeding": _start_worker,
    }


def _start_worker(info: Any) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the main process still finishes its step
    return int(info.seed)


def seed_everything(*words: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a few numbers."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seeded_batches(loader: Any, seed: int, rank: int, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Go once through a training loader with randomness that depends on the position only.

    All generators are seeded before each batch is fetched: shuffling and workers follow the first seed of the epoch,
    and augmentation in the main process, mixup, random erasing and the model's dropout on batch ``k`` follow the seed
    of ``(seed, rank, epoch, k)``.  Fetching batches without training on them leaves the later ones unchanged.

    Args:
        loader: Loader of :func:`timm.data.create_loader` or of torch.
        seed: Of the run.
        rank: Of this process.
        epoch: From 0.

    Yields:
        Images ``[B, C, H, W]`` and targets ``[B]``, or ``[B, classes]`` with mixup.
    """
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    seed_everything(seed, rank, epoch, 0)  # for the worker processes
    batches = iter(loader)
    for k in range(len(loader)):
        seed_everything(seed, rank, epoch, k)
        yield next(batches)
