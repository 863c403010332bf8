"""Exact batched Lloyd k-means, squared Euclidean, deterministic: two runs on one machine are bit-equal.

The definition is that of Flash-KMeans (arXiv 2603.09229), which Sparse VideoGen2 (arXiv 2505.18875) runs on
queries and keys: labels by the nearest centroid in fp32, means of the members in fp32, and an empty cluster
keeps its centroid.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import permute
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take
from hf_accel.kernels.kmeans import seeding

__all__ = ["KMeansResult", "assign", "backend_for", "kmeans", "seed", "update"]

_LIMITS = TritonLimits(max_head_dim=256)
_SEEDINGS = {"random": seeding.uniform, "kmeans++": seeding.plus_plus}


class KMeansResult(NamedTuple):
    """``labels``, ``sizes``, ``order``: of the last assignment; ``centroids``: the means of its clusters.

    (After a stop by ``tolerance`` the centroids are those the last assignment was made with.)

    Attributes:
        labels: int32 ``[..., N]``.
        centroids: ``[..., K, D]`` in the dtype of the points.
        sizes: int32 ``[..., K]``, members per cluster; may be 0.
        order: int32 ``[..., N]``, tokens grouped by label as :func:`hf_accel.kernels.permute.sort_by_label`
            orders them: the update needs it, and so does who permutes the tokens next.
        iterations: assignments that were made.
    """

    labels: torch.Tensor
    centroids: torch.Tensor
    sizes: torch.Tensor
    order: torch.Tensor
    iterations: int


def backend_for(x: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for points ``[..., N, D]``, and why."""
    return choose("kmeans", x, _LIMITS, backend)


def kmeans(
    x: torch.Tensor,
    num_clusters: int,
    *,
    iterations: int,
    centroids: torch.Tensor | None = None,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
    init: Literal["random", "kmeans++"] = "random",
    backend: str = "auto",
) -> KMeansResult:
    """Cluster the points of every head by itself.

    Args:
        x: points ``[..., N, D]``, fp32, fp16 or bf16, any strides; leading dims are batch and heads.
        num_clusters: K.
        iterations: how many times to assign and update, at least 1.
        centroids: ``[..., K, D]`` to begin from (warm start), in the dtype of ``x``.
        tolerance: stop when no centroid of any head moved this far (Euclidean), and return the centroids
            *before* that last move. Above 0 it waits for the device once per iteration and couples the heads;
            at 0 neither happens, and the call can be compiled without a graph break.
        generator: for a cold start, on the device of ``x``; without one a private generator seeded with 0.
            The global generator is never used.
        init: cold start. ``"random"`` draws K points with replacement, as the papers' code does;
            ``"kmeans++"`` spreads them (K steps on a subsample), for data on which a random draw leaves a few
            clusters with nearly all points.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        InvalidSetting: a count below 1, a negative tolerance, an unknown ``init``.
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together.
    """
    _check_points("kmeans", x)
    if iterations < 1:
        raise InvalidSetting("kmeans", "iterations", iterations, "at least 1")
    if not tolerance >= 0:
        raise InvalidSetting("kmeans", "tolerance", tolerance, "0 or more")
    if centroids is None:
        centroids = seed(x, num_clusters, init=init, generator=generator)
    elif centroids.dim() < 2 or centroids.shape[-2] != num_clusters:
        raise UnsupportedByKernel(
            f"kmeans: centroids must be [..., {num_clusters}, D] for num_clusters={num_clusters}; "
            f"got {list(centroids.shape)}."
        )
    _check_centroids("kmeans", x, centroids)
    lead, points, old = x.shape[:-2], _four(x), _four(centroids)
    chosen = take("kmeans", backend_for(x, backend))
    done = 0
    while done < iterations:
        done += 1
        labels = _assign(points, old, chosen)
        new, sizes, order = _update(points, labels, old, chosen)
        if tolerance > 0 and _largest_move(new, old) < tolerance:
            new = old
            break
        old = new
    return KMeansResult(
        labels.view(*lead, x.shape[-2]),
        new.view(*lead, *new.shape[2:]),
        sizes.view(*lead, num_clusters),
        order.view(*lead, x.shape[-2]),
        done,
    )


