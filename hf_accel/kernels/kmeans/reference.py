"""The definition of one Lloyd iteration, in plain torch."""

from __future__ import annotations

import torch


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Nearest centroid, ties to the lowest: ``argmin_k ||c_k||^2 - 2 x.c_k`` (``||x||^2`` changes no argmin).

    ``x`` ``[..., N, D]``, ``centroids`` ``[..., K, D]`` -> int32 ``[..., N]``.
    """
    points, centers = x.float(), centroids.float()
    distance = centers.square().sum(-1)[..., None, :] - 2 * points @ centers.mT
    return distance.argmin(-1).int()


def update(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each cluster's members in fp32; a cluster without members keeps its old centroid.

    Returns centroids ``[..., K, D]`` in the dtype of ``x`` and sizes int32 ``[..., K]``.
    """
    members = labels[..., None, :] == torch.arange(centroids.shape[-2], device=x.device)[:, None]
    sizes = members.sum(-1)
    mean = members.float() @ x.float() / sizes.clamp(min=1)[..., None]
    return torch.where(sizes[..., None] > 0, mean.to(x.dtype), centroids), sizes.int()
