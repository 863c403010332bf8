"""Attention of a block to a frozen prefix: definition, identities, and every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels import paged_attention as ops
from hf_accel.kernels.paged_attention import reference

BACKENDS = ("torch", "triton")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
# batch, query heads, KV heads, rows, prefix, head dim, page size
SHAPES = [
    (2, 4, 2, 5, 37, 16, 8),
    (1, 6, 2, 16, 129, 80, 16),
    (2, 2, 2, 1, 70, 40, 16),
    (1, 4, 1, 3, 5, 128, 16),
    (1, 8, 2, 17, 64, 64, 24),
]


class Case:
    """Random tensors of one shape; the cache is a strided view, as in a model."""

    def __init__(self, shape, dtype=torch.float32, seed=0):
        self.batch, self.heads, self.kv_heads, self.rows, self.prefix, self.dim, self.page = shape
        self.scale = self.dim**-0.5
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        self.q, self.q_ref = (draw(self.batch, self.heads, self.rows, self.dim) for _ in range(2))
        self.k = draw(self.batch, self.prefix, self.kv_heads, self.dim).transpose(1, 2)
        self.v = draw(self.batch, self.kv_heads, self.prefix + 3, self.dim)[:, :, : self.prefix]
        self.k_block, self.v_block = (draw(self.batch, self.kv_heads, self.rows, self.dim) for _ in range(2))
        self.padding = torch.ones(self.batch, self.prefix, dtype=torch.bool)
        self.padding[0, : self.prefix // 3] = False
        self.forced = torch.rand(self.batch, self.rows, generator=generator) > 0.7
        self.mask = torch.rand(self.batch, 1, self.rows, self.rows, generator=generator) > 0.4


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def shape(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def dense(q, k, v, scale, seen=None):
    """Softmax attention in fp64 with K and V repeated per query head; ``seen`` ``[B, 1, rows, keys]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = scale * q.double() @ k.transpose(-1, -2)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits


def close(a, b, tolerance):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_prefix_and_block_joined_are_attention_over_all_keys(shape, backend, dtype, padded):
    case = Case(shape, dtype)
    valid = case.padding if padded else None
    out, lse = ops.page_attention(case.q, case.k, case.v, None, 16, case.scale, valid, backend=backend)
    seen = None if valid is None else valid[:, None, None]
    expected, expected_lse, _ = dense(case.q, case.k, case.v, case.scale, seen)
    close(out, expected, TOLERANCE[dtype])
    close(lse, expected_lse, TOLERANCE[dtype])
    got = ops.block_merge(case.q, case.k_block, case.v_block, out, lse, case.scale, case.mask, backend=backend)
    front = torch.ones(case.batch, case.prefix, dtype=torch.bool) if valid is None else valid
    seen = torch.cat([front[:, None, None].expand(-1, 1, case.rows, -1), case.mask], -1)
    joined = dense(case.q, torch.cat([case.k, case.k_block], 2), torch.cat([case.v, case.v_block], 2), case.scale, seen)
    close(got, joined[0], TOLERANCE[dtype])


@pytest.mark.parametrize("padded", [False, True])
def test_listed_pages_are_all_that_is_read(shape, backend, padded):
    case = Case(shape)
    valid = case.padding if padded else None
    low, high = ops.page_minmax(case.k, case.page, valid, backend=backend)
    pages = ops.select_pages(ops.page_score(case.q, low, high, backend=backend), 2, case.kv_heads)
    listed = reference.keys_in(pages.pages, pages.counts, case.page, case.prefix)
    seen = listed if valid is None else listed & valid[:, None]
    group = case.heads // case.kv_heads
    expected, expected_lse, _ = dense(case.q, case.k, case.v, case.scale, seen.repeat_interleave(group, 1)[:, :, None])
    poisoned_k, poisoned_v = case.k.clone(), case.v.clone()
    for cell in (~seen).nonzero().tolist():
        poisoned_k[tuple(cell)] = poisoned_v[tuple(cell)] = float("nan")
    out, lse = ops.page_attention(case.q, poisoned_k, poisoned_v, pages, case.page, case.scale, valid, backend=backend)
    empty = expected_lse == float("-inf")
    close(out[~empty], expected[~empty], 1e-5)
    close(lse, expected_lse, 1e-5)
    assert not out[empty].any()


