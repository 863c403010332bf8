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
    num_keys, head_dim = key.shape
    last_block = -(-num_keys // key_block) - 1
    surplus = (last_block + 1) * key_block - num_keys
    # Whole blocks are copied, which is a few times faster than a gather row by row.
    key_blocks, value_blocks = (
        torch.nn.functional.pad(x, (0, 0, 0, surplus)).view(-1, key_block * head_dim) if surplus
        else x.contiguous().view(-1, key_block * head_dim)
        for x in (key, value)
    )  # fmt: skip
    # Query blocks that keep the same number of key rows stack into one batch; a ragged last one stands alone.
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    ids_of = [ids[:count].sort().values for ids, count in zip(index, counts, strict=True)]
    for block, ids in enumerate(ids_of):
        if ids.numel():
            # The ids ascend: only the last can be the ragged block.
            kept = ids.numel() * key_block - (surplus if int(ids[-1]) == last_block else 0)
            queries = min(query_block, query.shape[0] - block * query_block)
            groups[kept, queries].append(block)
    bytes_per_row = 2 * head_dim * key.element_size()
    for (kept, queries), members in groups.items():
        # A mask makes the number of keys differ from block to block.
        step = 1 if valid is not None else max(1, GATHER_BYTES // (bytes_per_row * kept))
        for i in range(0, len(members), step):
            chunk = members[i : i + step]
            ids = torch.cat([ids_of[block] for block in chunk])
            shape = (len(chunk), 1, -1, head_dim)
            kept_key, kept_value = (x.index_select(0, ids).view(shape)[:, :, :kept] for x in (key_blocks, value_blocks))
            if valid is not None:
                rows = (ids[:, None] * key_block + torch.arange(key_block, device=ids.device)).view(-1)[:kept]
                valid_rows = valid[rows.long()].nonzero().squeeze(1)
                if not valid_rows.numel():
                    continue
                kept_key, kept_value = kept_key[:, :, valid_rows], kept_value[:, :, valid_rows]
            places = [slice(block * query_block, block * query_block + queries) for block in chunk]
            stacked = torch.stack([query[place] for place in places])[:, None]
            chunk_out, chunk_lse = attention_with_lse(stacked, kept_key, kept_value, scale)
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
