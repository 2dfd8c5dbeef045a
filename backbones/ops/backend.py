"""Which fast paths this machine and a call can use: the only place that probes for oneDNN, Triton, NATTEN and CUDA."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ONEDNN_OPS = ("_linear_pointwise", "_convolution_pointwise")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # operators define their kernels only if it is there
_NATTEN = (0, 21, 7)  # the first release whose CUTLASS backward pass gives no NaN on partial tiles
_whole = False  # see whole_operators
_kernel_devices: tuple[str, ...] = ("cuda",)  # see kernels_on
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
    missing = no_gpu if HAS_TRITON else "not installed"
    found.append(Backend("triton", not missing, missing or "installed"))
    missing = natten_missing()
    found.append(Backend("natten", not missing, missing or "installed"))
    return found


def onednn_missing() -> str:
    """Why the oneDNN inference path cannot be used; empty when it can."""
    if os.environ.get("VIZOO_ONEDNN", "1") == "0":
        return "switched off by VIZOO_ONEDNN=0"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch build has no oneDNN"
    lacking = [op for op in _ONEDNN_OPS if not hasattr(torch.ops.mkldnn, op)]
    return f"this PyTorch build lacks mkldnn::{lacking[0]}" if lacking else ""


def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes in which the processor can run oneDNN's inference operators; bfloat16 needs AVX-512 or the like."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (torch.float32, torch.bfloat16) if asked is not None and asked() else (torch.float32,)


def has_avx512() -> bool:
    """Whether the processor has AVX-512, for which oneDNN has kernels of its own."""
    return _WIDE


def fuses_gelu(x: Tensor) -> bool:
    """Whether oneDNN computes GELU faster while it writes a product than PyTorch does on the written product.

    It has a short approximation for AVX-512 alone.  With AVX2 a linear layer with GELU was measured 4 to 16 % slower
    than one after the other.  In bfloat16 the second call would convert twice.
    """
    return x.dtype != torch.float32 or has_avx512()


_WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()
_ONEDNN = not onednn_missing()
_ONEDNN_DTYPES = onednn_dtypes() if _ONEDNN else ()


def is_transforming() -> bool:
    """Whether ``torch.func`` (``grad``, ``vmap``, ``jvp``, ...) or forward-mode differentiation is at work."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def plain_only() -> bool:
    """Whether this call must consist of PyTorch's own operators, on one branch whatever the inputs are.

    True in export and ``torch.jit.trace``, whose programs must run without this package, and under transforms, for
    which operators of ours have no rules and those of oneDNN drop tangents.
    """
    tracing = torch.jit.is_tracing() and not _whole
    return torch.compiler.is_exporting() or tracing or is_transforming()


