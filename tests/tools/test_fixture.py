"""The fixture ``vizoo_cost`` in sessions of pytest of its own."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from vizoo.tools.profiling import fixture
from vizoo.tools.profiling.profile import profile
from vizoo.tools.profiling.record import Measurement, append_record, read_records

pytest_plugins = ["pytester"]

BEGIN = """
import torch
layer = torch.nn.Linear(8, 4)
x = torch.randn(2, 8)
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs a test in a session; the numbers of outcomes, and what it prints.  The plugin may be installed or not."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*lines: str) -> tuple[dict[str, int], str]:
        body = "\n".join(f"    {line}" for line in lines)
        pytester.makepyfile(f"{BEGIN}\ndef test_it(vizoo_cost):\n    cost = vizoo_cost(layer, x)\n{body}\n")
        here = ("-W", "ignore:Module already imported")  # by the session around this one
        found = pytester.runpytest_inprocess("-p", "_vizoo_pytest", "-p", "no:cacheprovider", *here, "-rs")
        return found.parseoutcomes(), found.stdout.str()

    return run


def test_counts(session):
    """Of the whole batch."""
    assert session("cost.assert_macs(64)", "cost.assert_params(36)")[0] == {"passed": 1}
    outcome, text = session("cost.assert_macs(63)")
    assert outcome == {"failed": 1}
    assert "Linear has 64 multiply-accumulates, expected 63 (+1)" in text
    assert "Linear has 36 parameters, expected 1,000 (-964)" in session("cost.assert_params(1000)")[1]


def test_a_partial_count_fails(session, monkeypatch):
    found = fixture.count(torch.nn.Linear(8, 4), torch.ones(2, 8))
    partial = found._replace(doubts={**found.doubts, "macs": ["no formula"]})
    monkeypatch.setattr(fixture, "count", lambda *args: partial)
    assert "Linear: the count is partial: no formula" in session("cost.assert_macs(64)")[1]


@pytest.fixture(scope="module")
def recorded():
    """A real record of the layer, of two rows at once."""
    layer = torch.nn.Linear(8, 4)
    return profile(layer, torch.ones(1, 8), measure="latency", batch=2, min_time=0.0, max_time=0.1)


def altered(record, factor=1.0, quality=(), fingerprint="", **conditions):
    """The same, with other times or conditions."""
    found = copy.deepcopy(record)
    samples = (factor * np.random.default_rng(1).normal(1, 0.01, 50)).tolist()
    found.measurements = [Measurement("latency", "s", 2, [samples], {}, list(quality), {})]
    found.conditions |= conditions
    found.notes = []
    found.environment["fingerprint"] = fingerprint or record.environment["fingerprint"]
    return found


def test_times_are_compared(session, recorded, tmp_path):
    """For real: whatever the machine does, it is not a thousand times slower than it was."""
    append_record(tmp_path / "f.jsonl", recorded)
    assert session(f"cost.no_slower_than({str(tmp_path / 'f.jsonl')!r}, '100000%')")[0] == {"passed": 1}


@pytest.mark.parametrize(
    ("then", "now", "outcome", "text"),
    [
        ({}, {"factor": 1.03}, "passed", ""),
        ({"factor": 2.0}, {}, "passed", ""),
        ({}, {"factor": 1.2}, "failed", "Linear takes 1.2* times as long as recorded (1.1*), allowed 1.05: * ms"),
        ({}, {"factor": 1.2, "quality": ["machine busy: x"]}, "skipped", "Linear: machine busy: x"),
        ({"fingerprint": "b" * 12}, {"factor": 9}, "skipped", "times of different machines are not compared"),
        ({"dtype": "bf16"}, {"factor": 9}, "skipped", "no latency of 'Linear' with"),
    ],
)  # fmt: skip
def test_no_slower_than(then, now, outcome, text, session, recorded, tmp_path, monkeypatch, pytester):
    append_record(tmp_path / "f.jsonl", altered(recorded, **then))
    monkeypatch.setattr(fixture.Checks, "_timed", lambda self: altered(recorded, **now))
    found, printed = session(f"cost.no_slower_than({str(tmp_path / 'f.jsonl')!r}, '5%')")
    assert found == {outcome: 1}
    pytest.LineMatcher(printed.splitlines()).fnmatch_lines([f"*{text}*"])


def test_without_a_record(session, recorded, tmp_path, monkeypatch):
    """It fails with what makes one."""
    monkeypatch.setattr(fixture.Checks, "_timed", lambda self: altered(recorded))
    outcome, text = session("cost.no_slower_than('nosuch.jsonl', '5%')")
    assert outcome == {"failed": 1}
    assert "nosuch.jsonl does not exist" in text
    assert "record once what it is compared with: cost.record('nosuch.jsonl')" in text
    append_record(tmp_path / "g.jsonl", recorded)
    text = session(f"cost.no_slower_than({str(tmp_path / 'g.jsonl')!r}, '0.05')")[1]
    assert "UserError: budget: got 0.05: write 5% or 0.05%" in text
    other = copy.deepcopy(recorded)
    other.target |= {"spec": "Other", "name": "Other"}
    append_record(tmp_path / "f.jsonl", other)
    file = str(tmp_path / "f.jsonl")
    assert "no record of 'Linear' with inputs of 8 each" in session(f"cost.no_slower_than({file!r}, '5%')")[1]


def test_a_record_of_its_own(session, recorded, tmp_path, monkeypatch):
    """It is made once, kept with what the file holds, and compared with from then on."""
    monkeypatch.setattr(fixture.Checks, "_timed", lambda self: altered(recorded))
    file = tmp_path / "f.jsonl"
    for n in (1, 2):
        assert session(f"cost.record({str(file)!r})")[0]["passed"] == 1
        assert [r.name for r in read_records(file)] == ["Linear"] * n
    assert session(f"cost.no_slower_than({str(file)!r}, '5%')")[0]["passed"] == 1
    assert "must be .jsonl" in session("cost.record('x.csv')")[1]


def test_a_session_without_it_is_left_alone():
    """Neither vizoo nor torch nor timm is imported by the plugin, so no model is registered."""
    code = "import sys, _vizoo_pytest; print({'vizoo', 'torch', 'timm'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
