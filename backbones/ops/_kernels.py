"""What the Triton kernels of all operators share: sizes, index and product types, and how vectors are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON

SHARED_BYTES = 99 << 10  # of a program: what GPUs of compute capability 8.6 and 8.9 allow; those of 9.0 have 227 KiB


def cdiv(n: int, d: int) -> int:
    """``n / d``, rounded up; Triton's own of these two helpers cost the host 6 us a call."""
    return -(-n // d)


def power_of_two(n: int, least: int = 16) -> int:
    """Smallest power of two that is at least ``n`` and ``least``: by default the least side of a product of tiles."""
    return max(least, 1 << max(0, n - 1).bit_length())


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


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout of the maps that a kernel makes of ``x``: channels-last if channels lie side by side, also in a part."""
    return torch.channels_last if x.stride(1) == 1 and x.stride(3) > 1 else torch.contiguous_format


def empty_map(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty map without gaps in the shape and memory format of ``x``."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))


def dense_map(x: Tensor) -> Tensor:
    """``x`` without gaps, in its memory format."""
    return x.contiguous(memory_format=memory_format(x))


def tokens_first(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty ``[B, h, N, d]`` in the memory order ``[B, N, h, d]``, which the next linear layer takes as it is."""
    B, h, N, D = like.shape
    return torch.empty((B, N, h, D), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def in_order(t: Tensor) -> Tensor:
    """``[B, h, N, d]`` in the memory order of :func:`tokens_first`."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, h, N, d]`` as kernels take them: equal strides, channels next to each other."""
    strides = {t.stride() for t in tensors}
    return tensors if len(strides) == 1 and tensors[0].stride(3) == 1 else tuple(in_order(t) for t in tensors)


if HAS_TRITON:
    import triton
    import triton.language as tl

    LOG2E = tl.constexpr(1.4426950408889634)

    def index_type(*tensors: Tensor) -> Any:
        """Type of offsets inside one image: 32 bits, and 64 only where an image of one of the tensors needs it."""
        spans = (sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
        return tl.int64 if max(spans) >= 2**31 - 2**16 else tl.int32

    @triton.jit
    def load_gradient_scale(ptr, dtype: tl.constexpr):
        """What :func:`gradient_scale` gave, where gradients of logits are products' inputs in ``dtype``."""
        return tl.load(ptr) if dtype == tl.float16 else 1.0

    @triton.jit
    def inner_products(a, b, PRECISION: tl.constexpr):
        """Of the vectors of two tiles: ``[len(a), len(b)]``."""
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)

    @triton.jit
    def resident_products(a, b, PRECISION: tl.constexpr):
        """The same in loops over ``b``: the compiler keeps all of a first factor in registers, too many in float32."""
        if PRECISION == "ieee" and a.dtype == tl.float32:
            return tl.trans(inner_products(b, a, PRECISION))
        else:
            return inner_products(a, b, PRECISION)

    @triton.jit
    def load_vectors(ptr, offset, mask, C: tl.constexpr, CP: tl.constexpr):
        """Vectors of ``C`` channels at the offsets ``[n]``: ``[n, CP]``, zero past ``C`` and where masked."""
        c = tl.arange(0, CP)
        p = ptr + (offset[:, None] + c[None, :])
        if mask is None:
            return tl.load(p) if C == CP else tl.load(p, mask=(c < C)[None, :], other=0.0)
        else:
            return tl.load(p, mask=mask[:, None] if C == CP else mask[:, None] & (c < C)[None, :], other=0.0)

    @triton.jit
    def store_vectors(ptr, offset, value, mask, C: tl.constexpr, CP: tl.constexpr):
        """Store ``[n, CP]`` at the offsets ``[n]``, in the dtype of the memory."""
        c = tl.arange(0, CP)
        p, value = ptr + (offset[:, None] + c[None, :]), value.to(ptr.dtype.element_ty)
        if C == CP:
            tl.store(p, value, mask=mask[:, None])
        else:
            tl.store(p, value, mask=mask[:, None] & (c < C)[None, :])
