"""The Walsh-Hadamard transform of rows against a copy of them, and against its peers.

python benchmarks/hadamard.py --shape llama --json OUT.json    # GPU, bf16 and fp32
python benchmarks/hadamard.py --shape cpu --threads 2

Timed, in turn: a copy (the floor: every byte read once and written once), ``hadamard``, the product with the whole
matrix where it is small enough, and the fast-hadamard-transform package where it is installed (powers of two). Every
result is checked against fp64 first; a wrong one has no time, and the exit code is then 1.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import as_record, conclude, kernel_parser, parse, relative_error, time_call

from hf_accel.kernels.hadamard import backend_for, factor, hadamard, hadamard_matrix

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HAS_PEER = importlib.util.find_spec("fast_hadamard_transform") is not None
LARGEST_PRODUCT = 4096
COPY = "copy"


@dataclass(frozen=True)
class Shape:
    """Every length is transformed in as many rows as make ``elements``."""

    name: str
    elements: int
    lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama", 1 << 26, (1024, 3072, 4096, 8192, 11008, 14336, 16384, 32768), (torch.bfloat16, torch.float32)),
        Shape("cpu", 1 << 22, (256, 1024, 3072, 4096, 14336), (torch.float32,)),
        Shape("toy", 1 << 12, (64, 96), (torch.float32,)),
    )
}


def forms_of(x: torch.Tensor, matrix: torch.Tensor | None) -> dict[str, Callable[[], torch.Tensor]]:
    forms: dict[str, Callable[[], torch.Tensor]] = {COPY: x.clone, "hadamard": lambda: hadamard(x)}
    n = x.shape[-1]
    if matrix is not None:
        forms["product with the matrix"] = lambda: x @ matrix.T
    if HAS_PEER and x.is_cuda and n & (n - 1) == 0:
        from fast_hadamard_transform import hadamard_transform

        forms["fast-hadamard-transform"] = lambda: hadamard_transform(x)
    return forms


def measure(shape: Shape, n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.elements // n, n, device=device, generator=generator).to(dtype)
    parts = factor(n)
    matrix = hadamard_matrix(n, dtype, device) if n <= LARGEST_PRODUCT else None
    few = x[:64]
    expected = hadamard(few.double(), backend="torch")
    records, right = [], True
    for name, call in forms_of(x, matrix).items():
        result = call()[:64]
        error = relative_error(result, few if name == COPY else expected)
        record = {"shape": shape.name, "n": n, "rows": len(x), "dtype": str(dtype), "factor": parts, "form": name}
        record["relative_error"] = error
        if error > TOLERANCE[dtype]:
            right = False
            print(f"WRONG {n} {dtype} {name}: relative error {error:.1e}")
        else:
            record |= as_record(time_call(call, device))
        records.append(record)
    floor = records[0].get("p50_ms")
    for record in records:
        if "p50_ms" in record and floor:
            speed = 2 * x.numel() * x.element_size() / record["p50_ms"] / 1e6
            record |= {"times_copy": round(record["p50_ms"] / floor, 3), "gigabytes_per_second": round(speed, 1)}
            if record["form"] == "hadamard":
                record["backend"] = backend_for(x).backend
            print(
                f"{n:6} {str(dtype)[6:]:9} {record['form']:24} {record['p50_ms']:9.3f} ms  "
                f"{record['times_copy']:6.2f} x copy  {speed:7.0f} GB/s  error {record['relative_error']:.1e}"
            )
    return records, right


def main() -> int:
    options, shapes, device = parse(kernel_parser(__doc__), SHAPES)
    if not HAS_PEER:
        print("fast-hadamard-transform is not installed: no peer in this run")
    elif device.type != "cuda":
        print("fast-hadamard-transform needs a GPU: no peer in this run")
    runs = (measure(shape, n, dtype, device) for shape in shapes for dtype in shape.dtypes for n in shape.lengths)
    return conclude(options, device, runs)


if __name__ == "__main__":
    sys.exit(main())
