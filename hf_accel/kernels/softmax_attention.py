"""Dense attention with its LSE in plain torch: the inner step of the sparse forms that gather kept rows."""

from __future__ import annotations

import torch


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of ``[N, H, Sq, D]`` on ``[N, H, Sk, D]``, Sk > 0.

    Returns ``out`` ``[N, H, Sq, D]`` in the dtype of ``query`` and ``lse`` fp32 ``[N, H, Sq]``, natural
    logarithm. On a CPU this is PyTorch's flash kernel, which has the LSE at no cost; elsewhere the scores are
    materialised in fp32.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        return out, lse.float()
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ value.float()).to(query.dtype), lse
