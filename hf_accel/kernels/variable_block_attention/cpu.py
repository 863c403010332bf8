"""Variable-block attention in plain torch: gather the keys that a query block keeps, then attend densely."""

from __future__ import annotations

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common.softmax_attention import attention_with_lse


def variable_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_map: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time is near density * dense: one gather and one dense call for each head and query block.

    Sizes are read on the host, so on another device than the CPU this waits for it.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    _check_sum("query_sizes", query_sizes, num_queries)
    _check_sum("key_sizes", key_sizes, num_keys)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            head_query, head_key, head_value = query[b, h], key[b, h], value[b, h]
            if query_order is not None:
                head_query = head_query.index_select(0, query_order[b, h])
            if key_order is not None:
                head_key = head_key.index_select(0, key_order[b, h])
                head_value = head_value.index_select(0, key_order[b, h])
            head_out, head_lse = _one_head(
                head_query, head_key, head_value, block_map[b, h], query_sizes[b, h], key_sizes[b, h], scale
            )
            if query_order is None:
                out[b, h], lse[b, h] = head_out, head_lse
            else:
                places = query_order[b, h].long()
                out[b, h].index_copy_(0, places, head_out)
                lse[b, h].index_copy_(0, places, head_lse)
    return out, lse


def _one_head(query, key, value, block_map, query_sizes, key_sizes, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` ``[Sq, D]`` and ``lse`` ``[Sq]`` of sorted rows."""
    out = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:1], float("-inf"), dtype=torch.float32)
    counts = key_sizes.tolist()
    owned = sum(counts)
    # Whole clusters are copied, which is a few times faster than a gather row by row. One copy of a strided head
    # costs less than strided reads for every query block that keeps its rows.
    keys, values = (x[:owned].contiguous().split(counts) for x in (key, value))
    start = 0
    for size, keep in zip(query_sizes.tolist(), block_map.tolist(), strict=True):
        end = start + size
        kept = [j for j, count in enumerate(counts) if keep[j] and count]
        if size and kept:
            block_out, block_lse = attention_with_lse(
                query[None, None, start:end],
                torch.cat([keys[j] for j in kept])[None, None],
                torch.cat([values[j] for j in kept])[None, None],
                scale,
            )
            out[start:end], lse[start:end] = block_out[0, 0], block_lse[0, 0]
        start = end
    return out, lse


def _check_sum(name: str, sizes: torch.Tensor, rows: int) -> None:
    if sizes.numel() == 0:
        return
    total, least = int(sizes.sum(-1).max()), int(sizes.min())
    if total > rows or least < 0:
        raise UnsupportedByKernel(
            f"variable_block_attention: {name} must be >= 0 and add up to at most {rows} rows in every head; "
            f"got a sum of {total} and a smallest size of {least}."
        )
