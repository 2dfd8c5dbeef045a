"""``vizoo bench --suite gpu``: complete rows, one job lost by a crash or a hang, the budget, bad options, the table."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vizoo.tools import bench, cli, common
from vizoo.tools.documents import tables
from vizoo.tools.gpu import cases, suite, worker
from vizoo.tools.gpu.models import measured
from vizoo.tools.profiling import sides

ROOT = Path(__file__).parents[2]
ABSENT = [
    "fvcore",
    "matplotlib",
    "mmcv",
    "mmdet",
    "mmengine",
    "mmseg",
    "natten",
    "psutil",
    "pydicom",
    "pynvml",
    "rich",
    "scipy",
    "sklearn",
    "torchmetrics",
]
FAKE = """
import json, os, sys, time
with os.fdopen(int(sys.argv[1]), "w") as results:
    def send(row):
        print(json.dumps(row), file=results, flush=True)
    send({"ready": True})
    for text in sys.stdin:
        item = json.loads(text)["item"]
        if item == "crash":
            print("what a kernel says")
            sys.stdout.flush()
            os.kill(os.getpid(), 11)
        if item == "exit":
            sys.exit(7)
        if item == "half":
            results.write('{"half')
            results.flush()
            os._exit(1)
        if item == "hang":
            time.sleep(60)
        send({"failed": "no memory", "fatal": True} if item == "fatal" else {"pid": os.getpid()})
