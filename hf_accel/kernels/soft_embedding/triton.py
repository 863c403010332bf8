"""Soft embeddings on a GPU; the statistics are in ``triton_statistics.py``.

With few rows ``soft_embed`` is bound by reading the embeddings: 151,936 x 4,096 in bf16 are 1.24 GB, 0.37 ms at
3.35 TB/s, whether there is one row or 64. The probability tile is made from the logits where a GEMM would load it. It
is made once per tile of D, and the logits are read as often, from L2: programs of one stretch of the vocabulary are
neighbours in the grid. Partial sums of the stretches are fp32 and are added in a fixed order. From
``MOST_FUSED_ROWS`` on the product is bound by the tensor cores, which would wait for exponentials: then probabilities
are written once, in the embeddings' dtype, and multiplied by cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.tile import compute_capability, precision
from hf_accel.kernels.soft_embedding import triton_statistics
from hf_accel.kernels.soft_embedding.triton_statistics import entropy_lse, multiprocessors, row_offset

MOST_FUSED_ROWS = 128
ROWS_AT_ONCE = 512  # of written probabilities: 152 MB of bf16 at V = 151,936
WRITE_BLOCK = 4096
WRITE_WARPS = 8
ADD_BLOCK = 1024
# Probabilities of a flat distribution over 151,936 tokens are subnormal in fp16; lifted by this they keep all digits.
FP16_LIFT = 2.0**15


@triton.jit
def probability_tile(Row, lse, column, there, end, inverse_temperature, LIFT: tl.constexpr, RAGGED: tl.constexpr):
    """``exp(z / T - lse)`` of the rows of logits at ``Row`` ``[M]`` and columns ``[V]``, times ``LIFT``; 0 for rows
    that are not ``there``, columns from ``end`` on and banned tokens. ``lse`` is finite."""
    inside = there[:, None]
    if RAGGED:
        inside = inside & (column < end)[None, :]
    z = tl.load(Row[:, None] + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    return tl.exp(z * inverse_temperature - lse[:, None]) * LIFT


@triton.jit
def load_lse(Lse, row, inside):
    """0 in place of -inf, for rows that have nothing but banned tokens: -inf - -inf would be NaN."""
    lse = tl.load(Lse + row, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def add_step(
    accumulator, Row, lse, Stretch, column, there, end, d, stride_w, inverse_temperature,
    LIFT: tl.constexpr, RAGGED: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``accumulator`` ``[M, D]`` with ``BLOCK_V`` tokens added, whose embeddings begin at ``Stretch``."""
    p = probability_tile(Row, lse, column, there, end, inverse_temperature, LIFT, RAGGED)
    v = tl.arange(0, column.shape[0])
    inside = (d < DIM)[None, :]
    if RAGGED:
        inside = inside & (column < end)[:, None]
    embedding = tl.load(Stretch + v[:, None] * stride_w + d[None, :], mask=inside, other=0.0)
    return tl.dot(p.to(embedding.dtype), embedding, accumulator, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_inner", "num_rows", "num_picked", "vocabulary"])
def soft_embed_kernel(
    Logits,  # [B, S, V]
    Weight,  # [Vw, D]
    Lse,  # fp32 [N]
    Rows,  # int64 [R]; unused unless HAS_ROWS
    Out,  # [splits, R, D]
    stride_b,
    stride_s,
    stride_w,
    num_inner,
    num_rows,  # N
    num_picked,  # R
    vocabulary,
    share,  # steps of BLOCK_V tokens per split
    inverse_temperature,
    scale,
    HAS_ROWS: tl.constexpr,
    LIFT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    picked = m < num_picked
    row = m.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(Rows + m, mask=picked, other=0)
    there = picked & (row >= 0) & (row < num_rows)
    row = tl.where(there, row, 0)
    lse = load_lse(Lse, row, there)
    Row = Logits + row_offset(row, num_inner, stride_b, stride_s)
    begin = split * share * BLOCK_V
    end = tl.minimum(begin + share * BLOCK_V, vocabulary)
    full_end = begin + (end - begin) // BLOCK_V * BLOCK_V
    v = tl.arange(0, BLOCK_V)
    Stretch = Weight + begin.to(tl.int64) * stride_w
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Only the last step of all can be ragged: full ones have no mask along the vocabulary, which would break their
    # loads into single elements.
    for start in range(begin, full_end, BLOCK_V):
        accumulator = add_step(
            accumulator, Row, lse, Stretch, start + v, there, end, d, stride_w, inverse_temperature,
            LIFT, False, DIM, PRECISION,
        )  # fmt: skip
        Stretch += BLOCK_V * stride_w
    if full_end < end:
        accumulator = add_step(
            accumulator, Row, lse, Stretch, full_end + v, there, end, d, stride_w, inverse_temperature,
            LIFT, True, DIM, PRECISION,
        )  # fmt: skip
    out = accumulator * (scale / LIFT)
    out = tl.where(there[:, None], out, float("nan"))
    place = (split * num_picked + m).to(tl.int64)[:, None] * DIM + d[None, :]
    tl.store(Out + place, out.to(Out.dtype.element_ty), mask=picked[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def add_splits_kernel(
    Partial,  # fp32 [splits, elements]
    Out,  # [elements]
    elements,
    num_splits,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, num_splits):
        total += tl.load(Partial + place, mask=inside, other=0.0)
        Partial += elements
    tl.store(Out + place, total.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_inner", "num_rows"])
def probabilities_kernel(
    Logits,  # [B, S, V]
    Lse,  # fp32 [N]
    Rows,  # int64 [R]; unused unless HAS_ROWS
    Out,  # [R, V]
    stride_b,
    stride_s,
    stride_o,
    num_inner,
    num_rows,
    vocabulary,
    inverse_temperature,
    HAS_ROWS: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) + tl.arange(0, 1)
    row = m.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(Rows + m)
    there = (row >= 0) & (row < num_rows)
    row = tl.where(there, row, 0)
    lse = load_lse(Lse, row, there)
    Row = Logits + row_offset(row, num_inner, stride_b, stride_s)
    p = probability_tile(Row, lse, column, there, vocabulary, inverse_temperature, LIFT, True)
    p = tl.where(there[:, None], p, float("nan"))
    place = m.to(tl.int64)[:, None] * stride_o + column[None, :]
    tl.store(Out + place, p.to(Out.dtype.element_ty), mask=(column < vocabulary)[None, :])


def soft_embed(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.soft_embedding._soft_embed`."""
    picked = len(lse) if rows is None else len(rows)
    out = weight.new_empty(picked, weight.shape[1], dtype=out_dtype)
    if picked == 0:
        return out
    rows = None if rows is None else rows.contiguous()
    if picked <= MOST_FUSED_ROWS:
        _fused(logits, weight, lse, rows, temperature, scale, out)
    else:
        for start in range(0, picked, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, picked)
            part = torch.arange(start, stop, device=logits.device) if rows is None else rows[start:stop]
            out[start:stop] = _written(logits, weight, lse, part, temperature, out_dtype) * scale
    return out


def _fused(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
    out: torch.Tensor,
) -> None:
    picked, dim = out.shape
    vocabulary = logits.shape[2]
    tile = tiles(compute_capability(weight), picked, weight.dtype)
    grid = triton.cdiv(dim, tile.d), triton.cdiv(picked, tile.m)
    steps = triton.cdiv(vocabulary, tile.v)
    share = triton.cdiv(steps, _splits(grid[0] * grid[1], tile.programs * multiprocessors(weight), steps))
    splits = triton.cdiv(steps, share)
    partial = out if splits == 1 else out.new_empty(splits, picked, dim, dtype=torch.float32)
    soft_embed_kernel[(*grid, splits)](
        logits,
        weight,
        lse,
        rows,
        partial,
        *logits.stride()[:2],
        weight.stride(0),
        logits.shape[1],
        len(lse),
        picked,
        vocabulary,
        share,
        1.0 / temperature,
        scale,
        **_constexprs(weight.dtype, rows is not None),
        **tile.constexprs(),
        DIM=dim,
        PRECISION=precision(weight.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        add_splits_kernel[(triton.cdiv(picked * dim, ADD_BLOCK),)](
            partial, out, picked * dim, splits, BLOCK=ADD_BLOCK, num_warps=4, enable_fp_fusion=True
        )


def _written(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    temperature: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``softmax(z / T) @ weight`` of ``rows`` by way of the probabilities, ``[R, D]``."""
    vocabulary = logits.shape[2]
    # Rows that begin at multiples of 16 bytes, whatever the vocabulary: cuBLAS is slow without.
    p = weight.new_empty(len(rows), triton.cdiv(vocabulary, 8) * 8)[:, :vocabulary]
    block = WRITE_BLOCK if logits.is_cuda else 64
    constexprs = _constexprs(weight.dtype, True)
    lift = constexprs["LIFT"]
    probabilities_kernel[(triton.cdiv(vocabulary, block), len(rows))](
        logits,
        lse,
        rows,
        p,
        *logits.stride()[:2],
        p.stride(0),
        logits.shape[1],
        len(lse),
        vocabulary,
        1.0 / temperature,
        **constexprs,
        BLOCK=block,
        num_warps=WRITE_WARPS,
        enable_fp_fusion=True,
    )
    if lift == 1 and out_dtype == weight.dtype:
        return p @ weight[:vocabulary]
    if p.is_cuda and weight.dtype != torch.float32:
        return torch.mm(p, weight[:vocabulary], out_dtype=torch.float32) / lift
    return (p.float() @ weight[:vocabulary].float()) / lift


@dataclass(frozen=True)
class Tile:
    """``m`` rows by ``d`` dimensions of the result, ``v`` tokens per step; ``programs`` fit on a multiprocessor."""

    m: int
    v: int
    d: int
    num_warps: int
    num_stages: int
    programs: int = 1

    def constexprs(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_V": self.v, "BLOCK_D": self.d}


def tiles(cc: int, rows: int, dtype: torch.dtype) -> Tile:
    """The tile for ``rows`` rows on compute capability ``cc`` (0: the interpreter).

    Embeddings are read once if all rows are in one tile. Wide tiles of D make fewer exponentials and read the logits
    less often: at 64 rows and 256 dims the logits add a quarter (bf16) or a half (fp32) to what comes out of L2.
    """
    if cc == 0:
        return Tile(16, 32, 32, 4, 1, programs=4)
    m = max(16, min(64, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        return Tile(min(m, 32), 32, 64, 4, 2, programs=2)  # no tensor cores: products are unrolled into registers
    if cc in (80, 90, 100, 103):
        return Tile(m, 64, 128, 4, 4, programs=2) if m < 64 else Tile(m, 64, 256, 8, 3)
    return Tile(m, 32, 128, 4, 3, programs=2)


def _splits(programs: int, slots: int, steps: int) -> int:
    """Into how many stretches the vocabulary is cut: the fewest that keep the device at work, since each costs the
    writing and the reading of a partial result."""

    def busy(splits: int) -> float:
        return programs * splits / (triton.cdiv(programs * splits, slots) * slots)

    candidates = range(1, max(1, min(steps, 4 * triton.cdiv(slots, programs))) + 1)
    return next((s for s in candidates if busy(s) >= 0.9), max(candidates, key=busy))


def _constexprs(dtype: torch.dtype, has_rows: bool) -> dict[str, Any]:
    return {"HAS_ROWS": has_rows, "LIFT": FP16_LIFT if dtype == torch.float16 else 1.0}


def aot_cases(cc: int) -> list[AotCase]:
    """Every tile of ``cc``, logits in the embeddings' dtype and in fp32, chosen rows, a width that no tile divides."""
    cases = triton_statistics.aot_cases(cc)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for dtype, logits, rows, dim, has_rows in [
        (torch.bfloat16, "bf16", 16, 4096, False),
        (torch.bfloat16, "fp32", 32, 4096, True),
        (torch.bfloat16, "bf16", 64, 2304, False),
        (torch.bfloat16, "fp32", 64, 1000, True),
        (torch.float16, "fp32", 64, 4096, False),
        (torch.float32, "fp32", 64, 4096, False),
        (torch.float32, "fp32", 16, 2304, True),
    ]:
        tile = tiles(cc, rows, dtype)
        scalars = {"inverse_temperature": "fp32", "scale": "fp32"}
        cases.append(
            make_case(
                f"soft_embed {names[dtype]} logits {logits} rows {rows}{' chosen' if has_rows else ''} D{dim}",
                soft_embed_kernel,
                _constexprs(dtype, has_rows) | tile.constexprs() | {"DIM": dim, "PRECISION": precision(dtype)},
                scalars | {"Logits": logits, "Weight": names[dtype], "Lse": "fp32", "Rows": "i64", "Out": "fp32"},
                tile.num_warps,
                tile.num_stages,
            )
        )
    types = {"Logits": "fp32", "Lse": "fp32", "Rows": "i64", "Out": "bf16", "inverse_temperature": "fp32"}
    constexprs = _constexprs(torch.bfloat16, True) | {"BLOCK": WRITE_BLOCK}
    cases.append(make_case("probabilities", probabilities_kernel, constexprs, types, WRITE_WARPS))
    types = {"Partial": "fp32", "Out": "bf16"}
    cases.append(make_case("add splits", add_splits_kernel, {"BLOCK": ADD_BLOCK}, types, 4))
    return cases


__all__ = ["aot_cases", "entropy_lse", "soft_embed"]
