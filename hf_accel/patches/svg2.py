"""``svg2``: Sparse VideoGen2, sparse self-attention for video DiTs by semantic-aware permutation.

Paper: "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
arXiv 2505.18875. Clustering: "Flash-KMeans", arXiv 2603.09229.

Per layer and head, queries and keys are clustered apart by k-means; the centroids give a small estimate of the
attention map; each query cluster keeps the key clusters that hold a share ``top_p`` of its mass; exact softmax
attention runs on the kept rectangles. Centroids live across the steps of a generation and are shared by its CFG
branches.

Decisions where the paper and the released code differ or are silent:

* The top-p selection runs in fp32 (the released code rounds probabilities to bf16 before summing).
* ``top_p >= 1`` keeps every cluster; a cumulative sum in fp32 would drop tails.
* k-means runs a fixed number of iterations without the released code's convergence test, which waits for the
  device at every iteration.
* Cold centroids are tokens drawn with a generator private to the layer and the item of the batch, so that a
  generation is reproducible, an item does not depend on the batch it is in, and nobody's global random state moves.
* Text tokens (HunyuanVideo and other joint sequences) are one query block that sees every valid key and one key
  block that every query sees. Padded text is hidden as a key and computed as a query, as the host's own mask has
  it; the released code lets padding attend to padding. The video output is the same.
* In always-dense layers no clustering runs, also under ``zero_step_kmeans_init`` (the released code wastes it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.layout import density, expand_heads
from hf_accel.attention.selectors import centroid_map, top_p
from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.kernels.kmeans import KMeansResult, kmeans, seed
from hf_accel.kernels.permute import gather_rows
from hf_accel.kernels.variable_block_attention import variable_block_attention
from hf_accel.registry import register
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig


@dataclass(frozen=True)
class SVG2Config(SparseAttentionConfig):
    """Settings of :class:`SVG2`. Names follow the released code; defaults are its 720p scripts for Wan 2.1."""

    METHOD = "svg2"

    top_p: float = setting(0.9, "share of estimated attention mass each query cluster keeps", gt=0, le=1)
    min_kc_ratio: float = setting(0.1, "least share of key clusters kept, by count", ge=0, le=1)
    num_q_centroids: int = setting(300, "query clusters per head", ge=1)
    num_k_centroids: int = setting(1000, "key clusters per head", ge=1)
    kmeans_iter_init: int = setting(50, "k-means iterations from cold centroids", ge=1)
    kmeans_iter_step: int = setting(2, "k-means iterations from the last step's centroids", ge=1)
    zero_step_kmeans_init: bool = setting(False, "cluster from step 0 on, during the dense steps")
    dense_steps: int | float = setting(0.2, "first steps that stay dense", share=True)
    dense_layers: int | float = setting(0.03, "first layers that stay dense", share=True)


@dataclass
class Centroids:
    """State of one layer for one generation: centroids ``[B, H, C, D]`` of the last call, or None before it."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


