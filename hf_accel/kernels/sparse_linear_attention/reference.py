"""The definition of both branches, over token masks: memory grows with Sq * Sk. Differentiable by autograd."""

from __future__ import annotations

import torch

from hf_accel.kernels.sparse_linear_attention.feature_map import apply_feature_map


def token_mask(
    block_map: torch.Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
    key_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expand bool ``[B|1, H|1, nq, nk]`` to tokens, ``[B|1, H|1, Sq, Sk]``, without the hidden keys."""
    mask = block_map
    for axis in (0, 1):
        mask = mask.repeat_interleave(block_size[axis], dim=2 + axis)
    mask = mask[:, :, : lengths[0], : lengths[1]]
    return mask if key_valid is None else mask & key_valid[:, None, None, :]


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """``phi(Q) phi(K)^T``, masked and divided by its row sums, times V, ``[B, H, Sq, D]``; empty rows are 0."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    weights = apply_feature_map(query, feature_map) @ apply_feature_map(key, feature_map).mT * mask
    denominator = weights.sum(-1, keepdim=True)
    return weights @ value / torch.where(denominator > 0, denominator, 1.0)


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Masked softmax attention ``[B, H, Sq, D]``; empty rows are 0."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    # The lowest finite score instead of -inf keeps autograd free of NaN in rows that keep nothing.
    scores = (query @ key.mT * scale).masked_fill(~mask, torch.finfo(query.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0) @ value


def sparse_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    critical: torch.Tensor,
    included: torch.Tensor,
    *,
    feature_map: str = "softmax",
    block_size: tuple[int, int] = (64, 64),
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``critical`` and ``included`` are the block maps ``[B|1, H|1, nq, nk]`` of the two branches."""
    lengths = (query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    critical, included = (token_mask(m, block_size, lengths, key_valid) for m in (critical, included))
    return (
        softmax_attention(query, key, value, critical, scale),
        linear_attention(query, key, value, included, feature_map),
    )
