"""Energy: domains of RAPL by hand, counters that begin again, NVML by a fake, and why there is none."""

import sys
from types import SimpleNamespace

import pytest
import torch

from vizoo.tools.profiling import energy, state

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def rapl(monkeypatch, tmp_path):
    """Two packages, a domain within one of them, and the whole platform; microjoules."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    domains = {"0": ("package-0", 1_000_000), "0:0": ("core", 5), "1": ("package-1", 9_000_000), "2": ("psys", 7)}
    for number, (name, spent) in domains.items():
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        for file, text in {"name": name, "energy_uj": spent, "max_energy_range_uj": 10_000_000}.items():
            (folder / file).write_text(f"{text}\n")
    return tmp_path


def test_packages_are_summed_and_counters_begin_again(rapl, monkeypatch):
    """A call of 0.5 s takes 1 J of the first package and 0.5 J of the second, which is soon at its end."""
    now = 0.0

    def call():
        nonlocal now
        now += 0.5
        for number, spent in (("0", 1_000_000), ("1", 500_000)):
            file = rapl / f"intel-rapl:{number}" / "energy_uj"
            file.write_text(str((int(file.read_text()) + spent) % 10_000_000))

    monkeypatch.setattr(energy, "wait", lambda device: None)
    found = energy.energy(call, 3, CPU, lambda: now)
    assert (found.kind, found.unit, found.batch) == ("energy", "J", 3)
    assert found.samples == [[pytest.approx(0.5)] * 3]
    assert found.details == {"source": "RAPL, 2 processor packages", "watts": pytest.approx(3)}
    assert found.quality == []


def test_a_counter_that_stands_still(rapl):
    ticks = iter(range(1000))
    found = energy.energy(lambda: None, 1, CPU, lambda: next(ticks))
    assert found.quality == ["the counter stood still while it was read"]


def test_why_there_is_none(rapl, monkeypatch):
    (rapl / "intel-rapl:1" / "energy_uj").unlink()
    (rapl / "intel-rapl:1" / "energy_uj").mkdir()  # an error of the system, as that of a file of root's
    found = energy.energy(lambda: None, 1, CPU)
    assert found == f"{energy.UNTOLD}: {rapl / 'intel-rapl:1' / 'energy_uj'}: Is a directory"
    monkeypatch.setattr(energy, "POWERCAP", rapl / "nowhere")
    assert energy.energy(lambda: None, 1, CPU) == "energy: neither NVML nor RAPL tells it here"


@pytest.mark.parametrize("told", [True, False])
def test_of_a_gpu(told, monkeypatch):
    """NVML counts millijoules; a card that does not count them is no failure."""
    now, spent = 0.0, 0

    def call():
        nonlocal now, spent
        now += 1.0
        spent += 200_000

    def ask(card):
        if not told:
            raise RuntimeError("not supported")
        return spent

    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetTotalEnergyConsumption=ask)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(state, "_card", lambda device: "card")
    monkeypatch.setattr(energy, "wait", lambda device: None)
    found = energy.energy(call, 4, GPU, lambda: now)
    if told:
        assert found.samples == [[pytest.approx(50.0)] * 3]
        assert found.details == {"source": "NVML, the whole card", "watts": pytest.approx(200)}
    else:
        assert found == "energy: neither NVML nor RAPL tells it here (vizoo[gpu] asks NVML)"


def test_a_gpu_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.energy(lambda: None, 1, GPU).startswith("energy: neither")
