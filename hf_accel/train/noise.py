"""Noise levels, noise and mixtures of flow matching, each a function of (seed, step), never of what ran before."""

from __future__ import annotations

import hashlib
import math

import torch

from hf_accel.train.config import FinetuneConfig


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_levels(count: int, config: FinetuneConfig, generator: torch.Generator) -> torch.Tensor:
    """fp32 ``[count]`` in (0, 1); see :class:`FinetuneConfig` for the distribution."""
    logits = config.sigma_mean + config.sigma_std * torch.randn(count, generator=generator)
    return torch.sigmoid(logits + math.log(config.sigma_shift))


def mix(latents: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """``(1 - sigma) latents + sigma noise`` with ``sigma`` ``[B]`` and the others ``[B, ...]``."""
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise
