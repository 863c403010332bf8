"""Plain torch, computed in fp32 (fp64 stays fp64): the definition of every operation here."""

from __future__ import annotations

import torch

NEG_INF = float("-inf")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pages_of(x: torch.Tensor, page_size: int, fill: float) -> torch.Tensor:
    """``[B, Hkv, P, D]`` as ``[B, Hkv, pages, page_size, D]``, the last page filled up."""
    missing = -x.shape[2] % page_size
    x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill)
    return x.unflatten(2, (-1, page_size))


def page_minmax(k: torch.Tensor, page_size: int, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if valid is None:
        valid = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
    seen = valid[:, None, :, None]
    low = pages_of(k.masked_fill(~seen, float("inf")), page_size, float("inf")).amin(3)
    high = pages_of(k.masked_fill(~seen, NEG_INF), page_size, NEG_INF).amax(3)
    empty = ~pages_of(seen.expand(-1, 1, -1, 1).float(), page_size, 0.0).bool().any(3)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def page_score(
    q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, page_valid: torch.Tensor | None
) -> torch.Tensor:
    group = q.shape[1] // kmin.shape[1]
    low = _wide(kmin).repeat_interleave(group, 1).unsqueeze(2)
    high = _wide(kmax).repeat_interleave(group, 1).unsqueeze(2)
    rows = _wide(q).unsqueeze(3)
    score = torch.maximum(rows * low, rows * high).sum(-1)
    return score if page_valid is None else score.masked_fill(~page_valid[:, None, None], NEG_INF)


def select_pages(scores: torch.Tensor, count: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, pages = scores.shape
    width = min(pages, heads // kv_heads * rows * count)
    best, index = scores.topk(min(count, pages), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, best > NEG_INF)
    union = chosen.view(batch, kv_heads, heads // kv_heads * rows, pages).any(2)
    # a stable sort puts the chosen pages in front, ascending
    order = (~union).to(torch.int8).argsort(dim=-1, stable=True)[..., :width].int()
    counts = union.sum(-1, dtype=torch.int32)
    place = torch.arange(width, device=scores.device)
    return order.masked_fill(place >= counts[..., None], 0), counts


def keys_in(pages: torch.Tensor, counts: torch.Tensor, page_size: int, keys: int) -> torch.Tensor:
    """Which keys the lists hold: bool ``[B, Hkv, P]``."""
    total = -(-keys // page_size)
    place = torch.arange(pages.shape[-1], device=pages.device)
    listed = torch.zeros(*pages.shape[:2], total + 1, dtype=torch.bool, device=pages.device)
    listed.scatter_(-1, torch.where(place < counts[..., None], pages.long(), total), True)
    return listed[..., :total].repeat_interleave(page_size, -1)[..., :keys]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``seen`` bool, broadcastable to ``[B, Hkv, g A, P]``, with the rows of a KV head packed."""
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    packed = _wide(q).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    logits = scale * packed @ _wide(k).transpose(-1, -2)
    value = _wide(v)
    if seen is not None:
        logits = logits.masked_fill(~seen, NEG_INF)
        # what hidden keys hold (nothing, or NaN) must not reach the sum
        value = value.masked_fill(~seen.any(-2).expand(batch, kv_heads, -1)[..., None], 0)
    lse = logits.logsumexp(-1) if k.shape[2] else logits.new_full(logits.shape[:-1], NEG_INF)
    weights = (logits - lse.masked_fill(lse == NEG_INF, 0)[..., None]).exp()
    out = weights @ value
    return out.view(batch, heads, rows, dim), lse.view(batch, heads, rows)


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
    seen = None if valid is None else valid[:, None, None]
    if pages is not None and counts is not None:
        listed = keys_in(pages, counts, page_size, k.shape[2])[:, :, None]
        seen = listed if seen is None else listed & seen
    return attention(q, k, v, scale, seen)


def lse_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == NEG_INF, 0)

    def part(out: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return torch.where((own > NEG_INF)[..., None], (own - base).exp()[..., None] * _wide(out), 0.0)

    return part(out_a, lse_a) + part(out_b, lse_b), lse


def block_merge(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    seen = None
    if mask is not None:
        batch, heads, rows, _ = q.shape
        seen = mask.expand(batch, heads, rows, rows).reshape(batch, k.shape[1], -1, rows)
    out, lse = attention(q, k, v, scale, seen)
    return lse_merge(prefix_out, prefix_lse, out, lse)[0].to(q.dtype)


def active_topk(
    q: torch.Tensor, q_ref: torch.Tensor, count: int, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    delta = (_wide(q) - _wide(q_ref)).square().sum((1, 3))
    # NaN is no distance: such a row is computed anew like a forced one.
    first = delta.isnan() if forced is None else delta.isnan() | forced
    rank = delta.masked_fill(first, float("inf"))
    chosen = rank.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return chosen.sort(-1).values, delta
