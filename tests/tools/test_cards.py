"""Cards of families and tables of pages: what they say, and from which data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

from vizoo.backbones.layers.about import About
from vizoo.tools import common
from vizoo.tools.documents import cards, sources, tables
from vizoo.tools.models import list_zoo

ROOT = Path(__file__).parents[2]
TEXT = """Toy: a network for tests.

Names end in numbers.

Deviations: ``drop_rate`` of :func:`toy` is left out.
"""
ABOUT = About("Toy net", "github.com/a/toy, MIT.", (('A. Nobody, "A Toy", 2026', "0000.00000"),), limits=("Small.",))
TOY = sources.Family("toy", ABOUT, TEXT)
RECORD = {"peer": "official", "device": "CPU", "mode": "infer", "threads": "1", "batch": "1", "dtype": "float32"}
RECORD |= {"shape": "3x8x8", "torch": "2.15.0+cu132", "median_ms": "1.00", "peer_median_ms": "2.00", "ratio": "2.00"}


def write_record(folder: Path, name: str, *rows: dict[str, str]) -> None:
    """A recorded benchmark."""
    table = [{**RECORD, **row} for row in rows]
    lines = [",".join(table[0]), *(",".join(row.values()) for row in table)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def entry(name: str, **values: Any) -> Any:
    """A row of the table of models: that of a model for tests, as one of the toy family."""
    return list_zoo([name])[0]._replace(**{"family": "toy", "source": "official weights", **values})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout that holds a little of everything."""
    (tmp_path / "tests/golden").mkdir(parents=True)
    (tmp_path / "tests/tolerance.py").write_text("GOLDEN = 2e-3  # so\nGOLDEN_FLOAT64 = 3e-4\nA, B = 1, 2\n")
    meta = {"source": "github.com/a/toy", "commit": "0123456789", "constructor": "toy()", "shim": "a stub"}
    fields = {"keys": "{}", "meta": json.dumps(meta), "input_shape": np.array([1, 3, 150, 230])}
    np.savez(tmp_path / "tests/golden/toy_150.npz", **fields, logits=np.zeros(2), **{"state/w": np.zeros(1)})
    np.savez(tmp_path / "tests/golden/toyland.npz", **fields, other=np.zeros(2))
    write_record(tmp_path / "tools/results", "toy-infer", {"name": "test_nat"})
    write_record(tmp_path / "tools/results", "toys-infer", {"name": "not_ours"})
    (tmp_path / "tools/results/toy-throughput.csv").write_text("name,images_per_s\nfast,3\n")
    (tmp_path / "docs").mkdir()
    shown = "## Toy\nA view, at\na point.\n\n```bash\nvizoo show a\n```\n\n![cap](pictures/toy.jpg)\n"
    (tmp_path / "docs/show.md").write_text(f"# Views\n\n{shown}\n## More\n")
    commands = "`OMP_NUM_THREADS=1 vizoo train --model test_nat\n--epochs 1`, `vizoo train --model toy_other`"
    fenced = "vizoo train --tune toy \\\n    --lr 1\nvizoo train --model test_litv2"
    (tmp_path / "docs/training.md").write_text(f"{commands}\n```bash\n{fenced}\n```\n")
    return tmp_path


def test_card(root: Path) -> None:
    """A card says what the family's file, its golden cases, records and pages say, and nothing of other families."""
    zoo = [entry("test_nat", weights={"in1k": "https://a/b.pth"}), entry("test_litv2", family="other")]
    card = cards.card(TOY, root, zoo)
    expected = [
        "# Toy net\n\nA network for tests.\n\n![cap](../pictures/toy.jpg)\n\nA view, at a point.",
        "```bash\nvizoo show a\n```",
        'model = timm.create_model("test_nat").eval()  # pretrained=True downloads weights\n',
        "Names end in numbers.\n",
        "| `test_nat` | Tiny DiNAT for tests | 0.45 | 0.011 | 96x96 |  | official weights | [in1k](https://a/b.pth) |",
        '- A. Nobody, "A Toy", 2026, [arXiv 0000.00000](https://arxiv.org/abs/0000.00000).',
        "- Code: [github.com/a/toy](https://github.com/a/toy), MIT.",
        "of 2e-3 in float32, and 3e-4 where",
        "| `toy_150` | toy() | 1x3x150x230 | logits |",
        "Recorded from [github.com/a/toy](https://github.com/a/toy), commit 0123456.",
        "What stood in for what no longer runs: a stub.",
        "Deviations: `drop_rate` of `toy` is left out.",
        "vizoo train --model test_nat --epochs 1\nvizoo train --tune toy --lr 1\n```",
        "| `test_nat` | official | infer | 3x8x8 | 1 | float32 | 1 | CPU | 2.15.0 | 1.00 | 2.00 | **2.00x** |",
        "## Limits\n\n- Small.\n",
    ]
    assert [part for part in expected if part not in card] == []
    assert not re.search(r"test_litv2|toyland|not_ours|toy_other|fast|reconstruction|segmentation\b", card)


