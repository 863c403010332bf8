"""The definition of :func:`hf_accel.kernels.block_sparse_attention.block_sparse_attention`."""

from __future__ import annotations

import torch

from hf_accel.kernels.block_sparse_attention.index import index_to_block_map


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
