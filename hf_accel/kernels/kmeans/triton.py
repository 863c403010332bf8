"""k-means on the GPU: a fused distance and argmax, and cluster means without float atomics.

**Assign** (the idea is FlashAssign of Flash-KMeans, arXiv 2603.09229): a program holds a tile of tokens and
streams the centroids past it, so the N x K matrix of distances is never stored. ``argmin ||x - c||^2`` is
``argmax x.c - ||c||^2 / 2``. Beside the matrix product every score costs four instructions (subtract, compare,
two selects), which is the second bound at D = 128 and the first at D = 64; so threads fold only the columns
they own, and lanes meet once, after the last tile. Work: 2 N K D FLOP; bytes: x once, centroids from L2.

**Means**: tokens arrive sorted by label, so a cluster is a run of rows. One program sums a whole cluster of
up to ``LARGE`` rows; the rows of larger clusters are summed by chunks of ``CHUNK`` sorted positions, and a
second kernel adds the chunks. Every sum has a fixed order: two runs are bit-equal, and no program is long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase
from hf_accel.kernels.common.tile import Tile, compute_capability
from hf_accel.kernels.permute.triton import on_device_of

CHUNK = 512
LARGE = 1024  # at least CHUNK: then a chunk touches at most two large clusters
_PACK_ROWS = 32
_MEAN_ELEMENTS = 8192  # rows x head dim that a program of the means holds in registers
PADDING = 256  # packed centroids: a multiple of every BLOCK_K
# Columns of the running best. In every tensor-core layout a thread owns the same columns of each group of 8, so
# that groups fold into one another without leaving its registers.
LANES = tl.constexpr(8)


def assign_tile(cc: int, head_dim: int, dtype: torch.dtype, num_clusters: int) -> Tile:
    """``m`` tokens by ``n`` centroids for compute capability ``cc`` (0 in the interpreter).

    A table: tuning on the first call would stall a denoising loop.
    """
    if dtype == torch.float32:  # no tensor cores: exact fp32 products, and the rows are twice as long
        return Tile(32, 32, 4, 1)
    if head_dim > 128:
        return Tile(128, 64, 8, 2) if cc in (90, 100, 103) else Tile(64, 32, 4, 2)
    if cc == 90:
        # Wide tiles of centroids spare shared memory (each wgmma reads both operands from it), tall tiles of
        # tokens spare L2; both fill an SM with two programs of 128 registers a thread. Wide ones only where
        # rounding K up to 128 wastes little: K=1000, but not K=300.
        wide = -num_clusters % 128 <= num_clusters // 10
        return Tile(128, 128, 8, 2, max_registers=128) if wide else Tile(256, 64, 8, 2, max_registers=128)
    if cc in (100, 103):
        return Tile(128, 64, 4, 2)
    return Tile(128, 64, 8, 2)


@triton.jit(do_not_specialize=["K"])
def _pack_kernel(
    Centroids,
    Packed,
    HalfNorms,
    K,
    padded,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Centroids with zeros up to ``padded`` rows and BLOCK_D columns, and ``||c||^2 / 2``, +inf in the padding.

    So the assign kernel needs no mask on centroids: no score of the padding can win.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    mask = (row < K)[:, None] & (d < D)[None, :]
    c = tl.load(Centroids + group * K * D + row[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(Packed + (group * padded + row[:, None]) * BLOCK_D + d[None, :], c)
    c = c.to(tl.float32)
    half_norm = tl.where(row < K, 0.5 * tl.sum(c * c, axis=1), float("inf"))
    tl.store(HalfNorms + group * padded + row, half_norm)


@triton.jit
def _fold_columns(score, at, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Maximum of the columns of each residue modulo LANES, with ``at`` of the lowest that attains it."""
    if WIDTH == LANES:
        return score, at
    else:
        shape: tl.constexpr = [BLOCK_N, WIDTH // (2 * LANES), 2, LANES]
        low, high = tl.split(tl.permute(tl.reshape(score, shape), (0, 1, 3, 2)))
        low_at, high_at = tl.split(tl.permute(tl.reshape(at, shape), (0, 1, 3, 2)))
        better = high > low
        half: tl.constexpr = [BLOCK_N, WIDTH // 2]
        score = tl.reshape(tl.where(better, high, low), half)
        at = tl.reshape(tl.where(better, high_at, low_at), half)
        return _fold_columns(score, at, BLOCK_N, WIDTH // 2, LANES)


@triton.jit(do_not_specialize=["H", "N", "K"])
def _assign_kernel(
    X,
    Packed,
    HalfNorms,
    Labels,
    H,
    N,
    K,
    padded,
    stride_xb,
    stride_xh,
    stride_xn,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(
        X + (group // H) * stride_xb + (group % H) * stride_xh + token.to(tl.int64)[:, None] * stride_xn + d[None, :],
        mask=(token < N)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    column = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, LANES)
    packed = Packed + group * padded * BLOCK_D + column[None, :] * BLOCK_D + d[:, None]
    half_norms = HalfNorms + group * padded + column
    first_of_lanes = tl.zeros([BLOCK_N, BLOCK_K], tl.int32) + (column // LANES * LANES)[None, :]
    best = tl.full([BLOCK_N, LANES], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_N, LANES], tl.int32)
    for start in range(0, K, BLOCK_K):
        c = tl.load(packed + start * BLOCK_D)
        score = tl.dot(x, c, input_precision="ieee") - tl.load(half_norms + start)[None, :]
        score, at = _fold_columns(score, first_of_lanes, BLOCK_N, BLOCK_K, LANES)
        better = score > best
        best = tl.where(better, score, best)
        best_at = tl.where(better, at + start, best_at)
    # Of equal scores the lowest centroid wins: within a lane by the strict comparisons, across lanes here.
    top = tl.max(best, axis=1)
    label = tl.min(tl.where(best == top[:, None], best_at + lane[None, :], 2147483647), axis=1)
    tl.store(Labels + group * N + token, label, mask=token < N)


@triton.jit(do_not_specialize=["H", "N", "K"])
def _cluster_means_kernel(
    X,
    Labels,
    Order,
    Starts,
    Sizes,
    OldCentroids,
    Centroids,
    Partials,
    H,
    N,
    K,
    stride_xb,
    stride_xh,
    stride_xn,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Programs 0..K-1 own a cluster each; then every chunk has two: slot 0 for the cluster of its first row,
    slot 1 for the cluster of its last row if that is another. Clusters that are not large leave them idle."""
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    Order += group * N
    owns_cluster = program < K
    slot_index = program - K
    first = (slot_index // 2) * CHUNK
    last = tl.minimum(first + CHUNK, N) - 1
    cluster = program
    if not owns_cluster:
        edge = tl.where(slot_index % 2 == 0, first, last)
        cluster = tl.load(Labels + group * N + tl.load(Order + edge))
        cluster = tl.minimum(tl.maximum(cluster, 0), K - 1)
    start = tl.load(Starts + group * K + cluster)
    size = tl.load(Sizes + group * K + cluster)
    low = start
    high = start + size
    if owns_cluster:
        active = size <= LARGE
    else:
        active = (size > LARGE) & ((slot_index % 2 == 0) | (start > first))
        low = tl.maximum(low, first)
        high = tl.minimum(high, last + 1)
    if active:
        d = tl.arange(0, BLOCK_D)
        X += (group // H) * stride_xb + (group % H) * stride_xh
        total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for position in range(low, high, BLOCK):
            row = position + tl.arange(0, BLOCK)
            token = tl.load(Order + row, mask=row < high, other=0).to(tl.int64)
            mask = (row < high)[:, None] & (d < D)[None, :]
            total += tl.load(X + token[:, None] * stride_xn + d[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.sum(total, axis=0)
        if owns_cluster:
            cell = (group * K + cluster) * D + d
            old = tl.load(OldCentroids + cell, mask=d < D, other=0.0)
            mean = tl.div_rn(value, tl.maximum(size, 1).to(tl.float32)).to(old.dtype)
            tl.store(Centroids + cell, tl.where(size == 0, old, mean), mask=d < D)
        else:
            slots = tl.num_programs(0) - K
            tl.store(Partials + (group * slots + slot_index) * D + d, value, mask=d < D)


@triton.jit(do_not_specialize=["N", "K"])
def _large_means_kernel(
    Labels,
    Order,
    Starts,
    Sizes,
    Centroids,
    Partials,
    N,
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Each chunk finishes the large cluster that begins in it: at most one, and the last row is its."""
    chunk = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, N) - 1
    cluster = tl.load(Labels + group * N + tl.load(Order + group * N + last))
    cluster = tl.minimum(tl.maximum(cluster, 0), K - 1)
    start = tl.load(Starts + group * K + cluster)
    size = tl.load(Sizes + group * K + cluster)
    if (size > LARGE) & (start >= first):
        d = tl.arange(0, BLOCK_D)
        chunks = (start + size - 1) // CHUNK - chunk + 1
        Partials += (group * tl.num_programs(0) + chunk) * 2 * D
        total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for offset in range(0, chunks, BLOCK):
            ahead = offset + tl.arange(0, BLOCK)
            # Further chunks begin inside the cluster: slot 0. This one may begin in another: slot 1.
            slot = 2 * ahead + ((ahead == 0) & (start > first)).to(tl.int32)
            mask = (ahead < chunks)[:, None] & (d < D)[None, :]
            total += tl.load(Partials + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
        mean = tl.div_rn(tl.sum(total, axis=0), size.to(tl.float32))
        cell = Centroids + (group * K + cluster) * D + d
        tl.store(cell, mean.to(Centroids.dtype.element_ty), mask=d < D)


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _innermost_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def assign(x: torch.Tensor, centroids: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
    """``x`` ``[B, H, N, D]``, ``centroids`` ``[B, H, K, D]`` -> labels int32 ``[B, H, N]``."""
    x, centroids = _innermost_contiguous(x), centroids.contiguous()
    batch, heads, length, head_dim = x.shape
    num_clusters = centroids.shape[2]
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    if labels.numel() == 0:
        return labels
    tile = tile or assign_tile(compute_capability(x), head_dim, x.dtype, num_clusters)
    groups, padded = batch * heads, triton.cdiv(num_clusters, PADDING) * PADDING
    block_d = _block_d(head_dim)
    packed = torch.empty(groups, padded, block_d, dtype=x.dtype, device=x.device)
    half_norms = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _pack_kernel[(padded // _PACK_ROWS, groups)](
            centroids,
            packed,
            half_norms,
            num_clusters,
            padded,
            D=head_dim,
            BLOCK=_PACK_ROWS,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
        _assign_kernel[(triton.cdiv(length, tile.m), groups)](
            x,
            packed,
            half_norms,
            labels,
            heads,
            length,
            num_clusters,
            padded,
            *x.stride()[:3],
            D=head_dim,
            BLOCK_N=tile.m,
            BLOCK_K=tile.n,
            BLOCK_D=block_d,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
            enable_fp_fusion=True,
        )
    return labels


def means(
    x: torch.Tensor, labels: torch.Tensor, old: torch.Tensor, order: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Means ``[B, H, K, D]`` of the runs of ``order`` ``[B, H, N]``, whose lengths are ``sizes``."""
    x, labels, old = _innermost_contiguous(x), labels.contiguous(), old.contiguous()
    batch, heads, length, head_dim = x.shape
    num_clusters = old.shape[2]
    centroids = torch.empty_like(old)
    groups, chunks = batch * heads, triton.cdiv(length, CHUNK)
    starts = sizes.cumsum(-1, dtype=torch.int32) - sizes
    partials = torch.empty(groups, chunks, 2, head_dim, dtype=torch.float32, device=x.device)
    block_d = _block_d(head_dim)
    constants = {"D": head_dim, "BLOCK_D": block_d, "CHUNK": CHUNK, "LARGE": LARGE}
    if groups == 0:
        return centroids
    with on_device_of(x):
        _cluster_means_kernel[(num_clusters + 2 * chunks, groups)](
            x,
            labels,
            order,
            starts,
            sizes,
            old,
            centroids,
            partials,
            heads,
            length,
            num_clusters,
            *x.stride()[:3],
            BLOCK=max(16, _MEAN_ELEMENTS // block_d),
            num_warps=4,
            enable_fp_fusion=True,
            **constants,
        )
        if length > LARGE:  # else no cluster can be large
            _large_means_kernel[(chunks, groups)](
                labels,
                order,
                starts,
                sizes,
                centroids,
                partials,
                length,
                num_clusters,
                BLOCK=max(16, _MEAN_ELEMENTS // block_d),
                num_warps=4,
                enable_fp_fusion=True,
                **constants,
            )
    return centroids


def aot_cases(cc: int) -> list[AotCase]:
    """Every row of the tile table for ``cc``, and the means at a plain and at a padded head dim."""
    strides = {name: "i32" for name in ("stride_xb", "stride_xh", "stride_xn")}
    cases = [
        AotCase(
            "pack/bf16/d80",
            _pack_kernel,
            {"Centroids": "*bf16", "Packed": "*bf16", "HalfNorms": "*fp32", "K": "i32", "padded": "i32"}
            | dict.fromkeys(("D", "BLOCK", "BLOCK_D"), "constexpr"),
            {"D": 80, "BLOCK": _PACK_ROWS, "BLOCK_D": 128},
            num_warps=4,
            aligned=("Centroids", "Packed", "HalfNorms", "padded"),
        )
    ]
    for dtype, name, head_dim, num_clusters in [
        (torch.bfloat16, "bf16", 128, 300),
        (torch.bfloat16, "bf16", 128, 1000),
        (torch.float16, "fp16", 64, 100),
        (torch.bfloat16, "bf16", 192, 1000),
        (torch.float32, "fp32", 128, 1000),
    ]:
        tile = assign_tile(cc, head_dim, dtype, num_clusters)
        constants = {
            "D": head_dim,
            "BLOCK_N": tile.m,
            "BLOCK_K": tile.n,
            "BLOCK_D": _block_d(head_dim),
        }
        numbers = dict.fromkeys(("H", "N", "K", "padded"), "i32")
        pointers = {"X": f"*{name}", "Packed": f"*{name}", "HalfNorms": "*fp32", "Labels": "*i32"}
        cases.append(
            AotCase(
                f"assign/{name}/d{head_dim}/k{num_clusters}",
                _assign_kernel,
                pointers | numbers | strides | dict.fromkeys(constants, "constexpr"),
                constants,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                aligned=(*pointers, "padded", *strides),
            )
        )
    run = {"Labels": "*i32", "Order": "*i32", "Starts": "*i32", "Sizes": "*i32"}
    for name, head_dim in [("bf16", 128), ("fp32", 80)]:
        constants = {
            "D": head_dim,
            "BLOCK": max(16, _MEAN_ELEMENTS // _block_d(head_dim)),
            "BLOCK_D": _block_d(head_dim),
            "CHUNK": CHUNK,
            "LARGE": LARGE,
        }
        constant_types = dict.fromkeys(constants, "constexpr")
        results = {"Centroids": f"*{name}", "Partials": "*fp32"}
        pointers = {"X": f"*{name}"} | run | {"OldCentroids": f"*{name}"} | results
        cases.append(
            AotCase(
                f"cluster_means/{name}/d{head_dim}",
                _cluster_means_kernel,
                pointers | dict.fromkeys(("H", "N", "K"), "i32") | strides | constant_types,
                constants,
                num_warps=4,
                aligned=(*pointers, *strides),
            )
        )
        cases.append(
            AotCase(
                f"large_means/{name}/d{head_dim}",
                _large_means_kernel,
                run | results | dict.fromkeys(("N", "K"), "i32") | constant_types,
                constants,
                num_warps=4,
                aligned=(*run, *results),
            )
        )
    return cases
