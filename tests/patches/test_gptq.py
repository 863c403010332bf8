"""GPTQ on one matrix: against a definition written for its own sake, and the identities of the method's card."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import QuantizationError
from hf_accel.quant.formats import E4M3, INT3, INT4, INT8, format_of
from hf_accel.quant.gptq_solver import (
    gptq_solve,
    inverse_factor,
    output_error,
    round_to_nearest,
    values_by_group,
)
from hf_accel.quant.grid import Scheme, ShrinkSearch, encode, fit_grid
from hf_accel.quant.packed_linear import PackedLinear

EYE = torch.eye(64, dtype=torch.float64)
GROUPED = [
    pytest.param({}, id="on-the-way"),
    pytest.param({"static_groups": True}, id="static"),
    pytest.param({"act_order": True}, id="act-order"),
    pytest.param({"act_order": True, "static_groups": True}, id="act-order-static"),
]


def problem(m=12, n=64, tokens=512, rank=24, seed=0, dtype=torch.float64):
    """A weight and the Gram matrix of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, rank, generator=generator, dtype=torch.float64) @ mixing
    inputs += 0.3 * torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (2 / tokens * inputs.T @ inputs).to(dtype)


def grid_of(values, levels, symmetric):
    """Scale and zero of each row, by the card."""
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (levels - 1)
    return scale, torch.full_like(scale, levels / 2) if symmetric else torch.round(-low / scale)


def by_definition(weight, gram, bits, group, *, symmetric=False, damping=0.01, act_order=False, static_groups=False):
    """Optimal brain quantisation in the order of the columns, each step from the inverse of what is left of H.

    No factor, no blocks: after column i, the rows of the inverse Hessian of the columns that are left say what they do.
    """
    (_, n), levels = weight.shape, 2**bits
    weight, gram = weight.clone(), gram + damping * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(n)
    original, out = weight.clone(), torch.empty_like(weight)
    for step, column in enumerate(order.tolist()):
        place = column if static_groups else step
        if place % group == 0 or static_groups:
            begin = place // group * group
            if static_groups:
                members = original[:, begin : begin + group]
            else:
                members = weight[:, order[begin : begin + group]]
            scale, zero = grid_of(members, levels, symmetric)
        code = (torch.round(weight[:, column] / scale) + zero).clamp(0, levels - 1)
        out[:, column] = (code - zero) * scale
        left = order[step:]
        inverse = torch.linalg.inv(gram[left][:, left])
        error = weight[:, column] - out[:, column]
        weight[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
    return out


@pytest.mark.parametrize("settings", GROUPED)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, False), (3, 64, False), (4, 16, True), (8, 32, False)]
)
def test_equals_the_definition_column_by_column(settings, bits, group, symmetric):
    weight, gram = problem()
    scheme = Scheme.grouped(format_of(bits), group, symmetric=symmetric)
    ours = gptq_solve(weight, gram, scheme, block_size=24, **settings)
    theirs = by_definition(weight, gram, bits, group, symmetric=symmetric, **settings)
    assert ours.rounding == "gptq"
    assert torch.allclose(ours.weight(scheme), theirs, atol=1e-9, rtol=0)


def test_single_precision_equals_the_definition_but_for_ties():
    weight, gram = problem(m=64, dtype=torch.float32)
    scheme = Scheme.grouped(INT4, 16)
    ours = gptq_solve(weight, gram, scheme).weight(scheme)
    theirs = by_definition(weight.double(), gram.double(), 4, 16).float()
    # A column next to a tie falls to the other side in fp32, and its row goes another way from there.
    same = (ours - theirs).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.9
    ours_lost, theirs_lost = (float(output_error(x - weight, gram).sum()) for x in (ours, theirs))
    assert ours_lost == pytest.approx(theirs_lost, rel=0.02)


@pytest.mark.parametrize("settings", GROUPED)
def test_uncorrelated_inputs_give_rounding_to_nearest_exactly(settings):
    weight, _ = problem(dtype=torch.float32)
    scheme = Scheme.grouped(INT3, 16)
    ours = gptq_solve(weight, 3.7 * torch.eye(64), scheme, **settings)
    nearest = round_to_nearest(weight, scheme)
    assert torch.equal(ours.weight(scheme), nearest.weight(scheme))
    assert torch.equal(ours.codes, nearest.codes)


def test_correlated_inputs_trade_weight_error_for_output_error():
    weight, gram = problem(48, 64, dtype=torch.float32)
    scheme = Scheme.per_row(INT3)
    ours, nearest = gptq_solve(weight, gram, scheme).weight(scheme), round_to_nearest(weight, scheme).weight(scheme)
    assert output_error(weight - ours, gram).sum() < 0.25 * output_error(weight - nearest, gram).sum()
    assert (weight - ours).norm() > (weight - nearest).norm()


