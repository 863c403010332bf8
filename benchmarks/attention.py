"""Sparse attention kernels against the best dense attention of the same machine.

python benchmarks/attention.py --op variable --shape wan720,wan480 --density 0.1,0.25,0.3 --json OUT.json
python benchmarks/attention.py --op variable --shape wan720 --density 0.25 --sweep-tiles
python benchmarks/attention.py --op block --shape cpu8k --density 0.1,0.25 --mode forward,backward,causal
python benchmarks/attention.py --op block --shape wan720 --density 0.25 --mode int8

No time is reported for a call whose result is wrong: every configuration is checked first against an fp32
reference on sampled rows, and the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import as_record, relative_error, save, time_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_accel.kernels import block_sparse_attention as block_package
from hf_accel.kernels import variable_block_attention as variable_package
from hf_accel.kernels.common.tile import Tile
from hf_accel.measure.machine import describe_machine

# What is timed of block_sparse_attention. Density and the dense baseline of "causal" are those of the triangle.
MODES = ("forward", "backward", "causal", "causal backward", "int8")
# The roundings cost 0.04; a wrong scale costs 1.
INT8_TOLERANCE = 8e-2
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """``goal`` is the time to beat as a multiple of density * best dense time."""

    name: str
    heads: int
    tokens: int
    head_dim: int
    query_clusters: int
    key_clusters: int
    dtype: torch.dtype
    goal: float


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan720", 40, 75_600, 128, 300, 1000, torch.bfloat16, 1.18),
        Shape("wan480", 12, 32_760, 128, 200, 1000, torch.bfloat16, 1.18),
        Shape("cpu8k", 8, 8_192, 64, 48, 96, torch.float32, 1 / 0.75),
        Shape("toy", 2, 1_500, 64, 8, 24, torch.float32, 1 / 0.75),
    )
}


@dataclass
class Problem:
    """Random tensors ``[1, H, S, D]`` and a sparse pattern; ``kept_pairs`` counts (query, key) token pairs."""

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kept_pairs: float = 0.0
    pattern: dict[str, torch.Tensor] = field(default_factory=dict)
    mode: str = "forward"

    @property
    def causal(self) -> bool:
        return self.mode.startswith("causal")

    @property
    def backward(self) -> bool:
        return self.mode.endswith("backward")

    @property
    def dense_pairs(self) -> float:
        tokens = self.shape.tokens
        return self.shape.heads * (tokens * (tokens + 1) / 2 if self.causal else tokens**2)

    @property
    def density(self) -> float:
        return self.kept_pairs / self.dense_pairs

    def tflops(self, ms: float, pairs: float | None = None) -> float:
        """Two matrix products forward; five backward, counted as FlashAttention does."""
        products = 5 if self.backward else 2
        return 2 * products * self.shape.head_dim * (self.kept_pairs if pairs is None else pairs) / ms / 1e9


def problem_for(shape: Shape, device: torch.device, generator: torch.Generator) -> Problem:
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    qkv = [torch.randn(size, generator=generator, device=device, dtype=shape.dtype) for _ in range(3)]
    return Problem(shape, *qkv)


def cluster_sizes(shape: Shape, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """int32 ``[1, H, count]`` that add up to the tokens, spread like k-means clusters (variation 0.5)."""
    # A gamma variable of shape 4, as a sum of four exponentials, has a coefficient of variation of 1/2.
    weight = torch.empty(shape.heads, count, 4, device=device).exponential_(generator=generator).sum(-1)
    ends = (weight.cumsum(-1) / weight.sum(-1, keepdim=True) * shape.tokens).round().long()
    ends[:, -1] = shape.tokens
    return torch.diff(ends, dim=-1, prepend=ends.new_zeros(shape.heads, 1)).int()[None]


def nearest_map(
    query_sizes: torch.Tensor, key_sizes: torch.Tensor, density: float, generator: torch.Generator
) -> torch.Tensor:
    """Keep the key blocks nearest to each query block in a random space, until they hold ``density`` tokens.

    Rows differ in what they keep and, with a variation of 0.3, in how much; which blocks lie side by side in
    memory says nothing about what is near, as after k-means.
    """
    device, (_, heads, rows), columns = query_sizes.device, query_sizes.shape, key_sizes.shape[-1]
    points = [torch.randn(heads, n, 3, generator=generator, device=device) for n in (rows, columns)]
    order = torch.cdist(*points).argsort(-1)
    mass = key_sizes[0, :, None].expand(-1, rows, -1).gather(-1, order).double()
    before = mass.cumsum(-1) - mass / 2
    spread = 1 + 0.3 * torch.randn(heads, rows, 1, generator=generator, device=device).clamp(-2, 2)
    kept = before < density * spread * mass.sum(-1, keepdim=True)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)[None]


def set_variable_pattern(problem: Problem, density: float, generator: torch.Generator) -> None:
    shape, device = problem.shape, problem.query.device
    query_sizes = cluster_sizes(shape, shape.query_clusters, generator, device)
    key_sizes = cluster_sizes(shape, shape.key_clusters, generator, device)
    block_map = nearest_map(query_sizes, key_sizes, density, generator)
    order = torch.rand(1, shape.heads, shape.tokens, generator=generator, device=device).argsort(-1).int()
    problem.kept_pairs = _pairs(block_map, query_sizes, key_sizes)
    problem.pattern = {
        "block_map": block_map,
        "query_sizes": query_sizes,
        "key_sizes": key_sizes,
        "query_order": order,
    }


def set_block_pattern(problem: Problem, density: float, generator: torch.Generator) -> None:
    shape, device = problem.shape, problem.query.device
    ends = torch.arange(BLOCK, shape.tokens + BLOCK, BLOCK, device=device).clamp(max=shape.tokens)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).int().expand(1, shape.heads, -1)
    block_map = nearest_map(sizes, sizes, density, generator)
    problem.kept_pairs = _pairs(block_map, sizes, sizes)
    if problem.causal:
        block_map = block_map.tril() | torch.eye(block_map.shape[-1], dtype=torch.bool, device=device)
        # The diagonal blocks count half; every row keeps its own.
        own = sizes[0, 0].double()
        problem.kept_pairs = _pairs(block_map.tril(-1), sizes, sizes) + shape.heads * (own * (own + 1) / 2).sum().item()
    index, count = block_package.block_map_to_index(block_map)
    problem.pattern = {"block_map": block_map, "block_index": index, "block_count": count}


def _pairs(block_map: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor) -> float:
    rows = block_map.double() @ key_sizes.double()[..., None]
    return (rows[..., 0] * query_sizes).sum().item()


def call_variable(problem: Problem, tiles=None):
    pattern = problem.pattern
    arguments = [problem.query, problem.key, problem.value]
    arguments += [pattern[name] for name in ("block_map", "query_sizes", "key_sizes")]
    if tiles is None:
        return variable_package.variable_block_attention(*arguments, query_order=pattern["query_order"])
    from hf_accel.kernels.variable_block_attention import triton

    scale = problem.shape.head_dim**-0.5
    return triton.launch(*arguments, scale, pattern["query_order"], tiles=tiles)


def call_block(problem: Problem, tiles=None):
    arguments = [problem.query, problem.key, problem.value]
    arguments += [problem.pattern[name] for name in ("block_index", "block_count")]
    if tiles is None:
        numerics = "int8" if problem.mode == "int8" else "native"
        return block_package.block_sparse_attention(
            *arguments, block_size=BLOCK, causal=problem.causal, numerics=numerics
        )
    from hf_accel.kernels.block_sparse_attention import triton

    return triton.launch(*arguments, (BLOCK, BLOCK), problem.shape.head_dim**-0.5, tile=tiles)


def errors(problem: Problem, op: str, out: torch.Tensor, lse: torch.Tensor, samples: int = 64) -> dict[str, float]:
    """Compare sampled rows with dense fp32 attention under the token mask; the LSE must be finite everywhere."""
    generator = torch.Generator().manual_seed(1)
    shape, device = problem.shape, problem.query.device
    got, expected, lse_error = [], [], 0.0
    for _ in range(samples):
        head = int(torch.randint(shape.heads, (), generator=generator))
        place = int(torch.randint(shape.tokens, (), generator=generator))
        row = place
        if op == "variable":
            ends = problem.pattern["query_sizes"][0, head].long().cumsum(0)
            block = int(torch.searchsorted(ends, place, right=True))
            row = int(problem.pattern["query_order"][0, head, place])
            mask = problem.pattern["block_map"][0, head, block]
            mask = mask.repeat_interleave(problem.pattern["key_sizes"][0, head].long())
        else:
            mask = problem.pattern["block_map"][0, head, place // BLOCK].repeat_interleave(BLOCK)
            mask = mask[: shape.tokens]
            if problem.causal:
                mask[place + 1 :] = False
        key, value = problem.key[0, head].float(), problem.value[0, head].float()
        scores = key @ problem.query[0, head, row].float() * shape.head_dim**-0.5
        scores = scores.masked_fill(~mask.to(device), float("-inf"))
        expected.append(scores.softmax(0) @ value)
        got.append(out[0, head, row].float())
        lse_error = max(lse_error, (scores.logsumexp(0) - lse[0, head, row]).abs().item())
    relative = relative_error(torch.stack(got), torch.stack(expected))
    if not bool(out.isfinite().all()) or not bool(lse.isfinite().all()):
        relative = float("inf")
    return {"relative_error": relative, "lse_error": lse_error}


def gradient_errors(problem: Problem, samples: int = 32) -> dict[str, float]:
    """Relative errors of dQ, dK, dV on sampled rows, in fp32 from the (checked) output and LSE of the forward pass."""
    generator = torch.Generator().manual_seed(2)
    shape, device = problem.shape, problem.query.device
    scale = shape.head_dim**-0.5
    out, lse, grad_out, run = backward_of(problem, call_block)
    gradients = run()
    token_block = torch.arange(shape.tokens, device=device) // BLOCK
    got: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    expected: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    for _ in range(samples):
        head = int(torch.randint(shape.heads, (), generator=generator))
        place = int(torch.randint(shape.tokens, (), generator=generator))
        query, key, value, grad, o, row_lse = (
            x[0, head].detach().float() for x in (problem.query, problem.key, problem.value, grad_out, out, lse)
        )
        block_map = problem.pattern["block_map"][0, head]
        kept, keepers = block_map[place // BLOCK][token_block], block_map[:, place // BLOCK][token_block]
        if problem.causal:
            kept[place + 1 :], keepers[:place] = False, False
        delta = (grad * o).sum(-1)
        weight = ((key @ query[place]) * scale - row_lse[place]).exp() * kept
        step = weight * (value @ grad[place] - delta[place])
        expected["query"].append(scale * (step @ key))
        weight = ((query @ key[place]) * scale - row_lse).exp() * keepers
        step = weight * (grad @ value[place] - delta)
        expected["key"].append(scale * (step @ query))
        expected["value"].append(weight @ grad)
        for name, x in zip(got, gradients, strict=True):
            got[name].append(x[0, head, place].float())
    return {f"grad_{name}_error": relative_error(torch.stack(got[name]), torch.stack(expected[name])) for name in got}


def backward_of(problem: Problem, call: Callable[[Problem], Any]):
    """Run ``call`` once and return its output, its LSE (None if it has none), a gradient and the backward pass."""
    inputs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    result = call(replace(problem, query=inputs[0], key=inputs[1], value=inputs[2]))
    out, lse = result if isinstance(result, tuple) else (result, None)
    generator = torch.Generator(out.device).manual_seed(3)
    grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)

    def run():
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return out, lse, grad, run


def timed_part(problem: Problem, call: Callable[[Problem], Any]) -> Callable[[], Any]:
    return backward_of(problem, call)[-1] if problem.backward else functools.partial(call, problem)


def dense_baselines(problem: Problem) -> list[dict[str, Any]]:
    """Every dense attention that this machine offers, the fastest first."""
    device = problem.query.device
    backends = {"sdpa": None}
    if device.type == "cuda":
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    records = []

    def dense(backend, given):
        def attend():
            qkv = (given.query, given.key, given.value)
            return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=given.causal)

        if backend is None:
            return attend()
        with sdpa_kernel(backend):
            return attend()

    for name, backend in backends.items():
        try:
            call = functools.partial(dense, backend)
            timing = time_call(timed_part(problem, call), device)
        except RuntimeError as error:
            print(f"  {name}: not available: {str(error).splitlines()[0]}")
            continue
        records.append(
            {
                "dense": name,
                **as_record(timing),
                "tflops": round(tflops := problem.tflops(timing.p50_ms, problem.dense_pairs), 3),
            }
        )
        print(f"  dense {name}: {timing.p50_ms:.2f} ms, {tflops:.3g} TFLOP/s")
    return sorted(records, key=lambda record: record["p50_ms"])


def time_flex(problem: Problem, generator: torch.Generator, density: float) -> dict[str, Any]:
    """Compiled flex_attention on whole blocks of 128 at like density, on the tokens that fill whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = problem.shape.tokens // BLOCK
    sizes = torch.full((1, problem.shape.heads, blocks), BLOCK, dtype=torch.int32, device=problem.query.device)
    block_map = nearest_map(sizes, sizes, density, generator)
    index, count = block_package.block_map_to_index(block_map)
    none = torch.zeros_like(count)
    # The CPU code generator cannot take one tensor for both lists.
    mask = BlockMask.from_kv_blocks(none, index, count, index.clone(), BLOCK_SIZE=BLOCK)
    qkv = [x[:, :, : blocks * BLOCK] for x in (problem.query, problem.key, problem.value)]
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        timing = time_call(lambda: compiled(*qkv, block_mask=mask), problem.query.device)
    except RuntimeError as error:
        print(f"    flex: not available: {str(error)[:120]}")
        return {"flex": None}
    pairs = _pairs(block_map, sizes, sizes)
    return {
        "flex": as_record(timing),
        "flex_density": pairs / (problem.shape.heads * (blocks * BLOCK) ** 2),
        "flex_tflops": round(4 * problem.shape.head_dim * pairs / timing.p50_ms / 1e9, 3),
    }


