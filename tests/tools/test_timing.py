"""Timing: stopping rules and statistics under fake clocks, alternation, compiled models, a fake GPU."""

import contextlib
import gc
import os
import signal
import statistics
import time
from multiprocessing import forkserver
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from vizoo.tools.common import Failure
from vizoo.tools.profiler import compare, measure
from vizoo.tools.profiling import machine, state, timing
from vizoo.tools.profiling.memory import peak_memory


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
    assert stats.median == pytest.approx(np.median(samples))
    assert stats.iqr == pytest.approx(np.quantile(samples, 0.75) - np.quantile(samples, 0.25))
    assert stats.details["n"] == 37


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
    assert "".join(order) == "abc" * 3 + "abccba" * 2  # one for the outputs, two to warm up, four timed
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


def rounds(rng, n, noise, truth=1.02):
    """Two functions on a machine whose speed drifts by tens of percent, one of which is 2 % slower."""
    drift = 1 + 0.15 * np.sin(np.linspace(0, 3, n)) + 0.2 * rng.random(n)
    return timing.Comparison({"a": drift * noise(rng, n), "b": truth * drift * noise(rng, n)}, 1.0, {})


NOISE = {
    "normal": lambda rng, n: 1 + 0.003 * rng.standard_normal(n),
    "heavy": lambda rng, n: 1 + 0.002 * rng.standard_t(3, n),
    "outliers": lambda rng, n: 1 + 0.003 * rng.random(n) + 0.2 * rng.random(n) * (rng.random(n) < 0.1),
}


@pytest.mark.parametrize("n", [8, 20, 50])
@pytest.mark.parametrize("noise", NOISE)
def test_a_drift_of_both_leaves_the_ratio_alone(noise, n):
    """The interval holds the truth as often as it says, and with 20 rounds it is narrower than 1 %."""
    found = [rounds(np.random.default_rng(seed), n, NOISE[noise]).ratio("b") for seed in range(400)]
    assert sum(low <= 1.02 <= high for _, low, high in found) >= 0.975 * len(found)
    assert all(low <= ratio <= high for ratio, low, high in found)
    if noise == "normal" and n >= 20:
        assert max(high - low for _, low, high in found[:100]) < 0.01


def test_ratios_are_of_rounds():
    """The median of the ratios of rounds; equal ratios leave no doubt, one round leaves all."""
    found = timing.Comparison({"a": [1.0, 2.0, 4.0, 8.0], "b": [1.5, 3.0, 6.0, 80.0]}, 1.0, {})
    assert found.ratio("b")[0] == pytest.approx(1.5)
    assert found.ratio("b") == found.ratio("b")
    assert timing.Comparison({"a": [1.0, 2.0], "b": [1.5, 3.0]}, 1.0, {}).ratio("b") == pytest.approx((1.5, 1.5, 1.5))
    assert timing.Comparison({"a": [1.0], "b": [1.5]}, 1.0, {}).ratio("b") == (1.5, 0.0, float("inf"))


def of(*processes):
    return timing.Measurement("latency", "s", 1, [list(p) for p in processes], {}, [], {})


@pytest.mark.parametrize(
    ("n", "left"), [(1, 0), (2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5), (100, 39)]
)
def test_the_interval_of_a_median_is_that_of_tables(n, left):
    """Ranks of the two-sided 95 % interval in tables of the sign test; fewer than six samples have none."""
    found = of(np.random.default_rng(0).permutation(n).tolist())
    assert found.ci95 == (left, n - 1 - left)
    assert found.median == (n - 1) / 2


def test_the_interval_of_processes():
    """It is drawn with a seed, holds the truth, and sees that processes differ by more than their samples do."""
    rng = np.random.default_rng(0)
    alike = of(*(1 + 0.01 * rng.standard_normal((5, 50))))
    apart = of(*(1 + 0.1 * np.arange(5)[:, None] + 0.001 * rng.standard_normal((5, 50))))
    low, high = alike.ci95
    assert low < 1 < high < low + 0.02
    assert alike.ci95 == (low, high)
    assert apart.median == pytest.approx(1.2, abs=0.001)
    assert apart.ci95 == pytest.approx((1.0, 1.4), abs=0.11)
    assert apart.ci95[1] - apart.ci95[0] > 0.15
    assert of([1.0, 1.0], [1.0]).ci95 == (1.0, 1.0)


def test_the_interval_of_processes_holds_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        low, high = of(*(rng.standard_normal((8, 1)) + 0.5 * rng.standard_normal((8, 20)))).ci95
        held += low <= 0 <= high
    assert held >= 34


def test_a_gpu_is_waited_for_where_the_modules_are(monkeypatch):
    """A module stays where it is, so the device that is named need not be the one that computes."""
    places = []
    monkeypatch.setattr(timing, "compare", lambda calls, device: places.append(device))
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    compare(one, two, inputs=torch.zeros(1, 2))
    on_gpu = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(two, "parameters", lambda: iter([on_gpu]))
    compare(one, two, inputs=torch.zeros(1, 2))
    compare({"a": len, "b": len}, inputs=[[on_gpu]])
    assert list(map(str, places)) == ["cpu", "cuda:1", "cuda:1"]