def test_card_of_a_reconstruction(root: Path) -> None:
    """It says that there is nothing to compare with, and what it costs merged; models for tests stay out."""
    zoo = [
        entry("test_nat", source="reconstruction", merged_params=400_000, merged_macs=10_000_000),
        entry("test_litv2", source="for tests"),
    ]
    card = cards.card(TOY._replace(about=ABOUT._replace(limits=())), root, zoo)
    assert "All models are reconstructions: there is no official output to compare them with." in card
    assert "| `test_nat`, training form | Tiny DiNAT for tests | 0.45 | 0.011 |" in card
    assert "| `test_nat`, merged | Tiny DiNAT for tests | 0.40 | 0.010 |" in card
    assert "test_litv2`" not in card
    assert "## Limits" not in card


def test_choices_are_required() -> None:
    with pytest.raises(common.UserError, match=r"backbones/toy\.py: no paragraph .* 'Deviations' or 'Our choices'"):
        _ = TOY._replace(text="Toy: a network.\n\nWhat is ours: a lot.").choices


def test_every_golden_case_is_of_one_family() -> None:
    owners = {case: [f.name for f in sources.families() if f.owns(case)] for case in golden.names()}
    assert {case: found for case, found in owners.items() if len(found) != 1} == {}


def test_every_record_is_of_a_family() -> None:
    names = {family.name for family in sources.families()}
    assert {name for name, _ in sources.benchmarks(ROOT / "tools/results")} <= names


def test_short_speed_table(tmp_path: Path) -> None:
    """The best record of each family: of a model before an operator, float32 and batch 1 before the largest factor."""
    write_record(tmp_path, "a-1", {"name": "op", "ratio": "9"}, {"name": "m1", "ratio": "2"})
    write_record(tmp_path, "b-1", {"name": "op", "ratio": "7"})
    rows = [{"ratio": "5", "batch": "8"}, {"ratio": "6", "dtype": "bfloat16"}, {"ratio": "3"}, {"ratio": "4"}]
    write_record(tmp_path, "c-1", *({"name": "m2", **row} for row in rows))
    found = re.findall(r"\| `(\w+)` .*\*\*(\d)x\*\*", tables.speeds_table(tmp_path, {"m1", "m2"}))
    assert found == [("m2", "4"), ("m1", "2"), ("op", "7")]


def test_memory_table(tmp_path: Path) -> None:
    """Training steps whose memory was measured, and no others."""
    assert tables.memory_table(tmp_path) == tables.NOT_MEASURED
    memory = {"memory_mb": "50.4", "peer_memory_mb": "200.0"}
    rows = [{"name": "m1", **memory}, {"name": "m2", "mode": "train cpu_time", **memory}]
    write_record(tmp_path, "a-1", *rows, {"name": "m3", "mode": "train", "memory_mb": "", "peer_memory_mb": ""})
    write_record(tmp_path, "b-1", {"name": "old", "mode": "train"})
    assert tables.memory_table(tmp_path).splitlines()[2:] == [
        "| `m2` | official | 3x8x8 | 1 | float32 | 50 | 200 | 0.25 |"
    ]


def test_families_table() -> None:
    """A range of models by cost, whose weights there are, and the best published accuracy with its model."""
    zoo = list_zoo(["*"])
    lines = tables.families_table(zoo, ROOT / "docs/models", ROOT / "README.md").splitlines()
    litv2 = "| `litv2_s` to `litv2_b.r384_in1k`, 10 models | 27.6 to 86.5 | 84.7 (`litv2_b.r384_in1k`) | official |"
    assert any(line.startswith("| [LITv2 (HiLo attention)](docs/models/litv2.md) |") for line in lines)
    assert any(line.endswith(litv2) for line in lines)
    assert any(line.endswith("| 84.9 (`halo_h7`) | 5 timm's, 9 none (reconstruction) |") for line in lines)
    assert len(lines) == 2 + len(sources.families())


def test_scores_end_with_a_digit() -> None:
    for task in tables.SCORES:
        folder = ROOT / "configs" / task
        assert not re.search(r"\d\. \|", tables.configs_table(folder, folder / "README.md"))


def test_unknown_table_is_named() -> None:
    with pytest.raises(common.UserError, match=r"README\.md: unknown table 'sped'; known: models, families"):
        tables.rewrite("<!-- table: sped -->\n<!-- end table -->", Path("README.md"), ROOT, [])
