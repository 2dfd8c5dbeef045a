"""What each of several processes gets of the data, so that all of them together do what one would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch.utils.data import Dataset, RandomSampler, Sampler, Subset

from vizoo.tools.data.folders import order_seed, seed_from, unwrapped


class SharedOrder(Sampler[int]):
    """A process's share of each batch of an epoch, whose order is that of a single process with the same seed.

    Args:
        loader: Shuffling loader of torch or of timm, whose order it is.
        seed: Of the run.
        rank: Of this process.
        size: Number of processes.
    """

    def __init__(self, loader: Any, seed: int, rank: int, size: int) -> None:
        inner = unwrapped(loader)
        self.count, self.seed, self.rank, self.size = len(inner.dataset), seed, rank, size
        self.is_seeded = inner.generator is not None
        # timm's wrapper starts the loader, and a loader its workers, when the first batch is asked for
        self.starts_late = inner is not loader or inner.num_workers > 0
        # what does not fill a batch of all is left out, or the first ones fill it once more
        self.each = self.count // size if inner.drop_last else -(-self.count // size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.each

    def order(self) -> list[int]:
        """Indices as a single process draws them: see :func:`vizoo.tools.data.folders.seeded_batches`."""
        if self.is_seeded:
            generator = torch.Generator().manual_seed(order_seed(self.seed, self.epoch))
            # the loader draws a seed for its workers first
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            return list(RandomSampler(range(self.count), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(self.seed, 0, self.epoch, 0))
            if self.starts_late:  # else the generators are seeded once more between this draw and the next
                torch.empty((), dtype=torch.int64).random_()
            return list(RandomSampler(range(self.count)))

    def __iter__(self) -> Iterator[int]:
        order = itertools.islice(itertools.cycle(self.order()), self.each * self.size)
        return itertools.islice(order, self.rank, None, self.size)


def share_order(loader: Any, seed: int, rank: int, size: int) -> None:
    """Let a training loader give this process its share of every batch.

    Args:
        loader: Shuffling loader of torch or of timm.
        seed: Of the run.
        rank: Of this process.
        size: Number of processes; nothing is done for one.
    """
    if size > 1:
        unwrapped(loader).batch_sampler.sampler = SharedOrder(loader, seed, rank, size)


def whole_batches(count: int, batch: int, rank: int, size: int) -> list[int]:
    """Indices of every ``size``-th batch, so that no batch is another one than in a single process.

    Args:
        count: Images.
        batch: Images of a batch; the last one may have fewer.
        rank: Of this process, which takes batches ``rank``, ``rank + size``, ...
        size: Number of processes.

    Returns:
        The indices of its images, in order.
    """
    starts = range(rank * batch, count, size * batch)
    return [i for start in starts for i in range(start, min(start + batch, count))]


class Share(Subset):
    """The images of one process; its transform is that of the data set.

    Args:
        dataset: All images.
        batch: Images of a batch.
        rank: Of this process.
        size: Number of processes.
    """

    def __init__(self, dataset: Dataset[Any], batch: int, rank: int, size: int) -> None:
        super().__init__(dataset, whole_batches(len(dataset), batch, rank, size))  # type: ignore[arg-type]

    @property
    def transform(self) -> Any:
        """Of the data set; timm's loader sets it."""
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value  # type: ignore[attr-defined]


def gather(values: Sequence[Any], indices: Sequence[int], size: int) -> list[Any]:
    """What all processes found, in the order of the data.

    Args:
        values: Of this process, one for each of ``indices``.
        indices: Of :func:`whole_batches`.
        size: Number of processes.

    Returns:
        Values of all images, in every process.
    """
    found: list[Any] = [None] * size
    mine = list(zip(indices, values, strict=True))
    if size == 1:
        found = [mine]
    else:
        torch.distributed.all_gather_object(found, mine)
    return [value for _, value in sorted((pair for share in found for pair in share), key=lambda pair: pair[0])]


def gather_batches(values: Sequence[Any], rank: int, size: int) -> list[Any]:
    """What all processes found of each batch, in the order of :func:`whole_batches` of a single one.

    Args:
        values: Of this process, one for each of its batches.
        rank: Of this process.
        size: Number of processes.

    Returns:
        Values of all batches, in every process.
    """
    return gather(values, range(rank, rank + size * len(values), size), size)


def from_first(value: Any, size: int) -> Any:
    """What the first process says, in every process.

    Args:
        value: Of this process, ignored but in the first one.
        size: Number of processes.

    Returns:
        The value of the first process.
    """
    box = [value]
    if size > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]
