"""The pages that rows choose and their union per KV head; which rows of a block moved: what is odd in the input."""

from __future__ import annotations

import math

import pytest
import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels import paged_attention as ops
from hf_accel.kernels.paged_attention import reference as definition

BACKENDS = ["torch", "triton"]
INF = math.inf


def scores_of(*shape: int, device="cpu", seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def union_of(scores: torch.Tensor, count: int, kv_heads: int) -> list[list[list[int]]]:
    """By sorting every row; of equal scores the first."""
    best = scores.sort(dim=-1, descending=True, stable=True)
    found = []
    for values, index in zip(best.values, best.indices, strict=True):
        heads = zip(values.chunk(kv_heads), index.chunk(kv_heads), strict=True)
        kept = [i[..., :count][v[..., :count] > -INF] for v, i in heads]
        found.append([sorted(set(pages.tolist())) for pages in kept])
    return found


def listed(pages: ops.PageList) -> list[list[list[int]]]:
    return [
        [row[:count] for row, count in zip(*item, strict=True)]
        for item in zip(pages.pages.tolist(), pages.counts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "kv_heads"), [((1, 4, 3, 37), 2), ((2, 4, 1, 131), 4), ((1, 2, 2, 1), 1), ((1, 6, 3, 33), 2)]
)
@pytest.mark.parametrize("count", [1, 3, 32, 500])
@pytest.mark.parametrize("kind", ["normal", "tiny negative", "huge", "half hidden"])
def test_union_of_the_best(backend, shape, kv_heads, count, kind, device):
    scores = scores_of(*shape, device=device)
    if kind == "tiny negative":
        scores = -scores.abs() * 1e-30
    elif kind == "huge":
        scores *= 1e37
    elif kind == "half hidden":
        scores[scores < 0] = -INF
    pages = ops.select_pages(scores, count, kv_heads, backend=backend)
    assert listed(pages) == union_of(scores, count, kv_heads)
    width = min(shape[-1], shape[1] // kv_heads * shape[2] * count)
    assert pages.pages.shape == (*shape[:1], kv_heads, width)
    assert pages.pages.dtype == pages.counts.dtype == torch.int32
    behind = torch.arange(width, device=device) >= pages.counts[..., None]
    assert pages.pages[behind].eq(0).all()


def test_of_equal_scores_the_first(device):
    scores = scores_of(2, 4, 3, 70, device=device).round()  # a handful of values
    pages = ops.select_pages(scores, 9, 2, backend="triton")
    assert listed(pages) == union_of(scores, 9, 2)
    flat = ops.select_pages(torch.zeros(1, 1, 1, 50, device=device), 5, 1, backend="triton")
    assert listed(flat) == [[[0, 1, 2, 3, 4]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_choose(backend, device):
    hidden = torch.full((2, 2, 3, 40), -INF, device=device)
    hidden[1, 0, 0, 7] = -3e38
    pages = ops.select_pages(hidden, 4, 1, backend=backend)
    assert listed(pages) == [[[]], [[7]]]
    for shape in ((1, 2, 0, 9), (1, 2, 3, 0)):
        pages = ops.select_pages(scores_of(*shape, device=device), 4, 1, backend=backend)
        assert pages.pages.shape == (1, 1, 0)
        assert pages.counts.tolist() == [[0]]


def test_selection_refuses_what_does_not_fit(monkeypatch):
    scores = scores_of(1, 6, 2, 20)
    for count, kv_heads in ((0, 2), (1, 4), (1, 0)):
        with pytest.raises(UnsupportedByKernel, match="kv_heads"):
            ops.select_pages(scores, count, kv_heads)
    with pytest.raises(UnsupportedByKernel, match="float32"):
        ops.select_pages(scores.half(), 1, 2)
    monkeypatch.setattr(ops, "MOST_PAGES", 19)
    with pytest.raises(UnsupportedByKernel, match="up to 19 pages"):
        ops.select_pages(scores, 1, 2, backend="triton")
    assert listed(ops.select_pages(scores, 2, 2)) == union_of(scores, 2, 2)


def test_selection_keeps_the_promises_of_an_operator():
    torch.library.opcheck(ops._select_pages, (scores_of(2, 4, 3, 37), 2, 2, "torch"))
    torch.library.opcheck(ops._select_pages, (scores_of(2, 4, 0, 37), 2, 2, "torch"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_a_row_without_a_distance_moved(backend, count, device):
    """NaN comes first, with what is forced, and there are never more rows than asked for."""
    q = scores_of(2, 3, 7, 16, device=device)
    reference = q.clone()
    reference[:, :, 2] += 1
    q[0, 1, [4, 6], 3] = math.nan
    forced = torch.zeros(2, 7, dtype=torch.bool, device=device)
    forced[0, 5] = True
    index, delta = ops.active_topk(q, reference, count, forced, backend=backend)
    wanted = {0: [[], []], 1: [[4], [2]], 3: [[4, 5, 6], [0, 1, 2]], 7: [list(range(7))] * 2}
    assert index.tolist() == wanted[count]
    assert delta.isnan().tolist() == [[i in (4, 6) for i in range(7)], [False] * 7]


@pytest.mark.parametrize("valid", ["stretch", "holes", "none"])
@pytest.mark.parametrize("paged", [False, True])
def test_keys_behind_a_mask_may_hold_anything(valid, paged, device):
    """Every backend sees the same of a cache view whose hidden and unlisted keys are NaN."""
    generator = torch.Generator().manual_seed(3)
    cache = torch.randn(2, 53, 2, 2, 40, generator=generator).to(device)
    k, v = (cache[:, 3:50, i].transpose(1, 2) for i in range(2))
    q = torch.randn(2, 4, 3, 40, generator=generator).to(device)
    seen = torch.ones(2, 47, dtype=torch.bool, device=device)
    if valid == "stretch":
        seen[0, :11], seen[1, 40:] = False, False
    elif valid == "holes":
        seen[:, ::3] = False
    else:
        seen[1] = False
    pages = None
    if paged:
        pages = ops.PageList(torch.tensor([[[1, 5], [0, 0]]] * 2).int().to(device), torch.tensor([[2, 1]] * 2).int())
        pages = ops.PageList(pages.pages, pages.counts.to(device))
    clean = ops.page_attention(q, k, v, pages, 8, 0.3, seen, backend="torch")
    listed_keys = torch.ones(2, 2, 47, dtype=torch.bool, device=device)
    if pages is not None:
        listed_keys = definition.keys_in(pages.pages, pages.counts, 8, 47)
    hidden = ~(seen[:, None] & listed_keys)
    k, v = k.clone().masked_fill_(hidden[..., None], math.nan), v.clone().masked_fill_(hidden[..., None], math.nan)
    for backend in BACKENDS:
        out, lse = ops.page_attention(q, k, v, pages, 8, 0.3, seen, backend=backend)
        torch.testing.assert_close(out, clean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, clean[1], atol=1e-5, rtol=1e-5)
    empty = hidden.all(-1)[..., None].expand(-1, -1, 6).reshape(2, 4, 3)
    assert torch.equal(clean[1] == -INF, empty)
    assert clean[0][empty].eq(0).all()
