"""Position bias of TransNeXt for compiled inference on a CPU, kept from pass to pass (arXiv 2311.17132, Sec. 3.3).

A small network maps the logarithms of the distances from positions to regions of a map to a bias for each head.  It
depends on the size of the map and the weights alone, but a compiled graph would compute it in every pass.
"""

from __future__ import annotations

from itertools import starmap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .cost import Cost, register_cost
from .operators import operator


class BiasCache:
    """Position biases, which depend on the size of the map only, for inference on a CPU.

    An entry is used as long as the weights that it was made of hold the same numbers: these are compared, as a change
    through ``.data`` or shared memory leaves no other trace.  It goes with the first of these weights.  Copies and
    pickles begin empty.

    Args:
        limit: Bytes of all entries together; what does not fit is made anew in each pass.
    """

    def __init__(self, limit: int = 64 << 20):
        self.limit = limit
        #: by the first weight: key, copies of the weights, bias
        self._entries: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """What copies and pickles are made of."""
        return BiasCache, (self.limit,)

    def find(self, key: Any, weights: list[Any]) -> Tensor | None:
        """The bias for a key, made of the same weights; None if there is none."""
        entry = self._entries.get(weights[0])
        if entry is None or entry[0] != key:
            return None
        same = all(starmap(_are_same, zip(entry[1], weights, strict=True)))
        return entry[2] if same else None

    def keep(self, key: Any, weights: list[Any], bias: Tensor) -> None:
        """Keep the bias of these weights, the last one only, if there is room."""
        self._entries.pop(weights[0], None)
        others = sum(entry[2].nbytes for entry in list(self._entries.values()))
        if others + bias.nbytes <= self.limit:
            self._entries[weights[0]] = key, [None if t is None else t.detach().clone() for t in weights], bias


def _are_same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


_KEPT = BiasCache()  # of all compiled graphs


def relative_positions(length: int, regions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distances on an axis from its positions to the regions of adaptive average pooling.

    A region is where its average is, in the middle of its positions.

    Args:
        length: Positions.
        regions: Regions; as many as positions are the positions themselves.
        device: Device of the result.

    Returns:
        Distances ``[n]`` (float32) that hold all that occur, in order; and the place in them of that of each position
        to each region ``[length, regions]``.
    """
    position, region = torch.arange(length, device=device).unsqueeze(1), torch.arange(regions, device=device)
    # in halves: regions of one size are where each distance is a whole step of two from the next
    whole, ratio = divides(regions, length), length // regions
    middle = region * length // regions + ((region + 1) * length + (regions - 1)) // regions - 1
    least = whole * (1 + ratio - 2 * length) + (1 - whole) * (2 - 2 * length)
    distance = torch.arange(_distances(length, regions), device=device) * (1 + whole) + least
    return distance.float() / 2, (2 * position - middle - least) // (1 + whole)


def _distances(length: int, regions: int) -> int:
    """How many distances :func:`relative_positions` gives; without steps some occur nowhere."""
    whole = divides(regions, length)
    return whole * (2 * length - length // regions) + (1 - whole) * (4 * length - 3)


def divides(regions: int, length: int) -> int:
    """1 if a number divides another, else 0; also a number while tracing, and 0 for free sizes of exported programs."""
    if not torch.jit.is_scripting():
        if isinstance(length, Tensor) or isinstance(regions, Tensor):
            return torch.as_tensor(length % regions == 0).long()  # type: ignore[return-value]
        if isinstance(length, torch.SymInt) or isinstance(regions, torch.SymInt):
            return 0
    return int(length % regions == 0)


def log_distances(down: Tensor, right: Tensor, pretrain_map: tuple[int, int]) -> Tensor:
    """What the network maps ``[m, n, 2]``: signed logarithms of distances ``[m]`` and ``[n]``, in units of a map."""
    down, right = down / (pretrain_map[0] - 1) * 8, right / (pretrain_map[1] - 1) * 8
    distances = torch.stack(torch.meshgrid(down, right, indexing="ij"), -1)
    return distances.sign() * (distances.abs() + 1).log2() / 3


def spread(table: Tensor, row_index: Tensor, col_index: Tensor) -> Tensor:
    """Bias ``[h, H * W, rows * cols]`` from that of each distance ``[m, n, h]``, by its place on both axes.

    Keys are before queries in memory, as aggregated attention reads it.
    """
    H, rows = row_index.shape
    W, cols = col_index.shape
    table = table.permute(2, 0, 1).index_select(1, row_index.flatten()).index_select(2, col_index.flatten())
    return table.reshape(-1, H, rows, W, cols).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2).transpose(1, 2)


@operator
def _position_bias(
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    H: int,
    W: int,
    rows: int,
    cols: int,
    pretrain_rows: int,
    pretrain_cols: int,
) -> Tensor:
    """Bias of a map, for a call that ``fuses`` has found to fit; a copy, as a compiler reuses the memory of its values.

    Args:
        weight: Of the first layer of the network ``[hidden, 2]``.
        bias: ``[hidden]`` or None.
        second: Of the second layer ``[h, hidden]``.
        second_bias: ``[h]`` or None.
        H: Rows of the map.
        W: Columns.
        rows: Rows of its regions.
        cols: Columns.
        pretrain_rows: Rows of the map by which distances are measured.
        pretrain_cols: Columns.

    Returns:
        ``[h, H * W, rows * cols]``, the transpose of a dense tensor, in float32.
    """
    key, weights = (H, W, rows, cols, pretrain_rows, pretrain_cols), [weight, bias, second, second_bias]
    found = _KEPT.find(key, weights)
    if found is None:
        (down, row_index), (right, col_index) = (relative_positions(*n, weight.device) for n in ((H, rows), (W, cols)))
        w1, b1, w2, b2 = (None if t is None else t.float() for t in weights)
        hidden = F.relu(F.linear(log_distances(down, right, (pretrain_rows, pretrain_cols)), w1, b1))  # type: ignore
        found = spread(F.linear(hidden, w2, b2), row_index, col_index)  # type: ignore[arg-type]
        _KEPT.keep(key, weights, found)
    return found.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


position_bias = torch.ops.vizoo.position_bias


@torch.library.register_fake("vizoo::position_bias")
def _(weight, bias, second, second_bias, H, W, rows, cols, pretrain_rows, pretrain_cols):
    return second.new_empty((second.shape[0], rows * cols, H * W), dtype=torch.float32).transpose(1, 2)


@register_cost("vizoo::position_bias")
def _cost(
    weight: Any, bias: Any, second: Any, second_bias: Any, H: int, W: int, rows: int, cols: int, *args: Any, out: Any
) -> Cost:
    pairs = _distances(H, rows) * _distances(W, cols)
    hidden, heads = pairs * weight[0], pairs * second[0]
    return Cost(
        macs=2 * hidden + second[1] * heads,
        other=hidden * (1 + (bias is not None)) + heads * (second_bias is not None) + 10 * pairs,  # logarithms
        acts=hidden + heads,
    )
