"""Commit rules: identities of the published rules, on tensors alone."""

from __future__ import annotations

import pytest
import torch

from hf_accel.generation.block_diffusion.commit_rules import RULES, commit, even_split, propose


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def confidences(rows: int = 3, block: int = 7) -> torch.Tensor:
    return torch.rand(rows, block, generator=seeded())


@pytest.mark.parametrize(("block", "steps"), [(16, 16), (16, 5), (7, 3), (4, 1), (5, 4)])
def test_even_split_gives_the_remainder_to_the_first_steps(block, steps):
    shares = even_split(block, steps)
    assert (len(shares), sum(shares)) == (steps, block)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_static_commits_its_share_and_all_of_the_block_in_its_steps(steps):
    open_ = torch.ones(3, 7, dtype=torch.bool)
    for step, share in enumerate(even_split(7, steps)):
        confidence = torch.rand(3, 7, generator=seeded(step))
        chosen = commit("static", open_, confidence, count=share)
        assert chosen.sum(1).tolist() == [share] * 3
        assert not (chosen & ~open_).any()
        left, taken = confidence.masked_fill(chosen | ~open_, -1), confidence.masked_fill(~chosen, 2)
        assert (taken.min(1).values >= left.max(1).values).all()
        open_ = open_ & ~chosen
    assert not open_.any()


def test_fewer_open_than_the_share_commits_what_is_open():
    open_ = torch.zeros(2, 7, dtype=torch.bool)
    open_[1, 5] = True
    for rule in RULES:
        chosen = commit(rule, open_, confidences(2), count=3, threshold=0.5, entropy=confidences(2))
        assert torch.equal(chosen, open_), rule


def test_dynamic_is_all_above_the_threshold_or_the_share():
    confidence = torch.tensor([[0.9, 0.2, 0.95, 0.5], [0.1, 0.2, 0.3, 0.05]])
    open_ = torch.ones(2, 4, dtype=torch.bool)
    chosen = commit("dynamic", open_, confidence, count=1, threshold=0.85)
    assert chosen.tolist() == [[True, False, True, False], [False, False, True, False]]


def test_dynamic_excludes_the_threshold_and_threshold_includes_it():
    confidence = torch.tensor([[0.5, 0.75, 0.5]])
    open_ = torch.ones(1, 3, dtype=torch.bool)
    assert commit("dynamic", open_, confidence, count=1, threshold=0.5).tolist() == [[False, True, False]]
    assert commit("threshold", open_, confidence, count=1, threshold=0.5).tolist() == [[True, True, True]]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_limits_of_dynamic(count):
    open_ = torch.rand(3, 7, generator=seeded(1)) > 0.3
    static = commit("static", open_, confidences(), count=count)
    assert torch.equal(commit("dynamic", open_, confidences(), count=count, threshold=1.01), static)
    assert torch.equal(commit("dynamic", open_, confidences(), count=count, threshold=0.0), open_)


def test_limits_of_the_entropy_bound():
    entropy = confidences() + 0.1
    open_ = torch.rand(3, 7, generator=seeded(1)) > 0.3
    least = entropy.masked_fill(~open_, torch.inf).argmin(1)
    one = commit("entropy", open_, confidences(), count=1, threshold=0.0, entropy=entropy)
    assert one.sum(1).tolist() == [1, 1, 1]
    assert one.gather(1, least[:, None]).all()
    everything = commit("entropy", open_, confidences(), count=1, threshold=1e9, entropy=entropy)
    assert torch.equal(everything, open_)


def test_the_entropy_bound_sums_what_lies_before():
    entropy = torch.tensor([[0.5, 0.05, 0.04, 0.2]])  # before each, in rising order: 0, 0.04, 0.09, 0.29
    open_ = torch.ones(1, 4, dtype=torch.bool)

    def taken(threshold: float, count: int = 1) -> list[int]:
        chosen = commit("entropy", open_, entropy, count=count, threshold=threshold, entropy=entropy)
        return chosen[0].nonzero()[:, 0].tolist()

    assert taken(0.03) == [2]
    assert taken(0.05) == [1, 2]
    assert taken(0.1) == [1, 2, 3]
    assert taken(0.3) == [0, 1, 2, 3]
    assert taken(0.03, count=3) == [1, 2, 3]


