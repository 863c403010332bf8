"""The transform on a GPU: rows in registers, every axis a product with a small matrix of signs on the tensor cores.

A row is read and written once: 8 bytes per element in fp32, 4 in the half types, so 2.4 or 1.2 ps per element at
3.35 TB/s. Between, log2(n) rounds of additions would be free (33 T/s: 0.4 ps at n = 4,096), but a compiler that lays
registers out by itself exchanges them through shared memory in nearly every round (8 bytes per element at 28 TB/s:
0.3 ps, twelve times). An axis of F elements as a product needs one exchange and ``4 F`` operations per element, with x
as the sum of two tf32 numbers (22 bits; the signs are exact). At 495 T/s the three axes of 16 of n = 4,096 come to
0.4 ps and their exchanges to 0.9, against 1.0 and 0.6 for two axes of 64; on an A100 (156 T/s, 19 TB/s, and 4 ps for
the bytes) to 1.2 and 1.2 against 3.3 and 0.8. So axes are as many as they can be with at least 16 elements.

A row with its order K padded to a power of two (28 * 512 as 32 * 512) is transformed in one pass up to 16,384 elements,
64 KB: the order is one axis more. Rows that are longer take a second pass over the axis that did not fit, in fp32
between; so do those of orders above 128 (11008 = 172 * 64), whose padded matrix alone would fill the shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.hadamard.orders import order_matrix, require_factor, sylvester

LONGEST = 16384  # elements of a padded row that one program holds
LEAST_TILE = 4096  # elements of a program: rows are put together up to here
LARGEST_FUSED_ORDER = 128
AXIS_COLUMNS = 32
AXIS_STEP = 32

_LOW_BITS: tl.constexpr = tl.constexpr(0xFFFFE000)
_HALF_STEP: tl.constexpr = tl.constexpr(0x1000)


@triton.jit
def to_tf32(x):
    """fp32 rounded to 11 significant bits, ties away from zero. What is left over, ``x`` minus this, is exact."""
    return ((x.to(tl.uint32, bitcast=True) + _HALF_STEP) & _LOW_BITS).to(tl.float32, bitcast=True)


@triton.jit
def signed_sums(x, signs):
    """``x @ signs`` for signs of +1, -1 and 0: exact products, fp32 sums. An fp32 x counts with 22 bits."""
    if x.dtype == tl.float32:
        high = to_tf32(x)
        low = to_tf32(x - high)
        return tl.dot(high, signs, tl.dot(low, signs, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(x, signs.to(x.dtype))


@triton.jit
def sylvester_signs(SIZE: tl.constexpr, LENGTH: tl.constexpr):
    """fp32 ``[SIZE, SIZE]``: the Sylvester matrix of order ``LENGTH``, along the diagonal as often as it fits."""
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    parity = i & j & (LENGTH - 1)
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    signs = 1.0 - 2.0 * (parity & 1).to(tl.float32)
    if LENGTH < SIZE:
        signs = tl.where((i ^ j) < LENGTH, signs, 0.0)
    return signs


@triton.jit
def turn(y, LINES: tl.constexpr, LENGTH: tl.constexpr, LAST: tl.constexpr, NEXT: tl.constexpr):
    """In lines of ``LENGTH`` elements the last axis, of ``LAST``, becomes the first one. The lines come and go as
    matrices, of ``LAST`` and ``NEXT`` columns."""
    y = tl.permute(tl.reshape(y, [LINES, LENGTH // LAST, LAST]), (0, 2, 1))
    return tl.reshape(y, [LINES * LENGTH // NEXT, NEXT])


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    X,  # [rows, N]
    Matrix,  # fp32 [ORDER, ORDER], transposed, padded with 0; unused if ORDER is 1
    Out,  # [rows, N]
    rows,
    scale,
    N: tl.constexpr,
    LENGTH: tl.constexpr,  # power of two
    ORDER: tl.constexpr,  # power of two, at least K
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
):
    PADDED: tl.constexpr = ORDER * LENGTH
    LINES: tl.constexpr = ROWS * ORDER
    place = tl.arange(0, ROWS * PADDED // FIRST)[:, None] * FIRST + tl.arange(0, FIRST)[None, :]
    begin = tl.program_id(0).to(tl.int64) * ROWS
    row = place // PADDED
    inside = begin + row < rows
    if N == PADDED:
        offset = place
    else:
        offset = row * N + place % PADDED
        inside = inside & (place % PADDED < N)
    y = tl.load(X + begin * N + offset, mask=inside, other=0.0)
    if LENGTH > 1:
        # A length below 16 goes through the smallest product there is, several at a time.
        y = signed_sums(y, sylvester_signs(FIRST, LENGTH))
    if SECOND > 1:
        y = signed_sums(turn(y, LINES, LENGTH, FIRST, SECOND), sylvester_signs(SECOND, SECOND))
        if THIRD > 1:
            y = signed_sums(turn(y, LINES, LENGTH, SECOND, THIRD), sylvester_signs(THIRD, THIRD))
            y = turn(y, LINES, LENGTH, THIRD, FIRST)
        else:
            y = turn(y, LINES, LENGTH, SECOND, FIRST)
    if ORDER > 1:
        i = tl.arange(0, ORDER)
        signs = tl.load(Matrix + i[:, None] * ORDER + i[None, :])
        y = tl.reshape(tl.permute(tl.reshape(y, [ROWS, ORDER, LENGTH]), (0, 2, 1)), [ROWS * LENGTH, ORDER])
        y = signed_sums(y, signs)
        y = tl.permute(tl.reshape(y, [ROWS, LENGTH, ORDER]), (0, 2, 1))
        y = tl.reshape(y, [ROWS * PADDED // FIRST, FIRST])
    tl.store(Out + begin * N + offset, (y * scale).to(Out.dtype.element_ty), mask=inside)


@triton.jit
def axis_kernel(
    X,  # [outer, size, inner]
    Matrix,  # fp32 [SIZE, SIZE], padded with 0
    Out,  # [outer, size, inner]
    size,
    inner,
    scale,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, SIZE)
    begin = tl.program_id(0).to(tl.int64) * size * inner
    y = tl.zeros([SIZE, COLUMNS], dtype=tl.float32)
    for start in range(0, SIZE, STEP):
        j = start + tl.arange(0, STEP)
        there = (j < size)[:, None] & (column < inner)[None, :]
        x = tl.load(X + begin + j[:, None] * inner + column[None, :], mask=there, other=0.0).to(tl.float32)
        signs = tl.load(Matrix + i[:, None] * SIZE + j[None, :])
        high = to_tf32(x)
        low = to_tf32(x - high)
        y = tl.dot(signs, low, y, input_precision="tf32")
        y = tl.dot(signs, high, y, input_precision="tf32")
    offset = i[:, None] * inner + column[None, :]
    inside = (i < size)[:, None] & (column < inner)[None, :]
    tl.store(Out + begin + offset, (y * scale).to(Out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class RowPlan:
    """How one program transforms ``rows`` rows of ``order * length`` elements, the order padded."""

    length: int
    order: int
    rows: int
    first: int
    second: int
    third: int

    @property
    def num_warps(self) -> int:
        elements = self.rows * self.order * self.length
        return 4 if elements <= 4096 else 8 if elements <= 8192 else 16

    def constexprs(self) -> dict[str, int]:
        names = ("LENGTH", "ORDER", "ROWS", "FIRST", "SECOND", "THIRD")
        return dict(zip(names, (self.length, self.order, self.rows, self.first, self.second, self.third), strict=True))


def padded(order: int) -> int:
    """The side of the matrix of order K in a kernel: products have at least 16."""
    return 1 if order == 1 else max(16, triton.next_power_of_2(order))


def row_plan(order: int, length: int) -> RowPlan:
    first, second, third = [*_sides(length), 1, 1][:3]
    side = padded(order)
    rows = max(1, LEAST_TILE // (side * length))
    # Rows as products want them, and columns: at least 16 of each.
    while rows * length < 16 or rows * side * length < 256:
        rows *= 2
    return RowPlan(length, side, rows, max(16, first), second, third)


def _sides(length: int) -> list[int]:
    """``length`` = 2^m, at most 16,384, as up to three factors of at least 16, as even as they can be."""
    m = length.bit_length() - 1
    count = max(1, m // 4)
    return [1 << ((m + i) // count) for i in reversed(range(count))]


def transform(x: torch.Tensor, transposed: bool, scale: float, block: int) -> torch.Tensor:
    """See :func:`hf_accel.kernels.hadamard._transform`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x.contiguous()
    if block == 1 or not x.numel():
        return out.copy_(x * scale)
    order, length = require_factor("hadamard", block)
    whole = min(length, LONGEST)
    fused = padded(order) <= LARGEST_FUSED_ORDER and padded(order) * length <= LONGEST
    passes = [] if fused else [(size, inner) for size, inner in _axes(order, length, whole) if size > 1]
    y, last = x, not passes
    if fused or whole > 1:
        target = out if last else torch.empty_like(out, dtype=torch.float32)
        _rows(y, target, order if fused else 1, whole, transposed, scale if last else 1.0)
        y = target
    for index, (size, inner) in enumerate(passes):
        last = index == len(passes) - 1
        target = out if last else torch.empty_like(out, dtype=torch.float32)
        matrix = _matrix(size, transposed and inner == length, inner != length, x.device)
        axis_kernel[(x.numel() // (size * inner), triton.cdiv(inner, AXIS_COLUMNS))](
            y,
            matrix,
            target,
            size,
            inner,
            scale if last else 1.0,
            **_axis_constexprs(len(matrix)),
            num_warps=_axis_warps(len(matrix)),
            enable_fp_fusion=True,
        )
        y = target
    return out


def _axes(order: int, length: int, whole: int) -> list[tuple[int, int]]:
    """Size and stride of the axes that a program of whole rows leaves: what is left of the length, and the order."""
    return [(length // whole, whole), (order, length)]


def _rows(x: torch.Tensor, out: torch.Tensor, order: int, length: int, transposed: bool, scale: float) -> None:
    plan = row_plan(order, length)
    n = order * length
    rows = x.numel() // n
    # An operand of x @ M^T: the matrix itself where the transform is transposed.
    matrix = _matrix(order, not transposed, False, x.device) if order > 1 else x
    rows_kernel[(triton.cdiv(rows, plan.rows),)](
        x,
        matrix,
        out,
        rows,
        scale,
        N=n,
        **plan.constexprs(),
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )


@lru_cache(maxsize=64)
def _matrix(size: int, transposed: bool, is_sylvester: bool, device: torch.device) -> torch.Tensor:
    matrix = sylvester(size) if is_sylvester else order_matrix(size)
    side = padded(size)
    out = torch.zeros(side, side, device=device)
    out[:size, :size] = (matrix.T if transposed else matrix).to(device, torch.float32)
    return out


def _axis_constexprs(side: int) -> dict[str, int]:
    return {"SIZE": side, "COLUMNS": AXIS_COLUMNS, "STEP": min(AXIS_STEP, side)}


def _axis_warps(side: int) -> int:
    return 4 if side <= 64 else 8


def aot_cases(cc: int) -> list[AotCase]:
    """Lengths of Llama's and Wan's linears, small ones, orders with and without room in a program; all dtypes."""
    cases = []
    names: list[tuple[str, int, int, str, str]] = [
        ("4096", 1, 4096, "bf16", "bf16"),
        ("4096", 1, 4096, "fp32", "fp32"),
        ("64", 1, 64, "fp16", "fp16"),
        ("8", 1, 8, "fp32", "fp32"),
        ("8192", 1, 8192, "fp32", "fp32"),
        ("16384", 1, 16384, "fp32", "fp32"),
        ("16384", 1, 16384, "bf16", "fp32"),
        ("3072", 12, 256, "bf16", "bf16"),
        ("14336", 28, 512, "bf16", "bf16"),
        ("14336", 28, 512, "fp32", "fp32"),
        ("3456", 108, 32, "fp16", "fp16"),
        ("20", 20, 1, "fp32", "fp32"),
    ]
    for name, order, length, given, result in names:
        plan = row_plan(order, length)
        constexprs: dict[str, Any] = plan.constexprs() | {"N": order * length}
        types = {"X": given, "Matrix": "fp32", "Out": result, "scale": "fp32"}
        cases.append(make_case(f"rows {name} {given}", rows_kernel, constexprs, types, plan.num_warps))
    for order, given, result in [(2, "fp32", "bf16"), (36, "fp32", "fp32"), (172, "fp32", "fp16")]:
        sizes = _axis_constexprs(padded(order))
        types = {"X": given, "Matrix": "fp32", "Out": result, "scale": "fp32"}
        cases.append(make_case(f"axis {order}", axis_kernel, sizes, types, _axis_warps(padded(order))))
    return cases
