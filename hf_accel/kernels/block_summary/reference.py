"""The definition of :func:`hf_accel.kernels.block_summary.block_summary`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def block_summary(
    x: torch.Tensor, block_size: int, center: bool, key_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means ``[B, H, n, D]`` and similarities ``[B, H, n]`` in fp32; see the package for the meaning."""
    batch, _, tokens, _ = x.shape
    counts = x.new_ones(batch, tokens, dtype=torch.bool) if key_valid is None else key_valid
    counts = counts[:, None, :, None]
    weight = counts.float()
    # What does not count may hold anything, infinities too: it is removed, not multiplied by 0.
    x = torch.where(counts, x.float(), 0.0)
    if center:
        x = torch.where(counts, x - x.sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1), 0.0)
    size = blocks(weight, block_size).sum(3).clamp(min=1)
    mean = blocks(x, block_size).sum(3) / size
    direction = blocks(F.normalize(x, dim=-1), block_size).sum(3) / size
    return mean, direction.square().sum(-1)


def blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[B, H, S, D]`` as ``[B, H, n, block_size, D]``, the last block filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))
