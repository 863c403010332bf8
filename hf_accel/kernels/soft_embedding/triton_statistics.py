"""Entropy statistics on a GPU.

Bound by reading the logits: a row is split over as many programs as fill the device, and a second, tiny kernel puts the
parts together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case

BLOCK = 4096
WARPS = 8

_LAST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def row_offset(row, num_inner, stride_b, stride_s):
    """Where row ``row`` of the flattened ``[B * S, V]`` begins in ``[B, S, V]``."""
    row = row.to(tl.int64)
    return (row // num_inner) * stride_b + (row % num_inner) * stride_s


@triton.jit
def accumulate(x, drop, total, lost):
    """Sums of ``exp(x)`` and ``x exp(x)``, going on from those relative to a largest logit that lay ``-drop`` lower.

    ``x`` may be -inf, and so may ``drop`` as long as there is nothing to go on from.
    """
    decay = tl.exp(drop)
    weight = tl.exp(x)
    lost = decay * (lost + tl.where(total == 0, 0.0, drop * total)) + tl.sum(tl.where(weight == 0, 0.0, weight * x), 0)
    return decay * total + tl.sum(weight, 0), lost


@triton.jit
def take_block(
    Row, column, end, inverse_temperature, top, index, total, lost, total_t, lost_t,
    RAGGED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """The running statistics of a row with one block of its columns taken in."""
    if RAGGED:
        z = tl.load(Row + column, mask=column < end, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(Row + column).to(tl.float32)
    block_top = tl.max(z, 0)
    first = tl.min(tl.where(z == block_top, column, _LAST), 0)
    index = tl.where(block_top > top, first, index)
    new = tl.maximum(top, block_top)
    base = tl.where(new == float("-inf"), 0.0, new)
    x = z - base
    drop = top - base
    total, lost = accumulate(x, drop, total, lost)
    if TEMPERED:
        total_t, lost_t = accumulate(x * inverse_temperature, drop * inverse_temperature, total_t, lost_t)
    return new, index, total, lost, total_t, lost_t


@triton.jit(do_not_specialize=["num_inner", "vocabulary", "num_splits"])
def statistics_kernel(
    Logits,  # [B, S, V]
    Sums,  # fp32 [3 or 5, N, splits]: the largest logit, then the two sums, and those at the temperature
    Index,  # int32 [N, splits]
    stride_b,
    stride_s,
    num_inner,
    vocabulary,
    share,  # blocks of columns per split
    num_splits,
    inverse_temperature,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    row = tl.program_id(1)
    Row = Logits + row_offset(row, num_inner, stride_b, stride_s)
    begin = split * share * BLOCK
    end = tl.minimum(begin + share * BLOCK, vocabulary)
    full_end = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    top = float("-inf")
    index = begin
    total = 0.0
    lost = 0.0
    total_t = 0.0
    lost_t = 0.0
    # A mask of unknown length would break the loads of full blocks into single elements.
    for start in range(begin, full_end, BLOCK):
        top, index, total, lost, total_t, lost_t = take_block(
            Row, start + lane, end, inverse_temperature, top, index, total, lost, total_t, lost_t, False, TEMPERED
        )
    if full_end < end:
        top, index, total, lost, total_t, lost_t = take_block(
            Row, full_end + lane, end, inverse_temperature, top, index, total, lost, total_t, lost_t, True, TEMPERED
        )
    cell = row.to(tl.int64) * num_splits + split
    plane = tl.num_programs(1).to(tl.int64) * num_splits
    tl.store(Index + cell, index)
    tl.store(Sums + cell, top)
    tl.store(Sums + plane + cell, total)
    tl.store(Sums + 2 * plane + cell, lost)
    if TEMPERED:
        tl.store(Sums + 3 * plane + cell, total_t)
        tl.store(Sums + 4 * plane + cell, lost_t)


@triton.jit
def lse_and_entropy(total, lost, base, drop):
    """Of a row, from sums over parts of it, each relative to a largest logit that lies ``-drop`` below ``base``."""
    decay = tl.exp(drop)
    lost = tl.sum(tl.where(decay == 0, 0.0, decay * (lost + drop * total)), 0)
    total = tl.sum(decay * total, 0)
    entropy = tl.log(total) - lost / tl.where(total == 0, 1.0, total)
    # Not maximum(), which would make 0 of NaN.
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return base + tl.log(total), tl.where(total == 0, 0.0, entropy)


@triton.jit(do_not_specialize=["num_splits"])
def finish_statistics_kernel(
    Sums,  # as statistics_kernel left them
    Index,
    Values,  # fp32 [3 or 5, N]: top logit, lse, entropy, and both at the temperature
    TopIndex,  # int64 [N]
    num_splits,
    inverse_temperature,
    TEMPERED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    plane = rows * num_splits
    lane = tl.arange(0, SPLITS)
    inside = lane < num_splits
    Sums += row * num_splits
    tops = tl.load(Sums + lane, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    drop = tops - base
    index = tl.load(Index + row * num_splits + lane, mask=inside, other=_LAST)
    tl.store(TopIndex + row, tl.min(tl.where(tops == top, index, _LAST), 0).to(tl.int64))
    tl.store(Values + row, top)
    total = tl.load(Sums + plane + lane, mask=inside, other=0.0)
    lost = tl.load(Sums + 2 * plane + lane, mask=inside, other=0.0)
    lse, entropy = lse_and_entropy(total, lost, base, drop)
    tl.store(Values + rows + row, lse)
    tl.store(Values + 2 * rows + row, entropy)
    if TEMPERED:
        total = tl.load(Sums + 3 * plane + lane, mask=inside, other=0.0)
        lost = tl.load(Sums + 4 * plane + lane, mask=inside, other=0.0)
        lse, entropy = lse_and_entropy(total, lost, base * inverse_temperature, drop * inverse_temperature)
        tl.store(Values + 3 * rows + row, lse)
        tl.store(Values + 4 * rows + row, entropy)


def entropy_lse(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hf_accel.kernels.soft_embedding._entropy_lse`."""
    batch, inner, vocabulary = logits.shape
    rows, tempered = batch * inner, temperature != 1
    values = logits.new_empty(5 if tempered else 3, rows, dtype=torch.float32)
    top_index = logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return values, top_index
    block = BLOCK if logits.is_cuda else 64
    # 8 warps per program: 8 programs fill a multiprocessor.
    blocks = triton.cdiv(vocabulary, block)
    share = triton.cdiv(blocks, min(triton.cdiv(8 * multiprocessors(logits), rows), blocks))
    splits = triton.cdiv(blocks, share)
    sums = logits.new_empty(len(values), rows, splits, dtype=torch.float32)
    index = logits.new_empty(rows, splits, dtype=torch.int32)
    statistics_kernel[(splits, rows)](
        logits,
        sums,
        index,
        *logits.stride()[:2],
        inner,
        vocabulary,
        share,
        splits,
        1.0 / temperature,
        TEMPERED=tempered,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    finish_statistics_kernel[(rows,)](
        sums,
        index,
        values,
        top_index,
        splits,
        1.0 / temperature,
        TEMPERED=tempered,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return values, top_index


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the GPU of ``tensor``; 1 for the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def aot_cases(cc: int) -> list[AotCase]:
    """With and without a temperature; nothing here depends on ``cc``."""
    cases = []
    for logits in ("bf16", "fp32"):
        for tempered in (False, True):
            types = {"Logits": logits, "Sums": "fp32", "Index": "i32", "inverse_temperature": "fp32"}
            constexprs = {"TEMPERED": tempered, "BLOCK": BLOCK}
            name = f"statistics {logits}{' tempered' if tempered else ''}"
            cases.append(make_case(name, statistics_kernel, constexprs, types, WARPS))
    for splits in (1, 128):
        types = {"Sums": "fp32", "Index": "i32", "Values": "fp32", "TopIndex": "i64", "inverse_temperature": "fp32"}
        constexprs = {"TEMPERED": True, "SPLITS": splits}
        cases.append(make_case(f"finish {splits} splits", finish_statistics_kernel, constexprs, types, 1))
    return cases
