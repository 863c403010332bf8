"""soft-embed: DiffusionGemma's self-conditioning without a matrix of probabilities, exactly.

At every denoising step after a block's first, DiffusionGemma's decoder embeds what it predicted one step before, at
all canvas positions: ``softmax(z) @ E * sqrt(D)``, with logits ``z`` ``[B, 256, 262144]`` that its sampler has divided
by the temperature already. The model's code makes the softmax in fp32, copies it to the weights' dtype and multiplies.
Here one pass over ``z`` finds the log-sum-exp, and the product makes its probabilities from ``z`` where it needs them
(``kernels/soft_embedding``): the same operands, rounded to the same dtype on a GPU, summed in fp32.

There is no paper: it is the kernel that *Residual Context Diffusion Language Models* (arXiv 2601.22954) needs for its
residuals, on a model that has such an embedding natively. RCD itself does not apply to DiffusionGemma, which has no
mask token and was trained with a self-conditioning of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import DIFFUSION_GEMMA
from hf_accel.kernels.common.dispatch import Choice
from hf_accel.kernels.soft_embedding import backend_for, entropy_lse, soft_embed
from hf_accel.registry import register
from hf_accel.sites.embedding.base import SoftEmbeddingMethod


@dataclass(frozen=True)
class SoftEmbedConfig(Config):
    """Settings of soft-embed. There is nothing to trade."""

    METHOD = "soft-embed"

    backend: str = setting("auto", "kernels to use", choices=("auto", "triton", "torch"))


@register
class SoftEmbed(SoftEmbeddingMethod):
    """The expected embedding by a fused kernel; see the module's docstring."""

    name = "soft-embed"
    paper = "no paper; the soft_embed kernel of Residual Context Diffusion, arXiv 2601.22954, on a native model"
    summary = "exact: DiffusionGemma's self-conditioning without a matrix of probabilities"
    facts = Facts(
        site="embedding",
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({DIFFUSION_GEMMA.name}),
        backward=True,
        exact=True,
    )
    Config = SoftEmbedConfig
    config: SoftEmbedConfig

    def embed(self, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``softmax(logits) @ weight``: ``[B, S, V]`` and ``[V, D]`` -> ``[B, S, D]`` in ``weight``'s dtype."""
        backend: Any = self.config.backend
        logits = logits.contiguous()
        return soft_embed(logits, weight, entropy_lse(logits, backend=backend).lse, backend=backend)

    def choice(self, weight: torch.Tensor) -> Choice:
        """Which kernels run, and why."""
        return backend_for(weight, self.config.backend, weight)


__all__ = ["SoftEmbed", "SoftEmbedConfig"]
