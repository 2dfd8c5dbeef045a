"""Which models are measured on a GPU, and how: the rows of ``backbones/gpu.csv``, the most important first."""

from __future__ import annotations

import csv
from importlib import resources
from typing import NamedTuple


class Measured(NamedTuple):
    """How a model is measured.

    Attributes:
        name: Of the zoo, or one of timm beside which some of the zoo are measured.
        batch: Images at once.
        modes: Beside inference and training.
        compiled: Whether it is measured compiled, too.
        few: Whether it is measured with few images, too, where the host may be the limit.
        kernels: Whether it launches kernels that the others do not, so that these are compiled without a GPU.
        peer: Model that it is compared to, both compiled; "" for none.
        share: Of the peer's speed, which it aims at.
    """

    name: str
    batch: int
    modes: tuple[str, ...] = ()
    compiled: bool = False
    few: bool = False
    kernels: bool = False
    peer: str = ""
    share: float = 0.0


def measured() -> list[Measured]:
    """The rows of the table."""
    text = resources.files("vizoo.backbones").joinpath("gpu.csv").read_text(encoding="utf-8")
    found = []
    for row in csv.DictReader(text.splitlines()):
        modes = tuple(filter(None, row["modes"].split(";")))
        yes = {key: row[key] == "yes" for key in ("compiled", "few", "kernels")}
        found.append(
            Measured(row["name"], int(row["batch"]), modes, **yes, peer=row["peer"], share=float(row["share"] or 0))
        )
    return found
