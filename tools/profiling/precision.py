"""How products of float32 are done: in full precision, or in TensorFloat-32.

PyTorch keeps this twice.  The settings of ``torch.backends.*.fp32_precision`` form a tree: a backend follows all
backends, and an operator its backend, where they say nothing themselves.  ``allow_tf32`` and
``torch.set_float32_matmul_precision`` set some of its leaves and remember that they did, and refuse to answer once the
tree says something else.  Public attributes tell what results and not who said it, so what is read here is found by
trying the settings above.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

BACKENDS, OPERATORS = ("cuda", "mkldnn"), ("matmul", "conv", "rnn")
get_precision = torch._C._get_fp32_precision_getter
set_precision = torch._C._set_fp32_precision_setter


def float32_precision(device: torch.device) -> str:
    """What products of float32 on a device are done in now.

    Args:
        device: CPU or CUDA.

    Returns:
        ``ieee``, ``tf32``, ``bf16``, or ``none`` for PyTorch's default, which is full precision; by operator where
        they differ.
    """
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    found = {op: get_precision(backend, op) for op in OPERATORS}
    return found["conv"] if len(set(found.values())) == 1 else ", ".join(f"{op} {p}" for op, p in found.items())


class _Settings(NamedTuple):
    """All that PyTorch keeps about it.

    Attributes:
        said: What each backend and operator says itself, ``none`` where it follows the one above.  None is PyTorch's
            own default for cuDNN, TF32 unless one above says something, which nobody can set again.
        matmul: What ``torch.set_float32_matmul_precision`` was told.
        cudnn: What ``torch.backends.cudnn.allow_tf32`` was told; None where telling it would lose a default.
    """

    said: dict[tuple[str, str], str | None]
    matmul: str
    cudnn: bool | None

    @classmethod
    def read(cls) -> _Settings:
        """The settings now."""
        said: dict[tuple[str, str], str | None] = {("generic", "all"): get_precision("generic", "all")}
        set_precision("generic", "all", "none")
        for backend in BACKENDS:
            said[backend, "all"] = get_precision(backend, "all")
            said.update({(backend, op): _said(backend, op) for op in OPERATORS})
        told = cls(said, "", None)._told()
        told.restore()
        return told

    def _told(self) -> _Settings:
        """With what the older functions were told, which only answer while the tree does not contradict them."""
        for backend in BACKENDS:
            set_precision(backend, "matmul", "ieee")
        matmul, cudnn = torch._C._get_float32_matmul_precision(), None
        convolutions = [("cuda", "conv"), ("cuda", "rnn")]
        if all(self.said[key] is not None for key in convolutions):
            for key in convolutions:
                set_precision(*key, "tf32")
            try:
                cudnn = torch._C._get_cudnn_allow_tf32()
            except RuntimeError:
                cudnn = False
        return self._replace(matmul=matmul, cudnn=cudnn)

    def restore(self) -> None:
        """Set everything as it was read."""
        torch._C._set_float32_matmul_precision(self.matmul)
        if self.cudnn is not None:
            torch._C._set_cudnn_allow_tf32(self.cudnn)
        for key, precision in self.said.items():
            if precision is not None:
                set_precision(*key, precision)

    def enforce(self, precision: str) -> None:
        """Let every backend and operator use one precision, ``ieee`` or ``tf32``."""
        matmul = "high" if precision == "tf32" else "highest"
        cudnn = None if self.cudnn is None else precision == "tf32"
        said = {key: precision if own is not None else None for key, own in self.said.items()}
        _Settings(said, matmul, cudnn).restore()


def _said(backend: str, op: str) -> str | None:
    """What an operator says itself, while all backends together say nothing; as in ``_Settings.said``."""
    before, found = get_precision(backend, "all"), []
    for above in ("none", "ieee", "tf32"):
        set_precision(backend, "all", above)
        found.append(get_precision(backend, op))
    set_precision(backend, "all", before)
    own: str = found[0]
    return own if len(set(found)) == 1 or own == "none" else None


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 are in TensorFloat-32, or in full precision, whatever the process says elsewhere.

    That holds for products of matrices, convolutions and recurrent layers by cuBLAS, cuDNN and oneDNN.  Afterwards
    every setting says again what it said.

    Args:
        tf32: Whether they may be in TensorFloat-32.
    """
    with _silent():
        before = _Settings.read()
        before.enforce("tf32" if tf32 else "ieee")
    try:
        yield
    finally:
        with _silent():
            before.restore()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the advice of some releases to leave the older functions, which would also stop half-way as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
