"""The tests' own tools: the golden numbers are frozen, and tolerances and poisoned memory catch what they should."""

from __future__ import annotations

import sys
from types import ModuleType

import golden
import pytest
import torch
from tolerance import BUDGETS, close, golden_close, op_close

KEYS = {
    "a.weight": [[2, 3], "torch.float32"],
    "n.weight": [[2], "torch.float32"],
    "n.bias": [[2], "torch.float32"],
    "n.running_var": [[2], "torch.float32"],
    "n.running_mean": [[2], "torch.float32"],
    "n.num_batches_tracked": [[], "torch.int64"],
    "gamma": [[2], "torch.float32"],
}
VALUES = {
    "a.weight": [[-0.0332536, -0.0110112, -0.2750872], [-0.152635, -0.1280119, -0.5022296]],
    "n.weight": [1.1297777, 1.0826743],
    "n.bias": [-0.0874872, -0.0448602],
    "n.running_var": [1.7782905, 2.0075164],
    "n.running_mean": [-0.0783544, -0.0862649],
    "n.num_batches_tracked": 0,
    "gamma": [-0.0552632, 0.0316162],
}


def test_golden_weights_are_frozen() -> None:
    """A change of one number would make every recorded output worthless."""
    state = golden.weights(KEYS)
    assert list(state) == list(KEYS)
    for name, value in state.items():
        assert str(value.dtype) == KEYS[name][1]
        torch.testing.assert_close(value, torch.tensor(VALUES[name]).to(value.dtype), rtol=0, atol=1e-7)
    first = torch.tensor([1.764052391052246, 0.40015721321105957, 0.978738009929657])
    close(golden.image((1, 1, 1, 3)).flatten(), first, "same")


@pytest.mark.parametrize("name", golden.names())
def test_golden_case_is_readable(name: str) -> None:
    case = golden.load(name)
    assert case.meta
    assert case.outputs
    assert all(torch.isfinite(t).all() for t in case.outputs.values())


@pytest.mark.parametrize("budget", sorted(BUDGETS))
def test_budgets_bite(budget: str) -> None:
    x = torch.ones(100)
    close(x, x.clone(), budget)
    for wrong in (x * 1.01, x.where(torch.arange(100) > 0, float("nan")), x[:1], x.double()):
        with pytest.raises(AssertionError):
            close(wrong, x, budget)


def test_golden_tolerance_bites() -> None:
    x = torch.randn(100)
    golden_close(x * (1 + 1e-6), x)
    for wrong in (x * (1 + 1e-4), x * float("nan"), x[:50]):
        with pytest.raises(AssertionError):
            golden_close(wrong, x)


def test_op_tolerance_bites() -> None:
    """The ratio follows the dtype and doubles for gradients; one bad element is caught by the second condition."""
    truth = torch.randn(1000, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        op_close(truth.to(dtype), truth, plain=truth.to(dtype))
    off = (truth * (1 + 7e-6)).float()
    op_close(off, truth, grad=True)
    for wrong in (off, off * float("nan")):
        with pytest.raises(AssertionError, match="RMS"):
            op_close(wrong, truth)
    spike = truth.float()
    spike[0] += 1e-4
    op_close(spike, truth)
    with pytest.raises(AssertionError, match="largest"):
        op_close(spike, truth, plain=truth.float())
    with pytest.raises(AssertionError, match="float64"):
        op_close(truth.float(), truth.float())


def test_memory_is_poisoned(nan_empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty*`` gives NaN to vizoo; integers cannot show it."""
    ours = ModuleType("vizoo.sample")
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    exec(
        "import torch\n"
        "def make(x): return (torch.empty(3), torch.empty_like(x), torch.empty_strided((2,), (1,)), x.new_empty(4),"
        " torch.empty(2, dtype=torch.int32))",
        ours.__dict__,
    )
    *floats, integers = ours.make(torch.zeros(2))
    assert all(t.isnan().all() for t in floats)
    assert integers.dtype == torch.int32