@register
class SVG2(AttentionMethod):
    """Semantic-aware permutation and centroid top-p block-sparse attention."""

    name = "svg2"
    paper = "Sparse VideoGen2, arXiv 2505.18875"
    summary = "sparse video self-attention: k-means clusters of queries and keys, top-p by centroids"
    facts = Facts(
        site="attention",
        needs=frozenset({"token grid", "step", "text span"}),
        media=frozenset({"video", "image"}),
        full_budget={"top_p": 1.0, "dense_steps": 0, "dense_layers": 0},
        budget="top_p",
    )
    Config = SVG2Config
    config: SVG2Config

    def new_state(self) -> Centroids:
        return Centroids()

    def observe(self, call: AttentionCall, state: Centroids) -> None:
        if self.config.zero_step_kmeans_init:
            self.cluster(call, state)

    def attend(self, call: AttentionCall, state: Centroids) -> torch.Tensor:
        try:
            valid = call.key_validity()
        except ValueError as error:
            return call.fallback(str(error))
        if valid is not None and (call.grid is None or call.grid.text == "none"):
            return call.fallback("a mask over video tokens")
        query, key = self.cluster(call, state)
        keep = self.select(self.estimate(call, query, key))
        start, stop = video_span(call)
        query_order, query_sizes = with_text(query, start, stop, call.query.shape[2], None)
        key_order, key_sizes = with_text(key, start, stop, call.key.shape[2], valid)
        keep = torch.nn.functional.pad(
            keep,
            (0, key_sizes.shape[-1] - keep.shape[-1], 0, query_sizes.shape[-1] - keep.shape[-2]),
            value=True,
        )

        heads = call.query.shape[1]
        both = (expand_heads(call.key, heads), expand_heads(call.value, heads))
        sorted_key, sorted_value = gather_rows(both, key_order, backend=self.config.backend)
        # Queries are gathered and outputs scattered inside the kernel: each is touched once.
        out, _ = variable_block_attention(
            call.query, sorted_key, sorted_value, keep, query_sizes, key_sizes,
            scale=call.scale, query_order=query_order, backend=self.config.backend,
        )  # fmt: skip
        call.record_density(density(keep, query_sizes, key_sizes))
        return out

    def estimate(self, call: AttentionCall, query: KMeansResult, key: KMeansResult) -> torch.Tensor:
        """Estimated attention mass between clusters ``[B, H, Cq, Ck]`` from centroids, key sizes as weights."""
        return centroid_map(query.centroids, key.centroids, key.sizes, call.scale)

    def select(self, estimate: torch.Tensor) -> torch.Tensor:
        """Bool ``[B, H, Cq, Ck]``: the fewest key clusters that hold ``top_p`` of each row's estimated mass."""
        return top_p(estimate, self.config.top_p, int(self.config.min_kc_ratio * estimate.shape[-1]))

    def cluster(self, call: AttentionCall, state: Centroids) -> tuple[KMeansResult, KMeansResult]:
        """Cluster the video tokens of a call from the state's centroids, and keep the new ones."""
        settings = self.config
        start, stop = video_span(call)
        tokens = stop - start
        points = [x[:, :, start:stop] for x in (call.query, expand_heads(call.key, call.query.shape[1]))]
        counts = [min(count, tokens) for count in (settings.num_q_centroids, settings.num_k_centroids)]
        iterations = settings.kmeans_iter_step
        if state.query is None:
            iterations = settings.kmeans_iter_init
            state.query, state.key = cold_centroids(points, counts, call.layer.index)
        results = [
            kmeans(x, count, centroids=centroids, iterations=iterations, backend=settings.backend)
            for x, count, centroids in zip(points, counts, (state.query, state.key), strict=True)
        ]
        state.query, state.key = results[0].centroids, results[1].centroids
        return results[0], results[1]


def cold_centroids(points: list[torch.Tensor], counts: list[int], layer: int) -> list[torch.Tensor]:
    """Tokens drawn of each ``[B, H, N, D]``, as many as its count: ``[B, H, C, D]``. Every item draws the same places,
    whatever batch it is in."""
    drawn = []
    for item in range(len(points[0])):
        generator = torch.Generator(points[0].device).manual_seed(layer)
        drawn.append([seed(x[item : item + 1], n, generator=generator) for x, n in zip(points, counts, strict=True)])
    return [torch.cat(items) for items in zip(*drawn, strict=True)]


def video_span(call: AttentionCall) -> tuple[int, int]:
    """First and last-plus-one video token; the runner has checked that the grid fits the sequence."""
    span = call.grid.video_span(call.query.shape[2]) if call.grid is not None else None
    return span if span is not None else (0, call.query.shape[2])


def with_text(
    clusters: KMeansResult, start: int, stop: int, sequence: int, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and block sizes of the whole sequence: video by cluster, then text as one more block.

    Args:
        clusters: of the video tokens ``[start, stop)``.
        valid: ``[B, S]`` bool; hidden text goes behind the last block, where it belongs to none. None: all valid.

    Returns:
        order ``[B, H, S]`` int32, sizes ``[B, H, C]`` or ``[B, H, C + 1]`` int32.
    """
    order = clusters.order + start
    if stop - start == sequence:
        return order, clusters.sizes
    device = order.device
    text = torch.cat([torch.arange(0, start, device=device), torch.arange(stop, sequence, device=device)])
    text = text.expand(order.shape[0], -1)
    count = torch.full((order.shape[0],), text.shape[1], device=device)
    if valid is not None:
        shown = valid.gather(1, text)
        text = text.gather(1, torch.argsort(~shown, dim=1, stable=True))
        count = shown.sum(1)
    heads = order.shape[1]
    text = text[:, None].expand(-1, heads, -1).to(torch.int32)
    count = count[:, None, None].expand(-1, heads, 1).to(torch.int32)
    return torch.cat([order, text], dim=2), torch.cat([clusters.sizes, count], dim=2)