"""


def rows_of(path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def run_fake(path, items, seconds=30.0):
    jobs = [{"section": "ops", "item": item} for item in items]
    with (
        contextlib.closing(suite.Record(path)) as record,
        contextlib.closing(suite.Worker("dry", (sys.executable, "-c", FAKE))) as worker,
    ):
        suite.run_jobs(record, worker, jobs, time.monotonic() + seconds, {})
    return rows_of(path)


def test_dry_run(tmp_path, capsys):
    """Everything but the compilers: all sections, every operator in every form, every kind of row."""
    out = tmp_path / "gpu.jsonl"
    assert cli.main(["bench", "--suite", "gpu", "--dry", "--out", str(out), "--seconds", "900"]) == 0
    start, *rows, end = rows_of(out)
    assert (start["section"], start["dry"], end["failures"]) == ("start", True, 0)
    assert list(dict.fromkeys(row["section"] for row in rows)) == [*suite.SECTIONS, "shares"]
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    (env,) = (row for row in rows if row["section"] == "env")
    assert env["torch"] == torch.__version__
    assert env["bytes_per_s"] > 0
    assert set(env["flops_per_s"]) == {"bfloat16", "float32"}
    (tests,) = (row for row in rows if row["section"] == "tests")
    assert tests["status"] == 0
    assert "skipped" in tests["summary"]
    planned = suite.plan(dry=True)
    for section, jobs in planned.items():
        found = [row for row in rows if row["section"] == section]
        assert [{k: row[k] for k in job} for row, job in zip(found, jobs, strict=True)] == jobs, section
    for row in rows:
        if row["section"] == "ops":
            assert min(row[k] for k in ("forward_ms", "both_ms", "host_us", "floor_ms", "share", "bytes", "flops")) > 0
            assert row["form"] == "plain sdpa" or row["error"] <= sides.TOLERANCE[row["dtype"]]
        if row["section"] in ("models", "graphs", "compile"):
            assert row["images_per_s"] > 0
    speed = {(row["item"], row["batch"], row["mode"]): row["images_per_s"] for row in rows if "images_per_s" in row}
    beside = {(row["item"], row["mode"]): row for row in rows if row["section"] == "shares"}
    assert set(beside) == {
        ("test_nat", "infer"),
        ("test_resnet", "infer compiled"),
        ("test_resnet", "train compiled"),
    }
    assert beside["test_nat", "infer"]["ratio"] == speed["test_nat", 8, "infer"] / speed["test_nat", 8, "infer graph"]
    ratio = speed["test_resnet", 2, "infer compiled"] / speed["test_nat", 2, "infer compiled"]
    assert beside["test_resnet", "infer compiled"]["ratio"] == ratio
    shown = capsys.readouterr().out
    assert shown.count("\n") == len(rows) + 2
    assert "images/s" in shown


def test_crash_and_hang_cost_one_job(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.MOST, "ops", 3.0)
    items = ["a", "crash", "b", "exit", "hang", "c", "half", "fatal", "d", "e"]
    rows = run_fake(tmp_path / "x.jsonl", items)
    assert [row["item"] for row in rows] == items
    failed = {row["item"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {
        "crash": "the process ended by SIGSEGV: what a kernel says",
        "exit": "the process ended with status 7",
        "hang": "stopped after 3 s",
        "half": "the process ended with status 1",
        "fatal": "no memory",
    }
    pids = [row["pid"] for row in rows if "pid" in row]
    assert len(set(pids)) == 4  # of a, b, c and d, which e shares
    assert pids[-1] == pids[-2]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_fails_in_the_child_is_a_row(tmp_path):
    """The true child answers an error with its text and goes on."""
    job = {"section": "ops", "item": "depthwise 5x5 c2 k5", "dtype": "float32", "form": "reference"}
    with contextlib.closing(suite.Worker("dry")) as worker:
        assert worker.ask({**job, "item": "nothing"}, 120) == {"failed": "KeyError: 'nothing'"}
        process = worker.process
        assert worker.ask({**job, "dtype": "bfloat16"}, 120)["forward_ms"] > 0
        assert worker.process is process


def test_wrong_results_get_no_time(monkeypatch):
    child = worker.Child(dry=True)
    (case,) = (c for c in child.cases.values() if c.name.startswith("lofi"))
    job = {"section": "ops", "item": case.name, "dtype": "float32"}
    for name, form in (
        ("scaled", lambda q, kv: 1.001 * case.reference(q, kv)),
        ("gradient", lambda q, kv: case.reference(q, kv.detach())),
        ("last image", lambda q, kv: torch.cat([case.reference(q, kv)[:-1], torch.zeros_like(q[-1:])])),
        ("nan", lambda q, kv: case.reference(q, kv) * float("nan")),
    ):
        monkeypatch.setitem(case.forms, name, form)
        row = child.run({**job, "form": name})
        assert "failed" in row, name
        assert "forward_ms" not in row
    assert child.run({**job, "form": "reference"})["forward_ms"] > 0


@pytest.mark.parametrize("dry", [False, True], ids=["real", "dry"])
def test_cases_are_well_formed(dry):
    """Names are unique, and models and peers exist, as nobody sees the full sizes before a GPU does."""
    import timm

    found = list(cases.cases(dry))
    assert len({case.name for case in found}) == len(found)
    for case in found:
        assert {*case.compiled, *case.floors} <= set(case.forms)
    models = suite.DRY_MODELS if dry else measured()
    assert models
    names = {model.name for model in models}
    assert not [name for name in names if not timm.is_model(name)]
    assert {model.peer for model in models if model.peer} <= names


def test_flex_and_masks_are_right():
    """Forms that a dry run leaves out or that stand for the neighbourhood by a mask."""
    for case in (cases.neighborhood(7, 1, 16, 3, 2, batch=2), cases.neighborhood(5, 1, 16, 3, bias=False)):
        inputs = case.inputs(2, torch.device("cpu"))
        with torch.no_grad():
            reference = case.reference(*inputs)
            torch.testing.assert_close(case.forms["sdpa with mask"](*inputs), reference)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "compile", lambda f, **_: f)
                torch.testing.assert_close(case.forms["flex"](*inputs), reference)


def test_budget_is_kept(tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    start = time.monotonic()
    words = ["--suite", "gpu", "--dry", "--out", str(out), "--budget", "1", "--sections", "ops", "models"]
    assert bench.main(words) == 1
    assert time.monotonic() - start < 15
    rows = rows_of(out)
    left = {row["section"]: len(row["left_out"]) for row in rows if "left_out" in row}
    planned = suite.plan(dry=True)
    assert left["models"] == len(planned["models"])
    assert "rows failed" in capsys.readouterr().err


def test_a_second_run_adds_rows(tmp_path):
    out = tmp_path / "gpu.jsonl"
    run_fake(out, ["a"])
    with out.open("a", encoding="utf-8") as f:
        f.write('{"section": "ops", "it')  # a machine that went away
    assert [row["item"] for row in run_fake(out, ["b"])] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite cpu", "--suite"),
        ("--suite gpu --dry", "needs --out"),
        ("--suite gpu --dry --out x.csv", "must be .jsonl"),
        ("--suite gpu --dry --out nowhere/x.jsonl", "no such folder"),
        ("--suite gpu --dry --out foreign.jsonl", "did not write"),
        ("--suite gpu --dry --out x.jsonl --sections nothing", "--sections"),
        ("--suite gpu --dry --out x.jsonl --only nothing", "--only 'nothing'"),
        ("--suite gpu --dry --out x.jsonl --seconds 0", "--seconds"),
        ("--suite gpu --dry --out x.jsonl --batch 2", "got --batch"),
        ("litv2_s --suite gpu --out x.jsonl", "got 'litv2_s'"),
        ("litv2_s --dry", "--dry: needs --suite gpu"),
        ("litv2_s --only nat", "--only: needs --suite gpu"),
        ("litv2_s --seconds 3", "--seconds: needs --suite gpu"),
        ("litv2_s --out x.jsonl", "must be .json or .csv or .md"),
    ],
)
def test_bad_options(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("foreign.jsonl").write_text('{"mine": 1}\n', encoding="utf-8")
    assert bench.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not Path("x.jsonl").exists()


def test_needs_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--suite", "gpu", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "no CUDA device is here; --dry" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_runs_without_what_a_gpu_machine_lacks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(cls, name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {ABSENT} else find(name, path, target)\n"
        "PathFinder.find_spec = classmethod(find_spec)\n",
        encoding="utf-8",
    )
    out = tmp_path / "gpu.jsonl"
    paths = [str(tmp_path), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    check = [sys.executable, "-c", "import rich"]
    assert b"ModuleNotFoundError" in subprocess.run(check, env=env, capture_output=True, check=False).stderr
    words = ["-m", "vizoo", "bench", "--suite", "gpu", "--dry", "--out", str(out)]
    words += ["--sections", "ops", "models", "profile", "--only", "nat"]
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["item"] for row in rows_of(out) if row["section"] == "models"] == ["test_nat"] * 3


START = {"section": "start", "vizoo": "1", "dry": False}
ENV = {"section": "env", "item": "environment", "device": "Card", "torch": "2.11", "triton": "3.6"}
OP = {"section": "ops", "item": "halo 64x64", "dtype": "bfloat16", "form": "triton", "batch": 128, "error": 0.003}
MODEL = {"section": "models", "item": "nat_tiny", "batch": 128, "mode": "infer"}


def record_of(folder, *rows):
    path = folder / "gpu-card-torch211.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_table(tmp_path):
    assert tables.gpu_table(tmp_path) == "Not measured yet.\n"
    times = {"forward_ms": 0.25, "both_ms": 0.75, "floor_ms": 0.09}
    record_of(
        tmp_path,
        START,
        ENV,
        {**OP, **times, "forward_ms": 9.0},
        {**OP, **times},  # again: the last one counts
        {**OP, "form": "flex", "failed": "no memory"},
        {**MODEL, "images_per_s": 1234.5, "peak_bytes": 3 * 2**30},
    )
    assert tables.gpu_table(tmp_path).splitlines() == [
        "| operator | form | dtype | batch | forward, ms | with backward, ms | floor, ms | error "
        "| device | torch | triton |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |",
        "| `halo 64x64` | triton | bfloat16 | 128 | 0.250 | 0.750 | 0.090 | 3e-03 | Card | 2.11 | 3.6 |",
        "",
        "| model | mode | batch | images/s | peak, GiB | device | torch | triton |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- |",
        "| `nat_tiny` | infer | 128 | 1,234 | 3.00 | Card | 2.11 | 3.6 |",
    ]


def test_table_holds_no_dry_run_and_no_failure(tmp_path):
    good = {**OP, "forward_ms": 1.0, "both_ms": 2.0}
    record_of(tmp_path, {**START, "dry": True}, ENV, good, START, ENV, {**good, "failed": "differ"})
    assert tables.gpu_table(tmp_path) == "Not measured yet.\n"
    (tmp_path / "gpu-other.jsonl").write_text("hello\n", encoding="utf-8")
    with pytest.raises(common.UserError, match="line 1 is no row"):
        tables.gpu_table(tmp_path)
