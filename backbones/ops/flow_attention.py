"""Flow-Attention: linear attention whose sinks (queries) and sources (keys) exchange a conserved flow (Flowformer).

    p = sigmoid(q), r = sigmoid(k)                          non-negative features; there is no scale
    I_i = 1 / (p_i . sum_j r_j)                             each sink takes in a flow of 1
    O_j = 1 / (r_j . sum_i p_i)                             each source gives out a flow of 1
    A_i = sigmoid(n / m * p_i . sum_j O_j r_j)              allocation, by what sink i takes then
    C_j = m softmax_j(clamp(r_j . sum_i I_i p_i, -1, 1))    competition, by what source j gives then
    out_i = I_i A_i p_i . sum_j r_j^T (C_j v_j)             of n sinks and m sources

That is attention with the weights ``I_i A_i (p_i . r_j) C_j``, which nobody stores: ``h`` heads of ``d`` channels cost
``B h (n + m) d^2`` multiply-accumulates, softmax attention ``2 B h n m d``.  A constant ``EPS`` is added to both
factors of the four products with a sum, and with ``eps_outer`` to each product as well.

In the causal form all sums run over the tokens so far, ``I`` and ``O`` are multiplied by their number and ``p . sum``
divided by it, and the softmax is a ratio to the sum so far.  The sum of the ``r_j^T (C_j v_j)`` so far is ``d x d`` at
every token; here the products of pairs inside of a chunk and one such sum for each chunk do the same.

Everything is computed in float32 at least: sums of positive features grow with the number of tokens, and float16 has
steps of 0.5 where 3,136 tokens bring a sum.  The products with a sum are written as elementwise ones with the constants
expanded, which on a CPU are faster than matrix-vector products of so few channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import without_autocast

EPS = 1e-6  # the official constant
CHUNK = 64  # tokens of a chunk of the causal form


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> None:
    if (
        q.dim() != 4
        or k.dim() != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
        or v.shape[:3] != k.shape[:3]
    ):
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"got {shapes}, need [B, h, n, d], [B, h, m, d], [B, h, m, D]")
    if q.shape[2] < 1 or k.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"got q {list(q.shape)}, k {list(k.shape)}, need at least one token and one channel")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"got causal=True for {q.shape[2]} queries and {k.shape[2]} keys, need as many")
    _check_mask("query_padding_mask", query_padding_mask, q)
    _check_mask("key_padding_mask", key_padding_mask, k)


def _check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] != x.shape[2]:
        raise ValueError(f"got {name} {list(mask.shape)} of {mask.dtype}, need bool [{x.shape[0]}, {x.shape[2]}]")


def reference_flow_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, eps_outer: bool = False) -> Tensor:
    """Flow-Attention as the official code writes it, with every sum of tokens stored.

    Args:
        q: Queries of the sinks ``[B, h, n, d]``, before their sigmoid.
        k: Keys of the sources ``[B, h, m, d]``, likewise.
        v: Values of the sources ``[B, h, m, D]``.
        causal: Sums run over the tokens so far; needs ``n = m``.
        eps_outer: Add ``EPS`` to the four products with a sum too, as the official code for images does.

    Returns:
        ``[B, h, n, D]``.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(q, k, v, causal)
    p, r = q.sigmoid(), k.sigmoid()
    n, m = q.shape[2], k.shape[2]
    so_far = torch.arange(1, n + 1, device=q.device, dtype=q.dtype)
    number = so_far if causal else torch.ones_like(so_far[:1])  # of the tokens that a causal sum is over

    def total(x: Tensor) -> Tensor:
        return x.cumsum(2) if causal else x.sum(2, keepdim=True)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return ((x + EPS) * (y + EPS)).sum(3, keepdim=True) + (EPS if eps_outer else 0.0)

    number = number[:, None]
    incoming = number / product(p, total(r))
    outgoing = number / product(r, total(p))
    conserved_sink = product(p, total(r * outgoing)) / number
    conserved_source = (product(r, total(p * incoming)) / number).clamp(-1.0, 1.0)
    if causal:
        allocation = conserved_sink.sigmoid()
        competition = conserved_source.exp()
        competition = competition / competition.cumsum(2) * number
    else:
        allocation = (conserved_sink * (n / m)).sigmoid()
        competition = conserved_source.softmax(2) * m
    context = total(r[..., None] * (v * competition)[..., None, :])  # [B, h, 1 or n, d, D]
    return ((p * incoming / number)[..., None, :] @ context)[..., 0, :] * allocation


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _features(x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sigmoid in float32 at least, 0 for padding; and ``[B or 1, 1, N]``, 1 for each token and 0 for padding."""
    x = _wide(x).sigmoid()
    if padding_mask is None:
        return x, x.new_ones(1, 1, x.shape[2])
    real = (~padding_mask).to(x.dtype).unsqueeze(1)
    return x * real.unsqueeze(-1), real


def _product(
    x: Tensor,
    total: Tensor,
    eps_outer: bool,
    eps: float = EPS,  # a default, for TorchScript reads no globals
) -> Tensor:
    """``(x + EPS) . (total + EPS)``, perhaps plus ``EPS``, of ``[B, h, N, d]`` and ``[B, h, 1 or N, d]``."""
    total = total + eps
    return (x * total).sum(-1) + eps * (total.sum(-1) + (1.0 if eps_outer else 0.0))


def _flows(
    p: Tensor, r: Tensor, sinks: Tensor, sources: Tensor, causal: bool, eps_outer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``I [B, h, n]``, ``A [B, h, n]`` and ``C [B, h, m]`` of features and the marks of their tokens."""
    if causal:
        n, m = sinks.cumsum(-1).clamp_min(1.0), sources.cumsum(-1).clamp_min(1.0)
        incoming = 1.0 / _product(p, r.cumsum(2), eps_outer)
        outgoing = n / _product(r, p.cumsum(2), eps_outer)
        sink = _product(p, (r * outgoing.unsqueeze(-1)).cumsum(2), eps_outer) / m
        source = _product(r, (p * (m * incoming).unsqueeze(-1)).cumsum(2), eps_outer) / n
        weight = source.clamp(-1.0, 1.0).exp() * sources
        # the clamp is for padding alone: a source weighs at least 1 / e
        return incoming, sink.sigmoid(), weight / weight.cumsum(-1).clamp_min(0.25) * m
    n, m = sinks.sum(-1, keepdim=True).clamp_min(1.0), sources.sum(-1, keepdim=True).clamp_min(1.0)
    incoming = 1.0 / _product(p, r.sum(2, keepdim=True), eps_outer)
    outgoing = 1.0 / _product(r, p.sum(2, keepdim=True), eps_outer)
    sink = _product(p, (r * outgoing.unsqueeze(-1)).sum(2, keepdim=True), eps_outer)
    source = _product(r, (p * incoming.unsqueeze(-1)).sum(2, keepdim=True), eps_outer)
    weight = source.clamp(-1.0, 1.0).exp() * sources
    return incoming, (sink * (n / m)).sigmoid(), weight / weight.sum(-1, keepdim=True).clamp_min(0.25) * m


def _causal_products(p: Tensor, r: Tensor, u: Tensor, chunk: int) -> Tensor:
    """``p_i . sum of r_j^T u_j over j <= i``, as ``[B, h, N, D]``."""
    B, h, N, d = p.shape
    chunks = (N + chunk - 1) // chunk
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if torch.compiler.is_exporting():  # the last is never full: without padding it would be another program
            chunks = N // chunk + 1
    pad = [0, 0, 0, chunks * chunk - N]
    p = F.pad(p, pad).reshape(B, h, chunks, chunk, d)
    r = F.pad(r, pad).reshape(B, h, chunks, chunk, d)
    u = F.pad(u, pad).reshape(B, h, chunks, chunk, u.shape[3])
    within = (p @ r.transpose(-2, -1)).tril() @ u
    before = F.pad((r.transpose(-2, -1) @ u).cumsum(2), [0, 0, 0, 0, 1, 0])[:, :, :-1]  # of the chunks before
    return (within + p @ before).flatten(2, 3)[:, :, :N]


def _flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    eps_outer: bool,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    chunk: int,
) -> Tensor:
    p, sinks = _features(q, query_padding_mask)
    r, sources = _features(k, key_padding_mask)
    incoming, allocation, competition = _flows(p, r, sinks, sources, causal, eps_outer)
    u = _wide(v)
    if key_padding_mask is not None:  # whose values may be anything
        u = u.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    u = u * competition.unsqueeze(-1)
    out = _causal_products(p, r, u, chunk) if causal else p @ (r.transpose(-2, -1) @ u)
    return (out * (incoming * allocation).unsqueeze(-1)).to(v.dtype)


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    eps_outer: bool = False,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """:func:`reference_flow_attention` in float32 at least, with memory linear in the tokens in the causal form too.

    Padding takes no part in any sum and is not counted, so the other tokens get what they would get without it.

    Args:
        q: Queries of the sinks ``[B, h, n, d]``, before their sigmoid.
        k: Keys of the sources ``[B, h, m, d]``, likewise.
        v: Values of the sources ``[B, h, m, D]``.
        causal: Sums run over the tokens so far; needs ``n = m``.
        eps_outer: Add ``EPS`` to the four products with a sum too, as the official code for images does.
        query_padding_mask: ``[B, n]``, True for padding, where the output is 0; None for none.
        key_padding_mask: ``[B, m]``, True for padding, None for none; in self-attention the same as of the queries.
        chunk: Tokens of a chunk of the causal form, which for each head and token stores ``chunk`` products of pairs
            and ``d D / chunk`` numbers of the sums.

    Returns:
        ``[B, h, n, D]`` in the dtype of ``v``.

    Raises:
        ValueError: If the shapes do not fit each other, or ``chunk`` is below 1.
    """
    _check(q, k, v, causal, query_padding_mask, key_padding_mask)
    if chunk < 1:
        raise ValueError(f"got chunk={chunk}, need a whole number of at least 1")
    if not torch.jit.is_scripting():
        with without_autocast(v):
            return _flow_attention(q, k, v, causal, eps_outer, query_padding_mask, key_padding_mask, chunk)
    return _flow_attention(q, k, v, causal, eps_outer, query_padding_mask, key_padding_mask, chunk)


def flows(q: Tensor, k: Tensor, causal: bool = False, eps_outer: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What the flow makes of the sinks and sources: token ``i`` weighs value ``j`` by ``I_i A_i (p_i . r_j) C_j``.

    Args:
        q: Queries of the sinks ``[B, h, n, d]``, before their sigmoid.
        k: Keys of the sources ``[B, h, m, d]``, likewise.
        causal: Sums run over the tokens so far; needs ``n = m``.
        eps_outer: As in :func:`flow_attention`.

    Returns:
        In float32 at least: ``I [B, h, n]``, the inverse of each sink's incoming flow; its allocation ``A [B, h, n]``;
        the competition of the sources ``C [B, h, m]``, whose mean is 1 unless ``causal``.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(q, k, k, causal)
    with without_autocast(q):
        (p, sinks), (r, sources) = _features(q, None), _features(k, None)
        return _flows(p, r, sinks, sources, causal, eps_outer)
