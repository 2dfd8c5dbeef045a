"""The engine of ``vizoo compare``: intervals on simulated machines, turns, outputs, revisions, records."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vizoo.tools.common import Failure, UserError
from vizoo.tools.profiling import comparing
from vizoo.tools.profiling.comparing import Outcome, Plan, Spread, Unlike, Wanted, baseline, paired, unpaired
from vizoo.tools.profiling.turns import Side

ROOT = Path(__file__).parents[2]


def simulated(rng, processes=5, rounds=30, truth=1.0, offset=0.005, disturbed=0.0):
    """Seconds of both sides by process and turn: a drift, a factor for each process, and noise of 3 % a call.

    A share of the turns takes up to 40 % longer: what else the machine does only adds time.
    """
    a, b = [], []
    for _ in range(processes):
        one, other = rng.normal(0, offset, 2)
        drift = 1 + 0.1 * np.sin(np.linspace(0, 3, 4 * rounds) + 6 * rng.random()) + np.linspace(0, 0.1, 4 * rounds)
        turn = np.median(rng.normal(0, 0.03, (4 * rounds, 5)), axis=1)
        more = np.where(rng.random(4 * rounds) < disturbed, 1 + 0.4 * rng.random(4 * rounds), 1)
        t = (drift * more * np.exp(turn)).reshape(rounds, 4)
        a.append((t[:, [0, 3]] * math.exp(one)).ravel().tolist())
        b.append((t[:, [1, 2]] * truth * math.exp(other)).ravel().tolist())
    return a, b


@pytest.mark.parametrize(("processes", "disturbed", "slower"), [(3, 0.0, 0.6), (5, 0.0, 0.95), (5, 0.3, 0.85)])
def test_the_interval_holds_the_truth(processes, disturbed, slower):
    """As often as it says, and a side that takes 3 % longer is called slower; three pairs know less than five."""
    rng, n = np.random.default_rng(1), 80
    for truth in (1.0, 1.03):
        found = [paired(*simulated(rng, processes, truth=truth, disturbed=disturbed)) for _ in range(n)]
        assert sum(low <= truth <= high for _, low, high in found) >= 0.95 * n
        assert all(low < ratio < high for ratio, low, high in found)
    assert slower * n <= sum(low > 1 for _, low, _ in found) <= n


def test_a_bootstrap_alone_would_be_too_narrow():
    """Processes that differ more than rounds: Student's interval is that of the medians of the pairs."""
    a = [[1.0] * 20] * 3
    b = [[x] * 20 for x in (1.00, 1.01, 1.03)]
    logs = np.log([1.00, 1.01, 1.03])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    assert paired(a, b) == pytest.approx([math.exp(logs.mean() + k * half) for k in (0, -1, 1)])


def test_processes_that_agree_by_chance_leave_the_doubt_of_their_rounds():
    rounds = [0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 1.0]
    found = Spread.of([[rounds] * 3], 0.5)
    assert found.variance == pytest.approx(Spread.of([[rounds]], 0.5).variance, rel=0.2)
    assert found.variance > 1e-3


def test_unpaired():
    """A side of one process is taken to differ as the processes of the other do; two single ones know their rounds."""
    now = [[1.10] * 9, [1.12] * 9, [1.14] * 9]
    logs = np.log([1.10, 1.12, 1.14])
    half = 4.302653 * logs.std(ddof=1) * math.sqrt(1 + 1 / 3)
    assert unpaired([[1.0] * 9], now) == pytest.approx([math.exp(logs.mean() + k * half) for k in (0, -1, 1)])
    assert unpaired([[1.0] * 9], [[1.2] * 9]) == pytest.approx((1.2, 1.2, 1.2))
    noisy = [0.9, 1.0, 1.1, 0.95, 1.05, 1.0]
    ratio, low, high = unpaired([noisy], [[1.2 * s for s in noisy]])
    assert ratio == pytest.approx(1.2)
    assert 0.05 < high - low < 0.5


def outcome(ratio):
    side, seconds = Side("m", batch=4), [[0.2, 0.2]] * 3
    return Outcome(
        ("m", "n"), (side, side), (seconds, seconds), ratio, "outputs are equal", [], {"machine": "", "torch": ""}
    )


def test_verdicts():
    assert outcome((1.2, 1.1, 1.3)).verdict == "slower"
    assert outcome((0.8, 0.7, 0.9)).verdict == "faster"
    assert outcome((1.2, 0.9, 1.5)).verdict == "undecided"
    assert outcome((1.2, 1.1, 1.3)).line == "B takes 1.200 times as long as A (1.100 to 1.300): slower"
    assert outcome((1.2, 1.1, 1.3)).exceeds(0.09)
    assert not outcome((1.2, 1.1, 1.3)).exceeds(0.11)
    row = outcome((1.2, 1.1, 1.3)).table().rows[0]
    assert row == ["A", "m", "200.000", "200.000", "200.000", "20.0"]


