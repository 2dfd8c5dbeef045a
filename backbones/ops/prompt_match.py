"""Which prompts a token takes: those whose keys are nearest to it by cosine (TCPA), in one pass over the tokens.

Prefix tokens choose among the class prompts, patch tokens among the image prompts.  ``TCPA.nearest`` has the same in
PyTorch's own operators, with gradients: a dozen passes over tokens or cosines for each pool.  The Triton kernel is
for inference, where the matching loss has no gradient.  Of equal cosines it takes the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import KernelModule, plain_only, use_triton
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_prompt_match_kernels")
MAX_POOL = 64  # prompts of a pool: a token's cosines stay in registers


class Pool(NamedTuple):
    """Prompts of one kind: their keys ``[n, D]``, how many of them each token takes, and positions of each."""

    keys: Tensor
    topk: int
    length: int


@operator
def _prompt_match(
    x: Tensor, prefix: int, cls_keys: Tensor, cls_topk: int, cls_length: int, keys: Tensor, topk: int, length: int
) -> tuple[Tensor, Tensor]:
    return kernels.kernel_forward(x, prefix, cls_keys, cls_topk, cls_length, keys, topk, length)


@torch.library.register_fake("vizoo::prompt_match")
def _(x, prefix, cls_keys, cls_topk, cls_length, keys, topk, length):
    prompts = cls_keys.shape[0] * cls_length + keys.shape[0] * length
    return x.new_empty(*x.shape[:2], prompts, dtype=torch.bool), x.new_empty((), dtype=torch.float32)


@register_cost("vizoo::prompt_match", torch.ops.vizoo.prompt_match)
def _(x, prefix, cls_keys, cls_topk, cls_length, keys, topk, length, out=None) -> Cost:
    B, N, D = x
    cosines = B * (prefix * cls_keys[0] + (N - prefix) * keys[0])
    return Cost(macs=cosines * D, other=2 * B * N * D, acts=cosines)


def kernel_takes(x: Tensor, prefix: int, pools: Sequence[Pool]) -> bool:
    """Whether :func:`prompt_match` takes this call: on a GPU, where nothing needs a gradient."""
    keys, limit = [pool.keys for pool in pools], ""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *keys)):
        limit = "the kernel has no gradients"
    elif x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or any(t.dtype != x.dtype for t in keys):
        limit = "the kernel takes tokens and keys that are all float32, all float16 or all bfloat16"
    elif max(t.shape[0] for t in keys) > MAX_POOL:
        limit = f"the kernel takes up to {MAX_POOL} prompts of a kind"
    return use_triton("auto", x, limit) and not plain_only() and x.shape[0] > 0 and x.shape[1] > prefix


def prompt_match(x: Tensor, prefix: int, pools: Sequence[Pool]) -> tuple[Tensor, Tensor]:
    """The prompts whose keys are nearest to each token by cosine.

    Args:
        x: Tokens ``[B, N, D]``.
        prefix: Tokens that choose among the class prompts, the first.
        pools: Class prompts, where there is a prefix, and image prompts.

    Returns:
        ``[B, N, P]``, True where a token takes a position of a prompt, class prompts first; and the sum over the pools
        of the mean of ``1 - cosine`` over the chosen.
    """
    image = pools[-1]
    cls = pools[0] if prefix else Pool(image.keys[:0], 0, 0)
    return _prompt_match(x, prefix, *cls, *image)
