"""Variable-block attention in plain torch: gather the keys that a query block keeps, then attend densely."""

from __future__ import annotations

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.softmax_attention import attention_with_lse


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
    out = torch.empty_like(query).zero_()
    lse = query.new_full((batch, heads, num_queries), float("-inf"), dtype=torch.float32)
    ends_of_queries = query_sizes.long().cumsum(-1).tolist()
    for b in range(batch):
        for h in range(heads):
            # One copy of a strided head costs less than strided reads for every query block that keeps its
            # rows.
            head_key, head_value = key[b, h].contiguous(), value[b, h].contiguous()
            head_query = query[b, h] if query_order is None else query[b, h].index_select(0, query_order[b, h])
            sizes = key_sizes[b, h].long()
            kept = block_map[b, h].repeat_interleave(sizes, dim=1)  # [Cq, rows]
            start = 0
            for block, end in enumerate(ends_of_queries[b][h]):
                rows = kept[block].nonzero().squeeze(1) if end > start else sizes[:0]
                if rows.numel():
                    if key_order is not None:
                        rows = key_order[b, h].index_select(0, rows)
                    block_out, block_lse = attention_with_lse(
                        head_query[None, None, start:end],
                        head_key.index_select(0, rows)[None, None],
                        head_value.index_select(0, rows)[None, None],
                        scale,
                    )
                    if query_order is None:
                        out[b, h, start:end], lse[b, h, start:end] = block_out[0, 0], block_lse[0, 0]
                    else:
                        places = query_order[b, h, start:end]
                        out[b, h].index_copy_(0, places.long(), block_out[0, 0])
                        lse[b, h].index_copy_(0, places.long(), block_lse[0, 0])
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
