"""Block-sparse attention with INT8 scores and with skipped value products, on a GPU; inference only.

Three kernels bring queries, keys and values into the formats of ``quantize.py``, in one pass each; the fourth is the
forward kernel with the roundings of SageAttention2 (arXiv 2411.10958) and the second filter of SpargeAttention
(arXiv 2502.18137, section 3.5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.block_sparse_attention import quantize
from hf_accel.kernels.block_sparse_attention.index import split_index
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
from hf_accel.kernels.common.online_softmax import finish
from hf_accel.kernels.common.tile import (
    LOG2_E,
    Tile,
    as_bytes,
    attention_tiles,
    compute_capability,
    key_layout,
    padded_head_dim,
)

UNSPECIALIZED = ["num_heads", "num_queries", "num_keys", "num_query_blocks", "max_keep", "scale", "threshold"]


def tile_for(cc: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int], int8: bool) -> Tile:
    """The tile for compute capability ``cc`` (0: the interpreter); it divides the block."""
    if cc == 0:
        return Tile(32, 32, 4, 1)
    large, small = attention_tiles(cc, head_dim, torch.float16 if int8 else dtype)
    tile = large if large.m <= block_size[0] else small
    return replace(tile, n=min(tile.n, 64 if cc == 90 else tile.n, block_size[1]))


@triton.jit(do_not_specialize=["num_heads", "num_rows"])
def quantize_kernel(
    X,  # [B, H, S, D]
    Mean,  # fp32 [B, Hkv, D]
    RowValid,  # uint8 [B, S]; unused unless HAS_VALID
    Out,  # int8 [B, H, blocks * BLOCK, BLOCK_D]
    Scale,  # fp32 [B, H, blocks]
    MeanScore,  # fp32 [B, H, S]; unused if CENTRE
    stride_xb,
    stride_xh,
    stride_xs,
    num_heads,
    heads_per_key_head,
    num_rows,
    CENTRE: tl.constexpr,  # keys: subtract the mean; queries: store the score on it
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """INT8 with one scale per block of tokens; one program per block."""
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = group // num_heads
    head = group % num_heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    counts = row < num_rows
    if HAS_VALID:
        counts = tl.load(RowValid + batch * num_rows + row, mask=counts, other=0) != 0
    element = counts[:, None] & (d[None, :] < D)
    offsets = batch * stride_xb + head * stride_xh + row[:, None].to(tl.int64) * stride_xs + d[None, :]
    x = tl.load(X + offsets, mask=element, other=0.0).to(tl.float32)
    mean_row = (batch * (num_heads // heads_per_key_head) + head // heads_per_key_head) * D
    mean = tl.load(Mean + mean_row + d, mask=d < D, other=0.0)
    if CENTRE:
        x = tl.where(element, x - mean[None, :], 0.0)
    else:
        tl.store(MeanScore + group * num_rows + row, tl.sum(x * mean[None, :], 1), mask=row < num_rows)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    step = tl.where(largest > 0, largest / 127.0, 1.0)
    scaled = x / step
    rounded = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int8)
    blocks = tl.num_programs(0)
    tl.store(Scale + group * blocks + block, step)
    tl.store(Out + (group * blocks * BLOCK + row[:, None]) * BLOCK_D + d[None, :], rounded)


@triton.jit(do_not_specialize=["num_heads", "num_rows"])
def quantize_value_kernel(
    Value,  # [B, Hkv, S, D]
    Scale,  # fp32 [B, Hkv, D]
    RowValid,  # uint8 [B, S]; unused unless HAS_VALID
    Out,  # fp8 or fp16 [B, Hkv, BLOCK_D, blocks * BLOCK]
    stride_vb,
    stride_vh,
    stride_vs,
    num_heads,
    num_rows,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Values by channel, transposed: Hopper multiplies FP8 only along contiguous memory. One program per block."""
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = group // num_heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    counts = row < num_rows
    if HAS_VALID:
        counts = tl.load(RowValid + batch * num_rows + row, mask=counts, other=0) != 0
    element = counts[:, None] & (d[None, :] < D)
    offsets = batch * stride_vb + group % num_heads * stride_vh + row[:, None].to(tl.int64) * stride_vs + d[None, :]
    value = tl.load(Value + offsets, mask=element, other=0.0).to(tl.float32)
    scale = tl.load(Scale + group * D + d, mask=d < D, other=1.0)
    value = tl.trans(value / scale[None, :]).to(Out.dtype.element_ty)
    length = tl.num_programs(0) * BLOCK
    tl.store(Out + (group * BLOCK_D + d[:, None]) * length + row[None, :], value)


