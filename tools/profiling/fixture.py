"""What the fixture ``vizoo_cost`` of pytest gives: assertions about what a model costs."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.tools.common import UserError, check_output
from vizoo.tools.profiling.comparing import Unlike, Wanted, baseline, middle_of, percent, unpaired
from vizoo.tools.profiling.counting import Count
from vizoo.tools.profiling.profile import count, profile
from vizoo.tools.profiling.record import Record, append_record, read_records

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Checks:
    """Assertions about what one call of a model costs.

    Args:
        model: Any module.
        inputs: Its positional inputs, or the only one.
        name: Of its record; None for timm's name of the model, or the class of another module.
    """

    def __init__(self, model: torch.nn.Module, inputs: Any, name: str | None = None) -> None:
        alone = isinstance(inputs, torch.Tensor) or not isinstance(inputs, Sequence)
        self.model, self.inputs = model, (inputs,) if alone else tuple(inputs)
        config = getattr(model, "pretrained_cfg", None) or {}
        self.name = name or config.get("architecture") or type(model).__name__

    @functools.cached_property
    def _count(self) -> Count:
        return count(self.model, *self.inputs)

    def assert_macs(self, expected: int) -> None:
        """Fail unless the call has so many multiply-accumulates, with all of its batch, and the count is complete."""
        __tracebackhide__ = True
        if reasons := self._count.doubts.get("macs"):
            pytest.fail(f"{self.name}: the count is partial: {'; '.join(reasons)}")
        self._equal("multiply-accumulates", self._count.macs, expected)

    def assert_params(self, expected: int) -> None:
        """Fail unless the model has so many parameters, shared ones once."""
        __tracebackhide__ = True
        self._equal("parameters", self._count.params, expected)

    def _equal(self, what: str, found: int, expected: int) -> None:
        __tracebackhide__ = True
        if found != expected:
            pytest.fail(f"{self.name} has {found:,} {what}, expected {expected:,} ({found - expected:+,})")

    def no_slower_than(self, file: str | Path, budget: str) -> None:
        """Fail if a call takes surely longer than the newest record of the same name, and the budget, allow.

        The call is timed as ``vizoo profile`` does.  Times of another machine or of other conditions are not compared,
        nor those of a busy machine: the test is skipped then.  Fails too if there is no record.

        Args:
            file: Records of :meth:`record`, or of ``vizoo profile --save``.
            budget: Share that is allowed, such as ``5%``: what the lower bound of the ratio's interval may be at most.

        Raises:
            UserError: If the file or the budget is none.
        """
        __tracebackhide__ = True
        if not Path(file).exists():
            pytest.fail(f"{file} does not exist; record once what it is compared with: cost.record({str(file)!r})")
        try:
            allowed = percent(budget)
        except argparse.ArgumentTypeError as e:
            raise UserError(f"budget: {e}") from None
        records = read_records(file)
        now = self._timed()
        latency = now.latency
        assert latency is not None
        wanted = Wanted({**now.target, "name": self.name}, now.conditions, self._batch, now.environment["fingerprint"])
        try:
            then = baseline(records, wanted, str(file))
        except Unlike as e:
            pytest.skip(str(e))
        except UserError as e:
            pytest.fail(str(e))
        ratio, low, high = unpaired(then.samples, latency.samples)
        if low <= 1 + allowed:
            return
        if doubts := [note for note in (*latency.quality, *now.notes) if "busy" in note]:
            pytest.skip(f"{self.name}: {doubts[0]}")
        figures = f"{_milliseconds(latency.samples)} now, {_milliseconds(then.samples)} in {file}"
        much = f"{ratio:.3f} times as long as recorded ({low:.3f} to {high:.3f}), allowed {1 + allowed:g}"
        pytest.fail(f"{self.name} takes {much}: {figures}")

    def record(self, file: str | Path) -> None:
        """Add a record of the call, timed now, to a file that :meth:`no_slower_than` compares with from then on.

        Args:
            file: Ends with ``.jsonl``, and may be new.

        Raises:
            UserError: If it cannot be written, or holds something else.
        """
        check_output(file, "file", ".jsonl")
        found = self._timed()
        found.target["name"] = self.name
        append_record(file, found)

    @property
    def _batch(self) -> int:
        return next((x.shape[0] for x in self.inputs if isinstance(x, torch.Tensor) and x.dim()), 1)

    def _timed(self) -> Record:
        weights = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        single = [x[:1] if isinstance(x, torch.Tensor) and x.dim() else x for x in self.inputs]
        how: dict[str, Any] = {"device": str(weights.device), "dtype": DTYPES.get(weights.dtype, "fp32")}
        return profile(self.model, single, measure="latency", batch=self._batch, **how)


def _milliseconds(samples: Sequence[Sequence[float]]) -> str:
    middle, low, high = (1e3 * s for s in middle_of(samples))
    digits = max(0, 2 - math.floor(math.log10(middle)))
    return f"{middle:.{digits}f} ms ({low:.{digits}f} to {high:.{digits}f})"
