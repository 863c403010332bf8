"""Block maps (bool) and block indices (lists of kept blocks): the same choice in two forms."""

from __future__ import annotations

import torch


def block_map_to_index(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List the kept key blocks of every row of blocks.

    ``block_map`` is bool ``[..., nq, nk]``. Returns ``index`` int32 ``[..., nq, nk]``, whose first ``count``
    entries are the kept ids in ascending order and whose other entries are the ids that are not kept, and
    ``count`` int32 ``[..., nq]``. Does not wait for the device; cut ``index[..., :max_keep]`` if a bound on
    the count is known.
    """
    count = block_map.sum(-1, dtype=torch.int32)
    # A stable sort that puts True first keeps the ids ascending among themselves.
    index = torch.argsort(block_map.to(torch.uint8), dim=-1, descending=True, stable=True)
    return index.to(torch.int32), count


def index_to_block_map(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """The inverse: bool ``[..., nq, key_blocks]`` from int32 ``[..., nq, max_keep]`` and ``[..., nq]``."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    # Entries that do not count go to one more column, which is cut off.
    ids = torch.where(listed, index, key_blocks).long()
    block_map = torch.zeros(*index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=index.device)
    return block_map.scatter_(-1, ids, True)[..., :key_blocks]
