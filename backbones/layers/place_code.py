"""Codes of places and steps for transformers over the objects of a scene (OAT).

The place code has one property, cosine ``exp(-distance^2 / (2 sigma^2))`` between two places.  OAT's official tables
are fits of it by gradient descent; this is its closed form, up to a rotation.  It samples the Gaussian's spectrum at
equal steps: 22 channels are right to 0.002 for 14 columns, where as many of Gauss-Hermite nodes repeat after 6.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import NATURAL, checked, need

__all__ = ["PlaceCode", "step_code"]

PLACE_CODES = ("gauss", "original", "exp1", "exp2", "linear")


def step_code(length: int, dim: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """The sinusoidal code of decoding steps (sine on even channels).

    Args:
        length: Number of steps.
        dim: Channels, an even number.
        start: The first step.
        device: Device of the result.

    Returns:
        ``[length, dim]`` in float32.

    Raises:
        ValueError: If ``dim`` is odd.
    """
    need(dim % 2 == 0, "an even number", dim=dim)
    frequency = 10000 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


def gaussian_nodes(channels: int, sigma: float, reach: float) -> tuple[list[float], list[float]]:
    """Frequencies ``w`` and weights ``b`` for which ``sum(b * cos(w * x))`` is ``exp(-x^2 / (2 sigma^2))``.

    The Gaussian's spectrum is sampled at the middle of equal steps.  The step balances the two errors: what is cut off
    above the last frequency, and the alternating copy of the Gaussian one period away.

    Args:
        channels: Even number, two for each frequency.
        sigma: Width of the Gaussian.
        reach: Largest distance that occurs.

    Returns:
        Frequencies and weights of sum 1, by falling weight.

    Raises:
        ValueError: If the sum would be off by more than about 0.05 within reach.
    """
    n, span = channels // 2, min(reach / sigma, 1e6)
    step = (math.sqrt(span**2 + 4 * math.pi * n) - span) / (2 * n)  # n * step == 2 * pi / step - span
    apart = math.exp(-((n * step) ** 2) / 2) <= 0.1
    words = f"a larger one, or more than {channels} channels, to tell {reach:g} places of a coordinate apart"
    need(apart, words, pe_sigma=sigma)
    nodes = [(k + 0.5) * step for k in range(n)]
    weights = [math.exp(-(t**2) / 2) for t in nodes]
    return [t / sigma for t in nodes], [b / sum(weights) for b in weights]


class PlaceCode(nn.Module):
    """Codes of (row, column, flag): one fixed function, applied to each and concatenated.

    ``"gauss"`` gives codes of norm ``norm`` whose cosine is ``exp(-distance^2 / (2 sigma^2))``, for real coordinates
    too; the other kinds are the sinusoids of the official code.

    Args:
        dim: Channels of the concatenation.
        grid: Rows and columns of the scene.
        kind: One of ``PLACE_CODES``.
        sigma: Width of the Gaussian.
        norm: Length of the code of one coordinate.
        alpha: Exponent or factor of the kinds ``exp1``, ``exp2`` and ``linear``.
        table: Codes ``[places, at least dim / 3]`` to look up instead; coordinates are cut to integers, zero beyond.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(alpha=NATURAL, kind=PLACE_CODES)
    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        kind: str = "gauss",
        sigma: float = 2.0,
        norm: float = 8.76,
        alpha: float = 0.9,
        table: Tensor | Sequence[Sequence[float]] | None = None,
    ):
        super().__init__()
        self.dim, self.kind = dim, kind
        self.zero_row = max(3, grid[0])  # the official sinusoids know three rows and a row of zeros
        self.table: Tensor | None = None
        channels = 2 * -(-dim // 6)
        k = range(0, channels, 2)
        if table is not None:
            self.table = torch.as_tensor(table, dtype=torch.float32, device="cpu")
            if self.table.ndim != 2 or 3 * self.table.shape[1] < dim or self.table.shape[0] < max(grid):
                raise ValueError(
                    f"got pe_table of shape {list(self.table.shape)}, need at least "
                    f"[{max(grid)}, {-(-dim // 3)}] for a grid of {grid[0]}x{grid[1]}"
                )
        elif kind == "gauss":
            self.frequency, weights = gaussian_nodes(channels, sigma, max(grid))
            self.amplitude = [norm * math.sqrt(b) for b in weights]
        elif kind == "original":
            self.frequency = [10000 ** (-i / channels) for i in k]
        elif kind == "exp1":
            self.frequency = [i**alpha / channels for i in k]
        elif kind == "exp2":
            self.frequency = [(i / channels) ** alpha for i in k]
        else:
            self.frequency = [i * alpha / channels for i in k]

    def _one(self, x: Tensor) -> Tensor:
        """Codes ``[..., d]`` of one coordinate ``[...]``."""
        if self.table is not None:
            last = self.table.shape[0]
            return F.pad(self.table.to(x.device), (0, 0, 0, 1))[x.long().clamp(0, last)]
        angle = x[..., None] * torch.tensor(self.frequency, device=x.device, dtype=x.dtype)
        if self.kind != "gauss":
            return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
        wave = torch.stack((angle.cos(), angle.sin()), -1)
        return (wave * torch.tensor(self.amplitude, device=x.device, dtype=x.dtype)[:, None]).flatten(-2)

    def forward(self, coords: Tensor, flag: Tensor) -> Tensor:
        """Codes of places.

        Args:
            coords: Rows and columns ``[..., 2]``.
            flag: 1 where the target is, else 0, ``[...]``.

        Returns:
            ``[..., dim]`` in at least float32.
        """
        wide = torch.promote_types(coords.dtype, torch.float32)
        x = torch.cat((coords.to(wide), flag[..., None].to(wide)), -1)  # [..., 3]
        code = self._one(x).flatten(-2)[..., : self.dim]
        if self.kind != "gauss" and self.table is None:
            code = code * (x[..., :1].trunc() < self.zero_row)
        return code
