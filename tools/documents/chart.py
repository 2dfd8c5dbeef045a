"""The picture of the front page: published accuracy over measured images per second, the zoo's models and timm's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vizoo.tools.common import UserError, match_names
from vizoo.tools.profiling.picture import plot
from vizoo.tools.profiling.published import accuracies, accuracy, zoo
from vizoo.tools.profiling.record import Record, read_records

RECORDS = "profile-*.jsonl"  # written by ``vizoo profile --save``
SHOWN = {"device": "cpu", "dtype": "fp32", "batch": 8, "compile": None}  # conditions of the records that are drawn
ZOO = (  # of whose models the plain sizes are drawn: names have room
    *("litv2_[bms]", "overlock_*", "nat_mini", "nat_tiny", "nat_small", "dinat_mini", "dinat_tiny", "dinat_s_tiny"),
    *("halo_26t", "halo_h[12]", "mobilenetv1_100_ulsam_i11_g4", "flowformer_19"),
    *("transnext_micro", "transnext_tiny", "transnext_small", "transnext_base"),
)
TIMM = (  # of timm's models
    *(
        "convnext_*",
        "deit_small*",
        "efficientnet_b0",
        "mobilenetv3_*",
        "pvt_v2_b2",
        "regnety_032",
        "resnet18",
        "resnet50",
    ),
    *("resnet101", "swin_small*", "swin_tiny*"),
)


def chosen(records: Sequence[Record]) -> list[Record]:
    """The newest record of throughput of each model with a published accuracy at its size.

    Args:
        records: Of any models under any conditions.

    Returns:
        Those to draw, measured alike.

    Raises:
        UserError: If there is none, or they were measured under several sets of conditions.
    """
    known = accuracies()
    found = {
        r.name: r
        for r in sorted(records, key=lambda r: str(r.environment["date"]))
        if r.throughput and all(r.conditions[key] == value for key, value in SHOWN.items())
        if accuracy(r.target, known) and match_names([r.name], ZOO if r.name in zoo() else TIMM)
    }
    kinds = {(r.environment["fingerprint"], *map(str, r.conditions.values())) for r in found.values()}
    if len(kinds) != 1:
        told = ", ".join(f"{key} {value}" for key, value in SHOWN.items() if value)
        raise UserError(f"records of throughput with {told}: {len(kinds)} sets of conditions and machines, need one")
    return list(found.values())


def draw_chart(folder: Path, path: Path) -> None:
    """Draw the picture.

    Args:
        folder: Holds ``profile-*.jsonl``.
        path: PNG file to write.

    Raises:
        UserError: As :func:`chosen`, and if there is no such file.
        Failure: As :func:`vizoo.tools.common.save_figure`.
    """
    files = sorted(folder.glob(RECORDS))
    if not files:
        raise UserError(f"{folder}: no {RECORDS} there")
    plot(chosen([r for file in files for r in read_records(file)]), path)
