"""How the kernels of paged attention lay out rows and keys: packed rows, tiles, the shapes that are compiled in tests.

Imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.tile import Tile

AOT_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# dtype, head dim, query heads per KV head, rows, with a mask, with a page list
AOT_SHAPES: list[tuple[torch.dtype, int, int, int, bool, bool]] = [
    (torch.bfloat16, 128, 4, 5, False, True),
    (torch.bfloat16, 128, 4, 16, True, False),
    (torch.bfloat16, 512, 2, 256, True, False),
    (torch.float16, 80, 1, 16, True, True),
    (torch.float32, 128, 4, 16, True, True),
]


@triton.jit
def packed_rows(row, kv_head, GROUP: tl.constexpr, num_rows):
    """Query head and row of packed row ``r`` of a KV head: the group's heads one after another."""
    return kv_head * GROUP + row // num_rows, row % num_rows


def prefix_tile(cc: int, rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """For ``rows`` packed rows of a KV head that attend to the prefix.

    The loop waits for memory: small tiles of rows, deep pipelines.
    """
    m = max(16, min(64, triton.next_power_of_2(rows)))
    if cc == 0:
        return Tile(m, 16, 4, 1)
    if dtype == torch.float32:
        # IEEE products of fp32 are unrolled into registers
        return Tile(min(m, 16 if head_dim > 128 else 32), 16 if head_dim > 128 else 32, 8, 1 if head_dim > 256 else 2)
    if head_dim > 256:
        return Tile(min(m, 32), 32 if cc in (90, 100, 103) else 16, 8, 2)
    if head_dim > 128:
        return Tile(m, 32, 8 if m > 32 else 4, 2)
    return Tile(m, 64, 4, 3 if cc in (80, 90, 100, 103) else 2)


def block_tile(cc: int, rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """For ``rows`` of a block that attend to the block's own keys: all of them in a few tiles."""
    small = max(16, min(64 if head_dim <= 128 and dtype != torch.float32 else 16, triton.next_power_of_2(rows)))
    return Tile(small, min(small, 32), 4, 1 if cc == 0 else 2)
