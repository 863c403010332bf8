"""Exact attention of a block against a frozen prefix and itself, in two parts joined by their log-sum-exp."""

from __future__ import annotations

import torch

from hf_accel.kernels.paged_attention import block_merge, page_attention
from hf_accel.sites.prefix_attention.call import PrefixCall

# Keys per tile where all keys are read; a hint, see page_attention.
TILE = 64


def prefix_attention(call: PrefixCall, query: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some rows of the block to the whole prefix, ``query`` ``[B, Hq, A, D]``.

    Returns:
        fp32 ``[B, Hq, A, D]``, normalised, and the natural log of the sum of exponentials, fp32 ``[B, Hq, A]``
        (-inf where a row sees no key).
    """
    key, value, valid = call.prefix_key, call.prefix_value, call.prefix_valid
    return page_attention(query, key, value, None, TILE, call.scale, valid, backend=backend)


def with_block(call: PrefixCall, out: torch.Tensor, lse: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Join the prefix part of all rows with the block's attention to itself: ``[B, Hq, b, D]`` like the query."""
    return block_merge(call.query, call.key, call.value, out, lse, call.scale, call.block_mask, backend=backend)


def split_attention(call: PrefixCall, backend: str = "auto") -> torch.Tensor:
    """``softmax(q [K_prefix; K_block]^T) [V_prefix; V_block]`` without joining keys or values: ``[B, Hq, b, D]``."""
    return with_block(call, *prefix_attention(call, call.query, backend), backend)
