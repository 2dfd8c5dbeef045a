"""Data sets and loaders of ``vizoo train``: handwritten digits or image folders, checked before training starts.

All randomness of step ``k`` of epoch ``e`` on process ``r`` follows from ``(seed, r, e, k)`` alone, see
:func:`seeded_batches`.  A resumed run therefore repeats an uninterrupted one without any stored generator state.
"""

from __future__ import annotations

import argparse
import functools
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torchvision import transforms

from vizoo.tools.common import UserError, is_first_process, progress
from vizoo.tools.data.checks import are_few, in_threads
from vizoo.tools.data.images import DICOM, UnreadableImage, check_header, list_files, read_image

DIGITS_HELD_OUT = 360
LEFT_OUT = -1  # in place of the index of a class
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval")}


class Splits(NamedTuple):
    """Training and held-out images; timm's loader sets ``transform`` of both, ``skipped`` counts those left out."""

    train: Any
    held_out: Any
    classes: list[str]


class Digits(torch.utils.data.Dataset):
    """Handwritten digits of scikit-learn, 8x8 grey, drawn in the middle of a black 10x10 image."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, mode: str) -> None:
        self.images, self.targets, self.mode = images, targets, mode
        self.transform: Any = None
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return self.transform(image) if self.transform else image, int(self.targets[index])


class ClassFolders(ReaderImageFolder):
    """timm's reader of class folders, for all that :func:`vizoo.tools.data.images.read_image` reads and no file twice.

    Args:
        root: Folder of class folders.
    """

    def __init__(self, root: str) -> None:
        super(ReaderImageFolder, self).__init__()
        kinds = {*get_img_extensions(), *DICOM}
        files = [f for f in list_files(root) if f.suffix.lower() in kinds]
        labels = ["" if f.parent == Path(root) else f.parent.name for f in files]
        self.root = root
        self.class_to_idx = {c: i for i, c in enumerate(sorted(set(labels), key=natural_key))}
        samples = [(str(f), self.class_to_idx[c]) for f, c in zip(files, labels, strict=True)]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))


class Images(ImageDataset):
    """timm's data set of class folders, but for an image that cannot be read: timm's own takes the next one for it.

    Args:
        root: Folder of class folders.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        window: As in :func:`vizoo.tools.data.images.read_image`.
    """

    def __init__(self, root: str, mode: str, window: tuple[float, float] | None) -> None:
        super().__init__(root, reader=ClassFolders(root))
        self.mode, self.window = mode, window
        self.skipped = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and class.

        Raises:
            UnreadableImage: As :func:`vizoo.tools.data.images.read_image`.
        """
        path, target = self.reader.samples[index]
        image = read_image(path, self.mode, self.window)
        return self.transform(image) if self.transform else image, target


