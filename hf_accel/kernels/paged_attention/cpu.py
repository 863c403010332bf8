"""Faster forms in plain torch: no copy of the keys per query head, and none of what is not read."""

from __future__ import annotations

import torch

from hf_accel.kernels.paged_attention import reference

_FLASH = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def page_score(
    q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, page_valid: torch.Tensor | None
) -> torch.Tensor:
    """``max(q a, q b) = max(q, 0) b + min(q, 0) a`` for ``a <= b``: two products of matrices, per KV head."""
    batch, heads, rows, dim = q.shape
    packed = q.float().reshape(batch, kmin.shape[1], -1, dim)
    score = packed.clamp_min(0) @ kmax.float().transpose(-1, -2)
    score += packed.clamp_max(0) @ kmin.float().transpose(-1, -2)
    score = score.view(batch, heads, rows, -1)
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
    if pages is None or counts is None or k.device.type != "cpu":
        if pages is None and valid is None and k.device.type == "cpu" and k.shape[2] and v.shape[3] == k.shape[3]:
            return _flash(q, k, v, scale)
        return reference.page_attention(q, k, v, pages, counts, page_size, scale, valid)
    key, value, seen = _gather(k, v, pages, counts, page_size, valid)
    out, lse = reference.attention(q, key, value, scale, seen[:, :, None])
    return out.float(), lse.float()


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention for CPUs, with the rows of a KV head as one sequence of queries."""
    batch, heads, rows, dim = q.shape
    packed = q.reshape(batch, k.shape[1], -1, dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(packed, k, v, scale=scale)
    return out.float().reshape(batch, heads, rows, dim), lse.float().reshape(batch, heads, rows)


def _gather(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor,
    page_size: int,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The listed keys and values side by side, ``[B, Hkv, M page_size, D]``, and which of them count."""
    keys, width = k.shape[2], int(counts.max()) if counts.numel() else 0  # on a CPU nothing is waited for
    pages = pages[..., :width].long()
    within = torch.arange(page_size)
    index = (pages[..., None] * page_size + within).flatten(2)
    seen = (torch.arange(width) < counts[..., None])[..., None].expand(-1, -1, -1, page_size).flatten(2)
    seen = seen & (index < keys)
    index = index.clamp_max(max(keys - 1, 0))
    if valid is not None:
        seen = seen & valid[:, None].expand(-1, k.shape[1], -1).gather(2, index)
    at = index[..., None]
    return k.gather(2, at.expand(-1, -1, -1, k.shape[3])), v.gather(2, at.expand(-1, -1, -1, v.shape[3])), seen