def test_sequential_goes_from_the_left_over_what_is_open():
    open_ = torch.tensor([[False, True, False, True, True]])
    assert commit("sequential", open_, confidences(1, 5), count=2).tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("rule", ["static", "dynamic", "threshold", "entropy"])
def test_ties_go_to_the_left(rule):
    same = torch.full((1, 64), 0.5)
    open_ = torch.ones(1, 64, dtype=torch.bool)
    open_[0, :3] = False
    chosen = commit(rule, open_, same, count=4, threshold=0.9 if rule != "entropy" else 0.0, entropy=same)
    assert chosen[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


def test_nan_confidence_commits_all_the_same():
    open_ = torch.tensor([[True, False, True, True]])
    nan = torch.full((1, 4), torch.nan)
    for rule in RULES:
        assert commit(rule, open_, nan, count=1, threshold=0.5, entropy=nan).sum() >= 1, rule


def test_greedy_proposal_is_the_softmax():
    logits = torch.randn(2, 3, 11, generator=seeded()) * 4
    token, confidence, entropy = propose(logits, entropy=True)
    p = logits.softmax(-1)
    assert torch.equal(token, p.argmax(-1))
    torch.testing.assert_close(confidence, p.max(-1).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_proposed_and_logits_are_not_written(temperature):
    logits = torch.randn(1, 3, 11, generator=seeded())
    logits[..., 4] = 50.0
    before = logits.clone()
    token, confidence, entropy = propose(
        logits, banned=4, temperature=temperature, streams=[seeded()] if temperature else (), entropy=True
    )
    assert not (token == 4).any()
    assert torch.equal(logits, before)
    others = logits[..., [i for i in range(11) if i != 4]].softmax(-1)
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.special.entr(others).sum(-1), rtol=1e-5, atol=1e-5)
    assert (confidence <= 1).all()


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5]).log_softmax(-1)
    many = logits.expand(1, 20000, 5)
    token, confidence, _ = propose(many, temperature=0.7, streams=[seeded()])
    p = (logits / 0.7).softmax(-1)
    share = torch.bincount(token[0], minlength=5) / 20000
    assert (share - p).abs().max() < 4 * (0.25 / 20000) ** 0.5
    torch.testing.assert_close(confidence[0], p[token[0]], rtol=1e-5, atol=1e-6)


def test_top_k_and_top_p_leave_out_the_rest_and_confidence_is_of_what_is_drawn_from():
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    many = p.log().expand(1, 4000, 5)
    token, confidence, _ = propose(many, temperature=1.0, top_k=3, streams=[seeded()])
    assert token.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(confidence[0], (p / 0.9)[token[0]], rtol=1e-5, atol=1e-6)
    assert propose(many, temperature=1.0, top_p=0.65, streams=[seeded()]).token.unique().tolist() == [0, 1]
    assert propose(many, temperature=1.0, top_p=0.75, streams=[seeded()]).token.unique().tolist() == [0, 1, 2]
    assert propose(many, temperature=1.0, top_p=0.0, streams=[seeded()]).token.unique().tolist() == [0]
    # 0.4 and 0.3 are 0.57 and 0.43 of what top-k leaves.
    assert propose(many, temperature=1.0, top_k=2, top_p=0.5, streams=[seeded()]).token.unique().tolist() == [0]


def test_a_tiny_temperature_is_greedy_and_finite():
    logits = torch.randn(1, 6, 11, generator=seeded()).double().float() * 1e4
    token, confidence, _ = propose(logits, temperature=1e-30, streams=[seeded()])
    assert torch.equal(token, logits.argmax(-1))
    assert torch.equal(confidence, torch.ones(1, 6))


def test_rows_draw_from_their_own_streams():
    logits = torch.randn(2, 4, 11, generator=seeded())
    both = propose(logits, temperature=1.0, streams=[seeded(1), seeded(2)]).token
    for row in range(2):
        alone = propose(logits[row : row + 1], temperature=1.0, streams=[seeded(row + 1)]).token
        assert torch.equal(both[row : row + 1], alone)
    untouched = seeded(2)
    propose(logits, temperature=1.0, streams=[seeded(1), None])
    assert torch.equal(untouched.get_state(), seeded(2).get_state())
