"""Attention time of svg2 against SDPA, selection and permutation included, warm centroids.

    python benchmarks/svg2_attention.py --shape cpu8k,mini-wan --json benchmarks/results/svg2_attention_cpu.json

Synthetic queries and keys with the cluster structure of video tokens: every token belongs to one of many latent
groups, so that a few key clusters hold most of a query's mass; ``--spread`` sets how much tokens scatter inside a
group. The density is what svg2 itself reached. Bound: attention at density d cannot be faster than 1/d of dense.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import relative_error, save, time_call

from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.measure.machine import describe_machine
from hf_accel.patches.svg2 import SVG2, SVG2Config


@dataclass(frozen=True)
class Shape:
    """Token grid, heads and head dim, clusters of queries and keys."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    query_clusters: int
    key_clusters: int

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width


SHAPES = {
    "mini-wan": Shape((9, 16, 16), 4, 32, 24, 64),
    "cpu8k": Shape((8, 32, 32), 8, 64, 48, 96),
    "wan480": Shape((21, 30, 52), 12, 128, 200, 1000),
    "wan720": Shape((21, 45, 80), 40, 128, 300, 1000),
}


def tokens(shape: Shape, spread: float, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Any:
    """Query, key, value ``[1, H, S, D]`` whose tokens scatter around shared group centres."""
    groups = 2 * shape.key_clusters
    centres = torch.randn(1, shape.heads, groups, shape.head_dim, generator=generator)
    member = torch.randint(groups, (shape.tokens,), generator=generator)
    noise = torch.randn(3, 1, shape.heads, shape.tokens, shape.head_dim, generator=generator)
    # Logits of about +6 inside a group and 0 between groups: most of a query's mass, not all, lies in its group.
    strength = (6 / shape.head_dim**0.5) ** 0.5
    query = strength * (centres[:, :, member] + spread * noise[0])
    key = strength * (centres[:, :, member] + spread * noise[1])
    return [x.to(device, dtype) for x in (query, key, noise[2])]


def in_turn(parts: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Time the parts in turn, round by round, so that a machine that gets busy slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, run in parts.items():
            once = time_call(run, device, warmup=1, least=1, most=1, budget_ms=0)
            if turn:
                times[name].append(once.p50_ms)
    return {
        name: {"p50_ms": statistics.median(values), "best_ms": min(values), "worst_ms": max(values), "rounds": rounds}
        for name, values in times.items()
    }


def measure(shape: Shape, top_p: float, spread: float, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = tokens(shape, spread, torch.Generator().manual_seed(0), device, dtype)
    scale = shape.head_dim**-0.5
    settings = SVG2Config(
        top_p=top_p,
        min_kc_ratio=0.0,
        num_q_centroids=shape.query_clusters,
        num_k_centroids=shape.key_clusters,
        kmeans_iter_init=10,
        dense_steps=0,
        dense_layers=0,
    )
    method = SVG2(settings)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    call = AttentionCall(
        query, key, value, None, scale, False, Layer("bench", 0, 1), TokenGrid(*shape.grid),
        Step(1, 10, 500.0, 0.1, "cond", 0), dense,
    )  # fmt: skip
    state = method.new_state()
    method.attend(call, state)  # cold centroids
    parts = {
        "dense": dense,
        "svg2": lambda: method.attend(call, state),
        "kmeans": lambda: method.cluster(call, state),
    }
    times = in_turn(parts, device)
    out = method.attend(call, state)
    density = float(call.notes["density"].mean())
    ratio = times["dense"]["p50_ms"] / times["svg2"]["p50_ms"]
    return {
        "tokens": shape.tokens,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "clusters": [shape.query_clusters, shape.key_clusters],
        "dtype": str(dtype),
        "top_p": top_p,
        "spread": spread,
        "density": density,
        "relative_error": relative_error(out, dense()),
        "times": times,
        "ratio": ratio,
        "bound": 1 / density,
        "share_of_bound": ratio * density,
        "goal": 0.6 / density,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mini-wan,cpu8k")
    parser.add_argument("--top-p", default="0.5,0.7,0.9")
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in options.shape.split(","):
        for p in map(float, options.top_p.split(",")):
            row = {"shape": name, **measure(SHAPES[name], p, options.spread, device)}
            rows.append(row)
            t = row["times"]
            print(
                f"{name:<9} S={row['tokens']:<6} p={p:<4} density {row['density']:.3f} "
                f"dense {t['dense']['p50_ms']:8.1f} ms  svg2 {t['svg2']['p50_ms']:8.1f} ms "
                f"(k-means {t['kmeans']['p50_ms']:.1f})  ratio {row['ratio']:.2f} of bound {row['bound']:.2f} "
                f"({row['share_of_bound']:.2f}; goal 0.60)  error {row['relative_error']:.3f}",
                flush=True,
            )
    if options.json:
        save(options.json, describe_machine(device), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
