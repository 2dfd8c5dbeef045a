"""The profiler as a user meets it: one table, files, pictures, errors; conditions recorded with every result."""

import copy
import csv
import json
import re
import shlex
import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from vizoo.tools import profiler
from vizoo.tools.common import Failure, UserError
from vizoo.tools.profiling import machine
from vizoo.tools.profiling.profile import attempt
from vizoo.tools.profiling.record import COLUMNS, check_record
from vizoo.tools.profiling.timing import quantized

FOUR = ("count", "latency", "throughput", "memory")
FAST = ["--min-time", "0", "--max-time", "0"]


@pytest.fixture
def here(monkeypatch):
    """Targets are profiled in this process, which is changed for a test."""
    monkeypatch.setattr(machine, "ISOLATED", False)


def run(capsys, *words):
    try:
        status = profiler.main(list(words))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_the_papers_numbers(capsys):
    """The table of the paper: parameters and multiply-accumulates of LITv2-S, M and B."""
    status, out, err = run(capsys, "litv2_s", "litv2_m", "litv2_b", "litv2_b.r384_in1k", "--strict")
    assert (status, err) == (0, "")
    for name, numbers in {
        "litv2_s": "27.84 3.724",
        "litv2_m": "48.83 7.463",
        "litv2_b": "86.52 13.172",
        "litv2_b.r384_in1k": "86.52 39.646",
    }.items():
        row = next(line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert " ".join(row[2:4]) == numbers
    assert "GMACs: multiply-accumulates" in out
    assert "…" not in out


def test_everything_on_a_device(capsys, tmp_path):
    out_file = tmp_path / "out.json"
    words = ("test_litv2", "resnet18", "--device", "cpu", "--size", "32", "64", "--batch", "2", *FAST)
    status, out, _ = run(capsys, *words, "--threads", "1", "--out", str(out_file))
    assert status == 0
    header = " ".join(out.split("─")[0].split())
    for word in ("params", "GMACs", "acts", "peak", "p50", "img/s", "threads"):
        assert word in header
    records = json.loads(out_file.read_text(encoding="utf-8"))
    assert [d["target"]["name"] for d in records] == ["test_litv2", "resnet18"]
    for d in records:
        assert d["target"]["size"] == [32, 64]
        found = {m["kind"]: m for m in d["measurements"]}
        assert list(found) == ["latency", "throughput", "memory"]
        assert [m["batch"] for m in found.values()] == [2, 2, 2]
        assert len(found["latency"]["samples"][0]) >= 3
        assert found["throughput"]["median"] > 0
        assert found["memory"]["median"] > sum(d["counts"]["state_bytes"].values())
        assert (d["conditions"]["threads"], d["conditions"]["device"]) == (1, "cpu")
        check_record(d)
        assert {"vizoo", "torch", "timm", "machine", "cores", "load", "date"} <= set(d["environment"])


def test_csv_is_appended_and_checked(capsys, tmp_path):
    out = tmp_path / "out.csv"
    for size in ("64", "96"):
        assert run(capsys, "test_litv2", "--size", size, "--out", str(out))[0] == 0
    with out.open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(r["height"], int(r["params"])) for r in rows] == [("64", 494_240), ("96", 494_240)]
    assert int(rows[1]["macs"]) == 9_668_864
    other = tmp_path / "other.csv"
    for text, message in (("vizoo,b\n1,2\n", "has other columns"), ("a,b\n1,2\n", "vizoo did not write")):
        other.write_text(text, encoding="utf-8")
        status, _, err = run(capsys, "test_litv2", "--out", str(other))
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
        assert other.read_text(encoding="utf-8") == text


def test_markdown(capsys, tmp_path):
    out = tmp_path / "out.md"
    assert run(capsys, "test_litv2", "--out", str(out))[0] == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| model | size | params M | GMACs |")
    assert lines[2].startswith("| test_litv2 | 96x96 | 0.49 | 0.010 |")


@pytest.mark.parametrize("mode", ["count", "latency"])
def test_plot(mode, capsys, tmp_path):
    picture = tmp_path / "cost.png"
    words = (
        "test_litv2",
        "resnet18",
        "--device",
        "cpu",
        "--measure",
        mode,
        "--size",
        "32",
        "--plot",
        str(picture),
        *FAST,
    )
    assert run(capsys, *words)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5000


