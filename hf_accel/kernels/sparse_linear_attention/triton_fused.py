"""Both branches of sparse-linear attention in one pass over the critical blocks, for inference.

The paper keeps a state ``h_j = phi(K_j)^T V_j`` per key block and subtracts the states of the critical blocks
from their total inside the sparse loop. Here the same sum is taken in its other order of multiplication,
``phi(Q) h_j = (phi(Q) phi(K_j)^T) V_j``: K_j and V_j are at hand in that loop already. Against the paper's order,
per tile of 64 queries and 64 keys at head dim 128 in bf16:

===================  ==================  =====================  ==========================
order                loaded from L2      tensor-core products   state in registers, memory
===================  ==================  =====================  ==========================
sparse branch alone  K, V: 32 KiB        2.1 MFLOP              64 x 128
subtract ``h_j``     + h_j: 32 KiB       + none                 128 x 128 more, D * D per key block
through the scores   + nothing           + 2.1 MFLOP            64 x 128 more, D * D per head
===================  ==================  =====================  ==========================

A row tile of 64 asks an H100 for 64 operations per byte of L2, several times fewer than its tensor cores
could do in that time: products are what this loop has to spare. And states per block are no small thing: at
head dim 128 in fp32 they take four times the memory of V, 3.1 GB for one layer of Wan 2.1 14B at 720p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_accel.kernels.common.block_list import (
    block_ahead,
    find_block,
    first_block,
    list_row,
    locate_tile,
    rows_that_count,
    tile_rows,
)
from hf_accel.kernels.common.online_softmax import add_scores, finish
from hf_accel.kernels.sparse_linear_attention.triton_steps import (
    add_linear_tile,
    feature_map,
    finish_linear,
    load_rows,
)


@triton.jit
def attend_and_add(
    query,  # [BLOCK_M, BLOCK_D]
    phi_query,  # [BLOCK_M, BLOCK_D]
    Key,
    Value,
    rows,  # [BLOCK_N]
    counts,  # [BLOCK_N] bool; read only if MASKED
    row_max,
    row_sum,
    acc,
    linear,  # [BLOCK_M, BLOCK_D] fp32
    linear_sum,  # [BLOCK_M] fp32
    stride_key,
    stride_value,
    scale,  # softmax scale times log2(e), positive
    SUBTRACT: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``online_softmax.attend_rows``, and the linear branch of the same tile from the same K and V."""
    key = load_rows(Key, rows, counts, stride_key, MASKED, WIDE, D, BLOCK_D)
    value = load_rows(Value, rows, counts, stride_value, MASKED, WIDE, D, BLOCK_D)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(counts[None, :], scores, float("-inf"))
    row_max, row_sum, acc = add_scores(scores, value, row_max, row_sum, acc, scale, MASKED, PRECISION)
    if SUBTRACT:
        phi_key = feature_map(key, FEATURE_MAP, D, BLOCK_D)
        if MASKED:
            phi_key = tl.where(counts[:, None], phi_key, 0.0)
        operand = phi_query.dtype
        linear, linear_sum = add_linear_tile(
            phi_query, phi_key.to(operand), value.to(operand), linear, linear_sum, PRECISION
        )
    return row_max, row_sum, acc, linear, linear_sum


