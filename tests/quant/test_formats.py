"""Element formats: every code against an enumerated table or torch's own float8, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from hf_accel.errors import InvalidSetting
from hf_accel.quant.formats import E2M1, E4M3, E5M2, FORMATS, INT2, INT3, INT4, INT8, format_of
from hf_accel.quant.grid import codes_of, values_of

TORCH_FLOATS = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]
ONE = torch.ones(())


@pytest.mark.parametrize(("format", "dtype"), TORCH_FLOATS)
def test_every_code_means_what_torch_says(format, dtype):
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    torch.testing.assert_close(format.table(), theirs, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(torch.signbit(format.table()[:255:128]), torch.tensor([False, True]))


def test_e2m1_is_the_enumerated_table():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert E2M1.table().tolist() == positive + [-v for v in positive]
    assert math.copysign(1, E2M1.table()[8]) == -1


@pytest.mark.parametrize(("format", "dtype"), TORCH_FLOATS)
def test_rounding_is_torchs_cast_bit_by_bit(format, dtype):
    """Every fp16 number in range, so every tie, every subnormal and both zeros."""
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float()
    x = every[every.abs() <= format.largest]
    assert x.numel() > 30_000
    assert torch.equal(codes_of(x, ONE, None, format), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize(("format", "dtype"), TORCH_FLOATS)
def test_beyond_the_largest_saturates(format, dtype):
    """As OCP's saturating conversion. Torch's cast goes to infinity in E5M2; in E4M3 older versions give NaN."""
    x = torch.tensor([1.2, 100.0, float("inf")]) * format.largest
    assert format is E4M3 or x.to(dtype).float().tolist() == [float("inf")] * 3
    assert values_of(codes_of(x, ONE, None, format), ONE, None, format).tolist() == [format.largest] * 3
    assert values_of(codes_of(-x, ONE, None, format), ONE, None, format).tolist() == [-format.largest] * 3
    nan = torch.tensor([float("nan")])
    assert torch.equal(codes_of(nan, ONE, None, format), nan.to(dtype).view(torch.uint8))


def test_e2m1_rounds_to_the_nearest_and_ties_to_the_even_mantissa():
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 7.0, -0.75, -2.5])
    wanted = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, -2.0])
    assert torch.equal(values_of(codes_of(x, ONE, None, E2M1), ONE, None, E2M1), wanted)
    dense = torch.linspace(-6, 6, 4001)
    ours = values_of(codes_of(dense, ONE, None, E2M1), ONE, None, E2M1)
    assert torch.equal((ours - dense).abs(), (dense[:, None] - E2M1.table()).abs().amin(1))


@pytest.mark.parametrize("format", [E4M3, E5M2, E2M1])
def test_every_number_of_a_format_encodes_to_its_own_code(format):
    codes = torch.arange(format.levels, dtype=torch.uint8)[format.table().isfinite()]
    assert torch.equal(codes_of(format.table()[codes.long()], ONE, None, format), codes)


def test_sizes_of_the_formats():
    assert [f.levels for f in (INT2, INT3, INT4, INT8)] == [4, 8, 16, 256]
    assert [f.largest for f in (INT4, E4M3, E5M2, E2M1)] == [15, 448, 57344, 6]
    assert [f.max_exponent for f in (E4M3, E5M2, E2M1)] == [8, 15, 2]
    assert [f.min_exponent for f in (E4M3, E5M2, E2M1)] == [-6, -14, 0]


def test_names():
    assert [format_of(name) for name in FORMATS] == list(FORMATS.values())
    assert format_of("E4M3") is E4M3
    assert format_of(3) is INT3
    assert format_of(INT2) is INT2
    with pytest.raises(InvalidSetting, match=r"int2, int3, int4, int8, e4m3, e5m2, e2m1 \(did you mean 'int4'"):
        format_of("int44")
    with pytest.raises(InvalidSetting, match="one of int2"):
        format_of(5)
