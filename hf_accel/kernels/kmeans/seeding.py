"""First centroids for a cold start: a uniform draw, or k-means++ on a subsample."""

from __future__ import annotations

import math

import torch

# k-means++ looks at so many tokens, so that its cost does not grow with the sequence.
_SAMPLES_PER_CENTROID = 4
_LEAST_SAMPLES = 2048


def uniform(x: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """``num_clusters`` rows of each head of ``x`` ``[B, H, N, D]``, drawn uniformly with replacement."""
    batch, heads, length, _ = x.shape
    shape = (batch, heads, num_clusters)
    rows = torch.randint(length, shape, generator=generator, device=x.device)
    return _take(x, rows)


def plus_plus(x: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007) on a stratified subsample, all heads at once.

    Each new centroid is drawn with a probability proportional to the squared distance to the nearest one so
    far; of ``2 + ln K`` such candidates the one that lowers the sum of these distances most is taken. One
    step per centroid, without waiting for the device. Where a head has fewer distinct rows than centroids,
    the rest are copies of its first sampled row (and end up as empty clusters).
    """
    batch, heads, length, head_dim = x.shape
    groups = batch * heads
    samples = min(length, max(_LEAST_SAMPLES, _SAMPLES_PER_CENTROID * num_clusters))
    candidates = 2 + int(math.log(num_clusters))
    # One row per stratum: no row twice, and every stretch of the sequence is seen.
    jitter = torch.rand((batch, heads, samples), generator=generator, device=x.device, dtype=torch.float64)
    rows = ((torch.arange(samples, device=x.device) + jitter) * (length / samples)).long().clamp(max=length - 1)
    points = _take(x, rows).float().view(groups, samples, head_dim)
    norms = points.square().sum(-1)
    draws = torch.rand((num_clusters, groups, candidates), generator=generator, device=x.device)
    chosen = torch.empty(num_clusters, groups, dtype=torch.int64, device=x.device)
    chosen[0] = (draws[0, :, 0] * samples).long().clamp(max=samples - 1)
    group = torch.arange(groups, device=x.device)
    nearest = _squared_distances(points, norms, chosen[0][:, None])[:, 0]
    for k in range(1, num_clusters):
        mass = nearest.cumsum(-1)
        picks = torch.searchsorted(mass, draws[k] * mass[:, -1:]).clamp(max=samples - 1)
        closer = torch.minimum(_squared_distances(points, norms, picks), nearest[:, None])
        best = closer.sum(-1).argmin(-1)
        nearest = closer[group, best]
        chosen[k] = picks[group, best]
    return _take(x, rows.view(groups, samples).gather(1, chosen.T).view(batch, heads, num_clusters))


def _squared_distances(points: torch.Tensor, norms: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """fp32 ``[G, L, M]`` from the picked rows ``[G, L]`` to all of ``points`` ``[G, M, D]``."""
    centers = points.gather(1, picks[..., None].expand(*picks.shape, points.shape[-1]))
    products = torch.bmm(centers, points.mT)
    distances = norms[:, None] + norms.gather(1, picks)[..., None] - 2 * products
    return distances.clamp_(min=0).scatter_(2, picks[..., None], 0.0)


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.gather(2, rows[..., None].expand(*rows.shape, x.shape[-1]))
