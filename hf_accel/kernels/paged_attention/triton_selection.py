"""Which pages and rows to compute, on a GPU: bounds of pages, scores against them, rows that moved."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.online_softmax import load_rows
from hf_accel.kernels.common.tile import as_bytes, compute_capability, precision
from hf_accel.kernels.paged_attention.layout import AOT_KINDS, AOT_SHAPES, packed_rows, prefix_tile


@triton.jit(do_not_specialize=["num_rows", "num_pages"])
def score_kernel(
    Query,  # [B, Hq, A, D]
    Low,  # [B, Hkv, pages, D]
    High,  # the same
    PageValid,  # uint8 [B, pages]; unused unless HAS_VALID
    Score,  # fp32 [B, Hq, A, pages]
    stride_qb,
    stride_qh,
    stride_qa,
    stride_lb,
    stride_lh,
    stride_lp,
    num_kv_heads,
    num_rows,
    num_pages,
    GROUP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``max(q a, q b) = max(q, 0) b + min(q, 0) a`` for ``a <= b``: two products, the bounds read once per KV head."""
    cell = tl.program_id(1).to(tl.int64)
    batch, kv_head = cell // num_kv_heads, cell % num_kv_heads
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < GROUP * num_rows
    head, token = packed_rows(row, kv_head, GROUP, num_rows)
    d = tl.arange(0, BLOCK_D)
    at = batch * stride_qb + head * stride_qh + token.to(tl.int64) * stride_qa
    query = tl.load(Query + at[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)
    page = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = page < num_pages
    base = batch * stride_lb + kv_head * stride_lh
    low, high = load_rows(Low + base, High + base, page, counts, stride_lp, stride_lp, True, False, D, BLOCK_D)
    zero = tl.zeros_like(query)  # tl.maximum would make fp32 of bf16 on Triton 3.6
    score = tl.dot(tl.where(query > zero, query, zero), tl.trans(high), input_precision=PRECISION)
    score = tl.dot(tl.where(query < zero, query, zero), tl.trans(low), score, input_precision=PRECISION)
    if HAS_VALID:
        known = tl.load(PageValid + batch * num_pages + page, mask=counts, other=0) != 0
        score = tl.where(known[None, :], score, float("-inf"))
    line = (batch * num_kv_heads * GROUP + head) * num_rows + token
    tl.store(Score + line[:, None] * num_pages + page[None, :], score, mask=real[:, None] & counts[None, :])


@triton.jit(do_not_specialize=["num_keys", "first_page"])
def minmax_kernel(
    Key,  # [B, Hkv, P, D]
    Valid,  # uint8 [B, P]; unused unless HAS_VALID
    Low,  # [B, Hkv, >= pages, D]
    High,  # the same
    stride_kb,
    stride_kh,
    stride_kp,
    stride_lb,
    stride_lh,
    stride_lp,
    num_kv_heads,
    num_keys,
    first_page,
    HAS_VALID: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,  # PAGE, rounded up to a power of two
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    page = first_page + tl.program_id(0)
    cell = tl.program_id(1).to(tl.int64)
    batch, kv_head = cell // num_kv_heads, cell % num_kv_heads
    lane = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    row = page * PAGE + lane
    counts = (lane < PAGE) & (row < num_keys)
    if HAS_VALID:
        counts = counts & (tl.load(Valid + batch * num_keys + row, mask=counts, other=0) != 0)
    at = batch * stride_kb + kv_head * stride_kh + row.to(tl.int64) * stride_kp
    element = counts[:, None] & (d[None, :] < D)
    key = tl.load(Key + at[:, None] + d[None, :], mask=element, other=0.0).to(tl.float32)
    low = tl.min(tl.where(element, key, float("inf")), 0)
    high = tl.max(tl.where(element, key, float("-inf")), 0)
    some = tl.sum(counts.to(tl.int32), 0) > 0
    place = batch * stride_lb + kv_head * stride_lh + page.to(tl.int64) * stride_lp + d
    tl.store(Low + place, tl.where(some, low, 0.0).to(Low.dtype.element_ty), mask=d < D)
    tl.store(High + place, tl.where(some, high, 0.0).to(High.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["num_rows"])
def moved_kernel(
    Query,  # [B, Hq, b, D]
    Reference,  # [B, Hq, b, D]
    Part,  # fp32 [B, Hq, b]
    stride_qb,
    stride_qh,
    stride_qr,
    stride_rb,
    stride_rh,
    stride_rr,
    num_heads,
    num_rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Squared distance of each row of one head from where it was."""
    cell = tl.program_id(0).to(tl.int64)
    batch, head = cell // num_heads, cell % num_heads
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    element = (row < num_rows)[:, None] & (d[None, :] < D)
    now = batch * stride_qb + head * stride_qh + row.to(tl.int64) * stride_qr
    then = batch * stride_rb + head * stride_rh + row.to(tl.int64) * stride_rr
    query = tl.load(Query + now[:, None] + d[None, :], mask=element, other=0.0).to(tl.float32)
    other = tl.load(Reference + then[:, None] + d[None, :], mask=element, other=0.0).to(tl.float32)
    moved = query - other
    tl.store(Part + cell * num_rows + row, tl.sum(moved * moved, 1), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "count"])
def rank_kernel(
    Part,  # fp32 [B, Hq, b]
    Forced,  # uint8 [B, b]; unused unless HAS_FORCED
    Index,  # int64 [B, count]
    Delta,  # fp32 [B, b]
    num_heads,
    num_rows,
    count,
    HAS_FORCED: tl.constexpr,
    BLOCK_B: tl.constexpr,  # num_rows, rounded up to a power of two
    STEP: tl.constexpr,
):
    """Sum over heads, rank every row by counting those before it, and write the chosen ones in order."""
    batch = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_B)
    real = row < num_rows
    Part += batch * num_heads * num_rows
    delta = tl.zeros([BLOCK_B], tl.float32)
    for head in range(num_heads):
        delta += tl.load(Part + head * num_rows + row, mask=real, other=0.0)
    tl.store(Delta + batch * num_rows + row, delta, mask=real)
    # NaN is in no order: more rows than there are places would count as chosen.
    key = tl.where(delta != delta, float("inf"), delta)
    if HAS_FORCED:
        key = tl.where(tl.load(Forced + batch * num_rows + row, mask=real, other=0) != 0, float("inf"), key)
    before = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, num_rows, STEP):
        # Summed again in the same order instead of exchanged between threads: the same bits, no barrier.
        other = start + tl.arange(0, STEP)
        there = other < num_rows
        theirs = tl.zeros([STEP], tl.float32)
        for head in range(num_heads):
            theirs += tl.load(Part + head * num_rows + other, mask=there, other=0.0)
        theirs = tl.where(theirs != theirs, float("inf"), theirs)
        if HAS_FORCED:
            pushed = tl.load(Forced + batch * num_rows + other, mask=there, other=0) != 0
            theirs = tl.where(pushed, float("inf"), theirs)
        ahead = (theirs[None, :] > key[:, None]) | ((theirs[None, :] == key[:, None]) & (other[None, :] < row[:, None]))
        before += tl.sum((ahead & there[None, :]).to(tl.int32), 1)
    chosen = real & (before < count)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(Index + batch * count + place, row.to(tl.int64), mask=chosen)


def page_score(
    q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, page_valid: torch.Tensor | None
) -> torch.Tensor:
    """See the package."""
    batch, heads, rows, head_dim = q.shape
    kv_heads, pages = kmin.shape[1], kmin.shape[2]
    score = q.new_empty(batch, heads, rows, pages, dtype=torch.float32)
    if not score.numel():
        return score
    kmin, kmax = _alike(kmin, kmax)
    group = heads // kv_heads
    tile = prefix_tile(compute_capability(q), group * rows, head_dim, q.dtype)
    score_kernel[(triton.cdiv(pages, tile.n), batch * kv_heads, triton.cdiv(group * rows, tile.m))](
        q,
        kmin,
        kmax,
        as_bytes(page_valid),
        score,
        *q.stride()[:3],
        *kmin.stride()[:3],
        kv_heads,
        rows,
        pages,
        GROUP=group,
        HAS_VALID=page_valid is not None,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PRECISION=precision(q.dtype),
        num_warps=tile.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return score


def _alike(kmin: torch.Tensor, kmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One set of strides for both."""
    return (kmin, kmax) if kmin.stride() == kmax.stride() else (kmin.contiguous(), kmax.contiguous())


def page_minmax_into(
    k: torch.Tensor,
    page_size: int,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    first_page: int,
    valid: torch.Tensor | None,
) -> None:
    """See the package."""
    batch, kv_heads, keys, head_dim = k.shape
    if kmin.stride() != kmax.stride():
        low, high = kmin.contiguous(), kmin.new_empty(kmin.shape).copy_(kmax)
        page_minmax_into(k, page_size, low, high, first_page, valid)
        kmin.copy_(low)
        kmax.copy_(high)
        return
    minmax_kernel[(triton.cdiv(keys, page_size) - first_page, batch * kv_heads)](
        k,
        as_bytes(valid),
        kmin,
        kmax,
        *k.stride()[:3],
        *kmin.stride()[:3],
        kv_heads,
        keys,
        first_page,
        HAS_VALID=valid is not None,
        PAGE=page_size,
        BLOCK_P=triton.next_power_of_2(page_size),
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
        enable_fp_fusion=True,
    )


def active_topk(
    q: torch.Tensor, q_ref: torch.Tensor, count: int, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package."""
    batch, heads, rows, head_dim = q.shape
    part = q.new_empty(batch, heads, rows, dtype=torch.float32)
    index = torch.empty(batch, count, dtype=torch.int64, device=q.device)
    delta = q.new_empty(batch, rows, dtype=torch.float32)
    if not delta.numel():
        return index, delta
    block = _moved_rows(rows, head_dim)
    moved_kernel[(batch * heads, triton.cdiv(rows, block))](
        q,
        q_ref,
        part,
        *q.stride()[:3],
        *q_ref.stride()[:3],
        heads,
        rows,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    rank_kernel[(batch,)](
        part,
        as_bytes(forced),
        index,
        delta,
        heads,
        rows,
        count,
        HAS_FORCED=forced is not None,
        BLOCK_B=triton.next_power_of_2(rows),
        STEP=STEP,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return index, delta


STEP = 16  # rows that are compared with all others at a time


def _moved_rows(rows: int, head_dim: int) -> int:
    """Rows per program: a tile of 4,096 elements."""
    return max(1, min(triton.next_power_of_2(rows), 4096 // triton.next_power_of_2(head_dim)))


def aot_cases(cc: int) -> list[AotCase]:
    """Every kernel here for the shapes of :mod:`triton`."""
    cases = []
    for dtype, head_dim, group, rows, valid, _ in AOT_SHAPES:
        kind = AOT_KINDS[dtype]
        label = f"{kind} D{head_dim} g{group} rows {rows}"
        tile = prefix_tile(cc, group * rows, head_dim, dtype)
        sizes = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
        score = {"GROUP": group, "HAS_VALID": valid, "PRECISION": precision(dtype)} | sizes
        score |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n}
        types = {"Query": kind, "Low": kind, "High": kind, "PageValid": "u8", "Score": "fp32"}
        cases.append(make_case(f"score {label}", score_kernel, score, types, tile.num_warps, 1))
        if (head_dim, dtype) not in ((128, torch.bfloat16), (512, torch.bfloat16)):
            continue
        bounds = {"HAS_VALID": valid, "PAGE": 16, "BLOCK_P": 16} | sizes
        types = {"Key": kind, "Valid": "u8", "Low": kind, "High": kind}
        cases.append(make_case(f"bounds {label}", minmax_kernel, bounds, types))
        types = {"Query": kind, "Reference": kind, "Part": "fp32"}
        moved = sizes | {"BLOCK_M": _moved_rows(rows, head_dim)}
        cases.append(make_case(f"moved {label}", moved_kernel, moved, types))
    for rows, forced in ((16, True), (256, True), (32, False)):
        types = {"Part": "fp32", "Forced": "u8", "Index": "i64", "Delta": "fp32"}
        rank = {"HAS_FORCED": forced, "BLOCK_B": rows, "STEP": STEP}
        cases.append(make_case(f"rank rows {rows}", rank_kernel, rank, types))
    return cases
