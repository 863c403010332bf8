"""k-means of queries and keys, its pieces, and the row moves, against torch, a peer and the machine's limits.

python benchmarks/kmeans.py --shape wan720,wan480 --json OUT.json
python benchmarks/kmeans.py --shape wan720 --sweep-tiles
python benchmarks/kmeans.py --shape cpu8k --threads 2

Every timed call is checked first; a wrong result has no time, and the exit code is then 1. The peer is the
package flash-kmeans, if it is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import as_record, relative_error, save, time_call

from hf_accel.kernels import kmeans as op
from hf_accel.kernels import permute
from hf_accel.measure.machine import describe_machine

ITERATIONS = 2  # svg2 with centroids kept from the step before
MEAN_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
BUDGET_MS = 400.0


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    tokens: int
    head_dim: int
    clusters: dict[str, int]
    dtype: torch.dtype


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan720", 40, 75_600, 128, {"query": 300, "key": 1000}, torch.bfloat16),
        Shape("wan480", 12, 32_760, 128, {"query": 200, "key": 1000}, torch.bfloat16),
        Shape("cpu8k", 8, 8_192, 64, {"query": 64, "key": 128}, torch.float32),
        Shape("toy", 2, 1_500, 64, {"query": 8, "key": 24}, torch.float32),
    )
}


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: a large matrix product and a large copy, measured in this run."""

    flops: float
    bytes_per_second: float

    def bound_ms(self, flops: float, moved_bytes: float) -> float:
        return 1e3 * max(flops / self.flops, moved_bytes / self.bytes_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device, budget_ms=BUDGET_MS)
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device, budget_ms=BUDGET_MS)
    return Limits(2 * size**3 / product.p20_ms * 1e3, 2 * source.nbytes / copy.p20_ms * 1e3)


