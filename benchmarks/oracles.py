"""Yardsticks for sparse video attention: what no method can beat, and what every method must beat.

Methods like any other, used by the benchmarks only; they materialise the attention map, so they are slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.selectors import top_k, top_p
from hf_accel.config import Config, setting
from hf_accel.kernels.kmeans import KMeansResult
from hf_accel.kernels.permute import sort_by_label
from hf_accel.method import AttentionMethod, Facts
from hf_accel.patches.svg2 import SVG2, Centroids, SVG2Config, video_span
from hf_accel.registry import register


def attention_map(call: AttentionCall) -> torch.Tensor:
    """The true probabilities ``[B, H, S, S]`` in fp32."""
    return torch.softmax(call.query.float() @ call.key.float().mT * call.scale, dim=-1)


def top_p_by_bisection(probabilities: torch.Tensor, p: float, rounds: int = 16) -> torch.Tensor:
    """The entries of each row above the highest threshold that still leaves mass ``p``; no sort of the whole map."""
    low = torch.zeros_like(probabilities[..., :1])
    high = probabilities.amax(-1, keepdim=True)
    for _ in range(rounds):
        middle = (low + high) / 2
        enough = torch.where(probabilities >= middle, probabilities, 0).sum(-1, keepdim=True) >= p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return probabilities >= low


def block_mass(probabilities: torch.Tensor, block: int) -> torch.Tensor:
    """Sum of probabilities per ``block x block`` rectangle, ``[B, H, ceil(S/block), ceil(S/block)]``."""
    size = probabilities.shape[-1]
    pad = -size % block
    padded = F.pad(probabilities, (0, pad, 0, pad))
    count = padded.shape[-1] // block
    return padded.unflatten(-1, (count, block)).sum(-1).unflatten(-2, (count, block)).sum(-2)


@dataclass(frozen=True)
class OracleConfig(Config):
    METHOD = "oracle"

    top_p: float = setting(0.9, "share of the true attention mass kept", gt=0, le=1)
    block: int = setting(1, "edge of the blocks chosen, in tokens; 1 chooses single keys per row", ge=1)
    dense_steps: int | float = setting(0, "first steps that stay dense", share=True)
    dense_layers: int | float = setting(0, "first layers that stay dense", share=True)


@register
class Oracle(AttentionMethod):
    """True top-p: the fewest keys (or key blocks) that hold ``top_p`` of the true mass of a row (or query block)."""

    name = "oracle"
    paper = "none"
    summary = "yardstick: true top-p per token or per block"
    facts = Facts(site="attention", needs=frozenset({"token grid", "step"}), full_budget={"top_p": 1.0})
    Config = OracleConfig
    config: OracleConfig

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        probabilities = attention_map(call)
        block = self.config.block
        if block == 1:
            keep = top_p_by_bisection(probabilities, self.config.top_p)
        else:
            mass = block_mass(probabilities, block)
            blocks = top_p(mass / mass.sum(-1, keepdim=True), self.config.top_p)
            size = probabilities.shape[-1]
            keep = blocks.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :size, :size]
        call.record_density(keep.float().mean((-2, -1)))
        return F.scaled_dot_product_attention(call.query, call.key, call.value, keep, scale=call.scale)


@dataclass(frozen=True)
class ClusterOracleConfig(SVG2Config):
    METHOD = "svg2-oracle"


@register
class ClusterOracle(SVG2):
    """svg2 with its own clusters, but choosing by their true mass instead of the centroids' estimate."""

    name = "svg2-oracle"
    summary = "yardstick: svg2's clusters chosen by true mass"
    Config = ClusterOracleConfig

    def estimate(self, call: AttentionCall, query: KMeansResult, key: KMeansResult) -> torch.Tensor:
        start, stop = video_span(call)
        probabilities = attention_map(call)[..., start:stop, start:stop]
        rows = F.one_hot(query.labels.long(), query.sizes.shape[-1]).float()
        columns = F.one_hot(key.labels.long(), key.sizes.shape[-1]).float()
        mass = rows.mT @ probabilities @ columns
        return mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)


@dataclass(frozen=True)
class RandomClustersConfig(SVG2Config):
    METHOD = "random-clusters"

    density: float = setting(0.3, "share of key clusters kept, by count", gt=0, le=1)


@register
class RandomClusters(SVG2):
    """svg2 with tokens thrown into clusters at random; keeps the best ``density`` of them by estimated mass."""

    name = "random-clusters"
    summary = "control: svg2 with random clusters at a given density"
    Config = RandomClustersConfig
    config: RandomClustersConfig

    def cluster(self, call: AttentionCall, state: Centroids) -> tuple[KMeansResult, KMeansResult]:
        start, stop = video_span(call)
        generator = torch.Generator().manual_seed(1000 * call.step.index + call.layer.index)
        return (
            self._random(call.query[:, :, start:stop], self.config.num_q_centroids, generator),
            self._random(call.key[:, :, start:stop], self.config.num_k_centroids, generator),
        )

    def _random(self, x: torch.Tensor, count: int, generator: torch.Generator) -> KMeansResult:
        count = min(count, x.shape[2])
        labels = torch.rand(x.shape[:3], generator=generator).argsort(-1) % count
        labels = labels.to(x.device, torch.int32)
        order, sizes = sort_by_label(labels, count)
        one_hot = F.one_hot(labels.long(), count).to(x.dtype)
        centroids = (one_hot.mT @ x) / sizes[..., None].clamp_min(1).to(x.dtype)
        return KMeansResult(labels=labels, centroids=centroids, sizes=sizes, iterations=0, order=order)

    def select(self, estimate: torch.Tensor) -> torch.Tensor:
        return top_k(estimate, max(1, round(self.config.density * estimate.shape[-1])))
