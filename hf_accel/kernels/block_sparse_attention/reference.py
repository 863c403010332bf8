"""The definition of :func:`hf_accel.kernels.block_sparse_attention.block_sparse_attention`."""

from __future__ import annotations

import torch

from hf_accel.kernels.block_sparse_attention.index import index_to_block_map


def token_mask(
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
) -> torch.Tensor:
    """Expand an index to a bool mask over tokens, ``[B|1, H|1, Sq, Sk]``. ``lengths`` is ``(Sq, Sk)``."""
    key_blocks = -(-lengths[1] // block_size[1])
    mask = index_to_block_map(block_index, block_count, key_blocks)
    for axis in (0, 1):
        mask = mask.repeat_interleave(block_size[axis], dim=2 + axis)
    return mask[:, :, : lengths[0], : lengths[1]]


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
    """Softmax in fp32 over a token mask ``[B, H, Sq, Sk]``: memory grows with Sq * Sk."""
    heads_per_key_head = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key_head, dim=1)
    value = value.repeat_interleave(heads_per_key_head, dim=1)
    mask = token_mask(block_index, block_count, block_size, (query.shape[2], key.shape[2]))
    if key_valid is not None:
        mask = mask & key_valid[:, None, None, :]
    scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    # A row that keeps nothing has lse -inf: subtracting 0 instead leaves exp(-inf) = 0 everywhere.
    weights = (scores - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    return (weights @ value.float()).to(query.dtype), lse
