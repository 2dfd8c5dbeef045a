"""``vizoo compare``: verdicts and exit statuses on a simulated machine, both kinds of opponent, bad input."""

from __future__ import annotations

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from vizoo.tools import cli
from vizoo.tools.profiling import comparing, measures, turns
from vizoo.tools.profiling.turns import Side


@pytest.fixture
def machine(monkeypatch):
    """A simulated one: each process is faster or slower by 0.3 %, each call by 3 %, and all drift; it takes a seed.

    A side with batch 2 takes 3 % longer.
    """

    class Machine:
        rng = np.random.default_rng(0)
        now = 0

    class Fake:
        def __init__(self, side, place, outputs, cpu_time):
            self.side, self.place = side, place
            self.speed = (1.03 if side.batch == 2 else 1.0) * math.exp(Machine.rng.normal(0, 0.003))
            torch.save([torch.ones(1, dtype=torch.float64)], outputs)

        def answer(self):
            target = {"name": self.side.target, "spec": self.side.target, "inputs": [[1, 3, 8, 8]]}
            return {"target": target, "environment": {"machine": "x", "torch": "2", "fingerprint": "a" * 12}}

        def ask(self, word):
            Machine.now += 1
            drift = 1 + 0.1 * math.sin(Machine.now / 30)
            return {
                "seconds": self.speed * drift * float(np.median(Machine.rng.normal(1, 0.03, 5))),
                "notes": [],
                "state": {},
            }

        def end(self):
            pass

    monkeypatch.setattr(comparing, "Process", Fake)
    return Machine


