"""Noise levels, noise and mixtures of flow matching, each a function of (seed, step), never of what ran before."""

from __future__ import annotations

import math

import torch

from hf_accel.train.finetune.config import FinetuneConfig


def noise_levels(count: int, config: FinetuneConfig, generator: torch.Generator) -> torch.Tensor:
    """fp32 ``[count]`` in (0, 1); see :class:`FinetuneConfig` for the distribution."""
    logits = config.sigma_mean + config.sigma_std * torch.randn(count, generator=generator)
    return torch.sigmoid(logits + math.log(config.sigma_shift))


def mix(latents: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """``(1 - sigma) latents + sigma noise`` with ``sigma`` ``[B]`` and the others ``[B, ...]``."""
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise
