"""Attention within a window: every video token attends to its neighbours in the sequence and to all text tokens.

The plainest sparse attention there is (the sliding window of Longformer, arXiv 2004.05150, over video tokens). The cost
falls from S x S to S x (2 x width + CHUNK) query-key pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.config import Config, setting
from hf_accel.method import AttentionCall, AttentionMethod, Facts

CHUNK = 512  # queries per call of the kernel: larger ones compute more pairs that the mask throws away


@dataclass(frozen=True)
class LocalWindowConfig(Config):
    METHOD = "local-window"
    width: int = setting(4096, "tokens on each side that a token attends to", ge=1)
    # The base class honours these two by their names.
    dense_steps: int | float = setting(0.2, "first steps that stay dense", share=True)
    dense_layers: int | float = setting(0, "first layers that stay dense", share=True)


class LocalWindow(AttentionMethod):
    name, paper = "local-window", "Longformer (arXiv 2004.05150)"
    summary = "a window along the sequence of video tokens"
    facts = Facts(
        site="attention",
        needs=frozenset({"token grid"}),  # calls whose grid is unknown run dense, and are counted
        backward=True,
        full_budget={"width": 10**9, "dense_steps": 0, "dense_layers": 0},
        budget="width",
    )
    Config = LocalWindowConfig

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        tokens = call.query.shape[2]
        start, stop = call.grid.video_span(tokens)
        # A range made on the device: numbers copied from Python would wait for it in every layer, and a range in the
        # query's dtype would be wrong, since bfloat16 counts to 256 and float16 to 2048.
        place = torch.arange(tokens, device=call.query.device)
        before, after = place[:start], place[stop:]
        out, pairs = [], tokens * (tokens - (stop - start))
        if start:
            out.append(_attention(call, before, place))
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            low, high = max(start, first - self.config.width), min(stop, last + self.config.width)
            rows, columns = place[first:last], torch.cat([before, place[low:high], after])
            near = (rows[:, None] - columns).abs() <= self.config.width
            near |= (columns < start) | (columns >= stop)
            out.append(_attention(call, rows, columns, near))
            pairs += near.sum()
        if stop < tokens:
            out.append(_attention(call, after, place))
        # The share of all pairs that was attended to; the report shows it by layer and step.
        density = torch.as_tensor(pairs / tokens**2, device=call.query.device, dtype=torch.float32)
        call.record_density(density.expand(call.query.shape[:2]))
        return torch.cat(out, dim=2)


def _attention(
    call: AttentionCall, rows: torch.Tensor, columns: torch.Tensor, near: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention ``[B, H, len(rows), D]`` of some queries to some keys, under the host's mask and ours (bool)."""
    mask = near
    if call.mask is not None:
        whole = torch.atleast_2d(call.mask)
        mask = whole.expand(*whole.shape[:-2], call.query.shape[2], call.key.shape[2])[..., rows, :][..., columns]
        if near is not None:
            mask = mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, float("-inf"))
    query, key, value = call.query[:, :, rows], call.key[:, :, columns], call.value[:, :, columns]
    grouped = query.shape[1] != key.shape[1]  # several heads of queries share one of keys
    return F.scaled_dot_product_attention(query, key, value, mask, scale=call.scale, enable_gqa=grouped)
