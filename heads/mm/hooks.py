"""Training in mmengine that continues exactly after it was killed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

__all__ = ["SeedByPosition", "StopWhenDiverged"]


@HOOKS.register_module(force=True)
class SeedByPosition(Hook):
    """Seed all generators before each step by its number, so that a resumed run repeats an uninterrupted one.

    mmengine restores weights, optimiser and schedules, but no generator: without this hook augmentation, drop path
    and the sampling of boxes differ after a resume.  Workers of a data loader start from their own seed each epoch; in
    training by epochs they must not persist (``persistent_workers=False``) for an exact resume.

    Args:
        seed: Of the run.
    """

    priority = "VERY_HIGH"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def _start(self, step: int) -> None:
        number = int(np.random.SeedSequence((self.seed, get_rank(), step)).generate_state(1, np.uint64)[0])
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.manual_seed(number)

    def before_train(self, runner: Any) -> None:
        """Seed the fetching of batches too, where the loop counts steps: a resumed loop fetches the old ones again."""
        loop = runner.train_loop
        if hasattr(loop, "dataloader_iterator"):
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, self)

    def before_train_epoch(self, runner: Any) -> None:
        """Seed the first step of an epoch."""
        self._start(runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Seed the next step, before its batch is fetched."""
        self._start(runner.iter + 1)


@HOOKS.register_module(force=True)
class StopWhenDiverged(Hook):
    """End a training whose loss is no finite number, before a checkpoint of it is written."""

    priority = "VERY_HIGH"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the loss.

        Raises:
            FloatingPointError: If it is infinite or no number.
        """
        loss = torch.as_tensor((outputs or {}).get("loss", 0.0))
        if not loss.isfinite().all():
            raise FloatingPointError(
                f"the training loss is {loss.mean().item()} in iteration {runner.iter + 1}; lower the learning rate of "
                "optim_wrapper.optimizer, or set optim_wrapper.clip_grad"
            )


class _SeededBatches:
    """Iterator that seeds fetch ``k`` by ``k``."""

    def __init__(self, batches: Iterator[Any], hook: SeedByPosition) -> None:
        self.batches, self.hook, self.step = batches, hook, 0

    def __iter__(self) -> _SeededBatches:
        return self

    def __next__(self) -> Any:
        self.hook._start(self.step)
        self.step += 1
        return next(self.batches)
