"""The weight of a QWHA adapter in one pass against the steps it is made of, and against the activation side.

python benchmarks/qwha_weight.py --shape llama-4096,llama-down --json OUT.json    # GPU, bf16
python benchmarks/qwha_weight.py --shape cpu-1024 --threads 2

Timed, in turn, on a packed base of ``--grids`` and an adapter of ``--rank`` (p = rank * (m + n) coefficients):
dequantising alone (the floor: the base read and a weight written), ``qwha_weight``, the unfused path (dequantise,
scatter, transform, add), and backward both ways. Then a whole layer for some numbers of tokens, by the weight's side
and by the activations'. Bytes per weight are b / 8 + 4 / g + the result's. Every result is checked against fp64 first;
a wrong one has no time, and the exit code is then 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import LinearShape, conclude, grids, kernel_parser, parse, relative_error, time_and_memory
from torch.nn import functional as F

from hf_accel.kernels import qwha_weight as op
from hf_accel.kernels.hadamard import block_size, factor, hadamard
from hf_accel.kernels.quantized_linear import Packed, dequantize_packed, quantized_linear
from hf_accel.kernels.qwha_weight.layout import row_of, unsigned_columns

TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 5e-6}
FLOOR = "dequantise alone"


SHAPES = {
    shape.name: shape
    for shape in (
        LinearShape("llama-4096", 4096, 4096, (1, 16, 256, 2048), torch.bfloat16),
        LinearShape("llama-up", 4096, 14336, (1, 16, 256, 2048), torch.bfloat16),
        LinearShape("llama-down", 14336, 4096, (1, 16, 256, 2048), torch.bfloat16),
        LinearShape("cpu-1024", 1024, 1024, (1, 16, 256), torch.float32),
        LinearShape("toy", 96, 64, (1, 3), torch.float32),
    )
}


@dataclass(frozen=True)
class Case:
    shape: LinearShape
    packed: Packed
    indptr: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    grad: torch.Tensor
    scale: float
    block: int

    @classmethod
    def make(cls, shape: LinearShape, bits: int, group: int, rank: int, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)
        n, m = shape.inputs, shape.outputs

        def words(*size: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31 - 1, size, device=device, generator=generator, dtype=torch.int32)

        groups = -(-n // group)
        scales = (0.5 + torch.rand(groups, m, device=device, generator=generator)) * 2.0**-bits * n**-0.5
        g_idx = torch.arange(n, device=device, dtype=torch.int32) // group
        packed = Packed(words(n * bits // 32, m), scales.half(), words(groups, m * bits // 32), g_idx, bits, group)
        count = min(n, rank * (n + m) // m)
        columns = torch.rand(m, n, device=device, generator=generator).argsort(-1)[:, :count].sort(-1).values
        indptr = torch.arange(m + 1, device=device, dtype=torch.int32) * count
        values = torch.randn(m * count, device=device, generator=generator)
        grad = torch.randn(m, n, device=device, generator=generator).to(shape.dtype)
        block = n if factor(n) else block_size(n)
        return cls(shape, packed, indptr, columns.flatten().to(torch.int16), values, grad, n**0.5 / count, block)

    def dense(self) -> torch.Tensor:
        return dequantize_packed(*self.packed[:5], dtype=self.shape.dtype, group_size=self.packed.group_size)

    def fused(self) -> torch.Tensor:
        return op.qwha_weight(
            None, self.indptr, self.columns, self.values, self.scale, packed=self.packed, blocks=self.block,
            dtype=self.shape.dtype,
        )  # fmt: skip

    def unfused(self) -> torch.Tensor:
        rows, columns = row_of(self.indptr, len(self.values)), unsigned_columns(self.columns)
        sparse = self.values.new_zeros(self.shape.outputs, self.shape.inputs)
        sparse[rows, columns] = self.values
        update = hadamard(sparse, inverse=True, scale=self.scale, blocks=self.block)
        return self.dense() + update.to(self.shape.dtype)

    def fused_gradient(self) -> torch.Tensor:
        return op._qwha_gradient(
            self.grad, self.indptr, self.columns, self.scale, self.block, self.values.dtype, "auto"
        )

    def unfused_gradient(self) -> torch.Tensor:
        spectrum = hadamard(self.grad, scale=self.scale / self.block, blocks=self.block)
        return spectrum[row_of(self.indptr, len(self.values)), unsigned_columns(self.columns)].to(self.values.dtype)

    def weight_side(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.fused())

    def activation_side(self, x: torch.Tensor) -> torch.Tensor:
        base = quantized_linear(x, *self.packed[:5], group_size=self.packed.group_size)
        return base + op.qwha_activation(x, self.indptr, self.columns, self.values, self.scale, blocks=self.block)

    def forms(self) -> dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]]:
        """What is timed, and what it must come to in fp64."""
        base = dequantize_packed(*self.packed[:5], dtype=torch.float64, backend="torch")
        sparse = base.new_zeros(base.shape)
        rows, columns = row_of(self.indptr, len(self.values)), unsigned_columns(self.columns)
        sparse[rows, columns] = self.values.double()
        weight = base + hadamard(sparse, inverse=True, scale=self.scale, blocks=self.block, backend="torch")
        spectrum = hadamard(self.grad.double(), scale=self.scale / self.block, blocks=self.block, backend="torch")
        gradient = spectrum[rows, columns]
        forms = {
            FLOOR: (self.dense, base),
            "qwha_weight": (self.fused, weight),
            "unfused": (self.unfused, weight),
            "gradient": (self.fused_gradient, gradient),
            "gradient unfused": (self.unfused_gradient, gradient),
        }
        generator = torch.Generator(weight.device).manual_seed(1)
        for tokens in self.shape.tokens:
            x = torch.randn(tokens, self.shape.inputs, device=weight.device, generator=generator).to(self.shape.dtype)
            expected = x.double() @ weight.T
            forms[f"weight side {tokens} tokens"] = (lambda x=x: self.weight_side(x)), expected
            forms[f"activation side {tokens} tokens"] = (lambda x=x: self.activation_side(x)), expected
        return forms


def measure(case: Case, rank: int, device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    records, right = [], True
    shape, packed = case.shape, case.packed
    weights = shape.inputs * shape.outputs
    moved = sum(part.numel() * part.element_size() for part in packed[:3]) + weights * case.grad.element_size()
    for name, (call, expected) in case.forms().items():
        error = relative_error(call(), expected)
        record = {"shape": shape.name, "bits": packed.bits, "group_size": packed.group_size, "rank": rank, "form": name}
        record["relative_error"] = error
        if error > TOLERANCE[shape.dtype]:
            right = False
            print(f"WRONG {shape.name} {packed.bits} bits {name}: relative error {error:.1e}")
        else:
            record |= time_and_memory(call, device)
            line = f"{shape.name:11} {packed.bits} bits g{packed.group_size:<4} rank {rank:3} {name:28}"
            line += f"{record['p50_ms']:9.3f} ms"
            if name in (FLOOR, "qwha_weight", "unfused"):
                speed = moved / record["p50_ms"] / 1e6
                record["gigabytes_per_second"] = round(speed, 1)
                line += f"  {speed:6.0f} GB/s of the {moved / weights:.2f} bytes per weight that must move"
            print(line)
        records.append(record)
    return records, right


def main() -> int:
    parser = kernel_parser(__doc__)
    parser.add_argument("--grids", type=grids, default="4:64,2:64", help="comma-separated bits:group size")
    parser.add_argument("--rank", type=int, help="default 64, the paper's; 4 for toy")
    options, shapes, device = parse(parser, SHAPES)
    runs = (
        measure(Case.make(shape, bits, group, rank, device), rank, device)
        for shape in shapes
        for rank in [options.rank or (4 if shape.name == "toy" else 64)]
        for bits, group in options.grids
    )
    return conclude(options, device, runs)


if __name__ == "__main__":
    sys.exit(main())
