"""Block arithmetic, joining by LSE, and budgets that are a count or a share."""

from __future__ import annotations

import pytest
import torch

from hf_accel.attention.gate import resolve_share
from hf_accel.attention.layout import density, expand_block_map, offsets
from hf_accel.errors import InvalidSetting
from hf_accel.kernels.paged_attention import lse_merge


def random_blocks(batch: int, heads: int, blocks: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(blocks, (batch, heads, length), generator=generator, dtype=torch.int32)
    sizes = (labels[..., None] == torch.arange(blocks)).sum(2).int()
    return labels, sizes


def test_offsets():
    sizes = torch.tensor([[3, 0, 2], [0, 4, 1]], dtype=torch.int32)
    assert offsets(sizes).tolist() == [[0, 3, 3], [0, 0, 4]]
    assert offsets(sizes).dtype == torch.int32


def test_density_is_the_mean_of_the_expanded_mask():
    query_labels, query_sizes = random_blocks(2, 3, 5, 40, seed=0)
    key_labels, key_sizes = random_blocks(2, 3, 7, 61, seed=1)
    block_map = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    mask = expand_block_map(block_map, query_labels, key_labels)
    assert mask.shape == (2, 3, 40, 61)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 39, 60), (0, 1, 17, 5)]:
        assert mask[b, h, i, j] == block_map[b, h, query_labels[b, h, i], key_labels[b, h, j]]
    assert torch.allclose(density(block_map, query_sizes, key_sizes), mask.float().mean((-1, -2)))


def test_density_of_long_sequences_does_not_overflow():
    sizes = torch.full((1, 2, 4), 100_000, dtype=torch.int32)
    block_map = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    block_map[0, 1, 1:] = False
    assert density(block_map, sizes, sizes).tolist() == [[1.0, 0.25]]
    assert density(block_map, 0 * sizes, sizes).tolist() == [[0.0, 0.0]]


def attention(query, key, value):
    logits = query @ key.mT
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


@pytest.mark.parametrize("cut", [1, 13, 39])
def test_merging_two_halves_is_attention_over_both(cut):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3))
    first = attention(query, key[:, :, :cut], value[:, :, :cut])
    second = attention(query, key[:, :, cut:], value[:, :, cut:])
    out, lse = lse_merge(*first, *second)
    expected, expected_lse = attention(query, key, value)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_merging_with_a_side_that_saw_no_key():
    out_a, lse_a = torch.randn(1, 1, 3, 4), torch.tensor([[[0.5, -torch.inf, -torch.inf]]])
    out_b, lse_b = torch.randn(1, 1, 3, 4), torch.tensor([[[-torch.inf, 300.0, -torch.inf]]])
    out_a[0, 0, 1:] = float("nan")  # never written by a kernel that had nothing to do
    out_b[0, 0, 0] = float("nan")
    out_b[0, 0, 2] = float("nan")
    out, lse = lse_merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[0, 0, 0], out_a[0, 0, 0])
    assert torch.equal(out[0, 0, 1], out_b[0, 0, 1])
    assert torch.equal(out[0, 0, 2], torch.zeros(4))
    assert lse[0, 0].tolist() == [0.5, 300.0, -torch.inf]


def test_merging_half_types_works_in_fp32():
    out = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    merged, lse = lse_merge(out, torch.zeros(1, 1, 1), 3 * out, torch.zeros(1, 1, 1))
    assert merged.dtype == torch.float32
    assert merged.flatten().tolist() == [2.0] * 4
    assert lse.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize(
    ("value", "total", "expected"),
    [
        (0, 50, 0),
        (10, 50, 10),
        (1, 50, 1),
        (60, 50, 50),
        (0.0, 50, 0),
        (0.2, 50, 10),
        (0.03, 40, 1),
        (0.03, 60, 1),
        (0.29, 100, 29),
        (0.999, 50, 49),
        (1.0, 50, 50),
        (0.5, 0, 0),
    ],
)
def test_counts_stay_counts_and_shares_are_floored(value, total, expected):
    assert resolve_share(value, total, owner="svg2", field="dense_steps") == expected


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, float("nan"), True, "0.2", None])
def test_other_budgets_are_refused(value):
    with pytest.raises(InvalidSetting, match="svg2: setting 'dense_steps'"):
        resolve_share(value, 50, owner="svg2", field="dense_steps")
