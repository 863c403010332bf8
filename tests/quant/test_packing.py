"""Packed words: the identity on every code, and the public layout written out by hand."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.kernels.quantized_linear import reference as kernel
from hf_accel.quant.packing import (
    PACKED_BITS,
    fits_v1,
    from_v1,
    pack_codes,
    pack_zeros,
    to_v1,
    unpack_codes,
    unpack_zeros,
)


def random_codes(n: int, m: int, bits: int, low: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 1 << bits, (n, m), dtype=torch.uint8, generator=generator)


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("n", "m"), [(32, 1), (96, 7), (256, 64)])
def test_pack_then_unpack_is_the_identity(bits, n, m):
    codes = random_codes(n, m, bits)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert list(words.shape) == [n * bits // 32, m]
    assert torch.equal(unpack_codes(words, bits, n), codes)
    assert torch.equal(unpack_codes(words.t().contiguous().t(), bits, n), codes)  # any strides


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_code_at_every_place(bits):
    codes = (torch.arange(32)[:, None] + torch.arange(1 << bits)).remainder(1 << bits).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 32), codes)
    full = torch.full((32, 1), (1 << bits) - 1, dtype=torch.uint8)
    assert unsigned(pack_codes(full, bits)) == [0xFFFFFFFF] * bits


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_words_are_one_string_of_bits_little_end_first(bits):
    codes = random_codes(64, 3, bits, seed=1)
    words = pack_codes(codes, bits).view(2, bits, 3)
    for run in range(2):
        for column in range(3):
            string = sum(int(codes[32 * run + j, column]) << (bits * j) for j in range(32))
            assert unsigned(words[run, :, column]) == [(string >> (32 * w)) & 0xFFFFFFFF for w in range(bits)]


def test_three_bits_are_the_released_kernels_split():
    """10 codes + 2 bits | 1 bit + 10 codes + 1 bit | 2 bits + 10 codes, as the card describes the packing loop."""
    codes = random_codes(32, 1, 3, seed=2)
    c = codes[:, 0].tolist()
    first = sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10))
    assert unsigned(pack_codes(codes, 3)) == [first, second, third]


def test_four_bits_by_hand():
    codes = torch.tensor([*range(16), *range(15, -1, -1)], dtype=torch.uint8)[:, None]
    assert unsigned(pack_codes(codes, 4)) == [0x76543210, 0xFEDCBA98, 0x89ABCDEF, 0x01234567]


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_the_kernels_definition_reads_what_is_written(bits):
    codes = random_codes(64, 5, bits, seed=3)
    assert torch.equal(kernel.unpack(pack_codes(codes, bits), bits), codes.int())


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_zeros_are_packed_along_the_other_axis(bits):
    zeros = random_codes(5, 96, bits)
    qzeros = pack_zeros(zeros, bits)
    assert list(qzeros.shape) == [5, 96 * bits // 32]
    assert qzeros.is_contiguous()
    assert torch.equal(qzeros[2], pack_codes(zeros[2][:, None], bits)[:, 0])
    assert torch.equal(unpack_zeros(qzeros, bits, 96), zeros)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_v1_is_one_less_in_every_code_and_back(bits):
    zeros = random_codes(3, 64, bits, low=1)
    qzeros = pack_zeros(zeros, bits)
    assert fits_v1(qzeros, bits)
    assert torch.equal(unpack_zeros(to_v1(qzeros, bits), bits, 64), zeros - 1)
    assert torch.equal(from_v1(to_v1(qzeros, bits), bits), qzeros)


def test_v1_at_four_bits_by_hand():
    symmetric = pack_zeros(torch.full((1, 32), 8, dtype=torch.uint8), 4)
    assert unsigned(symmetric) == [0x88888888] * 4
    assert unsigned(to_v1(symmetric, 4)) == [0x77777777] * 4


def test_v1_refuses_a_zero_of_zero_but_reads_gptqmodels_words():
    """GPTQModel subtracts 0x11111111 from the word: a zero of 0 borrows from its neighbour, adding gives back."""
    zeros = random_codes(2, 32, 4)
    zeros[1, 3] = 0
    qzeros = pack_zeros(zeros, 4)
    assert not fits_v1(qzeros, 4)
    with pytest.raises(QuantizationError, match=r"of 64 zeros are 0.*'gptq_v2'"):
        to_v1(qzeros, 4)
    theirs = torch.tensor([[(w - 0x11111111) & 0xFFFFFFFF for w in unsigned(row)] for row in qzeros], dtype=torch.int64)
    stored = torch.where(theirs >= 1 << 31, theirs - (1 << 32), theirs).int()
    assert torch.equal(from_v1(stored, 4), qzeros)


def test_what_cannot_be_packed():
    with pytest.raises(QuantizationError, match=r"40 codes along the packed axis.*pad it with zeros to 64"):
        pack_codes(random_codes(40, 2, 4), 4)
    with pytest.raises(QuantizationError, match="code 9 does not fit 3 bits"):
        pack_codes(torch.full((32, 2), 9, dtype=torch.uint8), 3)
    with pytest.raises(QuantizationError, match=r"uint8 \[n, m\]; got torch.int32"):
        pack_codes(torch.zeros(32, 2, dtype=torch.int32), 3)
    with pytest.raises(InvalidSetting, match="one of 2, 3, 4, 8"):
        pack_codes(random_codes(32, 2, 4), 5)
    with pytest.raises(QuantizationError, match=r"64 codes of 4 bits are int32 \[8, m\]"):
        unpack_codes(torch.zeros(4, 2, dtype=torch.int32), 4, 64)
