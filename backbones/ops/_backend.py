"""Which fast paths this machine can use: the only place that probes for oneDNN, Triton, NATTEN and CUDA."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

_ONEDNN_OPS = ("_linear_pointwise", "_convolution_pointwise")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # operators define their kernels only if it is there
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # kernels run in Python, also on CPU tensors


class Backend(NamedTuple):
    """One fast path: its name, whether it can be used here, and why not."""

    name: str
    usable: bool
    reason: str


def backends() -> list[Backend]:
    """Every fast path with the reason when it cannot be used on this machine."""
    found = [Backend("torch", True, f"plain PyTorch {torch.__version__}, every device")]
    missing = onednn_missing()
    found.append(Backend("onednn", not missing, missing or "fused inference operators on CPU"))
    if not torch.cuda.is_available():
        no_gpu = "no CUDA device"
        found.append(Backend("cuda", False, no_gpu))
    else:
        no_gpu = ""
        found.append(Backend("cuda", True, torch.cuda.get_device_name()))
    for name in ("triton", "natten"):
        if importlib.util.find_spec(name) is None:
            found.append(Backend(name, False, "not installed"))
        else:
            found.append(Backend(name, not no_gpu, no_gpu or "installed"))
    return found


def onednn_missing() -> str:
    """Why the oneDNN inference path cannot be used; empty when it can."""
    if os.environ.get("VIZOO_ONEDNN", "1") == "0":
        return "switched off by VIZOO_ONEDNN=0"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch build has no oneDNN"
    lacking = [op for op in _ONEDNN_OPS if not hasattr(torch.ops.mkldnn, op)]
    return f"this PyTorch build lacks mkldnn::{lacking[0]}" if lacking else ""


_ONEDNN = not onednn_missing()


def use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a oneDNN inference operator may take this call.

    It takes real CPU tensors of one dtype (float32 or bfloat16), outside autograd, autocast, tracing, compilation and
    export, so that those always see plain PyTorch operators.

    Args:
        x: Input of any shape.
        weight: Weight of the layer.

    Returns:
        True if every condition holds.
    """
    return not torch.compiler.is_compiling() and _fits_onednn(x, weight) and type(x) is Tensor and x.numel() > 0


def use_compiled_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.compile``, but not export, may leave this call to an operator of ours that runs oneDNN inside.

    Args:
        x: Input of any shape.
        weight: Weight of the layer.

    Returns:
        True if every condition of :func:`use_onednn` holds but that on compilation.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and _fits_onednn(x, weight)


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def use_triton(backend: str, x: Tensor, unsupported: str = "") -> bool:
    """Whether a Triton kernel takes this call.

    Args:
        backend: ``"auto"`` takes it for CUDA tensors outside export, ``"triton"`` insists, ``"torch"`` refuses.
        x: An input of the operator, on the device where it runs.
        unsupported: What the kernel cannot do with these inputs; empty when it can take them.

    Returns:
        True for the kernel, False for plain PyTorch.

    Raises:
        ValueError: If ``backend`` is unknown, or insists where no kernel can run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"got backend={backend!r}, need 'auto', 'torch' or 'triton'")
    if backend == "torch":
        return False
    if not HAS_TRITON:
        unsupported = unsupported or "the package triton is not installed"
    elif x.device.type not in ("cuda", "meta") and not INTERPRETED:
        unsupported = unsupported or f"the tensors are on {x.device.type}, not on a CUDA device"
    if backend == "triton":
        if unsupported:
            raise ValueError(f"got backend='triton', but {unsupported}; use 'auto' or 'torch'")
        return True
    return not unsupported and x.device.type == "cuda" and not torch.compiler.is_exporting()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context that launches kernels on the device of ``x``."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which products on the device of ``x`` keep the dtypes that the operator chose."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
