"""Every tolerance of the test suite.  Call sites name a budget; none of them can pass its own number.

* ``op_close``: an operator against its float64 reference, by dtype and with a factor for gradients;
* ``golden_close``: a model against recorded outputs of the official code;
* ``close``: two ways of running the same model, by the name of the second way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from golden import error, image
from torch import Tensor

RATIO = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # RMS error / RMS
GRADIENT = 2.0  # gradients may have this multiple of the ratio
WORST, FLOOR = 2.0, 1e-5  # largest error: WORST * (that of plain torch in the same dtype) + FLOOR
GOLDEN = 1e-5  # ||error|| / ||official output||, float32; float32 itself is off by 2e-7 to 7e-7
GOLDEN_FLOAT64 = 1e-6  # the same where both sides ran in float64; the record is rounded to float32


class Budget(NamedTuple):
    """Element-wise bound ``|actual - expected| <= atol + rtol * |expected|``."""

    rtol: float
    atol: float


BUDGETS = {
    "same": Budget(0.0, 0.0),  # the same kernels on the same numbers
    "rerun": Budget(1e-4, 1e-5),  # the same arithmetic in another order: checkpointing, another batch size
    "graph": Budget(1e-4, 1e-4),  # traced, scripted or exported program
    "gradient": Budget(1e-3, 1e-5),  # gradients of two such runs
    "layout": Budget(1e-3, 1e-4),  # other kernels: channels_last, compiled
    "runtime": Budget(1e-3, 1e-3),  # another library: ONNX Runtime
}


def close(actual: Tensor, expected: Tensor, budget: str, what: str = "") -> None:
    """Assert that two runs of a model agree within a named budget.

    Args:
        actual: Tensor under test.
        expected: Tensor of the plain run.
        budget: Key of ``BUDGETS``.
        what: Prefix of the failure message.
    """
    rtol, atol = BUDGETS[budget]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what} [{budget}] {text}")


def golden_close(actual: Tensor, expected: Tensor, what: str = "", float64: bool = False) -> None:
    """Assert that a model reproduces a recorded official output; ``float64`` says that both sides ran in it."""
    assert actual.shape == expected.shape, f"{what}: got {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    found, allowed = error(actual, expected), GOLDEN_FLOAT64 if float64 else GOLDEN
    assert found <= allowed, f"{what}: relative error {found:.2e} > {allowed:.0e}"  # also false for NaN


def golden_gradients(out: Tensor, leaves: dict[str, Tensor], outputs: dict[str, Tensor], seed: int) -> None:
    """Assert that recorded gradients of named leaves are reproduced.

    Args:
        out: Output of a pass that read the leaves.
        leaves: Name -> tensor; the record of ``a.b`` is ``outputs["grad_a_b"]``.
        outputs: Those of the case.
        seed: The gradient of ``out`` is the image of this seed.
    """
    found = torch.autograd.grad(out, list(leaves.values()), image(tuple(out.shape), seed).to(out))
    for name, gradient in zip(leaves, found, strict=True):
        golden_close(gradient.cpu(), outputs[f"grad_{name.replace('.', '_')}"], f"gradient of {name}")


def rms_ratio(actual: Tensor, truth: Tensor) -> float:
    """RMS of the error over RMS of the float64 truth."""
    off = (actual.double() - truth).square().mean().sqrt()
    return (off / truth.square().mean().sqrt().clamp_min(1e-12)).item()


def op_close(actual: Tensor, truth: Tensor, plain: Tensor | None = None, grad: bool = False, what: str = "") -> None:
    """Assert that an operator's output or gradient is as accurate as its dtype allows.

    Both conditions must hold: the RMS ratio of ``RATIO`` for ``actual.dtype``, and a largest error within twice that
    of plain torch in the same dtype.

    Args:
        actual: Output or gradient under test; its dtype picks the ratio.
        truth: The float64 reference.
        plain: The reference run by torch in ``actual.dtype``; None leaves the second condition out.
        grad: Whether this is a gradient.
        what: Prefix of the failure message.
    """
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64, got {truth.dtype}"
    assert actual.shape == truth.shape, f"{what}: got {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    allowed = RATIO[actual.dtype] * (GRADIENT if grad else 1.0)
    ratio = rms_ratio(actual, truth)
    assert ratio <= allowed, f"{what}: RMS ratio {ratio:.2e} > {allowed:.0e} in {actual.dtype}"
    if plain is not None:
        assert plain.dtype == actual.dtype, f"{what}: plain torch ran in {plain.dtype}, the op in {actual.dtype}"
        worst = (actual.double() - truth).abs().max().item()
        limit = WORST * (plain.double() - truth).abs().max().item() + FLOOR
        assert worst <= limit, f"{what}: largest error {worst:.2e} > {limit:.2e}"
