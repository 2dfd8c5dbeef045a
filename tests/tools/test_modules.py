"""Seconds of modules under a simulated clock: inclusive, summed over calls, without what hooks cost."""

import contextlib

import pytest
import torch
from torch import nn

from vizoo.tools.profiling import modules


class Work(nn.Module):
    """Takes a number of seconds of the simulated clock, and calls what is inside it."""

    def __init__(self, clock, seconds, *inside):
        super().__init__()
        self.clock, self.seconds, self.inside = clock, seconds, nn.ModuleList(inside)

    def forward(self, x):
        self.clock.now += self.seconds
        for module in self.inside:
            x = module(x)
        return x


class Clock:
    """Advances when something works, and by the cost of looking at it."""

    def __init__(self, look):
        self.now, self.look = 0.0, look

    def mark(self, device):
        self.now += self.look
        return self.now


@pytest.fixture(params=[0.0, 1e-3], ids=["free", "dear"])
def clock(request, monkeypatch):
    """Hooks cost nothing, or twice as much as the smallest module."""
    clock = Clock(request.param)
    monkeypatch.setattr(modules, "time_mark", clock.mark)
    return clock


CPU = torch.device("cpu")


def test_seconds_of_modules(clock):
    twice = Work(clock, 0.001)
    model = Work(clock, 0.002, Work(clock, 0.003, twice, twice), Work(clock, 0.0005), twice)
    x = torch.zeros(1)
    found = modules.module_times(model, lambda: model(x), 4, CPU, 0.0)
    wanted = {"": 0.0085, "inside.0": 0.005, "inside.0.inside.0": 0.003, "inside.1": 0.0005}
    near = {path: pytest.approx(seconds, abs=6e-5) for path, seconds in wanted.items()}
    assert {path: s for path, s in found.seconds.items() if path in wanted} == near
    assert found.seconds["inside"] == pytest.approx(0.0055, abs=6e-5)  # a list: of what is named in it
    assert found.seconds["inside.1.inside"] is None
    m = found.measurement
    assert (m.kind, m.unit, m.batch, len(m.samples[0])) == ("modules", "s", 4, 5)
    assert m.details["covered"] == pytest.approx(1, abs=0.25)
    assert m.details["hook_seconds"] == pytest.approx(2 * clock.look)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_sum_that_is_far_off_is_told(clock, monkeypatch):
    """As of a model that is slower while it is hooked than what hooks cost explains."""
    monkeypatch.setattr(modules, "hook_cost", lambda device: modules.HookCost(0.0, 0.0))
    model = Work(clock, 0.01, *(Work(clock, 1e-4) for _ in range(20)))
    quality = modules.module_times(model, lambda: model(torch.zeros(1)), 1, CPU, 0.0).measurement.quality
    assert bool(quality) == (clock.look > 0)
    if quality:
        assert quality == ["their own seconds sum to 408% of the pass without hooks"]


def test_hooks_go_after_an_error(clock):
    class Broken(nn.Module):
        def forward(self, x):
            if self._forward_hooks:
                raise KeyError("mine")
            return x

    model = nn.Sequential(Broken())
    with pytest.raises(KeyError, match="mine"):
        modules.module_times(model, lambda: model(torch.zeros(1)), 1, CPU, 0.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors_that_a_model_catches(clock):
    """The module that raised is left all the same: what follows is not inside it."""

    class Raises(Work):
        def forward(self, x):
            super().forward(x)
            raise KeyError("mine")

    class Catches(Work):
        def forward(self, x):
            with contextlib.suppress(KeyError):
                self.inside[0](x)
            return self.inside[1](x)

    model = Catches(clock, 0.0, Raises(clock, 0.01), Work(clock, 0.02))
    found = modules.module_times(model, lambda: model(torch.zeros(1)), 1, CPU, 0.0).seconds
    assert found["inside.0"] == pytest.approx(0.01, abs=1e-4)
    assert found["inside.1"] == pytest.approx(0.02, abs=1e-4)
    assert found[""] == pytest.approx(0.03, abs=1e-4)


def test_what_has_no_modules_that_run():
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    assert "TorchScript" in modules.module_times(scripted, lambda: None, 1, CPU, 0.0)

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    program = Program()
    assert "exported" in modules.module_times(program, lambda: program(torch.zeros(1, 2)), 1, CPU, 0.0)


def test_on_a_gpu_its_work_is_timed(card, monkeypatch):
    """Five launches of a module, whose work takes longer than they do; the GPU spins until all are queued."""
    gpu = card(0.001, 0.010)

    class Layer(nn.Module):
        def forward(self, x):
            gpu.call()
            return x

    model = nn.Sequential(Layer(), Layer())
    monkeypatch.setattr(modules, "hook_cost", lambda device: modules.HookCost(0.0, 0.0))
    monkeypatch.setattr(modules.time, "perf_counter", lambda: gpu.now)
    x = torch.zeros(1)
    found = modules.module_times(model, lambda: model(x), 1, torch.device("cuda"), 0.0)
    assert found.seconds == {name: pytest.approx(s) for name, s in {"": 0.020, "0": 0.010, "1": 0.010}.items()}
    assert found.measurement.details["unhooked"] == pytest.approx(0.020)
