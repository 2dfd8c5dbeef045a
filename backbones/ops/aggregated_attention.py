"""Aggregated attention: every query attends to its ``K x K`` window and to pooled keys (TransNeXt, arXiv 2311.17132).

With ``unit(t) = t / |t|`` over the channels of a head, ``qn = unit(q)``, and ``L[n]`` the logarithm of the number of
keys that query ``n`` sees, those of its window on the map and all ``P`` pooled ones (Sec. 3.1 to 3.3):

    qs[n]  = (qn[n] + query_embedding) * softplus(temperature) * L[n]
    a[n]   = softmax over all of qs[n] . unit(k[n + tap]) + local_bias[tap]
             and qs[n] . unit(pooled_k[p]) + pool_bias[n, p]
    out[n] = sum over taps of (a[n, tap] + qn[n] . tokens[tap] + token_bias[tap]) * v[n + tap]
             + sum over p of a[n, p] * pooled_v[p]

A window stays where it is at the border: taps outside the map have no part in the softmax, and their value is zero.
The weights from ``tokens`` are outside the softmax.  With ``N`` queries the operator costs, per head and channel,
``N (K^2 + P)`` multiply-accumulates for the logits, ``N K^2`` for the weights from tokens, and ``N (K^2 + P)`` for the
sum of values.

The reference gathers the windows of all queries.  The fast form lays the rows of the map behind each other with
``K // 2`` zeros between them, channels first, so that each tap is the whole map at one shift: its logits are a product
and a sum of whole maps, and nothing is copied ``K^2`` times.  It works on some rows at a time, whose logits stay in the
cache, and its backward pass makes them again.  The Triton kernels of neighbourhood attention do the softmax, with
logits in float32, for they reach 34 and more; those of this operator make the vectors for it, in one pass over ``q``
and ``kv``, and do the sum with the weights from tokens.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import neighborhood  # noqa: F401 - its operators are in BODIES
from ._derivative import plain_gradients
from .backend import KernelModule, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import BODIES, operator

kernels = KernelModule("_aggregated_attention_kernels")
MAX_CHANNELS = 128  # of a head, for the Triton kernels
_EPS = 1e-12  # least length of a vector that becomes a unit vector, as in torch.nn.functional.normalize
_WORKSPACE = 4 << 20  # bytes of logits at once on a CPU, so that they stay in the cache


def _check(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    num_heads: int,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
) -> None:
    h = num_heads
    if q.dim() != 4:
        raise ValueError(f"got q of shape {list(q.shape)}, need [B, H, W, h * d]")
    B, H, W, C = q.shape
    if h < 1 or C % h != 0:
        raise ValueError(f"got num_heads={h}, need a divisor of the {C} channels of q")
    if list(kv.shape) != [B, H, W, 2 * C]:
        raise ValueError(f"got kv of shape {list(kv.shape)}, need {[B, H, W, 2 * C]}, twice the channels of q")
    if pooled_kv.dim() != 3 or pooled_kv.shape[0] != B or pooled_kv.shape[1] < 1 or pooled_kv.shape[2] != 2 * C:
        raise ValueError(f"got pooled_kv of shape {list(pooled_kv.shape)}, need [{B}, P, {2 * C}] with P of at least 1")
    if kv.dtype != q.dtype or pooled_kv.dtype != q.dtype:
        raise ValueError(f"got q, kv and pooled_kv in {q.dtype}, {kv.dtype} and {pooled_kv.dtype}, need one dtype")
    if local_bias.dim() != 2 or local_bias.shape[0] != h or not _is_odd_square(local_bias):
        raise ValueError(f"got local_bias of shape {list(local_bias.shape)}, need [{h}, K * K] with an odd K")
    d, P, taps = C // h, pooled_kv.shape[1], local_bias.shape[1]
    if list(query_embedding.shape) != [h, 1, d]:
        raise ValueError(f"got query_embedding of shape {list(query_embedding.shape)}, need {[h, 1, d]} ([h, 1, d])")
    if list(temperature.shape) != [h, 1, 1]:
        raise ValueError(f"got temperature of shape {list(temperature.shape)}, need {[h, 1, 1]} ([h, 1, 1])")
    if list(pool_bias.shape) != [h, H * W, P]:
        raise ValueError(f"got pool_bias of shape {list(pool_bias.shape)}, need {[h, H * W, P]} ([h, H * W, P])")
    if list(tokens.shape) != [h, d, taps]:
        raise ValueError(f"got tokens of shape {list(tokens.shape)}, need {[h, d, taps]} ([h, d, K * K])")
    if list(token_bias.shape) != [h, 1, taps]:
        raise ValueError(f"got token_bias of shape {list(token_bias.shape)}, need {[h, 1, taps]} ([h, 1, K * K])")


def _window(local_bias: Tensor) -> int:
    """Side of the window, if the number of its taps is a square."""
    return int(math.sqrt(len(local_bias.unbind(1))) + 0.5)  # sizes are tensors while tracing, this number is none


def _is_odd_square(local_bias: Tensor) -> bool:
    K = _window(local_bias)
    return K % 2 == 1 and len(local_bias.unbind(1)) == K * K


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _outside(L: int, K: int, device: torch.device) -> Tensor:
    """Which of ``K`` neighbours of each position on an axis are off the map: ``[L, K]``."""
    place = torch.arange(L, device=device).unsqueeze(1) + (torch.arange(K, device=device) - K // 2)
    return (place < 0) | (place >= L)


def _outside_map(H: int, W: int, K: int, device: torch.device) -> Tensor:
    """Which taps of each query are off the map: ``[H, W, K * K]``."""
    rows, cols = _outside(H, K, device), _outside(W, K, device)
    return (rows.reshape(H, 1, K, 1) | cols.reshape(1, W, 1, K)).reshape(H, W, K * K)


def _log_lengths(outside: Tensor, P: int, dtype: torch.dtype) -> Tensor:
    """Logarithm of the number of keys that each query sees, from what :func:`_outside_map` gives: ``[H, W]``."""
    return ((~outside).sum(-1) + P).float().log().to(dtype)  # also in float64 a constant of float32, as officially


def _heads(t: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """Vectors of the heads, in float32 at least: ``[..., parts * h * d]`` -> ``parts`` of ``[..., h, d]``."""
    return [part.unflatten(-1, [num_heads, -1]).to(_wide(t)) for part in t.chunk(parts, -1)]


def _gather_form(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    num_heads: int,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
) -> Tensor:
    B, H, W, C = q.shape
    h, P, K, dtype = num_heads, pooled_kv.shape[1], _window(local_bias), _wide(q)
    query_embedding, temperature, local_bias, pool_bias, tokens, token_bias = (
        query_embedding.to(dtype),
        temperature.to(dtype),
        local_bias.to(dtype),
        pool_bias.to(dtype),
        tokens.to(dtype),
        token_bias.to(dtype),
    )
    outside = _outside_map(H, W, K, q.device).reshape(H * W, K * K)
    y, x = torch.arange(H, device=q.device), torch.arange(W, device=q.device)
    step = torch.arange(K, device=q.device) - K // 2
    rows, cols = (y.unsqueeze(1) + step).clamp(0, H - 1), (x.unsqueeze(1) + step).clamp(0, W - 1)
    place = (rows.reshape(H, 1, K, 1) * W + cols.reshape(1, W, 1, K)).reshape(-1)
    (queries,) = _heads(q.flatten(1, 2), 1, h)
    k, v = _heads(kv.flatten(1, 2), 2, h)
    pooled_k, pooled_v = _heads(pooled_kv, 2, h)
    qn = F.normalize(queries, dim=-1).transpose(1, 2)  # [B, h, N, d]
    qs = (qn + query_embedding) * F.softplus(temperature) * _log_lengths(outside, P, dtype).unsqueeze(1)
    k = F.normalize(k, dim=-1).index_select(1, place).unflatten(1, (H * W, K * K)).permute(0, 3, 1, 4, 2)
    v = v.index_select(1, place).unflatten(1, (H * W, K * K)).permute(0, 3, 1, 2, 4)  # [B, h, N, K * K, d]
    v = v.masked_fill(outside.unsqueeze(2), 0.0)
    near = (qs.unsqueeze(3) @ k).squeeze(3) + local_bias.unsqueeze(1)  # [B, h, N, K * K]
    near = near.masked_fill(outside, -math.inf)
    far = qs @ F.normalize(pooled_k, dim=-1).permute(0, 2, 3, 1) + pool_bias  # [B, h, N, P]
    weights = torch.cat([near, far], -1).softmax(-1)
    of_taps = weights[..., : K * K] + qn @ tokens + token_bias
    out = (of_taps.unsqueeze(3) @ v).squeeze(3) + weights[..., K * K :] @ pooled_v.transpose(1, 2)
    return out.transpose(1, 2).reshape(B, H, W, C).to(q.dtype)


def reference_aggregated_attention(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    num_heads: int,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
) -> Tensor:
    """Attention to a window and to pooled keys in one softmax, by a gather of all windows (TransNeXt, Sec. 3.1 to 3.3).

    Everything is computed in float32, or in float64 when ``q`` is float64, but for the logarithm of the number of keys,
    which the official code keeps in float32.

    Args:
        q: Queries ``[B, H, W, h * d]``, channels laid out as ``[h, d]``; the operator makes unit vectors of them.
        kv: Keys and values ``[B, H, W, 2 * h * d]``, channels laid out as ``[2 (keys, values), h, d]``, same dtype.
        pooled_kv: The same of the pooled map ``[B, P, 2 * h * d]``.
        num_heads: Heads ``h``.
        query_embedding: Summand of the unit queries in the logits ``[h, 1, d]``.
        temperature: Scale of the logits ``[h, 1, 1]``, of which the softplus is taken.
        local_bias: Bias of the taps of the window ``[h, K * K]``, rows first; ``K`` is odd and may exceed the map.
        pool_bias: Bias of the pooled keys ``[h, H * W, P]``; on a CPU it is read fastest as the transpose of a dense
            ``[h, P, H * W]``.
        tokens: Learnable tokens ``[h, d, K * K]``, whose products with the unit queries are weights of the taps too.
        token_bias: Bias of those weights ``[h, 1, K * K]``.

    Returns:
        ``[B, H, W, h * d]`` in the dtype of ``q``.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    tensors = query_embedding, temperature, local_bias, pool_bias, tokens, token_bias
    _check(q, kv, pooled_kv, num_heads, *tensors)
    if not torch.jit.is_scripting():
        with without_autocast(q):
            return _gather_form(q, kv, pooled_kv, num_heads, *tensors)
    return _gather_form(q, kv, pooled_kv, num_heads, *tensors)


