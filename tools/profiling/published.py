"""What is known of models before anything is measured: the family that a picture shows them in, and published top-1."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from vizoo.tools.common import UserError, model_rows, read_text, short

COLUMNS = ("model", "size", "top1", "source")  # of a file of accuracies
FAMILIES = {  # beginnings of names, the first that fits, and what a legend says; the rest by their file in backbones
    "litv2": "LITv2",
    "overlock": "OverLoCK",
    "nat_": "NAT",
    "dinat_s_": "DiNAT_s",
    "dinat_": "DiNAT",
    "halo_": "HaloNet",
    "flowformer": "Flowformer",
    "moh_vit": "MoH-ViT",
    "transnext": "TransNeXt",
    "mobilenetv1": "ULSAM (MobileNetV1)",
    "mobilenetv2": "ULSAM (MobileNetV2)",
}


class Accuracy(NamedTuple):
    """A published accuracy.

    Attributes:
        top1: On ImageNet-1k, in percent.
        source: Where it is published.
    """

    top1: float
    source: str


@functools.cache
def zoo() -> dict[str, dict[str, str]]:
    """The rows of the zoo by name."""
    return {row["name"]: row for row in model_rows()}


def family(name: str) -> str:
    """What a legend calls the family of a model: of the zoo by its table, else the first word of the name.

    Args:
        name: With or without a tag.

    Returns:
        A name.
    """
    row = zoo().get(name) or zoo().get(name.partition(".")[0])
    if row is not None:
        return next((text for start, text in FAMILIES.items() if name.startswith(start)), row["family"])
    found = re.match(r"[A-Za-z]+(?:(?<=v)\d)?", re.sub(r"^(?:torchvision:|tf_|test_)", "", name))
    return found[0] if found else "others"


def accuracies(file: str | Path | None = None) -> dict[tuple[str, int, int], Accuracy]:
    """Published accuracies of the zoo, of the models of timm that a checkout lists, and of a file.

    Args:
        file: A table with the columns ``model,size,top1,source``, sizes in pixels of a square; goes before the others.

    Returns:
        Accuracies by name and height and width of the image that they were published for.

    Raises:
        UserError: If the file cannot be read, lacks a column, or holds what is no size or no percentage.
    """
    found = {
        (name, int(row["height"]), int(row["width"])): Accuracy(float(row["paper_top1"]), "its paper or official code")
        for name, row in zoo().items()
        if row["paper_top1"]
    }
    shipped = resources.files("vizoo").joinpath("tools", "results", "timm-top1.csv")  # in a checkout only
    for path in ([Path(str(shipped))] if shipped.is_file() else []) + ([Path(file)] if file is not None else []):
        found |= _read(path)
    return found


def _read(path: Path) -> dict[tuple[str, int, int], Accuracy]:
    """The accuracies of a file."""
    what = f"--top1 {short(str(path))}"
    reader = csv.DictReader(read_text(path, "--top1").splitlines(), restval="")
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{what}: no column {', '.join(missing)}; need {','.join(COLUMNS)}")
    found = {}
    for row in reader:
        try:
            size, top1 = int(row["size"]), float(row["top1"])
        except ValueError:
            size, top1 = 0, math.nan
        if size < 1 or not 0 <= top1 <= 100:
            given = f"{short(row['size'], 20)} and {short(row['top1'], 20)}"
            raise UserError(f"{what}: line {reader.line_num}: size and top1 are {given}, need pixels and a percentage")
        found[row["model"], size, size] = Accuracy(top1, row["source"])
    return found


def accuracy(target: Mapping[str, Any], known: Mapping[tuple[str, int, int], Accuracy]) -> Accuracy | None:
    """The published accuracy of a target at the size at which it was measured.

    Args:
        target: Of a record.
        known: Of :func:`accuracies`.

    Returns:
        That of its name with its tag; of a name without one, that of the only tag known.  None where there is none,
        and of a model with arguments or weights of its own, which nobody published.
    """
    if target["kind"] != "timm" or target["kwargs"] or target["weights"] or not target["size"]:
        return None
    name, (height, width) = target["name"], target["size"]
    if (name, height, width) in known:
        return known[name, height, width]
    tagged = [a for (of, h, w), a in known.items() if of.partition(".")[0] == name and (h, w) == (height, width)]
    return tagged[0] if len(tagged) == 1 else None
