"""Lists of kept blocks, as the Triton kernels read them (imports triton).

A block list is ``index`` int32 ``[B or 1, H or 1, rows, max_listed]`` with a count per row. A program takes one tile of
rows, a whole fraction of a block, and goes through the tiles of the blocks that its row lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.tile import Tile, padded_head_dim, precision


@triton.jit
def locate_tile(num_blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Group ``batch * num_heads + head`` (int64) of this program, and its tile within the group's ``num_blocks``.

    Groups in order, so that programs in flight share K and V in L2. The last tiles of a ragged sequence are empty.
    """
    # The caller splits the group after it has left for an empty tile: 64-bit divisions are slow.
    tiles = num_blocks * (BLOCK // TILE)
    pid = tl.program_id(0)
    return (pid // tiles).to(tl.int64), pid % tiles


@triton.jit
def list_row(batch, head, tile, batch_step, head_step, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The row of the index that a tile belongs to; the steps are those of :func:`list_steps`."""
    return batch * batch_step + head * head_step + tile // (BLOCK // TILE)


@triton.jit
def find_block(List, count, wanted):
    """The place of block ``wanted`` in a list of ``count``; ``count`` if it is not there."""
    place = count
    for i in range(0, count, 128):
        entry = i + tl.arange(0, 128)
        ids = tl.load(List + entry, mask=entry < count, other=0)
        place = tl.minimum(place, tl.min(tl.where((ids == wanted) & (entry < count), entry, count), 0))
    return place


@triton.jit
def first_block(List, tiles, skipped=None):
    """The block of tile 0; 0 if there are no ``tiles``. ``skipped``: a place in the list that is passed over."""
    if skipped is not None:
        List += (skipped == 0).to(tl.int32)
    return tl.load(List, mask=tiles > 0, other=0)


@triton.jit
def block_ahead(List, t, tiles, BLOCK: tl.constexpr, TILE: tl.constexpr, skipped=None):
    """The block of the tile after tile ``t`` of ``tiles``.

    Loaded ahead and carried in a register: loaded where it is used, it would be one more stage of Triton's load
    pipeline, and K and V would be waited for as soon as they are asked for.
    """
    entry = tl.minimum(t + 1, tiles - 1) // (BLOCK // TILE)
    if skipped is not None:
        entry += (entry >= skipped).to(tl.int32)
    return tl.load(List + entry)


@triton.jit
def tile_rows(block, t, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Rows ``[TILE]`` of tile ``t`` of a list, which lies in ``block``."""
    return block * BLOCK + (t % (BLOCK // TILE)) * TILE + tl.arange(0, TILE)


@triton.jit
def rows_that_count(Valid, batch, rows, length, HAS_VALID: tl.constexpr, INSIDE: tl.constexpr = False):
    """Bool like ``rows``: inside of ``length`` and, if HAS_VALID, not hidden by ``Valid`` (uint8 ``[B, length]``).

    INSIDE: all rows are known to be inside. Without HAS_VALID nobody reads the result then.
    """
    if INSIDE:
        counts = rows
        if HAS_VALID:
            counts = tl.load(Valid + batch * length + rows) != 0
    else:
        counts = rows < length
        if HAS_VALID:
            counts = tl.load(Valid + batch * length + rows, mask=counts, other=0) != 0
    return counts


def list_steps(index: torch.Tensor | None) -> tuple[int, int]:
    """Rows from one batch item (head) to the next in an index ``[B or 1, H or 1, rows, n]``; 0 where they share."""
    if index is None:
        return 0, 0
    batch, heads, rows, _ = index.shape
    return heads * rows * (batch > 1), rows * (heads > 1)


def tile_constexprs(tile: Tile, block_size: tuple[int, int], head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs that every kernel over blocks of ``(queries, keys)`` has."""
    return {
        "QUERY_BLOCK": block_size[0],
        "KEY_BLOCK": block_size[1],
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": precision(dtype),
    }
