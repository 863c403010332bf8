"""Faster forms in plain torch: keys are not repeated per query head, and on a CPU only those in use are read."""

from __future__ import annotations

import torch

from hf_accel.kernels.common.softmax_attention import attention_with_lse
from hf_accel.kernels.paged_attention import reference


def page_score(
    q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, page_valid: torch.Tensor | None
) -> torch.Tensor:
    """``max(q a, q b) = max(q, 0) b + min(q, 0) a`` for ``a <= b``: two products of matrices, per KV head."""
    batch, heads, rows, dim = q.shape
    kv_heads, pages = kmin.shape[1:3]
    packed = q.float().reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    score = packed.clamp_min(0) @ kmax.float().transpose(-1, -2)
    score += packed.clamp_max(0) @ kmin.float().transpose(-1, -2)
    score = score.view(batch, heads, rows, pages)
    return score if page_valid is None else score.masked_fill_(~page_valid[:, None, None], reference.NEG_INF)


def page_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    page_size: int,
    scale: float,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention with the rows of a KV head as one sequence of queries: of views where all keys of a
    stretch are read, else of what is gathered per KV head, which stays in the cache. Lengths are read on the host, so
    another device than a CPU gets the definition, which waits for nothing."""
    if k.device.type != "cpu":
        return reference.page_attention(q, k, v, pages, counts, page_size, scale, valid)
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    packed = q.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    out = torch.zeros(packed.shape, dtype=torch.float32)
    lse = torch.full(packed.shape[:3], reference.NEG_INF)
    if pages is None or counts is None:
        for items, keys in _visible_keys(valid, batch, k.shape[2]):
            part = _rows_of(k[items], keys), _rows_of(v[items], keys)
            _attend(packed[items], *part, scale, out[items], lse[items])
    else:
        for item in range(batch):
            for head in range(kv_heads):
                place = slice(item, item + 1), slice(head, head + 1)
                index = pages[item, head, : int(counts[item, head])].long()
                keys = (index[:, None] * page_size + torch.arange(page_size)).flatten()
                keys = keys[keys < k.shape[2]]
                if valid is not None:
                    keys = keys[valid[item, keys]]
                part = _rows_of(k[place], keys), _rows_of(v[place], keys)
                _attend(packed[place], *part, scale, out[place], lse[place])
    return out.view(batch, heads, rows, dim), lse.view(batch, heads, rows)


def _visible_keys(valid: torch.Tensor | None, batch: int, keys: int) -> list[tuple[slice, slice | torch.Tensor]]:
    """Batch items and the keys that they see: a stretch, as under padding and in a static cache, or their indices."""
    if valid is None:
        return [(slice(None), slice(0, keys))]
    visible: list[tuple[slice, slice | torch.Tensor]] = []
    for item in range(batch):
        index = valid[item].nonzero()[:, 0]
        first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
        stretch = slice(first, last + 1) if last - first + 1 == len(index) else index
        visible.append((slice(item, item + 1), stretch))
    return visible


def _rows_of(x: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    return (
        x[:, :, keys]
        if isinstance(keys, slice)
        else x.flatten(0, 1).index_select(1, keys).view(*x.shape[:2], -1, x.shape[3])
    )


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Write into ``out`` and ``lse``, which stay as they are without a key."""
    if q.numel() and k.shape[2]:
        part, part_lse = attention_with_lse(q, k, v, scale)
        out.copy_(part)
        lse.copy_(part_lse)
