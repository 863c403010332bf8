"""Dense attention with its LSE in plain torch: the inner step of the sparse forms that gather kept rows."""

from __future__ import annotations

import torch


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of ``[N, H, Sq, D]`` on ``[N, H, Sk, D]``, Sk > 0.

    ``mask`` is bool, broadcast to ``[N, H, Sq, Sk]``; keys where it is False take no part, but must be finite.
    Returns ``out`` ``[N, H, Sq, D]`` in the dtype of ``query`` and ``lse`` ``[N, H, Sq]``, fp32 (fp64 for fp64),
    natural logarithm; a row whose mask is False throughout has 0 and -inf. On a CPU this is PyTorch's flash
    kernel, which has the LSE at no cost; elsewhere the scores are materialised in fp32.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    empty = None if mask is None else ~mask.any(-1)
    if query.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    else:
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
        if mask is not None and empty is not None:
            scores = scores.masked_fill(~mask & ~empty[..., None], float("-inf"))
        lse = scores.logsumexp(-1)
        out = ((scores - lse[..., None]).exp() @ value.to(dtype)).to(query.dtype)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, float("-inf"))
    return out, lse.to(dtype)