def test_breakdowns(capsys):
    status, out, _ = run(capsys, "test_litv2", "--depth", "2", "--sort", "macs", "--top", "3")
    assert status == 0
    table = out.partition("modules of test_litv2")[2]
    assert "100.0%" in table
    assert "stages" in table
    assert "norm" not in table
    out = run(capsys, "test_litv2", "--by", "op", "--top", "1")[1]
    assert "aten::addmm" in out.partition("operators of test_litv2")[2]


def test_threads_in_processes_of_their_own(capsys, tmp_path):
    out = tmp_path / "out.csv"
    words = ("test_litv2", "--device", "cpu", "--measure", "latency", "--size", "32", "--threads", "1,2", *FAST)
    assert run(capsys, *words, "--out", str(out))[0] == 0
    with out.open(encoding="utf-8") as f:
        assert [row["threads"] for row in csv.DictReader(f)] == ["1", "2"]


def test_fvcore_and_check(capsys):
    status, out, err = run(capsys, "test_litv2", "--fvcore", "--check", "--strict")
    assert (status, err) == (0, "")
    assert "fvcore" in out


@torch.library.custom_op("vizoo_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.fixture
def opaque_resnet(monkeypatch, here):
    """ResNets of timm with an operator that nobody can price."""
    forward = timm.models.resnet.ResNet.forward_head
    monkeypatch.setattr(
        timm.models.resnet.ResNet, "forward_head", lambda self, x, *a, **k: forward(self, opaque(x), *a, **k)
    )


REASON = "operator vizoo_test::opaque has no cost formula: 1 call in the model"


def test_partial_counts_are_marked_everywhere(opaque_resnet, capsys, tmp_path):
    words = ("resnet18", "test_litv2", "--size", "64")
    files = [tmp_path / f"out.{kind}" for kind in ("json", "csv", "md")]
    for path in files:
        status, out, err = run(capsys, *words, "--out", str(path))
        assert (status, err) == (0, "")
        rows = {
            line.split()[0]: line for line in out.splitlines() if line.split()[:1] in (["resnet18"], ["test_litv2"])
        }
        assert rows["resnet18"].count("*") == 3  # not the parameters
        assert "*" not in rows["test_litv2"]
        assert f"* resnet18: partial count: {REASON}." in out
    found = json.loads(files[0].read_text(encoding="utf-8"))
    assert [(d["counts"]["status"], d["counts"]["reasons"]) for d in found] == [("partial", [REASON]), ("complete", [])]
    with files[1].open(encoding="utf-8") as f:
        assert [(r["status"], r["reasons"]) for r in csv.DictReader(f)] == [("partial", REASON), ("complete", "")]
    assert f"* resnet18: partial count: {REASON}." in files[2].read_text(encoding="utf-8")


def test_strict_fails_on_partial_counts(opaque_resnet, capsys):
    status, out, err = run(capsys, "resnet18", "test_litv2", "--size", "64", "--strict")
    assert (status, err) == (1, f"vizoo profile: error: --strict: partial counts: resnet18: {REASON}\n")
    assert "test_litv2" in out
    assert run(capsys, "test_litv2", "--size", "64", "--strict")[0] == 0


def test_check_bites(capsys, monkeypatch):
    monkeypatch.setattr("vizoo.tools.profiling.profile.fvcore_counts", lambda *a, **k: {"": 5})
    status, _, err = run(capsys, "resnet18", "--size", "64", "--check")
    assert status == 1
    assert "by fvcore 0" in err


def test_second_engine_that_cannot_trace(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no\ntrace")

    monkeypatch.setattr("vizoo.tools.profiling.profile.fvcore_counts", broken)
    status, out, err = run(capsys, "resnet18", "--size", "64", "--check")
    assert status == 1
    assert "resnet18  64x64" in out
    assert err == "vizoo profile: error: 'resnet18': the second engine cannot trace it: no trace\n"


@pytest.mark.parametrize("value", ["numpy", "branch", "device"])
def test_a_named_model_that_needs_numbers(value, capsys, monkeypatch):
    """It is built with weights and counted on a random image, and the result says so; a device is no number."""
    forward = timm.models.resnet.ResNet.forward_head

    def head(self, x, *args, **kwargs):
        if value == "numpy":
            x = torch.from_numpy(x.detach().numpy())
        elif (value == "branch" and x.sum().item() > 1e9) or (value == "device" and x.is_meta):
            x = x @ x
        return forward(self, x, *args, **kwargs)

    plain = json_of(capsys, "resnet18", "--size", "64")
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_head", head)
    found = json_of(capsys, "resnet18", "--size", "64")
    assert found["counts"]["macs"] == plain["counts"]["macs"]
    assert found["counts"]["status"] == ("complete" if value == "device" else "partial")
    if value != "device":
        assert {"numpy": "numbers leave torch", "branch": "asks for numbers"}[value] in found["counts"]["reasons"][0]


def test_columns_are_those_of_a_row(capsys, tmp_path):
    path = tmp_path / "x.csv"
    assert run(capsys, "test_litv2", "--size", "64", "--out", str(path))[0] == 0
    with path.open(encoding="utf-8") as f:
        row = next(csv.DictReader(f))
    assert list(row) == COLUMNS
    assert all(row[c] for c in ("model", "status", "device", "features", "vizoo", "date"))


@pytest.mark.parametrize(
    "extra",
    [
        ["--dtype", "bf16"],
        ["--dtype", "bf16", "--amp"],
        ["--channels-last"],
        ["--no-fused"],
        ["--features"],
        ["--in-chans", "1", "--num-classes", "0"],
        ["--model-kwargs", "alpha=1.0", "global_pool=max"],
        pytest.param(["--compile"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_conditions(extra, capsys):
    words = ("test_litv2", "--device", "cpu", "--measure", "latency,memory", "--size", "64", *FAST, *extra)
    status, out, _ = run(capsys, *words)
    assert status == 0
    if "--dtype" in extra:
        assert "bf16" in out
    if "--channels-last" in extra:
        assert "channels_last" in out


def test_reparam(capsys):
    plain = json_of(capsys, "repvgg_a0", "--size", "64")
    merged = json_of(capsys, "repvgg_a0", "--size", "64", "--reparam")
    assert merged["counts"]["params"] < plain["counts"]["params"]
    assert merged["counts"]["macs"] < plain["counts"]["macs"]


def json_of(capsys, *words):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        assert run(capsys, *words, "--out", str(path))[0] == 0
        return json.loads(path.read_text(encoding="utf-8"))[0]


def test_counts_do_not_depend_on_the_conditions(capsys):
    base = json_of(capsys, "test_litv2")
    for words in (["--no-fused"], ["--dtype", "bf16", "--device", "cpu", "--measure", "count"], ["--channels-last"]):
        other = json_of(capsys, "test_litv2", *words)
        assert [other["counts"][k] for k in ("params", "macs", "acts")] == [
            base["counts"][k] for k in ("params", "macs", "acts")
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["litv2_x"], "unknown model 'litv2_x'; did you mean litv2_"),
        (["nothing*"], "no model matches 'nothing*'"),
        (["test_vit@0x0"], "unknown model 'test_vit@0x0'; a size behind a name is @224 or @800x1280"),
        (["torchvision:resnet18@224x"], "unknown model 'torchvision:resnet18@224x'; a size behind a name is @224"),
        (["speed.jsonl"], "model 'speed.jsonl': records are read by 'vizoo report'"),
        (["test_litv2", "--size", "0"], "--size 0: give one side"),
        (["test_litv2", "--size", "1", "2", "3"], "--size 1 2 3"),
        (["test_litv2", "--device", "tpu"], "unknown device 'tpu'"),
        (["test_litv2", "--device", "cuda:63"], "not on this machine"),
        (["test_litv2", "--device", "meta", "--measure", "latency"], "the meta device computes nothing"),
        (["test_litv2", "--batch", "0"], "--batch: got 0, must be a whole number between 1"),
        (["test_litv2", "--threads", "0"], "--threads: got 0, must be a whole number between 1"),
        (["test_litv2", "--threads", "1,x"], "--threads: got x, must be a whole number"),
        (["test_litv2", "--dtype", "int4"], "--dtype: got 'int4', must be one of fp32, tf32, bf16, fp16, int8"),
        (["test_litv2", "--out", "x.txt"], "the ending must be .json or .csv or .md"),
        (["test_litv2", "--out", "/nowhere/x.csv"], "no such folder"),
        (["test_litv2", "--plot", "x.gif"], "the ending must be .png"),
        (["test_litv2", "--model-kwargs", "alpha"], "--model-kwargs: got 'alpha', must be KEY=VALUE"),
        (["test_litv2", "--num-classes", "-1"], "--num-classes: got -1"),
        (["test_litv2", "--weights", "/nowhere.pth"], "--weights '/nowhere.pth' does not exist"),
        (["test_litv2", "--amp"], "give dtype bf16 or fp16"),
        (["test_litv2", "--min-time", "3", "--max-time", "1"], "need 0 <= min <= max"),
        (["test_litv2", "--import", "no_such_package"], "--import 'no_such_package'"),
        (["test_litv2", "--import", ""], "--import ''"),
        (["test_litv2", "--import", "."], "--import '.'"),
        (["test_litv2", "--size", "9" * 30], "--size 999"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--size", "20"], "'test_litv2' cannot run at size 20x20: got a"),
        (["--model-kwargs", "alpha=3"], "got alpha=3"),
        (["--model-kwargs", "no_such=3"], "no_such"),
    ],
    ids=str,
)
def test_a_model_that_cannot_run_is_a_row_with_its_reason(words, reason, capsys, tmp_path):
    for ending in ("csv", "json", "md"):
        path = tmp_path / f"x.{ending}"
        status, out, err = run(capsys, "test_litv2", *words, "--out", str(path))
        assert (status, err.count("\n")) == (2, 1)  # all of it is bad input
        assert err.startswith("vizoo profile: error: ")
        for text in (err, path.read_text(encoding="utf-8"), "".join(out.splitlines()[3:])):
            assert reason in text
            assert "multiply-accumulates of" not in text  # nothing is counted that it would explain
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))[0]
    check_record(found)
    assert (found["counts"], found["failure"]["bad_input"]) == (None, True)
    assert (found["target"]["name"], found["conditions"]["dtype"]) == ("test_litv2", "fp32")
    (row,) = rows_of(tmp_path / "x.csv")
    assert (row["status"], row["macs"]) == ("failed", "")


NET = """
from torch import nn
def build(grad=True, **others):
    return nn.Linear(8, 4).requires_grad_(grad)
"""


def test_any_argument_of_a_model_is_kept_and_given_again(capsys, tmp_path, here):
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    given = ["a='3'", "b=-1e999", "c=({1}, b'x', None)", 'd=it\'s "x"', "e= 3"]
    words = [f"{tmp_path}/net.py:build", "--input", "2x8", "--measure", "memory", "--threads", "1", "--depth", "0"]
    file = tmp_path / "x.jsonl"
    assert run(capsys, *words, *FAST, "--save", str(file), "--model-kwargs", *given)[0] == 0
    record = profiler.read_records(file)[0]
    assert record.target["kwargs"] == {"a": "3", "b": "-inf", "c": ["{1}", "b'x'", None], "d": 'it\'s "x"', "e": 3}
    args, again = (
        vars(profiler.build_parser().parse_args(w))
        for w in ([*words, *FAST, "--model-kwargs", *given], shlex.split(record.command)[2:])
    )
    assert again == args


def test_a_size_behind_a_name_is_its_only_one(capsys, here):
    out = run(capsys, "test_vit@64", "test_vit", "--size", "32,48")[1]
    assert re.findall(r"test_vit +(\S+)", out) == ["64x64", "32x32", "48x48"]


def test_a_row_that_was_measured_in_part_says_why(capsys, tmp_path, here):
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    words = ["--input", "2x8", "--device", "cpu", "--measure", "memory,train", "--model-kwargs", "grad=False", *FAST]
    status, out, err = run(capsys, f"{tmp_path}/net.py:build", *words)
    assert status == 1
    assert "no parameter of the model requires a gradient\n" in out
    assert "/net.py:build: train: no parameter" in err


def test_markdown_has_notes_and_whole_rows(capsys, tmp_path, monkeypatch, here):
    """What a terminal shows elsewhere, doubts and failures, is a column of the file."""
    from vizoo.tools.profiling import profile

    def doubtful(result, *args):
        result.notes.append("doubtful")

    monkeypatch.setattr(profile, "_measure", doubtful)
    path = tmp_path / "x.md"
    words = ("test_litv2", "levit_128s", "--size", "200", "--device", "cpu", "--measure", "latency", "--out", str(path))
    assert run(capsys, *words)[0] == 1
    head, _, *rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert head.endswith("| note |")
    assert [row.count("|") for row in rows] == [head.count("|")] * 2
    assert rows[0].endswith("| doubtful |")
    assert "| 'levit_128s' cannot run at size 200x200: " in rows[1]


def rows_of(path):
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_model_that_fails_takes_no_other_with_it(capsys, tmp_path):
    out = tmp_path / "x.csv"
    words = ("resnet18", "levit_128s", "test_litv2", "--size", "200", "--measure", "count", "--strict", "--depth", "0")
    status, shown, err = run(capsys, *words, "--out", str(out))
    assert status == 1
    assert err.startswith("vizoo profile: error: 1 of 3 rows failed: 'levit_128s' cannot run at size 200x200: ")
    rows = rows_of(out)
    assert [(r["model"], r["status"]) for r in rows] == [
        ("resnet18", "complete"), ("levit_128s", "failed"), ("test_litv2", "complete"),
    ]  # fmt: skip
    assert [r["macs"] != "" for r in rows] == [True, False, True]
    assert shown.count("modules of") == 2


def test_a_failure_is_told_beside_its_conditions(capsys, tmp_path):
    """Several dtypes and batches have columns, and a reason stands behind them."""
    out = tmp_path / "x.md"
    status, shown, _ = run(capsys, "levit_128s", "--size", "200", "--dtype", "fp32", "bf16", "--out", str(out))
    assert status == 2
    for text in (shown, out.read_text(encoding="utf-8")):
        rows = [line for line in text.splitlines() if "levit_128s" in line]
        assert [("fp32" in row, "cannot run at size" in row) for row in rows] == [(True, True), (False, True)]


def test_names_of_files_are_no_markup(capsys):
    from vizoo.tools.profiling.views import print_notes

    found, name = attempt("test_litv2"), "local-dir:/[bold]/[/red]"
    found.target["name"], found.notes = name, ["[b]"]
    print_notes([found])
    assert capsys.readouterr().err == f"{name}: [b]\n"


class Killed(BaseException):
    """Nobody catches it, as nobody catches a signal that kills."""


@pytest.mark.parametrize("ending", ["csv", "json", "md", "stdout"])
def test_a_killed_run_keeps_what_it_measured(ending, capsys, monkeypatch, tmp_path, here):
    """Each row is printed and on the disk before the next model is begun."""
    from vizoo.tools.profiling import profile

    path, build = tmp_path / f"x.{ending}", profile.find_target

    def killed(name, *args):
        if name == "resnet18":
            raise Killed
        return build(name, *args)

    monkeypatch.setattr(profile, "find_target", killed)
    words = ["test_litv2", "resnet18", *(["--out", str(path)] if ending != "stdout" else [])]
    with pytest.raises(Killed):
        profiler.main(words)
    out = capsys.readouterr().out
    assert "test_litv2  96x96" in out
    if ending != "stdout":
        assert "test_litv2" in path.read_text(encoding="utf-8")
    if ending == "json":
        assert [d["counts"]["macs"] > 0 for d in json.loads(path.read_text(encoding="utf-8"))] == [True]


def test_a_process_that_dies_is_a_row(capsys, monkeypatch, tmp_path):
    """The rows of other models and numbers of threads are there all the same."""

    def cases(threads, cases, work, *args, group):
        for n in threads:
            for case in cases:
                dead = case.spec == "resnet18" and n == 2
                yield case, n, Failure("the process died") if dead else work(case, *args)

    monkeypatch.setattr(machine, "run_cases", cases)
    out = tmp_path / "x.csv"
    words = ("resnet18", "test_litv2", "--size", "64", "--threads", "1", "2", "--out", str(out))
    assert run(capsys, *words)[0] == 1
    found = [(r["model"], r["status"], r["reasons"]) for r in rows_of(out)]
    dead = ("resnet18", "failed", "the process died")
    assert found == [("resnet18", "complete", ""), ("test_litv2", "complete", ""), dead, ("test_litv2", "complete", "")]
    assert rows_of(out)[2]["threads"] == "2"


def test_json_is_whole_when_interrupted(capsys, monkeypatch, here):
    from vizoo.tools.profiling import profile

    build = profile.find_target

    def interrupted(name, *args):
        if name == "resnet18":
            raise KeyboardInterrupt
        return build(name, *args)

    monkeypatch.setattr(profile, "find_target", interrupted)
    status, out, err = run(capsys, "test_litv2", "test_vit", "resnet18", "--json")
    assert (status, err) == (130, "vizoo profile: interrupted\n")
    assert [d["target"]["name"] for d in json.loads(out)] == ["test_litv2", "test_vit"]


def test_a_figure_may_be_partial_alone(capsys, monkeypatch):
    """The star stands at the figures that a reason concerns, and the footnote names them."""
    from vizoo.tools.profiling import recording

    record = recording.Recorder._record

    def told(self, func, args, kwargs):
        if func is torch.ops.aten.relu_.default:
            self.tell("guessed in {where}", cells=("flops_other",))
        return record(self, func, args, kwargs)

    monkeypatch.setattr(recording.Recorder, "_record", told)
    found = json_of(capsys, "resnet18", "--size", "64")
    assert found["counts"]["statuses"] == {
        "params": "complete", "macs": "complete", "flops_other": "partial", "acts": "complete", "bytes": "complete",
    }  # fmt: skip
    out = run(capsys, "resnet18", "--size", "64")[1]
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["resnet18"])
    assert [cell.endswith("*") for cell in row] == [False, False, False, False, True, False]
    assert "* resnet18: partial count of other GFLOPs: guessed in act1, layer1.0.act1" in out


@pytest.mark.parametrize("engine", ["auto", "meta", "fake"])
def test_count_by_name(engine):
    """As the command counts; a module with its input as before."""
    found = profiler.count("vit_tiny_patch16_224", engine=engine)
    assert (found.params, found.macs, found.status) == (5_717_416, 1_253_683_200, "complete")
    assert profiler.count("resnet18", torch.empty(2, 3, 64, 64, device="meta")).macs == 2 * 148_557_824
    assert profiler.count("resnet18", size=64).macs == profiler.count("resnet18", size=(64, 64)).macs == 148_557_824
    assert (real := profiler.count("test_vit", engine="real")).engine == "cpu"
    assert real.macs == profiler.count("test_vit").macs
    assert profiler.count(nn.Linear(4, 3), torch.zeros(2, 4)).macs == 24
    assert profiler.count("test_vit", backward=True, engine="fake").macs > 2 * profiler.count("test_vit").macs


@pytest.mark.parametrize(
    ("target", "message"),
    [("resnet19", "unknown model 'resnet19'"), (5, "model 5: give a name"), ("litv2*", "name one")],
)
def test_wrong_targets(target, message):
    for function in (profiler.count, profiler.profile, lambda wrong: profiler.compare("test_vit", wrong)):
        if target == 5 and function not in (profiler.count, profiler.profile):
            message = "target 5: give a name"
        with pytest.raises(UserError, match=re.escape(message)):
            function(target)


def test_compare_takes_names_modules_and_functions():
    how = {"rounds": 2, "warmup": 1}
    found = profiler.compare("test_vit", "test_resnet", "test_vit", **how)
    assert list(found.seconds) == ["test_vit", "test_resnet", "test_vit 2"]
    assert all(len(samples) == 2 for samples in found.seconds.values())
    x, layer = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    same = profiler.compare({"layer": layer, "by hand": lambda x: layer[0](x)}, [x], **how)
    assert same.difference == {"layer": 0.0, "by hand": 0.0}  # without dropout
    assert layer.training
    other = profiler.compare(layer, nn.Linear(4, 5), inputs=x, **how)
    assert other.difference == {"Sequential": 0.0, "Linear": float("inf")}


class Awkward(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 3))
        self.inner.lock = threading.Lock()

    def forward(self, x):
        return self.inner(x)


UNUSUAL = {
    "lazy": lambda: nn.Sequential(nn.LazyLinear(3)),
    "script": lambda: torch.jit.script(nn.Linear(4, 3)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(4, 3)).eval())),
    "exported": lambda: torch.export.export(nn.Linear(4, 3), (torch.zeros(1, 4),)).module(),
    "lock": Awkward,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_modules(kind):
    model = UNUSUAL[kind]()
    found = profiler.profile(model, torch.zeros(1, 4), measure=FOUR, batch=1, min_time=0, max_time=0)
    assert (found.macs, found.status) == (12, "complete")
    assert found.latency.median > 0
    assert (kind == "lazy") == any(is_lazy(p) for p in model.parameters())


