"""What the shape of a call decides about its block map, whatever its tokens are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.call import Span, TokenGrid
from hf_accel.attention.hilbert import hilbert_order
from hf_accel.attention.layout import block_sizes, inverse_order, text_blocks


class PlanSettings(Protocol):
    """The settings that a plan depends on."""

    @property
    def block_q(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def attention_sink(self) -> bool: ...
    @property
    def hilbert(self) -> bool: ...
    @property
    def density(self) -> int | float | None: ...


@dataclass(frozen=True)
class Plan:
    """What the shape of a call decides about its map, whatever the tokens are. On the call's device.

    Attributes:
        allowed: bool ``[nq, nk]``, blocks with a pair that the causal mask shows; None where there is none.
        rows, columns: bool ``[nq]`` and ``[nk]``, blocks that are kept whole: text, and last blocks not full.
        kept: bool ``[nq, nk]``, the blocks of those rows and columns, the sink and the diagonal.
        pairs: fp32 ``[nq, nk]``, query-key pairs of each block that the causal mask shows.
        budget: blocks per row that spend the density asked for; 0 if none was.
        order, back: int64 ``[S]``, tokens along the Hilbert curve and the way back, or None.
    """

    allowed: torch.Tensor | None
    rows: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    pairs: torch.Tensor
    budget: int
    order: torch.Tensor | None
    back: torch.Tensor | None

    def to(self, device: torch.device) -> Plan:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)


def make_plan(
    config: PlanSettings, queries: int, keys: int, causal: bool, grid: TokenGrid | None, span: Span | None
) -> Plan:
    """What lengths, mask, grid and the place of the text decide about the map; see :class:`Plan`. On the CPU."""
    rows = torch.zeros(-(-queries // config.block_q), dtype=torch.bool)
    columns = torch.zeros(-(-keys // config.block_k), dtype=torch.bool)
    for blocks, size, length in ((rows, config.block_q, queries), (columns, config.block_k, keys)):
        blocks[-1] = length % size > 0
        blocks |= text_blocks(span, length, size)
    kept = rows[:, None] | columns
    if config.attention_sink:
        kept[:, 0] = True
    allowed = None
    offset = keys - queries
    pairs = _pairs(queries, keys, config.block_q, config.block_k, offset if causal else None)
    if causal:
        allowed = pairs > 0
        sizes = block_sizes(queries, config.block_q)[:, None] * block_sizes(keys, config.block_k)
        kept = (kept | (pairs < sizes)) & allowed
    order = back = None
    if config.hilbert and grid is not None and span is not None:
        order = torch.arange(queries)
        order[span[0] : span[1]] = span[0] + hilbert_order(grid.frames, grid.height, grid.width)
        back = inverse_order(order)
    budget = 0
    if config.density is not None:
        budget = _blocks_per_row(config.density, kept, pairs)
    return Plan(allowed, rows, columns, kept, pairs.float(), budget, order, back)


def _pairs(queries: int, keys: int, block_q: int, block_k: int, offset: int | None) -> torch.Tensor:
    """Visible query-key pairs of every block, int64 ``[nq, nk]``; query i sees keys up to ``i + offset``."""
    # Pairs of the first r queries with the first c keys, at the corners of the blocks.
    r = torch.arange(0, queries + block_q, block_q).clamp(max=queries)[:, None]
    c = torch.arange(0, keys + block_k, block_k).clamp(max=keys)
    if offset is None:
        corners = r * c
    else:
        # Query t sees min(t + offset + 1, c) of them: the first `short` queries see fewer than c.
        short = (c - offset - 1).clamp(min=0).minimum(r)
        corners = short * (short - 1) // 2 + short * (offset + 1) + (r - short) * c
    rows = (queries + block_q - 1) // block_q
    columns = (keys + block_k - 1) // block_k
    corners = corners[: rows + 1, : columns + 1]
    return corners.diff(dim=0).diff(dim=1)


def _blocks_per_row(density: float, kept: torch.Tensor, pairs: torch.Tensor) -> int:
    """The most blocks per row with which no more than ``density`` of the pairs are computed, at least 1.

    Args:
        kept: bool ``[nq, nk]``, blocks computed in any case. They take their places in a row first.
        pairs: int ``[nq, nk]``, 0 where the causal mask hides the block.
    """
    visible, by_rule = (pairs > 0).sum(1), kept.sum(1)
    rest = pairs.sum(1) - (pairs * kept).sum(1)
    low, high = 1, kept.shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        chosen = (middle - by_rule).clamp(min=0).minimum(visible - by_rule)
        total = (pairs * kept).sum() + (rest * chosen / (visible - by_rule).clamp(min=1)).sum()
        # Rounding must not cost a block.
        low, high = (middle, high) if total <= density * pairs.sum() * (1 + 1e-6) else (low, middle - 1)
    return low


def per_block(valid: torch.Tensor, block: int) -> torch.Tensor:
    """``[B, S]`` as ``[B, n, block]``, the last block filled up with False."""
    return torch.nn.functional.pad(valid, (0, -valid.shape[1] % block)).unflatten(1, (-1, block))


def share_shown(valid: torch.Tensor, block: int) -> torch.Tensor:
    """fp32 ``[B, n]`` from ``[B, S]`` bool: share of the keys of each block that count."""
    return per_block(valid, block).sum(-1) / block_sizes(valid.shape[1], block).to(valid.device)
