"""Sparse updates in a Hadamard basis on a GPU: the transform of a sparse row is a product of two tables of signs.

With ``H = L (x) S``, S of order 64, coefficient k of a row stands at ``(a_k, b_k)`` and contributes ``v_k`` times the
outer product of row a_k of L and row b_k of S. So an update of n elements, seen as ``[n / 64, 64]``, is
``(v L[a])^T S[b]``: the scatter, the transform, the order K, a length that fits no shared memory and the
block-diagonal form are one product of depth p_i, and any tile of the row can be made alone. That is ``4 p`` operations
per element with v as the sum of two fp16 numbers, relative to the largest v of the row: at p = 128 (rank 64 of a square
layer) 0.9 ps at an effective 600 T/s. The bytes, b / 8 + 2 per element, are 0.75 ps at 4 bits. Scattering into shared
memory, which Triton cannot, and three axes of the dense transform would be about 1.3 ps, so from p of 200 on this form
is the slower one, in return for a kernel that lives in registers.

The rows of the tables come out of the cache, ``2 p (n / 64 + 64)`` bytes per row. A packed base has the words of
neighbouring outputs side by side: a program works on 8 of them in turn, for which a sector of 32 bytes is fetched once.

Backward, the gradient of v_k is ``L[a_k] G_i S[b_k]``: the product with L is a matrix of p x 64, of which the rows of S
take sums. G is read once from memory, and nothing dense is written.
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
from hf_accel.kernels.hadamard.triton import to_tf32
from hf_accel.kernels.quantized_linear.layout import Packed
from hf_accel.kernels.quantized_linear.unpack import code_at, spread

LARGEST_RIGHT = 64
PACKED_ROWS = 8  # outputs per program on a packed base: a sector of words
PRODUCT_DEPTH = 64

_EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def coefficient_places(Columns, k, inside, n, RIGHT: tl.constexpr):
    """Of coefficients ``k``: their places in L and in S, and whether they lie in the row."""
    column = tl.load(Columns + k, mask=inside, other=0).to(tl.int32)
    if Columns.dtype.element_ty == tl.int16:
        column = column & 0xFFFF
    there = (column >= 0) & (column < n)
    column = tl.where(there, column, 0)
    return column // RIGHT, column % RIGHT, there


@triton.jit
def left_signs(Left, a, place, inside, ORDER: tl.constexpr, STRIDE: tl.constexpr, BLOCKED: tl.constexpr):
    """fp16 entries of L in the rows ``place`` and the columns ``a``, shapes that broadcast. L is block-diagonal, the
    table one block of it."""
    if BLOCKED:
        inside = inside & (place // ORDER == a // ORDER)
        place = place % ORDER
        a = a % ORDER
    return tl.load(Left + place * STRIDE + a, mask=inside, other=0.0)


@triton.jit
def base_tile(
    Base, Scales, Zeros, Groups, row, a, b, inside, m, stride_base,
    N: tl.constexpr, RIGHT: tl.constexpr, BLOCK_B: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """fp32 ``[A, B]`` of the base's row: dense if ``BITS`` is 0, else dequantised. At ``GROUP`` 0 every input looks its
    group up."""
    j = a[:, None] * RIGHT + b[None, :]
    if BITS == 0:
        return tl.load(Base + row * stride_base + j, mask=inside, other=0.0).to(tl.float32)
    else:
        CODES: tl.constexpr = 32 // BITS
        if BITS != 3 and RIGHT == BLOCK_B and RIGHT % CODES == 0:
            word = a[:, None] * (RIGHT // CODES) + tl.arange(0, RIGHT // CODES)[None, :]
            there = (a < N // RIGHT)[:, None]
            codes = spread(tl.load(Base + word.to(tl.int64) * m + row, mask=there, other=0), BITS)
        else:
            codes = code_at(Base + row, j, m.to(tl.int64), inside, BITS)
        words_of_zeros = m // 32 * BITS + m % 32 * BITS // 32
        if GROUP > 0 and GROUP % RIGHT == 0:
            line = a < N // RIGHT
            group = (a * RIGHT // GROUP).to(tl.int64)
            scale = tl.load(Scales + group * m + row, mask=line, other=0.0).to(tl.float32)[:, None]
            zero = code_at(Zeros + group * words_of_zeros, row, 1, line, BITS)[:, None]
        else:
            if GROUP > 0:
                group = (j // GROUP).to(tl.int64)
            else:
                group = tl.load(Groups + j, mask=inside, other=0).to(tl.int64)
            scale = tl.load(Scales + group * m + row, mask=inside, other=0.0).to(tl.float32)
            zero = code_at(Zeros + group * words_of_zeros, row, 1, inside, BITS)
        return scale * (codes - zero).to(tl.float32)


@triton.jit(do_not_specialize=["m"])
def weight_kernel(
    Base,  # [m, n], or packed words [n * BITS / 32, m]; unused unless HAS_BASE
    Scales,  # [G, m]
    Zeros,  # packed [G, m * BITS / 32]
    Groups,  # int32 [n]; unused unless GROUP is 0
    Indptr,  # int32 [m + 1]
    Columns,  # int16 or int32 [p]
    Values,  # [p]
    Left,  # fp16 [ORDER, STRIDE]
    Right,  # fp16 [RIGHT, BLOCK_B]
    Out,  # [m, n]
    m,
    stride_base,
    scale,  # that of the update, and 1 / the length of a block
    HAS_BASE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    ORDER: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCKED: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DEPTH: tl.constexpr,
):
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tl.arange(0, BLOCK_B)
    inside = (a < N // RIGHT)[:, None] & (b < RIGHT)[None, :]
    first = tl.program_id(0).to(tl.int64) * ROWS
    for output in range(0, ROWS):
        # Past the end the last row is made again.
        row = tl.minimum(first + output, m - 1)
        begin = tl.load(Indptr + row)
        end = tl.load(Indptr + row + 1)
        largest = tl.zeros([DEPTH], dtype=tl.float32)
        for start in range(begin, end, DEPTH):
            k = start + tl.arange(0, DEPTH)
            largest = tl.maximum(largest, tl.abs(tl.load(Values + k, mask=k < end, other=0.0).to(tl.float32)))
        # A power of two to divide by: the largest value becomes 1 to 2, and fp16 ends 2^-25 below it. Its inverse has
        # the exponent mirrored at that of 1.
        exponent = tl.minimum(tl.max(largest, 0).to(tl.int32, bitcast=True) & _EXPONENT, 253 << 23)
        raise_by = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        update = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
        for start in range(begin, end, DEPTH):
            k = start + tl.arange(0, DEPTH)
            there = k < end
            left, right, known = coefficient_places(Columns, k, there, N, RIGHT)
            value = tl.load(Values + k, mask=there, other=0.0).to(tl.float32) * raise_by
            # A column outside of the row would be silent otherwise.
            value = tl.where(known, value, float("nan"))
            high = value.to(tl.float16)
            low = (value - high.to(tl.float32)).to(tl.float16)
            signs = left_signs(
                Left, a[:, None], left[None, :], (a < N // RIGHT)[:, None] & there[None, :], ORDER, STRIDE, BLOCKED
            )
            basis = tl.load(Right + right[:, None] * BLOCK_B + b[None, :])
            update = tl.dot(signs * low[None, :], basis, update)
            update = tl.dot(signs * high[None, :], basis, update)
        out = update * (scale * exponent.to(tl.float32, bitcast=True))
        if HAS_BASE:
            out += base_tile(
                Base, Scales, Zeros, Groups, row, a, b, inside, m, stride_base, N, RIGHT, BLOCK_B, BITS, GROUP
            )
        place = row * N + a[:, None] * RIGHT + b[None, :]
        tl.store(Out + place, out.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    Grad,  # [m, n]
    Indptr,
    Columns,
    Left,
    Right,
    Out,  # [p]
    stride_grad,
    scale,
    N: tl.constexpr,
    ORDER: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCKED: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(Indptr + row)
    end = tl.load(Indptr + row + 1)
    b = tl.arange(0, BLOCK_B)
    for start in range(begin, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        there = k < end
        left, right, known = coefficient_places(Columns, k, there, N, RIGHT)
        sums = tl.zeros([DEPTH, BLOCK_B], dtype=tl.float32)
        for begin_a in range(0, N // RIGHT, BLOCK_A):
            a = begin_a + tl.arange(0, BLOCK_A)
            line = a < N // RIGHT
            inside = line[:, None] & (b < RIGHT)[None, :]
            place = row * stride_grad + a[:, None] * RIGHT + b[None, :]
            grad = tl.load(Grad + place, mask=inside, other=0.0)
            signs = left_signs(
                Left, a[None, :], left[:, None], there[:, None] & line[None, :], ORDER, STRIDE, BLOCKED
            ).to(grad.dtype)
            if grad.dtype == tl.float32:
                high = to_tf32(grad)
                low = to_tf32(grad - high)
                sums = tl.dot(signs, low, sums, input_precision="tf32")
                sums = tl.dot(signs, high, sums, input_precision="tf32")
            else:
                sums = tl.dot(signs, grad, sums)
        basis = tl.load(Right + right[:, None] * BLOCK_B + b[None, :]).to(tl.float32)
        out = tl.sum(sums * basis, 1) * scale
        out = tl.where(known, out, float("nan"))
        tl.store(Out + k, out.to(Out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["m", "tokens"])
def product_kernel(
    Spectrum,  # fp32 [n, T]
    Indptr,
    Columns,
    Values,
    Out,  # [T, m]
    m,
    n,
    tokens,
    BLOCK_T: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.load(Indptr + row)
    end = tl.load(Indptr + row + 1)
    sums = tl.zeros([DEPTH, BLOCK_T], dtype=tl.float32)
    for start in range(begin, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        there = k < end
        column, _, known = coefficient_places(Columns, k, there, n, 1)
        value = tl.load(Values + k, mask=there, other=0.0).to(tl.float32)
        value = tl.where(known, value, float("nan"))
        place = column.to(tl.int64)[:, None] * tokens + t[None, :]
        x = tl.load(Spectrum + place, mask=there[:, None] & (t < tokens)[None, :], other=0.0).to(tl.float32)
        sums += value[:, None] * x
    tl.store(Out + t.to(tl.int64) * m + row, tl.sum(sums, 0).to(Out.dtype.element_ty), mask=t < tokens)


@dataclass(frozen=True)
class Split:
    """``H = L (x) S`` for a row of n elements in blocks: the order of one block of L, and of S."""

    order: int
    right: int
    blocked: bool

    @classmethod
    def of(cls, block: int, n: int) -> Split:
        right = min(LARGEST_RIGHT, require_factor("qwha_weight", block)[1])
        return cls(block // right, right, block < n)

    @property
    def stride(self) -> int:
        return -(-self.order // 8) * 8

    @property
    def columns(self) -> int:
        return max(16, self.right)

    def lines(self, n: int) -> int:
        """How many of the ``n / right`` lines of a row one program takes."""
        return max(16, min(64, triton.next_power_of_2(n // self.right)))

    def constexprs(self, n: int) -> dict[str, Any]:
        return {
            "N": n,
            "ORDER": self.order,
            "STRIDE": self.stride,
            "BLOCKED": self.blocked,
            "RIGHT": self.right,
            "BLOCK_A": self.lines(n),
            "BLOCK_B": self.columns,
            "DEPTH": PRODUCT_DEPTH,
        }


def qwha_weight(
    base: torch.Tensor | None,
    packed: Packed | None,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    block: int,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.qwha_weight._qwha_weight`."""
    m = len(indptr) - 1
    out = values.new_empty(m, n, dtype=dtype)
    if not m:
        return out
    split = Split.of(block, n)
    left, right = _tables(block, split.right, values.device)
    words, scales, zeros, groups = (
        (packed.qweight.contiguous(), packed.scales.contiguous(), packed.qzeros.contiguous(), packed.g_idx.contiguous())
        if packed is not None
        else (values if base is None else base, values, indptr, indptr)
    )
    rows = 1 if packed is None else PACKED_ROWS
    weight_kernel[(triton.cdiv(m, rows), triton.cdiv(n // split.right, split.lines(n)))](
        words,
        scales,
        zeros,
        groups,
        indptr,
        columns.contiguous(),
        values.contiguous(),
        left,
        right,
        out,
        m,
        0 if base is None else base.stride(0),
        scale / block,
        HAS_BASE=base is not None or packed is not None,
        BITS=0 if packed is None else packed.bits,
        GROUP=0 if packed is None else packed.group_size or 0,
        ROWS=rows,
        **split.constexprs(n),
        num_warps=_weight_warps(0 if packed is None else packed.bits),
        num_stages=2,
        enable_fp_fusion=True,
    )
    return out


def qwha_gradient(
    grad: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, scale: float, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.qwha_weight._qwha_gradient`."""
    m, n = grad.shape
    out = grad.new_empty(len(columns), dtype=dtype)
    if not len(columns):
        return out
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    split = Split.of(block, n)
    left, right = _tables(block, split.right, grad.device)
    gradient_kernel[(m,)](
        grad,
        indptr,
        columns.contiguous(),
        left,
        right,
        out,
        grad.stride(0),
        scale / block,
        **split.constexprs(n),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return out


def sparse_product(
    spectrum: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.qwha_weight._sparse_product`."""
    tokens, n = spectrum.shape
    m = len(indptr) - 1
    out = spectrum.new_empty(tokens, m)
    if not out.numel():
        return out
    block = min(64, triton.next_power_of_2(tokens))
    product_kernel[(m, triton.cdiv(tokens, block))](
        # Tokens side by side: a gathered column is one piece of memory.
        spectrum.T.contiguous(),
        indptr,
        columns.contiguous(),
        values.contiguous(),
        out,
        m,
        n,
        tokens,
        BLOCK_T=block,
        DEPTH=_depth(block),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


def _weight_warps(bits: int) -> int:
    """Codes of 3 bits are found one by one, and their addresses need registers."""
    return 8 if bits == 3 else 4


def _depth(tokens: int) -> int:
    return max(8, 128 // tokens)


@lru_cache(maxsize=32)
def _tables(block: int, right: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """L of one block, rows padded to 16 bytes, and S, padded to 16 columns; fp16."""
    order, length = require_factor("qwha_weight", block)
    matrix = torch.kron(order_matrix(order), sylvester(length // right))
    split = Split(block // right, right, False)
    left = torch.zeros(split.order, split.stride, dtype=torch.float16, device=device)
    left[:, : split.order] = matrix.to(device)
    signs = torch.zeros(right, split.columns, dtype=torch.float16, device=device)
    signs[:, :right] = sylvester(right).to(device)
    return left, signs


def aot_cases(cc: int) -> list[AotCase]:
    """Dense and packed bases of Llama's lengths, with and without an order, groups in order or not; blocks; nothing
    here depends on ``cc``."""
    cases = []
    for n, block, bits, group, result, base in [
        (4096, 4096, 4, 128, "bf16", "fp16"),
        (4096, 4096, 2, 64, "fp16", "fp16"),
        (4096, 4096, 3, 128, "bf16", "fp16"),
        (14336, 14336, 4, 0, "bf16", "fp16"),
        (11008, 11008, 8, 128, "bf16", "bf16"),
        (4864, 256, 4, 64, "bf16", "fp16"),
        (4096, 4096, 0, 0, "bf16", "bf16"),
        (3072, 3072, 0, 0, "fp32", "fp32"),
        (96, 96, 4, 32, "fp32", "fp32"),
    ]:
        split = Split.of(block, n)
        constexprs = split.constexprs(n) | {"HAS_BASE": True, "BITS": bits, "GROUP": group}
        constexprs["ROWS"] = PACKED_ROWS if bits else 1
        types = {"Base": "i32" if bits else base, "Scales": base, "Zeros": "i32", "Groups": "i32", "Indptr": "i32"}
        types |= {"Columns": "i16", "Values": "fp32", "Left": "fp16", "Right": "fp16", "Out": result, "scale": "fp32"}
        cases.append(
            make_case(f"weight {n} in {block} {bits} bits", weight_kernel, constexprs, types, _weight_warps(bits))
        )
    for n, block, kind in [(4096, 4096, "bf16"), (14336, 14336, "fp16"), (3072, 3072, "fp32"), (4864, 256, "bf16")]:
        types = {"Grad": kind, "Indptr": "i32", "Columns": "i16", "Left": "fp16", "Right": "fp16", "Out": "fp32"}
        constexprs = Split.of(block, n).constexprs(n)
        cases.append(make_case(f"gradient {n} {kind}", gradient_kernel, constexprs, types | {"scale": "fp32"}))
    for tokens in (1, 16, 64):
        types = {"Spectrum": "fp32", "Indptr": "i32", "Columns": "i32", "Values": "bf16", "Out": "fp32"}
        constexprs = {"BLOCK_T": tokens, "DEPTH": _depth(tokens)}
        cases.append(make_case(f"product {tokens} tokens", product_kernel, constexprs, types, 1))
    return cases