def test_one_input_needs_no_list():
    x = torch.zeros(2, 4)
    assert profiler.profile(nn.Linear(4, 3), x).macs == profiler.profile(nn.Linear(4, 3), [x]).macs == 24


def test_python_interface():
    r = profiler.profile(
        "test_litv2", size=np.array([64]), measure=("latency", "throughput"), batch=np.int64(1), min_time=0, max_time=0
    )
    check_record(json.loads(json.dumps(r.to_dict(), allow_nan=False)))
    assert r.latency.median > 0
    assert r.throughput == pytest.approx(1 / r.latency.median, rel=5)
    assert r.memory is None
    assert r.by_module(depth=0)[0]["macs"] == r.macs
    assert sum(row["macs"] for row in r.by_op()) == r.macs
    assert "| test_litv2 | 64x64 |" in r.table()
    assert r.bytes > r.params * 4


def test_any_module():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, flag):
            return self.fc(x) if flag else x

    model = Two().train()
    r = profiler.profile(model, (torch.zeros(1, 4), True), measure=FOUR, batch=3, min_time=0, max_time=0)
    assert (r.name, r.size, r.macs) == ("Two", None, 12)
    assert r.measured("throughput").batch == 3
    assert model.training


@pytest.mark.parametrize(
    "kwargs",
    [
        {"measure": "speed"}, {"dtype": "int4"}, {"dtype": "int8", "measure": "train"},
        {"device": "cuda:99"}, {"batch": 0}, {"size": -4},
        {"measure": 3}, {"batch": 1.5}, {"batch": "7"}, {"size": "64"},
        {"min_time": 3, "max_time": 1}, {"min_time": -1},
    ],
    ids=str,
)  # fmt: skip
def test_python_errors(kwargs):
    with pytest.raises(UserError, match=str(next(iter(kwargs.values())))):
        profiler.profile("test_litv2", **kwargs)


