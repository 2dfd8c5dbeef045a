"""What is allowed for an argument, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from vizoo.backbones.layers import checks


def test_words() -> None:
    """What is allowed, in words."""

    @checks.checked(size=checks.Range(2, 5), name=("a", "b"), low=checks.Range(high=3))
    def call(
        size: int | tuple[int, int] = 2,
        name: str | None = None,
        drop: float = 0.0,
        rates: Sequence[float] = (),
        low: int = 1,
        on: bool = True,
        nested: Sequence[int | Sequence[int]] = (1,),
        made: Callable[..., Any] = nn.Linear,
    ) -> int:
        """Documented."""
        return 7

    assert call() == call(3, "a", low=-9, rates=[], nested=((1, 2), 3)) == 7
    assert (call.__name__, call.__doc__) == ("call", "Documented.")
    for arguments, words in (
        ({"size": 1}, "got size=1, need a whole number from 2 to 5 or 2 whole numbers from 2 to 5"),
        ({"name": "c"}, "got name='c', need 'a' or 'b' or None"),
        ({"drop": 1}, "got drop=1, need a number from 0 to below 1"),
        ({"rates": (math.nan,)}, "got rates=(nan,), need a list of finite numbers"),
        (
            {"size": 2**63},
            "got size=9223372036854775808, need a whole number from 2 to 5 or 2 whole numbers from 2 to 5 and",
        ),
        ({"low": 4}, "got low=4, need a whole number of at most 3"),
        ({"on": "no"}, "got on='no', need True or False"),
        (
            {"nested": ()},
            "got nested=(), need a list of whole numbers of at least 1 or lists of whole numbers of at least 1",
        ),
        ({"made": 3}, "got made=3, need a callable"),
        ({"made": torch.zeros(99, 9)}, "got made=tensor("),
    ):
        with pytest.raises(ValueError) as e:  # noqa: PT011 - the text is compared whole
            call(**arguments)
        assert str(e.value).startswith(words)
        assert len(str(e.value)) < 300
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        call(foo=1)
