"""Peak memory: bytes by hand, kernels' own buffers included, and what is left where the allocator is silent."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import profiler

from vizoo.tools.profiling import memory
from vizoo.tools.profiling.memory import inference_parts, peak_memory


class Chain(nn.Module):
    def forward(self, x):
        for _ in range(4):
            x = x.relu()
        return x


def test_tensors_are_counted_to_the_byte():
    """Two maps are alive at once: the one that is read and the one that is written."""
    x = torch.randn(100, 1000)
    with torch.inference_mode():
        found = peak_memory(lambda: Chain()(x), Chain(), [x], "cpu")
    assert found == memory.Memory(3 * 400_000, 2 * 400_000, "cpu allocator")


def test_weights_and_input_are_told_apart():
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 256)).eval()
    x = torch.randn(1024, 64)
    with torch.inference_mode():
        found = peak_memory(lambda: model(x), model, [x], "cpu")
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert found.activations == 2 * 1024 * 256 * 4
    assert found.peak == weights + x.numel() * 4 + found.activations


@pytest.mark.parametrize("threads", [1, 2])
def test_columns_of_a_convolution_are_seen(threads):
    """Convolutions in float64 copy 3x3 neighbourhoods of all images into columns, which no operator returns."""
    x, conv = torch.randn(4, 8, 20, 24, dtype=torch.float64), nn.Conv2d(8, 5, 3, padding=1).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = peak_memory(lambda: conv(x), conv, [x], "cpu")
    finally:
        torch.set_num_threads(before)
    assert found.activations == 8 * 4 * 20 * 24 * (5 + 9 * 8)


def test_what_operators_take_for_themselves_is_told_apart():
    """The columns of a convolution in float64 are no tensor of the model; the map that it returns is."""
    x, conv = torch.randn(4, 8, 20, 24, dtype=torch.float64), nn.Conv2d(8, 5, 3, padding=1).double()
    with torch.inference_mode():
        found = peak_memory(lambda: conv(x), conv, [x], "cpu")
        parts, quality = inference_parts(found, lambda: conv(x), conv, [x], "cpu")
        opaque, told = inference_parts(found, None, conv, [x], "cpu")
    maps = 8 * 4 * 20 * 24
    given = {"weights": 8 * (5 * 8 * 9 + 5), "input": maps * 8}
    assert parts == {**given, "activations": maps * 5, "workspace": torch.get_num_threads() * maps * 9 * 8}
    assert sum(parts.values()) == found.peak
    assert opaque == {**given, "activations": found.activations}
    assert (quality, told) == ([], ["activations and workspace cannot be told apart here"])


def test_activations_of_the_peak_are_those_that_are_alive():
    """Two maps of four are alive at once, and what was given back before is no part of it."""
    x = torch.randn(100, 1000)
    with torch.inference_mode():
        found = peak_memory(lambda: Chain()(x), Chain(), [x], "cpu")
        parts, _ = inference_parts(found, lambda: Chain()(x), Chain(), [x], "cpu")
    assert parts == {"weights": 0, "input": 400_000, "activations": 800_000, "workspace": 0}


def test_a_training_step():
    """At the peak: the hidden map that the backward pass needs, gradients of all weights, the loss and its gradient."""
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 16)), torch.randn(64, 256)

    def step():
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    found = peak_memory(step, model, [x], "cpu")
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert found.activations == pytest.approx(gradients + 4 * 64 * 512, abs=256)


@pytest.mark.parametrize("before", [None, "1"])
def test_the_profiler_is_told_to_be_silent(before, monkeypatch):
    """It reads the variable once in a process, when it first starts, and writes its first lines then."""
    name, seen = "KINETO_LOG_LEVEL", []
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    peak_memory(lambda: seen.append(os.environ.get(name)), nn.Module(), [], "cpu")
    assert seen == [before, "99"]
    assert os.environ.get(name) == before


def test_errors_of_the_call_are_its_own():
    calls = []

    def fail():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        peak_memory(fail, nn.Module(), [], "cpu")
    assert len(calls) == 2  # one before, and none after the error


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_the_resident_set_is_left(error, monkeypatch):
    def broken(**kwargs):
        raise error("gone")

    monkeypatch.setattr(profiler, "profile", broken)
    model, x = nn.Linear(4, 4), torch.zeros(1, 4)
    found = peak_memory(lambda: model(x), model, [x], "cpu")
    assert found.how == "resident set"
    assert found.peak >= 4 * 20 + 16


def test_another_profiler_may_be_running():
    """It goes on; beside it the resident set is left."""
    x = torch.randn(8)
    with profiler.profile() as running:
        found = peak_memory(lambda: x + 1, nn.Module(), [x], "cpu")
    assert found.how == "resident set"
    assert [e.name for e in running.function_events if e.name == "aten::add"] == ["aten::add"] * 2


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
    assert memory._resident_growth(allocate) == 60 << 20