def test_import_is_light():
    """Importing the profiler brings in neither fvcore, torchvision models, matplotlib nor any mm package."""
    code = (
        "import sys\nfrom vizoo.tools.profiler import *\n"
        "heavy = ('fvcore', 'matplotlib', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'sklearn')\n"
        "bad = [m for m in heavy if m in sys.modules]\n"
        "raise SystemExit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_callers_module_stays_as_it_was():
    """Neither its dtype, memory format, modes nor gradients change, whatever is measured."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    r = profiler.profile(
        model, (torch.zeros(1, 3, 8, 6),), measure=FOUR, dtype="bf16", channels_last=True, min_time=0, max_time=0
    )
    assert r.memory.median > 0
    assert [m.training for m in model.modules()] == [True, True, False, True]
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert value.is_contiguous()
        assert torch.equal(value, before[key])


def test_options_of_the_process_come_back(capsys):
    from timm.layers import use_fused_attn

    before = torch.get_num_threads(), use_fused_attn(), torch.backends.cudnn.benchmark
    words = ("test_vit", "--no-fused", "--device", "cpu", "--measure", "latency", "--threads", "2", *FAST)
    assert run(capsys, *words)[0] == 0
    assert (torch.get_num_threads(), use_fused_attn(), torch.backends.cudnn.benchmark) == before


def test_unfused_really_is(capsys, tmp_path):
    ops = {}
    for option in ("--fused", "--no-fused"):
        ops[option] = {row["op"] for row in json_of(capsys, "test_vit", option)["ops"]}
    assert ops["--fused"] - ops["--no-fused"] == {"aten::scaled_dot_product_attention"}


def test_a_failure_while_measuring_is_one_line(capsys, monkeypatch, here):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nfor this dtype")

    monkeypatch.setattr("vizoo.tools.profiling.measures.measure", broken)
    status, out, err = run(capsys, "test_litv2", "--device", "cpu", "--dtype", "fp16", "--measure", "latency")
    assert status == 1
    assert err == ("vizoo profile: error: 'test_litv2' cannot run on cpu with --dtype fp16: no kernel for this dtype\n")
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["test_litv2"])
    assert row[2:4] == ["0.49", "0.010"]  # it was counted
    assert " ".join(row[-8:]) == "with --dtype fp16: no kernel for this dtype"
    assert attempt("test_litv2", measure="throughput", batch=3).conditions["batch"] == 3


@pytest.mark.parametrize("ending", ["json", "csv", "md"])
def test_out_is_checked_before_anything_is_built(ending, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "vizoo.tools.profiling.target.build_model", lambda *args, **kwargs: pytest.fail("a model was built")
    )
    folder, readonly, foreign = (tmp_path / f"{name}.{ending}" for name in ("folder", "readonly", "foreign"))
    folder.mkdir()
    readonly.write_text("vizoo", encoding="utf-8")
    readonly.chmod(0o444)
    foreign.write_text("mine", encoding="utf-8")
    for path, message in ((folder, "is a folder"), (readonly, "is read-only"), (foreign, "vizoo did not write")):
        status, out, err = run(capsys, "test_litv2", "--out", str(path))
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert foreign.read_text(encoding="utf-8") == "mine"


def test_the_table_is_printed_before_it_is_written(capsys, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vizoo.tools.common.os.fsync", full)
    for option in ("--out", "--plot"):
        path = tmp_path / ("x.csv" if option == "--out" else "x.png")
        status, out, err = run(capsys, "test_litv2", "--size", "64", option, str(path))
        assert (status, err.count("\n")) == (1, 1)
        assert "test_litv2" in out
        assert "No space left" in err
        assert list(tmp_path.iterdir()) == []


def test_a_row_for_every_dtype_and_batch(capsys, tmp_path):
    """Torch's names of dtypes are understood; the table says what differs, and the line below it what does not."""
    out = tmp_path / "x.csv"
    words = ("test_litv2", "--device", "cpu", "--measure", "latency", "--size", "32", "--threads", "1", *FAST)
    status, shown, _ = run(capsys, *words, "--batch", "1", "2", "--dtype", "float32", "bf16", "--out", str(out))
    assert status == 0
    with out.open(encoding="utf-8") as f:
        found = [(row["dtype"], row["latency_batch"]) for row in csv.DictReader(f)]
    assert found == [("fp32", "1"), ("fp32", "2"), ("bf16", "1"), ("bf16", "2")]
    header = shown.split("─")[0].strip().splitlines()[-1].split()
    assert (header[2:4], header[-1]) == (["dtype", "batch"], "threads")
    rows = [line.split()[2:4] for line in shown.splitlines() if line.split()[:1] == ["test_litv2"]]
    assert rows == [[dtype, batch] for dtype, batch in found]
    assert "(cpu); ms: median of one call; torch" in shown
    shown = run(capsys, *words, "--batch", "2", "--dtype", "bf16")[1]
    assert "(cpu); bf16; ms: median of one call, batch 2; torch" in shown
    assert "dtype" not in shown


def test_int8_multiplies_in_linear_layers_only(capsys):
    """Of a copy: what a Python caller gave stays as it is, and the counts are those of the model."""
    words = ("test_nat", "--device", "cpu", "--measure", "latency", "--size", "64", "--threads", "1", *FAST)
    status, shown, _ = run(capsys, *words, "--dtype", "fp32", "int8")
    rows = [line.split()[2:5] for line in shown.splitlines() if line.split()[:1] == ["test_nat"]]
    assert (status, [row[0] for row in rows]) == (0, ["fp32", "int8"])
    assert rows[0][1:] == rows[1][1:]  # parameters and multiply-accumulates
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).eval()
    x = torch.randn(5, 64)
    profiler.profile(model, (x,), measure="latency", dtype="int8", min_time=0, max_time=0)
    assert type(model[0]) is torch.nn.Linear
    changed = quantized(copy.deepcopy(model))
    assert [type(layer) is torch.nn.Linear for layer in changed] == [False, False, True]  # too narrow to pay
    error = (changed(x) - model(x)).norm() / model(x).norm()
    assert 1e-4 < error < 0.05, error