def clustered_points(shape: Shape, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """``[1, H, S, D]`` as Wan hands it over, a view of ``[1, S, H, D]``: clumps of uneven size, with noise."""
    clumps = 256
    centers = torch.randn(shape.heads, clumps, shape.head_dim, generator=generator, device=device)
    weight = torch.empty(shape.heads, clumps, device=device).exponential_(generator=generator)
    x = torch.empty(1, shape.tokens, shape.heads, shape.head_dim, device=device, dtype=shape.dtype)
    for head in range(shape.heads):
        which = torch.multinomial(weight[head], shape.tokens, replacement=True, generator=generator)
        noise = torch.randn(shape.tokens, shape.head_dim, generator=generator, device=device)
        x[0, :, head] = (centers[head, which] + 0.7 * noise).to(shape.dtype)
    return x.transpose(1, 2)


def torch_kmeans(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual way: distances by chunks with cdist, sums with index_add. ``x`` ``[G, N, D]``."""
    groups, _, head_dim = x.shape
    num_clusters = centroids.shape[1]
    chunk = max(1, 2**28 // (groups * num_clusters))
    offset = torch.arange(groups, device=x.device)[:, None] * num_clusters
    for _ in range(iterations):
        labels = torch.cat([torch.cdist(part.float(), centroids.float()).argmin(-1) for part in x.split(chunk, 1)], 1)
        flat = (labels + offset).flatten()
        sums = torch.zeros(groups * num_clusters, head_dim, device=x.device)
        sums.index_add_(0, flat, x.reshape(-1, head_dim).float())
        counts = torch.bincount(flat, minlength=groups * num_clusters)[:, None]
        means = (sums / counts.clamp(min=1)).to(x.dtype)
        centroids = torch.where(counts > 0, means, centroids.reshape(-1, head_dim)).view(centroids.shape)
    return labels, centroids


def wrong_labels(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, samples: int = 2000) -> float:
    """Share of sampled tokens whose centroid is farther than the nearest by more than fp32 explains."""
    generator = torch.Generator(x.device).manual_seed(1)
    rows = torch.randint(x.shape[2], (samples,), generator=generator, device=x.device)
    wrong = 0.0
    for head in {0, x.shape[1] - 1}:
        distance = torch.cdist(x[0, head, rows].double()[None], centroids[0, head].double()[None])[0].square()
        chosen = distance.gather(1, labels[0, head, rows].long()[:, None])[:, 0]
        wrong += (chosen - distance.amin(1) > 1e-5 * distance.amax(1)).double().sum().item()
    return wrong


def mean_error(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor, sizes: torch.Tensor) -> float:
    """Largest relative error of the means of some clusters, the largest among them, against fp64."""
    error = 0.0
    for head in {0, x.shape[1] - 1}:
        largest = int(sizes[0, head].argmax())
        for k in {0, largest, centroids.shape[2] - 1}:
            members = x[0, head][labels[0, head] == k].double()
            if len(members) != sizes[0, head, k]:
                return float("inf")
            if len(members):
                error = max(error, relative_error(centroids[0, head, k], members.mean(0)))
    return error


def is_order(order: torch.Tensor, labels: torch.Tensor) -> bool:
    """A permutation that sorts the labels and keeps equal ones in their order."""
    tokens = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
    if not torch.equal(order.sort(-1).values, tokens.expand_as(order)):
        return False
    grouped = labels.gather(-1, order.long()).long()
    return bool(((grouped * order.shape[-1] + order).diff(dim=-1) > 0).all())


def check(x: torch.Tensor, start: torch.Tensor) -> dict[str, Any]:
    """Labels, means, order, and that a second run gives the same bits."""
    labels = op.assign(x, start)
    centroids, sizes = op.update(x, labels, start)
    order, _ = permute.sort_by_label(labels, start.shape[2])
    runs = [op.kmeans(x, start.shape[2], centroids=start, iterations=ITERATIONS) for _ in range(2)]
    record: dict[str, Any] = {
        "wrong_labels": wrong_labels(x, start, labels),
        "mean_error": mean_error(x, labels, centroids, sizes),
        "order_is_stable_sort": is_order(order, labels),
        "bit_equal_runs": all(torch.equal(a, b) for a, b in zip(runs[0][:4], runs[1][:4], strict=True)),
        "empty_clusters": int((runs[0].sizes == 0).sum()),
        "largest_cluster": int(runs[0].sizes.max()),
    }
    record["correct"] = (
        record["wrong_labels"] == 0
        and record["mean_error"] <= MEAN_TOLERANCE[x.dtype]
        and record["order_is_stable_sort"]
        and record["bit_equal_runs"]
    )
    return record


def measure(x: torch.Tensor, start: torch.Tensor, limits: Limits, peer: Callable | None) -> dict[str, Any]:
    record = check(x, start)
    if not record["correct"]:
        return record
    num_clusters = start.shape[2]
    labels = op.assign(x, start)
    order, _ = permute.sort_by_label(labels, num_clusters)
    assign_flops = 2 * x.numel() * num_clusters
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "assign": (lambda: op.assign(x, start), limits.bound_ms(assign_flops, x.nbytes)),
        "sort": (
            lambda: permute.sort_by_label(labels, num_clusters),
            limits.bound_ms(0, labels.nbytes + order.nbytes),
        ),
        "update": (lambda: op.update(x, labels, start), limits.bound_ms(0, x.nbytes + labels.nbytes)),
        "kmeans": (
            lambda: op.kmeans(x, num_clusters, centroids=start, iterations=ITERATIONS),
            ITERATIONS * limits.bound_ms(assign_flops, 2 * x.nbytes),
        ),
    }
    for name, (call, bound) in calls.items():
        record[name] = timed(call, x.device, bound)
    packed, packed_start = x[0].contiguous(), start[0].contiguous()
    record["torch"] = timed(lambda: torch_kmeans(packed, packed_start, ITERATIONS), x.device)
    if peer is not None:
        found = peer(packed, num_clusters, max_iters=1, init_centroids=packed_start)[0]
        record["peer_wrong_labels"] = wrong_labels(x, start, found[None])
        record["peer"] = timed(
            lambda: peer(packed, num_clusters, max_iters=ITERATIONS, init_centroids=packed_start), x.device
        )
    ours = record["kmeans"]["p50_ms"]
    record["speedup"] = {name: round(record[name]["p50_ms"] / ours, 2) for name in ("torch", "peer") if name in record}
    return record


def timed(call: Callable[[], Any], device: torch.device, bound_ms: float | None = None) -> dict[str, Any]:
    record = as_record(time_call(call, device, budget_ms=BUDGET_MS))
    if bound_ms is not None:
        record |= {"bound_ms": round(bound_ms, 4), "share_of_bound": round(bound_ms / record["p50_ms"], 3)}
    return record


def measure_rows(x: torch.Tensor, labels: torch.Tensor, num_labels: int, limits: Limits) -> dict[str, Any]:
    order, _ = permute.sort_by_label(labels, num_labels)
    rows = permute.gather_rows(x, order)
    pair = permute.gather_rows((x, x), order)
    correct = torch.equal(permute.scatter_rows(rows, order), x) and torch.equal(pair[1], rows)
    correct = correct and torch.equal(rows[0, -1], x[0, -1][order[0, -1].long()])
    record: dict[str, Any] = {"op": "rows", "correct": correct}
    if not correct:
        return record
    calls = {
        "gather": (lambda: permute.gather_rows(x, order), 1),
        "gather_two": (lambda: permute.gather_rows((x, x), order), 2),
        "scatter": (lambda: permute.scatter_rows(rows, order), 1),
    }
    for name, (call, tensors) in calls.items():
        moved = 2 * tensors * x.nbytes + order.nbytes
        record[name] = timed(call, x.device, limits.bound_ms(0, moved))
        record[name]["gb_per_s"] = round(moved / record[name]["p50_ms"] / 1e6, 1)
    return record


def sweep_tiles(x: torch.Tensor, start: torch.Tensor) -> list[dict[str, Any]]:
    from triton.runtime.errors import TritonError

    from hf_accel.kernels.common.tile import Tile
    from hf_accel.kernels.kmeans import triton as kernels

    records = []
    for tile in (
        Tile(128, 128, 8, 2, 128),
        Tile(128, 128, 8, 3, 128),
        Tile(128, 128, 4, 2),
        Tile(256, 64, 8, 2, 128),
        Tile(256, 64, 8, 3, 128),
        Tile(256, 32, 8, 3),
        Tile(256, 128, 8, 2),
        Tile(128, 256, 8, 2),
        Tile(128, 64, 4, 2),
        Tile(128, 64, 4, 3),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 32, 4, 3),
        Tile(64, 128, 4, 2),
        Tile(64, 64, 4, 3),
    ):
        record: dict[str, Any] = {"tile": str(tile)}
        try:
            if wrong := wrong_labels(x, start, kernels.assign(x, start, tile=tile)):
                record["wrong_labels"] = wrong
            else:
                record |= timed(lambda tile=tile: kernels.assign(x, start, tile=tile), x.device)
        except (RuntimeError, TritonError) as error:  # does not fit in shared memory, or does not compile
            record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        records.append(record)
        print(f"  {record.get('p50_ms', float('nan')):8.3f} ms  {tile}  {record.get('failed', '')}", flush=True)
    return sorted(records, key=lambda record: record.get("p50_ms", float("inf")))


def dense_ms(shape: Shape, x: torch.Tensor) -> float:
    """Dense attention at this shape, for scale: k-means is what a sparse method pays beside it."""
    query = x.contiguous()
    call = torch.nn.functional.scaled_dot_product_attention
    return time_call(lambda: call(query, query, query), x.device, budget_ms=BUDGET_MS, least=3).p50_ms


def find_peer(device: torch.device) -> Callable | None:
    if device.type != "cuda":
        return None
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError:
        return None
    return batch_kmeans_Euclid


def show(name: str, record: dict[str, Any]) -> None:
    if not record["correct"]:
        print(f"  {name}: WRONG, not timed: {record}")
        return
    for part, timing in record.items():
        if isinstance(timing, dict) and "p50_ms" in timing:
            bound = f", {timing['share_of_bound']:.0%} of the bound" if "share_of_bound" in timing else ""
            rate = f", {timing['gb_per_s']} GB/s" if "gb_per_s" in timing else ""
            print(f"  {name} {part}: {timing['p50_ms']:.3f} ms{bound}{rate}")
    if "speedup" in record:
        print(f"  {name} speed-up of {ITERATIONS} iterations over: {record['speedup']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="cpu8k", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--sweep-tiles", action="store_true", help="time every candidate tile of the assign kernel")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, records = describe_machine(device), []
    peer = find_peer(device)
    print(machine, "peer:", "flash-kmeans" if peer else "not installed", sep="\n")
    for shape in map(SHAPES.__getitem__, options.shape.split(",")):
        limits = measure_limits(device, shape.dtype)
        x = clustered_points(shape, device, torch.Generator(device).manual_seed(0))
        dense = dense_ms(shape, x)
        print(f"{shape}\n  backend: {op.backend_for(x)}\n  {limits}; dense attention {dense:.1f} ms")
        common = {"shape": shape.name, "tensor": list(x.shape), "dtype": str(shape.dtype), "dense_ms": dense}
        common["limits"] = {"tflops": limits.flops / 1e12, "gb_per_s": limits.bytes_per_second / 1e9}
        total = 0.0
        for side, num_clusters in shape.clusters.items():
            start = op.kmeans(x, num_clusters, iterations=1).centroids
            record = {"op": "kmeans", "side": side, "clusters": num_clusters, **common}
            if options.sweep_tiles:
                record["sweep"] = sweep_tiles(x, start)
            record |= measure(x, start, limits, peer)
            show(f"{side} K={num_clusters}", record)
            records.append(record)
            total += record["kmeans"]["p50_ms"] if record["correct"] else float("nan")
        print(f"  query and key, {ITERATIONS} iterations: {total:.2f} ms, {total / dense:.1%} of dense attention")
        rows = common | measure_rows(x, op.assign(x, start), num_clusters, limits)
        show("rows", rows)
        records.append(rows)
    save(options.json, machine, records)
    return 0 if all(record["correct"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
