"""The linear branch on a GPU, backward.

With ``G = dO / den`` and ``g = rowsum(dO * O) / den`` the gradient of a weight ``phi(q) phi(k)^T`` of the scope is
``G V^T - g``, and 0 outside. As in the forward pass every sum over a scope is the shorter one of a sum over
its blocks and a total minus a sum over the others: dphi(Q) has the totals of the forward pass; dphi(K) and dV
have ``sum phi(Q)^T G`` and ``sum phi(Q) g``.
"""

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
    add_dot_state,
    feature_map,
    feature_map_backward,
    load_rows,
    load_vector,
)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "rows_per_program"])
def query_totals_kernel(
    Query,  # [B, H, Sq, D]
    Out,
    GradOut,
    Denominator,  # fp32 [B, H, Sq]
    Inner,  # fp32 [B, H, Sq]: g, written here and read by the two other kernels
    State,  # fp32 [B * H, programs, D, D]
    StateSum,  # fp32 [B * H, programs, D]
    stride_qb,
    stride_qh,
    stride_qs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    num_heads,
    num_queries,
    rows_per_program,  # a multiple of BLOCK_M
    FEATURE_MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum phi(Q)^T G`` and ``sum phi(Q) g`` over a run of queries; the caller adds the runs up."""
    group = tl.program_id(1).to(tl.int64)
    batch, head = group // num_heads, group % num_heads
    Query += batch * stride_qb + head * stride_qh
    Out += batch * stride_ob + head * stride_oh
    GradOut += batch * stride_gb + head * stride_gh
    first = tl.program_id(0) * rows_per_program
    state = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    state_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + rows_per_program, num_queries), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        exists = row < num_queries
        out = load_rows(Out, row, exists, stride_os, True, True, D, BLOCK_D).to(tl.float32)
        gradient, inner = normalised_gradient(
            GradOut, Denominator + group * num_queries, row, exists, out, stride_gs, D, BLOCK_D
        )
        tl.store(Inner + group * num_queries + row, inner, mask=exists)
        query = load_rows(Query, row, exists, stride_qs, True, True, D, BLOCK_D)
        # Rows behind the end need no mask: their gradient is 0.
        phi_query = feature_map(query, FEATURE_MAP, D, BLOCK_D).to(OPERAND)
        state = tl.dot(tl.trans(phi_query), gradient.to(OPERAND), state, input_precision=PRECISION)
        state_sum += tl.sum(phi_query.to(tl.float32) * inner[:, None], 0)
    d = tl.arange(0, BLOCK_D)
    part = group * tl.num_programs(0) + tl.program_id(0)
    inside = (d[:, None] < D) & (d[None, :] < D)
    tl.store(State + part * D * D + d[:, None] * D + d[None, :], state, mask=inside)
    tl.store(StateSum + part * D + d, state_sum, mask=d < D)


@triton.jit
def normalised_gradient(GradOut, Denominator, row, exists, out, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """G and g of a tile in fp32, 0 where the denominator is 0."""
    denominator = tl.load(Denominator + row, mask=exists, other=0.0)
    inverse = tl.where(denominator > 0, 1.0 / tl.where(denominator > 0, denominator, 1.0), 0.0)
    gradient = load_rows(GradOut, row, exists, stride, True, True, D, BLOCK_D).to(tl.float32) * inverse[:, None]
    return gradient, tl.sum(gradient * out, 1)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_query_blocks", "max_listed"])
def grad_query_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
    GradOut,  # [B, H, Sq, D]
    Denominator,  # fp32 [B, H, Sq]
    Inner,  # fp32 [B, H, Sq]
    State,  # [B, Hkv, PARTS, D, D], of the forward pass
    StateSum,  # fp32 [B, Hkv, D]
    Index,  # int32, rows of max_listed entries; these three unused unless HAS_LIST
    Count,  # int32
    Direct,  # uint8
    GradQuery,  # [B, H, Sq, D]
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dqb,
    stride_dqh,
    stride_dqs,
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
    GradOut += batch * stride_gb + head * stride_gh
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    key_group = batch * (num_heads // heads_per_key_head) + key_head
    row = first + tl.arange(0, BLOCK_M)
    exists = row < num_queries
    inner = tl.load(Inner + group * num_queries + row, mask=exists, other=0.0)
    gradient, _ = normalised_gradient(
        GradOut, Denominator + group * num_queries, row, exists, 0.0, stride_gs, D, BLOCK_D
    )
    gradient = gradient.to(OPERAND)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            grad_weights = tl.dot(gradient, tl.trans(value.to(OPERAND)), input_precision=PRECISION) - inner[:, None]
            acc = tl.dot(grad_weights.to(OPERAND), phi_key.to(OPERAND), acc, input_precision=PRECISION)
    if direct == 0:
        acc += inner[:, None] * load_vector(StateSum + key_group * D, D, BLOCK_D)[None, :]
        acc = add_dot_state(-acc, gradient, State + key_group * PARTS * D * D, True, PARTS, D, BLOCK_D, PRECISION)
    features = feature_map(load_rows(Query, row, exists, stride_qs, True, True, D, BLOCK_D), FEATURE_MAP, D, BLOCK_D)
    grad_query = feature_map_backward(features, acc, FEATURE_MAP)
    d = tl.arange(0, BLOCK_D)
    GradQuery += batch * stride_dqb + head * stride_dqh
    offsets = row[:, None].to(tl.int64) * stride_dqs + d[None, :]
    tl.store(GradQuery + offsets, grad_query.to(GradQuery.dtype.element_ty), mask=exists[:, None] & (d[None, :] < D))


@triton.jit(do_not_specialize=["num_key_heads", "num_queries", "num_keys", "num_key_blocks", "max_listed"])
def grad_key_value_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
    GradOut,  # [B, H, Sq, D]
    Denominator,  # fp32 [B, H, Sq]
    Inner,  # fp32 [B, H, Sq]
    State,  # [B, H, PARTS, D, D], of query_totals_kernel
    StateSum,  # fp32 [B, H, D]
    Index,  # int32, rows of max_listed query blocks per key block; these three unused unless HAS_LIST
    Count,  # int32
    Direct,  # uint8
    GradKey,  # [B, Hkv, Sk, D]
    GradValue,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    index_batch_step,
    index_head_step,
    num_key_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_key_blocks,
    max_listed,
    HAS_LIST: tl.constexpr,
    HAS_VALID: tl.constexpr,
    MASKED: tl.constexpr,  # some query block is ragged
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
    """One program per (key head, key tile); it walks the query heads that read this key head in order."""
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // BLOCK_M
    group, tile = locate_tile(num_key_blocks, KEY_BLOCK, BLOCK_N)
    first = tile * BLOCK_N
    if first >= num_keys:
        return
    batch = group // num_key_heads
    key_head = group % num_key_heads
    num_heads = num_key_heads * heads_per_key_head
    row = first + tl.arange(0, BLOCK_N)
    exists = row < num_keys
    counts = rows_that_count(KeyValid, batch, row, num_keys, HAS_VALID)
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    features = feature_map(load_rows(Key, row, counts, stride_ks, True, True, D, BLOCK_D), FEATURE_MAP, D, BLOCK_D)
    phi_key = features.to(OPERAND)
    value = load_rows(Value, row, counts, stride_vs, True, True, D, BLOCK_D).to(OPERAND)
    grad_features = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, heads_per_key_head):
        head = key_head * heads_per_key_head + i
        query_group = batch * num_heads + head
        direct = 0
        if HAS_LIST:
            index_row = list_row(batch, head, tile, index_batch_step, index_head_step, KEY_BLOCK, BLOCK_N)
            direct = tl.load(Direct + index_row).to(tl.int32)
            sign = tl.where(direct != 0, 1.0, -1.0)
            tiles = tl.load(Count + index_row) * QUERY_TILES
            Entries = Index + index_row * max_listed
            QueryHead = Query + batch * stride_qb + head * stride_qh
            GradHead = GradOut + batch * stride_gb + head * stride_gh
            block = first_block(Entries, tiles)
            for t in range(0, tiles):
                query_row = tile_rows(block, t, QUERY_BLOCK, BLOCK_M)
                block = block_ahead(Entries, t, tiles, QUERY_BLOCK, BLOCK_M)
                there = query_row < num_queries
                denominator = tl.load(Denominator + query_group * num_queries + query_row, mask=there, other=0.0)
                inner = tl.load(Inner + query_group * num_queries + query_row, mask=there, other=0.0)
                # Rows that have no output or are behind the end have inner 0 and, by this, gradient 0.
                inverse = tl.where(denominator > 0, sign / tl.where(denominator > 0, denominator, 1.0), 0.0)
                query = load_rows(QueryHead, query_row, there, stride_qs, MASKED, WIDE, D, BLOCK_D)
                gradient = load_rows(GradHead, query_row, there, stride_gs, MASKED, WIDE, D, BLOCK_D)
                gradient = (gradient.to(tl.float32) * inverse[:, None]).to(OPERAND)
                phi_query = feature_map(query, FEATURE_MAP, D, BLOCK_D).to(OPERAND)
                weights = tl.dot(phi_key, tl.trans(phi_query), input_precision=PRECISION)
                grad_value = tl.dot(weights.to(OPERAND), gradient, grad_value, input_precision=PRECISION)
                grad_weights = tl.dot(value, tl.trans(gradient), input_precision=PRECISION) - (sign * inner)[None, :]
                grad_features = tl.dot(grad_weights.to(OPERAND), phi_query, grad_features, input_precision=PRECISION)
        if direct == 0:
            # The same total serves both, once as it is and once transposed.
            StateHead = State + query_group * PARTS * D * D
            grad_value = add_dot_state(grad_value, phi_key, StateHead, False, PARTS, D, BLOCK_D, PRECISION)
            grad_features = add_dot_state(grad_features, value, StateHead, True, PARTS, D, BLOCK_D, PRECISION)
            grad_features -= load_vector(StateSum + query_group * D, D, BLOCK_D)[None, :]
    grad_key = feature_map_backward(features, grad_features, FEATURE_MAP)
    if HAS_VALID:
        # Hidden keys took no part.
        grad_key = tl.where(counts[:, None], grad_key, 0.0)
        grad_value = tl.where(counts[:, None], grad_value, 0.0)
    d = tl.arange(0, BLOCK_D)
    element = exists[:, None] & (d[None, :] < D)
    offsets = batch * stride_dkb + key_head * stride_dkh + row[:, None].to(tl.int64) * stride_dks + d[None, :]
    tl.store(GradKey + offsets, grad_key.to(GradKey.dtype.element_ty), mask=element)
    offsets = batch * stride_dvb + key_head * stride_dvh + row[:, None].to(tl.int64) * stride_dvs + d[None, :]
    tl.store(GradValue + offsets, grad_value.to(GradValue.dtype.element_ty), mask=element)
