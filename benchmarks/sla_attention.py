"""Sparse-linear attention (SLA) against the best dense attention of the same machine, forward and backward.

python benchmarks/sla_attention.py --shape wan480,wan720 --density 0.05,0.1 --json OUT.json
python benchmarks/sla_attention.py --shape cpu4k --density 0.1,0.25 --scope rest,all
python benchmarks/sla_attention.py --shape wan480 --density 0.05 --sweep-tiles

The paper (arXiv 2509.24006) reports 13.7x forward and 6.8x backward over FlashAttention-2 at density 0.05 on an
RTX 5090 in blocks of 64. The bound is 1 / density for the sparse branch alone; the linear branch and its totals
come on top. Times are of the attention core with the block lists given, as the paper's kernel figures are.

Nothing is timed that is wrong: outputs and gradients are first compared with the fp32 definition at a small size
in the same dtype, head dim and blocks, then sampled rows of the timed call with the definition.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import as_record, relative_error, save, time_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_accel.kernels.block_sparse_attention import block_sparse_attention
from hf_accel.kernels.sparse_linear_attention import (
    LINEAR_SCOPES,
    backend_for,
    linear_block_map,
    reference,
    sparse_linear_attention,
)
from hf_accel.measure.machine import describe_machine

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
PAPER_SPEEDUP = {"forward": 13.7, "backward": 6.8}
NEGLIGIBLE = 0.1  # k_l of the paper, for the scope "marginal"


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan720", 40, 75_600, 128, torch.bfloat16),
        Shape("wan480", 12, 32_760, 128, torch.bfloat16),
        Shape("cpu8k", 8, 8_192, 64, torch.float32),
        Shape("cpu4k", 8, 4_096, 64, torch.float32),
        Shape("toy", 2, 1_500, 64, torch.float32),
    )
}


class Problem:
    """Random tensors ``[1, H, S, D]`` and, per row of blocks, the same number of critical blocks at random."""

    def __init__(self, shape: Shape, density: float, block_size: tuple[int, int], linear_scope: str, device):
        generator = torch.Generator(device).manual_seed(0)
        size = (1, shape.heads, shape.tokens, shape.head_dim)
        self.shape, self.block_size, self.linear_scope = shape, block_size, linear_scope
        self.query, self.key, self.value, *self.gradients = (
            torch.randn(size, generator=generator, device=device, dtype=shape.dtype) for _ in range(5)
        )
        rows, columns = (-(-shape.tokens // block) for block in block_size)
        order = torch.rand(1, shape.heads, rows, columns, generator=generator, device=device).argsort(-1).int()
        critical = max(1, int(density * columns))
        skipped = int(NEGLIGIBLE * columns) if linear_scope == "marginal" else 0
        self.index = order[..., :critical].contiguous()
        self.count = torch.full(order.shape[:3], critical, dtype=torch.int32, device=device)
        self.lists: dict[str, Any] = {"linear_scope": linear_scope}
        if linear_scope == "marginal":
            self.lists["skip_index"] = order[..., critical : critical + skipped].contiguous()
            self.lists["skip_count"] = torch.full_like(self.count, skipped)
        self.density = critical / columns

    def maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        columns = -(-self.shape.tokens // self.block_size[1])
        included = linear_block_map(
            self.index, self.count, self.lists.get("skip_index"), self.lists.get("skip_count"),
            self.linear_scope, columns,
        )  # fmt: skip
        critical = torch.zeros(*self.count.shape, columns, dtype=torch.bool, device=self.index.device)
        critical.scatter_(-1, self.index.long(), True)
        return critical, torch.ones_like(critical) if included is None else included

    def call(self, *qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = qkv or (self.query, self.key, self.value)
        return sparse_linear_attention(*qkv, self.index, self.count, block_size=self.block_size, **self.lists)

    def sparse_alone(self, *qkv: torch.Tensor) -> torch.Tensor:
        qkv = qkv or (self.query, self.key, self.value)
        return block_sparse_attention(*qkv, self.index, self.count, block_size=self.block_size)[0]

    def leaves(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.query, self.key, self.value)]


def small_errors(problem: Problem) -> dict[str, float]:
    """Outputs and gradients of a small problem of the same kind against fp32 autograd of the definition."""
    shape = replace(problem.shape, heads=2, tokens=1_501)
    small = Problem(shape, problem.density, problem.block_size, problem.linear_scope, problem.query.device)
    leaves, exact = small.leaves(), small.leaves(torch.float32)
    outs, expected = (
        small.call(*leaves),
        reference.sparse_linear_attention(*exact, *small.maps(), block_size=small.block_size),
    )
    got = torch.autograd.grad(outs, leaves, small.gradients)
    wanted = torch.autograd.grad(expected, exact, [x.float() for x in small.gradients])
    names = ("sparse_out", "linear_out", "grad_query", "grad_key", "grad_value")
    pairs = zip(names, (*outs, *got), (*expected, *wanted), strict=True)
    errors = {name: relative_error(a.detach(), b.detach()) for name, a, b in pairs}
    with torch.no_grad():  # another kernel on a GPU
        errors["fused_sparse_out"], errors["fused_linear_out"] = (
            relative_error(a, b.detach()) for a, b in zip(small.call(), expected, strict=True)
        )
    return errors


def sampled_errors(problem: Problem, samples: int = 32) -> dict[str, float]:
    """Rows of the timed call against the definition."""
    generator = torch.Generator().manual_seed(1)
    shape, block_size = problem.shape, problem.block_size
    with torch.no_grad():
        outs = problem.call()
        maps = problem.maps()
        got: list[list[torch.Tensor]] = [[], []]
        expected: list[list[torch.Tensor]] = [[], []]
        for _ in range(samples):
            head = int(torch.randint(shape.heads, (), generator=generator))
            row = int(torch.randint(shape.tokens, (), generator=generator))
            query, key, value = (
                x[:, head : head + 1].float() for x in (problem.query[:, :, row : row + 1], problem.key, problem.value)
            )
            critical, included = (m[:, head : head + 1, row // block_size[0]][:, :, None] for m in maps)
            exact = reference.sparse_linear_attention(
                query, key, value, critical, included, block_size=(1, block_size[1])
            )
            for i in range(2):
                got[i].append(outs[i][0, head, row])
                expected[i].append(exact[i][0, 0, 0])
    finite = all(bool(out.isfinite().all()) for out in outs)
    return {
        name: relative_error(torch.stack(a), torch.stack(b)) if finite else float("inf")
        for name, a, b in zip(("sampled_sparse_out", "sampled_linear_out"), got, expected, strict=True)
    }


def backward_time(outs, leaves: list[torch.Tensor], gradients: list[torch.Tensor], device: torch.device):
    """The backward pass alone, on a graph that is kept."""
    return time_call(lambda: torch.autograd.grad(outs, leaves, gradients, retain_graph=True), device)


def dense_baselines(problem: Problem, device: torch.device, backward: bool) -> list[dict[str, Any]]:
    """Every dense attention that this machine offers, the fastest forward first."""
    backends: dict[str, SDPBackend | None] = {"sdpa": None}
    if device.type == "cuda":
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    records = []
    for name, backend in backends.items():

        def dense(*qkv, backend=backend):
            qkv = qkv or (problem.query, problem.key, problem.value)
            if backend is None:
                return torch.nn.functional.scaled_dot_product_attention(*qkv)
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*qkv)

        try:
            record: dict[str, Any] = {"dense": name, "forward": as_record(time_call(dense, device))}
            if backward:
                leaves = problem.leaves()
                timing = backward_time(dense(*leaves), leaves, problem.gradients[:1], device)
                record["backward"] = as_record(timing)
        except RuntimeError as error:
            print(f"  {name}: not available: {str(error).splitlines()[0]}")
            continue
        records.append(record)
        print(f"  dense {name}: " + ", ".join(f"{k} {record[k]['p50_ms']:.2f} ms" for k in record if k != "dense"))
    return sorted(records, key=lambda record: record["forward"]["p50_ms"])


def sweep_tiles(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    """Times of the fused forward kernel with other tiles than the table's."""
    from triton.runtime.errors import TritonError

    from hf_accel.kernels.common.tile import Tile
    from hf_accel.kernels.sparse_linear_attention import triton as kernels

    if problem.linear_scope == "marginal":
        return []
    records = []
    for m, n, warps, stages in [
        (m, n, w, s)
        for m in (64, 128) if m <= problem.block_size[0]
        for n in (32, 64) for w in (4, 8) for s in (2, 3, 4)
    ]:  # fmt: skip
        tile = Tile(m, n, warps, stages)

        def call(tile=tile):
            return kernels.fused_forward(
                problem.query, problem.key, problem.value, problem.index, problem.count, None, None, None,
                problem.linear_scope == "rest", problem.block_size, problem.shape.head_dim**-0.5, "softmax",
                tile=tile,
            )  # fmt: skip

        try:
            record = {"tile": str(tile), **as_record(time_call(call, device, budget_ms=300))}
        except (RuntimeError, TritonError) as error:  # a tile that does not fit
            record = {"tile": str(tile), "failed": str(error).splitlines()[0]}
        records.append(record)
        print(f"    {record.get('p50_ms', float('nan')):8.3f} ms  {tile}", flush=True)
    return records


