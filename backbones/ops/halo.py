"""Halo attention: every block of queries attends to the block grown by a halo of keys (HaloNet, Sec. 2 and 3).

The map is cut into ``b x b`` blocks, padded at the bottom and right to whole ones.  All queries of a block see the same
``w x w`` window, ``w = b + 2 * halo``.  With block-local query ``(i, m)`` and window-local key ``(j, n)``:

    logit = scale * <q, k> + <q, height_rel[j - i + w - 1]> + <q, width_rel[n - m + w - 1]>

Off-map keys are zero vectors that take part in the softmax, with the relative term alone as their logit, unless they
are masked.  ``Nq`` queries (the padded ones too) of ``h`` heads cost ``Nq * h * (w^2 * (d + dv) + 2 * (2 w - 1) * d)``
multiply-accumulates.

The reference stores every window and every score.  The fused form hands blocks that lie on the map alike to PyTorch's
fused attention, with the relative terms as its mask, a few at a time.  Their windows end where the map ends: one key
with the log-sum of their relative terms stands for the zero keys of a row or column outside.  Scores are float32 also
for half precision, and products are where the processor has none of half precision.  The backward pass works on a few
blocks at a time, whose scores fit into the cache, in float32 too; it computes the weights again, and adds up the
gradients of keys, values and tables chunk by chunk: their last bits depend on the number of threads.  The Triton
kernels read keys and values in place and keep scores, weights and relative terms in registers, with an online softmax;
their backward pass has one kernel over tiles of queries and one over tiles of keys, and adds up in a fixed order.

NATTEN is no backend: with kernel ``w`` and stride ``b`` it selects these windows inside the map, but it moves those at
the border inwards instead of keeping zero keys, and it has no relative terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._derivative import plain_gradients
from ._kernels import power_of_two
from .backend import KernelModule, multiplies, plain_only, use_triton, without_autocast
from .cost import Cost, register_cost
from .operators import operator

kernels = KernelModule("_halo_kernels")
MAX_CHANNELS = 256  # of a head's values, and half as many of its queries: tiles have to fit into shared memory
MAX_ROWS = 128  # of a table that are read: their products with a tile of queries have to fit into registers
MAX_TABLE = 8192  # rows times channels of a table, each as the power of two that holds it
CHUNK = 1 << 18  # scores that the backward pass works on at once for each thread: 1 MiB, the cache of a core
FUSED_CHUNK = 1 << 20  # scores, keys and values of the fused form, which reads them once: fewer calls count for more


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    pad_mode: str,
    rel_index: str,
) -> None:
    if block_size < 1 or halo_size < 0:
        raise ValueError(f"got block_size={block_size} and halo_size={halo_size}, need at least 1 and 0")
    if stride < 1 or block_size % stride != 0:
        raise ValueError(f"got stride={stride}, need a divisor of block_size={block_size}")
    if pad_mode != "zero" and pad_mode != "mask":
        raise ValueError(f"got pad_mode='{pad_mode}', need 'zero' or 'mask'")
    if rel_index != "array" and rel_index != "pixel":
        raise ValueError(f"got rel_index='{rel_index}', need 'array' or 'pixel'")
    if q.dim() != 5 or k.dim() != 5 or v.dim() != 5:
        raise ValueError(f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; need [B, H, W, h, d] each")
    B, H, W, h, d = k.shape
    if list(v.shape[:4]) != [B, H, W, h]:
        raise ValueError(f"got v {list(v.shape)}, need [{B}, {H}, {W}, {h}, dv] as k")
    if list(q.shape) != [B, (H + stride - 1) // stride, (W + stride - 1) // stride, h, d]:
        raise ValueError(
            f"got q {list(q.shape)} for k {list(k.shape)}, need [B, ceil(H / {stride}), ceil(W / {stride}), h, d]"
        )
    rows = 2 * (block_size + 2 * halo_size) - 1
    if list(height_rel.shape) != [rows, d] or list(width_rel.shape) != [rows, d]:
        raise ValueError(
            f"got height_rel {list(height_rel.shape)} and width_rel {list(width_rel.shape)}, need [{rows}, {d}]"
        )


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _rest(t: Tensor, n: int) -> Tensor:
    """``t % n``, which has no ONNX form for a size that the exporter does not know."""
    return t - t // n * n


def _window_keys(part: Tensor, H: int, W: int, h: int, block_size: int, halo_size: int) -> tuple[Tensor, Tensor]:
    """Keys in the windows of some blocks and heads.

    Args:
        part: Block, times heads, plus head ``[n, 1]``.
        H: Rows of the map.
        W: Columns of the map.
        h: Heads.
        block_size: Side of a block.
        halo_size: Pixels by which a window exceeds it.

    Returns:
        Place of each key in ``[H * W * h]`` and whether it is off the map, both ``[n, w * w]``.
    """
    b, w, nw = block_size, block_size + 2 * halo_size, (W + block_size - 1) // block_size
    block, key = part // h, torch.arange(w * w, device=part.device)
    y, x = block // nw * b - halo_size + key // w, _rest(block, nw) * b - halo_size + key % w
    off_map = (y < 0) | (y >= H) | (x < 0) | (x >= W)
    return (y.clamp(0, H - 1) * W + x.clamp(0, W - 1)) * h + part % h, off_map


def _plain_weights(
    q: Tensor,
    k: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    part: Tensor,
    place: Tensor,
    off_map: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    rel_scale: float,
    mask: bool,
    pixel: bool,
) -> Tensor:
    """Weights ``[B, n, queries, w * w]`` of some blocks and heads ``part``, whose keys :func:`_window_keys` gives."""
    B, QH, QW, h = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    dtype, device = _work_dtype(q), q.device
    b, side, w, step = block_size, block_size // stride, block_size + 2 * halo_size, stride if pixel else 1
    nw = (k.shape[2] + b - 1) // b
    block, query, key = part // h, torch.arange(side * side, device=device), torch.arange(w * w, device=device)
    y, x = block // nw * side + query // side, _rest(block, nw) * side + query % side  # [n, queries]
    own = (y.clamp(max=QH - 1) * QW + x.clamp(max=QW - 1)) * h + part % h  # past the map any query will do
    queries = q.to(dtype).flatten(1, 3)[:, own]  # [B, n, queries, d]
    keys = k.to(dtype).flatten(1, 3)[:, place].masked_fill(off_map.unsqueeze(2), 0.0)

    query = query.unsqueeze(1)
    row = (key // w - step * (query // side) + w - 1).expand(B, part.shape[0], side * side, w * w)
    col = (key % w - step * (query % side) + w - 1).expand(B, part.shape[0], side * side, w * w)
    relative = (queries @ height_rel.to(dtype).t()).gather(3, row) + (queries @ width_rel.to(dtype).t()).gather(3, col)
    logits = scale * (queries @ keys.transpose(2, 3)) + rel_scale * relative
    if mask:
        logits = logits.masked_fill(off_map.unsqueeze(1), float("-inf"))
    return logits.softmax(-1)


def _plain_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    rel_scale: float,
    mask: bool,
    pixel: bool,
) -> Tensor:
    # no axis counts blocks alone: exported programs would then be bound to maps of one block, or of more
    H, W, h = k.shape[1], k.shape[2], k.shape[3]
    QH, QW, device = q.shape[1], q.shape[2], k.device
    b, side = block_size, block_size // stride
    nh, nw = (H + b - 1) // b, (W + b - 1) // b

    # indices have the shape of what they pick: splitting an axis afterwards would bind exported programs to sizes
    part = torch.arange(nh * nw * h, device=device).unsqueeze(1)  # block, head
    place, off_map = _window_keys(part, H, W, h, b, halo_size)
    weights = _plain_weights(
        q, k, height_rel, width_rel, part, place, off_map, b, halo_size, stride, scale, rel_scale, mask, pixel
    )
    values = v.to(weights.dtype).flatten(1, 3)[:, place].masked_fill(off_map.unsqueeze(2), 0.0)
    out = (weights @ values).flatten(1, 2)

    y, x = torch.arange(QH, device=device).reshape(-1, 1, 1), torch.arange(QW, device=device).unsqueeze(1)
    block = y // side * nw + x // side
    place = (block * h + torch.arange(h, device=device)) * (side * side) + y % side * side + x % side
    return out[:, place].to(v.dtype)  # [B, QH, QW, h, dv]


def halo_weights(
    q: Tensor,
    k: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    row: int,
    col: int,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
    scale_pos_embed: bool = False,
    pad_mode: str = "zero",
    rel_index: str = "array",
) -> Tensor:
    """The softmax weights of :func:`reference_halo_attention` of one query, for pictures.

    Args:
        q: Queries ``[B, ceil(H / stride), ceil(W / stride), h, d]``.
        k: Keys ``[B, H, W, h, d]``.
        height_rel: Relative rows ``[2 * w - 1, d]``.
        width_rel: Relative columns, same shape.
        row: Row of the query in ``q``.
        col: Its column.
        block_size: Side of a block of keys.
        halo_size: Pixels by which the window of a block exceeds it on every side.
        stride: Distance of neighbouring queries.
        scale: Factor of ``<q, k>``; None for ``d ** -0.5``.
        scale_pos_embed: Whether it also applies to the relative terms.
        pad_mode: ``"zero"`` or ``"mask"``.
        rel_index: ``"array"`` or ``"pixel"``.

    Returns:
        ``[B, h, w, w]`` by the rows and columns of the window, which starts ``halo_size`` before the query's block.

    Raises:
        ValueError: If an argument is outside its range, or the shapes do not fit each other.
    """
    _check(q, k, k, height_rel, width_rel, block_size, halo_size, stride, pad_mode, rel_index)
    H, W, h = k.shape[1], k.shape[2], k.shape[3]
    scale = q.shape[4] ** -0.5 if scale is None else scale
    rel_scale = scale if scale_pos_embed else 1.0
    b, side, w = block_size, block_size // stride, block_size + 2 * halo_size
    block = row // side * ((W + b - 1) // b) + col // side
    part = (block * h + torch.arange(h, device=k.device)).unsqueeze(1)
    place, off_map = _window_keys(part, H, W, h, b, halo_size)
    sizes = b, halo_size, stride, scale, rel_scale, pad_mode == "mask", rel_index == "pixel"
    with without_autocast(q):
        weights = _plain_weights(q, k, height_rel, width_rel, part, place, off_map, *sizes)
    return weights[:, :, row % side * side + col % side].unflatten(-1, (w, w))


def reference_halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
    scale_pos_embed: bool = False,
    pad_mode: str = "zero",
    rel_index: str = "array",
) -> Tensor:
    """Softmax attention of every block of queries to the block grown by a halo (HaloNet, Sec. 2 and 3).

    Computed in float32, or in float64 when ``q`` is float64, by one gather of all windows.

    Args:
        q: Queries ``[B, ceil(H / stride), ceil(W / stride), h, d]``.
        k: Keys ``[B, H, W, h, d]``, any ``H`` and ``W``: the last blocks may be partial.
        v: Values ``[B, H, W, h, dv]``.
        height_rel: Relative rows, shared by the heads ``[2 * w - 1, d]`` with ``w = block_size + 2 * halo_size``.
        width_rel: Relative columns, same shape.
        block_size: Side ``b`` of a block of keys; a block has ``(b / stride)^2`` queries.
        halo_size: Pixels by which the window of a block exceeds it on every side, 0 or more.
        stride: Distance of neighbouring queries, a divisor of ``block_size``.
        scale: Factor of ``<q, k>``; None for ``d ** -0.5``.
        scale_pos_embed: Whether it also applies to the relative terms.
        pad_mode: ``"zero"`` keeps off-map keys as zero vectors, as timm does; ``"mask"`` leaves them out.
        rel_index: How far apart two neighbouring queries are for the tables: 1 (``"array"``, as in timm) or ``stride``
            (``"pixel"``).

    Returns:
        ``[B, ceil(H / stride), ceil(W / stride), h, dv]`` in the dtype of ``v``.

    Raises:
        ValueError: If an argument is outside its range, or the shapes do not fit each other.
    """
    _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, pad_mode, rel_index)
    scale = q.shape[4] ** -0.5 if scale is None else scale
    rel_scale = scale if scale_pos_embed else 1.0
    mask, pixel = pad_mode == "mask", rel_index == "pixel"
    if not torch.jit.is_scripting():
        with without_autocast(q):
            return _plain_form(
                q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel
            )
    return _plain_form(q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel)


def _off_map(blocks: int, length: int, block_size: int, halo_size: int, like: Tensor) -> Tensor:
    """What to add to the logits of the keys of every window on one axis of the map: ``[blocks, w]``, -inf outside."""
    first = torch.arange(blocks, device=like.device) * block_size - halo_size
    position = first.unsqueeze(1) + torch.arange(block_size + 2 * halo_size, device=like.device)
    return like.new_zeros(position.shape).masked_fill_((position < 0) | (position >= length), float("-inf"))


class _Chunks:
    """The blocks of one call, a few at a time: views of the padded maps, and the weights of each chunk."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel):
        B, H, W, h, d = k.shape
        b, r, dtype = block_size, halo_size, _work_dtype(q)
        self.dtype, self.scale, self.rel_scale = dtype, scale, rel_scale
        self.h, self.d, self.side, self.w, self.b = h, d, b // stride, b + 2 * r, b
        self.nh, self.nw, self.step = -(-H // b), -(-W // b), stride if pixel else 1
        self.queries = self.blocks(q)
        used = (self.side - 1) * self.step + self.w  # the rows before are never read
        self.tables = torch.cat([height_rel[-used:], width_rel[-used:]]).to(dtype) * rel_scale
        over = -(-2 * r // b)  # blocks by which a window exceeds its own
        self.kv = torch.zeros(
            B, h, (self.nh + over) * b, (self.nw + over) * b, d + v.shape[4], dtype=dtype, device=k.device
        )
        self.inside = slice(None), slice(None), slice(r, r + H), slice(r, r + W)
        self.kv[self.inside][..., :d] = k.permute(0, 3, 1, 2, 4)
        self.kv[self.inside][..., d:] = v.permute(0, 3, 1, 2, 4)
        windows = self.kv.unfold(2, self.w, b).unfold(3, self.w, b)  # [B, h, nh, nw, d + dv, w, w]
        self.windows = windows.permute(0, 2, 3, 1, 5, 6, 4)
        self.scores: Tensor | None = None
        self.off_map = None
        if mask:
            self.off_map = _off_map(self.nh, H, b, r, self.kv), _off_map(self.nw, W, b, r, self.kv)

    def blocks(self, t: Tensor) -> Tensor:
        """Map of the queries' size, padded: ``[B, nh, nw, h, side, side, c]``."""
        down, right = self.nh * self.side - t.shape[1], self.nw * self.side - t.shape[2]
        if down > 0 or right > 0:
            t = F.pad(t, [0, 0, 0, 0, 0, right, 0, down])
        return t.unflatten(1, [-1, self.side]).unflatten(3, [-1, self.side]).permute(0, 1, 3, 5, 2, 4, 6)

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """Images, block rows and block columns of every chunk."""
        B, limit = self.queries.shape[0], CHUNK * (torch.get_num_threads() if self.kv.device.type == "cpu" else 64)
        count = max(1, limit // (self.h * self.side**2 * self.w**2))
        sizes: list[int] = []
        for length in (self.nw, self.nh, B):
            parts = -(-length // count)
            sizes.insert(0, -(-length // max(parts, 1)))
            count = max(1, count // max(length, 1))
        starts = (range(0, n, max(size, 1)) for n, size in zip((B, self.nh, self.nw), sizes, strict=True))
        for first in itertools.product(*starts):
            yield tuple(slice(i, i + size) for i, size in zip(first, sizes, strict=True))

    def skewed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both relative terms ``[n, side, side, w]`` as views of the products with the tables ``[n, side, side, 2R]``.

        Query ``i`` sees the rows from ``(side - 1 - i) * step`` of its table: one query on is ``step`` rows back.
        """
        n, side, _, rows2 = x.shape
        first = x.storage_offset() + (side - 1) * self.step
        size, (sn, si, sm, _) = (n, side, side, self.w), x.stride()
        rows = x.as_strided(size, (sn, si - self.step, sm, 1), first)
        cols = x.as_strided(size, (sn, si, sm - self.step, 1), first + rows2 // 2)
        return rows, cols

    def weights(self, at: tuple[slice, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries ``[n, L, d]``, keys, values and weights ``[n, L, w * w]`` of a chunk: n blocks times heads."""
        windows, queries = self.windows[at], self.queries[at]
        n, side, w = windows.shape[:4].numel(), self.side, self.w
        q = queries.to(self.dtype).reshape(n, side * side, self.d)
        k, v = windows.reshape(n, w * w, -1).split([self.d, windows.shape[6] - self.d], 2)
        rows, cols = self.skewed((q.flatten(0, 1) @ self.tables.t()).view(n, side, side, -1))
        if self.off_map is not None:
            shape = (*queries.shape[:6], w)
            off_rows, off_cols = (t[i] for t, i in zip(self.off_map, at[1:], strict=True))
            rows = (rows.view(shape) + off_rows.view(1, -1, 1, 1, 1, 1, w)).view(rows.shape)
            cols = (cols.view(shape) + off_cols.view(1, 1, -1, 1, 1, 1, w)).view(cols.shape)
        if self.scores is None:  # the first chunk is the largest
            self.scores = torch.empty(n, side, side, w, w, dtype=self.dtype, device=q.device)
        p = torch.add(rows.unsqueeze(4), cols.unsqueeze(3), out=self.scores[:n]).view(n, side * side, w * w)
        p.baddbmm_(q, k.transpose(1, 2), alpha=self.scale)
        return q, k, v, torch.softmax(p, -1, out=p)  # row by row, so in place

    def fold(self, dkv: Tensor, dwindows: Tensor, at: tuple[slice, ...]) -> None:
        """Add the gradient of a chunk's windows to that of the padded map ``dkv``."""
        b, w = self.b, self.w
        images, rows, cols = at
        grid = dkv.unflatten(2, [-1, b]).unflatten(4, [-1, b])  # [B, h, NH, b, NW, b, d + dv]
        parts = dwindows.view(self.windows[at].shape).permute(0, 3, 1, 4, 2, 5, 6)  # [B, h, nh, w, nw, w, d + dv]
        for y, x in itertools.product(range(0, w, b), range(0, w, b)):  # one block of every window
            part = parts[:, :, :, y : y + b, :, x : x + b]
            down, right = y // b, x // b
            grid[
                images,
                :,
                rows.start + down : rows.start + down + part.shape[2],
                : part.shape[3],
                cols.start + right : cols.start + right + part.shape[4],
                : part.shape[5],
            ] += part


class _Blocks(NamedTuple):
    """Blocks of one axis, equally far apart, whose queries and windows lie on the map alike.

    Places in a window are those of the first block, and how they change from one block to the next.
    """

    block: int  # the first
    step: int  # in blocks
    blocks: int
    queries: int  # of a block
    keys: int  # of a window, on the map
    first: tuple[int, int]  # place in the window of the first of these keys
    outside: tuple[tuple[int, int, int], ...]  # places off the map: number, first place

    def part(self, first: int, blocks: int) -> _Blocks:
        """Some of these blocks."""
        (place, change), outside = self.first, tuple((n, i + first * by, by) for n, i, by in self.outside)
        place += first * change
        return self._replace(
            block=self.block + first * self.step, blocks=blocks, first=(place, change), outside=outside
        )


def _axis(queries: int, keys: int, block_size: int, halo_size: int, stride: int) -> list[_Blocks]:
    """Cut an axis of the map into blocks.

    Windows that lose as much at the beginning of the map as others at its end are worked on together.
    """
    found: dict[Any, list[tuple[int, int, int]]] = {}
    side, w = block_size // stride, block_size + 2 * halo_size
    for i in range(-(-keys // block_size)):
        start = i * block_size - halo_size
        before, after = max(-start, 0), max(start + w - keys, 0)
        sides = (before, after) if before and after else ()
        found.setdefault((min(side, queries - i * side), w - before - after, sides), []).append((i, before, after))
    groups = []
    for (count, inside, _), blocks in found.items():
        (i, before, after), (last, before_last, _) = blocks[0], blocks[-1]
        places = (
            [(before, 0), (after, before + inside)] if before and after else [(w - inside, 0 if before else inside)]
        )
        change = inside if before and not before_last else 0
        outside = tuple((n, place, change) for n, place in places if n)
        step = (last - i) // max(len(blocks) - 1, 1)
        groups.append(_Blocks(i, step, len(blocks), count, inside, (before, before_last - before), outside))
    return groups


def _cut(t: Tensor, first: tuple[int, int], step: tuple[int, int], sizes: tuple[int, int, int, int]) -> Tensor:
    """Parts of a map ``[B, H, W, h, c]`` as a view ``[B, blocks, blocks, rows, columns, h, c]``; they may overlap.

    Args:
        t: The map.
        first: Row and column where the first part begins.
        step: Between the beginnings of two parts.
        sizes: Blocks of both axes, rows and columns of each.
    """
    sb, si, sj, sh, sc = t.stride()
    offset = t.storage_offset() + si * first[0] + sj * first[1]
    shape = t.shape[0], *sizes, t.shape[3], t.shape[4]
    return t.as_strided(shape, (sb, si * step[0], sj * step[1], si, sj, sh, sc), offset)


def _joint(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values ``[B, H, W, h, d + dv]``, without a copy if they are halves of one tensor."""
    d, dv = k.shape[4], v.shape[4]
    adjacent = v.storage_offset() == k.storage_offset() + d and k.stride() == v.stride() and k.stride(4) == 1
    if adjacent and k.stride(3) == d + dv and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
        return k.as_strided((*k.shape[:4], d + dv), k.stride())
    return torch.cat([k, v], 4)


def _terms(x: Tensor, axis: int, blocks: _Blocks, offset: int, step: int, one_more: bool, fill: int) -> Tensor:
    """Relative terms of the keys that windows have on one axis.

    A zero key off the map has the relative term alone as its logit, and a zero value.  One more key stands for all of
    them, with the log-sum of their terms.

    Args:
        x: Products of the queries with both tables ``[B, blocks, blocks, rows, columns, h, 2 rows of a table]``.
        axis: 0 for rows and 1 for columns.
        blocks: What windows see on this axis.
        offset: Product of the first query with the relative term of the first place in its window.
        step: Rows of the table from one query to the one before it.
        one_more: Whether keys off the map take part.
        fill: Keys that follow, and that nobody sees.

    Returns:
        ``[B, blocks, blocks, h, rows, columns, keys]``.
    """

    def places(count: int, first: int, change: int) -> Tensor:
        stride = list(x.stride())
        stride[1 + axis] += change
        stride[3 + axis] -= step
        stride[6] = 1
        return x.as_strided((*x.shape[:6], count), stride, offset + first).permute(0, 1, 2, 5, 3, 4, 6)

    terms = places(blocks.keys, *blocks.first)
    if one_more:
        outside = [places(*some) for some in blocks.outside]
        both = outside[0] if len(outside) == 1 else torch.cat(outside, -1)
        terms = torch.cat([terms, both.logsumexp(-1, keepdim=True)], -1)
    return F.pad(terms, [0, fill], value=float("-inf")) if fill else terms


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of ``[n, h, tokens, c]`` each; the bias ``[n, h, queries, keys]`` is overwritten."""
    if q.shape[3] == v.shape[3]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # PyTorch has no fused form for values of another width
    q, k, v = (t.to(bias.dtype).flatten(0, 1) for t in (q, k, v))
    p = bias.flatten(0, 1).baddbmm_(q, k.transpose(1, 2), alpha=scale)
    return (torch.softmax(p, -1, out=p) @ v).view(*bias.shape[:3], -1)


def _fused_forward(
    q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel
) -> Tensor:
    """PyTorch's fused attention for blocks that lie on the map alike, with relative terms as its mask."""
    (B, QH, QW, h, d), dv, b, r = q.shape, v.shape[4], block_size, halo_size
    side, w, step, wide = b // stride, b + 2 * r, stride if pixel else 1, _work_dtype(q)
    used = (side - 1) * step + w  # the rows of a table before are never read
    tables = (torch.cat([height_rel[-used:], width_rel[-used:]]).to(wide) * rel_scale).t()
    kv, out = _joint(k, v), q.new_empty(B, QH, QW, h, dv)
    narrow = q.dtype if multiplies(q) else wide
    limit = FUSED_CHUNK * (torch.get_num_threads() if q.device.type == "cpu" else 64)
    axes = [_axis(q.shape[i], k.shape[i], b, r, stride) for i in (1, 2)]
    for rows, cols in itertools.product(*axes):
        more = [not mask and len(x.outside) > 0 for x in (rows, cols)]
        fill = -(cols.keys + more[1]) % 16
        fill = fill if fill <= 3 else 0  # PyTorch adds whole sixteens at once, and what is left one by one
        m, n, L = rows.keys + more[0], cols.keys + more[1] + fill, rows.queries * cols.queries
        line = cols.blocks * h * m * n * (L + d + dv)  # scores, keys and values of a row of blocks
        images, lines = max(1, limit // (line * rows.blocks)), max(1, limit // line)
        count = min(images, B) * min(lines, rows.blocks) * cols.blocks
        scores = torch.empty(count, h, L, m * n, dtype=wide, device=q.device)
        windows = torch.zeros(count, m, n, h, d + dv, dtype=narrow, device=q.device)
        for image, y in itertools.product(range(0, B, images), range(0, rows.blocks, lines)):
            some, up = slice(image, image + images), rows.part(y, min(lines, rows.blocks - y))
            sizes = up.blocks, cols.blocks
            begin, to_next = (up.block * side, cols.block * side), (up.step * side, cols.step * side)
            own = begin, to_next, (*sizes, up.queries, cols.queries)
            queries = _cut(q[some], *own).to(narrow)
            shape = queries.shape  # [images, blocks, blocks, rows, columns, h, d]
            queries = queries.reshape(-1, L, h, d)
            count = queries.shape[0]
            x = torch.mm(queries.reshape(-1, d).to(wide), tables).view(*shape[:6], 2 * used)
            first = (side - 1) * step
            down = _terms(x, 0, up, first, step, more[0], 0)
            right = _terms(x, 1, cols, first + used, step, more[1], fill)
            bias = scores[:count]
            torch.add(down.unsqueeze(7), right.unsqueeze(6), out=bias.view(*down.shape[:6], m, n))
            begin = tuple(x.block * b - r + x.first[0] for x in (up, cols))
            to_next = tuple(x.step * b + x.first[1] for x in (up, cols))
            part = _cut(kv[some], begin, to_next, (*sizes, up.keys, cols.keys))
            windows[:count, : up.keys, : cols.keys].view(part.shape).copy_(part)
            keys, values = windows[:count].view(count, m * n, h, d + dv).transpose(1, 2).split([d, dv], 3)
            attended = _attend(queries.transpose(1, 2), keys, values, bias, scale)
            _cut(out[some], *own).copy_(attended.transpose(1, 2).reshape(*shape[:6], dv))
    return out


def _chunked_backward(dout, q, k, v, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = _Chunks(q, k, v, *args)
    H, W, d, side, w = q.shape[1], q.shape[2], chunks.d, chunks.side, chunks.w
    grads = chunks.blocks(dout)
    dq = torch.empty(q.shape[0], chunks.nh * side, chunks.nw * side, *q.shape[3:], dtype=q.dtype, device=q.device)
    dblocks = chunks.blocks(dq)
    dkv, dtables = torch.zeros_like(chunks.kv), torch.zeros_like(chunks.tables)
    for at in chunks:
        queries, keys, values, p = chunks.weights(at)
        n, L = queries.shape[:2]
        grad = grads[at].to(chunks.dtype).reshape(n, L, -1)
        dvalues = p.transpose(1, 2) @ grad
        ds = (grad @ values.transpose(1, 2)).mul_(p)
        ds.addcmul_(p, ds.sum(2, keepdim=True), value=-1)
        dkeys = torch.bmm(ds.transpose(1, 2), queries).mul_(chunks.scale)
        chunks.fold(dkv, torch.cat([dkeys, dvalues], 2), at)
        dx = ds.new_zeros(n, side, side, chunks.tables.shape[0])
        rows, cols = chunks.skewed(dx)
        ds4 = ds.view(n, side, side, w, w)
        rows.copy_(ds4.sum(4))
        cols.copy_(ds4.sum(3))
        dx = dx.view(n * L, -1)
        dqueries = torch.addmm((ds @ keys).view(n * L, d), dx, chunks.tables, beta=chunks.scale)
        target = dblocks[at]
        target.copy_(dqueries.view(target.shape))
        dtables.addmm_(dx.t(), queries.flatten(0, 1))
    dmap = dkv[chunks.inside].permute(0, 2, 3, 1, 4)
    dk, dv = (t.to(q.dtype, copy=True, memory_format=torch.contiguous_format) for t in dmap.tensor_split([d], 4))
    return dq[:, :H, :W].contiguous(), dk, dv, *(dtables * chunks.rel_scale).chunk(2)


@operator
def _halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    rel_scale: float,
    mask: bool,
    pixel: bool,
    triton_kernel: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args = q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel
    if triton_kernel:
        return kernels.kernel_forward(train, *args)
    with without_autocast(q):
        out = _fused_forward(*args)
    return out, out.new_empty(0), out.new_empty(0, dtype=torch.float32)


@torch.library.register_fake("vizoo::halo_attention")
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel, kernel, train):
    out = v.new_empty(*q.shape[:4], v.shape[4])
    rest = v.new_empty(out.shape if kernel and train and v.dtype != torch.float32 else 0)
    return out, rest, q.new_empty(q.shape[:4] if kernel else 0, dtype=torch.float32)


@operator
def _halo_attention_backward(
    dout: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
    rel_scale: float,
    mask: bool,
    pixel: bool,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel
    if triton_kernel:
        dq, dk, dv, *dtables = kernels.kernel_backward(dout, out, rest, lse, *args)
    else:
        with without_autocast(q):
            dq, dk, dv, *dtables = _chunked_backward(dout, *args)
    unread = height_rel.shape[0] - dtables[0].shape[0]
    drows, dcols = (F.pad(t, [0, 0, unread, 0]) for t in dtables)
    return dq, dk, dv, drows.to(height_rel.dtype), dcols.to(width_rel.dtype)


@torch.library.register_fake("vizoo::halo_attention_backward")
def _(dout, out, rest, lse, q, k, v, height_rel, width_rel, *args):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, height_rel, width_rel))


def _save(ctx, inputs, output) -> None:
    ctx.sizes = inputs[5:-1]
    out, rest, lse = output
    ctx.save_for_backward(*inputs[:5], out if inputs[-2] else rest, rest, lse)  # only kernels need the output
    ctx.mark_non_differentiable(rest, lse)


def _differentiate(ctx, dout, *_):
    *tensors, out, rest, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        sizes = ctx.sizes[:-1]  # without the choice of kernel
        grads = plain_gradients(lambda *t: _plain_form(*t, *sizes), tensors, dout, ctx.needs_input_grad[:5])
        return *grads, *[None] * (len(ctx.sizes) + 1)
    return *_halo_attention_backward(dout, out, rest, lse, *tensors, *ctx.sizes), *[None] * (len(ctx.sizes) + 1)


torch.library.register_autograd("vizoo::halo_attention", _differentiate, setup_context=_save)


def _scores(q, k, block_size, halo_size, stride) -> tuple[int, int, int]:
    """Queries with those that fill the last blocks, times heads; keys of each; products of each with both tables."""
    B, H, W, h, _ = k
    side, w = block_size // stride, block_size + 2 * halo_size
    return B * -(-H // block_size) * -(-W // block_size) * side * side * h, w * w, 2 * (2 * w - 1)


@register_cost("vizoo::halo_attention", torch.ops.vizoo.halo_attention)
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, *args, out=None) -> Cost:
    queries, keys, rows = _scores(q, k, block_size, halo_size, stride)
    return Cost(
        macs=queries * (keys * (q[4] + v[4]) + rows * q[4]),
        other=queries * keys * 8,  # scale, two relative terms, softmax
        acts=queries * (keys + rows + v[4]),
    )


@register_cost("vizoo::halo_attention_backward", torch.ops.vizoo.halo_attention_backward)
def _(dout, o, rest, lse, q, k, v, height_rel, width_rel, block_size, halo_size, stride, *args, out=None) -> Cost:
    # the gradients' products; the recomputed weights are not counted, so that no path counts more
    queries, keys, rows = _scores(q, k, block_size, halo_size, stride)
    return Cost(macs=2 * queries * (keys * (q[4] + v[4]) + rows * q[4]), other=queries * keys * 8)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    scale: float | None = None,
    scale_pos_embed: bool = False,
    pad_mode: str = "zero",
    rel_index: str = "array",
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_halo_attention` a few blocks at a time or by fused Triton kernels: same result and errors.

    Exported and scripted programs hold the plain operators of the reference.

    Args:
        q: Queries ``[B, ceil(H / stride), ceil(W / stride), h, d]``.
        k: Keys ``[B, H, W, h, d]``.
        v: Values ``[B, H, W, h, dv]``.  Take both from ``kv.split([d, dv], -1)``: the views are read in place, and
            their gradients are joined by one copy.
        height_rel: Relative rows ``[2 * w - 1, d]`` with ``w = block_size + 2 * halo_size``.
        width_rel: Relative columns, same shape.
        block_size: Side of a block of keys.
        halo_size: Pixels by which the window of a block exceeds it on every side.
        stride: Distance of neighbouring queries, a divisor of ``block_size``.
        scale: Factor of ``<q, k>``; None for ``d ** -0.5``.
        scale_pos_embed: Whether it also applies to the relative terms.
        pad_mode: ``"zero"`` or ``"mask"``.
        rel_index: ``"array"`` or ``"pixel"``.
        backend: ``"torch"``, ``"triton"`` (no float64, ``d <= 128``, ``dv <= 256``), or ``"auto"``: Triton where it can
            run.

    Returns:
        ``[B, ceil(H / stride), ceil(W / stride), h, dv]`` in the dtype of ``v``.

    Raises:
        ValueError: If an argument is outside its range, the shapes do not fit each other, or ``backend`` cannot run.
    """
    _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, pad_mode, rel_index)
    scale = q.shape[4] ** -0.5 if scale is None else scale
    rel_scale = scale if scale_pos_embed else 1.0
    mask, pixel = pad_mode == "mask", rel_index == "pixel"
    if not torch.jit.is_scripting():
        rows = (block_size // stride - 1) * (stride if pixel else 1) + block_size + 2 * halo_size
        use = use_triton(backend, v, _kernel_limits(q, v, rows))
        if not plain_only():
            common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            tensors = q.to(common), k.to(common), v.to(common), height_rel, width_rel
            train = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            sizes = block_size, halo_size, stride, scale, rel_scale, mask, pixel
            out, _, _ = _halo_attention(*tensors, *sizes, use, train)
            return out.to(v.dtype)
        with without_autocast(q):
            return _plain_form(
                q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel
            )
    return _plain_form(q, k, v, height_rel, width_rel, block_size, halo_size, stride, scale, rel_scale, mask, pixel)


def _kernel_limits(q: Tensor, v: Tensor, rows: int) -> str:
    """What the kernels cannot do with these queries, values and rows of a table; empty if nothing."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    if max(2 * q.shape[4], v.shape[4]) > MAX_CHANNELS:
        return (
            f"the kernels take up to {MAX_CHANNELS} channels per head, half in queries, not {q.shape[4]}, {v.shape[4]}"
        )
    if rows > MAX_ROWS:
        return f"the kernels take tables with up to {MAX_ROWS} rows in use, not {rows}"
    if q.shape[4] > MAX_TABLE // power_of_two(rows):
        return f"the kernels take tables with up to {MAX_TABLE} numbers in use, not {rows} rows of {q.shape[4]}"
    return ""
