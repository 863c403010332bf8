"""Grids: ranges, rounding and saturation for every group shape, in dB; identities first."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.formats import E2M1, E4M3, E5M2, FORMATS, INT2, INT3, INT4, INT8
from hf_accel.quant.grid import Grid, Scheme, ShrinkSearch, decode, encode, fit_grid, power_of_two, round_to_grid
from hf_accel.quant.quality import relative_error, sqnr_db

INTEGERS = [INT2, INT3, INT4, INT8]
SHAPES = {
    "tensor": Scheme.per_tensor,
    "row": Scheme.per_row,
    "grouped": lambda f, **k: Scheme.grouped(f, 8, **k),
    "ragged": lambda f, **k: Scheme.grouped(f, 9, **k),
    "by column": lambda f, **k: Scheme.by_column(f, 5, **k),
    "blocks": lambda f, **k: Scheme.blocks(f, 3, 7, **k),
}


def gaussian(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block_of(weight: torch.Tensor, scheme: Scheme, i: int, j: int) -> torch.Tensor:
    rows, columns = scheme.block(weight.shape)
    return weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("scale_rule", ["float", "power_of_two"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_block_is_rounded_as_if_it_were_alone(shape, format, scale_rule, symmetric):
    weight = gaussian(11, 29)
    scheme = SHAPES[shape](format, symmetric=symmetric, scale_rule=scale_rule)
    grid = fit_grid(weight, scheme)
    rounded = round_to_grid(weight, grid, scheme)
    assert tuple(grid.scale.shape) == scheme.grid_shape(weight.shape)
    assert (grid.zero is None) == format.is_float
    whole = Scheme.per_tensor(format, symmetric=symmetric, scale_rule=scale_rule)
    for i in range(grid.scale.shape[0]):
        for j in range(grid.scale.shape[1]):
            alone = block_of(weight, scheme, i, j)
            assert torch.equal(block_of(rounded, scheme, i, j), round_to_grid(alone, fit_grid(alone, whole), whole)), (
                i,
                j,
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_rounding_twice_is_rounding_once(shape, format):
    weight, scheme = gaussian(11, 29), SHAPES[shape](format)
    grid = fit_grid(weight, scheme)
    once = round_to_grid(weight, grid, scheme)
    assert torch.equal(round_to_grid(once, grid, scheme), once)
    assert torch.equal(decode(encode(weight, grid, scheme), grid, scheme), once)


@pytest.mark.parametrize("format", INTEGERS, ids=repr)
def test_integer_codes_are_in_range_whole_and_the_formula_of_the_card(format):
    weight = gaussian(13, 40)
    scheme = Scheme.grouped(format, 8)
    grid = fit_grid(weight, scheme)
    codes = encode(weight, grid, scheme)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= format.levels - 1
    assert int(codes.max()) > format.levels - 2  # the range is used up to its end
    assert int(codes.min()) == 0
    assert torch.equal(grid.zero, grid.zero.round())
    groups = weight.view(13, 5, 8)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (format.levels - 1)
    zero = (-low / scale).round()
    torch.testing.assert_close(grid.scale, scale)
    assert torch.equal(grid.zero, zero)
    by_hand = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, format.levels - 1)
    assert torch.equal(codes.view(13, 5, 8).float(), by_hand)
    torch.testing.assert_close(
        decode(codes, grid, scheme).view(13, 5, 8), scale[..., None] * (by_hand - zero[..., None])
    )


@pytest.mark.parametrize("format", INTEGERS, ids=repr)
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_value_is_off_by_more_than_half_a_step(format, symmetric):
    """An asymmetric range is covered to half a step. A symmetric one has no code at its upper end: 2**b - 1 steps
    around a zero that stands half a step off the middle, so again half a step."""
    weight, scheme = gaussian(40, 64), Scheme.per_row(format, symmetric=symmetric)
    grid = fit_grid(weight, scheme)
    off = (round_to_grid(weight, grid, scheme) - weight).abs() / grid.scale
    assert 0.45 < float(off.max()) <= 0.5 + 1e-4


def test_eight_bits_are_within_a_255th_of_the_largest_weight():
    weight = gaussian(64, 64, dtype=torch.float64)
    for symmetric in (False, True):
        scheme = Scheme.per_row(INT8, symmetric=symmetric)
        off = (round_to_grid(weight, fit_grid(weight, scheme), scheme) - weight).abs().amax(1)
        assert bool((off <= weight.abs().amax(1) / 255 * (1 + 1e-9)).all())
        assert relative_error(weight, round_to_grid(weight, fit_grid(weight, scheme), scheme)) < 0.01


def test_symmetric_zero_is_the_middle_even_without_a_negative_weight():
    weight = gaussian(4, 64).abs()
    scheme = Scheme.per_row(INT4, symmetric=True)
    grid = fit_grid(weight, scheme)
    assert torch.equal(grid.zero, torch.full((4, 1), 8.0))
    assert torch.allclose(grid.scale[:, 0], 2 * weight.amax(1) / 15)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_zeros_stay_zeros_and_have_the_range_of_one(format):
    weight = gaussian(4, 32)
    weight[1] = 0
    weight[2, 5:9] = 0
    for symmetric in (False, True):
        scheme = Scheme.per_row(format, symmetric=symmetric)
        grid = fit_grid(weight, scheme)
        assert bool((round_to_grid(weight, grid, scheme)[weight == 0] == 0).all())
        assert float(grid.scale[1, 0]) == pytest.approx((1 if format.is_float else 2) / format.largest)
    assert bool((fit_grid(weight * 1e-30, Scheme.per_row(format), scale_dtype=torch.float16).scale > 0).all())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_power_of_two_scales(format, symmetric):
    weight = gaussian(300, 16) * torch.logspace(-3, 3, 300)[:, None]
    scheme = Scheme.per_row(format, symmetric=symmetric, scale_rule="power_of_two")
    scale = fit_grid(weight, scheme).scale
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    largest = weight.abs().amax(1, keepdim=True)
    if format.is_float:
        assert torch.equal(scale, (largest.log2().floor() - format.max_exponent).exp2())
    else:
        low, high = weight.amin(1, True).clamp(max=0), weight.amax(1, True).clamp(min=0)
        exact = (2 * largest if symmetric else high - low) / (format.levels - 1)
        assert bool(((scale >= exact) & (scale < 2 * exact)).all())


def test_a_range_that_is_a_power_of_two_already_keeps_its_scale():
    weight = torch.tensor([[-7.5, 7.5, 1.0], [-60.0, 3.0, 0.0], [-3.75, 0.1, 0.2]])
    scheme = Scheme.per_row(INT4, symmetric=True, scale_rule="power_of_two")
    assert fit_grid(weight, scheme).scale[:, 0].tolist() == [1.0, 8.0, 0.5]


def test_power_of_two_is_exact_for_every_exponent():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


def test_integer_sqnr_grows_by_six_db_a_bit():
    weight = gaussian(64, 256)
    decibels = []
    for format in INTEGERS:
        scheme = Scheme.per_row(format)
        decibels.append(sqnr_db(weight, round_to_grid(weight, fit_grid(weight, scheme), scheme)))
    two, three, four, eight = decibels
    assert eight > 40
    assert three - two == pytest.approx(6.02, abs=1.5)  # two bits saturate the law: three steps across the range
    assert four - three == pytest.approx(6.02, abs=1)
    assert (eight - four) / 4 == pytest.approx(6.02, abs=0.3)


def test_float_sqnr():
    """A float's error is relative: E4M3 has 4 bits of significand, about 31 dB at any scale, E5M2 6 dB less."""
    weight = gaussian(64, 256) * torch.logspace(-2, 2, 64)[:, None]
    decibels = {
        f: sqnr_db(weight, round_to_grid(weight, fit_grid(weight, Scheme.per_row(f)), Scheme.per_row(f)))
        for f in (E4M3, E5M2, E2M1)
    }
    assert 30 < decibels[E4M3] < 33
    assert decibels[E4M3] - decibels[E5M2] == pytest.approx(6.02, abs=0.5)
    assert decibels[E2M1] > 15


