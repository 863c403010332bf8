"""The definitions of :func:`hf_accel.kernels.block_sparse_attention.block_sparse_attention`.

One for ``numerics="native"`` without ``pv_threshold``, over a token mask; one for the approximate forms, which
depend on the order and the size of the tiles, and so are defined tile by tile.
"""

from __future__ import annotations

import math

import torch

from hf_accel.kernels.block_sparse_attention import quantize
from hf_accel.kernels.block_sparse_attention.index import index_to_block_map, split_index

LOG2_E = math.log2(math.e)


def token_mask(
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
    causal: bool = False,
) -> torch.Tensor:
    """Expand an index to a bool mask over tokens, ``[B|1, H|1, Sq, Sk]``. ``lengths`` is ``(Sq, Sk)``."""
    key_blocks = -(-lengths[1] // block_size[1])
    mask = index_to_block_map(block_index, block_count, key_blocks)
    for axis in (0, 1):
        mask = mask.repeat_interleave(block_size[axis], dim=2 + axis)
    mask = mask[:, :, : lengths[0], : lengths[1]]
    return mask.tril(lengths[1] - lengths[0]) if causal else mask


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over a token mask ``[B, H, Sq, Sk]``, in fp32 (fp64 for fp64): memory grows with Sq * Sk.

    Its gradient is autograd's. A row that keeps nothing has out 0, lse -inf and gradient 0.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads_per_key_head = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key_head, dim=1).to(dtype)
    value = value.repeat_interleave(heads_per_key_head, dim=1).to(dtype)
    mask = token_mask(block_index, block_count, block_size, (query.shape[2], key.shape[2]), causal)
    if key_valid is not None:
        mask = mask & key_valid[:, None, None, :]
    empty = ~mask.any(-1, keepdim=True)
    scores = query.to(dtype) @ key.transpose(-1, -2) * scale
    # A row of -inf alone has no softmax: it is given one, and cleared afterwards.
    lse = scores.masked_fill(~(mask | empty), float("-inf")).logsumexp(-1, keepdim=True)
    weights = (scores - lse).masked_fill(~mask, float("-inf")).exp()
    return (weights @ value).to(query.dtype), lse.masked_fill(empty, float("-inf")).squeeze(-1)


def approximate_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
    *,
    int8: bool = True,
    pv_threshold: float | None = None,
    value_dtype: torch.dtype = torch.float8_e4m3fn,
    tile: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax, one tile of keys at a time, with the roundings of ``int8`` and the rule of ``pv_threshold``.

    ``tile`` ``(m, n)`` divides the blocks; default the blocks. Key tiles come in the order of the list, those
    that need a mask last. Returns ``out``, ``lse`` and how many tiles were skipped, int64 ``[B, H, tiles of Sq]``.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    m, n = tile or block_size
    group = query.shape[1] // key.shape[1]
    index, plain, masked = split_index(block_index, block_count, block_size, (num_queries, num_keys), causal)
    query, key, value = query.float(), key.float(), value.float()
    if key_valid is not None:
        key, value = (x.masked_fill(~key_valid[:, None, :, None], 0) for x in (key, value))
    factor = torch.tensor(scale * LOG2_E)
    shift, lse_shift, out_scale = 0.0, torch.zeros(()), torch.ones(())
    query_scale = key_scale = None
    if int8:
        mean = quantize.mean_key(key, key_valid)
        # Softmax does not see that the keys lost their mean, but the LSE does.
        lse_shift = (query @ mean.repeat_interleave(group, 1).mT)[..., 0] * scale
        query, query_scale = quantize.quantize_blocks(query, block_size[0])
        centred = key - mean
        if key_valid is not None:
            centred = centred.masked_fill(~key_valid[:, None, :, None], 0)
        key, key_scale = quantize.quantize_blocks(centred, block_size[1])
        out_scale = quantize.value_scale(value, value_dtype).repeat_interleave(group, 1)
        value = (value / quantize.value_scale(value, value_dtype)).to(value_dtype).float()
        shift = quantize.WEIGHT_SHIFT[value_dtype]
    query, key, value = (
        torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
        for x, size in ((query, block_size[0]), (key, block_size[1]), (value, block_size[1]))
    )
    key, value = (x.repeat_interleave(group, 1).unflatten(2, (-1, n)) for x in (key, value))
    query = query.unflatten(2, (-1, m))
    batch, heads, tiles = query.shape[:3]
    per_query_block, per_key_block = block_size[0] // m, block_size[1] // n
    index = index[..., None] * per_key_block + torch.arange(per_key_block, device=index.device)
    index = index.flatten(3).repeat_interleave(per_query_block, 2).expand(batch, heads, -1, -1)
    count = ((plain + masked) * per_key_block).repeat_interleave(per_query_block, 2).expand(batch, heads, -1)
    row = torch.arange(tiles * m, device=query.device).view(tiles, m)
    if query_scale is not None and key_scale is not None:
        factor = factor * query_scale.repeat_interleave(per_query_block, 2)
        key_scale = key_scale.repeat_interleave(group, 1).repeat_interleave(per_key_block, 2)
    valid = torch.ones(batch, num_keys, dtype=torch.bool, device=query.device) if key_valid is None else key_valid
    valid = torch.nn.functional.pad(valid, (0, key.shape[2] * n - num_keys))

    row_max = query.new_full((batch, heads, tiles, m), float("-inf"))
    row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(query)
    skipped = count.new_zeros(batch, heads, tiles, dtype=torch.int64)
    b, h = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
    for t in range(int(count.max()) if count.numel() else 0):
        ids = torch.where(t < count, index[..., t], 0).long()
        needed = t < count
        step = factor if key_scale is None else factor * key_scale[b, h, ids]
        scores = query @ key[b, h, ids].mT * step.to(query)[..., None, None]
        place = ids[..., None] * n + torch.arange(n, device=ids.device)
        takes_part = (valid[b[..., None], place] & needed[..., None])[..., None, :]
        if causal:
            takes_part = takes_part & (place[..., None, :] <= row[..., None] + num_keys - num_queries)
        scores = scores.masked_fill(~takes_part, float("-inf"))
        tile_max = scores.amax(-1)
        if pv_threshold is not None:
            # The rows behind the last query have no say.
            rise = torch.where(tile_max.isneginf() | (row >= num_queries), float("-inf"), tile_max - row_max)
            kept = needed & (rise.amax(-1) + pv_threshold > 0)
            skipped += needed & ~kept & takes_part.any(-1).any(-1)
            needed = kept
        new_max = torch.maximum(row_max, tile_max)
        base = torch.where(new_max.isneginf(), 0.0, new_max)
        weights = (scores - base[..., None] + shift).exp2()
        shrink = (row_max - base).exp2()
        new_sum = row_sum * shrink + weights.sum(-1)
        rounded = weights.to(value_dtype).float() if int8 else weights
        new_acc = acc * shrink[..., None] + rounded @ value[b, h, ids]
        row_max = torch.where(needed[..., None], new_max, row_max)
        row_sum = torch.where(needed[..., None], new_sum, row_sum)
        acc = torch.where(needed[..., None, None], new_acc, acc)
    total = torch.where(row_sum > 0, row_sum, 1.0)
    out = (acc / total[..., None]).flatten(2, 3)[:, :, :num_queries] * out_scale
    lse = (row_max - shift + total.log2()).flatten(2, 3)[:, :, :num_queries] / LOG2_E
    return out, lse + lse_shift, skipped
