"""Codes out of packed words, for the Triton kernels that read a packed weight.

A column is a stream of bits, least significant first: code r is bits ``bits * r`` and on. At 3 bits codes 10 and 21 of
32 begin in one word and end in the next.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code_at(Words, r, stride, inside, BITS: tl.constexpr):
    """The ``r``-th code (int32) of the stream that begins at ``Words`` with words ``stride`` apart; 0 unless
    ``inside``. One load per code, two at 3 bits: for what is read seldom, or in no order."""
    bit = r * BITS
    shift = bit % 32
    word = Words + (bit // 32) * stride
    code = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if BITS == 3:
        spills = shift > 29
        rest = tl.load(word + tl.where(spills, stride, 0), mask=inside, other=0).to(tl.uint32, bitcast=True)
        code = code | tl.where(spills, rest << ((32 - shift) % 32).to(tl.uint32), 0)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def spread(words, BITS: tl.constexpr):
    """int32 words ``[M, W]`` -> codes ``[M, W * 32 / BITS]``, for bits that divide 32."""
    CODES: tl.constexpr = 32 // BITS
    shift = tl.arange(0, CODES) * BITS
    codes = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [words.shape[0], words.shape[1] * CODES])
