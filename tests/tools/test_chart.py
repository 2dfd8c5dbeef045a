"""The picture of the front page: records of throughput joined with published accuracies."""

import csv
from pathlib import Path

import pytest

from vizoo.tools.common import UserError
from vizoo.tools.documents import chart
from vizoo.tools.models import list_zoo

RESULTS = Path(__file__).parents[2] / "tools" / "results"


def copied(folder: Path, **changed: str) -> Path:
    """Two rows of the record in a folder of their own, the first with other values."""
    (folder / chart.PUBLISHED).write_bytes((RESULTS / chart.PUBLISHED).read_bytes())
    (record,) = RESULTS.glob(chart.RECORDS)
    with record.open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    with (folder / record.name).open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([{**rows[0], **changed}, rows[1]])
    return folder


def test_points_are_the_zoo_and_timm() -> None:
    points = {p.name: p for p in chart.read_points(RESULTS, list_zoo())}
    assert points["litv2_s"].family == "LITv2"
    assert points["litv2_s"].top1 == 82.0
    assert points["resnet50"].family is None
    assert points["resnet50"].top1 == 80.382  # resnet50.a1_in1k at 224 pixels
    assert {p.family for p in points.values()} == {*chart.FAMILIES.values(), None}
    assert all(p.record["reparam"] == "True" for p in points.values())


def test_picture(tmp_path: Path) -> None:
    chart.draw_chart(copied(tmp_path), list_zoo(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threads": "1"}, "differ in machine, threads"),
        ({"height": "320"}, "no published accuracy of 'litv2_s' at 320 pixels"),
        ({"model": "resnet26"}, "no published accuracy of 'resnet26' at 224 pixels"),
    ],
)
def test_figures_that_do_not_belong_together(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        chart.draw_chart(copied(tmp_path, **changed), list_zoo(), tmp_path / "speed.png")
    assert not (tmp_path / "speed.png").exists()


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no throughput"):
        chart.read_points(tmp_path, [])
