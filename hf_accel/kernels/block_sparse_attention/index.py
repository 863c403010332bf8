"""Block maps (bool) and block indices (lists of kept blocks): the same choice in two forms, and their transposes.

Nothing here waits for the device.
"""

from __future__ import annotations

import torch


def block_map_to_index(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List the kept key blocks of every row of blocks.

    ``block_map`` is bool ``[..., nq, nk]``. Returns ``index`` int32 ``[..., nq, nk]``, whose first ``count``
    entries are the kept ids in ascending order and whose other entries are the ids that are not kept, and
    ``count`` int32 ``[..., nq]``. Does not wait for the device; cut ``index[..., :max_keep]`` if a bound on
    the count is known.
    """
    ids = torch.arange(block_map.shape[-1], dtype=torch.int32, device=block_map.device).expand(block_map.shape)
    return _move_to_front(ids, block_map), block_map.sum(-1, dtype=torch.int32)


def index_to_block_map(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """The inverse: bool ``[..., nq, key_blocks]`` from int32 ``[..., nq, max_keep]`` and ``[..., nq]``."""
    # Entries that do not count go to one more column, which is cut off.
    ids = torch.where(listed(index, count), index, key_blocks).long()
    block_map = torch.zeros(*index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=index.device)
    return block_map.scatter_(-1, ids, True)[..., :key_blocks]


def transpose_index(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """List, for every key block, the query blocks that keep it, ascending.

    ``index`` int32 ``[..., nq, max_keep]`` and ``count`` int32 ``[..., nq]`` become int32
    ``[..., key_blocks, nq]`` and ``[..., key_blocks]``.
    """
    return block_map_to_index(index_to_block_map(index, count, key_blocks).mT)


def listed(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which entries of ``index`` ``[..., n, max_keep]`` count: bool of its shape."""
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]


def split_index(
    index: torch.Tensor,
    count: torch.Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the blocks that need no mask to the front of each row, then those that need one.

    A mask is needed where the causal diagonal crosses and in a ragged last key block. Blocks wholly above the
    diagonal are dropped. ``lengths`` is ``(Sq, Sk)``. Returns the reordered index (of the same shape), and how
    many entries are plain and how many masked, int32 ``[..., nq]`` both.
    """
    rows = torch.arange(index.shape[-2], device=index.device)[:, None]
    counts = listed(index, count)
    if causal:
        visible, whole = causal_blocks(rows, index, block_size, lengths)
        counts = counts & visible
    else:
        whole = index < lengths[1] // block_size[1]
    return _split(index, counts & whole, counts & ~whole)


def split_transposed_index(
    index: torch.Tensor,
    count: torch.Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`split_index` does, for a causal call and the index of :func:`transpose_index`."""
    columns = torch.arange(index.shape[-2], device=index.device)[:, None]
    visible, whole = causal_blocks(index, columns, block_size, lengths)
    counts = listed(index, count) & visible
    return _split(index, counts & whole, counts & ~whole)


def causal_blocks(
    row: torch.Tensor, column: torch.Tensor, block_size: tuple[int, int], lengths: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For query block ``row`` and key block ``column``: does a pair of tokens count, and does every pair?

    Queries are aligned to the end of the keys: query i stands at position ``i + Sk - Sq`` and sees the keys up to
    its own position. A ragged last key block is never whole.
    """
    offset = lengths[1] - lengths[0]
    first = row * block_size[0] + offset
    last = (row * block_size[0] + block_size[0] - 1).clamp(max=lengths[0] - 1) + offset
    return column * block_size[1] <= last, column * block_size[1] + block_size[1] - 1 <= first


def _split(
    index: torch.Tensor, plain: torch.Tensor, masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group = (~plain).to(torch.uint8) + ~(plain | masked)
    return _sort_by(index, group, 3), plain.sum(-1, dtype=torch.int32), masked.sum(-1, dtype=torch.int32)


def _move_to_front(index: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    return _sort_by(index, (~first).to(torch.uint8), 2)


def _sort_by(index: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Stable sort of each row by a small ``group`` number: one prefix sum per group is less than a sort."""
    # In 32 bits: at 75,000 tokens and 40 heads an index has 14 million entries.
    place = torch.zeros_like(group, dtype=torch.int32)
    before = torch.full_like(place[..., :1], -1)
    for g in range(groups):
        member = group == g
        place = torch.where(member, before + member.cumsum(-1, dtype=torch.int32), place)
        before = before + member.sum(-1, keepdim=True, dtype=torch.int32)
    return torch.empty(index.shape, dtype=index.dtype, device=index.device).scatter_(-1, place.long(), index)
