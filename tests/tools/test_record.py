"""Records: their schema, files of them, what is read back, sweeps, and processes that die."""

import json
import shlex

import pytest
import torch

from vizoo.tools import profiler
from vizoo.tools.common import UserError, append_json_line
from vizoo.tools.options import read_sizes
from vizoo.tools.profiling.record import Record, append_record, check_record, knees, read_records, table
from vizoo.tools.profiling.timing import Measurement
from vizoo.tools.profiling.views import modules_table, operators_table, parts_table

FAST = ["--min-time", "0", "--max-time", "0"]


@pytest.fixture(scope="module")
def counted():
    return profiler.profile("test_litv2", size=64)


@pytest.fixture
def record(counted):
    """A count with what measurements add."""
    found = Record.from_dict(json.loads(json.dumps(counted.to_dict())))
    found.measurements = [
        Measurement("latency", "s", 1, [[0.5, 0.7, 0.6]], {}, ["noisy"], {"first": 2.0}),
        Measurement("memory", "bytes", 1, [[3e6]], {"weights": 2e6, "activations": 1e6}, [], {}),
        Measurement("train", "s", 4, [[1.5]], {"forward": 0.5, "backward": 0.75, "optimizer": 0.25}, [], {}),
        Measurement("energy", "J", 1, [[0.125]], {}, [], {"source": "rapl"}),
    ]
    found.seconds = {"": 0.6, "stages": 0.5}
    found.operators = {"aten::addmm": (0.3, 0.5)}
    return found


def test_what_is_written_is_read(record, tmp_path):
    """Every figure, sample and reason; also of what failed."""
    failed = Record(**{**vars(record), "counts": None, "measurements": [], "failure": "no", "bad_input": True})
    path = tmp_path / "x.jsonl"
    for one in (record, failed):
        check_record(one.to_dict())
        append_record(path, one)
    found = read_records(path)
    assert [one.to_dict() for one in found] == [record.to_dict(), failed.to_dict()]
    assert (found[0].macs, found[0].latency.median, found[0].memory.parts["weights"]) == (record.macs, 0.6, 2e6)
    assert found[0].by_module(1, "time")[0]["seconds"] == 0.6
    assert found[0].by_op(1)[0] | {"calls": 0, "macs": 0, "share": 0, "other": 0, "bytes": 0} == {
        "op": "aten::addmm", "calls": 0, "macs": 0, "share": 0, "other": 0, "bytes": 0, "seconds": 0.3, "ceiling": 0.5,
    }  # fmt: skip
    assert (found[1].status, found[1].reasons, found[1].bad_input) == ("failed", ["no"], True)
    record.to_json(tmp_path / "x.json")
    assert [one.to_dict() for one in read_records(tmp_path / "x.json")] == [record.to_dict()]


@pytest.mark.parametrize("depth", [0, 1, None])
def test_modules_down_to_a_depth(record, depth):
    paths = [m["path"] for m in record.to_dict(depth)["modules"]]
    assert paths == [p for p in record.counts.modules if depth is None or len(p.split(".")) * bool(p) <= depth]


def test_views_tell_what_was_measured(record):
    shown = table([record])
    row = dict(zip(shown.columns, shown.rows[0], strict=True))
    assert (row["ms p50"], row["peak MB"], row["train ms"], row["J"]) == ("600.0", "3", "1500.0", "0.125")
    flat = record.to_row()
    assert (flat["train_backward_ms"], flat["joules"], flat["latency_first_ms"]) == (750.0, 0.125, 2000.0)
    assert parts_table(record).rows[-1] == ["train", "optimizer", "250.0", "ms"]
    assert modules_table(record, 1, "time").rows[1][0] == "stages"
    assert operators_table(record, 1).rows[0][-2:] == ["300.000", "50%"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, this vizoo reads 1"),
        ({"counts": {}}, "it.counts must be"),
        ({"target": None}, "is no record: it.target must be object"),
        ({"more": 1}, "it must not contain {'more'}"),
        ({"measurements": [{"kind": "speed"}]}, "is no record: it.measurements[0]"),
    ],
    ids=str,
)
def test_other_records_are_refused(change, message, counted, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**counted.to_dict(), **change}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1") as told:
        read_records(path, "RECORDS")
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_torn_line_is_no_record(tmp_path):
    """Of a process that was killed while it wrote; the next one takes its place, a whole line stays."""
    path = tmp_path / "x.jsonl"
    append_json_line(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2}', encoding="utf-8")  # an editor left no end of the line
    append_json_line(path, {"a": 3})
    path.write_text(path.read_text() + '{"a": 4', encoding="utf-8")
    append_json_line(path, {"a": 5})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 3, 5]
    with pytest.raises(ValueError, match="JSON"):
        append_json_line(path, {"a": float("nan")})
    assert len(path.read_text().splitlines()) == 4
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        read_records(path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append_json_line(path, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vizoo.tools.common.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_json_line(path, {"a": 2})
    assert path.read_text() == '{"a":1}\n'


def test_the_knee_of_a_sweep(record):
    def at(batch, speed, dtype="fp32"):
        one = Record.from_dict(record.to_dict())
        one.conditions = {**one.conditions, "batch": batch, "dtype": dtype}
        one.measurements = [Measurement("throughput", "images/s", batch, [[speed]], {}, [], {})]
        return one

    sweep = [at(8, 99.0), at(1, 10.0), at(4, 96.0), at(2, 60.0), at(16, 100.0)]
    (told,) = knees(sweep)
    assert "batch 4 has 96% of the best throughput of 5 batches, 100.0 img/s" in told
    assert knees(sweep[:2]) == []
    assert len(knees([*sweep, at(1, 1.0, "bf16"), at(2, 1.0, "bf16")])) == 1  # two batches are no sweep


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([224], [(224, 224)]),
        ([800, 1280], [(800, 1280)]),
        ([[[800, 1280]]], [(800, 1280)]),
        ([[[224], [384]], 96], [(224, 224), (384, 384), (96, 96)]),
    ],
    ids=str,
)
def test_sizes(words, sizes):
    assert read_sizes(words) == sizes