def tile_candidates(op: str, device: torch.device, shape: Shape) -> list[Any]:
    """What to try: each main tile with each tail, then the run length, from the table's choice."""
    mains = [
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 4),
        Tile(128, 64, 8, 2, max_registers=128),
        Tile(128, 128, 8, 2),
        Tile(128, 128, 8, 3),
        Tile(128, 64, 4, 3),
        Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 2),
        Tile(64, 128, 4, 2),
    ]
    if op == "block":
        return mains
    from hf_accel.kernels.common.tile import compute_capability
    from hf_accel.kernels.variable_block_attention.triton import tiles_for

    probe = torch.empty(0, device=device)
    default = tiles_for(compute_capability(probe), shape.head_dim, shape.dtype)
    candidates = [default]
    candidates += [replace(default, main=m, tail=default.tail if m.m > 64 else None) for m in mains]
    candidates += [
        replace(default, tail=t) for t in (None, Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(32, 64, 4, 3))
    ]
    candidates += [replace(default, run=run) for run in (1, 4, 16)]
    return list(dict.fromkeys(candidates))


def kernel_times(call: Callable[[Problem], Any], problem: Problem) -> dict[str, float]:
    """Milliseconds of each GPU kernel in one call: what the list building costs beside the attention."""
    if problem.query.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call(problem)
        torch.cuda.synchronize(problem.query.device)
    times = {event.key[:60]: event.device_time_total / 1e3 for event in profiler.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.005}


