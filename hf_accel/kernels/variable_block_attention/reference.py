"""The definition of :func:`hf_accel.kernels.variable_block_attention.variable_block_attention`."""

from __future__ import annotations

import torch


def block_of_row(sizes: torch.Tensor, length: int) -> torch.Tensor:
    """The block that each of ``length`` sorted rows is in: sizes ``[..., C]`` -> int64 ``[..., length]``.

    Rows beyond the sum of the sizes get ``C``.
    """
    ends = sizes.long().cumsum(-1)
    rows = torch.arange(length, device=sizes.device).expand(*sizes.shape[:-1], length)
    return torch.searchsorted(ends, rows.contiguous(), right=True)


def token_mask(block_map: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor, lengths: tuple[int, int]):
    """Expand a block map ``[B, H, Cq, Ck]`` to a bool mask ``[B, H, Sq, Sk]`` over sorted rows.

    ``lengths`` is ``(Sq, Sk)``. Rows and columns beyond the sums of the sizes are False.
    """
    # One more block on each side, which nothing attends to, holds the rows that no block owns.
    padded = torch.nn.functional.pad(block_map, (0, 1, 0, 1))
    of_query = block_of_row(query_sizes, lengths[0])
    of_key = block_of_row(key_sizes, lengths[1])
    rows = padded.gather(2, of_query[..., None].expand(-1, -1, -1, padded.shape[3]))
    return rows.gather(3, of_key[:, :, None].expand(-1, -1, lengths[0], -1))


def variable_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_map: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    query_order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in fp32 over a token mask ``[B, H, Sq, Sk]``: memory grows with Sq * Sk."""
    head_dim, order = query.shape[-1], None
    if query_order is not None:
        order = query_order.long()[..., None]
        query = query.gather(2, order.expand(-1, -1, -1, head_dim))
    mask = token_mask(block_map, query_sizes, key_sizes, (query.shape[2], key.shape[2]))
    scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    # A row that keeps nothing has lse -inf: subtracting 0 instead leaves exp(-inf) = 0 everywhere.
    weights = (scores - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    out = (weights @ value.float()).to(query.dtype)
    if order is not None:
        out = torch.zeros_like(out).scatter(2, order.expand_as(out), out)
        lse = torch.zeros_like(lse).scatter(2, order[..., 0], lse)
    return out, lse