def measure(problem: Problem, device: torch.device, backward: bool) -> dict[str, Any]:
    errors = small_errors(problem) | sampled_errors(problem)
    limit = TOLERANCE[problem.shape.dtype]
    record: dict[str, Any] = {"errors": errors, "correct": all(error <= limit for error in errors.values())}
    if not record["correct"]:
        return record
    with torch.no_grad():
        record["forward"] = as_record(time_call(problem.call, device))
        record["sparse_branch_forward"] = as_record(time_call(problem.sparse_alone, device))
    if backward:
        leaves = problem.leaves()
        record["training_forward"] = as_record(time_call(lambda: problem.call(*leaves), device))
        record["backward"] = as_record(backward_time(problem.call(*leaves), leaves, problem.gradients, device))
        timing = backward_time(problem.sparse_alone(*leaves), leaves, problem.gradients[:1], device)
        record["sparse_branch_backward"] = as_record(timing)
    return record


def report(record: dict[str, Any], dense: list[dict[str, Any]]) -> None:
    for direction in ("forward", "backward"):
        if direction not in record:
            continue
        best = min(baseline[direction]["p50_ms"] for baseline in dense)
        ms, branch = record[direction]["p50_ms"], record[f"sparse_branch_{direction}"]["p50_ms"]
        record[f"{direction}_speedup"] = round(best / ms, 3)
        record[f"{direction}_linear_share"] = round(1 - branch / ms, 3)
        print(
            f"    {direction}: {ms:.2f} ms, {best / ms:.2f}x dense (bound {1 / record['density']:.1f}x; paper at 0.05: "
            f"{PAPER_SPEEDUP[direction]}x), linear branch {100 * (1 - branch / ms):.0f} % of it"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="cpu4k", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--density", default="0.05,0.1,0.25")
    parser.add_argument("--scope", default="rest,all", help=f"comma-separated: {', '.join(LINEAR_SCOPES)}")
    parser.add_argument("--block", type=int, nargs=2, default=(64, 64), help="query block and key block")
    parser.add_argument("--heads", type=int, help="fewer heads than the shape has")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--sweep-tiles", action="store_true", help="time the fused kernel with other tiles (GPU)")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, records = describe_machine(device), []
    print(machine)
    for name in options.shape.split(","):
        shape = SHAPES[name] if options.heads is None else replace(SHAPES[name], heads=options.heads)
        dense = None
        for linear_scope in options.scope.split(","):
            for density in map(float, options.density.split(",")):
                problem = Problem(shape, density, tuple(options.block), linear_scope, device)
                if dense is None:
                    choice = backend_for(problem.query)
                    print(f"{shape} backend {choice.backend} ({choice.reason})")
                    dense = dense_baselines(problem, device, not options.no_backward)
                record = {
                    "op": "sparse_linear_attention",
                    "shape": name,
                    "tensor": [1, shape.heads, shape.tokens, shape.head_dim],
                    "dtype": str(shape.dtype),
                    "backend": choice.backend,
                    "linear_scope": linear_scope,
                    "block_size": list(problem.block_size),
                    "density": round(problem.density, 4),
                    "dense_baselines": dense,
                }
                record |= measure(problem, device, not options.no_backward)
                print(
                    f"  {linear_scope}, density {problem.density:.3f}: {'' if record['correct'] else 'WRONG: '}", end=""
                )
                print(f"largest error {max(record['errors'].values()):.1e}")
                if record["correct"]:
                    report(record, dense)
                if options.sweep_tiles and device.type == "cuda":
                    record["sweep"] = sweep_tiles(problem, device)
                records.append(record)
    save(options.json, machine, records)
    return 0 if all(record["correct"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
