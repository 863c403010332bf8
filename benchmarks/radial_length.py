"""Radial Attention against dense attention as a video grows to two and four times its length.

    python benchmarks/radial_length.py --json benchmarks/results/radial_length_cpu.json
    python benchmarks/radial_length.py --shape wan720 --json benchmarks/results/radial_length_gpu.json  # on a GPU

The map depends on the shape alone, so densities are given for the large models too, without running them. The time
of a call is that of the method as a model calls it; building the map, once per shape, stands beside it. The growth of
a figure is its exponent in the length: 2 is quadratic, 1 is linear. Bound: attention at density d cannot be faster
than 1/d of dense.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import as_record, relative_error, save, time_call

from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import VideoLayout
from hf_accel.kernels.block_sparse_attention import backend_for
from hf_accel.measure.machine import describe_machine
from hf_accel.patches.radial import Radial, RadialConfig

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """Frames at one, two and four times the length, the picture in tokens, and what the model adds."""

    frames: tuple[int, int, int]
    height: int
    width: int
    text: int = 0
    heads: int = 4
    head_dim: int = 64
    decay_factor: float = 1.0
    block_size: int = 128

    def grid(self, frames: int) -> TokenGrid:
        return TokenGrid(frames, self.height, self.width, text="last" if self.text else "none")

    def method(self) -> Radial:
        return Radial(RadialConfig(decay_factor=self.decay_factor, block_size=self.block_size))


SHAPES = {
    "16x16": Shape((9, 18, 36), 16, 16, block_size=64),
    "wan480": Shape((21, 41, 81), 30, 52, heads=12, head_dim=128),
    "wan720": Shape((21, 41, 81), 45, 80, heads=40, head_dim=128),
    "hunyuan720": Shape((33, 65, 129), 45, 80, text=256, heads=24, head_dim=128, decay_factor=0.95),
}


def call_for(shape: Shape, frames: int, device: torch.device) -> AttentionCall:
    grid = shape.grid(frames)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    size = (1, shape.heads, grid.tokens + shape.text, shape.head_dim)
    qkv = [torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3)]
    step = Step(0, None, 500.0, 0.0, "cond", 0)
    scale = shape.head_dim**-0.5

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(*qkv, scale=scale)

    return AttentionCall(qkv[0], qkv[1], qkv[2], None, scale, False, Layer("attn", 0, 1), grid, step, dense)


def error(method: Radial, call: AttentionCall, rows: int = 24) -> float:
    """Against fp64 attention under the token mask, on a few query rows of two heads, the first and last among them."""
    out, size = method.attend(call, None), call.query.shape[2]
    block_map = method.blocks(VideoLayout.of(call), call.query.device).block_map
    chosen = torch.linspace(0, size - 1, rows).long().to(out.device)
    block = method.config.block_size
    mask = block_map[chosen // block].repeat_interleave(block, 1)[:, :size]
    heads = [0, out.shape[1] - 1]
    query, key, value = (x[:, heads].double() for x in (call.query, call.key, call.value))
    expected = F.scaled_dot_product_attention(query[:, :, chosen], key, value, mask, scale=call.scale)
    return relative_error(out[:, heads][:, :, chosen], expected)


def training_step(call: AttentionCall, attend: Callable[[], torch.Tensor], grad: torch.Tensor) -> None:
    """Forward and backward of one attention call."""
    torch.autograd.grad(attend(), (call.query, call.key, call.value), grad)


def describe(shape: Shape, frames: int) -> dict[str, Any]:
    """What the shape alone says."""
    grid = shape.grid(frames)
    layout = VideoLayout(frames, grid.height * grid.width, 0, grid.tokens + shape.text)
    start = time.perf_counter()
    blocks = shape.method().blocks(layout, torch.device("cpu"))
    density = blocks.density.item()
    return {
        "frames": frames,
        "tokens": layout.sequence,
        "density": round(density, 4),
        "kept_pairs": round(density * layout.sequence**2),
        "map_ms": round((time.perf_counter() - start) * 1e3, 2),
    }


def measure(shape: Shape, frames: int, device: torch.device, backward: bool) -> dict[str, Any]:
    call, method = call_for(shape, frames, device), shape.method()
    record: dict[str, Any] = {"relative_error": error(method, call)}
    if record["relative_error"] > TOLERANCE[call.query.dtype]:
        return record | {"correct": False}
    parts: dict[str, Callable[[], Any]] = {"radial": lambda: method.attend(call, None), "dense": call.dense}
    with torch.no_grad():
        times = {name: time_call(run, device) for name, run in parts.items()}
    if backward:
        grad = torch.randn_like(call.query)
        for x in (call.query, call.key, call.value):
            x.requires_grad_()
        for name, run in parts.items():
            times[name + "_training"] = time_call(lambda run=run: training_step(call, run, grad), device)
    record |= {"correct": True} | {name: as_record(timing) for name, timing in times.items()}
    record["speedup"] = round(times["dense"].p50_ms / times["radial"].p50_ms, 3)
    if backward:
        record["training_speedup"] = round(times["dense_training"].p50_ms / times["radial_training"].p50_ms, 3)
    return record


def growth(records: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """Exponents of a figure in the length, from each length to the next."""
    return [
        round(math.log(figure(b) / figure(a)) / math.log(b["tokens"] / a["tokens"]), 3)
        for a, b in itertools.pairwise(records)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="16x16", help=f"shapes to time, of {', '.join(SHAPES)}")
    parser.add_argument("--backward", action="store_true", help="also time forward and backward together")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine, records, ok = describe_machine(device), [], True
    print(machine)
    timed = options.shape.split(",")
    for name, shape in SHAPES.items():
        lengths = []
        print(f"{name}: {shape}")
        for frames in shape.frames:
            record = describe(shape, frames)
            line = f"  {frames:4d} frames, {record['tokens']:7d} tokens: density {record['density']:.4f}"
            if name in timed:
                record |= {"backend": backend_for(torch.empty(1, 1, 1, shape.head_dim, device=device)).backend}
                record |= measure(shape, frames, device, options.backward)
                ok &= record["correct"]
                line += f", error {record['relative_error']:.1e}"
                if record["correct"]:
                    line += (
                        f", {record['radial']['p50_ms']:.1f} ms, dense {record['dense']['p50_ms']:.1f} ms: "
                        f"{record['speedup']:.2f}x (bound {1 / record['density']:.2f}x)"
                    )
                if "training_speedup" in record:
                    line += f", with backward {record['training_speedup']:.2f}x"
            print(line, flush=True)
            lengths.append(record)
        grown = {"kept_pairs": growth(lengths, lambda record: record["kept_pairs"])}
        if all(record.get("correct") for record in lengths):
            for part in ("radial", "dense"):
                grown[part] = growth(lengths, lambda record, part=part: record[part]["p50_ms"])
        print(f"  grows with the length to the power of {grown}")
        settings = {"decay_factor": shape.decay_factor, "block_size": shape.block_size, "text": shape.text}
        sizes = {"shape": name, "heads": shape.heads, "head_dim": shape.head_dim}
        records.append(sizes | settings | {"lengths": lengths, "growth": grown})
    save(options.json, machine, records)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