def _plain_form(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    num_heads: int,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
) -> Tensor:
    """Each tap as a slice of the padded map, in plain operators and for any size: for scripts and exported programs."""
    B, H, W, C = q.shape
    h, P, K, dtype = num_heads, pooled_kv.shape[1], _window(local_bias), _wide(q)
    r = K // 2
    outside = _outside_map(H, W, K, q.device)
    (queries,) = _heads(q, 1, h)
    k, v = _heads(kv, 2, h)
    pooled_k, pooled_v = _heads(pooled_kv, 2, h)
    qn = F.normalize(queries, dim=-1).permute(0, 3, 4, 1, 2)  # [B, h, d, H, W]
    scale = F.softplus(temperature.to(dtype)).unsqueeze(3) * _log_lengths(outside, P, dtype)  # [h, 1, H, W]
    qs = (qn + query_embedding.to(dtype).reshape(h, C // h, 1, 1)) * scale
    k = F.pad(F.normalize(k, dim=-1).permute(0, 3, 4, 1, 2), [r, r, r, r])
    v = F.pad(v.permute(0, 3, 4, 1, 2), [r, r, r, r])
    logits: list[Tensor] = []
    for i in range(K):
        for j in range(K):
            logits.append((qs * k[:, :, :, i : i + H, j : j + W]).sum(2))
    near = torch.stack(logits, 2) + local_bias.to(dtype).reshape(h, K * K, 1, 1)  # [B, h, K * K, H, W]
    near = near.masked_fill(outside.permute(2, 0, 1), -math.inf).flatten(3)
    far = F.normalize(pooled_k, dim=-1).transpose(1, 2) @ qs.flatten(3)  # [B, h, P, N]
    weights = torch.cat([near, far + pool_bias.to(dtype).transpose(1, 2)], 2).softmax(2)
    of_taps = weights[:, :, : K * K] + tokens.to(dtype).transpose(1, 2) @ qn.flatten(3)
    of_taps = (of_taps + token_bias.to(dtype).transpose(1, 2)).reshape(B, h, K * K, 1, H, W)
    out = (pooled_v.permute(0, 2, 3, 1) @ weights[:, :, K * K :]).reshape(B, h, C // h, H, W)
    for i in range(K):
        for j in range(K):
            out = out + of_taps[:, :, i * K + j] * v[:, :, :, i : i + H, j : j + W]
    return out.permute(0, 3, 4, 1, 2).reshape(B, H, W, C).to(q.dtype)


class _Flat(NamedTuple):
    """A map whose rows lie behind each other, with ``K // 2`` zeros between two rows and more before and after all.

    A tap is then the same map at another shift: what stands left or right of a row, above or below the map is zero.
    """

    H: int
    W: int
    K: int

    @property
    def width(self) -> int:
        """Of a row and the zeros behind it."""
        return self.W + self.K // 2

    @property
    def size(self) -> int:
        return self.H * self.width

    @property
    def margin(self) -> int:
        """Zeros before and after all rows."""
        return self.K // 2 * (self.width + 1)

    @property
    def shifts(self) -> list[int]:
        """Where each tap of the first position is, counted from the first zero of the margin."""
        return [i * self.width + j for i, j in itertools.product(range(self.K), repeat=2)]

    def inside(self, t: Tensor) -> Tensor:
        """Positions on the map ``[..., rows, W]`` of some whole rows ``[..., rows * width]``."""
        return t.unflatten(-1, (-1, self.width))[..., : self.W]

    def lay(self, t: Tensor) -> Tensor:
        """``[..., H, W]`` -> ``[..., size]``."""
        flat = t.new_zeros(*t.shape[:-2], self.size)
        self.inside(flat).copy_(t)
        return flat

    def lay_heads(self, t: Tensor, dtype: torch.dtype, margin: int = 0) -> Tensor:
        """``[B, H, W, h, d]`` -> ``[B, h, d, size]``, perhaps with zeros around."""
        B, _, _, h, d = t.shape
        flat = t.new_zeros(B, h, d, self.size + 2 * margin, dtype=dtype)
        self.inside(flat[..., margin : margin + self.size]).copy_(t.permute(0, 3, 4, 1, 2))
        return flat

    def heads(self, flat: Tensor) -> Tensor:
        """The map ``[B, rows, W, h, d]`` of some whole rows ``[B, h, d, rows * width]``."""
        return self.inside(flat).permute(0, 3, 4, 1, 2)


class _Band:
    """Some whole rows: ``rows`` of a map, ``own`` positions of a flat one, those of each tap in one with a margin."""

    def __init__(self, flat: _Flat, top: int, bottom: int):
        first, last = top * flat.width, bottom * flat.width
        self.rows, self.own = slice(top, bottom), slice(first, last)
        self.shifted = [slice(first + shift, last + shift) for shift in flat.shifts]


def _make_unit(t: Tensor, dim: int) -> Tensor:
    """Make unit vectors of those along a dimension, in place, and give the lengths by which they were divided."""
    length = (t * t).sum(dim, keepdim=True).sqrt_().clamp_min_(_EPS)
    t.div_(length)
    return length


def _unit_gradient(grad: Tensor, unit: Tensor, length: Tensor, dim: int) -> Tensor:
    """Gradient of the vectors of which :func:`_make_unit` made unit vectors, in place of that of the latter."""
    along = (grad * unit).sum(dim, keepdim=True).mul_(length > _EPS)  # shorter ones were only multiplied
    return grad.addcmul_(unit, along, value=-1).div_(length)


class _Laid:
    """The inputs of one call, of which the fast form works on some images and rows at a time.

    Of the images that were taken up last ``qn`` and ``qs`` are ``[B, h, d, size]``, ``k`` and ``v`` have a margin as
    well, ``pooled_k`` and ``pooled_v`` are ``[B, h, P, d]``.  Biases are ``[h, K * K, size]`` and ``[h, P, H, W]``.
    """

    def __init__(self, tensors: tuple[Tensor, ...], num_heads: int):
        self.maps, parameters = tensors[:3], tensors[3:]
        q, _, pooled_kv = self.maps
        B, H, W, _ = q.shape
        dtype = _wide(q)
        query_embedding, self.temperature, local_bias, pool_bias, tokens, token_bias = (t.to(dtype) for t in parameters)
        self.h, self.dtype, P = num_heads, dtype, pooled_kv.shape[1]
        self.flat = flat = _Flat(H, W, _window(local_bias))
        self.taps = flat.K * flat.K
        outside = _outside_map(H, W, flat.K, q.device)
        self.embedding = query_embedding.transpose(1, 2)  # [h, d, 1]
        self.log_lengths = flat.lay(_log_lengths(outside, P, dtype))
        self.scale = F.softplus(self.temperature) * self.log_lengths  # [h, 1, size]
        near = local_bias.unsqueeze(2).unsqueeze(3).masked_fill(outside.permute(2, 0, 1), -math.inf)
        self.local_bias = flat.lay(near)
        self.pool_bias = pool_bias.transpose(1, 2).unflatten(2, (H, W))
        self.tokens, self.token_bias = tokens.transpose(1, 2), token_bias.transpose(1, 2)  # [h, K * K, d or 1]
        budget = _WORKSPACE if q.device.type == "cpu" else 64 * _WORKSPACE
        most = budget // (num_heads * (self.taps + P) * self.scale.element_size())  # positions
        images, rows = max(1, most // flat.size), max(1, most // flat.width)
        self.groups = [slice(b, b + images) for b in range(0, B, images)]
        self.bands = [_Band(flat, y, min(y + rows, H)) for y in range(0, H, rows)]

    def take(self, images: slice) -> None:
        flat, h = self.flat, self.h
        q, kv, pooled_kv = (t[images].unflatten(-1, (n, h, -1)) for t, n in zip(self.maps, (1, 2, 2), strict=True))
        self.qn = flat.lay_heads(q[:, :, :, 0], self.dtype)
        self.k, self.v = (flat.lay_heads(t, self.dtype, flat.margin) for t in kv.unbind(3))
        self.pooled_k, self.pooled_v = (
            t.to(self.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in pooled_kv.unbind(2)
        )
        self.q_length, self.k_length = _make_unit(self.qn, 2), _make_unit(self.k, 2)
        self.pooled_length = _make_unit(self.pooled_k, 3)
        self.qs = (self.qn + self.embedding).mul_(self.scale)

    def weights(self, band: _Band) -> tuple[Tensor, Tensor]:
        """Weights of the softmax ``[B, h, K * K + P, positions]``, taps first, and the sum by which to divide them."""
        qs = self.qs[..., band.own]
        B, h, _, n = qs.shape
        logits = qs.new_empty(B, h, self.taps + self.pooled_k.shape[2], n)
        near, far = logits[:, :, : self.taps], logits[:, :, self.taps :]
        product = torch.empty_like(qs, memory_format=torch.contiguous_format)
        for tap, shifted in enumerate(band.shifted):
            torch.sum(torch.mul(qs, self.k[..., shifted], out=product), 2, out=near[:, :, tap])
        near += self.local_bias[..., band.own]
        torch.bmm(self.pooled_k.flatten(0, 1), qs.flatten(0, 1), out=far.flatten(0, 1))
        self.flat.inside(far).add_(self.pool_bias[..., band.rows, :])
        logits.sub_(logits.amax(2, keepdim=True)).exp_()
        return logits, logits.sum(2, keepdim=True)

    def token_weights(self, band: _Band) -> Tensor:
        """``[B, h, K * K, positions]``."""
        return torch.matmul(self.tokens, self.qn[..., band.own]).add_(self.token_bias)


def _fast_forward(tensors: tuple[Tensor, ...], num_heads: int) -> Tensor:
    laid = _Laid(tensors, num_heads)
    B, H, W, C = tensors[0].shape
    out = tensors[0].new_empty(B, H, W, num_heads, C // num_heads)
    for images in laid.groups:
        laid.take(images)
        pooled_v = laid.pooled_v.transpose(2, 3).flatten(0, 1)
        for band in laid.bands:
            weights, total = laid.weights(band)
            near, far = weights[:, :, : laid.taps], weights[:, :, laid.taps :]
            of_taps = laid.token_weights(band).mul_(total).add_(near)
            found = torch.bmm(pooled_v, far.flatten(0, 1)).unflatten(0, (-1, num_heads))
            for tap, shifted in enumerate(band.shifted):
                found.addcmul_(of_taps[:, :, tap : tap + 1], laid.v[..., shifted])
            out[images, band.rows].copy_(laid.flat.heads(found.div_(total)))
    return out.flatten(3)


def _fast_backward(dout: Tensor, tensors: tuple[Tensor, ...], num_heads: int) -> tuple[Tensor, ...]:
    laid = _Laid(tensors, num_heads)
    flat, taps, h, dtype = laid.flat, laid.taps, num_heads, laid.dtype
    maps = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors[:3]]
    shared = [t.new_zeros(t.shape, dtype=dtype) for t in tensors[3:]]
    dembedding, dtemperature, dlocal, dpool, dtokens, dtoken_bias = shared
    dpool = dpool.transpose(1, 2).unflatten(2, (flat.H, flat.W))
    for images in laid.groups:
        laid.take(images)
        dq, dkv, dpooled_kv = (t[images].unflatten(-1, (n, h, -1)) for t, n in zip(maps, (1, 2, 2), strict=True))
        grad = flat.lay_heads(dout[images].unflatten(-1, (h, -1)), dtype)
        dqn, dqs = torch.zeros_like(laid.qn), torch.empty_like(laid.qs)
        dk, dv = torch.zeros_like(laid.k), torch.zeros_like(laid.v)
        dpooled_k, dpooled_v = torch.zeros_like(laid.pooled_k), torch.zeros_like(laid.pooled_v)
        for band in laid.bands:
            qn, qs, dout_, found = (t[..., band.own] for t in (laid.qn, laid.qs, grad, dqs))
            weights, total = laid.weights(band)
            weights.div_(total)  # a saved log-sum near 34 would be off by more
            near, far = weights[:, :, :taps], weights[:, :, taps:]
            of_taps = laid.token_weights(band).add_(near)
            dweights = torch.empty_like(weights)
            dnear, dfar = dweights[:, :, :taps], dweights[:, :, taps:]
            product = torch.empty_like(dout_, memory_format=torch.contiguous_format)
            for tap, shifted in enumerate(band.shifted):
                torch.sum(torch.mul(dout_, laid.v[..., shifted], out=product), 2, out=dnear[:, :, tap])
                dv[..., shifted].addcmul_(of_taps[:, :, tap : tap + 1], dout_)
            torch.bmm(laid.pooled_v.flatten(0, 1), dout_.flatten(0, 1), out=dfar.flatten(0, 1))
            dpooled_v += far @ dout_.transpose(2, 3)
            dqn[..., band.own] = laid.tokens.transpose(1, 2) @ dnear
            dtokens += (qn @ dnear.transpose(2, 3)).sum(0)
            dtoken_bias += dnear.sum((0, 3)).unsqueeze(1)
            dweights.sub_((dweights * weights).sum(2, keepdim=True)).mul_(weights)  # now of the logits
            dlocal += dnear.sum((0, 3))
            dpool[..., band.rows, :] += flat.inside(dfar).sum(0)
            dpooled_k += dfar @ qs.transpose(2, 3)
            found.copy_(laid.pooled_k.transpose(2, 3) @ dfar)
            for tap, shifted in enumerate(band.shifted):
                found.addcmul_(dnear[:, :, tap : tap + 1], laid.k[..., shifted])
                dk[..., shifted].addcmul_(dnear[:, :, tap : tap + 1], qs)
        biased = laid.qn + laid.embedding
        dtemperature += ((dqs * biased).sum(2, keepdim=True) * laid.log_lengths).sum((0, 3)).unsqueeze(2)
        dqs *= laid.scale
        dembedding += dqs.sum((0, 3)).unsqueeze(1)
        dqn = _unit_gradient(dqn.add_(dqs), laid.qn, laid.q_length, 2)
        dk = _unit_gradient(dk, laid.k, laid.k_length, 2)
        dpooled_k = _unit_gradient(dpooled_k, laid.pooled_k, laid.pooled_length, 3)
        dq[:, :, :, 0].copy_(flat.heads(dqn))
        for part, t in enumerate((dk, dv)):
            dkv[:, :, :, part].copy_(flat.heads(t[..., flat.margin : flat.margin + flat.size]))
        for part, t in enumerate((dpooled_k, dpooled_v)):
            dpooled_kv[:, :, part].copy_(t.transpose(1, 2))
    dtemperature *= torch.sigmoid(laid.temperature)
    return *maps, *(g.to(t.dtype) for g, t in zip(shared, tensors[3:], strict=True))


class _Vectors:
    """The inputs of one call as the kernels take them, in float32: maps are ``[B, H, W, h, d]``."""

    def __init__(self, tensors: tuple[Tensor, ...], num_heads: int):
        q, kv, pooled_kv, *parameters = tensors
        embedding, self.temperature, local_bias, pool_bias, tokens, token_bias = (t.float() for t in parameters)
        h, self.K = num_heads, _window(local_bias)
        _, H, W, _ = q.shape
        lengths = _log_lengths(_outside_map(H, W, self.K, q.device), pooled_kv.shape[1], torch.float32)
        self.parameters = embedding.squeeze(1), F.softplus(self.temperature).flatten(), lengths
        maps = q.unflatten(-1, (h, -1)), kv.unflatten(-1, (2, h, -1))
        self.qn, qs, self.k, self.v, self.q_length, self.k_length = kernels.vectors(*maps, *self.parameters, _EPS)
        pooled_k, pooled_v = pooled_kv.unflatten(-1, (2, h, -1)).unbind(2)
        self.pooled_k = pooled_k.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.pooled_length = _make_unit(self.pooled_k, -1)
        self.tokens = tokens.transpose(1, 2)
        self.weights = (self.tokens @ self.of_heads(self.qn)).add_(token_bias.transpose(1, 2))
        table = F.pad(local_bias.unflatten(1, (self.K, self.K)), [self.K // 2] * 4)  # the rest is never read
        #: what neighbourhood attention takes, without its options
        self.attended = qs, self.k, self.v, table, self.pooled_k, pooled_v.float().contiguous(), pool_bias
        self.options = [self.K] * 2, [1, 1], [1, 1], True, 1.0, True

    @staticmethod
    def of_heads(t: Tensor) -> Tensor:
        """``[B, H, W, h, d]`` -> ``[B, h, d, H * W]``."""
        return t.flatten(1, 2).permute(0, 2, 3, 1)


def _triton_forward(tensors: tuple[Tensor, ...], num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    vectors = _Vectors(tensors, num_heads)
    attended, lse = BODIES["vizoo::neighborhood_attention"](*vectors.attended, *vectors.options)
    out = kernels.taps_forward(vectors.weights, vectors.v, attended, vectors.K, tensors[0].dtype)
    return out.flatten(3), attended, lse


def _triton_backward(
    dout: Tensor, tensors: tuple[Tensor, ...], attended: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, ...]:
    vectors = _Vectors(tensors, num_heads)
    dout = dout.unflatten(-1, (num_heads, -1)).float().contiguous()
    dqs, dk, dv, dtable, dpooled_k, dpooled_v, dpool_bias = BODIES["vizoo::neighborhood_attention_backward"](
        dout, *vectors.attended, attended, lse, *vectors.options
    )
    dweights = kernels.taps_backward(dout, vectors.weights, vectors.v, dv, vectors.K)
    dq, dkv, dembedding, dfactor = kernels.vectors_backward(
        (dqs, dweights, dk, dv),
        (vectors.qn, vectors.k, vectors.q_length, vectors.k_length),
        (*vectors.parameters, vectors.tokens),
        _EPS,
        tensors[0].dtype,
    )
    dtokens = (vectors.of_heads(vectors.qn) @ dweights.transpose(2, 3)).sum(0)
    dpooled_k = _unit_gradient(dpooled_k, vectors.pooled_k, vectors.pooled_length, -1)
    r = vectors.K // 2
    dlocal = dtable[:, r : r + vectors.K, r : r + vectors.K]
    dtemperature = dfactor * torch.sigmoid(vectors.temperature).flatten()
    dpooled_kv = torch.stack([dpooled_k, dpooled_v], 2)
    found = dq, dkv, dpooled_kv, dembedding, dtemperature, dlocal, dpool_bias, dtokens, dweights.sum((0, 3))
    return tuple(g.reshape(t.shape).to(t.dtype).contiguous() for g, t in zip(found, tensors, strict=True))


@operator
def _aggregated_attention(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    num_heads: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output; and for the kernels that of the softmax alone, and log-sums of the logits, else empty."""
    tensors = q, kv, pooled_kv, query_embedding, temperature, local_bias, pool_bias, tokens, token_bias
    with without_autocast(q):
        if triton_kernel:
            return _triton_forward(tensors, num_heads)
        none = q.new_empty(0, dtype=torch.float32)
        return _fast_forward(tensors, num_heads), none, none.clone()


@torch.library.register_fake("vizoo::aggregated_attention")
def _(q, kv, pooled_kv, query_embedding, temperature, local_bias, pool_bias, tokens, token_bias, num_heads, triton):
    B, H, W, C = q.shape
    others = (B, H, W, num_heads, C // num_heads), (B, num_heads, H, W)
    return q.new_empty(q.shape), *(q.new_empty(s if triton else 0, dtype=torch.float32) for s in others)


@operator
def _aggregated_attention_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    attended: Tensor,
    lse: Tensor,
    num_heads: int,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = q, kv, pooled_kv, query_embedding, temperature, local_bias, pool_bias, tokens, token_bias
    with without_autocast(q):
        if triton_kernel:
            return _triton_backward(dout, tensors, attended, lse, num_heads)  # type: ignore[return-value]
        return _fast_backward(dout, tensors, num_heads)  # type: ignore[return-value]


@torch.library.register_fake("vizoo::aggregated_attention_backward")
def _(dout, *arguments):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in arguments[:9])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.num_heads, ctx.triton_kernel = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dout, *_):
    *tensors, attended, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:9]
    if torch.is_grad_enabled():

        def form(q: Tensor, kv: Tensor, pooled_kv: Tensor, *parameters: Tensor) -> Tensor:
            with without_autocast(q):
                return _plain_form(q, kv, pooled_kv, ctx.num_heads, *parameters)

        found = plain_gradients(form, tensors, dout, needed)
    else:
        found = _aggregated_attention_backward(dout, *tensors, attended, lse, ctx.num_heads, ctx.triton_kernel)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None


torch.library.register_autograd("vizoo::aggregated_attention", _differentiate, setup_context=_save)


def _cost(q: Any, pooled_kv: Any, local_bias: Any) -> Cost:
    """Logits and weighted sum over taps and pooled keys, and the weights of taps from tokens."""
    scores, of_tokens = math.prod(q) * (local_bias[1] + pooled_kv[1]), math.prod(q) * local_bias[1]
    of_head = q[3] // local_bias[0]
    return Cost(
        macs=2 * scores + of_tokens,
        other=(5 * scores + 2 * of_tokens) // of_head + 10 * math.prod(q),  # softmax, biases; unit vectors and scale
        acts=(scores + of_tokens) // of_head + math.prod(q),
    )


@register_cost("vizoo::aggregated_attention", torch.ops.vizoo.aggregated_attention)
def _(q, kv, pooled_kv, query_embedding, temperature, local_bias, *rest, out=None) -> Cost:
    return _cost(q, pooled_kv, local_bias)


@register_cost("vizoo::aggregated_attention_backward", torch.ops.vizoo.aggregated_attention_backward)
def _(dout, q, kv, pooled_kv, query_embedding, temperature, local_bias, *rest, out=None) -> Cost:
    cost = _cost(q, pooled_kv, local_bias)  # without what is computed again, so that no path counts more
    return Cost(macs=2 * cost.macs, other=2 * cost.other, acts=cost.acts)


def _kernel_limits(q: Tensor, num_heads: int) -> str:
    """What the Triton kernels cannot do with these inputs; empty if nothing."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    d = q.shape[3] // num_heads
    return f"the kernels take up to {MAX_CHANNELS} channels per head, not {d}" if d > MAX_CHANNELS else ""


def aggregated_attention(
    q: Tensor,
    kv: Tensor,
    pooled_kv: Tensor,
    num_heads: int,
    query_embedding: Tensor,
    temperature: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_aggregated_attention` by shifted maps or Triton kernels: same result and errors.

    Args:
        q: Queries ``[B, H, W, h * d]``.
        kv: Keys and values ``[B, H, W, 2 * h * d]``.
        pooled_kv: Keys and values of the pooled map ``[B, P, 2 * h * d]``.
        num_heads: Heads ``h``.
        query_embedding: Summand of the unit queries in the logits ``[h, 1, d]``.
        temperature: Scale of the logits ``[h, 1, 1]``, of which the softplus is taken.
        local_bias: Bias of the taps of the window ``[h, K * K]``.
        pool_bias: Bias of the pooled keys ``[h, H * W, P]``, fastest as the transpose of a dense ``[h, P, H * W]``.
        tokens: Learnable tokens ``[h, d, K * K]``.
        token_bias: Bias of the weights from tokens ``[h, 1, K * K]``.
        backend: ``"torch"``, ``"triton"`` (no float64, ``d <= 128``), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, H, W, h * d]`` in the dtype of ``q``.

    Raises:
        ValueError: If shapes or dtypes do not fit each other, or ``backend`` cannot run.
    """
    parameters = query_embedding, temperature, local_bias, pool_bias, tokens, token_bias
    _check(q, kv, pooled_kv, num_heads, *parameters)
    if not torch.jit.is_scripting():
        use = use_triton(backend, q, _kernel_limits(q, num_heads))
        if not plain_only():
            return _aggregated_attention(q, kv, pooled_kv, *parameters, num_heads, use)[0]
        with without_autocast(q):
            return _plain_form(q, kv, pooled_kv, num_heads, *parameters)
    return _plain_form(q, kv, pooled_kv, num_heads, *parameters)
