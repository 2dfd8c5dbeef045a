"""The picture of the front page: records of throughput joined with published accuracies."""

import json
from pathlib import Path

import pytest
from records import measurement, record

from vizoo.tools.common import UserError
from vizoo.tools.documents import chart
from vizoo.tools.documents.tables import cpu_table
from vizoo.tools.profiling.record import Record


def records(*changed: dict) -> list[Record]:
    plain = [record("litv2_s", 18.0), record("resnet50", 15.0), *(record(**one) for one in changed)]
    return [Record.from_dict(one) for one in plain]


def test_the_newest_of_batch_8_in_float32() -> None:
    others = [
        {"name": "litv2_s", "speed": 19.0, "environment": {"date": "2026-11-30T12:00:00+00:00"}},
        {"name": "litv2_s", "conditions": {"batch": 1}},
        {"name": "litv2_s", "conditions": {"dtype": "bf16"}},
        {"name": "litv2_s_alpha02"},  # an ablation
        {"name": "test_litv2"},  # without a published accuracy
        {"name": "overlock_t", "measurements": [measurement("latency", "s", 0.1)]},
        {"name": "resnet18", "target": {"size": [288, 288]}},
    ]
    found = chart.chosen(records(*others))
    assert {r.name: r.throughput for r in found} == {"litv2_s": 19.0, "resnet50": 15.0}


@pytest.mark.parametrize(
    "change",
    [
        {"conditions": {"threads": 2}},
        {"conditions": {"reparam": True}},
        {"environment": {"fingerprint": "ba9876543210"}},
    ],
)
def test_figures_that_do_not_belong_together(change: dict) -> None:
    with pytest.raises(UserError, match="2 sets of conditions and machines, need one"):
        chart.chosen(records({"name": "resnet18", **change}))


def test_table_of_the_zoo_beside_others(tmp_path: Path) -> None:
    """Rates are relative to the resnet50 of the day, gains to float32; the newest record counts, of one machine."""

    def timed(name: str, seconds: float, date: int, fingerprint: str = "a", **conditions: object) -> str:
        latency = [measurement("latency", "s", seconds)]
        told = {"date": f"2026-11-{date}T12:00:00+00:00", "fingerprint": fingerprint * 12}
        made = record(name, environment=told, conditions={"batch": 1, **conditions}, measurements=latency)
        return json.dumps(Record.from_dict(made).to_dict()) + "\n"

    lines = [timed(name, 0.2, 20) + timed(name, second, 20, batch=8) for name, second in (("resnet50", 2), ("nat", 1))]
    lines += [timed("nat", 0.1, 21), timed("nat", 0.05, 21, dtype="int8"), timed("nat", 9.0, 21, threads=2)]
    lines += [timed("nat", 0.08, 21, compile="default"), timed("resnet18", 0.3, 19, "b")]
    lines += [timed("resnet50", 1, 27, batch=8), timed("resnet50", 0.1, 27)]  # of another day
    assert cpu_table(tmp_path, set()) == "Not measured yet.\n"
    (tmp_path / "profile-cpu.jsonl").write_text("".join(lines))
    macs = f"{Record.from_dict(record('nat', 1.0)).macs / 1e9:.2f}"
    assert cpu_table(tmp_path, {"nat"}).splitlines()[2:] == [
        f"| `resnet50` | 224x224 | {macs} | 100.0 | 8.0 | 1.00 |  |  |  |",
        f"| **`nat`** | 224x224 | {macs} | 100.0 | 8.0 | 2.00 | 1.25x |  | 2.00x |",
    ]


def test_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no profile"):
        chart.draw_chart(tmp_path, tmp_path / "speed.png")
    lines = [json.dumps(r.to_dict()) + "\n" for r in records()]
    (tmp_path / "profile-cpu.jsonl").write_text("".join(lines))
    chart.draw_chart(tmp_path, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