@pytest.mark.parametrize("settings", GROUPED)
@pytest.mark.parametrize("group", [16, 24, -1])  # 24 divides neither the blocks nor the 64 columns
def test_the_block_size_changes_nothing(settings, group):
    weight, gram = problem()
    scheme = Scheme.grouped(INT3, group)
    first, *others = (gptq_solve(weight, gram, scheme, block_size=b, **settings) for b in (1, 16, 17, 64, 128))
    assert first.rounding == "gptq"
    for other in others:
        assert torch.equal(other.codes, first.codes)
        assert torch.allclose(other.grid.scale, first.grid.scale, atol=1e-12, rtol=0)
        assert torch.allclose(other.loss, first.loss)


@pytest.mark.parametrize("settings", GROUPED)
def test_every_value_is_on_its_grid_and_packs_exactly(settings):
    weight, gram = problem(m=32, dtype=torch.float32)
    scheme = Scheme.grouped(INT3, 16)
    ours = gptq_solve(weight, gram, scheme, scale_dtype=torch.float16, **settings)
    at = ours.g_idx.long()
    places = ours.weight(scheme) / ours.grid.scale[:, at] + ours.grid.zero[:, at]
    assert torch.allclose(places, places.round(), atol=1e-4)
    assert places.round().min() >= 0
    assert places.round().max() <= 7
    packed = PackedLinear.from_codes(ours.codes, *vars(ours.grid).values(), ours.g_idx, 3, 16, dtype=torch.float16)
    assert torch.equal(packed.codes(), ours.codes)
    assert torch.equal(packed.dequantize_weight(torch.float32), ours.weight(scheme))


def test_groups_are_neighbours_where_grids_are_fixed_beforehand():
    weight, gram = problem()
    scheme, neighbours = Scheme.grouped(INT4, 16), torch.arange(64) // 16
    static = gptq_solve(weight, gram, scheme, act_order=True, static_groups=True)
    assert torch.equal(static.g_idx.long(), neighbours)
    assert torch.equal(static.grid.scale, fit_grid(weight, scheme).scale)
    assert not torch.equal(static.codes, encode(weight, static.grid, scheme))
    on_the_way = gptq_solve(weight, gram, scheme, act_order=True)
    assert torch.equal(on_the_way.g_idx[gram.diagonal().argsort(descending=True)].long(), neighbours)
    assert not torch.equal(on_the_way.g_idx.long(), neighbours)


def test_act_order_with_one_grid_per_row_keeps_the_grid():
    weight, gram = problem()
    scheme = Scheme.per_row(INT4)
    ordered, plain = gptq_solve(weight, gram, scheme, act_order=True), gptq_solve(weight, gram, scheme)
    assert torch.equal(ordered.grid.scale, plain.grid.scale)
    assert torch.equal(ordered.grid.zero, plain.grid.zero)
    assert not torch.equal(ordered.codes, plain.codes)
    assert not bool(ordered.g_idx.any())


@pytest.mark.parametrize("settings", GROUPED)
def test_the_loss_is_the_damped_error_of_the_output(settings):
    weight, gram = problem()
    scheme = Scheme.grouped(INT3, 16)
    ours = gptq_solve(weight, gram, scheme, damping=0.05, **settings)
    damped = gram + 0.05 * gram.diagonal().mean() * EYE
    assert torch.allclose(ours.loss, output_error(weight - ours.weight(scheme), damped) / 2, rtol=1e-9)


def test_the_factor_is_that_of_the_inverse():
    _, gram = problem()
    factor = inverse_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * EYE
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    assert torch.allclose(factor.T @ factor @ damped, EYE, atol=1e-8)


def test_dead_inputs_are_zero_and_the_others_do_not_notice():
    weight, gram = problem()
    dead = torch.tensor([0, 5, 63])
    alive = torch.tensor([i for i in range(64) if i not in dead])
    gram = gram * 1e-6  # small activations: dead inputs must not set the damping
    gram[dead] = 0
    gram[:, dead] = 0
    for settings in ({}, {"act_order": True}):
        scheme = Scheme.per_row(INT4)
        ours = gptq_solve(weight, gram, scheme, **settings)
        assert ours.dead == 3
        assert not bool(ours.weight(scheme)[:, dead].any())
        rest = gptq_solve(weight[:, alive], gram[alive][:, alive], scheme, **settings)
        assert torch.equal(ours.codes[:, alive], rest.codes)


@pytest.mark.parametrize("solve", [gptq_solve, lambda w, g, s: round_to_nearest(w, s)], ids=["gptq", "nearest"])
def test_eight_bits_are_within_a_step_of_the_range(solve):
    weight, gram = problem(dtype=torch.float32)
    scheme = Scheme.per_row(INT8)
    error = solve(weight, 1e-3 * gram + torch.eye(64), scheme).weight(scheme) - weight
    reach = weight.amax(1) - weight.amin(1)
    assert (error.abs().amax(1) / reach).max() < 1 / 255


