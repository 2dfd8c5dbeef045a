"""What the Triton kernels of all operators share: sizes, index and product types, and how vectors are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backend import HAS_TRITON

SHARED_BYTES = 99 << 10  # of a program: what GPUs of compute capability 8.6 and 8.9 allow; those of 9.0 have 227 KiB


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n`` and 16, the least side of a product of tiles."""
    return max(16, 1 << (n - 1).bit_length())


def product_precision(device: torch.device) -> str:
    """How products of float32 tiles are to be done, by PyTorch's setting for matrix products on a GPU.

    ``torch.backends.cuda.matmul.fp32_precision``, which ``torch.set_float32_matmul_precision`` sets too, says
    ``"ieee"`` or ``"tf32"``.  Where nothing is set, products are done in three parts in TF32 (``"tf32x3"``), with
    errors near those of float32, as in PyTorch's own memory-efficient attention.  Half precision is not affected.
    """
    if torch.version.hip or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)):
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    return {"ieee": "ieee", "tf32": "tf32"}.get(setting, "tf32x3")


def all_registers(warps: int) -> dict[str, int]:
    """Option of a launch that lets a thread have as many registers as it can, as ptxas spills to hold more programs."""
    return {} if torch.version.hip else {"maxnreg": min(255, 65536 // (32 * warps))}


def gradient_scale(dout: Tensor) -> Tensor:
    """Power of two by which float16 gradients of logits are multiplied before their products: ``[1]`` float32.

    It brings the largest entry of the output's gradient near 1, so that small ones do not vanish in the range of
    float16.  Other dtypes have that of float32, so their kernels read nothing: empty.
    """
    if dout.dtype != torch.float16 or dout.numel() == 0:
        return torch.empty(0, dtype=torch.float32, device=dout.device)
    exponent = torch.frexp(dout.abs().amax().float()).exponent  # 0 for 0, infinity and NaN
    return torch.ldexp(torch.ones(1, dtype=torch.float32, device=dout.device), -exponent)


if HAS_TRITON:
    import triton
    import triton.language as tl

    LOG2E = tl.constexpr(1.4426950408889634)

    def index_type(*tensors: Tensor) -> Any:
        """Type of offsets inside one image: 32 bits, and 64 only where an image of one of the tensors needs it."""
        spans = (sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
        return tl.int64 if max(spans) >= 2**31 - 2**16 else tl.int32

    @triton.jit
    def gradient_factors(grow_ptr, dtype: tl.constexpr):
        """Factor of gradients of logits before their products, and its inverse: 1 but in float16."""
        if dtype == tl.float16:
            grow = tl.load(grow_ptr)
            return grow, 1 / grow
        return 1.0, 1.0

    @triton.jit
    def load_vectors(ptr, offset, mask, C: tl.constexpr, CP: tl.constexpr):
        """Vectors of ``C`` channels at the offsets ``[n]``: ``[n, CP]``, zero where masked and past ``C``."""
        c = tl.arange(0, CP)
        if C == CP:
            return tl.load(ptr + (offset[:, None] + c[None, :]), mask=mask[:, None], other=0.0)
        return tl.load(ptr + (offset[:, None] + c[None, :]), mask=mask[:, None] & (c < C)[None, :], other=0.0)

    @triton.jit
    def store_vectors(ptr, offset, value, mask, C: tl.constexpr, CP: tl.constexpr):
        """Store ``[n, CP]`` at the offsets ``[n]``, in the dtype of the memory."""
        c = tl.arange(0, CP)
        p, value = ptr + (offset[:, None] + c[None, :]), value.to(ptr.dtype.element_ty)
        if C == CP:
            tl.store(p, value, mask=mask[:, None])
        else:
            tl.store(p, value, mask=mask[:, None] & (c < C)[None, :])