def test_conditions_are_lists_with_commas():
    words = "x --size 224,800x1280 --batch 1,8 --dtype fp32,bf16 --compile no,max-autotune --graph no,yes --threads 1,2"
    args = profiler.build_parser().parse_args(shlex.split(words))
    assert (args.batch, args.dtype, args.threads) == ([1, 8], ["fp32", "bf16"], [1, 2])
    assert (args.compile, args.graph) == ([None, "max-autotune"], [False, True])
    assert read_sizes(args.size) == [(224, 224), (800, 1280)]
    default = profiler.build_parser().parse_args(["x", "--compile"])
    assert (default.compile, default.graph) == (["default"], [False])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measure", "latency,speed"], "--measure: got 'speed', must be one of count, latency"),
        (["--compile", "no,fast"], "--compile: got 'fast', must be one of default"),
        (["--graph", "1"], "--graph: got '1', must be one of no, yes"),
        (["--size", "224,axb"], "--size: got '224,axb', must be pixels"),
        (["--size", "224,0x5"], "--size 0 5: give one side"),
        (["--input", "3x"], "--input: got '3x', must be shapes"),
        (["--save", "x.csv"], "--save 'x.csv': the ending must be .jsonl"),
        (["--sort", "speed"], "--sort"),
        (["--device", "cpu", "--graph"], "--graph: needs CUDA, got --device cpu"),
    ],
    ids=" ".join,
)
def test_bad_conditions_are_one_line(words, message, capsys):
    assert profiler.main(["test_litv2", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


MODELS = """
import os, torch
def dies(width): os._exit(7)
def quits(width): raise SystemExit(3)
def net(width=4): return torch.nn.Conv2d(3, width, 3)
"""


def test_each_target_has_a_process(tmp_path, capsys):
    """One that dies or quits is a record, the others are whole, and the command of a record makes it again."""
    (tmp_path / "nets.py").write_text(MODELS, encoding="utf-8")
    save = tmp_path / "x.jsonl"
    specs = [f"{tmp_path}/nets.py:{name}" for name in ("dies", "quits", "net")]
    words = ["--input", "2x3x8x9", "--model-kwargs", "width=5", "--save", str(save)]
    assert profiler.main([*specs, *words]) == 1
    out, err = capsys.readouterr()
    assert "2 of 3 rows failed" in err
    assert [text in out for text in ("died", "quits' ended the process")] == [True, True]
    found = read_records(save)
    assert [r.status for r in found] == ["failed", "failed", "complete"]
    assert found[2].macs == 2 * 5 * 3 * 9 * 6 * 7
    again = shlex.split(found[2].command)
    assert again[:2] == ["vizoo", "profile"]
    assert profiler.main([*again[2:], "--save", str(save)]) == 0
    first, second = ({**r.to_dict(), "environment": None} for r in read_records(save)[2:])
    assert first == second


def test_a_measured_target_in_its_process(tmp_path, capsys):
    save = tmp_path / "x.jsonl"
    words = ("test_vit@64", "--device", "cpu", "--measure", "latency", "--batch", "1,2", "--threads", "1", *FAST)
    assert profiler.main([*words, "--save", str(save), "--depth", "1"]) == 0
    first, second = read_records(save)
    assert [first.latency.batch, second.latency.batch] == [1, 2]
    assert (first.conditions["threads"], first.size) == (1, (64, 64))
    assert all("." not in path for path in first.counts.modules)
    capsys.readouterr()
    (tmp_path / "other.jsonl").write_text('{"vizoo": 1}\n', encoding="utf-8")
    assert profiler.main(["test_vit", "--save", str(tmp_path / "other.jsonl")]) == 2
    assert "line 1 is no record" in capsys.readouterr().err


def test_a_module_is_a_target():
    found = profiler.profile(torch.nn.Linear(4, 3), torch.zeros(2, 4))
    check_record(found.to_dict())
    assert (found.target["kind"], found.target["inputs"], found.size) == ("module", [[2, 4]], None)
