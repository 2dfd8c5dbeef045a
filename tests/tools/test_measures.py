"""What is measured of a model: batches that do not fit, compiled and captured models, and what is left as it was."""

import functools
import gc
import json
from pathlib import Path
from types import SimpleNamespace

import fastjsonschema
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vizoo.tools.common import Failure, UserError
from vizoo.tools.profiling import measures, roofline, timing
from vizoo.tools.profiling.memory import Memory

SCHEMA = Path(roofline.__file__).with_name("record.schema.json")


NO_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_batch_is_halved_until_it_fits(error, monkeypatch):
    """As on a device whose memory holds 10 images; the clock is faked."""
    tried = []

    def fake(fn, device, **kwargs):
        tried.append(fn().shape[0])
        if tried[-1] > 10:
            raise error
        return timing.Stats([0.1 * tried[-1]] * 3, None, 0.0, 0)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(measures, "measure", fake)
    how = timing.Conditions(batch=64)
    found = measures.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("throughput",), how)
    assert tried == [64, 32, 16, 8]
    (speed,) = found.measurements
    assert (speed.median, speed.batch) == (pytest.approx(10), 8)
    assert found.notes == ["out of memory: batch reduced to 8"]
    monkeypatch.setattr(measures, "measure", full)
    for mode in ("throughput", "latency"):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            measures.measure_model(nn.Identity(), (torch.zeros(1, 2),), (mode,), how)


def test_other_errors_are_not_of_memory(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(measures, "measure", broken)
    with pytest.raises(RuntimeError, match="a kernel is missing") as caught:
        measures.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("throughput",), timing.Conditions())
    assert not isinstance(caught.value, torch.cuda.OutOfMemoryError)