def digits_splits(mode: str, only: Sequence[str] | None = None) -> Splits:
    """Split the digits into 1,437 training and 360 held-out images, the same in every run.

    Args:
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        only: Names of the digits to keep, ``"0"`` to ``"9"``; None for all.

    Returns:
        Both splits; each class keeps its share.

    Raises:
        UserError: As :func:`keep_classes`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.pad(np.rint(digits.images * (255 / 16)).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    parts = train_test_split(
        images, digits.target, test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )  # a fixed seed: runs with different --seed are compared on the same images
    train, held_out = Digits(parts[0], parts[2], mode), Digits(parts[1], parts[3], mode)
    names = [str(i) for i in range(10)]
    for part in (train, held_out):
        classes = keep_classes(part, names, only, "--data 'digits'")
    return Splits(train, held_out, classes)


def folder_splits(
    root: str,
    train_split: str,
    val_split: str,
    mode: str,
    check: str,
    window: tuple[float, float] | None = None,
    skip_unreadable: bool = False,
    only: Sequence[str] | None = None,
) -> Splits:
    """Open a folder with one sub-folder for each split and in it one sub-folder for each class.

    Args:
        root: Folder that holds the splits.
        train_split: Name of the training split; ``train`` also finds ``training``.
        val_split: Name of the held-out split; ``validation`` also finds ``val``, ``valid`` and ``eval``.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        check: ``full`` decodes every image, ``header`` opens it, ``none`` trusts it, ``auto`` decodes up to 20,000.
        window: Centre and width of the values that 16-bit gray, float and DICOM files show, instead of their own.
        skip_unreadable: Decode every image, whatever ``check`` is, and leave out those that cannot be read; they are
            counted in ``skipped`` of both data sets.
        only: Names of the classes to keep, None for all; the others' images are not opened.

    Returns:
        Both splits with equal classes.

    Raises:
        UserError: For a missing folder, a split without classes, classes that differ, or an unreadable image.
    """
    train, held_out = (_open_split(root, split, mode, window, only) for split in (train_split, val_split))
    ours, theirs = set(train.reader.class_to_idx), set(held_out.reader.class_to_idx)
    if ours != theirs:
        parts = [
            f"only in {Path(a.reader.root).name}/: {_some(sorted(names))}"
            for a, names in ((train, ours - theirs), (held_out, theirs - ours))
            if names
        ]
        raise UserError(f"classes of the splits in {root!r} differ; {'; '.join(parts)}")
    if len(ours) < 2:
        raise UserError(f"{train.reader.root!r} holds one class, {next(iter(ours))!r}; training needs two or more")
    _check_images((train, held_out), check, skip_unreadable)
    return Splits(train, held_out, sorted(ours, key=train.reader.class_to_idx.__getitem__))


def open_split(
    root: str,
    split: str,
    mode: str,
    check: str,
    window: tuple[float, float] | None = None,
    skip_unreadable: bool = False,
    only: Sequence[str] | None = None,
) -> Images:
    """Open one sub-folder with a folder for each class.

    Args:
        root: Folder that holds the splits.
        split: Name of one, see :func:`folder_splits`.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        check: As in :func:`folder_splits`.
        window: Likewise.
        skip_unreadable: Likewise.
        only: Likewise.

    Returns:
        The data set; ``reader.class_to_idx`` are its classes.

    Raises:
        UserError: For a missing folder, a folder without classes, a class without images, or an unreadable image.
    """
    dataset = _open_split(root, split, mode, window, only)
    _check_images((dataset,), check, skip_unreadable)
    return dataset


def _open_split(
    root: str, split: str, mode: str, window: tuple[float, float] | None, only: Sequence[str] | None
) -> Images:
    if not Path(root).is_dir():
        raise UserError(f"--data {root!r} is no folder; give 'digits' or a folder with train/ and val/")
    folder = _split_folder(Path(root), split)
    dataset = Images(str(folder), mode, window)
    classes = dataset.reader.class_to_idx
    if "" in classes:
        stray = next(f for f, t in dataset.reader.samples if t == classes[""])
        raise UserError(f"image {stray!r} lies outside any class folder of {str(folder)!r}")
    filled = {Path(f).relative_to(folder).parts[0] for f, _ in dataset.reader.samples}
    asked = [d.name for d in sorted(folder.iterdir()) if d.is_dir() and (not only or d.name in only)]
    empty = [name for name in asked if name not in filled]
    if empty:
        raise UserError(f"class folder {str(folder / empty[0])!r} holds no image")
    if not classes:
        raise UserError(f"no image in {str(folder)!r}; expected one folder for each class with images")
    keep_classes(dataset, list(classes), only, repr(str(folder)))
    return dataset


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def keep_classes(dataset: Any, classes: Sequence[str], only: Sequence[str] | None, where: str) -> list[str]:
    """Leave out the images of all other classes; those that stay are numbered from 0 in the order they had.

    Args:
        dataset: Of :func:`digits_splits` or :func:`open_split`.
        classes: Names of its classes.
        only: Names of those to keep, None for all.
        where: The data, for the message.

    Returns:
        Names of the classes that stay.

    Raises:
        UserError: For a name that is no class of the data, and for a single one.
    """
    if not only:
        return list(classes)
    unknown = [name for name in only if name not in classes]
    if unknown:
        raise UserError(f"--only-classes: {unknown[0]!r} is no class of {where}, which has {_some(classes)}")
    kept = [name for name in classes if name in only]
    if len(kept) < 2:
        raise UserError(f"--only-classes names one class, {kept[0]!r}; name two or more")
    reorder_classes(dataset, [kept.index(name) if name in kept else LEFT_OUT for name in classes])
    return kept


def reordered(classes: Sequence[str], order: Sequence[int]) -> list[str]:
    """Names of classes, that of class ``i`` at ``order[i]``."""
    return [name for _, name in sorted(zip(order, classes, strict=True))]


def reorder_classes(dataset: Any, order: Sequence[int]) -> None:
    """Give class ``i`` of a data set the index ``order[i]``, as a model knows it that was trained with another order.

    Args:
        dataset: Of :func:`digits_splits` or :func:`open_split`.
        order: New index of each class, :data:`LEFT_OUT` for one whose images are left out.
    """
    if isinstance(dataset, Digits):
        targets = np.array(order)[dataset.targets]
        kept = targets != LEFT_OUT
        dataset.images, dataset.targets = dataset.images[kept], targets[kept]
        return
    reader = dataset.reader
    reader.samples = [(file, order[target]) for file, target in reader.samples if order[target] != LEFT_OUT]
    reader.class_to_idx = {n: order[target] for n, target in reader.class_to_idx.items() if order[target] != LEFT_OUT}


def _split_folder(root: Path, split: str) -> Path:
    names = next((names for names in SPLIT_FOLDERS.values() if split in names), (split,))
    for name in dict.fromkeys((split, *names)):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{str(root)!r} has no folder {' or '.join(repr(f'{n}/') for n in dict.fromkeys((split, *names)))}")


def unreadable(readers: Sequence[tuple[str | Path, Callable[[], Any]]]) -> dict[str, str]:
    """Read many files.

    Args:
        readers: Of each file its path and what reads it.

    Returns:
        The message of each file that cannot be read, by its path.
    """

    def problem(reader: tuple[str | Path, Callable[[], Any]]) -> str | None:
        try:
            reader[1]()
        except UnreadableImage as e:
            return str(e)
        return None

    with progress() as bar:
        problems = bar.track(in_threads(problem, readers), len(readers), description="checking images")
        return {str(file): text for (file, _), text in zip(readers, problems, strict=True) if text}


def say_skipped(bad: dict[str, str], total: int) -> None:
    """Print how many files are left out because they cannot be read, once in a run of several processes."""
    if is_first_process():
        first = f"; the first: {next(iter(bad.values()))}" if bad else ""
        print(f"--skip-unreadable: {len(bad):,} of {total:,} images left out{first}")


def _check_images(datasets: Sequence[Images], how: str, skip_unreadable: bool) -> None:
    """Open every image, so that a broken one is found, or left out, now and not after hours."""
    files = [f for d in datasets for f, _ in d.reader.samples]
    if skip_unreadable:
        how = "full"
    if how == "auto":
        how = "full" if are_few(files) else "header"
    if how == "none":
        return
    window = datasets[0].window
    read = functools.partial(read_image, window=window) if how == "full" else check_header
    bad = unreadable([(f, functools.partial(read, f)) for f in files])
    if bad and not skip_unreadable:
        more = f" (and {len(bad) - 1} more unreadable images)" if len(bad) > 1 else ""
        raise UserError(f"{next(iter(bad.values()))}{more}; --skip-unreadable leaves such images out")
    if skip_unreadable:
        say_skipped(bad, len(files))
    for dataset in datasets:
        kept = [sample for sample in dataset.reader.samples if sample[0] not in bad]
        dataset.skipped = len(dataset.reader.samples) - len(kept)
        dataset.reader.samples = kept
        lost = set(dataset.reader.class_to_idx.values()) - {target for _, target in kept}
        if lost:
            names = [c for c, i in dataset.reader.class_to_idx.items() if i in lost]
            raise UserError(f"no image of class {names[0]!r} in {dataset.reader.root!r} can be read")


def training_loader(
    args: argparse.Namespace,
    dataset: Any,
    data_config: dict[str, Any],
    device: torch.device,
    num_classes: int,
) -> Any:
    """Build timm's training loader.

    Args:
        args: Options of ``vizoo train``.
        dataset: Training images.
        data_config: Of :func:`timm.data.resolve_data_config`.
        device: Where batches end up.
        num_classes: Width of mixed targets.

    Returns:
        The loader.

    Raises:
        UserError: For augmentation options timm refuses.
    """
    train = _training_loader(args, dataset, data_config, device, num_classes)
    if (args.rotate or args.translate) and not args.no_aug:
        shift = transforms.RandomAffine(
            args.rotate, (args.translate,) * 2, interpolation=transforms.InterpolationMode.BILINEAR
        )
        dataset.transform.transforms.insert(1, shift)  # after the crop: at full size, before the conversion
    return train


def _training_loader(
    args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], device: torch.device, num_classes: int
) -> Any:
    try:
        return create_loader(
            dataset,
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
            collate_fn=_mixup(args, num_classes),
            **_shared(args, data_config, device),
        )
    except (AssertionError, KeyError, ValueError) as e:
        raise UserError(
            f"timm refuses the augmentation options (--aa {args.aa}, {type(e).__name__}: {e}); "
            "policies of --aa are rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0 and their variants"
        ) from None


def _mixup(args: argparse.Namespace, num_classes: int) -> FastCollateMixup | None:
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    return FastCollateMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def held_out_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], device: torch.device) -> Any:
    """Build timm's evaluation loader; arguments as for :func:`training_loader`."""
    return create_loader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        **_shared(args, data_config, device),
    )


