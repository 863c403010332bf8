"""k-means in plain torch, fast on a CPU and right on any device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_accel.kernels.permute.cpu import row_table

# So many scores are made at a time. Few large steps: each is two parallel regions, which on a loaded CPU wait
# for the slowest thread, and smaller ones gain nothing on an idle one.
_SCORE_ELEMENTS = 1 << 23
_SCORE_ELEMENTS_GPU = 1 << 27
# BLAS has other kernels for odd last columns, which round otherwise: equal centroids would get unequal scores.
_COLUMNS = 16


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, N, D]``, ``centroids`` ``[B, H, K, D]`` -> labels int32 ``[B, H, N]``."""
    batch, heads, length, _ = x.shape
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    num_clusters = centroids.shape[2]
    elements = _SCORE_ELEMENTS if x.device.type == "cpu" else _SCORE_ELEMENTS_GPU
    chunk = max(512, elements // (heads * num_clusters))
    # Copies of centroid 0 fill up the columns: they tie with it, and the lower index wins.
    padding = centroids[:, :, :1].expand(-1, -1, -num_clusters % _COLUMNS, -1)
    centers = torch.cat([centroids, padding], 2).float()
    bias = -0.5 * centers.square().sum(-1)[:, :, None]
    for b in range(batch):
        for start in range(0, length, chunk):
            points = x[b, :, start : start + chunk].float()
            scores = torch.baddbmm(bias[b], points, centers[b].mT)
            # max and not argmax: on a CPU torch finds both faster than the index alone.
            labels[b, :, start : start + chunk] = scores.max(-1).indices
    return labels


def means(x: torch.Tensor, old: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Means ``[B, H, K, D]`` of the runs of ``order``: an embedding bag gathers and sums in one pass."""
    table, rows = row_table(x.float(), order)
    counts = sizes.flatten().long()
    sums = F.embedding_bag(rows.flatten(), table, counts.cumsum(0) - counts, mode="sum").view(old.shape)
    mean = (sums / sizes.clamp(min=1)[..., None]).to(x.dtype)
    return torch.where(sizes[..., None] > 0, mean, old)
