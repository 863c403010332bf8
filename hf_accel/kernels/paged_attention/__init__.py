"""Attention of the rows of one denoising block to a frozen prefix, read where it lies, whole or by pages.

The prefix K/V are views of a cache: any strides but 1 in the last axis; never written, copied or joined with anything.
Rows of all query heads that share a KV head are computed together. Pages are ``page_size`` consecutive keys; which of
them a block reads is chosen by the rule of QUEST (arXiv 2406.10774): the largest logit that a key within the page's
elementwise bounds could have.

No operation here waits for the device, and shapes of results follow from shapes alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take

__all__ = [
    "PageList",
    "active_topk",
    "backend_for",
    "block_merge",
    "lse_merge",
    "page_attention",
    "page_minmax",
    "page_minmax_into",
    "page_score",
    "select_pages",
]

OP = "paged_attention"
LIMITS = TritonLimits(min_head_dim=16, max_head_dim=512)
# A program of 32 warps holds the scores of one row in registers, 16 a thread.
MOST_PAGES = 16384


class PageList(NamedTuple):
    """Pages to read, per KV head.

    Attributes:
        pages: int32 ``[B, Hkv, M]``, ascending; entries from ``counts`` on are 0 and not read.
        counts: int32 ``[B, Hkv]``.
    """

    pages: torch.Tensor
    counts: torch.Tensor


def backend_for(x: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for keys ``[B, Hkv, P, D]``, and why."""
    return choose(OP, x, LIMITS, backend)