@contextlib.contextmanager
def whole_operators() -> Iterator[None]:
    """Context in which ``torch.jit.trace`` sees our operators as one each, for counters that price them by name."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


@contextlib.contextmanager
def kernels_on(device: str) -> Iterator[None]:
    """Context in which ``"auto"`` takes Triton kernels on this type of device too, to compile without a GPU."""
    global _kernel_devices
    before, _kernel_devices = _kernel_devices, (*_kernel_devices, device)
    try:
        yield
    finally:
        _kernel_devices = before


def on_kernel_device(x: Tensor) -> bool:
    """Whether ``"auto"`` takes kernels on the device of a tensor."""
    return x.device.type in _kernel_devices


def use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a oneDNN inference operator may take this call.

    It takes real CPU tensors of one dtype (float32, and bfloat16 where the processor can), outside autograd, autocast,
    tracing, compilation, export and transforms, so that those always see plain PyTorch operators.

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


def trains_by_onednn(x: Tensor) -> bool:
    """Whether an operator of ours that hands PyTorch's convolutions of oneDNN other shapes may take this call.

    Unlike :func:`use_onednn` it may while a gradient is recorded, and while a program is compiled.

    Args:
        x: Input of any shape.

    Returns:
        True for float32 CPU tensors, outside autocast, tracing, export and transforms.
    """
    return (
        _ONEDNN
        and x.device.type == "cpu"
        and not on_kernel_device(x)
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not plain_only()
    )


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.jit.is_tracing()
        and not is_transforming()
        and x.dtype == weight.dtype
        and type(weight) in (Tensor, torch.nn.Parameter)  # neither quantised nor sharded
        and x.dtype in _ONEDNN_DTYPES
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def multiplies(x: Tensor) -> bool:
    """Whether the processor itself multiplies matrices of the dtype of a tensor, which is on a CPU."""
    return x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES


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
    return choose_backend(backend, x, {"triton": unsupported}) == "triton"


def choose_backend(backend: str, x: Tensor, unsupported: dict[str, str]) -> str:
    """Which library's kernels take this call.

    Args:
        backend: ``"auto"`` takes the first library that can run, for CUDA tensors outside export, tracing and
            transforms; ``"torch"`` takes none; the name of a library insists on it.
        x: An input of the operator, on the device where it runs.
        unsupported: For each library that has a kernel, ``"triton"`` or ``"natten"``, in order of preference, what the
            kernel cannot do with these inputs; empty when it can take them.

    Returns:
        ``"torch"`` or the name of a library.

    Raises:
        ValueError: If ``backend`` is unknown, or insists where no kernel can run.
    """
    if backend not in ("auto", "torch", *unsupported):
        names = ["'auto'", "'torch'", *(f"'{name}'" for name in sorted(unsupported, reverse=True))]
        raise ValueError(f"got backend={backend!r}, need {', '.join(names[:-1])} or {names[-1]}")
    if backend in unsupported:
        reason = unsupported[backend] or _missing(backend, x)
        if reason:
            raise ValueError(f"got backend={backend!r}, but {reason}; use 'auto' or 'torch'")
        return backend
    if backend == "torch" or not on_kernel_device(x) or plain_only():
        return "torch"
    return next((name for name, limit in unsupported.items() if not (limit or _missing(name, x))), "torch")


def _missing(name: str, x: Tensor) -> str:
    """Why a library's kernels cannot take tensors like ``x``; empty when they can."""
    interpreted = name == "triton" and (INTERPRETED or x.device.type == "meta")
    if name == "triton" and not HAS_TRITON:
        return "the package triton is not installed"
    if name == "natten" and x.device.type == "cpu":
        return f"NATTEN cannot be used: {_natten_absent()}" if _natten_absent() else ""
    if x.device.type != "cuda" and not interpreted:
        return f"the tensors are on {x.device.type}, not on a CUDA device"
    return f"NATTEN cannot be used: {natten_missing()}" if name == "natten" and natten_missing() else ""


@torch.compiler.assume_constant_result
@functools.cache
def natten_missing() -> str:
    """Why NATTEN's CUDA kernels cannot be used; empty when they can.  Imports it only where they may be usable."""
    if absent := _natten_absent():
        return absent
    spec = importlib.util.find_spec("natten")
    places = spec.submodule_search_locations if spec else None
    library = importlib.machinery.PathFinder.find_spec("natten.libnatten", places)
    if library is None:
        return "installed without its CUDA library (natten.HAS_LIBNATTEN is False)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if load_natten().HAS_LIBNATTEN else "its CUDA library does not load (natten.HAS_LIBNATTEN is False)"


@torch.compiler.assume_constant_result
@functools.cache
def _natten_absent() -> str:
    """Why NATTEN cannot be used at all, not even without its CUDA library; empty when it can."""
    if importlib.util.find_spec("natten") is None:
        return "not installed"
    version = importlib.metadata.version("natten")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _NATTEN:
        return f"version {version}, need {'.'.join(map(str, _NATTEN))} or later"
    return ""


def load_natten() -> Any:
    """The package ``natten``, imported when it is first needed."""
    import natten

    return natten


class KernelModule:
    """A file of kernels of this folder, imported when one of its names is first used: Triton reads each one's source.

    Args:
        name: Of the file.
    """

    def __init__(self, name: str) -> None:
        self._name = f"{__package__}.{name}"

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context that launches kernels on the device of ``x``."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of the inputs of products on the device of ``x``; None where it is off."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which products on the device of ``x`` keep the dtypes that the operator chose."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
