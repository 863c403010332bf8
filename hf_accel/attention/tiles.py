"""Tiles of a token grid: boxes of neighbouring tokens, tile by tile, and static maps between them.

A grid that its tiles do not divide has smaller tiles at its far ends; nothing is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Tiling:
    """A grid ``(frames, height, width)`` of tokens cut into tiles of ``size`` along the same axes.

    Attributes:
        grid: tokens along each axis.
        size: tokens of a tile along each axis; more than the grid has means all of them.
    """

    grid: Size
    size: Size

    @property
    def counts(self) -> Size:
        """Tiles along each axis."""
        return tuple(-(-n // s) for n, s in zip(self.grid, self.size, strict=True))  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def even(self) -> int | None:
        """Tokens of a tile if all tiles are alike, else None."""
        size = [min(s, n) for n, s in zip(self.grid, self.size, strict=True)]
        alike = all(n % s == 0 for n, s in zip(self.grid, size, strict=True))
        return math.prod(size) if alike else None

    def sizes(self) -> torch.Tensor:
        """Tokens of every tile, int64 ``[tiles]``, tiles in raster order."""
        axes = [(n - torch.arange(0, n, s)).clamp(max=s) for n, s in zip(self.grid, self.size, strict=True)]
        return (axes[0][:, None, None] * axes[1][:, None] * axes[2]).flatten()

    def labels(self) -> torch.Tensor:
        """The tile of every token, int64 ``[tokens]``, tokens in raster order."""
        axes = [torch.arange(n) // s for n, s in zip(self.grid, self.size, strict=True)]
        _, rows, columns = self.counts
        return ((axes[0][:, None, None] * rows + axes[1][:, None]) * columns + axes[2]).flatten()

    def order(self) -> torch.Tensor:
        """Tokens tile by tile: int64 ``[tokens]``, place r holds raster token ``order[r]``.

        Tiles stand in raster order, and so do the tokens within a tile.
        """
        return torch.argsort(self.labels(), stable=True)


def fill_tiles(sizes: torch.Tensor, block: int) -> torch.Tensor:
    """Which rows hold a token once every tile is filled up to whole blocks: bool, tile by tile, tokens first.

    ``sizes`` are the tokens of the tiles, int64 ``[tiles]``.
    """
    full = -(-sizes // block) * block
    tile = torch.repeat_interleave(full)
    place = torch.arange(len(tile)) - (full.cumsum(0) - full)[tile]
    return place < sizes[tile]


def neighbour_map(counts: Size, radius: int) -> torch.Tensor:
    """Which tiles lie within ``radius`` tiles along every axis: bool ``[tiles, tiles]``, clipped at the borders."""
    keep = torch.ones(1, 1, dtype=torch.bool)
    for count in counts:
        place = torch.arange(count)
        keep = _along(keep, (place[:, None] - place).abs() <= radius)
    return keep


def cross_map(counts: Size, axes: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    """Which tiles share their place on at least one of ``axes``: bool ``[tiles, tiles]``, a union of planes.

    A row of it keeps ``tiles - prod(counts[a] - 1 for a in axes) * prod(the other counts)`` tiles.
    """
    apart = torch.ones(1, 1, dtype=torch.bool)
    for axis, count in enumerate(counts):
        differ = ~torch.eye(count, dtype=torch.bool)
        apart = _along(apart, differ if axis in axes else torch.ones_like(differ))
    return ~apart


def _along(keep: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """The map of a grid with one more, innermost axis: ``keep and axis``."""
    grown = keep[:, None, :, None] & axis[None, :, None, :]
    return grown.reshape(keep.shape[0] * axis.shape[0], -1)