def page_minmax(
    k: torch.Tensor, page_size: int, valid: torch.Tensor | None = None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise bounds of the keys of every page.

    Args:
        k: ``[B, Hkv, P, D]``.
        page_size: keys per page; the last page has what remains.
        valid: bool ``[B, P]``; False keys do not count.

    Returns:
        ``kmin, kmax``, each ``[B, Hkv, ceil(P / page_size), D]`` in the dtype of ``k``; 0 for a page without a key.
    """
    _check_cache(k, None, valid)
    _check_page_size(page_size)
    return _page_minmax(k, page_size, valid, take(OP, backend_for(k, backend)))


def page_minmax_into(
    k: torch.Tensor,
    page_size: int,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    first_page: int,
    valid: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """:func:`page_minmax` of the pages from ``first_page`` on, written into buffers ``[B, Hkv, >= pages, D]``.

    What a commit appends to a cache changes its last, partial page and adds more: ``first_page = old_P // page_size``.
    """
    _check_cache(k, None, valid)
    _check_page_size(page_size)
    pages = -(-k.shape[2] // page_size)
    if kmin.shape != kmax.shape or kmin.shape[2] < pages or not 0 <= first_page <= pages:
        raise UnsupportedByKernel(
            f"{OP}: kmin and kmax must be alike and hold {pages} pages, first_page must be in 0..{pages}; got "
            f"{list(kmin.shape)}, {list(kmax.shape)}, {first_page}."
        )
    if first_page < pages:
        _page_minmax_into(k, page_size, kmin, kmax, first_page, valid, take(OP, backend_for(k, backend)))


def page_score(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    page_valid: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Upper bound of every row's logits in every page, not scaled: ``sum_c max(q_c kmin_c, q_c kmax_c)``.

    Args:
        q: ``[B, Hq, A, D]``.
        kmin, kmax: ``[B, Hkv, pages, D]``.
        page_valid: bool ``[B, pages]``; False pages score -inf.

    Returns:
        fp32 ``[B, Hq, A, pages]``.
    """
    _check_heads(q, kmin)
    return _page_score(q, kmin, kmax, page_valid, take(OP, backend_for(kmin, backend)))


def select_pages(scores: torch.Tensor, count: int, kv_heads: int, *, backend: str = "auto") -> PageList:
    """The ``count`` best pages of every row, united over the rows and the query heads of each KV head.

    Args:
        scores: fp32 ``[B, Hq, A, pages]``; -inf is never chosen. Of equal scores that do not all fit, Triton takes the
            first pages, torch any.
        count: pages per row and query head, at least 1.
        kv_heads: number of KV heads; ``Hq`` is a multiple of it.
        backend: ``"auto"`` is torch beyond 16,384 pages.

    Returns:
        PageList of width ``min(pages, Hq / Hkv * A * count)``.
    """
    checks.expect(OP, "scores", scores, {"B": None, "Hq": None, "A": None, "pages": None}, torch.float32)
    if count < 1 or kv_heads < 1 or scores.shape[1] % kv_heads:
        raise UnsupportedByKernel(
            f"{OP}: count must be at least 1 and the {scores.shape[1]} query heads a multiple of kv_heads; got "
            f"count={count}, kv_heads={kv_heads}."
        )
    chosen = choose(OP, scores, LIMITS, backend, head_dim=LIMITS.min_head_dim).backend
    if chosen == "triton" and scores.shape[3] > MOST_PAGES:
        if backend == "triton":
            raise UnsupportedByKernel(
                f"{OP}: the Triton kernel selects among up to {MOST_PAGES} pages; got {scores.shape[3]}. Use "
                "backend='auto' or 'torch', or larger pages."
            )
        reason = f"{scores.shape[3]} pages (the Triton kernel selects among up to {MOST_PAGES})"
        chosen = take("select_pages", Choice("torch", reason))
    return PageList(*_select_pages(scores, count, kv_heads, chosen))


def page_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: PageList | None,
    page_size: int,
    scale: float,
    valid: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row to the listed pages of its KV head, or to all keys.

    Args:
        q: ``[B, Hq, A, D]``.
        k, v: ``[B, Hkv, P, D]``; ``P`` may be 0.
        pages: what to read; None: all keys, ``page_size`` is then not used.
        scale: factor of the logits.
        valid: bool ``[B, P]``; False hides keys. What hidden or unlisted keys hold (NaN too) has no influence.

    Returns:
        ``out`` fp32 ``[B, Hq, A, D]``, normalised, and ``lse`` fp32 ``[B, Hq, A]``, the natural log of the sum of
        exponentials of the scaled logits; a row without a key has 0 and -inf.
    """
    _check_cache(k, v, valid)
    _check_heads(q, k)
    _check_page_size(page_size)
    listed, counts = pages if pages is not None else (None, None)
    return _page_attention(q, k, v, listed, counts, page_size, scale, valid, take(OP, backend_for(k, backend)))


def lse_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys from the attention over each, in fp32.

    ``out`` ``[..., D]``, ``lse`` ``[...]``; -inf where a row saw no key of that set, whose ``out`` is then not read.
    """
    checks.expect_one_device(OP, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == out_a.shape[:-1]:
        shapes = ", ".join(str(list(x.shape)) for x in (out_a, lse_a, out_b, lse_b))
        raise UnsupportedByKernel(f"{OP}: out must be alike, [..., D], and lse [...]; got {shapes}.")
    # In fp32 whatever the keys are: this does not speak for the line that a report has of this package.
    return _lse_merge(out_a, lse_a, out_b, lse_b, backend_for(out_a, backend).backend)


def block_merge(
    q: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of a block to itself, joined with its attention to the prefix.

    Args:
        q: ``[B, Hq, b, D]``; k_block, v_block: ``[B, Hkv, b, D]``.
        prefix_out, prefix_lse: of :func:`page_attention` for all ``b`` rows.
        mask: bool ``[B or 1, 1 or Hq, b, b]``, True = attend.

    Returns:
        ``[B, Hq, b, D]`` in the dtype of ``q``; 0 for a row that sees nothing.
    """
    _check_heads(q, k_block)
    return _block_merge(
        q, k_block, v_block, prefix_out, prefix_lse, scale, mask, take(OP, backend_for(k_block, backend))
    )


def active_topk(
    q: torch.Tensor, q_ref: torch.Tensor, count: int, forced: torch.Tensor | None = None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a block whose query moved most: ``delta_i = ||q_i - q_ref_i||^2`` over heads and dims.

    Args:
        q, q_ref: ``[B, Hq, b, D]``.
        count: rows to choose, 0..b.
        forced: bool ``[B, b]``; these come first. Ties go to the lower position.

    Returns:
        ``index`` int64 ``[B, count]``, ascending, and ``delta`` fp32 ``[B, b]``.
    """
    if not 0 <= count <= q.shape[2]:
        raise UnsupportedByKernel(f"{OP}: count must be in 0..{q.shape[2]}; got {count}.")
    return _active_topk(q, q_ref, count, forced, backend_for(q, backend).backend)


# -- checks --------------------------------------------------------------------------------------------------------


def _check_cache(k: torch.Tensor, v: torch.Tensor | None, valid: torch.Tensor | None) -> None:
    checks.expect(OP, "k", k, {"B": None, "Hkv": None, "P": None, "D": None})
    if v is not None:
        checks.expect(OP, "v", v, {"B": k.shape[0], "Hkv": k.shape[1], "P": k.shape[2], "D": k.shape[3]})
        checks.expect_last_axis_contiguous(OP, v=v)
    if valid is not None:
        checks.expect(OP, "valid", valid, {"B": k.shape[0], "P": k.shape[2]}, torch.bool)
    checks.expect_one_device(OP, k=k, v=v, valid=valid)
    checks.expect_last_axis_contiguous(OP, k=k)


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    checks.expect(OP, "q", q, {"B": k.shape[0], "Hq": None, "rows": None, "D": k.shape[3]})
    if q.shape[1] % k.shape[1]:
        raise UnsupportedByKernel(f"{OP}: {q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads.")
    checks.expect_one_device(OP, q=q, k=k)
    if q.dtype != k.dtype:
        raise UnsupportedByKernel(f"{OP}: q and keys must be of one dtype; got {q.dtype} and {k.dtype}.")
    checks.expect_last_axis_contiguous(OP, q=q, k=k)


def _check_page_size(page_size: int) -> None:
    if page_size < 1:
        raise UnsupportedByKernel(f"{OP}: page_size must be at least 1; got {page_size}.")


def _triton() -> Any:
    from hf_accel.kernels.paged_attention import triton

    return triton


def _merge() -> Any:
    from hf_accel.kernels.paged_attention import triton_merge

    return triton_merge


def _selection() -> Any:
    from hf_accel.kernels.paged_attention import triton_selection

    return triton_selection


# -- operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("hf_accel::page_minmax", mutates_args=())
def _page_minmax(
    k: torch.Tensor, page_size: int, valid: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    low = k.new_empty(*k.shape[:2], -(-k.shape[2] // page_size), k.shape[3])
    high = torch.empty_like(low)
    if low.numel():
        _page_minmax_into(k, page_size, low, high, 0, valid, backend)
    return low, high


@_page_minmax.register_fake
def _(k, page_size, valid, backend):
    low = k.new_empty(*k.shape[:2], -(-k.shape[2] // page_size), k.shape[3])
    return low, torch.empty_like(low)


@torch.library.custom_op("hf_accel::page_minmax_into", mutates_args=("kmin", "kmax"))
def _page_minmax_into(
    k: torch.Tensor,
    page_size: int,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    first_page: int,
    valid: torch.Tensor | None,
    backend: str,
) -> None:
    if backend == "triton":
        with torch.cuda.device_of(k):  # Triton launches on the current device, whatever the tensors are on
            _selection().page_minmax_into(k, page_size, kmin, kmax, first_page, valid)
        return
    from hf_accel.kernels.paged_attention import reference

    pages = -(-k.shape[2] // page_size)
    start = first_page * page_size
    low, high = reference.page_minmax(k[:, :, start:], page_size, None if valid is None else valid[:, start:])
    kmin[:, :, first_page:pages] = low
    kmax[:, :, first_page:pages] = high


@torch.library.custom_op("hf_accel::page_score", mutates_args=())
def _page_score(
    q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, page_valid: torch.Tensor | None, backend: str
) -> torch.Tensor:
    if backend == "triton":
        with torch.cuda.device_of(q):
            return _selection().page_score(q, kmin, kmax, page_valid)
    from hf_accel.kernels.paged_attention import cpu

    return cpu.page_score(q, kmin, kmax, page_valid)


@_page_score.register_fake
def _(q, kmin, kmax, page_valid, backend):
    return q.new_empty(*q.shape[:3], kmin.shape[2], dtype=torch.float32)


@torch.library.custom_op("hf_accel::select_pages", mutates_args=())
def _select_pages(scores: torch.Tensor, count: int, kv_heads: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from hf_accel.kernels.paged_attention import triton_union

        with torch.cuda.device_of(scores):
            return triton_union.select_pages(scores, count, kv_heads)
    from hf_accel.kernels.paged_attention import reference

    return reference.select_pages(scores, count, kv_heads)


@_select_pages.register_fake
def _(scores, count, kv_heads, backend):
    batch, heads, rows, pages = scores.shape
    width = min(pages, heads // kv_heads * rows * count)
    listed = scores.new_empty(batch, kv_heads, width, dtype=torch.int32)
    return listed, scores.new_empty(batch, kv_heads, dtype=torch.int32)


@torch.library.custom_op("hf_accel::page_attention", mutates_args=())
def _page_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    page_size: int,
    scale: float,
    valid: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        with torch.cuda.device_of(q):
            return _triton().page_attention(q, k, v, pages, counts, page_size, scale, valid)
    from hf_accel.kernels.paged_attention import cpu

    return cpu.page_attention(q, k, v, pages, counts, page_size, scale, valid)


@_page_attention.register_fake
def _(q, k, v, pages, counts, page_size, scale, valid, backend):
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_accel::block_merge", mutates_args=())
def _block_merge(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        with torch.cuda.device_of(q):
            return _triton().block_merge(q, k, v, prefix_out, prefix_lse, scale, mask)
    from hf_accel.kernels.paged_attention import reference

    return reference.block_merge(q, k, v, prefix_out, prefix_lse, scale, mask)


@_block_merge.register_fake
def _(q, k, v, prefix_out, prefix_lse, scale, mask, backend):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("hf_accel::lse_merge", mutates_args=())
def _lse_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        with torch.cuda.device_of(out_a):
            return _merge().lse_merge(out_a, lse_a.float(), out_b, lse_b.float())
    from hf_accel.kernels.paged_attention import reference

    out, lse = reference.lse_merge(out_a, lse_a, out_b, lse_b)
    return out.float(), lse.float()


@_lse_merge.register_fake
def _(out_a, lse_a, out_b, lse_b, backend):
    return out_a.new_empty(out_a.shape, dtype=torch.float32), lse_a.new_empty(lse_a.shape, dtype=torch.float32)


@torch.library.custom_op("hf_accel::active_topk", mutates_args=())
def _active_topk(
    q: torch.Tensor, q_ref: torch.Tensor, count: int, forced: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        with torch.cuda.device_of(q):
            return _selection().active_topk(q, q_ref, count, forced)
    from hf_accel.kernels.paged_attention import reference

    return reference.active_topk(q, q_ref, count, forced)


@_active_topk.register_fake
def _(q, q_ref, count, forced, backend):
    return q.new_empty(q.shape[0], count, dtype=torch.int64), q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)
