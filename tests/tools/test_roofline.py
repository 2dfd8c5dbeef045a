"""Operators against ceilings: rates between sizes, shares by hand, and costs of real calls under a simulated clock."""

import pytest
import torch
from torch import nn

from vizoo.tools.profiling import roofline
from vizoo.tools.profiling.recording import OpCall
from vizoo.tools.profiling.roofline import Ceilings

CPU = torch.device("cpu")
LIMITS = Ceilings([100, 200, 400], [50.0, 20.0, 10.0], 1000.0, {"a": 1000.0, "b": 500.0})


@pytest.mark.parametrize(
    ("place", "rate"), [(1, 50), (100, 50), (150, 35), (200, 20), (300, 15), (400, 10), (9999, 10)]
)
def test_rates_between_sizes(place, rate):
    assert LIMITS.rate(place) == rate


def test_the_slower_of_both_is_the_ceiling():
    assert LIMITS.seconds(OpCall("mm", 5000, 100, 100, None)) == 5
    assert LIMITS.seconds(OpCall("mm", 5000, 100, 400, None)) == 10


def test_shares_are_of_all_calls_of_an_operator():
    """Of each call the median over the passes; ceilings 2 + 4 s of 3 + 9 s, and an operator that moves nothing."""
    first = [OpCall("mm", 2000, 10, 100, 3.0), OpCall("add", 0, 40, 400, 8.0), OpCall("mm", 4000, 10, 100, 9.0)]
    second = [c._replace(seconds=2 * c.seconds) for c in first]
    third = [c._replace(seconds=c.seconds / 2) for c in first]
    for calls in (first, second, third):
        calls.append(OpCall("ask", 0, 0, 0, 1.0))
    found = roofline._by_op([first, second, third], LIMITS)
    assert found == {"mm": (12.0, 0.5), "add": (8.0, 0.5), "ask": (1.0, None)}
    told = roofline._by_op([first, [*second, first[0]], third], LIMITS)  # passes that differ: sums
    assert told["add"] == (8.0, 0.5)
    assert told["mm"].seconds == 12.0


def test_an_operator_above_its_ceiling_is_told():
    ops = {"fast": roofline.OpTime(1.0, 1.06), "near": roofline.OpTime(1.0, 1.04), "minor": roofline.OpTime(0.001, 2.0)}
    copy, matmul = roofline._measurements(LIMITS, ops, 8, torch.bfloat16)
    assert matmul.quality == ["fast at 106% of its ceiling, which is too low"]
    assert (copy.median, copy.unit, copy.batch, copy.quality) == (10.0, "bytes/s", None, [])
    assert (matmul.median, matmul.unit, matmul.batch, matmul.details["dtype"]) == (1000.0, "FLOP/s", 8, "bfloat16")
    assert copy.details["by_size"] == {"100": 50.0, "200": 20.0, "400": 10.0}


def test_every_call_of_a_model_with_its_cost(monkeypatch):
    """A pass of 16 bit images by hand: FLOPs, bytes and seconds; nothing is left in the model or in PyTorch."""
    timed, flat = [], Ceilings([1, 10**9], [100.0, 100.0], 100.0, {"": 100.0})

    def one_second(fn, device):
        timed.append(device)
        return fn(), 1.0

    monkeypatch.setattr(roofline, "_timed", one_second)
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype: flat)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4, bias=False)).bfloat16().eval()
    x = torch.zeros(5, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = roofline.roofline(model, [x], 5, CPU, torch.bfloat16, 0.0).ops
    addmm = max((2 * 5 * 8 * 16 + 5 * 16) / 100, 2 * (5 * 8 + 8 * 16 + 16 + 5 * 16) / 100)
    mm = max(2 * 5 * 16 * 4 / 100, 2 * (5 * 16 + 16 * 4 + 5 * 4) / 100)
    assert found == {
        "aten::addmm": (1.0, pytest.approx(addmm)),
        "aten::relu_": (1.0, pytest.approx(2 * 2 * 5 * 16 / 100)),
        "aten::mm": (1.0, pytest.approx(mm)),
    }
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ceilings_are_the_best_of_kernels_and_of_larger_memory(monkeypatch):
    """A rate counts for all smaller memory too; products stop after a slow one; half precision takes the better."""
    monkeypatch.setattr(roofline, "SIZES", [100, 200, 400])
    monkeypatch.setattr(roofline, "_copies", lambda size, device: [(size, size), (2 * size, -size)])
    tried = []

    def products(device, dtype):
        for name, seconds in {"small": 0.1, "large": 0.6, "huge": 100.0}.items():
            tried.append(name)
            yield name, 60, seconds if dtype is torch.float32 else 4 * seconds

    copies = {100: 10.0, -100: 20.0, 200: 1.0, -200: 4.0, 400: 20.0, -400: 200.0}
    monkeypatch.setattr(roofline, "_products", products)
    monkeypatch.setattr(roofline, "best_seconds", lambda fn, device: copies.get(fn, fn))
    roofline._measured.cache_clear()
    try:
        found = roofline.ceilings(CPU, torch.float32)
        assert found == Ceilings([100, 200, 400], [200.0, 200.0, 20.0], 600.0, {"small": 600.0, "large": 100.0})
        assert tried == ["small", "large"]
        half = roofline.ceilings(CPU, torch.bfloat16)
        assert (half.product, half.tried) == (600.0, {"small": 150.0, "large": 25.0})
        roofline.ceilings(CPU, torch.bfloat16)
        assert tried == ["small", "large"] * 2  # once in a process
    finally:
        roofline._measured.cache_clear()


def test_kernels_of_the_ceilings_move_what_they_say():
    found = [(moved, fn()) for moved, fn in roofline._copies(4096, CPU)]
    assert [moved for moved, _ in found] == [4096, 8192, 4096]
    assert [t.numel() for _, t in found] == [512, 1024, 1]
    name, flops, product = next(roofline._products(CPU, torch.float32))
    assert (name, flops, product().shape) == ("256x256x256", 2 * 256**3, (256, 256))


def test_a_gpu_is_asked_by_events(card):
    gpu = card(0.0001, 0.010)
    out, seconds = roofline._timed(lambda: gpu.call() or "out", torch.device("cuda"))
    assert (out, seconds) == ("out", pytest.approx(0.010))