def measure(problem: Problem, op: str, tiles=None) -> dict[str, Any]:
    """Check, then time. A wrong result has no time."""
    call = {"variable": call_variable, "block": call_block}[op]
    record: dict[str, Any] = errors(problem, op, *call(problem, tiles))
    tolerance = INT8_TOLERANCE if problem.mode == "int8" else TOLERANCE[problem.shape.dtype]
    record["correct"] = record["relative_error"] <= tolerance
    record["correct"] &= record["lse_error"] < (5e-2 if problem.mode == "int8" else 1e-2)
    if problem.backward:
        record |= gradient_errors(problem)
        # Weights and their gradients are rounded once more than forward.
        record["correct"] &= max(v for k, v in record.items() if k.startswith("grad_")) <= 2 * tolerance
    if record["correct"]:
        run = functools.partial(call, tiles=tiles)
        timing = time_call(timed_part(problem, run), problem.query.device)
        record |= as_record(timing) | {"tflops": round(problem.tflops(timing.p50_ms), 3)}
    return record


def sweep(problem: Problem, op: str, device: torch.device) -> list[dict[str, Any]]:
    from triton.runtime.errors import TritonError

    records = []
    for tiles in tile_candidates(op, device, problem.shape):
        try:
            record = measure(problem, op, tiles)
        except (RuntimeError, ValueError, TritonError) as error:  # a tile that does not fit or does not compile
            record = {"correct": None, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        records.append({"tiles": str(tiles), **record})
        print(f"  {record.get('p50_ms', float('nan')):8.2f} ms  {tiles}  {record.get('failed', '')}", flush=True)
    return sorted(records, key=lambda record: record.get("p50_ms", float("inf")))


def one_density(problem, options, backend, dense, name, wanted, generator) -> dict[str, Any]:
    """The record of one shape, mode and density, printed as it is made."""
    shape = problem.shape
    (set_variable_pattern if options.op == "variable" else set_block_pattern)(problem, wanted, generator)
    record = {
        "op": options.op,
        "shape": name if problem.mode == "forward" else f"{name} {problem.mode}",
        "tensor": [1, shape.heads, shape.tokens, shape.head_dim],
        "dtype": str(shape.dtype),
        "backend": backend,
        "density": round(problem.density, 4),
        "dense_baselines": dense,
    }
    if options.sweep_tiles:
        record["sweep"] = sweep(problem, options.op, problem.query.device)
    record |= measure(problem, options.op)
    call = call_variable if options.op == "variable" else call_block
    record["kernels_ms"] = kernel_times(call, problem)
    if options.flex:
        record |= time_flex(problem, generator, wanted)
    if record["correct"]:
        best = dense[0]["p50_ms"]
        goal = shape.goal * problem.density * best
        record |= {"dense_ms": best, "speedup": best / record["p50_ms"], "goal_ms": goal}
        record |= {"bound_speedup": 1 / problem.density}
        record |= {"times_density_dense": record["p50_ms"] / (problem.density * best)}
        print(
            f"  density {problem.density:.3f}: {record['p50_ms']:.2f} ms, {record['tflops']} TFLOP/s, "
            f"{record['speedup']:.2f}x dense (bound {1 / problem.density:.1f}x), "
            f"{record['times_density_dense']:.2f} x density x dense; goal {goal:.2f} ms; "
            f"error {record['relative_error']:.1e}"
        )
    else:
        print(f"  density {problem.density:.3f}: WRONG, error {record['relative_error']:.1e}: not timed")
    if record["kernels_ms"]:
        print(f"    kernels, ms: {record['kernels_ms']}")
    if record.get("flex"):
        print(f"    flex at density {record['flex_density']:.3f}: {record['flex']['p50_ms']:.2f} ms")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("variable", "block"), default="variable")
    parser.add_argument("--shape", default="cpu8k", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--density", default="0.1,0.25,0.3")
    parser.add_argument("--mode", default="forward", help=f"comma-separated, for --op block: {', '.join(MODES)}")
    parser.add_argument("--heads", type=int, help="fewer heads than the shape has")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--flex", action="store_true", help="also time compiled flex_attention (slow to compile)")
    parser.add_argument("--sweep-tiles", action="store_true", help="time every candidate tile at each density")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    if unknown := sorted(set(options.mode.split(",")) - set(MODES if options.op == "block" else MODES[:1])):
        parser.error(f"--op {options.op} has no mode {', '.join(unknown)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, records = describe_machine(device), []
    print(machine)
    for name in options.shape.split(","):
        shape = SHAPES[name] if options.heads is None else replace(SHAPES[name], heads=options.heads)
        generator = torch.Generator(device).manual_seed(0)
        problem = problem_for(shape, device, generator)
        package = variable_package if options.op == "variable" else block_package
        choice = package.backend_for(problem.query)
        for mode in options.mode.split(","):
            problem.mode = mode
            print(f"{shape} {problem.mode}, backend {choice.backend} ({choice.reason})")
            if problem.mode == "int8" and choice.backend == "torch":
                print("  int8: the torch backend only imitates its roundings: not timed")
                continue
            dense = dense_baselines(problem)
            records += [
                one_density(problem, options, choice.backend, dense, name, wanted, generator)
                for wanted in map(float, options.density.split(","))
            ]
    save(options.json, machine, records)
    return 0 if all(record["correct"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
