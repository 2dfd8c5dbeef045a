"""``python -m vizoo.tools.table``: every generated document is up to date; counting, checking, writing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm

from vizoo.heads.features import feature_levels
from vizoo.tools import common, table
from vizoo.tools.documents.sources import families
from vizoo.tools.documents.tables import MARKED
from vizoo.tools.models import list_zoo
from vizoo.tools.training import scanpath

ROOT = Path(__file__).parents[2]
COLUMNS = ",".join([*table.BY_HAND, *table.COUNTED])


def test_documents_are_up_to_date():
    """NOTICE, pages and cards hold what the recorded data, the configs and the families give."""
    marked, written = set(), set()
    for path, text in table.documents(ROOT):
        assert path.read_text(encoding="utf-8") == text, f"{path}; run: python -m vizoo.tools.table"
        marked |= {m[2] for m in MARKED.finditer(text)}
        written.add(path)
    assert {"models", "families", "speed", "gpu", "citations", "detection", "segmentation"} <= marked
    assert set((ROOT / "docs/models").iterdir()) <= written, "a card without a family"


def test_table_check_and_write(tmp_path, capsys):
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones/models.csv").write_text(f"{COLUMNS}\ntest_litv2,,for tests\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("a\n<!-- table: models -->\nold\n<!-- end table -->\nb\n", encoding="utf-8")
    (tmp_path / "NOTICE").write_text(f"vizoo\n\n{table.ORIGINS}  Text.\n\nold\n", encoding="utf-8")
    assert table.main(["--root", str(tmp_path), "--check"]) == 1
    assert "old" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert table.main(["--root", str(tmp_path)]) == 0
    assert "test_litv2,494240," not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "backbones/models.csv").read_text(encoding="utf-8").splitlines()[1].startswith("test_litv2,")
    assert "| `litv2_s` | 27.84 | 3.724 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "\nHaloNet                 no official code" in (tmp_path / "NOTICE").read_text(encoding="utf-8")
    assert "# LITv2 (HiLo attention)\n" in (tmp_path / "docs/models/litv2.md").read_text(encoding="utf-8")
    assert table.main(["--root", str(tmp_path), "--check"]) == 0
    capsys.readouterr()
    (tmp_path / "NOTICE").write_text("nothing", encoding="utf-8")
    assert table.main(["--root", str(tmp_path)]) == 2
    assert "NOTICE has no paragraph" in capsys.readouterr().err
    assert table.main(["--root", str(tmp_path / "backbones")]) == 2
    assert "give the checkout" in capsys.readouterr().err


def test_table_refuses_partial_counts(monkeypatch):
    """A figure that misses a part is never recorded."""
    count = table.count
    reasons = ["a thread was started in the model"]
    monkeypatch.setattr(table, "count", lambda *args: count(*args)._replace(reasons=reasons))
    text = f"{COLUMNS}\ntest_litv2,,for tests\n"
    with pytest.raises(common.Failure, match="test_litv2: partial count: a thread was started"):
        table.recount(text)
    with pytest.raises(common.UserError, match="the columns 'a,b', need name,paper_top1,source,family,"):
        table.recount("a,b\n1,2\n")


def test_only_named_rows_are_counted():
    other = "test_nat,,for tests,nat,classification,1,2,,,96,96,mit,"
    lines = table.recount(f"{COLUMNS}\n{other}\ntest_litv2,,for tests\n", ["test_l*"]).splitlines()
    tasks = "classification detection segmentation"
    assert lines[1] == f"test_litv2,,for tests,litv2,{tasks},494240,9668864,,,96,96,apache-2.0,"
    assert lines[2] == other
    with pytest.raises(common.UserError, match="resnet18"):
        table.recount(COLUMNS, ["resnet18"])


def test_tasks_are_what_the_code_can_do():
    """Of every kind of model: the heads find the maps that they stand on, ``vizoo train`` its scanpaths, or not."""
    for entry in list_zoo(["test_*"]):
        able = set(entry.tasks)
        for task, attempt in (
            ("detection", feature_levels),
            ("segmentation", feature_levels),
            ("scanpath", lambda name: scanpath.build(name, {})),
            ("classification", lambda name: timm.create_model(name, num_classes=3, device="meta")),
        ):
            if task in able:
                attempt(entry.name)
            else:
                with pytest.raises((ValueError, RuntimeError)):
                    attempt(entry.name)


def test_every_family_says_where_it_is_from():
    found = families()
    assert len(found) == len(list((ROOT / "backbones").glob("[!_]*.py")))
    for about in (family.about for family in found):
        assert about.origin.endswith(".")
        assert about.papers
        for reference, arxiv in about.papers:
            assert re.fullmatch(r"[A-Z].* \"[A-Z].*\", .*\d{4}", reference.replace("\\", ""))
            assert re.fullmatch(r"\d{4}\.\d{5}", arxiv)
