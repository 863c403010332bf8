"""The step of flash attention that the Triton attention kernels share (imports triton)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    Key,
    Value,
    rows,  # [BLOCK_N], in any order
    counts,  # [BLOCK_N] bool: rows that take part, the others are 0; read only if MASKED
    stride_key,
    stride_value,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,  # a head of Key or Value spans 2**31 elements or more
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``[BLOCK_N, BLOCK_D]`` of Key and of Value."""
    d = tl.arange(0, BLOCK_D)
    # The loop is bound by instructions issued, not by the tensor cores alone. Key + d does not change from tile
    # to tile, and an offset of 32 bits needs one multiply-add per row to become an address, one of 64 bits four.
    if WIDE:
        rows = rows.to(tl.int64)
    key_pointers = (Key + d)[None, :] + (rows * stride_key)[:, None]
    value_pointers = (Value + d)[None, :] + (rows * stride_value)[:, None]
    if BLOCK_D == D and not MASKED:
        key = tl.load(key_pointers)
        value = tl.load(value_pointers)
    else:
        # A weight of 0 does not cancel an infinite value: rows that do not count must not be read.
        element = (d[None, :] < D) & counts[:, None] if MASKED else d[None, :] < D
        key = tl.load(key_pointers, mask=element, other=0.0)
        value = tl.load(value_pointers, mask=element, other=0.0)
    return key, value


@triton.jit
def add_scores(
    scores,  # [BLOCK_M, BLOCK_N] fp32, without the scale; -inf where a key takes no part
    value,  # [BLOCK_N, BLOCK_D]
    row_max,  # [BLOCK_M] fp32, base-2 logarithm
    row_sum,  # [BLOCK_M] fp32
    acc,  # [BLOCK_M, BLOCK_D] fp32
    scale,  # softmax scale times log2(e), positive
    MASKED: tl.constexpr,  # there may be rows in which no key has taken part so far
    PRECISION: tl.constexpr,
):
    """Take one tile of scores into the online softmax (Dao 2023, arXiv 2307.08691, algorithm 1), in base 2."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    base = new_max
    if MASKED:
        # While no key has taken part the maximum is -inf, and -inf - -inf is no number.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(scores * scale - base[:, None])
    shrink = tl.math.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def attend_rows(
    query,  # [BLOCK_M, BLOCK_D]
    Key,
    Value,
    rows,  # [BLOCK_N] rows of Key and Value, in any order
    counts,  # [BLOCK_N] bool: rows that take part; read only if MASKED
    row_max,  # [BLOCK_M] fp32, base-2 logarithm
    row_sum,  # [BLOCK_M] fp32
    acc,  # [BLOCK_M, BLOCK_D] fp32
    stride_key,
    stride_value,
    scale,  # softmax scale times log2(e), positive
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,  # a head of Key or Value spans 2**31 elements or more
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    last_seen=0,  # [BLOCK_M] the last row of Key that each query sees; read only if CAUSAL, which implies MASKED
    CAUSAL: tl.constexpr = False,
):
    """:func:`add_scores` for one tile of keys."""
    key, value = load_rows(Key, Value, rows, counts, stride_key, stride_value, MASKED, WIDE, D, BLOCK_D)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(counts[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(rows[None, :] <= last_seen[:, None], scores, float("-inf"))
    return add_scores(scores, value, row_max, row_sum, acc, scale, MASKED, PRECISION)


@triton.jit
def finish(row_max, row_sum, acc):
    """Output and natural-logarithm LSE. A row without keys has row_sum 0, row_max -inf: 0 and -inf."""
    denominator = tl.where(row_sum > 0, row_sum, 1.0)
    return acc / denominator[:, None], (row_max + tl.math.log2(denominator)) * 0.6931471805599453