def test_memory_says_its_batch(capsys):
    words = ("test_litv2", "--device", "cpu", "--measure", "memory", "--size", "32", "--batch", "3", *FAST)
    assert "peak MB: weights, input and activations, batch 3;" in run(capsys, *words)[1]


def test_json_is_all_of_standard_output(capsys, opaque_resnet):
    words = ("resnet18", "--size", "64", "--measure", "latency", "--depth", "2", "--threads", "1", *FAST)
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0
    (found,) = json.loads(out)
    assert (found["target"]["name"], found["counts"]["reasons"]) == ("resnet18", [REASON])
    assert len(found["measurements"][0]["samples"][0]) >= 3


@pytest.mark.parametrize(
    "options",
    [["--batch", "8"], ["--dtype", "bf16"], ["--threads", "1,2"], ["--compile"], ["--measure", "count"]],
    ids=" ".join,
)
def test_models_may_follow_any_option(options):
    parse = profiler.build_parser().parse_args
    assert parse([*options, "test_litv2"]) == parse(["test_litv2", *options])
    with pytest.raises(UserError, match="MODEL"):
        parse(options)


@pytest.mark.parametrize("words", [["1", "2"], ["1,2"], ["1,2", "3"]], ids=" ".join)
def test_threads_in_either_form(words):
    threads = profiler.build_parser().parse_args(["x", "--threads", *words]).threads
    assert threads == [int(n) for n in ",".join(words).split(",")]
