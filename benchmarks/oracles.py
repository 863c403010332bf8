"""Yardsticks for sparse video attention: what no method can beat, and what every method must beat.

Methods like any other, used by the benchmarks only; they compute the attention map row by row, so they are slow.
For models whose sequence is video alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.layout import density
from hf_accel.attention.selectors import top_k, top_p
from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.kernels.block_sparse_attention import block_map_to_index, block_sparse_attention
from hf_accel.kernels.kmeans import KMeansResult
from hf_accel.kernels.permute import sort_by_label
from hf_accel.patches.svg2 import SVG2, Centroids, SVG2Config, video_span
from hf_accel.registry import register
from hf_accel.sites.attention.base import AttentionMethod

ROWS = 256  # rows of the attention map that exist at a time: small enough for the cache of a CPU


def map_rows(call: AttentionCall) -> Iterator[tuple[slice, torch.Tensor]]:
    """The true probabilities in fp32, ``[B, H, rows, S]`` at a time."""
    key = call.key.float().mT
    for start in range(0, call.query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        yield rows, torch.softmax(call.query[:, :, rows].float() @ key * call.scale, dim=-1)


def top_p_by_bisection(probabilities: torch.Tensor, p: float, rounds: int = 16) -> torch.Tensor:
    """The entries of each row above the highest threshold that still leaves mass ``p``; no sort of the whole map."""
    low = torch.zeros_like(probabilities[..., :1])
    high = probabilities.amax(-1, keepdim=True)
    for _ in range(rounds):
        middle = (low + high) / 2
        enough = torch.where(probabilities >= middle, probabilities, 0).sum(-1, keepdim=True) >= p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return probabilities >= low


def label_mass(call: AttentionCall, query_labels: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    """True mass between groups of tokens, ``[B, H, Cq, Ck]``, rows summing to 1. Labels ``[B, H, S]``."""
    columns = F.one_hot(key_labels.long()).float()
    mass = None
    groups = int(query_labels.max()) + 1
    for rows, probabilities in map_rows(call):
        members = F.one_hot(query_labels[:, :, rows].long(), groups).float()
        part = members.mT @ (probabilities @ columns)
        mass = part if mass is None else mass + part
    if mass is None:
        raise ValueError("a call without tokens")
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)


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
        return self._tokens(call) if self.config.block == 1 else self._blocks(call)

    def _tokens(self, call: AttentionCall) -> torch.Tensor:
        outs, kept = [], []
        for _, probabilities in map_rows(call):
            keep = top_p_by_bisection(probabilities, self.config.top_p)
            weights = torch.where(keep, probabilities, 0)
            outs.append(weights / weights.sum(-1, keepdim=True) @ call.value.float())
            kept.append(keep.float().mean(-1))
        call.record_density(torch.cat(kept, -1).mean(-1))
        return torch.cat(outs, 2).to(call.query.dtype)

    def _blocks(self, call: AttentionCall) -> torch.Tensor:
        block, size = self.config.block, call.query.shape[2]
        labels = (torch.arange(size, device=call.query.device) // block).expand(call.query.shape[:3])
        keep = top_p(label_mass(call, labels, labels), self.config.top_p)
        index, count = block_map_to_index(keep)
        sizes = torch.full(keep.shape[:3], block)
        sizes[..., -1] = size - block * (keep.shape[2] - 1)
        call.record_density(density(keep, sizes.to(keep.device), sizes.to(keep.device)))
        out, _ = block_sparse_attention(
            call.query, call.key.contiguous(), call.value.contiguous(), index, count, block_size=block, scale=call.scale
        )
        return out


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
        mass = label_mass(call, query.labels, key.labels)
        # Labels beyond the last one used have no column yet: empty clusters.
        return F.pad(mass, (0, key.sizes.shape[-1] - mass.shape[-1], 0, query.sizes.shape[-1] - mass.shape[-2]))


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
