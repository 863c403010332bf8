"""Expected embeddings ``softmax(logits) @ E`` against the plain product of the same shape.

python benchmarks/soft_embed.py --shape rcd8b --json OUT.json          # GPU, bf16
python benchmarks/soft_embed.py --shape rcd8b --rows 64 --sweep-tiles  # GPU: which tile
python benchmarks/soft_embed.py --shape cpu32k --threads 2

Timed, in turn: the product alone with probabilities given (the floor: no softmax at all), the softmax and product as
models write it, ``soft_embed`` with the log-sum-exp known (RCD has it from the commit rule), ``entropy_lse``, and both.
The goal is ``soft_embed`` within 1.2 times the plain product at V = 151,936, D = 4,096, 1 to 64 rows. Every result is
checked first; a wrong one has no time, and the exit code is then 1.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import as_record, conclude, kernel_parser, numbers, parse, relative_error, time_and_memory, time_call

from hf_accel.kernels import soft_embedding as op

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """``logits`` is the dtype of the logits, ``dtype`` that of the embeddings ``[vocabulary, dim]``."""

    name: str
    vocabulary: int
    dim: int
    rows: tuple[int, ...]
    dtype: torch.dtype
    logits: torch.dtype


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("rcd8b", 151_936, 4096, (1, 4, 16, 32, 64), torch.bfloat16, torch.bfloat16),
        Shape("diffusion-gemma", 262_144, 2304, (64, 256, 1024), torch.bfloat16, torch.bfloat16),
        Shape("cpu32k", 32_768, 512, (1, 16, 64), torch.float32, torch.float32),
        Shape("toy", 1_009, 96, (3,), torch.float32, torch.float32),
    )
}


@dataclass(frozen=True)
class Case:
    """One number of rows; logits spread as far as those of a model that is neither sure nor lost."""

    shape: Shape
    logits: torch.Tensor
    weight: torch.Tensor
    probabilities: torch.Tensor
    lse: torch.Tensor
    expected: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, rows: int, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)
        logits = 4 * torch.randn(rows, shape.vocabulary, device=device, generator=generator)
        weight = torch.randn(shape.vocabulary, shape.dim, device=device, generator=generator).to(shape.dtype)
        logits = logits.to(shape.logits)
        p = logits.softmax(-1, dtype=torch.float32)
        expected = p @ weight.float() if device.type == "cpu" else torch.cat([r[None] @ weight.float() for r in p])
        return cls(shape, logits, weight, p.to(shape.dtype), logits.float().logsumexp(-1), expected)

    def forms(self) -> dict[str, Callable[[], Any]]:
        logits, weight, p, lse = self.logits, self.weight, self.probabilities, self.lse
        return {
            "product alone": lambda: p @ weight,
            "softmax and product": lambda: logits.softmax(-1, dtype=torch.float32).to(weight.dtype) @ weight,
            "soft_embed": lambda: op.soft_embed(logits, weight, lse),
            "entropy_lse": lambda: op.entropy_lse(logits),
            "entropy_lse and soft_embed": lambda: op.soft_embed(logits, weight, op.entropy_lse(logits).lse),
        }

    def least_bytes(self, form: str) -> int:
        """What cannot be left unread: the logits (or as many probabilities) and the embeddings."""
        logits, weight = (x.numel() * x.element_size() for x in (self.logits, self.weight))
        return logits if form == "entropy_lse" else logits + weight


def error_of(case: Case, name: str, result: Any) -> float:
    if name == "entropy_lse":
        return relative_error(result.lse, case.lse)
    return relative_error(result, case.expected)


def measure(case: Case, device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    records, right = [], True
    rows = len(case.logits)
    for name, call in case.forms().items():
        error = error_of(case, name, call())
        record = {"shape": case.shape.name, "rows": rows, "form": name, "relative_error": error}
        if error > TOLERANCE[case.shape.dtype]:
            right = False
            print(f"WRONG {case.shape.name} {rows} rows {name}: relative error {error:.1e}")
        else:
            record |= time_and_memory(call, device)
        records.append(record)
    floor = records[0].get("p50_ms")
    for record in records:
        if "p50_ms" in record and floor:
            record["times_product"] = round(record["p50_ms"] / floor, 3)
            speed = case.least_bytes(record["form"]) / record["p50_ms"] / 1e6
            print(
                f"{case.shape.name:16} {rows:5} rows  {record['form']:27} {record['p50_ms']:9.3f} ms  "
                f"{record['times_product']:6.2f} x product  {speed:7.0f} GB/s"
            )
            record["gigabytes_per_second"] = round(speed, 1)
    return records, right


def sweep_tiles(case: Case, device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    """Time ``soft_embed`` with every tile that fits, fastest last; whether all were right."""
    from hf_accel.kernels.common.aot import SHARED_MEMORY_LIMIT
    from hf_accel.kernels.soft_embedding import triton

    shipped, records, right = triton.tiles, [], True
    cc = triton.compute_capability(case.weight)
    m = shipped(cc, len(case.logits), case.shape.dtype).m
    limit = SHARED_MEMORY_LIMIT.get(cc, 99 * 1024)
    for v, d, warps, stages, programs in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4, 5), (1, 2)):
        needed = stages * v * (d * case.weight.element_size() + m * case.logits.element_size())
        if needed * programs > limit:
            continue
        tile = triton.Tile(m, v, d, warps, stages, programs)
        triton.tiles = lambda *_, tile=tile: tile
        call = case.forms()["soft_embed"]
        if error_of(case, "soft_embed", call()) > TOLERANCE[case.shape.dtype]:
            print(f"WRONG {tile}")
            right = False
            continue
        timing = time_call(call, device, budget_ms=200)
        records.append({"shape": case.shape.name, "rows": len(case.logits), "tile": vars(tile), **as_record(timing)})
    triton.tiles = shipped
    records.sort(key=lambda record: -record["p50_ms"])
    for record in records[-10:]:
        print(f"{record['p50_ms']:9.4f} ms  {record['tile']}")
    print(f"shipped: {shipped(cc, len(case.logits), case.shape.dtype)}")
    return records, right


def main() -> int:
    parser = kernel_parser(__doc__)
    parser.add_argument("--rows", type=numbers, help="comma-separated, instead of those of the shape")
    parser.add_argument("--sweep-tiles", action="store_true", help="GPU: time soft_embed with many tiles")
    options, shapes, device = parse(parser, SHAPES)
    if options.sweep_tiles and device.type != "cuda":
        parser.error("--sweep-tiles needs a GPU")
    run = sweep_tiles if options.sweep_tiles else measure
    cases = (Case.make(shape, rows, device) for shape in shapes for rows in options.rows or shape.rows)
    return conclude(options, device, (run(case, device) for case in cases))


if __name__ == "__main__":
    sys.exit(main())
