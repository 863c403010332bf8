"""Scores from centroids, and the budgets that turn them into a map."""

from __future__ import annotations

import pytest
import torch

from hf_accel.attention.selectors import centroid_map, top_k, top_p
from hf_accel.errors import InvalidSetting


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_clusters_of_one_token_give_the_true_attention_rows():
    query, key = random(2, 3, 20, 16), random(2, 3, 31, 16, seed=1)
    sizes = torch.ones(2, 3, 31, dtype=torch.int32)
    truth = (query @ key.mT / 4).softmax(-1)
    assert torch.allclose(centroid_map(query, key, sizes), truth, atol=1e-6)
    assert torch.allclose(centroid_map(query, key, sizes, scale=0.5), (query @ key.mT / 2).softmax(-1), atol=1e-6)


def test_doubling_a_cluster_doubles_its_odds():
    query, key = random(1, 1, 5, 8), random(1, 1, 7, 8, seed=1)
    sizes = torch.tensor([[[3, 1, 4, 1, 5, 9, 2]]], dtype=torch.int32)
    doubled = sizes.clone()
    doubled[..., 2] *= 2
    one, two = (p[..., 2] / (1 - p[..., 2]) for p in (centroid_map(query, key, s) for s in (sizes, doubled)))
    assert torch.allclose(two / one, torch.full_like(one, 2.0), rtol=1e-5)


def test_sizes_weigh_as_copies_of_the_centroid_would():
    query, key = random(1, 1, 5, 8), random(1, 1, 3, 8, seed=1)
    sizes = torch.tensor([2, 3, 1])
    copies = centroid_map(query, key.repeat_interleave(sizes, 2), torch.ones(1, 1, 6, dtype=torch.int32))
    folded = torch.stack([part.sum(-1) for part in copies.split(sizes.tolist(), -1)], -1)
    assert torch.allclose(centroid_map(query, key, sizes[None, None].int()), folded, atol=1e-6)


def test_empty_key_clusters_get_nothing():
    query, key = random(1, 2, 4, 8), 50 * random(1, 2, 6, 8, seed=1)
    sizes = torch.tensor([[[3, 0, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0]]], dtype=torch.int32)
    p = centroid_map(query.half(), key.half(), sizes)
    assert p.dtype == torch.float32
    assert (p[0, 0][:, [1, 3]] == 0).all()
    assert torch.allclose(p[0, 0].sum(-1), torch.ones(4))
    assert (p[0, 1] == 0).all()


def test_not_a_number_is_not_hidden():
    query = random(1, 1, 2, 8)
    query[0, 0, 1, 0] = float("nan")
    p = centroid_map(query, random(1, 1, 3, 8), torch.ones(1, 1, 3, dtype=torch.int32))
    assert p[0, 0, 1].isnan().all()


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1), (0.4, 1), (0.5, 2), (0.8, 3), (0.9, 3), (0.96, 4), (1.0, 4)])
def test_top_p_example_of_the_paper(p, kept):
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    descending = [1, 3, 0, 2]
    assert top_p(probabilities, p).nonzero().flatten().tolist() == sorted(descending[:kept])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 0.9, 0.99, 1.0, 1.5])
def test_top_p_covers_the_mass_with_the_fewest_blocks(p):
    probabilities = (3 * random(2, 3, 50, 100)).softmax(-1)
    keep = top_p(probabilities, p)
    mass = torch.where(keep, probabilities, 0).double().sum(-1)
    assert (mass >= min(p, 1) - 1e-6).all()
    assert keep.any(-1).all()
    if p < 1:
        smallest = torch.where(keep, probabilities, torch.inf).amin(-1).double()
        assert (mass - smallest <= p + 1e-6).all()
        assert torch.where(keep, 0, probabilities).amax(-1).le(smallest).all()
    else:
        assert keep.all()


def test_top_p_of_one_keeps_all_though_the_rounded_sum_passes_one():
    probabilities = torch.tensor([0.4000001, 1e-9, 0.6])
    assert probabilities[0] + probabilities[2] > 1
    assert top_p(probabilities, 1.0).all()


@pytest.mark.parametrize("min_keep", [0, 1, 7, 40, 100])
def test_top_p_keeps_at_least_min_keep_of_the_largest(min_keep):
    probabilities = (3 * random(1, 2, 30, 40)).softmax(-1)
    keep, without = top_p(probabilities, 0.5, min_keep), top_p(probabilities, 0.5)
    assert (keep.sum(-1) >= min(min_keep, 40)).all()
    assert torch.equal(keep.sum(-1), without.sum(-1).clamp(min=min(min_keep, 40)))
    assert (keep >= without).all()


def test_top_p_in_half_precision_sums_in_fp32():
    """4096 equal shares: a running sum in fp16 would stop growing at 0.5."""
    probabilities = torch.full((1, 4096), 2.0**-12, dtype=torch.float16)
    assert top_p(probabilities, 0.75).sum() == 3073


@pytest.mark.parametrize("k", [1, 5, 12, 50])
def test_top_k_keeps_the_largest(k):
    scores = random(2, 3, 8, 12)
    keep = top_k(scores, k)
    assert (keep.sum(-1) == min(k, 12)).all()
    assert torch.where(keep, scores, torch.inf).amin(-1).ge(torch.where(keep, -torch.inf, scores).amax(-1)).all()


def test_budgets_out_of_range_are_refused():
    with pytest.raises(InvalidSetting, match="'p'"):
        top_p(torch.ones(1, 2), -0.1)
    with pytest.raises(InvalidSetting, match="min_keep"):
        top_p(torch.ones(1, 2), 0.5, -1)
    with pytest.raises(InvalidSetting, match="'k'"):
        top_k(torch.ones(1, 2), 0)