@triton.jit(
    do_not_specialize=["num_heads", "num_queries", "num_keys", "num_query_blocks", "max_keep", "max_other", "scale"]
)
def fused_forward_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
    State,  # [B, Hkv, PARTS, D, D]
    StateSum,  # fp32 [B, Hkv, D]
    BlockIndex,  # int32, rows of max_keep entries: the critical blocks
    BlockCount,  # int32
    OtherIndex,  # int32, rows of max_other entries; these three unused unless HAS_OTHER
    OtherCount,  # int32
    Direct,  # uint8: 1 where the linear branch is the sum over the other list alone
    SparseOut,  # [B, H, Sq, D]
    LinearOut,
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
    other_batch_step,
    other_head_step,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_query_blocks,
    max_keep,
    max_other,
    scale,  # softmax scale times log2(e)
    SUBTRACT: tl.constexpr,  # the scope of the linear branch is without the critical blocks
    HAS_OTHER: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # rows of K and V are equally far apart: one offset serves both
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
    """One program per (head, query tile); heads in order, so that programs in flight share K and V in L2."""
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
    if SAME_STRIDES:
        stride_vs = stride_ks
    key_group = batch * (num_heads // heads_per_key_head) + key_head
    row = first + tl.arange(0, BLOCK_M)
    exists = row < num_queries
    query = load_rows(Query, row, exists, stride_qs, True, True, D, BLOCK_D)
    phi_query = feature_map(query, FEATURE_MAP, D, BLOCK_D).to(OPERAND)

    index_row = list_row(batch, head, tile, index_batch_step, index_head_step, QUERY_BLOCK, BLOCK_M)
    count = tl.minimum(tl.load(BlockCount + index_row), max_keep)
    BlockIndex += index_row * max_keep
    # Only the last key block can be ragged. It is found first and taken after the others, wherever it
    # stands in the list, so that no other tile needs a mask.
    ragged = count
    last_full = num_keys // KEY_BLOCK
    if num_keys % KEY_BLOCK != 0:
        ragged = find_block(BlockIndex, count, last_full)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    linear = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    linear_sum = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_N)
    tiles = (count - (ragged < count).to(tl.int32)) * KEY_TILES
    block = first_block(BlockIndex, tiles, ragged)
    for t in range(0, tiles):
        key_row = tile_rows(block, t, KEY_BLOCK, BLOCK_N)
        block = block_ahead(BlockIndex, t, tiles, KEY_BLOCK, BLOCK_N, ragged)
        counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID, True)
        row_max, row_sum, acc, linear, linear_sum = attend_and_add(
            query, phi_query, Key, Value, key_row, counts, row_max, row_sum, acc, linear, linear_sum,
            stride_ks, stride_vs, scale, SUBTRACT, HAS_VALID, WIDE, FEATURE_MAP, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if ragged < count:
        for first_key in range(last_full * KEY_BLOCK, num_keys, BLOCK_N):
            key_row = first_key + column
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            row_max, row_sum, acc, linear, linear_sum = attend_and_add(
                query, phi_query, Key, Value, key_row, counts, row_max, row_sum, acc, linear, linear_sum,
                stride_ks, stride_vs, scale, SUBTRACT, True, WIDE, FEATURE_MAP, D, BLOCK_D, PRECISION,
            )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    element = exists[:, None] & (d[None, :] < D)
    offsets = batch * stride_ob + head * stride_oh + row[:, None].to(tl.int64) * stride_os + d[None, :]
    out, _ = finish(row_max, row_sum, acc)
    tl.store(SparseOut + offsets, out.to(SparseOut.dtype.element_ty), mask=element)

    direct = 0
    if HAS_OTHER:
        other_row = list_row(batch, head, tile, other_batch_step, other_head_step, QUERY_BLOCK, BLOCK_M)
        direct = tl.load(Direct + other_row).to(tl.int32)
        if direct != 0:
            linear = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            linear_sum = tl.zeros([BLOCK_M], tl.float32)
        OtherIndex += other_row * max_other
        for t in range(0, tl.load(OtherCount + other_row) * KEY_TILES):
            key_row = tile_rows(tl.load(OtherIndex + t // KEY_TILES), t, KEY_BLOCK, BLOCK_N)
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            key = load_rows(Key, key_row, counts, stride_ks, True, WIDE, D, BLOCK_D)
            value = load_rows(Value, key_row, counts, stride_vs, True, WIDE, D, BLOCK_D)
            phi_key = tl.where(counts[:, None], feature_map(key, FEATURE_MAP, D, BLOCK_D), 0.0)
            linear, linear_sum = add_linear_tile(
                phi_query, phi_key.to(OPERAND), value.to(OPERAND), linear, linear_sum, PRECISION
            )
    out, _ = finish_linear(
        phi_query, phi_query.to(tl.float32), linear, linear_sum, direct,
        State + key_group * PARTS * D * D, StateSum + key_group * D, PARTS, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    tl.store(LinearOut + offsets, out.to(LinearOut.dtype.element_ty), mask=element)
