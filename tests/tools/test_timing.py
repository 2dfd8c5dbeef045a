"""Timing: stopping rules and statistics under fake clocks, alternation, memory."""

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vizoo.tools.common import Failure
from vizoo.tools.profiler import compare, measure
from vizoo.tools.profiling import machine, timing


class Clock:
    """Wall and processor time that advance only when the function under test runs."""

    def __init__(self, seconds, use=1.0):
        self.seconds, self.use = seconds, use
        self.wall = self.cpu = 0.0
        self.calls = 0

    def work(self):
        step = self.seconds(self.calls) if callable(self.seconds) else self.seconds
        self.calls += 1
        self.wall += step
        self.cpu += step * self.use * torch.get_num_threads()

    def measure(self, **kwargs):
        return measure(self.work, clock=lambda: self.wall, cpu_clock=lambda: self.cpu, **kwargs)


def test_steady_calls_stop_at_a_hundred():
    clock = Clock(0.001)
    stats = clock.measure()
    assert stats.n == 100
    assert stats.warmup >= 1000  # a second of warm-up
    assert stats.median == pytest.approx(0.001)
    assert stats.iqr == pytest.approx(0, abs=1e-9)
    assert stats.cpu_use == pytest.approx(1)
    assert stats.warnings == []


def test_slow_calls_stop_at_min_time():
    stats = Clock(0.5).measure(min_time=2, max_time=60)
    assert stats.warmup == 10
    assert stats.n == 4


def test_warm_up_waits_until_the_medians_settle():
    """Each of the first 40 calls is faster than the one before; the samples see only the settled speed."""
    clock = Clock(lambda i: 0.2 * max(1, 10 - i / 4))
    stats = clock.measure(min_time=1, max_time=600)
    assert stats.first == pytest.approx(2.0)
    assert stats.warmup > 40
    assert stats.quantile(1.0) == pytest.approx(0.2)


def test_noise_is_sampled_until_max_time_and_named():
    stats = Clock(lambda i: 0.1 + 0.1 * (i % 2)).measure(min_time=1, max_time=8)
    assert sum(stats.samples) >= 8
    assert [w for w in stats.warnings if w.startswith("noisy: interquartile range")]


def test_busy_machine_is_named():
    stats = Clock(0.1, use=0.5).measure(min_time=0.5, max_time=5)
    assert stats.cpu_use == pytest.approx(0.5)
    assert stats.warnings == ["machine busy or too many threads: used 50% of them, numbers unreliable"]
    assert Clock(0.1, use=0.85).measure(min_time=0.5, max_time=5).warnings == []


def test_at_least_three_samples():
    assert Clock(100.0).measure(min_time=1, max_time=2).n == 3


@pytest.mark.parametrize("kwargs", [{"warmup": -1}, {"min_time": -1}, {"min_time": 3, "max_time": 2}], ids=str)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match="need 0 <= min_time <= max_time"):
        measure(lambda: None, **kwargs)


def test_quantiles_are_numpys():
    samples = np.random.default_rng(0).random(37).tolist()
    stats = timing.Stats(samples, None, 0.0, 0)
    for q in (0, 0.1, 0.25, 0.5, 0.9, 0.99, 1):
        assert stats.quantile(q) == pytest.approx(np.quantile(samples, q))
    d = stats.to_dict()
    assert d["median_ms"] == pytest.approx(1e3 * np.median(samples))
    assert d["iqr_ms"] == pytest.approx(1e3 * (np.quantile(samples, 0.75) - np.quantile(samples, 0.25)))
    assert len(d["samples_ms"]) == 37


def test_garbage_collection_comes_back():
    def fail():
        assert not gc.isenabled()
        raise KeyError("x")

    with pytest.raises(KeyError), timing.quiet():
        fail()
    assert gc.isenabled()