def test_modules_of_one_name(monkeypatch):
    monkeypatch.setattr(timing, "compare", lambda calls, device: list(calls))
    names = ["local-dir:a b", "local-dir:a b", "local-dir:a"]
    monkeypatch.setattr("vizoo.tools.profiling.profile._call", lambda *args: None)
    assert compare(*names) == ["local-dir:a b", "local-dir:a b 2", "local-dir:a"]


@pytest.mark.parametrize("functions", [{}, {"a": lambda: None}])
def test_compare_needs_two(functions):
    with pytest.raises(ValueError, match="need two functions"):
        compare(functions)
    with pytest.raises(ValueError, match="rounds=0"):
        compare({"a": lambda: None, "b": lambda: None}, rounds=0)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """Even if that one is killed: otherwise the work, and the processor's time, would be nobody's."""
    told = tmp_path / "pid"
    work = f"open({str(told)!r}, 'w').write(str(__import__('os').getpid())) and __import__('time').sleep(60)"
    parent = os.fork()
    if not parent:
        forkserver._forkserver.__init__()  # that of this process is no child of its child
        list(machine.run_cases([1, 2], [work], eval))
        os._exit(0)
    try:
        wait_until(lambda: told.exists() and told.read_text())
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    wait_until(lambda: not psutil.pid_exists(int(told.read_text())))


def wait_until(condition, seconds=50):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_inputs_grow_with_the_batch():
    f = timing.random_like
    image = f(torch.zeros(1, 3, 4, 5), 2, "cpu", torch.bfloat16)
    assert (image.shape, image.dtype) == ((2, 3, 4, 5), torch.bfloat16)
    assert image.float().std() > 0.5
    assert torch.equal(f(torch.tensor([[1, 2]]), 3, "cpu", torch.float32), torch.tensor([[1, 2]] * 3))
    assert f(torch.zeros(1, 2), 3, "meta", torch.float32).shape == (3, 2)
    assert f("text", 3, "cpu", torch.float32) == "text"
    nested = f({"images": [torch.zeros(1, 4), torch.zeros(2, 4)], "n": 5}, 3, "cpu", torch.float16)
    assert ([len(t) for t in nested["images"]], nested["images"][0].dtype, nested["n"]) == ([3, 6], torch.float16, 5)
    state = torch.get_rng_state()
    f(torch.zeros(1, 2), 3, "cpu", torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_latency_on_a_gpu_is_what_a_caller_waits(card):
    """Work of 10 ms that is launched in 1 ms: the caller waits for the first launch and all of the work."""
    gpu = card(0.001, 0.010)
    stats = measure(gpu.call, "cuda", clock=lambda: gpu.now, min_time=0.1, max_time=5)
    assert stats.median == pytest.approx(0.0102)
    assert stats.quantile(1.0) == pytest.approx(stats.first)
    assert stats.host == pytest.approx([0.001] * stats.n)
    assert stats.device == pytest.approx([0.010] * 25)
    assert (stats.cpu_use, stats.warnings) == (None, [])
    assert (stats.details["host"], stats.details["device"]) == (pytest.approx(0.001), pytest.approx(0.010))


def test_launches_that_take_longer_than_their_work_are_named(card):
    """The work of 1 ms fits between the launches: their 10 ms are all that a caller waits for."""
    gpu = card(0.010, 0.001)
    stats = measure(gpu.call, "cuda", clock=lambda: gpu.now, min_time=0.1, max_time=5)
    assert stats.median == pytest.approx(0.0102)
    assert stats.device == pytest.approx([0.001] * 25)
    assert stats.warnings == ["launch-bound: 10.00 ms to launch, 1.00 ms of work on the GPU"]


def test_calls_back_to_back_are_timed_where_they_run(card, monkeypatch):
    """Events are recorded on the current device, which is another one here until the context is entered."""
    gpu, entered = card(0.001, 0.010), []
    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(entered.append(d)))
    assert timing.back_to_back(gpu.call, "cuda:1") == pytest.approx(0.010, rel=0.02)
    assert entered == ["cuda:1"]


def test_slow_calls_on_a_gpu_are_few(card):
    gpu = card(0.001, 1.0)
    assert len(measure(gpu.call, "cuda", clock=lambda: gpu.now, min_time=1, max_time=2).device) == 3


def test_a_cpu_has_no_launches():
    stats = Clock(0.01).measure(min_time=0, max_time=1)
    assert stats.host is stats.device is None
    assert stats.details["host"] is None


def test_processor_time_is_that_of_the_calls():
    """What is done between calls, as drawing a bar, says nothing about the machine."""
    clock = Clock(0.1)

    def tick(share):
        clock.wall += 1.0
        clock.cpu += 0.5

    assert clock.measure(min_time=0.5, max_time=5, tick=tick).cpu_use == pytest.approx(1)


def test_flushing_of_denormal_numbers_comes_back():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        with timing.quiet():
            assert state.flushes_denormal()
        assert state.flushes_denormal()
    finally:
        torch.set_flush_denormal(False)
    with timing.quiet():
        assert state.flushes_denormal()
    assert not state.flushes_denormal()


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
        assert min(stats.device) > 0 < min(stats.host)
        assert statistics.median(stats.host) <= stats.median
        assert 0 < timing.back_to_back(lambda: model(x), "cuda", 0.02) <= 2 * stats.median
        found = peak_memory(lambda: model(x), model, [x], "cuda")
    assert found.activations >= 4096 * 1024 * 4