@pytest.mark.parametrize("padded", [False, True])
def test_scores_bound_every_logit_of_their_page(shape, backend, padded):
    case = Case(shape)
    valid = case.padding if padded else None
    low, high = ops.page_minmax(case.k, case.page, valid, backend=backend)
    expected = reference.page_minmax(case.k, case.page, valid)
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])
    score = ops.page_score(case.q, low, high, backend=backend)
    close(score, reference.page_score(case.q.double(), low.double(), high.double(), None), 1e-4)
    seen = torch.ones(case.batch, 1, 1, case.prefix, dtype=torch.bool) if valid is None else valid[:, None, None]
    _, _, logits = dense(case.q, case.k, case.v, 1.0, seen)
    bound = score.repeat_interleave(case.page, -1)[..., : case.prefix]
    assert (logits <= bound + 1e-4).all()


def test_invalid_pages_are_never_chosen(backend):
    case = Case(SHAPES[0])
    low, high = ops.page_minmax(case.k, case.page)
    known = torch.tensor([[True, False, True, False, False], [False] * 5])
    score = ops.page_score(case.q, low, high, known, backend=backend)
    assert (score[0, ..., [1, 3, 4]] == float("-inf")).all()
    pages = ops.select_pages(score, 4, case.kv_heads)
    assert pages.counts.tolist() == [[2, 2], [0, 0]]
    assert pages.pages[0, :, :2].tolist() == [[0, 2], [0, 2]]
    assert not pages.pages[1].any()
    out, lse = ops.page_attention(case.q, case.k, case.v, pages, case.page, case.scale, backend=backend)
    assert not out[1].any()
    assert (lse[1] == float("-inf")).all()


@pytest.mark.parametrize("count", [1, 2, 100])
def test_a_union_holds_the_pages_of_every_row_and_no_others(shape, count):
    case = Case(shape)
    low, high = ops.page_minmax(case.k, case.page)
    score = ops.page_score(case.q, low, high)
    pages = ops.select_pages(score, count, case.kv_heads)
    group, total = case.heads // case.kv_heads, score.shape[-1]
    assert pages.pages.shape[-1] == min(total, group * case.rows * count)
    best = score.topk(min(count, total), -1).indices
    for batch in range(case.batch):
        for head in range(case.kv_heads):
            wanted = sorted(set(best[batch, head * group : (head + 1) * group].flatten().tolist()))
            number = int(pages.counts[batch, head])
            assert pages.pages[batch, head].tolist() == wanted + [0] * (pages.pages.shape[-1] - number)