def test_compare_alternates():
    order = []

    def make(name, value):
        def call(x):
            order.append(name)
            return {"y": x + value}

        return call

    rounds = []
    functions = {"a": make("a", 0.0), "b": make("b", 0.25), "c": make("c", -3.0)}
    found = compare(functions, (torch.zeros(2, 2),), rounds=4, warmup=2, tick=lambda: rounds.append(1))
    assert order == ["a", "b", "c"] * 7  # one for the outputs, two to warm up, four timed
    assert len(rounds) == 4
    assert found.difference == {"a": 0.0, "b": 0.25, "c": 3.0}
    assert {k: len(v) for k, v in found.seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_short_calls_are_repeated():
    """A sample of a call of 1 ms takes 4 of them, one of 30 ms a single call; the samples are seconds a call."""
    now, calls = 0.0, {"short": 0, "long": 0}

    def call(name, seconds):
        def run():
            nonlocal now
            now += seconds
            calls[name] += 1

        return run

    functions = {"short": call("short", 0.001), "long": call("long", 0.03)}
    timed = compare(functions, rounds=5, warmup=1, clock=lambda: now, least=0.004)
    assert calls == {"short": 1 + 1 + 4 * 5, "long": 1 + 1 + 5}
    assert timed.seconds["short"] == pytest.approx([0.001] * 5)
    assert timed.seconds["long"] == pytest.approx([0.03] * 5)


def test_ratio_has_an_interval():
    rng = np.random.default_rng(0)
    fast = (0.1 + 0.01 * rng.random(50)).tolist()
    slow = (0.2 + 0.02 * rng.random(50)).tolist()
    ratio, low, high = timing.Comparison({"fast": fast, "slow": slow}, 1.0, {}).ratio("slow")
    assert ratio == pytest.approx(np.median(slow) / np.median(fast))
    assert low <= ratio <= high
    assert high - low < 0.2


@pytest.mark.parametrize("functions", [{}, {"a": lambda: None}])
def test_compare_needs_two(functions):
    with pytest.raises(ValueError, match="need two functions"):
        compare(functions)
    with pytest.raises(ValueError, match="rounds=0"):
        compare({"a": lambda: None, "b": lambda: None}, rounds=0)


def test_memory_is_tracked():
    """Two maps of 1 MB are alive at the peak: the first layer's output and the second's."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 256)).eval()
    x = torch.randn(1024, 64)
    with torch.inference_mode():
        found = timing.peak_memory(lambda: model(x), model, [x], "cpu")
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert found.how == "tracked"
    assert found.activations == pytest.approx(2 * 1024 * 256 * 4, rel=0.01)
    assert found.peak == pytest.approx(weights + x.numel() * 4 + 2 * 1024 * 256 * 4, rel=0.01)


def test_memory_falls_back_to_the_resident_set(monkeypatch):
    from torch.distributed._tools import mem_tracker

    def broken():
        raise AttributeError("gone")

    monkeypatch.setattr(mem_tracker, "MemTracker", broken)
    model, x = nn.Linear(4, 4), torch.zeros(1, 4)
    found = timing.peak_memory(lambda: model(x), model, [x], "cpu")
    assert found.how == "resident set"
    assert found.peak >= 4 * 20 + 16


def test_resident_set_sees_the_peak_and_not_the_end(monkeypatch):
    """The process stands still at 10, 70 and 20 MB: what machines report of real allocations differs."""
    import psutil

    size, seen = 10 << 20, threading.Event()

    class Process:
        def memory_info(self):
            if size == 70 << 20:
                seen.set()
            return SimpleNamespace(rss=size)

    def allocate():
        nonlocal size
        size = 70 << 20
        assert seen.wait(60), "the watcher stopped"
        size = 20 << 20

    monkeypatch.setattr(psutil, "Process", Process)
    assert timing._resident_growth(allocate) == 60 << 20


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), (None, 4)]
)
def test_default_threads_know_the_quota(quota, threads, monkeypatch):
    """Physical cores, but no more than the affinity mask and the quota of the control group."""
    import psutil

    def read(self, **kwargs):
        if quota is None:
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(machine.Path, "read_text", read)
    assert machine.default_threads() == threads


def threads_and(word):
    return word, torch.get_num_threads()


def test_one_number_of_threads_is_set_here():
    before = torch.get_num_threads()
    found = []
    for case, n, result in machine.run_cases([before + 1], ["a", "b"], threads_and):
        found.append((case, n, result))
        assert torch.get_num_threads() == before + 1
    assert found == [(word, before + 1, (word, before + 1)) for word in "ab"]
    assert torch.get_num_threads() == before


def test_every_number_of_threads_gets_a_process_and_a_dead_one_is_a_failure():
    """The case that killed it is a failure; those after it run all the same."""
    code = "__import__('os')._exit(1) if {} == 1 else __import__('torch').get_num_threads()"
    found = list(machine.run_cases([2, 3], [code.format(n) for n in range(3)], eval))
    assert [(n, type(result)) for _, n, result in found] == [(n, kind) for n in (2, 3) for kind in (int, Failure, int)]
    assert [result for _, n, result in found if isinstance(result, int)] == [2, 2, 3, 3]
    assert "the process with 3 threads died" in str(found[-2][2])


def test_inputs_grow_with_the_batch():
    f = timing.random_like
    image = f(torch.zeros(1, 3, 4, 5), 2, "cpu", torch.bfloat16)
    assert (image.shape, image.dtype) == ((2, 3, 4, 5), torch.bfloat16)
    assert image.float().std() > 0.5
    assert torch.equal(f(torch.tensor([[1, 2]]), 3, "cpu", torch.float32), torch.tensor([[1, 2]] * 3))
    assert f(torch.zeros(1, 2), 3, "meta", torch.float32).shape == (3, 2)
    assert f("text", 3, "cpu", torch.float32) == "text"
    state = torch.get_rng_state()
    f(torch.zeros(1, 2), 3, "cpu", torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_batch_is_halved_until_it_fits(monkeypatch):
    """As on a GPU whose memory holds 10 images; the clock is faked."""
    tried = []

    def fake(fn, device, **kwargs):
        tried.append(fn().shape[0])
        if tried[-1] > 10:
            raise torch.cuda.OutOfMemoryError
        return timing.Stats([0.1 * tried[-1]] * 3, None, 0.0, 0)

    monkeypatch.setattr(timing, "measure", fake)
    how = timing.Conditions(batch=64)
    found = timing.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("throughput",), how)
    assert tried == [64, 32, 16, 8]
    assert (found.throughput, found.throughput_batch) == (pytest.approx(10), 8)
    assert found.notes == ["out of memory: batch reduced to 8"]
    monkeypatch.setattr(timing, "measure", lambda *a, **k: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        timing.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("throughput",), how)


def test_conditions_come_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings():
        return matmul.allow_tf32, matmul.fp32_precision, cudnn.allow_tf32, cudnn.benchmark

    before = settings()
    with timing.Conditions(dtype="bf16", amp=True).entered():
        assert not matmul.allow_tf32
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert settings() == before
    assert not torch.is_autocast_enabled("cpu")
    with timing.Conditions(dtype="tf32").entered():
        assert matmul.allow_tf32
        assert cudnn.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
    assert settings() == before


@pytest.mark.gpu
def test_on_a_gpu():
    model = nn.Linear(1024, 1024).cuda()
    x = torch.randn(4096, 1024, device="cuda")
    with torch.inference_mode():
        stats = measure(lambda: model(x), "cuda", min_time=0.2, max_time=1)
        assert stats.cpu_use is None
        assert 0 < timing.back_to_back(lambda: model(x), "cuda", 0.02) <= 2 * stats.median
        found = timing.peak_memory(lambda: model(x), model, [x], "cuda")
    assert found.activations >= 4096 * 1024 * 4
