"""Which pairs of blocks the linear branch covers, and the shorter way to sum over them."""

from __future__ import annotations

import torch

from hf_accel.kernels.block_sparse_attention.index import block_map_to_index, index_to_block_map

LINEAR_SCOPES: tuple[str, ...] = ("marginal", "rest", "all")


def linear_block_map(
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    skip_index: torch.Tensor | None,
    skip_count: torch.Tensor | None,
    linear_scope: str,
    key_blocks: int,
) -> torch.Tensor | None:
    """bool ``[B or 1, H or 1, nq, nk]``: the pairs of the scope; None for ``"all"``, where it is every pair.

    Skip lists are given with ``"marginal"`` and only then.
    """
    if linear_scope == "all":
        return None
    included = ~index_to_block_map(block_index, block_count, key_blocks)
    if skip_index is not None and skip_count is not None:
        included = included & ~index_to_block_map(skip_index, skip_count, key_blocks)
    return included


def shorter_lists(
    included: torch.Tensor, subtracted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row of ``included`` ``[..., n]`` the shorter of two lists: the pairs it has, or those it lacks.

    Returns ids int32 ``[..., max(1, n // 2)]``, counts int32 ``[...]`` and ``direct`` uint8 ``[...]``: 1 where
    the row is the sum over its list, 0 where it is the total over all blocks minus the sum over its list. So
    no row sums more than half of the blocks, what is subtracted is never the larger part by number of blocks,
    and a row without any pair is an empty sum: 0 exactly. Pairs of the bool map ``subtracted`` are left out of
    the second kind of list: the caller has subtracted them.
    """
    blocks = included.shape[-1]
    direct = 2 * included.sum(-1, dtype=torch.int32) < blocks
    lacking = ~included if subtracted is None else ~(included | subtracted)
    listed = torch.where(direct[..., None], included, lacking)
    index, count = block_map_to_index(listed)
    return index[..., : max(1, blocks // 2)].contiguous(), count, direct.to(torch.uint8)
