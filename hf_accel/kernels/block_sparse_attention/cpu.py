"""Block-sparse attention in plain torch: gather kept key blocks for a few query blocks at a time."""

from __future__ import annotations

from collections import defaultdict

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.softmax_attention import attention_with_lse

# Gathered keys and values of one call, in bytes: more falls out of the cache, fewer calls cost less.
GATHER_BYTES = 8 * 2**20


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time is near density * dense. Query blocks that keep the same number of keys share a call.

    The counts are read on the host, so on another device than the CPU this waits for it.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    _check_index(block_index, block_count, -(-num_keys // block_size[1]))
    out = torch.empty_like(query).zero_()
    lse = query.new_full((batch, heads, num_queries), float("-inf"), dtype=torch.float32)
    index_shape = (batch, heads, *block_index.shape[2:])
    index = block_index.expand(index_shape)
    counts = block_count.expand(index_shape[:3]).tolist()
    for b in range(batch):
        valid = None if key_valid is None else key_valid[b]
        for h in range(heads):
            key_head = h * key.shape[1] // heads
            _one_head(
                query[b, h],
                key[b, key_head],
                value[b, key_head],
                index[b, h],
                counts[b][h],
                block_size,
                scale,
                valid,
                out[b, h],
                lse[b, h],
            )
    return out, lse


def _one_head(query, key, value, index, counts, block_size, scale, valid, out, lse) -> None:
    """Fill ``out`` ``[Sq, D]`` and ``lse`` ``[Sq]`` for one head."""
    query_block, key_block = block_size
    num_queries, num_keys = query.shape[0], key.shape[0]
    key, value = key.contiguous(), value.contiguous()
    ragged_keys = num_keys % key_block
    full_queries = num_queries // query_block
    in_block = torch.arange(key_block, device=key.device)
    # Query blocks by the number of key rows they keep: those with equal numbers stack into one batch.
    groups: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for block, count in enumerate(counts):
        ids = index[block, :count].sort().values.long()  # the ragged block comes last
        rows = (ids[:, None] * key_block + in_block).reshape(-1)
        if ragged_keys and count and int(ids[-1]) == num_keys // key_block:
            rows = rows[: rows.numel() - (key_block - ragged_keys)]
        if valid is not None:
            rows = rows[valid[rows]]
        if rows.numel():
            # A ragged last query block is a batch of its own.
            groups[rows.numel() if block < full_queries else -1].append((block, rows))
    bytes_per_row = 2 * key.shape[1] * key.element_size()
    for members in groups.values():
        step = max(1, GATHER_BYTES // (bytes_per_row * members[0][1].numel()))
        for i in range(0, len(members), step):
            chunk = members[i : i + step]
            rows = torch.stack([rows for _, rows in chunk])
            places = [slice(block * query_block, (block + 1) * query_block) for block, _ in chunk]
            shape = (len(chunk), 1, -1, key.shape[1])
            kept_key, kept_value = (x.index_select(0, rows.view(-1)).view(shape) for x in (key, value))
            queries = torch.stack([query[place] for place in places])[:, None]
            chunk_out, chunk_lse = attention_with_lse(queries, kept_key, kept_value, scale)
            for j, place in enumerate(places):
                out[place], lse[place] = chunk_out[j, 0], chunk_lse[j, 0]


def _check_index(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> None:
    if index.numel() == 0 or count.numel() == 0:
        return
    if int(count.max()) > index.shape[-1] or int(count.min()) < 0:
        raise UnsupportedByKernel(
            f"block_sparse_attention: block_count must be between 0 and {index.shape[-1]}, the length of the "
            f"rows of block_index; got {int(count.min())} to {int(count.max())}."
        )
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    ids = index[listed]
    if ids.numel() and (int(ids.max()) >= key_blocks or int(ids.min()) < 0):
        raise UnsupportedByKernel(
            f"block_sparse_attention: block_index must hold ids from 0 to {key_blocks - 1}; "
            f"got {int(ids.min())} to {int(ids.max())}."
        )
