"""Coordinate descent: each step against a plain loop, descent in fp64, and what it gains over rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.coordinate_descent import sweep
from hf_accel.quant.formats import E2M1, INT2, INT3, INT4
from hf_accel.quant.grid import Scheme, decode, encode, fit_grid, group_index, values_of

M, N, GROUP = 12, 40, 16  # a last group of 8


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setup(format, n: int = N):
    x = gaussian(300, 12, seed=8) @ gaussian(12, n, seed=9) + 0.1 * gaussian(300, n, seed=10)
    weight, scheme = gaussian(M, n), Scheme.grouped(format, GROUP)
    grid = fit_grid(weight, scheme)
    return weight, encode(weight, grid, scheme), grid, scheme, x.t() @ x / 150


def error(weight, codes, grid, scheme, gram) -> float:
    off = decode(codes, grid, scheme, torch.float64) - weight
    return float((off @ gram * off).sum())


@pytest.mark.parametrize("format", [INT2, INT3, INT4, E2M1], ids=repr)
@pytest.mark.parametrize("inflation", [0.0, 0.75])
def test_no_sweep_raises_the_error(format, inflation):
    weight, codes, grid, scheme, gram = setup(format)
    inflated = gram + inflation * gram.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    errors = [error(weight, codes, grid, scheme, inflated)]
    for _ in range(6):
        codes = sweep(
            weight, codes, grid, gram, 1, format=format, g_idx=group_index(N, GROUP), inflation=inflation, block_size=16
        )
        errors.append(error(weight, codes, grid, scheme, inflated))
    assert all(late <= early * (1 + 1e-12) for early, late in itertools.pairwise(errors))
    assert errors[1] < (0.5 if inflation == 0 else 0.99) * errors[0]


@pytest.mark.parametrize("inflation", [0.0, 0.75])
def test_every_column_takes_the_best_of_all_its_values(inflation):
    """By trying all codes of every entry, one column after the other, on the full error."""
    weight, codes, grid, scheme, gram = setup(INT2)
    ours = sweep(weight, codes, grid, gram, 2, format=INT2, g_idx=group_index(N, GROUP), inflation=inflation)
    inflated = gram + inflation * gram.diagonal().mean() * torch.eye(N, dtype=torch.float64)
    theirs = codes.clone()
    for _ in range(2):
        for j in range(N):
            trials = torch.stack([theirs] * 4)
            trials[:, :, j] = torch.arange(4, dtype=torch.uint8)[:, None]
            off = torch.stack([decode(t, grid, scheme, torch.float64) for t in trials]) - weight
            theirs[:, j] = (off @ inflated * off).sum(-1).argmin(0).to(torch.uint8)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, codes)


def test_the_block_size_is_speed_only():
    weight, codes, grid, _, gram = setup(INT3)
    results = [
        sweep(weight, codes, grid, gram, 3, format=INT3, g_idx=group_index(N, GROUP), block_size=b)
        for b in (1, 7, N, 128)
    ]
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_white_inputs_leave_the_nearest_codes():
    weight, codes, grid, _, _ = setup(INT3)
    white = torch.eye(N, dtype=torch.float64)
    assert torch.equal(sweep(weight, codes, grid, white, 3, format=INT3, g_idx=group_index(N, GROUP)), codes)


def test_it_ends_when_nothing_changes_and_zero_sweeps_are_none():
    weight, codes, grid, _, gram = setup(INT2)
    kwargs = {"format": INT2, "g_idx": group_index(N, GROUP), "inflation": 0.0}
    settled = sweep(weight, codes, grid, gram, 100, **kwargs)
    assert torch.equal(sweep(weight, settled, grid, gram, 1, **kwargs), settled)
    assert torch.equal(sweep(weight, codes, grid, gram, 0, **kwargs), codes)


def test_an_input_that_was_never_seen_keeps_its_codes():
    weight, codes, grid, _, gram = setup(INT3)
    gram[5], gram[:, 5] = 0, 0
    swept = sweep(weight, codes, grid, gram, 2, format=INT3, g_idx=group_index(N, GROUP), inflation=0.0)
    assert torch.equal(swept[:, 5], codes[:, 5])
    assert not torch.equal(swept, codes)


def test_scattered_groups_are_the_columns_permuted():
    weight, codes, grid, _, gram = setup(INT3)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    one_by_one = sweep(weight, codes, grid, gram, 1, format=INT3, g_idx=group_index(N, GROUP), inflation=0.0)
    g_idx = group_index(N, GROUP)[order]
    scale, zero = grid.scale[:, g_idx.long()], grid.zero[:, g_idx.long()]
    swept = sweep(
        weight[:, order], codes[:, order], grid, gram[order][:, order], 1, format=INT3, g_idx=g_idx, inflation=0.0
    )

    def energy(c, s, z, w, g):
        off = values_of(c, s, z, INT3) - w
        return float((off @ g * off).sum())

    permuted = gram[order][:, order]
    before = energy(codes[:, order], scale, zero, weight[:, order], permuted)
    after = energy(swept, scale, zero, weight[:, order], permuted)
    plain = energy(
        one_by_one,
        grid.scale[:, group_index(N, GROUP).long()],
        grid.zero[:, group_index(N, GROUP).long()],
        weight,
        gram,
    )
    assert after < 0.5 * before
    assert after == pytest.approx(plain, rel=0.5)  # another order of columns, another end nearby


def test_fp32_finds_what_fp64_finds():
    weight, codes, grid, scheme, gram = setup(INT4)
    small = fit_grid(weight.float(), scheme)
    ours = sweep(weight.float(), codes, small, gram, 2, format=INT4, g_idx=group_index(N, GROUP))
    theirs = sweep(weight, codes, grid, gram, 2, format=INT4, g_idx=group_index(N, GROUP))
    assert float((ours == theirs).float().mean()) > 0.99


def test_what_cannot_be():
    weight, codes, grid, _, gram = setup(INT3)
    with pytest.raises(InvalidSetting, match="'sweeps' must be 0 or more"):
        sweep(weight, codes, grid, gram, -1, format=INT3, g_idx=group_index(N, GROUP))
    with pytest.raises(InvalidSetting, match="'inflation' must be 0 or more"):
        sweep(weight, codes, grid, gram, 1, format=INT3, g_idx=group_index(N, GROUP), inflation=-0.5)
    with pytest.raises(QuantizationError, match=r"g_idx \[40\]; got \[12, 40\], \[40, 40\] and \[39\]"):
        sweep(weight, codes, grid, gram, 1, format=INT3, g_idx=group_index(39, GROUP))
