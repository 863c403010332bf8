"""Variable-block attention on a GPU: tile sizes, the attention kernel and its launcher.

The kernel is a flash-attention forward pass (Dao 2023, arXiv 2307.08691) whose keys come from two lists that
:mod:`.plan` writes. K and V rows are gathered by pointer: a row is at least 32 bytes, and asynchronous
copies to shared memory are 16 bytes each, so a gather moves the same bytes by the same instructions as a
contiguous tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.online_softmax import attend_rows, finish
from hf_accel.kernels.common.tile import (
    LOG2_E,
    Tile,
    attention_tiles,
    compute_capability,
    key_layout,
    padded_head_dim,
    precision,
)
from hf_accel.kernels.variable_block_attention.plan import (
    compact_kernel,
    key_units_kernel,
    query_tiles_kernel,
)

# The lists of kept keys take Sk / run + (run - 1) * Ck integers for every head and query block. Heads are
# worked through in groups so that they stay below this many bytes.
LIST_BYTES = 256 * 2**20
PLAN_BLOCK = 1024


@dataclass(frozen=True)
class Tiles:
    """``main`` for whole tiles, ``tail`` for the at most ``tail.m`` rows left of a query block.

    Without a tail, main tiles take the rest too. ``run`` is the number of consecutive key rows that share a
    list entry (a power of two, at most ``n``).
    """

    main: Tile
    tail: Tile | None
    run: int = 8


def tiles_for(cc: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for compute capability ``cc`` (0: the interpreter), head dim and dtype."""
    main, tail = attention_tiles(cc, head_dim, dtype)
    return Tiles(main, tail, run=8 if cc else 4)


