"""Time of one denoising step's attention against the length of the frozen prefix: dense, prefix-split, quest, losa.

    python benchmarks/losa_step.py --json benchmarks/results/losa_step_cpu.json
    python benchmarks/losa_step.py --prefix 8192 16384 32768 65536 131072 --budget 128 256 512 1024   # on a GPU

One attention layer in the shape of SDAR-8B (32 query heads, 8 KV heads of 128, block 16), times the number of its
layers. The methods run as they stand on a model, without the network around them, from a step after the first of a
block; what the first step costs is that of ``prefix-split``.

Dense is what these models do: concatenate prefix and block K/V, then SDPA. ``dense, joined`` is SDPA alone on K/V that
were joined beforehand, the fastest of its backends that run: no model does that, since the block's K/V change at every
step, but no split can be blamed for a copy. The density is what quest and losa reached on synthetic queries that share
``--alike`` of their variance within a block and KV head: unrelated ones (0) choose unrelated pages, the worst case.
Ratios are against dense and against the fastest exact row; the bound is of the latter.

On a GPU every step is replayed from a CUDA graph, and timed as launched from Python too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import as_record, relative_error, save, time_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_accel.attention.call import Layer
from hf_accel.measure.machine import describe_machine
from hf_accel.patches.losa import LoSA, LoSAConfig
from hf_accel.patches.quest import Quest, QuestConfig
from hf_accel.sites.prefix_attention.base import PrefixAttentionMethod
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.split import split_attention

STEPS = 4  # queries to go round


@dataclass(frozen=True)
class Shape:
    """One attention layer: heads, head dim, block and prefix."""

    heads: int
    kv_heads: int
    head_dim: int
    block: int
    prefix: int


class Block:
    """K/V of a prefix, and the calls of a few denoising steps behind it."""

    def __init__(self, shape: Shape, alike: float, device: torch.device, dtype: torch.dtype):
        random = torch.Generator().manual_seed(0)

        def normal(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(1, heads, tokens, shape.head_dim, generator=random)

        def place(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype)

        self.key, self.value = (place(normal(shape.kv_heads, shape.prefix)) for _ in range(2))
        common = normal(shape.kv_heads, 1).repeat_interleave(shape.heads // shape.kv_heads, 1)
        query = alike**0.5 * common + (1 - alike) ** 0.5 * normal(shape.heads, shape.block)
        self.calls = []
        for _ in range(STEPS):
            query = query + 0.3 * torch.rand(1, 1, shape.block, 1, generator=random) * normal(shape.heads, shape.block)
            parts = [
                place(x) for x in (2 * query, normal(shape.kv_heads, shape.block), normal(shape.kv_heads, shape.block))
            ]
            self.calls.append(self.call(*parts))

    def call(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> PrefixCall:
        def dense() -> torch.Tensor:
            keys, values = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return PrefixCall(
            query=query, key=key, value=value, prefix_key=self.key, prefix_value=self.value, prefix_valid=None,
            block_mask=None, scale=query.shape[-1] ** -0.5, layer=Layer("attention", 0, 1), index=1, changed=None,
            most_changed=0, dense=dense,
        )  # fmt: skip

    def steps(self, method: PrefixAttentionMethod) -> Callable[[], torch.Tensor]:
        """One step after another of one block that does not end."""
        state, of_request, count = method.new_state(), method.new_request_state(), 0

        def step() -> torch.Tensor:
            nonlocal count
            call = self.calls[count % STEPS]
            call.index, call.request_state = count, of_request
            count += 1
            return method.attend(call, state)

        step()
        return step


def joined(block: Block) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """SDPA on K/V joined beforehand, by backend."""
    call = block.calls[0]
    keys, values = torch.cat([block.key, call.key], 2), torch.cat([block.value, call.value], 2)
    names = (
        ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        if call.query.is_cuda
        else ("FLASH_ATTENTION", "MATH")
    )
    for name in names:
        backend = getattr(SDPBackend, name)

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(call.query, keys, values, enable_gqa=True)

        try:
            run()
        except RuntimeError as error:
            print(f"dense, joined: {name} does not run here: {str(error).splitlines()[0]}", flush=True)
        else:
            yield name, run


def graphed(step: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of one step, after a few steps beside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step: Callable[[], Any], device: torch.device, budget_ms: float) -> dict[str, Any]:
    if device.type != "cuda":
        return as_record(time_call(step, device, budget_ms=budget_ms))
    launched = time_call(step, device, budget_ms=budget_ms)
    return as_record(time_call(graphed(step), device, budget_ms=budget_ms)) | {
        "launched_p50_ms": round(launched.p50_ms, 4)
    }


def bound(density: float, active: float, page_size: int) -> float:
    """No step is faster than an exact one by more than this: by bytes, all K/V of the prefix over pages and bounds of
    pages; by multiplications, which only active rows make, the same over their share. The larger of the two."""
    return 1 / (min(active, 1.0) * (density + 1 / page_size))


@torch.no_grad()
def measure(shape: Shape, alike: float, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    block = Block(shape, alike, device, dtype)
    about = {**vars(shape), "alike": alike, "dtype": options.dtype, "layers": options.layers}
    call = block.calls[0]
    expected = call.dense()
    records: list[dict[str, Any]] = []

    def add(name: str, step: Callable[[], torch.Tensor], budget: int | None = None, **more: Any) -> None:
        times = timed(step, device, options.budget_ms)
        records.append({**about, "variant": name, "budget": budget, **times, **more})

    def dense() -> torch.Tensor:
        return call.dense()

    add("dense", dense, density=1.0, bound=1.0)
    fastest = [(timed(run, device, options.budget_ms), name) for name, run in joined(block)]
    if fastest:
        times, name = min(fastest, key=lambda pair: pair[0]["p50_ms"])
        records.append(
            {
                **about,
                "variant": "dense, joined",
                "budget": None,
                **times,
                "backend": name,
                "density": 1.0,
                "bound": 1.0,
            }
        )
    add(
        "prefix-split", lambda: split_attention(call), density=1.0, bound=1.0,
        relative_error=relative_error(split_attention(call), expected),
    )  # fmt: skip
    for budget in options.budget:
        common = {"budget": budget, "page_size": options.page_size, "min_prefix": 0}
        for name, method in (
            ("quest", Quest(QuestConfig(**common))),
            ("losa", LoSA(LoSAConfig(**common, k_act=options.k_act))),
        ):
            step = block.steps(method)
            notes = [_step_notes(block, step) for _ in range(STEPS)]
            density = sum(float(n["density"]) for n in notes) / STEPS
            pages = sum(float(n["pages"]) for n in notes) / STEPS
            add(
                name, step, budget, density=density, pages=pages, active=notes[-1]["active"],
                page_size=options.page_size, bound=bound(density, notes[-1]["active"], options.page_size),
            )  # fmt: skip
    exact = min(record["p50_ms"] for record in records if record["density"] == 1)
    for record in records:
        record["ratio"] = records[0]["p50_ms"] / record["p50_ms"]
        record["ratio_to_best_exact"] = exact / record["p50_ms"]
        record["step_ms"] = record["p50_ms"] * options.layers
        ratios = f"x{record['ratio']:.2f}, of the best exact x{record['ratio_to_best_exact']:.2f}"
        print(
            f"P {shape.prefix:>6} alike {alike:g}  {record['variant']:<14}{record['budget'] or '':>5}  density "
            f"{record['density']:.3f} {record['p50_ms']:9.3f} ms  {ratios}, bound x{record['bound']:.2f}",
            flush=True,
        )
    return records


def _step_notes(block: Block, step: Callable[[], Any]) -> dict[str, Any]:
    for call in block.calls:
        call.notes = {}
    step()
    return next(call.notes for call in block.calls if call.notes)


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prefix", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072] if gpu else [16384]
    )
    parser.add_argument("--budget", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--alike", type=float, nargs="+", default=[0.9, 0.0])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--k-act", type=float, default=0.3, help="share of the block")
    parser.add_argument("--layers", type=int, default=36, help="that a step is made of")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--budget-ms", type=float, default=1500.0, help="time to measure one row")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    records: list[dict[str, Any]] = []
    for prefix in options.prefix:
        for alike in options.alike:
            shape = Shape(options.heads, options.kv_heads, options.head_dim, options.block, prefix)
            records += measure(shape, alike, options, device)
    save(options.json, describe_machine(), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
