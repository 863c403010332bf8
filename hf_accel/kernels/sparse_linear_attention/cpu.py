"""The linear branch in plain torch: a few matrix products per head, forward and backward.

With ``V1 = [V, 1]`` the denominator is one more column of the numerator. Every key block has a state
``h_j = phi(K_j)^T V1_j`` ``[D, D + 1]``, and the states that a row of query blocks covers are summed by one
product of the block map with all states: ``2 * nq * nk * D * (D + 1)`` operations, which is ``D / (2 * bq * bk)``
of dense attention (under 1 % at head dim 64 and blocks of 64), whatever the map, and exact for every scope.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_accel.kernels.sparse_linear_attention.feature_map import apply_feature_map, feature_map_backward


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    included: torch.Tensor | None,
    block_size: tuple[int, int],
    feature_map: str,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` ``[B, H, Sq, D]`` and its denominator ``[B, H, Sq]`` in fp32 (fp64 for fp64 inputs)."""
    out = torch.empty_like(query)
    denominator = query.new_empty(query.shape[:3], dtype=_compute_dtype(query))
    for at, heads in _heads(query, key):
        head = _Head(query, key, value, included, block_size, feature_map, key_valid, at, heads)
        both = head.from_query_blocks(head.query @ head.to_rows(head.states()))
        denominator[at[0], heads] = both[..., -1]
        out[at[0], heads] = both[..., :-1] * _inverse(both[..., -1:])
    return out, denominator


def linear_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    included: torch.Tensor | None,
    block_size: tuple[int, int],
    feature_map: str,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value (arXiv 2509.24006, section on the backward pass, in augmented form)."""
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    compute = _compute_dtype(query)
    for at, heads in _heads(query, key):
        head = _Head(query, key, value, included, block_size, feature_map, key_valid, at, heads)
        # out = numerator / denominator, so the gradient of [numerator, denominator] is this, row by row.
        gradient = grad_out[at[0], heads].to(compute)
        inner = (gradient * out[at[0], heads].to(compute)).sum(-1, keepdim=True)
        gradient = torch.cat([gradient, -inner], -1) * _inverse(denominator[at[0], heads, :, None])
        gradient = head.to_query_blocks(gradient)
        grad_features = head.from_query_blocks(gradient @ head.to_rows(head.states()).mT)
        features = head.from_query_blocks(head.query)
        grad_query[at[0], heads] = feature_map_backward(features, grad_features, feature_map).to(query.dtype)
        grad_states = head.to_columns(head.query.mT @ gradient)
        grad_features = head.from_key_blocks(head.value @ grad_states.mT)
        features = head.from_key_blocks(head.key)
        grad_key[at] = feature_map_backward(features, grad_features, feature_map).to(key.dtype)
        grad_value[at] = head.from_key_blocks(head.key @ grad_states[..., :-1]).to(value.dtype)
    return grad_query, grad_key, grad_value


class _Head:
    """One key head and the ``G`` query heads that read it, cut into blocks and lifted to features.

    ``query`` ``[G, nq, bq, D]``, ``key`` ``[nk, bk, D]`` (both phi) and ``value`` ``[nk, bk, D + 1]`` with its
    column of ones; rows behind the end and hidden keys are 0. Without a map all rows share one block.
    """

    def __init__(self, query, key, value, included, block_size, feature_map, key_valid, at, heads):
        batch, _ = at
        compute = _compute_dtype(query)
        self.lengths = (query.shape[2], key.shape[2])
        self.block_size = tuple(max(1, n) for n in self.lengths) if included is None else block_size
        self.map = None
        if included is not None:
            of_batch = included[batch if included.shape[0] > 1 else 0]
            self.map = (of_batch[heads] if of_batch.shape[0] > 1 else of_batch).to(compute)
        key_head, value_head = key[at].to(compute), value[at].to(compute)
        ones = value_head.new_ones(value_head.shape[0], 1)
        if key_valid is not None:
            # A weight of 0 does not cancel what hidden keys may hold: infinities and NaN.
            hidden = ~key_valid[batch, :, None]
            key_head, value_head = key_head.masked_fill(hidden, 0.0), value_head.masked_fill(hidden, 0.0)
            ones = (~hidden).to(compute)
        features = apply_feature_map(key_head, feature_map)
        self.query = self.to_query_blocks(apply_feature_map(query[batch, heads].to(compute), feature_map))
        self.key = _cut(features * ones, self.block_size[1])
        self.value = _cut(torch.cat([value_head, ones], -1), self.block_size[1])

    def states(self) -> torch.Tensor:
        """``h_j``, ``[nk, D, D + 1]``."""
        return self.key.mT @ self.value

    def to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Sum the states that each query block covers: ``[G or 1, nq, D, D + 1]``."""
        if self.map is None:
            return states[None]
        return (self.map @ states.flatten(1)).unflatten(-1, states.shape[1:])

    def to_columns(self, states: torch.Tensor) -> torch.Tensor:
        """Sum ``[G, nq, D, D + 1]`` over the query blocks that cover each key block: ``[nk, D, D + 1]``."""
        if self.map is None:
            return states.sum(0)
        columns = self.map.mT.expand(states.shape[0], -1, -1)
        return (columns @ states.flatten(2)).sum(0).unflatten(-1, states.shape[2:])

    def to_query_blocks(self, x: torch.Tensor) -> torch.Tensor:
        return _cut(x, self.block_size[0])

    def from_query_blocks(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(-3, -2)[..., : self.lengths[0], :]

    def from_key_blocks(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(-3, -2)[..., : self.lengths[1], :]


def _cut(x: torch.Tensor, block: int) -> torch.Tensor:
    """``[..., S, C]`` -> ``[..., ceil(S / block), block, C]``, the end filled with 0."""
    surplus = -x.shape[-2] % block
    if surplus:
        x = torch.nn.functional.pad(x, (0, 0, 0, surplus))
    return x.unflatten(-2, (-1, block))


def _heads(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[tuple[int, int], slice]]:
    """Key heads one by one, with their query heads: the states of one head at a time are in memory."""
    if query.numel() == 0:
        return
    group = query.shape[1] // key.shape[1]
    for batch in range(key.shape[0]):
        for head in range(key.shape[1]):
            yield (batch, head), slice(head * group, (head + 1) * group)


def _inverse(denominator: torch.Tensor) -> torch.Tensor:
    """1 / denominator, 0 where it is 0: a row whose scope is empty has no output and no gradient."""
    return torch.where(denominator > 0, 1 / torch.where(denominator > 0, denominator, 1.0), 0.0)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
