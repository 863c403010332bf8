"""Products with a packed weight on a GPU.

Few tokens are bound by reading the weight: at 4 bits and 15 bytes per clock and multiprocessor (3.35 TB/s on an H100)
30 weights per clock, which leaves 4 instructions for each, 2 of them on integers.

* One token: no tensor cores, whose operands would have to be half numbers in shared memory. A code is not shifted down
  but masked where it stands, under the exponent of 2^23: one operation makes the float ``2^23 + code * 2^s``, a
  subtraction of the zero in the same form leaves ``(code - zero) * 2^s`` exactly, and the factor ``2^-s`` is in the
  activation. Per weight: and-or, subtract, multiply-add. A step is one group of inputs at most, so scale and zero are
  read once per step and column.
* Up to 64 tokens: codes are shifted and spread, and ``code - zero``, exact in every dtype, is multiplied on the tensor
  cores. Sums of a step are scaled in fp32.
* Beyond, the weight is dequantised once (2 bytes per weight written, 2 read) and multiplied by cuBLAS.

Inputs are split over programs until these fill the device; partial sums are fp32 and added in a fixed order. Groups in
any order (act-order) cost two gathers per weight: sort the inputs once instead, and say so with ``group_size``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.tile import compute_capability, precision
from hf_accel.kernels.quantized_linear.layout import UNIT_CODES, UNIT_WORDS, Packed
from hf_accel.kernels.quantized_linear.unpack import code_at

LARGEST_STEP = 128  # inputs
LEAST_STEP = 16
PROGRAMS = 4  # per multiprocessor
ADD_BLOCK = 512

_MAGIC: tl.constexpr = tl.constexpr(0x4B000000)  # the exponent of 2^23, under which a mantissa counts ones


@triton.jit
def add_code(part, x, first, second, third, zero, CODE: tl.constexpr, BITS: tl.constexpr):
    """``part + x * (code - zero)`` for code ``CODE`` of units whose words are ``first`` and, at 3 bits, two more."""
    WORD: tl.constexpr = CODE * BITS // 32
    SHIFT: tl.constexpr = CODE * BITS % 32
    # Where the code begins once it lies within a mantissa of 23 bits.
    AT: tl.constexpr = 0 if SHIFT + BITS > 32 else (SHIFT - 16 if SHIFT + BITS > 23 else SHIFT)
    if WORD == 0:
        word = first
    elif WORD == 1:
        word = second
    else:
        word = third
    if SHIFT + BITS > 32:
        KEPT: tl.constexpr = 32 - SHIFT
        word = ((word >> SHIFT) & ((1 << KEPT) - 1)) | ((second if WORD == 0 else third) << KEPT)
    elif SHIFT + BITS > 23:
        word = word >> 16
    value = ((word & (((1 << BITS) - 1) << AT)) | _MAGIC).to(tl.float32, bitcast=True)
    value -= ((zero << AT) | _MAGIC).to(tl.float32, bitcast=True)
    return part + x * (1.0 / (1 << AT)) * value


@triton.jit
def grids_at(Scales, Zeros, Groups, j, column, inside, stride_m, stride_zeros, BITS: tl.constexpr):
    """Scales fp32 and zeros int32 ``[K, N]`` of inputs ``[K, 1]`` whose groups are looked up."""
    group = tl.load(Groups + j + tl.zeros_like(column), mask=inside, other=0).to(tl.int64)
    scale = tl.load(Scales + group * stride_m + column, mask=inside, other=0.0).to(tl.float32)
    return scale, code_at(Zeros + group * stride_zeros, column, 1, inside, BITS)


@triton.jit(do_not_specialize=["share"])
def vector_kernel(
    X,  # [n]
    Words,  # int32 [n * BITS / 32, m]
    Scales,  # [G, m]
    Zeros,  # int32 [G, m * BITS / 32]
    Groups,  # int32 [n]; unused unless GROUP is 0
    Out,  # fp32 [splits, m]
    n,
    stride_m,  # m
    stride_zeros,
    share,  # steps per split
    GROUP: tl.constexpr,  # a multiple of the inputs of a step; 0: groups are looked up
    BITS: tl.constexpr,
    CODES: tl.constexpr,  # per unit
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,  # per step
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < stride_m
    split = tl.program_id(1)
    begin = split * share * UNITS
    end = tl.minimum(begin + share * UNITS, n // CODES)
    sums = tl.zeros([UNITS, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, UNITS):
        unit = start + tl.arange(0, UNITS)
        there = unit < end
        both = there[:, None] & inside[None, :]
        Place = Words + (unit * WORDS).to(tl.int64)[:, None] * stride_m + column[None, :]
        first = tl.load(Place, mask=both, other=0)
        second = first
        third = first
        if WORDS == 3:
            second = tl.load(Place + stride_m, mask=both, other=0)
            third = tl.load(Place + 2 * stride_m, mask=both, other=0)
        if GROUP > 0:
            group = start * CODES // GROUP
            scale = tl.load(Scales + group * stride_m + column, mask=inside, other=0.0).to(tl.float32)
            zero = code_at(Zeros + group * stride_zeros, column, 1, inside, BITS)
        part = tl.zeros([UNITS, BLOCK_N], dtype=tl.float32)
        for code in tl.static_range(CODES):
            j = unit * CODES + code
            x = tl.load(X + j, mask=there, other=0.0).to(tl.float32)[:, None]
            if GROUP > 0:
                part = add_code(part, x, first, second, third, zero[None, :], code, BITS)
            else:
                scale, zero = grids_at(
                    Scales, Zeros, Groups, j[:, None], column[None, :], both, stride_m, stride_zeros, BITS
                )
                part = add_code(part, x * scale, first, second, third, zero, code, BITS)
        if GROUP > 0:
            sums += part * scale[None, :]
        else:
            sums += part
    tl.store(Out + split.to(tl.int64) * stride_m + column, tl.sum(sums, 0), mask=inside)


@triton.jit
def codes_tile(Words, start, column, end, stride_m, BITS: tl.constexpr, CODES: tl.constexpr, UNITS: tl.constexpr):
    """int32 ``[UNITS * CODES, N]`` of the units from ``start`` on; 0 from unit ``end`` on and outside of the matrix."""
    inside = (column < stride_m)[None, :]
    unit = start + tl.arange(0, UNITS)
    inside = inside & (unit < end)[:, None]
    Place = Words + (unit * (CODES * BITS // 32)).to(tl.int64)[:, None] * stride_m + column[None, :]
    first = tl.load(Place, mask=inside, other=0)[:, None, :]
    bit = (tl.arange(0, CODES) * BITS)[None, :, None]
    if BITS == 3:
        second = tl.load(Place + stride_m, mask=inside, other=0)[:, None, :]
        third = tl.load(Place + 2 * stride_m, mask=inside, other=0)[:, None, :]
        shift = bit % 32
        word = tl.where(bit < 32, first, tl.where(bit < 64, second, third)).to(tl.uint32, bitcast=True)
        following = tl.where(bit < 32, second, third).to(tl.uint32, bitcast=True)
        spilled = tl.where(shift > 29, following << ((32 - shift) % 32).to(tl.uint32), 0)
        codes = (((word >> shift.to(tl.uint32)) | spilled) & 7).to(tl.int32)
    else:
        codes = (first >> bit) & ((1 << BITS) - 1)
    return tl.reshape(codes, [UNITS * CODES, column.shape[0]])


@triton.jit(do_not_specialize=["share", "tokens"])
def tokens_kernel(
    X,  # [tokens, n]
    Words,
    Scales,
    Zeros,
    Groups,
    Out,  # fp32 [splits, tokens, m]
    tokens,
    n,
    stride_x,
    stride_m,
    stride_zeros,
    share,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < stride_m
    split = tl.program_id(1)
    begin = split * share * UNITS
    end = tl.minimum(begin + share * UNITS, n // CODES)
    token = tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, UNITS):
        codes = codes_tile(Words, start, column, end, stride_m, BITS, CODES, UNITS)
        j = start * CODES + tl.arange(0, UNITS * CODES)
        known = j < end * CODES
        x = tl.load(
            X + token[:, None] * stride_x + j[None, :], mask=(token < tokens)[:, None] & known[None, :], other=0.0
        )
        if GROUP > 0:
            group = start * CODES // GROUP
            scale = tl.load(Scales + group * stride_m + column, mask=inside, other=0.0).to(tl.float32)
            zero = code_at(Zeros + group * stride_zeros, column, 1, inside, BITS)
            weight = (codes - zero[None, :]).to(x.dtype)
            sums += tl.dot(x, weight, input_precision=PRECISION) * scale[None, :]
        else:
            both = known[:, None] & inside[None, :]
            scale, zero = grids_at(
                Scales, Zeros, Groups, j[:, None], column[None, :], both, stride_m, stride_zeros, BITS
            )
            weight = (scale * (codes - zero)).to(x.dtype)
            sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    place = (split * tokens + token).to(tl.int64)[:, None] * stride_m + column[None, :]
    tl.store(Out + place, sums, mask=(token < tokens)[:, None] & inside[None, :])


@triton.jit
def dequantize_kernel(
    Words,
    Scales,
    Zeros,
    Groups,
    Out,  # [m, n]
    stride_n,  # n
    stride_m,
    stride_zeros,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * UNITS
    end = stride_n // CODES
    codes = codes_tile(Words, start, column, end, stride_m, BITS, CODES, UNITS)
    j = start * CODES + tl.arange(0, UNITS * CODES)
    both = (j < stride_n)[:, None] & (column < stride_m)[None, :]
    if GROUP > 0:
        group = start * CODES // GROUP
        scale = tl.load(Scales + group * stride_m + column, mask=column < stride_m, other=0.0).to(tl.float32)[None, :]
        zero = code_at(Zeros + group * stride_zeros, column, 1, column < stride_m, BITS)[None, :]
    else:
        scale, zero = grids_at(Scales, Zeros, Groups, j[:, None], column[None, :], both, stride_m, stride_zeros, BITS)
    weight = (scale * (codes - zero)).to(Out.dtype.element_ty)
    # Turned in registers: outputs are rows of the result, inputs lie side by side.
    place = column.to(tl.int64)[:, None] * stride_n + j[None, :]
    tl.store(Out + place, tl.trans(weight), mask=tl.trans(both))


@triton.jit(do_not_specialize=["splits"])
def add_kernel(
    Partial,  # fp32 [splits, elements]
    Bias,  # [m]; unused unless HAS_BIAS
    Out,  # [elements]
    elements,
    stride_m,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, splits):
        total += tl.load(Partial + place, mask=inside, other=0.0)
        Partial += elements
    if HAS_BIAS:
        total += tl.load(Bias + place % stride_m, mask=inside, other=0.0).to(tl.float32)
    tl.store(Out + place, total.to(Out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Step:
    """How many inputs are worked on at a time, and of how many a group consists (0: look it up for each)."""

    inputs: int
    group: int
    bits: int

    @classmethod
    def of(cls, bits: int, group_size: int | None, longest: int = LARGEST_STEP) -> Step:
        if group_size is not None:
            inputs = min(longest, group_size & -group_size)
            if inputs >= max(LEAST_STEP, UNIT_CODES[bits]):
                return cls(inputs, group_size, bits)
        return cls(max(LEAST_STEP, UNIT_CODES[bits]), 0, bits)

    def constexprs(self) -> dict[str, int]:
        codes = UNIT_CODES[self.bits]
        units = self.inputs // codes
        return {"GROUP": self.group, "BITS": self.bits, "CODES": codes, "WORDS": UNIT_WORDS[self.bits], "UNITS": units}


def quantized_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """``[T, n]`` -> ``[T, m]`` for few tokens. See :func:`hf_accel.kernels.quantized_linear._quantized_linear`."""
    x = x.contiguous()
    tokens, n = x.shape
    m = packed.out_features
    out = x.new_empty(tokens, m)
    if not tokens:
        return out
    step = Step.of(packed.bits, packed.group_size)
    block_n = _columns(compute_capability(x), tokens, x.dtype)
    steps, tiles = triton.cdiv(n, step.inputs), triton.cdiv(m, block_n)
    share = triton.cdiv(steps, min(steps, max(1, PROGRAMS * _multiprocessors(x) // tiles)))
    splits = triton.cdiv(steps, share)
    partial = x.new_empty(splits, tokens, m, dtype=torch.float32)
    weight = _weight_arguments(packed)
    stride_zeros = packed.qzeros.shape[1]
    settings = step.constexprs() | {"BLOCK_N": block_n}
    if tokens == 1:
        vector_kernel[(tiles, splits)](
            x, *weight, partial, n, m, stride_zeros, share, **settings, num_warps=4, enable_fp_fusion=True
        )
    else:
        tokens_kernel[(tiles, splits)](
            x,
            *weight,
            partial,
            tokens,
            n,
            n,
            m,
            stride_zeros,
            share,
            **settings,
            BLOCK_M=max(16, triton.next_power_of_2(tokens)),
            PRECISION=precision(x.dtype),
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
    add_kernel[(triton.cdiv(tokens * m, ADD_BLOCK),)](
        partial,
        partial if bias is None else bias.contiguous(),
        out,
        tokens * m,
        m,
        splits,
        HAS_BIAS=bias is not None,
        BLOCK=ADD_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """``[m, n]`` in ``dtype``."""
    m, n = packed.out_features, packed.in_features
    out = packed.scales.new_empty(m, n, dtype=dtype)
    step = Step.of(packed.bits, packed.group_size, 64)
    block_n = 64 if out.is_cuda else 32
    dequantize_kernel[(triton.cdiv(m, block_n), triton.cdiv(n, step.inputs))](
        *_weight_arguments(packed),
        out,
        n,
        m,
        packed.qzeros.shape[1],
        **step.constexprs(),
        BLOCK_N=block_n,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _weight_arguments(packed: Packed) -> tuple[torch.Tensor, ...]:
    return tuple(part.contiguous() for part in (packed.qweight, packed.scales, packed.qzeros, packed.g_idx))


def _columns(cc: int, tokens: int, dtype: torch.dtype) -> int:
    """Outputs of one program: 512 bytes of words side by side; fewer where fp32 products are unrolled."""
    if cc == 0:
        return 32
    if tokens == 1:
        return 128
    return 32 if dtype == torch.float32 else 64


def _multiprocessors(tensor: torch.Tensor) -> int:
    """Of the GPU of ``tensor``; 1 for the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def aot_cases(cc: int) -> list[AotCase]:
    """All bits at the usual group sizes, groups in any order, all dtypes; nothing here depends on ``cc``."""
    cases = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for bits, group, tokens, kind in [
        (4, 128, 1, "bf16"),
        (3, 128, 1, "fp16"),
        (2, 64, 1, "bf16"),
        (8, 128, 1, "fp32"),
        (4, None, 1, "fp16"),
        (4, 128, 16, "bf16"),
        (4, 64, 64, "fp16"),
        (3, 128, 16, "bf16"),
        (2, 64, 32, "bf16"),
        (8, 128, 16, "fp16"),
        (4, None, 16, "bf16"),
        (4, 64, 16, "fp32"),
    ]:
        types = {"X": kind, "Words": "i32", "Scales": "fp16", "Zeros": "i32", "Groups": "i32", "Out": "fp32"}
        constexprs: dict[str, Any] = Step.of(bits, group).constexprs()
        constexprs["BLOCK_N"] = _columns(cc, tokens, dtypes[kind])
        name = f"{bits} bits groups of {group} {tokens} tokens {kind}"
        if tokens == 1:
            cases.append(make_case(name, vector_kernel, constexprs, types, 4))
        else:
            constexprs |= {"BLOCK_M": tokens, "PRECISION": precision(dtypes[kind])}
            cases.append(make_case(name, tokens_kernel, constexprs, types, 4, 3))
    for bits, group, kind in [(4, 128, "bf16"), (3, 64, "fp16"), (2, None, "bf16"), (8, 32, "fp32")]:
        constexprs = Step.of(bits, group, 64).constexprs() | {"BLOCK_N": 64}
        types = {"Words": "i32", "Scales": "fp16", "Zeros": "i32", "Groups": "i32", "Out": kind}
        cases.append(make_case(f"dequantize {bits} bits groups of {group}", dequantize_kernel, constexprs, types, 4))
    types = {"Partial": "fp32", "Bias": "bf16", "Out": "bf16"}
    cases.append(make_case("add", add_kernel, {"HAS_BIAS": True, "BLOCK": ADD_BLOCK}, types, 4))
    return cases
