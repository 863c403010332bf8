"""Joining attention over two disjoint sets of keys."""

from __future__ import annotations

import torch


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b`` in fp32.

    Args:
        out_a, out_b: ``[B, H, S, D]``.
        lse_a, lse_b: natural log, ``[B, H, S]``; -inf where a row saw no key of that set. What ``out`` holds
            in such a row is not read; if neither set has a key for a row, it gets 0 and -inf.

    Returns:
        ``out`` ``[B, H, S, D]`` in the dtype of ``out_a``, and ``lse`` fp32 ``[B, H, S]``.
    """
    a, b = lse_a.float(), lse_b.float()
    lse = torch.logaddexp(a, b)
    return (_weighted(out_a, a, lse) + _weighted(out_b, b, lse)).to(out_a.dtype), lse


def _weighted(out: torch.Tensor, lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    seen = (lse > float("-inf"))[..., None]
    return torch.where(seen, (lse - total).exp()[..., None] * out.float(), 0.0)
