"""Paged prefix attention on a GPU.

A denoising step has few query rows and a long prefix, so everything here is bound by reading keys and values once.
All rows of the query heads that share a KV head form one tile, so each key is read once per KV head; the keys are split
over as many programs as fill the GPU, and the parts are joined by their log-sum-exp (Flash-Decoding).

Key tiles are addressed row by row, so a page list costs one small load per tile, and neither pages nor their size need
to match the tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.online_softmax import add_scores, attend_rows, finish, load_rows
from hf_accel.kernels.common.tile import LOG2_E, Tile, as_bytes, compute_capability, key_layout, precision
from hf_accel.kernels.paged_attention.layout import AOT_KINDS, AOT_SHAPES, block_tile, packed_rows, prefix_tile
from hf_accel.kernels.paged_attention.triton_merge import combine

INTERPRETER_PROGRAMS = 4  # of "the GPU" that splits are made for where there is none


@triton.jit(do_not_specialize=["num_rows", "num_keys", "list_width"])
def prefix_kernel(
    Query,  # [B, Hq, A, D]
    Key,  # [B, Hkv, P, D]
    Value,  # [B, Hkv, P, D]
    Valid,  # uint8 [B, P]; unused unless HAS_VALID
    Pages,  # int32 [B, Hkv, M]; unused unless LISTED
    Counts,  # int32 [B, Hkv]; unused unless LISTED
    Out,  # fp32 [splits, B, Hq, A, D]
    Lse,  # fp32 [splits, B, Hq, A]
    stride_qb,
    stride_qh,
    stride_qa,
    stride_kb,
    stride_kh,
    stride_kp,
    stride_vb,
    stride_vh,
    stride_vp,
    num_kv_heads,
    num_rows,
    num_keys,
    list_width,
    scale,  # softmax scale times log2(e)
    GROUP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    LISTED: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    cell = tl.program_id(1).to(tl.int64)
    batch, kv_head = cell // num_kv_heads, cell % num_kv_heads
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < GROUP * num_rows
    head, token = packed_rows(row, kv_head, GROUP, num_rows)
    d = tl.arange(0, BLOCK_D)
    at = batch * stride_qb + head * stride_qh + token.to(tl.int64) * stride_qa
    query = tl.load(Query + at[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)

    Key += batch * stride_kb + kv_head * stride_kh
    Value += batch * stride_vb + kv_head * stride_vh
    keys = num_keys
    if LISTED:
        Pages += cell * list_width
        listed = tl.load(Counts + cell)
        # Lists ascend, so only their last page can be the cache's partial one.
        last = tl.load(Pages + tl.maximum(listed - 1, 0))
        keys = tl.where(listed > 0, listed * PAGE - tl.maximum((last + 1) * PAGE - num_keys, 0), 0)
    tiles = tl.cdiv(keys, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(0))
    first = split * share
    stop = tl.minimum(first + share, tiles)
    whole = tl.minimum(stop, keys // BLOCK_N)  # tiles that need no mask
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lane = tl.arange(0, BLOCK_N)
    place = first * BLOCK_N + lane
    page = place
    if LISTED:
        page = tl.load(Pages + place // PAGE, mask=place < keys, other=0)
    for tile in range(first, whole):
        place = tile * BLOCK_N + lane
        rows = place
        if LISTED:
            rows = page * PAGE + place % PAGE
            # One tile ahead: an index that is loaded where it is used would take a stage of the pipeline for itself.
            ahead = place + BLOCK_N
            page = tl.load(Pages + ahead // PAGE, mask=ahead < keys, other=0)
        counts = place < keys
        if HAS_VALID:
            counts = tl.load(Valid + batch * num_keys + rows) != 0
        row_max, row_sum, acc = attend_rows(
            query, Key, Value, rows, counts, row_max, row_sum, acc, stride_kp, stride_vp, scale,
            HAS_VALID, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if whole < stop:  # the last tile of all, not full
        place = whole * BLOCK_N + lane
        counts = place < keys
        rows = place
        if LISTED:
            rows = page * PAGE + place % PAGE
        if HAS_VALID:
            counts = counts & (tl.load(Valid + batch * num_keys + rows, mask=counts, other=0) != 0)
        row_max, row_sum, acc = attend_rows(
            query, Key, Value, rows, counts, row_max, row_sum, acc, stride_kp, stride_vp, scale,
            True, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    out, lse = finish(row_max, row_sum, acc)
    num_batches = tl.num_programs(1) // num_kv_heads
    line = ((split * num_batches + batch) * num_kv_heads * GROUP + head) * num_rows + token
    tl.store(Out + line[:, None] * D + d[None, :], out, mask=real[:, None] & (d[None, :] < D))
    tl.store(Lse + line, lse, mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def merge_block_kernel(
    Query,  # [B, Hq, b, D]
    Key,  # [B, Hkv, b, D]
    Value,  # [B, Hkv, b, D]
    Mask,  # uint8, strides below; unused unless HAS_MASK
    PrefixOut,  # fp32 [B, Hq, b, D]
    PrefixLse,  # fp32 [B, Hq, b]
    Out,  # [B, Hq, b, D]
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kr,
    stride_vb,
    stride_vh,
    stride_vr,
    mask_step_b,
    mask_step_h,
    mask_step_r,
    mask_step_k,
    num_heads,
    num_rows,
    scale,  # softmax scale times log2(e)
    GROUP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over the block's own keys, begun from the state in which the prefix left it."""
    cell = tl.program_id(0).to(tl.int64)
    batch, head = cell // num_heads, cell % num_heads
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < num_rows
    d = tl.arange(0, BLOCK_D)
    element = real[:, None] & (d[None, :] < D)
    at = batch * stride_qb + head * stride_qh + row.to(tl.int64) * stride_qr
    query = tl.load(Query + at[:, None] + d[None, :], mask=element, other=0.0)
    Key += batch * stride_kb + (head // GROUP) * stride_kh
    Value += batch * stride_vb + (head // GROUP) * stride_vh
    line = cell * num_rows + row
    row_max = tl.load(PrefixLse + line, mask=real, other=float("-inf")) * 1.4426950408889634
    row_sum = tl.where(row_max > float("-inf"), 1.0, 0.0)
    acc = tl.load(PrefixOut + line[:, None] * D + d[None, :], mask=element, other=0.0)
    acc = tl.where(row_max[:, None] > float("-inf"), acc, 0.0)
    lane = tl.arange(0, BLOCK_N)
    for start in range(0, num_rows, BLOCK_N):
        rows = start + lane
        counts = rows < num_rows
        key, value = load_rows(Key, Value, rows, counts, stride_kr, stride_vr, True, False, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        seen = real[:, None] & counts[None, :]
        if HAS_MASK:
            place = batch * mask_step_b + head * mask_step_h
            place = place + row[:, None] * mask_step_r + rows[None, :] * mask_step_k
            seen = seen & (tl.load(Mask + place, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        row_max, row_sum, acc = add_scores(scores, value, row_max, row_sum, acc, scale, True, PRECISION)
    out, _ = finish(row_max, row_sum, acc)
    tl.store(Out + line[:, None] * D + d[None, :], out.to(Out.dtype.element_ty), mask=element)


# -- splits ----------------------------------------------------------------------------------------------


def splits_for(tensor: torch.Tensor, cells: int, tiles: int) -> int:
    """Programs per cell (batch item, KV head, tile of rows) over ``tiles`` of keys: two per multiprocessor in all, each
    with at least two tiles. From shapes alone, so that a captured graph stays right."""
    if tensor.is_cuda:
        wanted = 2 * torch.cuda.get_device_properties(tensor.device).multi_processor_count
    else:
        wanted = INTERPRETER_PROGRAMS
    return max(1, min(triton.cdiv(wanted, cells), tiles // 2))


# -- launchers -----------------------------------------------------------------------------------------------------


def page_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    page_size: int,
    scale: float,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package."""
    batch, heads, rows, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = q.new_empty(q.shape, dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    width = 0 if pages is None else pages.shape[-1]
    most = keys if pages is None else min(keys, width * page_size)
    if not out.numel():
        return out, lse
    if most == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    group = heads // kv_heads
    tile = prefix_tile(compute_capability(q), group * rows, head_dim, q.dtype)
    row_tiles = triton.cdiv(group * rows, tile.m)
    splits = splits_for(q, batch * kv_heads * row_tiles, triton.cdiv(most, tile.n))
    parts = out if splits == 1 else out.new_empty(splits, *out.shape)
    part_lse = lse if splits == 1 else lse.new_empty(splits, *lse.shape)
    prefix_kernel[(splits, batch * kv_heads, row_tiles)](
        q,
        k,
        v,
        as_bytes(valid),
        pages,
        counts,
        parts,
        part_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        kv_heads,
        rows,
        keys,
        width,
        scale * LOG2_E,
        **_prefix_constexprs(group, valid is not None, pages is not None, page_size, k, v, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        combine(parts, part_lse, out, lse)
    return out, lse


def _prefix_constexprs(
    group: int, has_valid: bool, listed: bool, page_size: int, k: torch.Tensor, v: torch.Tensor, tile: Tile
) -> dict[str, Any]:
    return _prefix_shape(group, has_valid, listed, page_size, k.shape[-1], k.dtype, tile, key_layout(k, v)[1])


def _prefix_shape(
    group: int,
    has_valid: bool,
    listed: bool,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    tile: Tile,
    wide: bool = False,
) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HAS_VALID": has_valid,
        "LISTED": listed,
        "PAGE": page_size if listed else 1,
        "WIDE": wide,
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "PRECISION": precision(dtype),
    }


def block_merge(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """See the package."""
    batch, heads, rows, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    tile = block_tile(compute_capability(q), rows, head_dim, q.dtype)
    seen = None if mask is None else mask.expand(batch, heads, rows, rows)
    merge_block_kernel[(batch * heads, triton.cdiv(rows, tile.m))](
        q,
        k,
        v,
        None if seen is None else seen.view(torch.uint8),
        prefix_out.contiguous(),
        prefix_lse.contiguous(),
        out,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0, 0, 0) if seen is None else seen.stride()),
        heads,
        rows,
        scale * LOG2_E,
        GROUP=heads // k.shape[1],
        HAS_MASK=seen is not None,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PRECISION=precision(q.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out


def aot_cases(cc: int) -> list[AotCase]:
    """Every kernel with the tiles that are picked on ``cc``: SDAR's heads (g 4, D 128) with few and with all rows,
    DiffusionGemma's full layers (D 512), odd head dims, fp32."""
    from hf_accel.kernels.paged_attention import triton_selection, triton_union

    fp32 = dict.fromkeys(("Out", "Lse", "PrefixOut", "PrefixLse"), "fp32")
    masks = {"Valid": "u8", "Mask": "u8", "scale": "fp32"}
    cases = triton_selection.aot_cases(cc) + triton_union.aot_cases(cc)
    for shape in AOT_SHAPES:
        dtype, head_dim, group, rows, valid, listed = shape
        kind = AOT_KINDS[dtype]
        label = f"{kind} D{head_dim} g{group} rows {rows}"
        tile, block = prefix_tile(cc, group * rows, head_dim, dtype), block_tile(cc, rows, head_dim, dtype)
        sizes = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
        types = fp32 | masks | dict.fromkeys(("Query", "Key", "Value"), kind)
        cases += [
            _case(
                f"prefix {label}",
                prefix_kernel,
                _prefix_shape(group, valid, listed, 16, head_dim, dtype, tile),
                types,
                tile.num_warps,
                tile.num_stages,
            ),
            _case(
                f"block merge {label}",
                merge_block_kernel,
                {"GROUP": group, "HAS_MASK": valid, "PRECISION": precision(dtype)}
                | {"BLOCK_M": block.m, "BLOCK_N": block.n}
                | sizes,
                types | {"Out": kind},
                block.num_warps,
                block.num_stages,
            ),
        ]
    return cases


def _case(
    name: str, kernel: Any, constexprs: dict[str, Any], types: dict[str, str], warps: int, stages: int = 2
) -> AotCase:
    known = {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}
    return make_case(name, kernel, constexprs, known, warps, stages)
