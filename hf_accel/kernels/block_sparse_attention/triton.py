"""Block-sparse attention on a GPU: tile sizes, the forward kernel and its launcher.

Flash attention's forward pass whose key tiles come from a list of blocks per row of query blocks. The backward
pass is in ``triton_backward.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.block_sparse_attention import triton_approximate, triton_backward
from hf_accel.kernels.block_sparse_attention.index import split_index
from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.block_list import (
    block_ahead,
    find_block,
    first_block,
    list_row,
    list_steps,
    locate_tile,
    rows_that_count,
    tile_constexprs,
    tile_rows,
)
from hf_accel.kernels.common.online_softmax import attend_rows, finish
from hf_accel.kernels.common.tile import LOG2_E, Tile, as_bytes, attention_tiles, compute_capability, key_layout


def tile_for(cc: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]) -> Tile:
    """The tile for compute capability ``cc`` (0: the interpreter); it divides the block."""
    large, small = attention_tiles(cc, head_dim, dtype)
    tile = large if large.m <= block_size[0] else small
    return replace(tile, n=min(tile.n, block_size[1]))


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_query_blocks", "max_keep", "scale"])
def forward_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, Hkv, Sk, D]
    Value,
    Out,  # [B, H, Sq, D]
    Lse,  # fp32 [B, H, Sq], natural logarithm
    BlockIndex,  # int32, rows of max_keep entries
    BlockCount,  # int32; if CAUSAL, of the blocks that no diagonal crosses, which come first
    MaskedCount,  # int32, of the blocks that it crosses, which follow; unused unless CAUSAL
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
    stride_ob,
    stride_oh,
    stride_os,
    index_batch_step,  # rows of blocks from one batch (head) to the next in BlockIndex; 0 where they share
    index_head_step,
    num_heads,
    heads_per_key_head,
    num_queries,
    num_keys,
    num_query_blocks,
    max_keep,
    scale,  # softmax scale times log2(e)
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # rows of K and V are equally far apart: one offset serves both
    WIDE: tl.constexpr,
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
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    if SAME_STRIDES:
        stride_vs = stride_ks
    row = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    element = (row[:, None] < num_queries) & (d[None, :] < D)
    query_offsets = batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qs + d[None, :]
    query = tl.load(Query + query_offsets, mask=element, other=0.0)

    index_row = list_row(batch, head, tile, index_batch_step, index_head_step, QUERY_BLOCK, BLOCK_M)
    count = tl.minimum(tl.load(BlockCount + index_row), max_keep)
    BlockIndex += index_row * max_keep
    # Only the last key block can be ragged. It is found first and taken after the others, wherever it
    # stands in the list, so that no other tile needs a mask.
    ragged = count
    last_full = num_keys // KEY_BLOCK
    if num_keys % KEY_BLOCK != 0 and not CAUSAL:
        ragged = find_block(BlockIndex, count, last_full)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    tiles = (count - (ragged < count).to(tl.int32)) * KEY_TILES
    block = first_block(BlockIndex, tiles, ragged)
    for t in range(0, tiles):
        key_row = tile_rows(block, t, KEY_BLOCK, BLOCK_N)
        block = block_ahead(BlockIndex, t, tiles, KEY_BLOCK, BLOCK_N, ragged)
        counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID, True)
        row_max, row_sum, acc = attend_rows(
            query, Key, Value, key_row, counts, row_max, row_sum, acc, stride_ks, stride_vs, scale,
            HAS_VALID, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if CAUSAL:
        last_seen = row + num_keys - num_queries
        end = tl.minimum(first + BLOCK_M + num_keys - num_queries, num_keys)
        for entry in range(count, count + tl.load(MaskedCount + index_row)):
            first_key = tl.load(BlockIndex + entry) * KEY_BLOCK
            for first_key_of_tile in range(first_key, tl.minimum(first_key + KEY_BLOCK, end), BLOCK_N):
                key_row = first_key_of_tile + column
                counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
                row_max, row_sum, acc = attend_rows(
                    query, Key, Value, key_row, counts, row_max, row_sum, acc, stride_ks, stride_vs, scale,
                    True, WIDE, D, BLOCK_D, PRECISION, last_seen, True,
                )  # fmt: skip
    if ragged < count:
        for first_key in range(last_full * KEY_BLOCK, num_keys, BLOCK_N):
            key_row = first_key + column
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            row_max, row_sum, acc = attend_rows(
                query, Key, Value, key_row, counts, row_max, row_sum, acc, stride_ks, stride_vs, scale,
                True, WIDE, D, BLOCK_D, PRECISION,
            )  # fmt: skip

    out, lse = finish(row_max, row_sum, acc)
    out_offsets = batch * stride_ob + head * stride_oh + row[:, None].to(tl.int64) * stride_os + d[None, :]
    tl.store(Out + out_offsets, out.to(Out.dtype.element_ty), mask=element)
    tl.store(Lse + group * num_queries + row, lse, mask=row < num_queries)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel on validated inputs; ``tile`` replaces the table's choice (for tuning)."""
    batch, heads, num_queries, head_dim = query.shape
    if tile is None:
        tile = tile_for(compute_capability(query), head_dim, query.dtype, block_size)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    masked_count = None
    if causal:
        lengths = (num_queries, key.shape[2])
        block_index, block_count, masked_count = split_index(block_index, block_count, block_size, lengths, causal)
    num_query_blocks, max_keep = block_index.shape[2:]
    grid = (batch * heads * num_query_blocks * (block_size[0] // tile.m),)
    forward_kernel[grid](
        query, key, value, out, lse, block_index.contiguous(), block_count.contiguous(), masked_count,
        as_bytes(key_valid),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *list_steps(block_index), heads, heads // key.shape[1], num_queries, key.shape[2], num_query_blocks, max_keep,
        scale * LOG2_E,
        **_constexprs(tile, block_size, head_dim, query.dtype, causal, key_valid is not None, *key_layout(key, value)),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


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
    """The kernel as the launcher would call it on compute capability ``cc``."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = []
    for name, head_dim, block, causal, has_valid in [
        ("bf16", 128, 128, False, False),
        ("bf16", 128, 128, False, True),
        ("bf16", 128, 128, True, True),
        ("bf16", 128, 64, False, False),
        ("bf16", 64, 128, False, False),
        ("fp16", 80, 64, True, False),
        ("bf16", 256, 128, False, False),
        ("fp32", 64, 64, False, False),
    ]:
        tile = tile_for(cc, head_dim, dtypes[name], (block, block))
        cases.append(
            make_case(
                f"{name} D{head_dim} block {block}{' causal' * causal}{' key_valid' * has_valid}",
                forward_kernel,
                _constexprs(tile, (block, block), head_dim, dtypes[name], causal, has_valid),
                dict.fromkeys(("Query", "Key", "Value", "Out"), name)
                | {"Lse": "fp32", "scale": "fp32", "KeyValid": "u8"},
                tile.num_warps,
                tile.num_stages,
            )
        )
    return cases + triton_backward.aot_cases(cc) + triton_approximate.aot_cases(cc)
