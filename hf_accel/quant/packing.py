"""Codes of 2, 3, 4 or 8 bits in 32-bit words, as GPTQ checkpoints store them.

32 codes are ``bits`` words: one string of bits, little end first, in which code ``j`` has the bits
``[j * bits, (j + 1) * bits)``. At 2, 4 and 8 bits no code crosses a word. At 3 bits two of 32 do: the words hold 10
codes and 2 bits, 1 bit and 10 codes and 1 bit, 2 bits and 10 codes, which is the layout of the released GPTQ kernel
(arXiv 2210.17323).

Zeros come in two versions. ``gptq_v2`` holds them as they are, ``gptq`` (v1) holds zero - 1, so that it has no place
for a zero of 0. GPTQModel converts whole words at 2, 4 and 8 bits, with a borrow out of a zero of 0 into its neighbour
that its own reader takes back; other readers add 1 to every code. :func:`from_v1` reads what GPTQModel wrote,
:func:`to_v1` writes only what all read alike. At 3 bits older GPTQModel versions added the constants of the three words
in reversed order; the current one shifts every code, as here.
"""

from __future__ import annotations

import torch

from hf_accel.errors import InvalidSetting, QuantizationError

PACKED_BITS = (2, 3, 4, 8)
CODES_PER_RUN = 32


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 ``[n, m]`` as words int32 ``[n * bits / 32, m]``, packed along the first axis.

    Raises:
        QuantizationError: n is no multiple of 32, or a code needs more than ``bits``.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise QuantizationError(f"pack_codes: codes must be uint8 [n, m]; got {codes.dtype} {list(codes.shape)}.")
    n, m = codes.shape
    if n % CODES_PER_RUN:
        raise QuantizationError(
            f"pack_codes: {n} codes along the packed axis; the layout stores runs of {CODES_PER_RUN}. Leave a layer of "
            f"this size unpacked, or pad it with zeros to {-(-n // CODES_PER_RUN) * CODES_PER_RUN}."
        )
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise QuantizationError(f"pack_codes: code {int(codes.max())} does not fit {bits} bits.")
    runs = codes.int().view(-1, CODES_PER_RUN, m)
    words = runs.new_zeros(runs.shape[0], bits, m)
    for j in range(CODES_PER_RUN):
        word, shift = divmod(j * bits, 32)
        words[:, word] |= runs[:, j] << shift
        if shift + bits > 32:
            words[:, word + 1] |= runs[:, j] >> (32 - shift)
    return words.view(-1, m)


def unpack_codes(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Codes uint8 ``[n, m]`` of words int32 ``[n * bits / 32, m]``: the inverse of :func:`pack_codes`."""
    _check_bits(bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[0] * 32 != n * bits or n % CODES_PER_RUN:
        raise QuantizationError(
            f"unpack_codes: {n} codes of {bits} bits are int32 [{n * bits / 32:g}, m], n a multiple of "
            f"{CODES_PER_RUN}; got {words.dtype} {list(words.shape)}."
        )
    runs = words.reshape(-1, bits, words.shape[1])
    codes = torch.empty(n // CODES_PER_RUN, CODES_PER_RUN, words.shape[1], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for j in range(CODES_PER_RUN):
        word, shift = divmod(j * bits, 32)
        code = runs[:, word] >> shift  # of the sign that fills in from above the mask leaves nothing
        if shift + bits > 32:
            code = code & ((1 << (32 - shift)) - 1) | runs[:, word + 1] << (32 - shift)
        codes[:, j] = code & mask
    return codes.view(n, -1)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zeros uint8 ``[groups, out]`` as int32 ``[groups, out * bits / 32]``: along the last axis, unlike weights."""
    return pack_codes(zeros.t(), bits).t().contiguous()


def unpack_zeros(qzeros: torch.Tensor, bits: int, out: int) -> torch.Tensor:
    """Zeros uint8 ``[groups, out]`` of ``qzeros`` int32 ``[groups, out * bits / 32]``."""
    return unpack_codes(qzeros.t(), bits, out).t().contiguous()


def fits_v1(qzeros: torch.Tensor, bits: int) -> bool:
    """Whether the v1 layout can hold these true zeros: none of them is 0."""
    return bool((unpack_zeros(qzeros, bits, qzeros.shape[1] * 32 // bits) > 0).all())


def to_v1(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """True zeros int32 ``[groups, out * bits / 32]`` as v1 stores them: every one less 1.

    Raises:
        QuantizationError: a zero of 0. Ask :func:`fits_v1` first.
    """
    zeros = unpack_zeros(qzeros, bits, qzeros.shape[1] * 32 // bits)
    empty = int((zeros == 0).sum())
    if empty:
        raise QuantizationError(
            f"to_v1: {empty} of {zeros.numel()} zeros are 0, which checkpoint_format 'gptq' (v1) cannot hold: it "
            "stores zero - 1, and readers disagree about what lies below 0. Save as checkpoint_format 'gptq_v2', "
            "or quantise symmetrically."
        )
    return pack_zeros(zeros - 1, bits)


def from_v1(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored v1 zeros int32 ``[groups, out * bits / 32]`` as true zeros, as GPTQModel reads them: one more each, of
    whole words at 2, 4 and 8 bits (a carry runs on into the next code), of every code for itself at 3."""
    _check_bits(bits)
    if bits == 3:
        out = qzeros.shape[1] * 32 // bits
        return pack_zeros((unpack_zeros(qzeros, bits, out) + 1) & 7, bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return qzeros + ones  # int32 wraps around


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise InvalidSetting("packing", "bits", bits, f"one of {', '.join(map(str, PACKED_BITS))}")