def test_finer_blocks_are_never_worse():
    weight = gaussian(32, 64) * torch.logspace(-1, 1, 64)
    errors = [
        relative_error(weight, round_to_grid(weight, fit_grid(weight, s), s))
        for s in (Scheme.per_tensor(INT4), Scheme.per_row(INT4), Scheme.grouped(INT4, 32), Scheme.grouped(INT4, 8))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[1]


@pytest.mark.parametrize("format", [INT2, INT4, E2M1, E4M3], ids=repr)
@pytest.mark.parametrize("rule", ["float", "power_of_two"])
def test_shrink_search_is_never_worse_in_its_own_norm_block_by_block(format, rule):
    weight = gaussian(20, 64)
    scheme = Scheme.grouped(format, 16, scale_rule=rule)
    search = ShrinkSearch(norm=2.4)

    def errors(grid):
        return (round_to_grid(weight, grid, scheme) - weight).abs().pow(2.4).view(20, 4, 16).sum(-1)

    plain, found = errors(fit_grid(weight, scheme)), errors(fit_grid(weight, scheme, search))
    assert bool((found <= plain * (1 + 1e-6)).all())
    if format is INT2:
        assert float(found.sum()) < 0.9 * float(plain.sum())


def test_shares_of_the_search_are_the_cards():
    shares = ShrinkSearch().shares()
    assert len(shares) == 79
    assert shares[0] == 0.99
    assert shares[-1] == pytest.approx(0.21)
    assert ShrinkSearch(most=0).shares() == []


def test_shrink_scales_the_grid_and_leaves_zero():
    weight, scheme = gaussian(8, 64), Scheme.per_row(INT3)
    plain, small = fit_grid(weight, scheme), fit_grid(weight, scheme, shrink=0.8)
    torch.testing.assert_close(small.scale, 0.8 * plain.scale)
    assert torch.equal(small.zero, plain.zero)


@pytest.mark.parametrize("format", [INT2, INT4, E2M1, E4M3], ids=repr)
def test_stochastic_rounding_is_unbiased_and_lands_on_a_neighbour(format):
    weight, scheme = gaussian(4, 16), Scheme.per_tensor(format, symmetric=True)
    grid = fit_grid(1.5 * weight, scheme)  # nothing saturates
    generator = torch.Generator().manual_seed(7)
    draws = torch.stack([round_to_grid(weight, grid, scheme, "stochastic", generator) for _ in range(2000)])
    off = draws.mean(0) - weight
    spread = draws.std(0) / 2000**0.5
    assert float((off.abs() - 4.5 * spread).max()) <= 1e-6  # 64 means within 4.5 sigma
    assert float(off.abs().max()) > 0
    below = torch.where(draws <= weight, draws, -torch.inf).amax(0)
    above = torch.where(draws >= weight, draws, torch.inf).amin(0)
    assert bool(((draws == below) | (draws == above)).all())
    nearest = round_to_grid(weight, grid, scheme)
    assert bool(((nearest == below) | (nearest == above)).all())


def test_stochastic_rounding_keeps_values_on_the_grid_and_its_own_generator():
    weight, scheme = gaussian(16, 16), Scheme.per_row(INT4)
    grid = fit_grid(weight, scheme)
    on_grid = round_to_grid(weight, grid, scheme)
    state = torch.get_rng_state()
    draw = [encode(weight, grid, scheme, "stochastic", torch.Generator().manual_seed(3)) for _ in range(2)]
    exact = round_to_grid(on_grid.double(), Grid(grid.scale.double(), grid.zero.double()), scheme)
    again = round_to_grid(
        exact, Grid(grid.scale.double(), grid.zero.double()), scheme, "stochastic", torch.Generator().manual_seed(3)
    )
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert sqnr_db(exact, again) > 100
    with pytest.raises(InvalidSetting, match=r"generator.*a torch\.Generator"):
        encode(weight, grid, scheme, "stochastic")
    with pytest.raises(InvalidSetting, match="one of nearest, stochastic"):
        encode(weight, grid, scheme, "up")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_to_what_will_be_stored_before_they_are_used(dtype):
    weight, scheme = gaussian(8, 64), Scheme.grouped(INT4, 16)
    grid = fit_grid(weight, scheme, ShrinkSearch(), scale_dtype=dtype)
    assert grid.scale.dtype == torch.float32
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    with pytest.raises(QuantizationError, match=r"does not fit torch\.float16.*bfloat16"):
        fit_grid(weight * 1e6, scheme, scale_dtype=torch.float16)


def test_half_and_double_weights():
    weight, scheme = gaussian(8, 64), Scheme.per_row(INT4)
    assert fit_grid(weight.half(), scheme).scale.dtype == torch.float32
    assert fit_grid(weight.double(), scheme).scale.dtype == torch.float64
    grid = fit_grid(weight, scheme)
    assert decode(encode(weight.half(), grid, scheme), grid, scheme, torch.float16).dtype == torch.float16


def test_what_cannot_be():
    weight, scheme = gaussian(8, 64), Scheme.per_row(INT4)
    bad = weight.clone()
    bad[2, 3] = float("nan")
    bad[4, 3] = float("inf")
    with pytest.raises(QuantizationError, match="2 of 512 weights are NaN or infinite"):
        fit_grid(bad, scheme)
    with pytest.raises(QuantizationError, match=r"float matrix \[out, in\]; got torch.float32 \[2, 3, 4\]"):
        fit_grid(gaussian(2, 3, 4), scheme)
    with pytest.raises(QuantizationError, match=r"scale must be \[8, 4\].*got \[8, 1\]"):
        encode(weight, fit_grid(weight, scheme), Scheme.grouped(INT4, 16))
    with pytest.raises(QuantizationError, match="needs its zero"):
        encode(weight, Grid(torch.ones(8, 1)), scheme)
    for wrong in (0, -3, 2.5, True):
        with pytest.raises(InvalidSetting, match="a positive int, or None"):
            Scheme.grouped(INT4, wrong)
    with pytest.raises(InvalidSetting, match="one of float, power_of_two"):
        Scheme.per_row(INT4, scale_rule="e8m0")
    with pytest.raises(InvalidSetting, match="at least 0 and below 1"):
        ShrinkSearch(most=1.0)