def test_bounds_grow_with_the_cache(shape, backend):
    case = Case(shape)
    whole = ops.page_minmax(case.k, case.page)
    old = case.prefix // 2
    low, high = (torch.full((*case.k.shape[:2], whole[0].shape[2] + 2, case.dim), 7.0) for _ in range(2))
    ops.page_minmax_into(case.k[:, :, :old], case.page, low, high, 0, backend=backend)
    ops.page_minmax_into(case.k, case.page, low, high, old // case.page, backend=backend)
    pages = whole[0].shape[2]
    assert torch.equal(low[:, :, :pages], whole[0])
    assert torch.equal(high[:, :, :pages], whole[1])
    assert (low[:, :, pages:] == 7).all()


def test_rows_that_moved_most(shape, backend):
    case = Case(shape)
    delta = (case.q.double() - case.q_ref.double()).square().sum((1, 3))
    for count in range(case.rows + 1):
        for forced in (None, case.forced):
            index, moved = ops.active_topk(case.q, case.q_ref, count, forced, backend=backend)
            close(moved, delta, 1e-5)
            for batch in range(case.batch):
                must = [] if forced is None else forced[batch].nonzero().flatten().tolist()
                ranked = delta[batch].index_fill(0, torch.tensor(must, dtype=torch.int64), float("inf")).tolist()
                rank = sorted(range(case.rows), key=lambda i: (-ranked[i], i))
                assert index[batch].tolist() == sorted(rank[:count])


def test_ties_go_to_the_lower_position(backend):
    q = torch.zeros(1, 2, 7, 16)
    index, delta = ops.active_topk(q, q, 3, backend=backend)
    assert index.tolist() == [[0, 1, 2]]
    assert not delta.any()


def test_merging_guards_what_saw_nothing(backend):
    nan, inf = float("nan"), float("inf")
    out_a, lse_a = torch.tensor([[1.0] * 16, [nan] * 16, [2.0] * 16, [nan] * 16]), torch.tensor([0.0, -inf, 1.0, -inf])
    out_b, lse_b = torch.tensor([[3.0] * 16, [5.0] * 16, [nan] * 16, [nan] * 16]), torch.tensor([0.0, 2.0, -inf, -inf])
    out, lse = ops.lse_merge(out_a, lse_a, out_b, lse_b, backend=backend)
    close(out[:, 0], torch.tensor([2.0, 5.0, 2.0, 0.0]), 1e-6)
    close(lse, torch.tensor([0.6931472, 2.0, 1.0, -inf]), 1e-6)


def test_an_empty_prefix_has_no_part(backend):
    case = Case(SHAPES[0])
    out, lse = ops.page_attention(case.q, case.k[:, :, :0], case.v[:, :, :0], None, 16, case.scale, backend=backend)
    assert not out.any()
    assert (lse == float("-inf")).all()
    got = ops.block_merge(case.q, case.k_block, case.v_block, out, lse, case.scale, backend=backend)
    close(got, dense(case.q, case.k_block, case.v_block, case.scale)[0], 1e-5)
    nothing = torch.zeros(1, 1, case.rows, case.rows, dtype=torch.bool)
    assert not ops.block_merge(case.q, case.k_block, case.v_block, out, lse, case.scale, nothing, backend=backend).any()


def test_the_number_of_splits_changes_nothing(monkeypatch):
    from hf_accel.kernels.paged_attention import triton

    case = Case((1, 4, 2, 3, 250, 64, 16))
    results = []
    for programs in (1, 4, 64):
        monkeypatch.setattr(triton, "INTERPRETER_PROGRAMS", programs)
        results.append(ops.page_attention(case.q, case.k, case.v, None, 16, case.scale, backend="triton"))
    for out, lse in results[1:]:
        close(out, results[0][0], 1e-6)
        close(lse, results[0][1], 1e-6)


def test_calls_that_do_not_fit_are_refused_in_words():
    case = Case(SHAPES[0])
    with pytest.raises(UnsupportedByKernel, match="no multiple of 2 KV heads"):
        ops.page_attention(case.q[:, :3], case.k, case.v, None, 16, 1.0)
    with pytest.raises(UnsupportedByKernel, match=r"valid must be \[B=2, P=37\]"):
        ops.page_attention(case.q, case.k, case.v, None, 16, 1.0, case.padding[:, 1:])
    with pytest.raises(UnsupportedByKernel, match="one dtype"):
        ops.page_attention(case.q.half(), case.k, case.v, None, 16, 1.0)
    with pytest.raises(UnsupportedByKernel, match="last axis of k must be contiguous"):
        ops.page_minmax(case.k.transpose(2, 3), 8)
    with pytest.raises(UnsupportedByKernel, match=r"count must be in 0\.\.5"):
        ops.active_topk(case.q, case.q_ref, 6)
    with pytest.raises(UnsupportedByKernel, match="count must be at least 1"):
        ops.select_pages(torch.zeros(1, 2, 3, 4), 0, 2)
    with pytest.raises(UnsupportedByKernel, match="page_size"):
        ops.page_minmax(case.k, 0)
    low, high = ops.page_minmax(case.k, 8)
    with pytest.raises(UnsupportedByKernel, match="hold 5 pages"):
        ops.page_minmax_into(case.k, 8, low[:, :, :4], high[:, :, :4], 0)
