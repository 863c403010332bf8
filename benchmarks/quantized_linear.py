"""A linear on packed weights against the plain one of the same shape.

python benchmarks/quantized_linear.py --shape llama-4096,llama-14336 --json OUT.json   # GPU, fp16
python benchmarks/quantized_linear.py --shape cpu-2048 --threads 2

Timed, in turn: ``F.linear`` on dense weights, ``quantized_linear``, "dequantise and multiply" (what it must not be
slower than), and torchao's int4 weights where torchao is installed. With few tokens the bound over dense weights of w
bits is w / (b + 32 / g), 32 bits being the scale and the zero of a group at 16 each. The goal is 80 % of it at one
token. Every result is checked first; a wrong one has no time, and the exit code is then 1.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import LinearShape, as_record, conclude, grids, kernel_parser, numbers, parse, relative_error, time_call
from torch.nn import functional as F

from hf_accel.kernels.quantized_linear import Packed, backend_for, dequantize_packed, quantized_linear

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
DENSE, TORCHAO = "F.linear", "torchao int4"


SHAPES = {
    shape.name: shape
    for shape in (
        LinearShape("llama-4096", 4096, 4096, (1, 4, 16, 64, 256, 2048), torch.float16),
        LinearShape("llama-14336", 4096, 14336, (1, 4, 16, 64, 256, 2048), torch.float16),
        LinearShape("cpu-2048", 2048, 2048, (1, 16, 256), torch.float32),
        LinearShape("toy", 128, 64, (1, 3), torch.float32),
    )
}


@dataclass(frozen=True)
class Case:
    shape: LinearShape
    packed: Packed
    dense: torch.Tensor
    x: torch.Tensor

    @classmethod
    def make(cls, shape: LinearShape, tokens: int, bits: int, group: int, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)
        n, m = shape.inputs, shape.outputs
        groups = -(-n // group)

        def words(*size: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31 - 1, size, device=device, generator=generator, dtype=torch.int32)

        scales = (0.5 + torch.rand(groups, m, device=device, generator=generator)) * 2.0**-bits * n**-0.5
        scales = scales.to(torch.float16 if device.type == "cuda" else torch.float32)
        g_idx = torch.arange(n, device=device, dtype=torch.int32) // group
        packed = Packed(words(n * bits // 32, m), scales, words(groups, m * bits // 32), g_idx, bits, group)
        dense = dequantize_packed(*packed[:5], dtype=shape.dtype, backend="torch")
        x = torch.randn(tokens, n, device=device, generator=generator).to(shape.dtype)
        return cls(shape, packed, dense, x)

    def forms(self) -> dict[str, Callable[[], torch.Tensor]]:
        x, packed, dense = self.x, self.packed, self.dense
        group = packed.group_size
        forms = {
            DENSE: lambda: F.linear(x, dense),
            "quantized_linear": lambda: quantized_linear(x, *packed[:5], group_size=group),
            "dequantise and multiply": lambda: F.linear(
                x, dequantize_packed(*packed[:5], dtype=x.dtype, group_size=group)
            ),
        }
        if HAS_TORCHAO and x.is_cuda and packed.bits == 4:
            forms[TORCHAO] = self.torchao()
        return forms

    def torchao(self) -> Callable[[], torch.Tensor]:
        """Quantised by torchao from the dense weight; bf16, which its kernels want."""
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        linear = torch.nn.Linear(*reversed(self.dense.shape), bias=False, device=self.x.device, dtype=torch.bfloat16)
        linear.weight.data.copy_(self.dense)
        quantize_(linear, Int4WeightOnlyConfig(group_size=self.packed.group_size))
        x = self.x.bfloat16()
        return lambda: linear(x)

    def bytes_read(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.packed[:3])


def measure(case: Case, device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    records, right = [], True
    bits, group = case.packed.bits, case.packed.group_size
    bound = 8 * case.dense.element_size() / (bits + 32 / group)
    expected = case.x.double() @ case.dense.double().T
    for name, call in case.forms().items():
        error = relative_error(call(), expected)
        record = {"shape": case.shape.name, "tokens": len(case.x), "bits": bits, "group_size": group, "form": name}
        record["relative_error"] = error
        # torchao rounds to its own grid: its error is shown, not judged.
        if name != TORCHAO and error > TOLERANCE[case.shape.dtype]:
            right = False
            print(f"WRONG {case.shape.name} {len(case.x)} tokens {bits} bits {name}: relative error {error:.1e}")
        else:
            record |= as_record(time_call(call, device))
        records.append(record)
    dense = records[0].get("p50_ms")
    for record in records:
        if "p50_ms" not in record or not dense:
            continue
        faster = dense / record["p50_ms"]
        record |= {"times_faster": round(faster, 3), "bound": round(bound, 3)}
        line = f"{case.shape.name:12} {len(case.x):5} tokens {bits} bits g{group:<4} {record['form']:24}"
        line += f"{record['p50_ms']:9.4f} ms  {faster:6.2f} x dense"
        if record["form"] == "quantized_linear":
            record["backend"] = backend_for(case.x).backend
            speed = case.bytes_read() / record["p50_ms"] / 1e6
            record |= {"share_of_bound": round(faster / bound, 3), "gigabytes_per_second": round(speed, 1)}
            line += f"  bound {bound:5.2f} x: {100 * faster / bound:3.0f} %  {speed:6.0f} GB/s of codes and grids"
        print(line)
    return records, right


def main() -> int:
    parser = kernel_parser(__doc__)
    parser.add_argument("--tokens", type=numbers, help="comma-separated, instead of those of the shape")
    parser.add_argument("--grids", type=grids, default="4:128,3:128,2:64", help="comma-separated bits:group size")
    options, shapes, device = parse(parser, SHAPES)
    if not HAS_TORCHAO:
        print("torchao is not installed: no int4 peer in this run")
    elif device.type != "cuda":
        print("torchao's int4 kernels need a GPU: no peer in this run")
    runs = (
        measure(Case.make(shape, tokens, bits, group, device), device)
        for shape in shapes
        for bits, group in options.grids
        for tokens in options.tokens or shape.tokens
    )
    return conclude(options, device, runs)


if __name__ == "__main__":
    sys.exit(main())