def _shared(args: argparse.Namespace, data_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What both loaders have in common."""
    return {
        **{k: data_config[k] for k in ("input_size", "mean", "std")},
        "num_workers": args.workers,
        "pin_memory": args.pin_mem,
        "device": device,
        "persistent_workers": False,  # workers of an epoch start from its seed, so a resumed epoch is the same
        "worker_seeding": _start_worker,
    }


def ignore_interrupts(worker: int) -> None:
    """Start of a data worker: after Ctrl-C the main process still finishes its step.

    Args:
        worker: Its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start_worker(info: Any) -> int:
    ignore_interrupts(info.id)
    return int(info.seed)


def seed_from(*words: int) -> int:
    """A seed of 64 bits that follows from a few numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def seed_everything(*words: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a few numbers."""
    seed = seed_from(*words)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def order_seed(seed: int, epoch: int) -> int:
    """What the generator of a loader that has one of its own starts an epoch from."""
    return seed * 100_003 + epoch


def unwrapped(loader: Any) -> Any:
    """The loader of torch, which timm's wraps."""
    return getattr(loader, "loader", loader)


def seeded_batches(loader: Any, seed: int, rank: int, epoch: int) -> Iterator[Any]:
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
        What the loader gives.
    """
    sampler, generator = unwrapped(loader).batch_sampler.sampler, unwrapped(loader).generator
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    if generator is not None:
        generator.manual_seed(order_seed(seed, epoch))
    seed_everything(seed, rank, epoch, 0)  # for the worker processes
    batches = iter(loader)
    for k in range(len(loader)):
        seed_everything(seed, rank, epoch, k)
        yield next(batches)