class Graphs:
    """A backend that runs what it is given as it is, and keeps the shapes and numbers it was given."""

    def __init__(self):
        self.inputs = []

    def __call__(self, graph, inputs):
        nodes = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        self.inputs.append([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in nodes])
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, and how."""
    found = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
    return found


def test_every_batch_is_compiled_for_itself(graphs):
    """Latency at batch 1, then throughput at batch 8: dynamo would take the second as a hint to compile for any."""
    how = timing.Conditions(compile=True, min_time=0, max_time=0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with how.entered():
        found = measures.measure_model(model, (torch.zeros(1, 3, 8, 8),), ("latency", "throughput", "memory"), how)
    shapes = [[s for s in given if s[1:] == (3, 8, 8)] for given in graphs.inputs]
    assert shapes == [[(1, 3, 8, 8)], [(8, 3, 8, 8)]]
    assert all(type(n) is int for given in graphs.inputs for shape in given for n in shape)
    assert "graph breaks" not in str(found.notes)


def test_models_of_one_class_are_compiled_for_themselves(graphs):
    """As in a benchmark, where each batch size has models of its own that share their code."""
    for n in (1, 8, 3):
        sides = [timing.compiled(nn.Linear(4, 4)) for _ in range(2)]
        for side in sides:
            side(torch.zeros(n, 4))
    shapes = [next(s for s in given if s[1:] == (4,) and s != (4, 4)) for given in graphs.inputs]
    assert shapes == [(1, 4), (8, 4), (3, 4)]  # both sides share one graph
    assert all(type(n) is int for shape in shapes for n in shape)


def test_graph_breaks_are_told(graphs):
    class Broken(nn.Module):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    how = timing.Conditions(compile=True, min_time=0, max_time=0)
    found = measures.measure_model(Broken(), (torch.zeros(1, 2),), ("latency",), how)
    assert "compiled in pieces: 1 graph breaks" in found.notes


@pytest.mark.parametrize("way", ["matmul", "everything", "old"])
def test_compiled_models_run_whatever_the_settings_are(way, graphs):
    """Of the settings that PyTorch refuses to see mixed; they are tried out in test_precision.py."""
    how, before = timing.Conditions(compile=True, min_time=0, max_time=0), torch.backends.cuda.matmul.fp32_precision
    try:
        if way == "everything":
            torch.backends.fp32_precision = "tf32"
        elif way == "matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with how.entered():
            assert not torch.backends.cuda.matmul.allow_tf32
            measures.measure_model(nn.Linear(2, 2), (torch.zeros(1, 2),), ("latency", "throughput"), how)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("mode", "plain"), [("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs"), (True, None)]
)
def test_memory_of_a_cuda_graph_is_that_without_one(mode, plain, card, monkeypatch):
    """A graph that is replayed allocates nothing."""
    card(0.001, 0.010)
    modes, measured = [], []
    monkeypatch.setattr(measures, "compiled", lambda module, mode: modes.append(mode) or (lambda *x: mode))
    monkeypatch.setattr(
        measures, "peak_memory", lambda call, *args: measured.append(call()) or Memory(1, 1, "cuda allocator")
    )
    monkeypatch.setattr(measures.Calls, "inputs", lambda self, n: [n])
    how = timing.Conditions(device=torch.device("cuda"), compile=mode, min_time=0, max_time=0)
    found = measures.measure_model(nn.Linear(2, 2), (), ("latency", "memory"), how)
    assert measured == [plain]
    assert modes == list(dict.fromkeys((None if mode is True else mode, plain)))
    assert ("memory is that without CUDA graphs" in found.notes) == (mode is not True)


def test_weights_are_cast_in_every_call():
    """As where each call enters autocast itself: some releases keep what they cast for the calls that follow."""
    how, casts = timing.Conditions(dtype="bf16", amp=True), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            casts.append(func is torch.ops.aten.to.dtype)
            return func(*args, **(kwargs or {}))

    with how.entered():
        call = measures.Calls(nn.Linear(8, 8), (torch.zeros(1, 8),), how).prepared(1)[1]
        for _ in range(2):
            with Casts():
                call()
    half = len(casts) // 2
    assert sum(casts[:half]) == sum(casts[half:]) == 3  # input, weight and bias


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


LIMITS = roofline.Ceilings([1 << 10, 1 << 20], [1e15, 1e15], 1e18, {"8x8x8": 1e18})


def test_every_measure_leaves_the_model_as_it_was(monkeypatch):
    """No hook, mode, gradient or changed statistic is left, and every measurement fits into a record."""
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype: LIMITS)
    model, told = Small().eval(), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    how = timing.Conditions(min_time=0, max_time=0, batch=2)
    with how.entered():
        found = measures.measure_model(model, (torch.zeros(1, 3, 8, 8),), measures.MEASURES, how, told.append)
    kinds = [m.kind for m in found.measurements if m.kind != "energy"]
    assert kinds == ["latency", "throughput", "train", "modules", "copy", "matmul", "memory", "train_memory"]
    assert told[:2] == ["latency, batch 2", "throughput, batch 2"]
    fits = fastjsonschema.compile(json.loads(SCHEMA.read_text())["properties"]["measurements"]["items"])
    for measurement in found.measurements:
        item = json.loads(json.dumps(measurement.to_dict()))
        fits(item)
        assert timing.Measurement.from_dict(item) == measurement
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch._C._len_torch_dispatch_stack() == 0
    assert list(found.modules) == [name for name, _ in model.named_modules()]
    assert {"aten::convolution", "aten::addmm", "aten::relu"} <= found.ops.keys()


def test_only_what_is_asked_for_is_measured():
    how = timing.Conditions(min_time=0, max_time=0)
    found = measures.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("memory",), how)
    assert [m.kind for m in found.measurements] == ["memory"]
    assert found.measurements[0].median == 8


def test_training_steps_are_halved_too(monkeypatch):
    tried = []

    def step_times(step, n, tick):
        tried.append(n)
        if n > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return timing.Measurement("train", "s", n, [[1.0]], {}, [], {})

    monkeypatch.setattr(measures, "step_times", step_times)
    how = timing.Conditions(batch=8)
    found = measures.measure_model(nn.Linear(2, 2), (torch.zeros(1, 2),), ("train",), how)
    assert tried == [8, 4, 2]
    assert [(m.kind, m.batch) for m in found.measurements] == [("train", 2), ("train_memory", 2)]
    assert found.notes == ["out of memory: batch reduced to 2"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_graph_is_captured_and_replayed(broken, card, monkeypatch):
    """After calls on a stream aside; nothing is collected meanwhile, and collecting comes back."""
    card(0.001, 0.001)
    done = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    class Around:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            done.append(f"in {self.what}")

        def __exit__(self, *error):
            done.append("out")

    def call():
        assert not gc.isenabled()
        done.append("call")
        if broken and "in graph" in done:
            raise RuntimeError("operation not permitted when stream is capturing")
        return "out of the graph"

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(cuda, "stream", lambda stream: Around(stream.name))
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay")))
    monkeypatch.setattr(cuda, "graph", lambda graph: Around("graph"))
    if broken:
        with pytest.raises(Failure, match="--graph: the model cannot be captured in a CUDA graph: operation not"):
            measures.captured(call, torch.device("cuda"))
    else:
        replay = measures.captured(call, torch.device("cuda"))
        assert done == [
            "aside waits for main", "in aside", "call", "call", "call", "out", "main waits for aside",
            "in graph", "call", "out",
        ]  # fmt: skip
        assert replay() == "out of the graph"
        assert done[-1] == "replay"
    assert gc.isenabled()


def test_a_graph_needs_cuda():
    with pytest.raises(UserError, match="--graph: needs CUDA, got --device cpu"):
        measures.measure_model(nn.Identity(), (), ("latency",), timing.Conditions(graph=True))


def test_the_memory_of_a_captured_model_is_that_of_its_call(card, monkeypatch):
    card(0.001, 0.010)
    run = []
    monkeypatch.setattr(measures, "captured", lambda call, device: lambda: run.append("replay"))
    monkeypatch.setattr(measures, "peak_memory", lambda call, *args: call() or Memory(1, 1, "cuda allocator"))
    monkeypatch.setattr(measures, "inference_parts", lambda *args: ({}, []))
    monkeypatch.setattr(measures.Calls, "inputs", lambda self, n: [n])
    how = timing.Conditions(device=torch.device("cuda"), graph=True, min_time=0, max_time=0)
    found = measures.measure_model(lambda x: run.append("call"), (), ("latency", "memory"), how)
    assert run[-1] == "call"
    assert set(run[:-1]) == {"replay"}
    assert "memory is that without CUDA graphs" in found.notes


def test_a_model_that_no_mode_can_look_into(monkeypatch):
    """What needs one is told to be missing; the rest is measured."""

    class Shy(nn.Module):
        def forward(self, x):
            if torch._C._len_torch_dispatch_stack():
                raise RuntimeError("watched")
            return x.relu()

    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype: LIMITS)
    how = timing.Conditions(min_time=0, max_time=0)
    with how.entered():
        found = measures.measure_model(Shy(), (torch.zeros(1, 2),), ("memory", "roofline"), how)
    assert found.measurements[0].median == 16
    assert found.ops == {}
    assert found.notes == [
        "roofline: its operators cannot be timed one by one: watched",
        "memory: activations and workspace cannot be told apart here",
    ]


@pytest.mark.gpu
def test_on_a_gpu():
    """A graph answers as the call does, and is no slower; every measure can be taken."""
    model, x = Small().cuda().eval(), torch.zeros(1, 3, 32, 32)
    seconds = {}
    for graph in (False, True):
        how = timing.Conditions(device=torch.device("cuda"), graph=graph, min_time=0.1, max_time=0.5, batch=2)
        with how.entered():
            found = measures.measure_model(model, (x,), measures.MEASURES, how)
            seconds[graph] = found.latency.median
            calls = measures.Calls(model, (x,), how)
            assert torch.allclose(calls.prepared(2)[1](), calls.eager(2)[1](), atol=1e-5)
        kinds = {m.kind for m in found.measurements} - {"energy"}
        assert kinds == {"latency", "throughput", "train", "modules", "copy", "matmul", "memory", "train_memory"}
        for m in found.measurements:
            if m.unit == "bytes":
                assert sum(m.parts.values()) == m.median
    assert seconds[True] <= 1.1 * seconds[False]


def test_a_cpu_makes_equal_calls_once(monkeypatch):
    """Its throughput is that of the calls whose latency was measured, at the same batch."""
    made = []

    def fake(fn, device, **kwargs):
        made.append(fn().shape[0])
        return timing.Stats([0.5, 0.25, 0.5], None, 0.0, 0)

    monkeypatch.setattr(measures, "measure", fake)
    for batch, calls in ((4, [4]), (None, [1, 8])):
        made.clear()
        how = timing.Conditions(batch=batch)
        found = measures.measure_model(nn.Identity(), (torch.zeros(1, 2),), ("latency", "throughput"), how)
        latency, speed = found.measurements
        assert made == calls
        assert (speed.batch, speed.unit, speed.median) == (calls[-1], "images/s", 2.0 * calls[-1])
        assert speed.samples == [[calls[-1] / s for s in latency.samples[0]]]
