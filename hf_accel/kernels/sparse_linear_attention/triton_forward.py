"""The linear branch on a GPU, forward: the total over all keys, then total minus what a row leaves out."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel.kernels.common.block_list import (
    block_ahead,
    first_block,
    list_row,
    locate_tile,
    rows_that_count,
    tile_rows,
)
from hf_accel.kernels.sparse_linear_attention.triton_steps import (
    add_linear_tile,
    feature_map,
    finish_linear,
    load_rows,
)


@triton.jit(do_not_specialize=["key_heads", "num_keys", "rows_per_program"])
def key_totals_kernel(
    Key,  # [B, Hkv, Sk, D]
    Value,
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
    State,  # fp32 [B * Hkv, programs, D, D]
    StateSum,  # fp32 [B * Hkv, programs, D]
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    key_heads,
    num_keys,
    rows_per_program,  # a multiple of BLOCK_N
    HAS_VALID: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum phi(K)^T V`` and ``sum phi(K)`` over a run of keys; the caller adds the runs up."""
    group = tl.program_id(1).to(tl.int64)
    batch, head = group // key_heads, group % key_heads
    Key += batch * stride_kb + head * stride_kh
    Value += batch * stride_vb + head * stride_vh
    first = tl.program_id(0) * rows_per_program
    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    state_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + rows_per_program, num_keys), BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        exists = rows_that_count(KeyValid, batch, row, num_keys, HAS_VALID)
        features = feature_map(load_rows(Key, row, exists, stride_ks, True, True, D, BLOCK_D), FEATURE_MAP, D, BLOCK_D)
        # Rounded as the kernels round it that subtract parts of this sum.
        phi_key = tl.where(exists[:, None], features, 0.0).to(OPERAND)
        value = load_rows(Value, row, exists, stride_vs, True, True, D, BLOCK_D).to(OPERAND)
        state = tl.dot(tl.trans(phi_key), value, state, input_precision=PRECISION)
        state_sum += tl.sum(phi_key.to(tl.float32), 0)
    d = tl.arange(0, BLOCK_D)
    part = group * tl.num_programs(0) + tl.program_id(0)
    inside = (d[:, None] < D) & (d[None, :] < D)
    tl.store(State + part * D * D + d[:, None] * D + d[None, :], state, mask=inside)
    tl.store(StateSum + part * D + d, state_sum, mask=d < D)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_query_blocks", "max_listed"])
def linear_forward_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
    State,  # [B, Hkv, PARTS, D, D]
    StateSum,  # fp32 [B, Hkv, D]
    Index,  # int32, rows of max_listed entries; these three unused unless HAS_LIST
    Count,  # int32
    Direct,  # uint8
    Out,  # [B, H, Sq, D]
    Denominator,  # fp32 [B, H, Sq]
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    index_batch_step,
    index_head_step,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_query_blocks,
    max_listed,
    HAS_LIST: tl.constexpr,
    HAS_VALID: tl.constexpr,
    MASKED: tl.constexpr,  # some key block is ragged or holds hidden keys
    WIDE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PARTS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (head, query tile)."""
    KEY_TILES: tl.constexpr = KEY_BLOCK // BLOCK_N
    group, tile = locate_tile(num_query_blocks, QUERY_BLOCK, BLOCK_M)
    first = tile * BLOCK_M
    if first >= num_queries:
        return
    batch = group // num_heads
    head = group % num_heads
    key_head = head // heads_per_key_head
    Query += batch * stride_qb + head * stride_qh
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    key_group = batch * (num_heads // heads_per_key_head) + key_head
    row = first + tl.arange(0, BLOCK_M)
    exists = row < num_queries
    features = feature_map(load_rows(Query, row, exists, stride_qs, True, True, D, BLOCK_D), FEATURE_MAP, D, BLOCK_D)
    phi_query = features.to(OPERAND)
    features = phi_query.to(tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_sum = tl.zeros([BLOCK_M], tl.float32)
    direct = 0
    if HAS_LIST:
        index_row = list_row(batch, head, tile, index_batch_step, index_head_step, QUERY_BLOCK, BLOCK_M)
        direct = tl.load(Direct + index_row).to(tl.int32)
        tiles = tl.load(Count + index_row) * KEY_TILES
        Index += index_row * max_listed
        block = first_block(Index, tiles)
        for t in range(0, tiles):
            key_row = tile_rows(block, t, KEY_BLOCK, BLOCK_N)
            block = block_ahead(Index, t, tiles, KEY_BLOCK, BLOCK_N)
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            key = load_rows(Key, key_row, counts, stride_ks, MASKED, WIDE, D, BLOCK_D)
            value = load_rows(Value, key_row, counts, stride_vs, MASKED, WIDE, D, BLOCK_D)
            phi_key = feature_map(key, FEATURE_MAP, D, BLOCK_D)
            if MASKED:
                phi_key = tl.where(counts[:, None], phi_key, 0.0)
            acc, acc_sum = add_linear_tile(phi_query, phi_key.to(OPERAND), value.to(OPERAND), acc, acc_sum, PRECISION)
    out, denominator = finish_linear(
        phi_query, features, acc, acc_sum, direct, State + key_group * PARTS * D * D, StateSum + key_group * D,
        PARTS, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    Out += batch * stride_ob + head * stride_oh
    offsets = row[:, None].to(tl.int64) * stride_os + d[None, :]
    tl.store(Out + offsets, out.to(Out.dtype.element_ty), mask=exists[:, None] & (d[None, :] < D))
    tl.store(Denominator + group * num_queries + row, denominator, mask=exists)
