"""The definition of the operations of :mod:`hf_accel.kernels.soft_embedding`."""

from __future__ import annotations

import torch


def entropy_lse(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[N, V]`` -> ``[5, N]`` (top logit, lse, entropy, lse and entropy at the temperature), int64 ``[N]``."""
    z = logits.float() if logits.dtype != torch.float64 else logits
    top, index = z.max(-1)
    return torch.stack([top, *lse_and_entropy(z), *lse_and_entropy(z / temperature)]), index


def lse_and_entropy(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows ``[N, V]``. The entropy is taken from what lies below the largest logit, which may itself be large."""
    top = z.amax(-1, keepdim=True)
    below = z - torch.where(top == -torch.inf, 0.0, top)
    weight = below.exp()
    total = weight.sum(-1)
    lost = torch.where(weight == 0, 0.0, weight * below).sum(-1)
    entropy = torch.where(total == 0, 0.0, total.log() - lost / total).clamp(min=0)
    return z.logsumexp(-1), entropy


def soft_embed(
    logits: torch.Tensor, weight: torch.Tensor, lse: torch.Tensor, temperature: float, scale: float
) -> torch.Tensor:
    """Logits ``[N, V]``, weight ``[Vw, D]``, lse ``[N]`` -> fp32 ``[N, D]`` (fp64 if given fp64)."""
    precise = logits.double() if weight.dtype == torch.float64 else logits.float()
    p = (precise / temperature - lse[:, None]).exp()
    p = torch.where(precise == -torch.inf, 0.0, p)
    return scale * (p @ weight[: logits.shape[1]].to(precise.dtype))