def fake(monkeypatch, seconds=lambda side: 1.0, **answers):
    """Replace processes by ones that note what they are told; the list of it."""
    told = []

    class Fake:
        def __init__(self, side, place, outputs, cpu_time):
            self.side, self.key = side, outputs.stem
            torch.save(answers.get(outputs.stem, [torch.ones(2, dtype=torch.float64)]), outputs)

        def answer(self):
            return {"target": {"name": self.side.target}, "environment": {"machine": "x", "torch": "2"}}

        def ask(self, word):
            told.append((self.key, word))
            if word == "":
                return {"state": {"clock_mhz": 1}, "notes": [f"noisy: {len(told)}%"]}
            return {"seconds": seconds(self.side)}

        def end(self):
            told.append((self.key, "end"))

    monkeypatch.setattr(comparing, "Process", Fake)
    return told


def sides(a="m", b="m", **more):
    return [Side(a), Side(b, **more)]


def test_sides_take_turns(monkeypatch):
    """A, B, B, A in each round, after both are warm; the processes end; notes that differ in figures are one."""
    told = fake(monkeypatch, lambda side: 2.0 if side.dtype == "bf16" else 1.0)
    ticks = []
    plan = Plan(3, 2, tick=lambda: ticks.append(1))
    names, seconds, outputs, notes, environment = comparing.measure_sides(sides(dtype="bf16"), (), plan)
    one = "".join(k for k, word in told[: len(told) // 3] if word == "run")
    assert one == "abba" * 2
    assert [word for _, word in told[:3]] == ["warm up", "warm up", "run"]
    assert told.count(("a", "end")) == told.count(("b", "end")) == 3
    assert (names, len(ticks)) == (["m", "m"], 6)
    assert seconds == [[[1.0] * 4] * 3, [[2.0] * 4] * 3]
    assert outputs == "outputs are equal"
    assert [note[:8] for note in notes] == ["A: noisy", "B: noisy"]
    assert all(note.endswith(" (in 3 processes)") for note in notes)
    assert environment == {"machine": "x", "torch": "2", "clock_mhz": 1}


@pytest.mark.parametrize(
    ("b", "more", "text"),
    [
        ([1.0, 1.0], {}, "outputs are equal"),
        ([1.0, 1.001], {}, "outputs agree to 1e-03"),
        ([1.0, 1.5], {}, "outputs differ by 50% of the largest"),
        ([1.0], {}, "outputs differ: other shapes"),
        ([1.0, math.nan], {}, "outputs are not finite"),
        ([1.0, 1.0], {"b": "n"}, "outputs are those of different models, and not compared"),
        ([1.0, 1.0], {"batch": 2}, "outputs are those of different inputs, and not compared"),
    ],
)
def test_outputs(b, more, text, monkeypatch):
    fake(monkeypatch, b=[torch.tensor(b, dtype=torch.float64)])
    assert comparing.measure_sides(sides(**more), (), Plan(1, 1))[2] == text


def test_outputs_without_tensors(monkeypatch):
    fake(monkeypatch, a=[], b=[])
    assert comparing.measure_sides(sides(), (), Plan(1, 1))[2] == "outputs hold no tensors, and are not compared"


def script(monkeypatch, tmp_path, text):
    """Let processes run another script."""
    file = tmp_path / "turns.py"
    file.write_text(text)
    monkeypatch.setattr(comparing, "FILE", file)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("import sys; sys.exit('no memory')", Failure, "'m': its process ended with status 1: no memory"),
        ("import os; os.kill(os.getpid(), 9)", Failure, "status -9, killed perhaps because memory ran out"),
        ("import os; os._exit(7)", Failure, "its process ended with status 7$"),
        ("""print('{"error": "unknown model", "status": 2}')""", UserError, "unknown model"),
        ("""print('{"error": "no kernel", "status": 1}')""", Failure, "no kernel"),
    ],
    ids=["exit", "killed", "silent", "input", "failure"],
)
def test_processes_that_fail(text, kind, message, monkeypatch, tmp_path):
    """One line, and nothing is left running or lying about."""
    script(monkeypatch, tmp_path, text)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(kind, match=message):
        comparing.measure_sides(sides(), (), Plan(3, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["turns.py"]


def git(folder, *words):
    who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two commits, tagged, and a change that is in none."""
    root = tmp_path / "repository"
    (root / "src").mkdir(parents=True)
    (root / "inner").mkdir()
    git(root, "init", "-q")
    for tag in ("one", "two"):
        (root / "src" / "net.py").write_text(tag)
        (root / "inner" / "x").write_text(tag)
        git(root, "add", "-A")
        git(root, "commit", "-qm", tag)
        git(root, "tag", tag)
    (root / "src" / "net.py").write_text("three")
    return root


def test_revisions(repository):
    """A folder of the revision's files for as long as it is needed, with its modules first; the repository stays."""
    before = sorted(p for p in repository.rglob("*") if p.is_file())
    with comparing.revision("one", repository / "inner") as place:
        source = Path(place.path[0])
        assert (source / "net.py").read_text() == "one"
        assert (place.folder / "x").read_text() == "one"
        assert Path(place.path[1]) == source.parent == place.folder.parent
        assert place.path[2:] == comparing.here().path
    assert not source.exists()
    with pytest.raises(KeyboardInterrupt), comparing.revision("two^{}", repository) as place:
        raise KeyboardInterrupt
    assert not place.folder.exists()
    with comparing.revision(None, repository) as place:
        assert (Path(place.path[0]) / "net.py").read_text() == "three"
    assert sorted(p for p in repository.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("rev", ["three", "--all", "", "one..two"])
def test_revisions_that_are_none(rev, repository):
    with (
        pytest.raises(UserError, match=r"--rev '.*': no revision of the repository"),
        comparing.revision(rev, repository),
    ):
        pass


def test_revisions_need_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="is in no git repository"), comparing.revision("one", tmp_path):
        pass


def record(samples, batch=1, fingerprint="a" * 12, name="m", failure="", shape=(1, 3, 8, 8), **conditions):
    latency = SimpleNamespace(kind="latency", batch=batch, samples=[samples])
    return SimpleNamespace(
        target={"spec": name, "name": name, "inputs": [list(shape)]},
        conditions={**Side(name).conditions, **conditions},
        environment={"fingerprint": fingerprint, "machine": "a machine", "torch": "2"},
        measurements=[SimpleNamespace(kind="memory", batch=batch), latency],
        failure=failure,
    )


def test_the_newest_record_is_taken():
    wanted = Wanted(record([1]).target, Side("m").conditions, 1, "a" * 12)
    others = [record([3], batch=2), record([5], dtype="bf16"), record([6], failure="no")]
    others += [record([7], name="n"), record([8], shape=(1, 3, 9, 9)), record([9], fingerprint="b" * 12)]
    assert baseline([record([1]), record([2], shape=(4, 3, 8, 8)), *others], wanted, "f").samples == [[2]]


@pytest.mark.parametrize(
    ("found", "kind", "text"),
    [
        (record([1], name="n"), UserError, "f: no record of 'm' with inputs of 3x8x8"),
        (record([1], shape=(1, 3, 9, 9)), UserError, "f: no record of 'm'"),
        (record([1], dtype="bf16"), Unlike, "f: no latency of 'm' with device cpu, dtype fp32, .*batch 1"),
        (record([1], batch=2), Unlike, "f: no latency of 'm'"),
        (record([1], fingerprint="b" * 12), Unlike, "recorded on a machine with torch 2 .*b{12}.*a{12}"),
    ],
)
def test_records_that_are_not_compared(found, kind, text):
    with pytest.raises(UserError, match=text) as e:
        baseline([found], Wanted(record([1]).target, Side("m").conditions, 1, "a" * 12), "f")
    assert e.type is kind


def test_a_process_measures_the_vizoo_of_its_place(tmp_path):
    """A real one: models of the vizoo that its path leads to, tools of this one, whatever models print."""
    package = tmp_path / "src" / "vizoo"
    package.mkdir(parents=True)
    text = (ROOT / "src/vizoo/__init__.py").read_text().replace('__version__ = "', 'print("hello")\n__version__ = "7.')
    (package / "__init__.py").write_text(text)
    for folder in ("backbones", "heads"):
        os.symlink(ROOT / folder, package / folder)
    place = comparing.Place([str(package.parent), *comparing.here().path], tmp_path)
    side = Side("test_litv2", (32, 32), batch=2)
    process = comparing.Process(side, place, tmp_path / "a.pt", False)
    try:
        ready = process.answer()
        assert ready["environment"]["vizoo"].startswith("7.")
        assert ready["target"]["name"] == "test_litv2"
        assert torch.load(tmp_path / "a.pt", weights_only=True)[0].shape[0] == 2
        process.ask("warm up")
        assert 0 < process.ask("run")["seconds"] < 60
        assert "float32_products" in process.ask("")["state"]
        assert process.running.wait(60) == 0
    finally:
        process.end()