def assign(x: torch.Tensor, centroids: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Nearest centroid of every point: int32 ``[..., N]``.

    ``argmin_k ||c_k||^2 - 2 x.c_k`` in fp32, ties to the lowest k. ``x`` is ``[..., N, D]`` with any strides,
    ``centroids`` ``[..., K, D]``. Raises :class:`UnsupportedByKernel` if they do not fit together.
    """
    _check_points("assign", x)
    _check_centroids("assign", x, centroids)
    return _assign(_four(x), _four(centroids), take("kmeans", backend_for(x, backend))).view(x.shape[:-1])


def update(
    x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the clusters, ``[..., K, D]`` in the dtype of ``x``, and their sizes, int32 ``[..., K]``.

    ``labels`` int32 ``[..., N]`` in ``[0, K)``. Sums are fp32 in a fixed order; a cluster without members
    keeps its row of ``centroids`` bit for bit. Raises :class:`UnsupportedByKernel` on what does not fit.
    """
    _check_points("update", x)
    _check_centroids("update", x, centroids)
    if labels.dtype != torch.int32 or labels.shape != x.shape[:-1] or labels.device != x.device:
        raise UnsupportedByKernel(
            f"update: labels must be int32 {list(x.shape[:-1])} on {x.device}; "
            f"got {labels.dtype} {list(labels.shape)} on {labels.device}."
        )
    points = _four(x)
    chosen = take("kmeans", backend_for(x, backend))
    new, sizes, _ = _update(points, labels.reshape(points.shape[:-1]), _four(centroids), chosen)
    return new.view(centroids.shape), sizes.view(centroids.shape[:-1])


def seed(
    x: torch.Tensor,
    num_clusters: int,
    *,
    init: Literal["random", "kmeans++"] = "random",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """First centroids ``[..., K, D]``: rows of ``x`` ``[..., N, D]``; see :func:`kmeans` for ``init``."""
    _check_points("seed", x)
    if num_clusters < 1:
        raise InvalidSetting("kmeans", "num_clusters", num_clusters, "at least 1")
    if init not in _SEEDINGS:
        raise InvalidSetting("kmeans", "init", init, f"one of {', '.join(map(repr, _SEEDINGS))}")
    if generator is None:
        centroids = _seed(_four(x), num_clusters, init)
    else:
        centroids = _SEEDINGS[init](_four(x), num_clusters, generator)
    return centroids.view(*x.shape[:-2], num_clusters, x.shape[-1])


@torch.library.custom_op("hf_accel::kmeans_assign", mutates_args=())
def _assign(x: torch.Tensor, centroids: torch.Tensor, backend: str) -> torch.Tensor:
    if backend == "triton":
        from hf_accel.kernels.kmeans import triton as kernels

        return kernels.assign(x, centroids)
    from hf_accel.kernels.kmeans import cpu

    return cpu.assign(x, centroids)


@_assign.register_fake
def _(x: torch.Tensor, centroids: torch.Tensor, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int32)


@torch.library.custom_op("hf_accel::kmeans_update", mutates_args=())
def _update(
    x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centroids, sizes, and the order that the sums were made in."""
    order, sizes = permute.sort_by_label(labels, centroids.shape[2], backend=backend)
    if backend == "triton":
        from hf_accel.kernels.kmeans import triton as kernels

        return kernels.means(x, labels, centroids, order, sizes), sizes, order
    from hf_accel.kernels.kmeans import cpu

    return cpu.means(x, centroids, order, sizes), sizes, order


@_update.register_fake
def _(
    x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = labels.new_empty(centroids.shape[:-1])
    return centroids.new_empty(centroids.shape), sizes, labels.new_empty(labels.shape)


@torch.library.custom_op("hf_accel::kmeans_seed", mutates_args=())
def _seed(x: torch.Tensor, num_clusters: int, init: str) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    return _SEEDINGS[init](x, num_clusters, generator)


@_seed.register_fake
def _(x: torch.Tensor, num_clusters: int, init: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], num_clusters, x.shape[3])


def _four(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., N, D]`` as ``[B, H, N, D]``: a view except for more than two leading dims that do not merge."""
    lead = tensor.shape[:-2]
    if len(lead) < 2:
        return tensor.reshape(1, *(lead or (1,)), *tensor.shape[-2:])
    return tensor.reshape(math.prod(lead[:-1]), *tensor.shape[-3:])


def _largest_move(new: torch.Tensor, old: torch.Tensor) -> float:
    return (new.float() - old.float()).norm(dim=-1).max().item()


def _check_points(op: str, x: torch.Tensor) -> None:
    if x.dim() < 2 or x.numel() == 0:
        raise UnsupportedByKernel(f"{op}: points must be [..., N, D] with N and D above 0; got {list(x.shape)}.")
    if x.dtype not in _LIMITS.dtypes:
        raise UnsupportedByKernel(f"{op}: points must be float32, float16 or bfloat16; got {x.dtype}.")


def _check_centroids(op: str, x: torch.Tensor, centroids: torch.Tensor) -> None:
    fits = centroids.dim() == x.dim() and centroids.shape[-2] > 0
    if not fits or centroids.shape[:-2] != x.shape[:-2] or centroids.shape[-1] != x.shape[-1]:
        raise UnsupportedByKernel(
            f"{op}: points {list(x.shape)} need centroids {[*x.shape[:-2], 'K', x.shape[-1]]}; "
            f"got {list(centroids.shape)}."
        )
    if (centroids.dtype, centroids.device) != (x.dtype, x.device):
        raise UnsupportedByKernel(
            f"{op}: centroids must be {x.dtype} on {x.device} like the points; "
            f"got {centroids.dtype} on {centroids.device}."
        )
