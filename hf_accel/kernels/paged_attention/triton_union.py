"""The best pages of every row, united per KV head, on a GPU: two launches in place of sorts of all scores.

One layer's scores are small (160 rows of 4,096 pages in fp32 are 2.6 MB), so what counts is the number of passes that
depend on each other. A row lies in the registers of one program, which finds its ``count``-th largest score by halving
the range of the bits, twice a pass, and stops as soon as exactly ``count`` scores lie above: no order among them is
needed. Rows leave one bit per page, and one program per KV head unites and lists them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case

WORD = 32
TILE_WORDS = 4096  # words of chosen pages that are united at a time


@triton.jit(do_not_specialize=["num_pages", "count"])
def choose_kernel(
    Scores,  # fp32 [lines, pages]
    Chosen,  # int32 [lines, BLOCK / 32], bit j of word i is page 32 i + j
    num_pages,
    count,
    BLOCK: tl.constexpr,
):
    """The ``count`` best pages of one row; of equal ones the first. -inf is never chosen."""
    line = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, BLOCK)
    score = tl.load(Scores + line * num_pages + page, mask=page < num_pages, other=float("-inf"))
    # Unsigned numbers in the order of the floats: negative ones count down, and come below the others.
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    threshold = tl.full([], 0, tl.uint32)
    above = tl.full([], BLOCK, tl.int32)  # how many keys are not below the threshold: at least count
    shift = tl.full([], 30, tl.int32)
    while (shift >= 0) & (above > count):
        step = tl.full([], 1, tl.uint32) << shift.to(tl.uint32)
        first, second, third = threshold + step, threshold + 2 * step, threshold + 3 * step
        # Three counts of up to 2**16 in one sum.
        packed = (key >= first).to(tl.int64)
        packed += (key >= second).to(tl.int64) << 20
        packed += (key >= third).to(tl.int64) << 40
        packed = tl.sum(packed, 0)
        one = (packed & 0xFFFFF).to(tl.int32)
        two = ((packed >> 20) & 0xFFFFF).to(tl.int32)
        three = (packed >> 40).to(tl.int32)
        threshold = tl.where(
            three >= count, third, tl.where(two >= count, second, tl.where(one >= count, first, threshold))
        )
        above = tl.where(three >= count, three, tl.where(two >= count, two, tl.where(one >= count, one, above)))
        shift -= 2
    chosen = key >= threshold
    if above > count:
        # The threshold is a score now, and more pages have it than there is room for.
        equal = key == threshold
        room = count - (above - tl.sum(equal.to(tl.int32), 0))
        chosen = chosen & ((key > threshold) | (tl.cumsum(equal.to(tl.int32), 0) <= room))
    chosen = chosen & (score > float("-inf"))
    lane = tl.arange(0, 32)
    words = tl.sum(tl.reshape(chosen.to(tl.int32), [BLOCK // 32, 32]) << lane[None, :], 1)
    word = tl.arange(0, BLOCK // 32)
    tl.store(Chosen + line * (BLOCK // 32) + word, words.to(tl.int32))


@triton.jit(do_not_specialize=["num_lines", "width"])
def unite_kernel(
    Chosen,  # int32 [B Hkv, lines, BLOCK / 32]
    Pages,  # int32 [B Hkv, M]
    Counts,  # int32 [B Hkv]
    num_lines,  # of one KV head
    width,  # M
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
):
    """Pages that any line chose, ascending, and zeros behind them."""
    cell = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK // 32)
    Chosen += cell * num_lines * (BLOCK // 32)
    union = tl.zeros([BLOCK // 32], tl.int32)
    for start in range(0, num_lines, LINES):
        line = start + tl.arange(0, LINES)
        place = line[:, None] * (BLOCK // 32) + word[None, :]
        union = union | tl.reduce_or(tl.load(Chosen + place, mask=(line < num_lines)[:, None], other=0), 0)
    lane = tl.arange(0, 32)
    listed = tl.reshape((union[:, None] >> lane[None, :]) & 1, [BLOCK])
    total = tl.sum(listed, 0)
    page = tl.arange(0, BLOCK)
    Pages += cell * width
    place = tl.cumsum(listed, 0) - 1
    tl.store(Pages + place, page, mask=(listed != 0) & (place < width))
    tl.store(Pages + page, 0, mask=(page >= total) & (page < width))
    tl.store(Counts + cell, total)


def select_pages(scores: torch.Tensor, count: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package; at most ``MOST_PAGES`` pages."""
    batch, heads, rows, num_pages = scores.shape
    lines = heads // kv_heads * rows
    width = min(num_pages, lines * count)
    pages = torch.empty(batch, kv_heads, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=scores.device)
    if not pages.numel():
        return pages, counts.zero_()
    block = block_for(num_pages)
    chosen = torch.empty(batch * heads * rows, block // WORD, dtype=torch.int32, device=scores.device)
    choose_kernel[(len(chosen),)](
        scores.contiguous(), chosen, num_pages, min(count, num_pages), BLOCK=block, num_warps=_warps(block)
    )
    unite_kernel[(batch * kv_heads,)](
        chosen, pages, counts, lines, width, BLOCK=block, LINES=_lines(lines, block), num_warps=_warps(block)
    )
    return pages, counts


def block_for(num_pages: int) -> int:
    """Scores that a program holds."""
    return max(WORD, triton.next_power_of_2(num_pages))


def _warps(block: int) -> int:
    """16 scores a thread, as long as there are threads: passes are bound by the reduction between them."""
    return max(1, min(32, block // (16 * 32)))


def _lines(lines: int, block: int) -> int:
    return min(triton.next_power_of_2(lines), max(1, TILE_WORDS * WORD // block))


def aot_cases(cc: int) -> list[AotCase]:
    """Prefixes of 1K, 64K and 256K keys on pages of 16; nothing here depends on ``cc``."""
    cases = []
    for num_pages, lines in ((64, 20), (4096, 64), (16384, 2048)):
        block = block_for(num_pages)
        label = f"pages {num_pages} lines {lines}"
        types = {"Scores": "fp32", "Chosen": "i32"}
        cases.append(make_case(f"choose {label}", choose_kernel, {"BLOCK": block}, types, _warps(block)))
        types = {"Chosen": "i32", "Pages": "i32", "Counts": "i32"}
        unite = {"BLOCK": block, "LINES": _lines(lines, block)}
        cases.append(make_case(f"unite {label}", unite_kernel, unite, types, _warps(block)))
    return cases