def test_search_and_shrink_reach_the_grid():
    weight, gram = problem()
    scheme = Scheme.grouped(INT3, 16)
    plain = gptq_solve(weight, gram, scheme, static_groups=True)
    searched = gptq_solve(weight, gram, scheme, static_groups=True, search=ShrinkSearch())
    assert torch.equal(searched.grid.scale, fit_grid(weight, scheme, ShrinkSearch()).scale)
    assert bool((searched.grid.scale <= plain.grid.scale).all())
    assert not torch.equal(searched.grid.scale, plain.grid.scale)
    smaller = gptq_solve(weight, gram, scheme, static_groups=True, shrink=0.5)
    assert torch.allclose(smaller.grid.scale, plain.grid.scale / 2)


def test_damping_is_raised_until_the_factorisation_holds():
    weight, gram = problem()
    gram = gram - (torch.linalg.eigvalsh(gram)[0] + 0.03 * gram.diagonal().mean()) * EYE
    ours = gptq_solve(weight, gram, Scheme.grouped(INT4, 16))
    assert (ours.rounding, ours.retries) == ("gptq", 1)
    assert ours.damping == pytest.approx(0.1)
    none = gptq_solve(weight, gram, Scheme.grouped(INT4, 16), damping=0.0)
    assert none.rounding == "gptq"
    assert none.retries > 0


def test_a_hopeless_gram_is_rounded_to_nearest_and_says_so():
    weight, gram = problem()
    scheme = Scheme.grouped(INT4, 16)
    ours = gptq_solve(weight, gram - 100 * gram.diagonal().mean() * EYE, scheme, act_order=True)
    assert ours.rounding == "nearest"
    assert ours.retries == 3
    assert torch.equal(ours.codes, round_to_nearest(weight, scheme).codes)


def test_a_factor_that_overflows_is_none():
    """H = R R^T with ones on R's diagonal and 1e5 beside it: R^-1 ends in 1e5^63."""
    upper = EYE + 1e5 * torch.diag(torch.ones(63, dtype=torch.float64), 1)
    gram = upper @ upper.T
    assert inverse_factor(gram, 0.0) is None
    assert inverse_factor(gram, 0.01) is not None
    ours = gptq_solve(problem()[0], gram, Scheme.grouped(INT4, 16), damping=0.0)
    assert (ours.rounding, ours.retries) == ("gptq", 1)


def test_inputs_that_were_never_seen_at_all_leave_nothing():
    weight, gram = problem()
    scheme = Scheme.grouped(INT4, 16)
    ours = gptq_solve(weight, 0 * gram, scheme)
    assert (ours.rounding, ours.retries, ours.dead) == ("gptq", 0, 64)
    assert not bool(ours.weight(scheme).any())


def test_the_loss_to_nearest_is_half_the_error_of_the_output():
    weight, gram = problem()
    scheme = Scheme.grouped(INT3, 16)
    nearest = round_to_nearest(weight, scheme, gram=gram)
    error = weight - nearest.weight(scheme)
    assert torch.allclose(nearest.loss, (error @ gram * error).sum(1) / 2)
    assert bool(round_to_nearest(weight, scheme).loss.isnan().all())


def test_more_inputs_than_tokens():
    weight, gram = problem(tokens=10, rank=4, dtype=torch.float32)
    ours = gptq_solve(weight, gram, Scheme.grouped(INT4, 16))
    assert ours.rounding == "gptq"
    nearest = round_to_nearest(weight, Scheme.grouped(INT4, 16), gram=gram)
    assert ours.loss.sum() < nearest.loss.sum()


def test_float_formats_go_through_the_same_solver():
    weight, gram = problem()
    scheme = Scheme.grouped(E4M3, 16)
    ours, nearest = gptq_solve(weight, gram, scheme), round_to_nearest(weight, scheme)
    assert ours.grid.zero is None
    values = [values_by_group(s.codes, s.grid, s.g_idx, scheme) for s in (ours, nearest)]
    assert output_error(weight - values[0], gram).sum() < output_error(weight - values[1], gram).sum()


def test_nothing_given_is_written_to():
    weight, gram = problem(dtype=torch.float32)
    gram[3] = gram[:, 3] = 0
    before = weight.clone(), gram.clone()
    gptq_solve(weight, gram, Scheme.grouped(INT4, 16))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize(("what", "words"), [("weight", "weight of mlp.up"), ("gram", "Gram matrix of mlp.up")])
def test_nan_names_the_layer(what, words):
    given = dict(zip(("weight", "gram"), problem(dtype=torch.float32), strict=True))
    given[what][2, 3] = float("nan")
    with pytest.raises(QuantizationError, match=words):
        gptq_solve(**given, scheme=Scheme.grouped(INT4, 16), name="mlp.up")


def test_shapes_and_schemes_that_do_not_fit():
    weight, gram = problem()
    with pytest.raises(QuantizationError, match=r"\[n, n\]"):
        gptq_solve(weight, gram[:32, :32], Scheme.per_row(INT4))
    with pytest.raises(QuantizationError, match="rows"):
        gptq_solve(weight, gram, Scheme.blocks(INT4, 4, 16))
