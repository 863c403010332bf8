"""The Hilbert curve through a grid of tokens: neighbours on the curve are neighbours in space and time.

Blocks of consecutive tokens become compact boxes instead of strips of rows, so that their means say more about them
(SpargeAttention, arXiv 2502.18137, section 3.7).
"""

from __future__ import annotations

import torch


def hilbert_order(frames: int, height: int, width: int) -> torch.Tensor:
    """Order of the tokens of a frame-major grid along a Hilbert curve.

    ``x[order]`` is ``x`` along the curve. The curve fills the smallest cube (with one frame: square) with a power of
    two for a side that holds the grid, and places outside the grid are left out: it steps to a neighbour wherever it
    does not leave the grid.

    Args:
        frames, height, width: size of the grid.

    Returns:
        int64 ``[frames * height * width]``, a permutation, on the CPU.
    """
    sides = [side for side in (frames, height, width) if side > 1] or [1]
    axes = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    bits = max(1, (max(sides) - 1).bit_length())
    return _position([axis.flatten() for axis in axes], bits).argsort()


def _position(axes: list[torch.Tensor], bits: int) -> torch.Tensor:
    """Position on the curve of points given by coordinates below ``2**bits``, any number of dims.

    Method: J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004), 381-387.
    """
    axes = [axis.clone() for axis in axes]
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            flip = (axes[i] >> bit) & 1 == 1
            # Where the bit is set the low bits of the first axis are mirrored, elsewhere exchanged with this axis's.
            exchange = torch.where(flip, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(flip, axes[0] ^ low, axes[0] ^ exchange)
            axes[i] = axes[i] ^ exchange if i else axes[0]
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    gray = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        gray = torch.where((axes[-1] >> bit) & 1 == 1, gray ^ ((1 << bit) - 1), gray)
    position = torch.zeros_like(gray)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            position = position << 1 | ((axis ^ gray) >> bit) & 1
    return position
