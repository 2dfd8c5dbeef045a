"""``--json`` and ``--out`` of every command that prints a table: one rule, and what the printed tables look like."""

from __future__ import annotations

import argparse
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vizoo
from vizoo.tools import bench, cli, common
from vizoo.tools.evaluation import classification, dense, scanpath
from vizoo.tools.evaluation.results import write_results
from vizoo.tools.scanpaths import Behaviour

KERNEL = dict.fromkeys(bench.code.COLUMNS, 1) | {"constants": "BLOCK_M=16", "occupancy": 0.25, "issue_ms": None}
COMMANDS = {  # with how many rows they give
    "models": (["models", "litv2_b"], 2),
    "env": (["env"], None),
    "profile": (["profile", "test_litv2", "--measure", "count", "--size", "64"], 1),
    "bench": (["bench", "ulsam", "--size", "2", "--rounds", "1", "--threads", "1"], 1),
    "bench --sass": (["bench", "--sass", "nat_tiny"], 1),
    "bench --warm": (["bench", "--warm", "nat_tiny"], 1),
}
RECORDS = ("profile", "bench", "bench --sass", "bench --warm")  # their CSV files keep what they hold
CLASSES = [{"name": "a|b", "images": 2, "sensitivity": 50.0, "ppv": None}]
CLASSIFIED = {"model": "m", "data": "d", "input": "3x8x8", "images": 2, "skipped": 0, "top1": 50.0, "loss": 1.0}
MEASURED = dict.fromkeys([*scanpath.COMPARED, "nss", "delta"], 0.5)
MEASURED |= {f"{who}_{key}": 0.5 for who in ("model", "human") for key in Behaviour._fields}
SCANNED = {"model": "m", "trials": 3, "split": "test", "data": "d", "loss": 1.0, "sim": 0.5}
DETECTED = {"arch": "fcos", "model": "m", "images": 2, "skipped": 0, "data": "d", "AP": 12.0}
EVALUATED = {
    "classification": (classification._tables, {**CLASSIFIED, "classes": CLASSES, "confusion": [[1, 1], [0, 0]]}),
    "detection": (dense._tables, {**DETECTED, "classes": [{"name": "a|b", "AP": None}]}),
    "scanpath": (scanpath._tables, {**SCANNED, "greedy": MEASURED, "people": None}),
}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    versions = {"torch": "1", "triton": "2", "vizoo": vizoo.__version__}
    monkeypatch.setattr(bench.code, "versions", lambda: versions)
    monkeypatch.setattr(bench.code, "row", lambda found: KERNEL)
    monkeypatch.setattr(bench.code, "report", lambda *todo: [None])
    monkeypatch.setattr(bench.code, "warm", lambda *todo: [("nat_tiny", "bfloat16", 3, 2)])


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_writes_every_form(name, tmp_path, capsys):
    words, count = COMMANDS[name]
    for ending in (".json", ".csv", ".md"):
        path = tmp_path / f"x{ending}"
        for _ in range(2):  # the second time over, or into, a file of ours
            assert cli.main([*words, "--json", "--out", str(path)]) == 0
            out, err = capsys.readouterr()
            printed = json.loads(out, parse_constant=pytest.fail)
            assert not err or err.startswith("machine busy")
        if ending == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            first = found[0] if isinstance(found, list) else found
            assert first["vizoo"] == vizoo.__version__
            assert (found[0].keys() if isinstance(found, list) else found.keys()) >= (
                printed[0].keys() if isinstance(printed, list) else printed.keys()
            )
            assert count is None or len(found) == len(printed) == count
        elif ending == ".csv":
            rows = rows_of(path)
            assert {row["vizoo"] for row in rows} == {vizoo.__version__}
            assert count is None or len(rows) == count * (1 + (name in RECORDS))
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            assert lines[-1] == f"vizoo {vizoo.__version__}"
            assert lines[1].startswith("| --- |")
            assert count is None or len([line for line in lines if line.startswith("|")]) == 2 + count
    assert cli.main(words) == 0
    assert "│" not in (printed_table := capsys.readouterr().out)
    assert "────" in printed_table


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_files_are_refused(name, tmp_path, capsys):
    words, _ = COMMANDS[name]
    foreign = tmp_path / "foreign.md"
    foreign.write_text("mine", encoding="utf-8")
    for path, message in (
        ("x.txt", "--out 'x.txt': the ending must be .json or .csv or .md"),
        ("/nowhere/x.md", "no such folder"),
        (str(foreign), "holds something that vizoo did not write"),
    ):
        assert cli.main([*words, "--out", path]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert foreign.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("task", EVALUATED)
def test_evaluations_write_what_they_print(task, tmp_path, capsys):
    tables, result = EVALUATED[task]
    first = tables(result)[0]
    for ending in (".json", ".csv", ".md"):
        path = tmp_path / f"x{ending}"
        for as_json in (True, False):
            args = argparse.Namespace(out=str(path), json=as_json, plot=None)
            assert write_results(args, result, tables, pytest.fail) is result
            assert bool(capsys.readouterr().out) is not as_json
    assert json.loads((tmp_path / "x.json").read_text()) == {"vizoo": vizoo.__version__, **result}
    rows = [list(row.values()) for row in rows_of(tmp_path / "x.csv")]
    assert rows == [[*row, vizoo.__version__] for row in first.rows]
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert all(line in text for table in tables(result) for line in (*table.above, *table.below))
    assert ("| a\\|b |" in text) is (task != "scanpath")


def test_runs_add_rows_to_one_file_at_once(tmp_path):
    path = tmp_path / "x.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: common.append_table(path, ["vizoo"], [{"vizoo": n}]), range(40)))
    assert sorted(int(row["vizoo"]) for row in rows_of(path)) == list(range(40))


@pytest.mark.parametrize("as_json", [True, False])
def test_what_cannot_be_printed_is_written(as_json, tmp_path, monkeypatch):
    def full(*words, **options):
        raise OSError(28, "No space left on device")

    args = argparse.Namespace(json=as_json, out=str(tmp_path / "x.csv"))
    results = common.Results(
        args, ["a"], lambda rows: common.Table(["name"], [["a"]]), lambda rows: common.Rows(["name"], rows), dict
    )
    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError, match="No space"):
        results.add({"name": "a"})
    assert rows_of(tmp_path / "x.csv") == [{"name": "a"}]


def test_a_closed_standard_output(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert common.run_tool(lambda words: print("x") or 0, [], "") == 0


def test_cells_are_printed_as_they_are(capsys):
    """Names of classes are a user's: brackets are no markup, colons no emoji, wide letters take two places."""
    cells = ["[bold]", ":dog:", "犬" * 60]
    common.print_tables(common.Table(["a b", "c"], [[cell, "1"] for cell in cells], (1,), ["above"], ["below"]))
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert all(any(cell in line for line in lines) for cell in cells)


def test_narrow_terminals_get_whole_rows(capsys, monkeypatch):
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        common.console.cache_clear()
        assert cli.main(["models"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "…" not in "".join(lines)
        assert max(map(len, lines)) <= 120
    common.console.cache_clear()