def run(words, capsys):
    status = cli.main(["compare", *words.split(), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_same_model_is_neither_faster_nor_slower(machine, capsys):
    found = [run("resnet18 resnet18 --threads 1 --budget 2%", capsys) for _ in range(20)]
    assert sum(one["ci95"][0] <= 1 <= one["ci95"][1] for _, one in found) >= 19
    assert sum(one["verdict"] == "undecided" for _, one in found) >= 19
    assert {status for status, _ in found} == {0}


def test_a_delay_of_three_percent_is_found(machine, capsys):
    found = [run("resnet18 --batch 1,2 --threads 1", capsys)[1] for _ in range(20)]
    assert sum(one["verdict"] == "slower" for one in found) >= 19
    assert all(one["ratio"] == pytest.approx(1.03, abs=0.015) for one in found)


def test_a_budget(machine, capsys):
    """Exit status 3 where the lower bound is above; more processes know more."""
    words = "resnet18 --batch 1,2 --threads 1 --processes 12"
    status, found = run(f"{words} --budget 2%", capsys)
    assert found["ci95"][0] > 1.02
    assert status == 3
    assert run(f"{words} --budget 5", capsys)[0] == 0
    assert run("resnet18 --batch 2,1 --threads 1 --budget 0%", capsys)[0] == 0


def test_the_table(machine, capsys, tmp_path):
    out = tmp_path / "x.md"
    assert cli.main(["compare", "m", "--dtype", "fp32,bf16", "--threads", "1", "--rounds", "4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("dtype", "bf16", "img/s", "B takes", "outputs are equal", "5 processes, 8 turns")
    )
    assert "threads" not in text
    assert "| A | m | fp32 |" in out.read_text()


def test_revisions_have_places_of_their_own(machine, monkeypatch, capsys):
    """One revision against the files as they are, two against each other; each side runs in the place of its own."""
    places, real = [], comparing.Process

    def start(side, place, outputs, cpu_time):
        places.append(place)
        return real(side, place, outputs, cpu_time)

    monkeypatch.setattr(comparing, "Process", start)
    for revisions, names in ((["HEAD"], ["m at HEAD", "m, files as they are"]), (["HEAD", "HEAD"], ["m at HEAD"] * 2)):
        monkeypatch.setattr(
            "vizoo.tools.compare.revision", comparing.contextlib.contextmanager(lambda rev, at: (yield rev))
        )
        status, found = run(f"m --threads 1 --processes 3 --rounds 2 --rev {' '.join(revisions)}", capsys)
        assert [found[key]["name"] for key in "ab"] == names
        assert status == 0
    assert places == ["HEAD", None] * 3 + ["HEAD", "HEAD"] * 3


def test_a_side_may_be_a_cuda_graph(monkeypatch):
    """Its call is captured and replayed, and it is no other side's record."""
    monkeypatch.setattr(measures, "captured", lambda call, device: lambda: ("replayed", call()))
    replayed, out = turns._call(Side("test_litv2", graph=True))[0]()
    assert (replayed, out.shape) == ("replayed", (1, 1000))
    assert [Side("m", graph=graph).conditions["graph"] for graph in (False, True)] == [False, True]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_processes_and_folders(number, status, machine, monkeypatch, tmp_path):
    """As Ctrl-C does; afterwards it means what it did before."""
    ended = []
    monkeypatch.setattr(comparing.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(comparing.Process, "ask", lambda self, word: os.kill(os.getpid(), number))
    monkeypatch.setattr(comparing.Process, "end", lambda self: ended.append(len(list(tmp_path.iterdir()))))
    before = signal.signal(number, signal.SIG_DFL)  # under nohup one is ignored, and stays so
    try:
        with pytest.raises(SystemExit) as raised:
            cli.main(["compare", "m", "m", "--threads", "1"])
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert raised.value.code == status
    assert (ended, list(tmp_path.iterdir())) == ([1, 1], [])


def stored(tmp_path, factor=1.0, **environment):
    """A file with a record of ``m`` on this machine, as it takes 1 s."""
    from vizoo.tools.profiling.record import Measurement, Record, append_record

    target = {"spec": "m", "kind": "timm", "name": "m", "size": [8, 8], "inputs": [[1, 3, 8, 8]], "weights": None}
    rng = np.random.default_rng(3)
    samples = (factor * rng.normal(1, 0.01, 30)).tolist()
    about = {"fingerprint": "a" * 12, "machine": "x", "vizoo": "1", "commit": "", "torch": "2", "date": ""}
    record = Record(
        target={**target, "kwargs": {}},
        conditions={**Side("m").conditions, "batch": None},
        environment={**about, **environment},
        measurements=[Measurement("latency", "s", 1, [samples], {}, [], {})],
        command="x",
    )
    append_record(tmp_path / "f.jsonl", record)
    return tmp_path / "f.jsonl"


def test_a_baseline(machine, tmp_path, monkeypatch, capsys):
    """Against the newest record; 20 % slower than it was is beyond a budget of 5 %; other machines are refused."""
    monkeypatch.setattr(machine, "rng", np.random.default_rng(5))
    monkeypatch.setattr(comparing.math, "sin", lambda x: 0.0)
    words = f"m --threads 1 --budget 5% --baseline {tmp_path}/f.jsonl"
    stored(tmp_path, 0.8)
    status, found = run(words, capsys)
    assert (status, found["verdict"]) == (3, "slower")
    assert found["ratio"] == pytest.approx(1.25, abs=0.03)
    stored(tmp_path, 1.0)
    status, found = run(words, capsys)
    assert (status, found["verdict"]) == (0, "undecided")
    assert [found[key]["name"] for key in "ab"] == ["m, recorded", "m, now"]
    (tmp_path / "f.jsonl").unlink()
    stored(tmp_path, fingerprint="b" * 12)
    assert cli.main(["compare", *words.split()]) == 2
    assert "times of different machines are not compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("m", "one target alone: give a second one, two values of a condition, --rev or --baseline"),
        ("m n o", "give one or two"),
        ("m --dtype fp32,bf16,fp16", "--dtype: got 3 values; give one, or two, of A and of B"),
        ("m --rev a --baseline f", "give one of them"),
        ("m --rev a b c", "--rev: needs one target, one value of each condition, and one or two revisions"),
        ("m n --rev a", "--rev: needs one target"),
        ("m --batch 1,2 --rev a", "--rev: needs one target"),
        ("m n --baseline f", "--baseline: needs one target and one value of each condition"),
        ("m --baseline nosuch.jsonl", "--baseline 'nosuch.jsonl' does not exist"),
        ("m n --budget x", "argument --budget"),
        ("m n --budget -1%", "argument --budget"),
        ("m n --budget 0.05", "got 0.05: write 5% or 0.05%"),
        ("m n --processes 2", "argument --processes: got 2, must be a whole number between 3 and"),
        ("m n --device meta", "--device 'meta'"),
        ("m n --amp", "amp with dtype fp32"),
        ("m --graph no,yes", "--graph: needs CUDA, got --device cpu"),
        ("m n --cpu-time --threads 1,2", "--cpu-time: adds up all threads"),
        ("m n --out x.txt", "--out"),
    ],
)
def test_bad_input(words, text, machine, capsys):
    assert cli.main(["compare", *words.split()]) == 2
    assert text in capsys.readouterr().err
