"""Arithmetic on blocks of tokens: where they begin, what share of the pairs a map keeps, the mask it stands for."""

from __future__ import annotations

import torch


def offsets(sizes: torch.Tensor) -> torch.Tensor:
    """First sorted position of every block: ``sizes`` int ``[..., C]`` -> same dtype, same shape."""
    return sizes.cumsum(-1, dtype=sizes.dtype) - sizes


def density(block_map: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor) -> torch.Tensor:
    """Share of the query-key pairs that a map keeps, per head.

    Args:
        block_map: bool ``[B, H, Cq, Ck]``.
        query_sizes, key_sizes: int ``[B, H, Cq]`` and ``[B, H, Ck]``.

    Returns:
        fp32 ``[B, H]``, in ``[0, 1]``; 0 where there are no pairs. Pairs are counted exactly, in int64.
    """
    kept_keys = torch.where(block_map, key_sizes.int()[..., None, :], 0).sum(-1)  # torch sums int32 in int64
    kept = (kept_keys * query_sizes.long()).sum(-1)
    pairs = query_sizes.sum(-1) * key_sizes.sum(-1)
    return kept / pairs.clamp(min=1)


def expand_block_map(block_map: torch.Tensor, query_labels: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    """The token mask that a block map stands for: ``mask[.., i, j] = map[.., query_labels[i], key_labels[j]]``.

    It is quadratic in the length: an oracle for tests, no part of a fast path.

    Args:
        block_map: bool ``[B, H, Cq, Ck]``.
        query_labels, key_labels: int ``[B, H, Sq]`` and ``[B, H, Sk]``, the block of every token.

    Returns:
        bool ``[B, H, Sq, Sk]``.
    """
    queries, keys = query_labels.long(), key_labels.long()
    rows = block_map.gather(2, queries[..., None].expand(*queries.shape, block_map.shape[-1]))
    return rows.gather(3, keys[..., None, :].expand(*queries.shape, keys.shape[-1]))
