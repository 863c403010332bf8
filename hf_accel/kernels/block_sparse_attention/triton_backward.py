"""Backward pass of block-sparse attention on a GPU: tile sizes, three kernels and their launcher.

FlashAttention-2's backward pass (arXiv 2307.08691, algorithm 2) over lists of blocks. The weights are computed
again from the LSE. One kernel makes dQ along the rows of the index, another dK and dV along the rows of its
transpose, so that each element of a gradient is summed by one program in one order: no atomics, and two runs are
bit-equal. A product of its own for dQ costs 7 matrix products per pair of tiles where sharing would need 5, and
saves the fp32 buffer, its atomics and its conversion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.block_sparse_attention.index import split_index, split_transposed_index, transpose_index
from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.block_list import (
    block_ahead,
    first_block,
    list_row,
    list_steps,
    locate_tile,
    rows_that_count,
    tile_constexprs,
    tile_rows,
)
from hf_accel.kernels.common.online_softmax import load_rows
from hf_accel.kernels.common.tile import LOG2_E, Tile, as_bytes, compute_capability, key_layout, padded_head_dim

DELTA_ROWS = 64
UNSPECIALIZED = ["num_heads", "num_queries", "num_keys", "num_rows", "max_keep", "scale"]


def tiles_for(cc: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]) -> tuple[Tile, Tile]:
    """The tiles of the dQ kernel and of the dK, dV kernel; ``m`` counts queries and ``n`` keys in both.

    Each keeps two matrices of its own rows and their accumulators on chip, so they are smaller than the forward
    kernel's. Chosen from compiled code so that little spills. They divide the blocks.
    """
    if cc == 0:
        tiles = Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)
    elif dtype == torch.float32:
        small = 32 if head_dim <= 64 else 16
        tiles = Tile(small, 16, 4, 1), Tile(16, small, 4, 1)
    elif head_dim <= 64:
        tiles = Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)
    elif head_dim <= 128:
        if cc in (90, 100, 103):
            tiles = Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)
        elif cc == 80:
            tiles = Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)
        else:
            tiles = Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    elif cc in (80, 90, 100, 103):
        tiles = Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)
    else:
        tiles = Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
    return _fit(tiles[0], block_size), _fit(tiles[1], block_size)


def _fit(tile: Tile, block_size: tuple[int, int]) -> Tile:
    m, n = min(tile.m, block_size[0]), min(tile.n, block_size[1])
    # Half the rows, half the warps: fewer than 16 rows per warp leave the tensor cores idle.
    return replace(tile, m=m, n=n, num_warps=tile.num_warps if (m, n) == (tile.m, tile.n) else tile.num_warps // 2)


@triton.jit(do_not_specialize=["num_heads", "num_queries"])
def delta_kernel(
    Out,  # [B, H, Sq, D]
    GradOut,
    Lse,  # fp32 [B, H, Sq]
    GradLse,  # fp32 [B, H, Sq]
    Lse2,  # fp32 [B, H, Sq]
    Delta,  # fp32 [B, H, Sq]
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    num_heads,
    num_queries,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What both other kernels need of each row: its LSE in base 2, +inf where it is -inf, and Delta.

    The gradient of a score is weight * (grad_out . value - Delta) with Delta = sum(grad_out * out) - grad_lse.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1).to(tl.int64)
    batch = group // num_heads
    head = group % num_heads
    inside = row < num_queries
    d = tl.arange(0, BLOCK_D)
    element = inside[:, None] & (d[None, :] < D)
    out_offsets = batch * stride_ob + head * stride_oh + row[:, None].to(tl.int64) * stride_os + d[None, :]
    grad_offsets = batch * stride_gb + head * stride_gh + row[:, None].to(tl.int64) * stride_gs + d[None, :]
    out = tl.load(Out + out_offsets, mask=element, other=0.0).to(tl.float32)
    grad = tl.load(GradOut + grad_offsets, mask=element, other=0.0).to(tl.float32)
    place = group * num_queries + row
    lse = tl.load(Lse + place, mask=inside, other=0.0)
    grad_lse = tl.load(GradLse + place, mask=inside, other=0.0)
    tl.store(Delta + place, tl.sum(out * grad, 1) - grad_lse, mask=inside)
    # exp2(score - inf) = 0: a row that kept nothing has no gradient, and no mask is needed for it.
    tl.store(Lse2 + place, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634), mask=inside)


@triton.jit
def _query_step(
    query,  # [BLOCK_M, BLOCK_D]
    grad_out,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M], base 2
    delta,  # [BLOCK_M]
    grad_query,  # [BLOCK_M, BLOCK_D] fp32
    Key,
    Value,
    rows,  # [BLOCK_N]
    counts,  # [BLOCK_N] bool; read only if MASKED
    last_seen,  # [BLOCK_M]; read only if CAUSAL
    stride_ks,
    stride_vs,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one tile of keys gives to dQ, up to the softmax scale."""
    key, value = load_rows(Key, Value, rows, counts, stride_ks, stride_vs, MASKED, WIDE, D, BLOCK_D)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    weights = tl.math.exp2(scores * scale - lse[:, None])
    if MASKED:
        # A key of zeros has score 0, and exp2(0 - lse) may be infinite.
        weights = tl.where(counts[None, :], weights, 0.0)
    if CAUSAL:
        weights = tl.where(rows[None, :] <= last_seen[:, None], weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_query_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    GradOut,  # [B, H, Sq, D]
    Lse2,  # fp32 [B, H, Sq]
    Delta,  # fp32 [B, H, Sq]
    GradQuery,  # [B, H, Sq, D]
    BlockIndex,  # int32, rows of max_keep key blocks: first those that need no mask, then those that do
    PlainCount,  # int32
    MaskedCount,  # int32
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
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
    stride_rb,  # of GradQuery
    stride_rh,
    stride_rs,
    index_batch_step,
    index_head_step,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_rows,  # query blocks
    max_keep,
    softmax_scale,
    scale,  # softmax scale times log2(e)
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    WIDE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ: one program per (head, query tile), which goes through the keys of its row as the forward kernel does."""
    KEY_TILES: tl.constexpr = KEY_BLOCK // BLOCK_N
    group, tile = locate_tile(num_rows, QUERY_BLOCK, BLOCK_M)
    first = tile * BLOCK_M
    if first >= num_queries:
        return
    batch = group // num_heads
    head = group % num_heads
    key_head = head // heads_per_key_head
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    if SAME_STRIDES:
        stride_vs = stride_ks
    row = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = row < num_queries
    element = inside[:, None] & (d[None, :] < D)
    far_row = row[:, None].to(tl.int64)
    query = tl.load(
        Query + batch * stride_qb + head * stride_qh + far_row * stride_qs + d[None, :], mask=element, other=0.0
    )
    grad_out = tl.load(
        GradOut + batch * stride_gb + head * stride_gh + far_row * stride_gs + d[None, :], mask=element, other=0.0
    )
    lse = tl.load(Lse2 + group * num_queries + row, mask=inside, other=float("inf"))
    delta = tl.load(Delta + group * num_queries + row, mask=inside, other=0.0)
    last_seen = row + num_keys - num_queries

    index_row = list_row(batch, head, tile, index_batch_step, index_head_step, QUERY_BLOCK, BLOCK_M)
    plain = tl.load(PlainCount + index_row)
    masked = tl.load(MaskedCount + index_row)
    BlockIndex += index_row * max_keep
    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    tiles = plain * KEY_TILES
    block = first_block(BlockIndex, tiles)
    for t in range(0, tiles):
        key_row = tile_rows(block, t, KEY_BLOCK, BLOCK_N)
        block = block_ahead(BlockIndex, t, tiles, KEY_BLOCK, BLOCK_N)
        counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID, True)
        grad_query = _query_step(
            query, grad_out, lse, delta, grad_query, Key, Value, key_row, counts, last_seen, stride_ks, stride_vs,
            scale, HAS_VALID, False, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    end = num_keys
    if CAUSAL:
        end = tl.minimum(first + BLOCK_M + num_keys - num_queries, num_keys)
    for entry in range(plain, plain + masked):
        first_key = tl.load(BlockIndex + entry) * KEY_BLOCK
        for first_key_of_tile in range(first_key, tl.minimum(first_key + KEY_BLOCK, end), BLOCK_N):
            key_row = first_key_of_tile + column
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            grad_query = _query_step(
                query, grad_out, lse, delta, grad_query, Key, Value, key_row, counts, last_seen, stride_ks, stride_vs,
                scale, True, CAUSAL, WIDE, D, BLOCK_D, PRECISION,
            )  # fmt: skip
    result = (grad_query * softmax_scale).to(GradQuery.dtype.element_ty)
    tl.store(GradQuery + batch * stride_rb + head * stride_rh + far_row * stride_rs + d[None, :], result, mask=element)


@triton.jit
def _key_step(
    key,  # [BLOCK_N, BLOCK_D]
    value,  # [BLOCK_N, BLOCK_D]
    grad_key,  # [BLOCK_N, BLOCK_D] fp32
    grad_value,  # [BLOCK_N, BLOCK_D] fp32
    Query,
    GradOut,
    Lse2,
    Delta,
    rows,  # [BLOCK_M]
    last_seen,  # [BLOCK_M]; read only if CAUSAL
    key_row,  # [BLOCK_N]; read only if CAUSAL
    num_queries,
    stride_qs,
    stride_gs,
    scale,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one tile of queries gives to dK (up to the softmax scale) and dV. Scores are [keys, queries]."""
    inside = rows < num_queries
    query, grad_out = load_rows(Query, GradOut, rows, inside, stride_qs, stride_gs, True, WIDE, D, BLOCK_D)
    lse = tl.load(Lse2 + rows, mask=inside, other=float("inf"))
    delta = tl.load(Delta + rows, mask=inside, other=0.0)
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    weights = tl.math.exp2(scores * scale - lse[None, :])
    if CAUSAL:
        weights = tl.where(key_row[:, None] <= last_seen[None, :], weights, 0.0)
    grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
    grad_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_key_value_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    GradOut,  # [B, H, Sq, D]
    Lse2,  # fp32 [B, H, Sq]
    Delta,  # fp32 [B, H, Sq]
    GradKey,  # [B, Hkv, Sk, D]
    GradValue,
    BlockIndex,  # int32, rows of max_keep query blocks: first those below the diagonal, then those that it crosses
    PlainCount,  # int32
    MaskedCount,  # int32; unused unless CAUSAL
    KeyValid,  # uint8 [B, Sk]; unused unless HAS_VALID
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
    stride_xb,  # of GradKey
    stride_xh,
    stride_xs,
    stride_yb,  # of GradValue
    stride_yh,
    stride_ys,
    index_batch_step,
    index_head_step,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_rows,  # key blocks
    max_keep,
    softmax_scale,
    scale,  # softmax scale times log2(e)
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # of the rows of Query and GradOut
    WIDE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV: one program per (key head, key tile), over the query heads of the group and their query blocks."""
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // BLOCK_M
    group, tile = locate_tile(num_rows, KEY_BLOCK, BLOCK_N)
    if tile * BLOCK_N >= num_keys:
        return
    key_heads = num_heads // heads_per_key_head
    batch = group // key_heads
    key_head = group % key_heads
    if SAME_STRIDES:
        stride_gs = stride_qs
    key_row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = key_row < num_keys
    counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
    far_row = key_row[:, None].to(tl.int64)
    element = counts[:, None] & (d[None, :] < D)
    key = tl.load(
        Key + batch * stride_kb + key_head * stride_kh + far_row * stride_ks + d[None, :], mask=element, other=0.0
    )
    value = tl.load(
        Value + batch * stride_vb + key_head * stride_vh + far_row * stride_vs + d[None, :], mask=element, other=0.0
    )
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, heads_per_key_head):
        head = key_head * heads_per_key_head + member
        index_row = list_row(batch, head, tile, index_batch_step, index_head_step, KEY_BLOCK, BLOCK_N)
        plain = tl.load(PlainCount + index_row)
        Blocks = BlockIndex + index_row * max_keep
        QueryHead = Query + batch * stride_qb + head * stride_qh
        GradHead = GradOut + batch * stride_gb + head * stride_gh
        LseHead = Lse2 + (batch * num_heads + head) * num_queries
        DeltaHead = Delta + (batch * num_heads + head) * num_queries
        tiles = plain * QUERY_TILES
        block = first_block(Blocks, tiles)
        for t in range(0, tiles):
            row = tile_rows(block, t, QUERY_BLOCK, BLOCK_M)
            block = block_ahead(Blocks, t, tiles, QUERY_BLOCK, BLOCK_M)
            grad_key, grad_value = _key_step(
                key, value, grad_key, grad_value, QueryHead, GradHead, LseHead, DeltaHead, row, row, key_row,
                num_queries, stride_qs, stride_gs, scale, False, WIDE, D, BLOCK_D, PRECISION,
            )  # fmt: skip
        if CAUSAL:
            masked = tl.load(MaskedCount + index_row)
            for t in range(tiles, tiles + masked * QUERY_TILES):
                row = tile_rows(tl.load(Blocks + t // QUERY_TILES), t, QUERY_BLOCK, BLOCK_M)
                grad_key, grad_value = _key_step(
                    key, value, grad_key, grad_value, QueryHead, GradHead, LseHead, DeltaHead, row,
                    row + num_keys - num_queries, key_row, num_queries, stride_qs, stride_gs, scale, True, WIDE,
                    D, BLOCK_D, PRECISION,
                )  # fmt: skip
    # A column that does not count was computed from a key of zeros: it reaches no other column, and may be NaN.
    grad_key = tl.where(counts[:, None], grad_key * softmax_scale, 0.0).to(GradKey.dtype.element_ty)
    grad_value = tl.where(counts[:, None], grad_value, 0.0).to(GradValue.dtype.element_ty)
    stored = inside[:, None] & (d[None, :] < D)
    tl.store(
        GradKey + batch * stride_xb + key_head * stride_xh + far_row * stride_xs + d[None, :], grad_key, mask=stored
    )
    tl.store(
        GradValue + batch * stride_yb + key_head * stride_yh + far_row * stride_ys + d[None, :], grad_value, mask=stored
    )


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; ``tiles`` replaces the table's choice (for tuning)."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if tiles is None:
        tiles = tiles_for(compute_capability(query), head_dim, query.dtype, block_size)
    if grad_out.stride(-1) != 1 and head_dim > 1:
        grad_out = grad_out.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    delta_kernel[(triton.cdiv(num_queries, DELTA_ROWS), batch * heads)](
        out, grad_out, lse, grad_lse.contiguous(), lse2, delta, *out.stride()[:3], *grad_out.stride()[:3], heads,
        num_queries, ROWS=DELTA_ROWS, D=head_dim, BLOCK_D=padded_head_dim(head_dim), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    valid = as_bytes(key_valid)
    lengths = (num_queries, num_keys)
    scales = (scale, scale * LOG2_E)
    forms = (causal, key_valid is not None)
    inputs = (query, key, value, grad_out, lse2, delta)
    strides = [s for x in (query, key, value, grad_out) for s in x.stride()[:3]]

    grad_query = torch.empty_like(query)
    index, plain, masked = split_index(block_index, block_count, block_size, lengths, causal)
    rows, tile = index.shape[2], tiles[0]
    grad_query_kernel[(batch * heads * rows * (block_size[0] // tile.m),)](
        *inputs, grad_query, index, plain, masked, valid, *strides, *grad_query.stride()[:3], *list_steps(index),
        heads, heads // key_heads, num_queries, num_keys, rows, index.shape[3], *scales,
        **_constexprs(tile, block_size, head_dim, query.dtype, *forms, *key_layout(key, value)),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
    )  # fmt: skip

    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    rows, tile = -(-num_keys // block_size[1]), tiles[1]
    index, plain = transpose_index(block_index, block_count, rows)
    if causal:
        index, plain, masked = split_transposed_index(index, plain, block_size, lengths)
    grad_key_value_kernel[(batch * key_heads * rows * (block_size[1] // tile.n),)](
        *inputs, grad_key, grad_value, index, plain, masked if causal else None, valid, *strides,
        *grad_key.stride()[:3], *grad_value.stride()[:3], *list_steps(index), heads, heads // key_heads, num_queries,
        num_keys, rows, index.shape[3], *scales,
        **_constexprs(tile, block_size, head_dim, query.dtype, *forms, *key_layout(query, grad_out)),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _constexprs(
    tile: Tile,
    block_size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    has_valid: bool,
    same_strides: bool = True,
    wide: bool = False,
) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "HAS_VALID": has_valid,
        "SAME_STRIDES": same_strides,
        "WIDE": wide,
        **tile_constexprs(tile, block_size, head_dim, dtype),
    }


def aot_cases(cc: int) -> list[AotCase]:
    """The kernels as the launcher would call them on compute capability ``cc``."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    scalars = dict.fromkeys(("softmax_scale", "scale"), "fp32")
    rows = dict.fromkeys(("Lse2", "Delta"), "fp32")
    constexprs = {"ROWS": DELTA_ROWS, "D": 128, "BLOCK_D": 128}
    cases = [
        make_case(
            "delta bf16 D128", delta_kernel, constexprs,
            {"Out": "bf16", "GradOut": "bf16", "Lse": "fp32", "GradLse": "fp32"} | rows,
        )
    ]  # fmt: skip
    for name, head_dim, block, causal, has_valid in [
        ("bf16", 128, 128, False, False),
        ("bf16", 128, 128, True, True),
        ("bf16", 64, 128, False, False),
        ("fp16", 80, 64, True, False),
        ("bf16", 256, 128, False, False),
        ("fp32", 64, 64, False, False),
    ]:
        tiles = tiles_for(cc, head_dim, dtypes[name], (block, block))
        title = f"{name} D{head_dim} block {block}{' causal' * causal}{' key_valid' * has_valid}"
        inputs = dict.fromkeys(("Query", "Key", "Value", "GradOut"), name) | {"KeyValid": "u8"} | scalars | rows
        for kernel, tile, outputs in (
            (grad_query_kernel, tiles[0], ("GradQuery",)),
            (grad_key_value_kernel, tiles[1], ("GradKey", "GradValue")),
        ):
            values = _constexprs(tile, (block, block), head_dim, dtypes[name], causal, has_valid)
            types = inputs | dict.fromkeys(outputs, name)
            label = f"{kernel.__name__} {title}"
            cases.append(make_case(label, kernel, values, types, tile.num_warps, tile.num_stages))
    return cases
