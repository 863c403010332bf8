"""Which blocks a query block attends to: scores from centroids, then a budget. Batched, without a host sync."""

from __future__ import annotations

import torch

from hf_accel.errors import InvalidSetting


def centroid_map(
    query_centroids: torch.Tensor,
    key_centroids: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Estimated share of each key cluster in the attention of each query cluster.

    ``P_ij = n_j exp(scale q_i.k_j) / sum_j n_j exp(scale q_i.k_j)`` in fp32: the attention a query at centroid
    i would pay if every key stood at its centroid (Sparse VideoGen2, arXiv 2505.18875, section 3.2).

    Args:
        query_centroids: ``[B, H, Cq, D]``.
        key_centroids: ``[B, H, Ck, D]``.
        key_sizes: int ``[B, H, Ck]``, keys per cluster. A cluster of size 0 gets exactly 0.
        scale: factor on the logits, ``1 / sqrt(D)`` if None.

    Returns:
        fp32 ``[B, H, Cq, Ck]``; rows sum to 1 (to 0 if all key clusters are empty).
    """
    if scale is None:
        scale = query_centroids.shape[-1] ** -0.5
    logits = scale * (query_centroids.float() @ key_centroids.float().mT) + key_sizes.float().log()[..., None, :]
    some_key = (key_sizes > 0).any(-1)[..., None, None]
    return torch.where(some_key, logits.softmax(-1), 0.0)


def top_p(probabilities: torch.Tensor, p: float, min_keep: int = 0) -> torch.Tensor:
    """Keep, row by row, the largest probabilities until their sum passes ``p``.

    Rank r is kept iff the ranks before it sum to at most ``p``: the block that crosses p is kept, and a row is
    never empty. In fp32, and ``p >= 1`` keeps everything without a sum: a running sum of rounded terms may pass
    1 before the end and would drop the tail.

    Args:
        probabilities: ``[..., C]``, non-negative, rows summing to about 1.
        p: mass to cover, above or equal to 0.
        min_keep: ranks kept at any rate.

    Returns:
        bool ``[..., C]``.

    Raises:
        InvalidSetting: a negative ``p`` or ``min_keep``.
    """
    if not p >= 0:
        raise InvalidSetting("top_p", "p", p, "0 or more")
    if min_keep < 0:
        raise InvalidSetting("top_p", "min_keep", min_keep, "0 or more")
    if p >= 1:
        return torch.ones_like(probabilities, dtype=torch.bool)
    mass, rank_to_block = probabilities.float().sort(dim=-1, descending=True, stable=True)
    before = mass.cumsum(-1).roll(1, -1)
    before[..., :1] = 0
    keep = before <= p
    keep[..., :min_keep] = True
    return torch.empty_like(keep).scatter_(-1, rank_to_block, keep)


def top_cdf(probabilities: torch.Tensor, tau: float | torch.Tensor) -> torch.Tensor:
    """Keep, row by row, the largest probabilities whose running sum stays at or below ``tau``, and the largest anyway.

    Unlike :func:`top_p` the block that crosses ``tau`` is not kept: this is the rule of SpargeAttention (arXiv
    2502.18137). ``tau >= 1`` keeps everything without a sum. The released code compares the sum there too, and drops
    the smallest blocks of a row whose sum was rounded to more than 1.

    Args:
        probabilities: ``[..., C]``, non-negative, rows summing to about 1.
        tau: mass, a number or a tensor that broadcasts to ``[..., 1]`` (a value per head, say).

    Returns:
        bool ``[..., C]``.
    """
    mass, rank_to_block = probabilities.float().sort(dim=-1, descending=True, stable=True)
    tau = torch.as_tensor(tau, dtype=torch.float32, device=mass.device)
    keep = (mass.cumsum(-1) <= tau) | (tau >= 1)
    keep[..., :1] = True
    return torch.empty_like(keep).scatter_(-1, rank_to_block, keep)


def top_k(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """Keep the ``k`` largest scores of every row; all of them if there are fewer.

    Args:
        scores: ``[..., C]``.
        k: at least 1; or an int tensor that broadcasts to ``[..., 1]`` (a budget per head, say), not checked.

    Returns:
        bool ``[..., C]``.

    Raises:
        InvalidSetting: a number below 1.
    """
    if isinstance(k, torch.Tensor):
        rank_to_block = scores.argsort(dim=-1, descending=True, stable=True)
        keep = torch.arange(scores.shape[-1], device=scores.device) < k
        keep = keep.expand(scores.shape)
        return torch.empty_like(keep, memory_format=torch.contiguous_format).scatter_(-1, rank_to_block, keep)
    if k < 1:
        raise InvalidSetting("top_k", "k", k, "at least 1")
    kept = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
