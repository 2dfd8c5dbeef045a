"""What a record says of the machine: the commit of this project only, clocks, throttling and settings."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vizoo.tools.options import STATE
from vizoo.tools.profiling import machine, state
from vizoo.tools.profiling.profile import profile

PLACE = Path("tools/profiling/machine.py")


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=clean).stdout.strip()


def tree(root, name="vizoo"):
    """The file and the metadata of a checkout."""
    (root / PLACE).parent.mkdir(parents=True)
    (root / PLACE).write_text("# code\n", encoding="utf-8")
    (root / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nversion = "1"\n', encoding="utf-8")
    return root


def committed(root):
    """A repository with one commit of everything; what git calls that commit."""
    root.mkdir(exist_ok=True)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all", "--allow-empty")
    return git(root, "rev-parse", "--short", "HEAD")


def found(root):
    return machine._commit((root / PLACE).resolve())


def test_own_checkouts(tmp_path):
    """A checkout, with changes too; a work tree, a shallow clone and a submodule of it; a link to its folder."""
    root = tree(tmp_path / "own")
    name = committed(root)
    assert found(root) == name
    git(root, "worktree", "add", "-q", str(tmp_path / "work"))
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{root}", "shallow")
    other = tmp_path / "other"
    committed(other)
    git(other, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(root), "deps/vizoo")
    assert [found(tmp_path / p) for p in ("work", "shallow", "other/deps/vizoo")] == [name] * 3
    (tmp_path / "link").symlink_to(root / "tools")
    assert machine._commit((tmp_path / "link/profiling/machine.py").resolve()) == name
    (root / PLACE).write_text("# changed\n", encoding="utf-8")
    assert found(root) == f"{name}+"


def test_foreign_repositories(tmp_path):
    """Installed in the environment of a project, copied into one, unpacked over one; none has a commit of ours."""
    project = tmp_path / "project"
    installed = project / "venv/lib/site-packages/vizoo"
    tree(installed)
    (installed / "pyproject.toml").unlink()
    vendored = tree(project / "third_party/vizoo")
    committed(project)
    assert found(installed) == ""
    assert found(vendored) == ""
    assert found(tree(tmp_path / "nowhere")) == ""
    unpacked = tmp_path / "unpacked"
    committed(unpacked)
    assert found(tree(unpacked)) == ""  # what is not tracked is not of that commit
    fork = tree(tmp_path / "fork", "zoo")
    committed(fork)
    assert found(fork) == ""


def test_hooks_of_another_repository(tmp_path, monkeypatch):
    """Git tells hooks and aliases by variables where their repository is."""
    root, other = tree(tmp_path / "own"), tmp_path / "other"
    name = committed(root)
    committed(other)
    for variable, value in {"GIT_DIR": other / ".git", "GIT_WORK_TREE": root, "GIT_CEILING_DIRECTORIES": root}.items():
        monkeypatch.setenv(variable, str(value))
    assert found(root) == name
    assert found(tree(tmp_path / "nowhere")) == ""


def test_git_is_missing_or_refuses(tmp_path, monkeypatch):
    root = tree(tmp_path / "own")
    committed(root)
    refuses = tmp_path / "bin"
    refuses.mkdir()
    monkeypatch.setenv("PATH", str(refuses))
    assert found(root) == ""
    (refuses / "git").write_text(f"#!{sys.executable}\nraise SystemExit('fatal: detected dubious ownership')\n")
    (refuses / "git").chmod(0o755)
    assert found(root) == ""


def test_the_commit_is_asked_for_once(monkeypatch):
    machine.commit()
    monkeypatch.setattr(machine.subprocess, "run", None)
    assert machine.commit() == machine.versions()["commit"]


CARD = {
    "nvmlInit": None,
    "nvmlSystemGetDriverVersion": "580.65",
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetPowerUsage": 412_345,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x4 | 0x40,
}


@pytest.fixture
def card(monkeypatch):
    """NVML with one card; what it answers may be changed."""
    answers = dict(CARD, sm=1755, memory=2619)

    def asked(name):
        def answer(*args):
            if isinstance(answers[name], Exception):
                raise answers[name]
            return answers[name]

        return answer

    library = SimpleNamespace(**{name: asked(name) for name in CARD})
    library.NVML_CLOCK_SM, library.NVML_CLOCK_MEM, library.NVML_TEMPERATURE_GPU = "sm", "memory", 0
    library.nvmlDeviceGetHandleByUUID = {"GPU-c0de": "handle"}.__getitem__
    library.nvmlDeviceGetClockInfo = lambda handle, kind: asked(kind)()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="c0de"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    return answers


GPU = torch.device("cuda", 1)


def test_state_of_a_gpu(card):
    found = state.state(GPU)
    assert tuple(found) == STATE
    assert (found["clock_mhz"], found["max_clock_mhz"], found["memory_clock_mhz"]) == (1755, 1980, 2619)
    assert (found["temperature_c"], found["power_w"], found["driver"]) == (61, 412.3, "580.65")
    assert found["throttled"] == "power cap, temperature (hardware)"
    assert (found["cudnn"], found["cudnn_benchmark"]) == (91002, torch.backends.cudnn.benchmark)
    card["nvmlDeviceGetCurrentClocksEventReasons"] = 0x1 | 0x2 | 0x100  # idle, and clocks that somebody set
    assert state.state(GPU)["throttled"] == ""


def test_what_a_card_does_not_tell_is_unknown(card, monkeypatch):
    for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons", "sm"):
        card[name] = OSError("Not Supported")
    found = state.state(GPU)
    assert [found[k] for k in ("power_w", "throttled", "clock_mhz", "memory_clock_mhz")] == [None, None, None, 2619]
    card["nvmlInit"] = OSError("Driver Not Loaded")
    assert state.state(GPU)["driver"] is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert state.state(GPU)["memory_clock_mhz"] is None


def test_drivers_and_libraries_that_lack_a_name(card):
    """Reasons have another name before driver 535, and a missing function of the library costs its own figure only."""
    library = sys.modules["pynvml"]
    library.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x20
    card["nvmlDeviceGetCurrentClocksEventReasons"] = OSError("Function Not Found")
    assert state.state(GPU)["throttled"] == "temperature"
    del library.nvmlDeviceGetCurrentClocksEventReasons, library.nvmlDeviceGetTemperature
    found = state.state(GPU)
    assert [found[k] for k in ("throttled", "temperature_c", "power_w")] == ["temperature", None, 412.3]


def test_a_part_of_a_card_tells_the_state_of_the_card(card):
    library = sys.modules["pynvml"]
    library.nvmlDeviceGetHandleByUUID = {"MIG-c0de": "part"}.__getitem__
    library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = {"part": "handle"}.__getitem__
    assert state.state(GPU)["clock_mhz"] == 1755


@pytest.fixture
def processors(tmp_path, monkeypatch):
    """Four cores of which this process may use two, in a faked /sys; their clocks may be changed."""
    import psutil

    clocks = [4000.0, 800.0, 3000.4, 5000.0]
    for i in range(4):
        folder = tmp_path / f"cpu{i}/thermal_throttle"
        folder.mkdir(parents=True)
        for kind in ("core", "package"):
            (folder / f"{kind}_throttle_count").write_text(f"{i}\n")
    (tmp_path / "cpu0/cpufreq").mkdir()
    (tmp_path / "cpu0/cpufreq/scaling_governor").write_text("powersave\n")
    monkeypatch.setattr(state, "PROCESSORS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2}, raising=False)

    def read(percpu):
        return [SimpleNamespace(current=c, max=3500.0 if i < 3 else 6000.0) for i, c in enumerate(clocks)]

    monkeypatch.setattr(psutil, "cpu_freq", read)
    return clocks


CPU = torch.device("cpu")


def test_state_of_a_cpu(processors):
    found = state.state(CPU)
    assert tuple(found) == STATE
    assert (found["clock_mhz"], found["max_clock_mhz"]) == (3000, 3500)
    assert (found["throttle_count"], found["governor"]) == (12, "powersave")
    assert {k for k, v in found.items() if v is None} == {
        *("memory_clock_mhz", "temperature_c", "power_w", "throttled", "driver", "cudnn", "cudnn_benchmark")
    }


@pytest.mark.parametrize("error", [NotImplementedError, FileNotFoundError, RuntimeError])
def test_systems_that_tell_nothing(error, tmp_path, monkeypatch):
    import psutil

    def broken(percpu):
        raise error

    monkeypatch.setattr(psutil, "cpu_freq", broken)
    monkeypatch.setattr(state, "PROCESSORS", tmp_path)
    found = state.state(CPU)
    assert [found[k] for k in ("clock_mhz", "max_clock_mhz", "throttle_count", "governor")] == [None] * 4


class Time:
    """A clock that goes on by itself with every look at it."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def looked(device, change, looks=8):
    """A watch that looked some times, each after a change of what there is to see."""
    watch = state.Watch(device, Time(state.PAUSE))
    for i in range(looks):
        change(i)
        before = len(watch.seen)
        while len(watch.seen) == before:
            watch.look()
    return watch


