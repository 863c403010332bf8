"""Which rows each program of the attention kernel visits, worked out on the GPU without a host sync.

Key side. A mean key cluster has some 75 tokens (SVG2 at 720p), so one tile per cluster would be 40 % padding.
Instead, the rows of a key cluster are cut into *runs* of ``RUN`` consecutive rows and the fewer than ``RUN``
*singles* that are left. The runs and singles of the clusters that a query block keeps are two lists, from
which the attention kernel fills whole tiles across cluster borders: no padding and, for runs, no masks.

Query side. The rows of a query block are cut into tiles of ``BLOCK_M``; a rest of at most ``TAIL_M`` rows
goes to a second list for a launch with smaller tiles. Blocks that keep the most keys come first in each
head, so that the last programs to start are the short ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_clusters", "num_keys", "run_capacity", "single_capacity"])
def key_units_kernel(
    KeySizes,  # int32 [G, Ck]
    KeyOrder,  # int32 [G, Sk]: where sorted row r lies in memory; unused unless HAS_ORDER
    RunCluster,  # int32 [G, run_capacity]
    RunRow,  # int32 [G, run_capacity]: first row of the run
    SingleCluster,  # int32 [G, single_capacity]
    SingleRow,  # int32 [G, single_capacity]
    UnitCounts,  # int32 [G, 2]: number of runs, of singles
    num_clusters,
    num_keys,
    run_capacity,
    single_capacity,
    RUN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut every key cluster into runs and singles. One program per (head, cluster)."""
    pid = tl.program_id(0)
    head = (pid // num_clusters).to(tl.int64)
    cluster = pid % num_clusters
    sizes = KeySizes + head * num_clusters
    size = tl.load(sizes + cluster)
    start = 0
    first_run = 0
    first_single = 0
    for block in range(0, cluster, BLOCK):
        other = block + tl.arange(0, BLOCK)
        other_size = tl.load(sizes + other, mask=other < cluster, other=0)
        # Sizes that add up to more than there is must not lead outside the tensors.
        room = num_keys - (start + tl.cumsum(other_size, 0) - other_size)
        inside = tl.maximum(0, tl.minimum(other_size, room))
        start += tl.sum(other_size, 0)
        first_run += tl.sum(inside // RUN, 0)
        first_single += tl.sum(inside % RUN, 0)
    size = tl.maximum(0, tl.minimum(size, num_keys - start))
    runs = size // RUN
    for block in range(0, runs, BLOCK):
        i = block + tl.arange(0, BLOCK)
        row = start + i * RUN
        if HAS_ORDER:
            row = tl.load(KeyOrder + head * num_keys + row, mask=i < runs, other=0)
        unit = head * run_capacity + first_run + i
        tl.store(RunCluster + unit, tl.zeros_like(row) + cluster, mask=i < runs)
        tl.store(RunRow + unit, row, mask=i < runs)
    singles = size - runs * RUN
    if RUN > 1:
        i = tl.arange(0, RUN)
        unit = head * single_capacity + first_single + i
        tl.store(SingleCluster + unit, tl.zeros_like(i) + cluster, mask=i < singles)
        tl.store(SingleRow + unit, start + runs * RUN + i, mask=i < singles)
    if cluster == num_clusters - 1:
        tl.store(UnitCounts + head * 2, first_run + runs)
        tl.store(UnitCounts + head * 2 + 1, first_single + singles)


@triton.jit
def _compact(Cluster, Row, count, keep_row, List, BLOCK: tl.constexpr):
    """Write the rows of the units whose cluster is kept to the front of ``List``; return how many."""
    kept = 0
    for block in range(0, count, BLOCK):
        i = block + tl.arange(0, BLOCK)
        cluster = tl.load(Cluster + i, mask=i < count, other=0)
        row = tl.load(Row + i, mask=i < count, other=0)
        keep = (tl.load(keep_row + cluster, mask=i < count, other=0) != 0).to(tl.int32)
        tl.store(List + kept + tl.cumsum(keep, 0) - keep, row, mask=keep != 0)
        kept += tl.sum(keep, 0)
    return kept


@triton.jit(do_not_specialize=["first_head", "num_query_blocks", "num_clusters", "run_capacity", "single_capacity"])
def compact_kernel(
    BlockMap,  # uint8 [G, Cq, Ck]
    RunCluster,
    RunRow,
    SingleCluster,
    SingleRow,
    UnitCounts,
    RunList,  # int32 [heads of this launch, Cq, run_capacity]: kept runs of each query block
    SingleList,  # int32 [heads of this launch, Cq, single_capacity]
    ListCounts,  # int32 [G, Cq + 1, 2]: runs, singles; the last block has the left-over rows and no keys
    first_head,
    num_query_blocks,
    num_clusters,
    run_capacity,
    single_capacity,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the units that each query block keeps. One program per (head, query block)."""
    pid = tl.program_id(0)
    head_in_launch = (pid // (num_query_blocks + 1)).to(tl.int64)
    block = pid % (num_query_blocks + 1)
    head = first_head + head_in_launch
    counts = ListCounts + (head * (num_query_blocks + 1) + block) * 2
    if block == num_query_blocks:
        tl.store(counts, 0)
        tl.store(counts + 1, 0)
        return
    keep_row = BlockMap + (head * num_query_blocks + block) * num_clusters
    list_index = head_in_launch * num_query_blocks + block
    units = head * run_capacity
    runs = _compact(
        RunCluster + units,
        RunRow + units,
        tl.load(UnitCounts + head * 2),
        keep_row,
        RunList + list_index * run_capacity,
        BLOCK,
    )
    tl.store(counts, runs)
    singles = 0
    if RUN > 1:
        units = head * single_capacity
        singles = _compact(
            SingleCluster + units,
            SingleRow + units,
            tl.load(UnitCounts + head * 2 + 1),
            keep_row,
            SingleList + list_index * single_capacity,
            BLOCK,
        )
    tl.store(counts + 1, singles)


@triton.jit
def _full_tiles(size, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr):
    """Tiles of BLOCK_M that ``size`` rows need if a rest of at most TAIL_M rows goes elsewhere."""
    return size // BLOCK_M + ((size % BLOCK_M) > TAIL_M).to(tl.int32)


@triton.jit(do_not_specialize=["first_head", "num_blocks", "num_queries", "tile_capacity"])
def query_tiles_kernel(
    QuerySizes,  # int32 [G, Cq]
    ListCounts,  # int32 [G, Cq + 1, 2]
    Tiles,  # int32 [G, tile_capacity, 3]: query block, first and one-past-last sorted row; zeros: no tile
    TailTiles,  # int32 [G, Cq + 1, 3]
    first_head,
    num_blocks,  # Cq
    num_queries,
    tile_capacity,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut every query block into tiles, longest key list first. One program per (head, query block)."""
    pid = tl.program_id(0)
    head = first_head + (pid // (num_blocks + 1)).to(tl.int64)
    block = pid % (num_blocks + 1)
    sizes = QuerySizes + head * num_blocks
    counts = ListCounts + head * (num_blocks + 1) * 2
    keys = tl.load(counts + block * 2) * RUN + tl.load(counts + block * 2 + 1)
    start = 0
    first_tile = 0
    rank = 0
    for first in range(0, num_blocks, BLOCK):
        other = first + tl.arange(0, BLOCK)
        valid = other < num_blocks
        other_size = tl.load(sizes + other, mask=valid, other=0)
        other_keys = tl.load(counts + other * 2, mask=valid, other=0) * RUN
        other_keys += tl.load(counts + other * 2 + 1, mask=valid, other=0)
        earlier = valid & ((other_keys > keys) | ((other_keys == keys) & (other < block)))
        start += tl.sum(tl.where(other < block, other_size, 0), 0)
        first_tile += tl.sum(tl.where(earlier, _full_tiles(other_size, BLOCK_M, TAIL_M), 0), 0)
        rank += tl.sum(earlier.to(tl.int32), 0)
    start = tl.minimum(start, num_queries)
    size = num_queries - start
    if block < num_blocks:
        size = tl.minimum(size, tl.load(sizes + block))
    tiles = _full_tiles(size, BLOCK_M, TAIL_M)
    record = Tiles + (head * tile_capacity + first_tile) * 3
    for first in range(0, tiles, BLOCK):
        i = first + tl.arange(0, BLOCK)
        fits = (i < tiles) & (first_tile + i < tile_capacity)
        tl.store(record + i * 3, tl.zeros_like(i) + block, mask=fits)
        tl.store(record + i * 3 + 1, start + i * BLOCK_M, mask=fits)
        tl.store(record + i * 3 + 2, tl.minimum(start + size, start + (i + 1) * BLOCK_M), mask=fits)
    if TAIL_M > 0:
        record = TailTiles + (head * (num_blocks + 1) + rank) * 3
        tl.store(record, block)
        tl.store(record + 1, tl.minimum(start + size, start + tiles * BLOCK_M))
        tl.store(record + 2, start + size)