@triton.jit
def _packed_rows(RunList, SingleList, i, in_runs, keys, RUN: tl.constexpr):
    """Key rows at places ``i`` of the packed sequence: all rows of the runs, then the singles; 0 beyond it."""
    rows = tl.load(RunList + i // RUN, mask=i < in_runs, other=0) + i % RUN
    if RUN > 1:
        single = tl.load(SingleList + i - in_runs, mask=(i >= in_runs) & (i < keys), other=0)
        rows = tl.where(i < in_runs, rows, single)
    return rows


@triton.jit(
    do_not_specialize=[
        "first_head", "num_heads", "num_query_blocks", "num_queries", "tile_capacity", "run_capacity",
        "single_capacity", "scale",
    ]
)  # fmt: skip
def attention_kernel(
    Query,  # [B, H, Sq, D]
    Key,  # [B, H, Sk, D]
    Value,
    Out,  # [B, H, Sq, D]
    Lse,  # fp32 [B, H, Sq], natural logarithm
    QueryOrder,  # int32 [B, H, Sq]: where sorted row r lies in Query and Out; unused unless HAS_ORDER
    Tiles,  # int32 [B * H, tile_capacity, 3]
    RunList,
    SingleList,
    ListCounts,
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
    first_head,
    num_heads,
    num_query_blocks,
    num_queries,
    tile_capacity,
    run_capacity,
    single_capacity,
    scale,  # softmax scale times log2(e)
    HAS_ORDER: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # rows of K and V are equally far apart: one offset serves both
    WIDE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (head, query tile); heads in order, so that programs in flight share K and V in L2."""
    pid = tl.program_id(0)
    head_in_launch = pid // tile_capacity
    group = (first_head + head_in_launch).to(tl.int64)
    tile = Tiles + (group * tile_capacity + pid % tile_capacity) * 3
    block = tl.load(tile)
    first = tl.load(tile + 1)
    end = tl.load(tile + 2)
    if first >= end:
        return
    batch = group // num_heads
    head = group % num_heads
    Key += batch * stride_kb + head * stride_kh
    Value += batch * stride_vb + head * stride_vh
    if SAME_STRIDES:
        stride_vs = stride_ks

    position = first + tl.arange(0, BLOCK_M)
    inside = position < end
    row = position
    if HAS_ORDER:
        row = tl.load(QueryOrder + group * num_queries + position, mask=inside, other=0)
    d = tl.arange(0, BLOCK_D)
    element = inside[:, None] & (d[None, :] < D)
    query_offsets = batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qs + d[None, :]
    query = tl.load(Query + query_offsets, mask=element, other=0.0)

    counts = ListCounts + (group * (num_query_blocks + 1) + block) * 2
    runs = tl.load(counts)
    singles = tl.load(counts + 1)
    list_index = head_in_launch.to(tl.int64) * num_query_blocks + block
    RunList += list_index * run_capacity
    SingleList += list_index * single_capacity

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    in_runs = runs * RUN
    keys = in_runs + singles
    # Most tiles are made of runs only. List entries are loaded one tile ahead and carried in registers: loaded
    # where they are used, they would be one more stage of Triton's load pipeline, and K and V would be waited for
    # as soon as they are asked for. The lists end with room for the entries behind the last tile.
    RUNS_PER_TILE: tl.constexpr = BLOCK_N // RUN
    full_tiles = runs // RUNS_PER_TILE
    entries = tl.load(RunList + column // RUN)
    for t in range(0, full_tiles):
        rows = entries + column % RUN
        entries = tl.load(RunList + (t + 1) * RUNS_PER_TILE + column // RUN)
        row_max, row_sum, acc = attend_rows(
            query, Key, Value, rows, rows, row_max, row_sum, acc, stride_ks, stride_vs, scale,
            False, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    # Some 5 % of the keys are left: the last runs and the singles.
    first_left = full_tiles * BLOCK_N
    rows = _packed_rows(RunList, SingleList, first_left + column, in_runs, keys, RUN)
    for place in range(first_left, keys, BLOCK_N):
        rows_now = rows
        rows = _packed_rows(RunList, SingleList, place + BLOCK_N + column, in_runs, keys, RUN)
        row_max, row_sum, acc = attend_rows(
            query, Key, Value, rows_now, place + column < keys, row_max, row_sum, acc, stride_ks, stride_vs, scale,
            True, WIDE, D, BLOCK_D, PRECISION,
        )  # fmt: skip

    out, lse = finish(row_max, row_sum, acc)
    out_offsets = batch * stride_ob + head * stride_oh + row[:, None].to(tl.int64) * stride_os + d[None, :]
    tl.store(Out + out_offsets, out.to(Out.dtype.element_ty), mask=element)
    tl.store(Lse + group * num_queries + row, lse, mask=inside)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_map: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels on validated inputs; ``tiles`` replaces the table's choice (for tuning)."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys, (num_blocks, num_clusters) = key.shape[2], block_map.shape[2:]
    groups = batch * heads
    if tiles is None:
        tiles = tiles_for(compute_capability(query), head_dim, query.dtype)
    if key_order is not None:
        # Only rows that are listed one by one can stay where they are.
        tiles = replace(tiles, run=1)
    run = tiles.run
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if groups == 0 or num_queries == 0:
        return out, lse

    integers: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    block_map = block_map.contiguous().view(torch.uint8)
    query_sizes, key_sizes = query_sizes.contiguous(), key_sizes.contiguous()
    query_order = None if query_order is None else query_order.contiguous()
    run_capacity = max(1, num_keys // run)
    single_capacity = max(1, min(num_keys, (run - 1) * num_clusters))
    unit_runs = torch.empty((2, groups, run_capacity), **integers)
    unit_singles = torch.empty((2, groups, single_capacity), **integers)
    unit_counts = torch.empty((groups, 2), **integers)
    if num_clusters == 0 or num_keys == 0:
        unit_counts.zero_()
    else:
        key_units_kernel[(groups * num_clusters,)](
            key_sizes, None if key_order is None else key_order.contiguous(),
            unit_runs[0], unit_runs[1], unit_singles[0], unit_singles[1], unit_counts,
            num_clusters, num_keys, run_capacity, single_capacity,
            RUN=run, HAS_ORDER=key_order is not None, BLOCK=PLAN_BLOCK,
        )  # fmt: skip

    tail_m = tiles.tail.m if tiles.tail else 0
    tile_capacity = num_queries // tiles.main.m + min(num_blocks + 1, num_queries // (tail_m + 1))
    main_tiles = torch.zeros((groups, tile_capacity, 3), **integers)
    tail_tiles = torch.empty((groups, num_blocks + 1, 3), **integers)
    counts = torch.empty((groups, num_blocks + 1, 2), **integers)
    bytes_per_head = 4 * max(1, num_blocks) * (run_capacity + single_capacity)
    heads_per_launch = min(groups, max(1, LIST_BYTES // bytes_per_head))
    lists = heads_per_launch * max(1, num_blocks)
    room = max(tile.n for tile in (tiles.main, tiles.tail) if tile)
    run_list = torch.empty(lists * run_capacity + room, **integers)
    single_list = torch.empty(lists * single_capacity, **integers)
    launches = [(tiles.main, main_tiles)] + ([(tiles.tail, tail_tiles)] if tiles.tail else [])
    for first_head in range(0, groups, heads_per_launch):
        heads_now = min(heads_per_launch, groups - first_head)
        compact_kernel[(heads_now * (num_blocks + 1),)](
            block_map, unit_runs[0], unit_runs[1], unit_singles[0], unit_singles[1], unit_counts,
            run_list, single_list, counts,
            first_head, num_blocks, num_clusters, run_capacity, single_capacity,
            RUN=run, BLOCK=PLAN_BLOCK,
        )  # fmt: skip
        query_tiles_kernel[(heads_now * (num_blocks + 1),)](
            query_sizes, counts, main_tiles, tail_tiles,
            first_head, num_blocks, num_queries, tile_capacity,
            RUN=run, BLOCK_M=tiles.main.m, TAIL_M=tail_m, BLOCK=PLAN_BLOCK,
        )  # fmt: skip
        for tile, table in launches:
            attention_kernel[(heads_now * table.shape[1],)](
                query, key, value, out, lse, query_order, table, run_list, single_list, counts,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
                first_head, heads, num_blocks, num_queries, table.shape[1], run_capacity, single_capacity,
                scale * LOG2_E,
                **_constexprs(tile, run, head_dim, query.dtype, query_order is not None, *key_layout(key, value)),
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def aot_cases(cc: int) -> list[AotCase]:
    """The kernels as the launcher would call them on compute capability ``cc``."""
    shapes = [("bf16", 128), ("bf16", 64), ("fp16", 40), ("bf16", 256), ("fp32", 64), ("fp32", 256)]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases: list[AotCase] = []
    for name, head_dim in shapes:
        tiles = tiles_for(cc, head_dim, dtypes[name])
        types = dict.fromkeys(("Query", "Key", "Value", "Out"), name) | {"Lse": "fp32", "scale": "fp32"}
        for tile in filter(None, (tiles.main, tiles.tail)):
            # Runs of one row are the form for keys that are not sorted.
            for run in (tiles.run, 1) if (name, head_dim) == ("bf16", 128) else (tiles.run,):
                cases.append(
                    make_case(
                        f"{name} D{head_dim} {tile.m}x{tile.n} run {run}",
                        attention_kernel,
                        _constexprs(tile, run, head_dim, dtypes[name], has_order=True),
                        types,
                        tile.num_warps,
                        tile.num_stages,
                    )
                )
    tiles = tiles_for(cc, 128, torch.bfloat16)
    plan = {"RUN": tiles.run, "BLOCK": PLAN_BLOCK}
    tail_m = tiles.tail.m if tiles.tail else 0
    cases += [
        make_case("key units", key_units_kernel, plan | {"HAS_ORDER": False}),
        make_case("compact", compact_kernel, plan, {"BlockMap": "u8"}),
        make_case("query tiles", query_tiles_kernel, plan | {"BLOCK_M": tiles.main.m, "TAIL_M": tail_m}),
    ]
    return cases


def _constexprs(
    tile: Tile,
    run: int,
    head_dim: int,
    dtype: torch.dtype,
    has_order: bool,
    same_strides: bool = True,
    wide: bool = False,
) -> dict[str, Any]:
    return {
        "HAS_ORDER": has_order,
        "SAME_STRIDES": same_strides,
        "WIDE": wide,
        "RUN": run,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": precision(dtype),
    }