def test_steady_clocks_are_no_news(processors):
    """The cores this process may use sleep in turn, and the clock of the busy one trembles."""

    def change(i):
        processors[1:3] = [(800.0, 3000.0 + 40 * (i % 2)), (3000.0 + 40 * (i % 2), 800.0)][i % 3 == 0]

    watch = looked(CPU, change)
    assert watch.notes == []
    assert watch.record["clock_mhz"] == 3020


def test_falling_clocks_and_throttling_are_news(processors, tmp_path):
    def change(i):
        processors[2] = 3000.0 if i < 5 else 2600.0
        (tmp_path / "cpu2/thermal_throttle/core_throttle_count").write_text(f"{2 + i // 4}\n")

    assert looked(CPU, change).notes == [
        "the clock went from 3000 to 2600 MHz while measuring",
        "the processor was throttled 1 times while measuring: temperature",
    ]


def test_reasons_of_a_gpu_are_gathered(card):
    def change(i):
        card["nvmlDeviceGetCurrentClocksEventReasons"] = {2: 0x4, 3: 0x24}.get(i, 0x1)

    watch = looked(GPU, change)
    assert watch.notes == ["the device was slowed down while measuring: power cap, temperature"]
    assert watch.record["throttled"] == "power cap, temperature"
    assert looked(GPU, lambda i: card.update(nvmlDeviceGetCurrentClocksEventReasons=0)).notes == []


def test_looking_takes_little_time(monkeypatch):
    now, looks = 0.0, []

    def slow(device):
        nonlocal now
        now += 0.1
        looks.append(1)
        return dict.fromkeys(STATE)

    monkeypatch.setattr(state, "state", slow)
    watch = state.Watch(CPU, lambda: now)
    while now < 60:
        now += 0.01
        watch.look()
    assert 0.1 * sum(looks) == pytest.approx(60 * state.SHARE, rel=0.1)


def test_a_profile_tells_the_state_it_was_measured_in():
    model, inputs = torch.nn.Linear(2, 2), [torch.zeros(1, 2)]
    with_figures = profile(model, inputs, measure="latency", min_time=0, max_time=0).environment
    assert with_figures["float32_products"] == "ieee"
    assert with_figures["flush_denormal"] is torch.set_flush_denormal(False)  # whether this processor can
    assert set(STATE) <= set(profile(model, inputs).environment)