@triton.jit
def _attend_tile(
    query,  # [BLOCK_M, BLOCK_D], INT8 or the dtype of Key
    inside,  # [BLOCK_M] bool: queries that exist
    Key,
    Value,
    rows,  # [BLOCK_N]
    counts,  # [BLOCK_N] bool; read only if MASKED
    last_seen,  # [BLOCK_M]; read only if CAUSAL
    factor,  # from a product to a score in base 2, positive
    threshold,
    row_max,
    row_sum,
    acc,
    stride_ks,
    stride_vs,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    INT8: tl.constexpr,
    SKIP: tl.constexpr,
    WEIGHT_SHIFT: tl.constexpr,
    IMPRECISE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one tile of keys. With SKIP, a tile far below the running maximum adds nothing."""
    d = tl.arange(0, BLOCK_D)
    # What was quantized is padded with zeros, in both directions.
    element = tl.full([1, BLOCK_D], 1, tl.int1) if INT8 else d[None, :] < D
    if MASKED and not INT8:
        element = element & counts[:, None]
    key_pointers = (Key + d)[None, :] + (rows * stride_ks)[:, None]
    if INT8:
        key = tl.load(key_pointers)
        scores = tl.dot(query, tl.trans(key)).to(tl.float32)
    else:
        key = tl.load(key_pointers, mask=element, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(counts[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(rows[None, :] <= last_seen[:, None], scores, float("-inf"))
    tile_max = tl.max(scores, 1) * factor
    needed = True
    if SKIP:
        rise = tl.where((tile_max == float("-inf")) | (inside == 0), float("-inf"), tile_max - row_max)
        # As a matrix: Triton 3.6 cannot reduce a vector whose layout comes from Blackwell's tensor memory.
        needed = tl.max(rise[:, None]) + threshold > 0
    if needed:
        if INT8:
            value = tl.trans(tl.load((Value + rows)[None, :] + (d.to(rows.dtype) * stride_vs)[:, None]))
        else:
            value = tl.load((Value + d)[None, :] + (rows * stride_vs)[:, None], mask=element, other=0.0)
        new_max = tl.maximum(row_max, tile_max)
        base = new_max
        if MASKED:
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(scores * factor - (base - WEIGHT_SHIFT)[:, None])
        shrink = tl.math.exp2(row_max - base)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        if IMPRECISE > 0:
            # Hopper adds FP8 products with 14 bits: no further than one tile.
            acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], max_num_imprecise_acc=IMPRECISE)
        else:
            acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def approximate_kernel(
    Query,  # [B, H, Sq, D]; if INT8 [B, H, nq * QUERY_BLOCK, BLOCK_D]
    Key,  # [B, Hkv, Sk, D]; if INT8 [B, Hkv, nk * KEY_BLOCK, BLOCK_D]
    Value,  # [B, Hkv, Sk, D]; if INT8 transposed, [B, Hkv, BLOCK_D, nk * KEY_BLOCK]
    Out,  # [B, H, Sq, D]
    Lse,  # fp32 [B, H, Sq], natural logarithm
    QueryScale,  # fp32 [B, H, nq]; this and the next three are read only if INT8
    KeyScale,  # fp32 [B, Hkv, nk]
    ValueScale,  # fp32 [B, Hkv, D]
    MeanScore,  # fp32 [B, H, Sq], without the softmax scale
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
    num_key_blocks,
    max_keep,
    scale,  # softmax scale times log2(e)
    threshold,  # log2 units
    CAUSAL: tl.constexpr,
    HAS_VALID: tl.constexpr,
    INT8: tl.constexpr,
    SKIP: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHT_SHIFT: tl.constexpr,
    IMPRECISE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (head, query tile), as the exact forward kernel."""
    KEY_TILES: tl.constexpr = KEY_BLOCK // BLOCK_N
    group, tile = locate_tile(num_query_blocks, QUERY_BLOCK, BLOCK_M)
    first = tile * BLOCK_M
    if first >= num_queries:
        return
    batch = group // num_heads
    head = group % num_heads
    key_head = head // heads_per_key_head
    key_group = batch * (num_heads // heads_per_key_head) + key_head
    Key += batch * stride_kb + key_head * stride_kh
    Value += batch * stride_vb + key_head * stride_vh
    row = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = row < num_queries
    far_row = row[:, None].to(tl.int64)
    query_pointers = Query + batch * stride_qb + head * stride_qh + far_row * stride_qs + d[None, :]
    factor_of_row = scale
    if INT8:
        query = tl.load(query_pointers)
        factor_of_row = scale * tl.load(QueryScale + group * num_query_blocks + first // QUERY_BLOCK)
    else:
        query = tl.load(query_pointers, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    last_seen = row + num_keys - num_queries

    index_row = list_row(batch, head, tile, index_batch_step, index_head_step, QUERY_BLOCK, BLOCK_M)
    plain = tl.load(PlainCount + index_row)
    masked = tl.load(MaskedCount + index_row)
    BlockIndex += index_row * max_keep
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    tiles = plain * KEY_TILES
    block = first_block(BlockIndex, tiles)
    for t in range(0, tiles):
        key_row = tile_rows(block, t, KEY_BLOCK, BLOCK_N)
        if WIDE:
            key_row = key_row.to(tl.int64)
        factor = factor_of_row
        if INT8:
            factor = factor_of_row * tl.load(KeyScale + key_group * num_key_blocks + block)
        block = block_ahead(BlockIndex, t, tiles, KEY_BLOCK, BLOCK_N)
        counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID, True)
        row_max, row_sum, acc = _attend_tile(
            query, inside, Key, Value, key_row, counts, last_seen, factor, threshold, row_max, row_sum, acc,
            stride_ks, stride_vs, HAS_VALID, False, INT8, SKIP, WEIGHT_SHIFT, IMPRECISE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    end = num_keys
    if CAUSAL:
        end = tl.minimum(first + BLOCK_M + num_keys - num_queries, num_keys)
    for entry in range(plain, plain + masked):
        block = tl.load(BlockIndex + entry)
        factor = factor_of_row
        if INT8:
            factor = factor_of_row * tl.load(KeyScale + key_group * num_key_blocks + block)
        first_key = block * KEY_BLOCK
        for first_key_of_tile in range(first_key, tl.minimum(first_key + KEY_BLOCK, end), BLOCK_N):
            key_row = first_key_of_tile + column
            if WIDE:
                key_row = key_row.to(tl.int64)
            counts = rows_that_count(KeyValid, batch, key_row, num_keys, HAS_VALID)
            row_max, row_sum, acc = _attend_tile(
                query, inside, Key, Value, key_row, counts, last_seen, factor, threshold, row_max, row_sum, acc,
                stride_ks, stride_vs, True, CAUSAL, INT8, SKIP, WEIGHT_SHIFT, IMPRECISE, D, BLOCK_D, PRECISION,
            )  # fmt: skip

    out, lse = finish(row_max - WEIGHT_SHIFT, row_sum, acc)
    if INT8:
        out = out * tl.load(ValueScale + key_group * D + d, mask=d < D, other=0.0)[None, :]
        # The scores were those of keys less their mean.
        mean_score = tl.load(MeanScore + group * num_queries + row, mask=inside, other=0.0)
        lse += mean_score * (scale * 0.6931471805599453)
    out_offsets = batch * stride_ob + head * stride_oh + far_row * stride_os + d[None, :]
    tl.store(Out + out_offsets, out.to(Out.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))
    tl.store(Lse + group * num_queries + row, lse, mask=inside)


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
    *,
    int8: bool = True,
    pv_threshold: float | None = None,
    value_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels on validated inputs; ``value_dtype`` and ``tile`` replace the device's own."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    cc = compute_capability(query)
    if tile is None:
        tile = tile_for(cc, head_dim, query.dtype, block_size, int8)
    valid = as_bytes(key_valid)
    dtype = value_dtype or quantize.value_dtype(cc)
    scales: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    rows = -(-num_queries // block_size[0])
    operands = (query, key, value)
    if int8:
        operands, scales = _quantize(query, key, value, key_valid, valid, block_size, dtype)
    lengths = (num_queries, num_keys)
    index, plain, masked = split_index(block_index, block_count, block_size, lengths, causal)
    approximate_kernel[(batch * heads * rows * (block_size[0] // tile.m),)](
        *operands, out, lse, *scales, index, plain, masked, valid,
        *[s for x in operands for s in x.stride()[:3]], *out.stride()[:3],
        *list_steps(index), heads, heads // key_heads, num_queries, num_keys, rows, -(-num_keys // block_size[1]),
        index.shape[3], scale * LOG2_E, float(pv_threshold or 0.0),
        **_constexprs(
            tile, block_size, head_dim, query.dtype, causal, key_valid is not None, int8, pv_threshold is not None,
            dtype, key_layout(*operands[1:])[1],
        ),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def _quantize(query, key, value, key_valid, valid, block_size, dtype):
    """``(query, key, value)`` as the attention kernel takes them, and its four tables of scales."""
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    padded = _padded(head_dim, True)
    mean = quantize.mean_key(key, key_valid).contiguous()
    mean_score = lse_like = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    operands, scales = [], []
    for x, block, centre in ((query, block_size[0], False), (key, block_size[1], True)):
        count = -(-x.shape[2] // block)
        out = x.new_empty((*x.shape[:2], count * block, padded), dtype=torch.int8)
        scale = x.new_empty((*x.shape[:2], count), dtype=torch.float32)
        quantize_kernel[(count, batch * x.shape[1])](
            x, mean, valid, out, scale, lse_like, *x.stride()[:3], x.shape[1], x.shape[1] // key_heads, x.shape[2],
            CENTRE=centre, HAS_VALID=centre and valid is not None, BLOCK=block, D=head_dim, BLOCK_D=padded,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        operands.append(out)
        scales.append(scale)
    counted = value if key_valid is None else value.masked_fill(~key_valid[:, None, :, None], 0)
    value_scale = quantize.value_scale(counted, dtype).contiguous()
    count = -(-num_keys // block_size[1])
    out = value.new_empty((batch, key_heads, padded, count * block_size[1]), dtype=dtype)
    quantize_value_kernel[(count, batch * key_heads)](
        value, value_scale, valid, out, *value.stride()[:3], key_heads, num_keys, HAS_VALID=valid is not None,
        BLOCK=block_size[1], D=head_dim, BLOCK_D=padded, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return (*operands, out), (*scales, value_scale, mean_score)


def _padded(head_dim: int, int8: bool) -> int:
    # Eight-bit products are summed over at least 32 channels.
    return max(32 if int8 else 16, padded_head_dim(head_dim))


def _constexprs(
    tile: Tile,
    block_size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    has_valid: bool,
    int8: bool,
    skip: bool,
    value_dtype: torch.dtype,
    wide: bool = False,
) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "HAS_VALID": has_valid,
        "INT8": int8,
        "SKIP": skip,
        "WIDE": wide,
        "WEIGHT_SHIFT": quantize.WEIGHT_SHIFT[value_dtype] if int8 else 0.0,
        "IMPRECISE": tile.n if int8 and value_dtype == torch.float8_e4m3fn else 0,
        **tile_constexprs(tile, block_size, head_dim, dtype),
        "BLOCK_D": _padded(head_dim, int8),
    }


def aot_cases(cc: int) -> list[AotCase]:
    """The kernels as the launcher would call them on compute capability ``cc``."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    value_dtype = quantize.value_dtype(cc)
    stored = "fp8e4nv" if value_dtype == torch.float8_e4m3fn else "fp16"
    tables = dict.fromkeys(("QueryScale", "KeyScale", "ValueScale", "MeanScore"), "fp32")
    common = {"Lse": "fp32", "scale": "fp32", "threshold": "fp32", "KeyValid": "u8"} | tables
    shape = {"HAS_VALID": False, "BLOCK": 128, "D": 128, "BLOCK_D": 128}
    types = {"X": "bf16", "Mean": "fp32", "RowValid": "u8", "Out": "i8", "Scale": "fp32", "MeanScore": "fp32"}
    value_types = {"Value": "bf16", "Scale": "fp32", "RowValid": "u8", "Out": stored}
    cases = [
        make_case(f"quantize centre={centre}", quantize_kernel, shape | {"CENTRE": centre}, types, 8)
        for centre in (False, True)
    ]
    cases.append(make_case(f"quantize value {stored}", quantize_value_kernel, shape, value_types, 8))
    for name, head_dim, block, causal, has_valid, int8, skip in [
        ("bf16", 128, (128, 128), False, False, True, False),
        ("bf16", 128, (128, 64), False, False, True, True),
        ("bf16", 64, (128, 64), True, True, True, True),
        ("fp16", 80, (64, 64), False, False, True, True),
        ("bf16", 256, (128, 128), False, False, True, False),
        ("bf16", 128, (128, 128), False, False, False, True),
    ]:
        tile = tile_for(cc, head_dim, dtypes[name], block, int8)
        values = _constexprs(tile, block, head_dim, dtypes[name], causal, has_valid, int8, skip, value_dtype)
        inputs = (
            {"Query": "i8", "Key": "i8", "Value": stored} if int8 else dict.fromkeys(("Query", "Key", "Value"), name)
        )
        words = " int8" * int8 + " skip" * skip + " causal" * causal + " key_valid" * has_valid
        title = f"approximate {name} D{head_dim} blocks {block[0]}x{block[1]}{words}"
        kinds = common | inputs | {"Out": name}
        cases.append(make_case(title, approximate_kernel, values, kinds, tile.num_warps, tile.num_stages))
    return cases
