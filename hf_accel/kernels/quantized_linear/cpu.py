"""Packed weights in plain torch, some groups of inputs at a time. Right on any device.

A stretch of the weight is unpacked with whole-tensor integer operations into temporaries that stay in the cache. For
few tokens nothing as large as the weight is made, and neither zeros nor scales are applied to it: with a code c,
``sum_j x_j s (c_j - z) = s (sum_j x_j c_j - z sum_j x_j)`` over a group of inputs, so a group costs the unpacking and
one small product.
"""

from __future__ import annotations

import torch

from hf_accel.kernels.quantized_linear.layout import UNIT_CODES, UNIT_WORDS, Packed

# So many weights are unpacked at a time: 1 MiB of fp32.
_ELEMENTS = 1 << 18
_ELEMENTS_GPU = 1 << 25


def quantized_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """``[T, n]`` -> ``[T, m]`` for few tokens. See :func:`hf_accel.kernels.quantized_linear._quantized_linear`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, n = x.shape
    m = packed.qweight.shape[1]
    x = x.to(compute)
    out = x.new_zeros(tokens, m)
    if not tokens:
        return out
    unit = UNIT_CODES[packed.bits]
    size = packed.group_size
    if size is None or size % unit:
        for start, stop in _stretches(n, m, unit, x.is_cuda):
            out.addmm_(x[:, start:stop], dequantize_inputs(packed, start, stop, compute))
    else:
        zeros = unpack(packed.qzeros.T, packed.bits).T.to(compute).contiguous()
        scales = packed.scales.to(compute)
        stretches = _stretches(n, m, size, x.is_cuda)
        # Made once: memory handed back after every stretch would be mapped and cleared page by page for the next.
        integers = packed.qweight.new_empty(stretches[0][1], m)
        numbers = x.new_empty(stretches[0][1], m)
        for start, stop in stretches:
            groups = slice(start // size, -(-stop // size))
            length = stop - start
            words = packed.qweight[_words(packed.bits, start, stop)]
            codes = numbers[:length].copy_(unpack(words, packed.bits, integers[:length]))
            part, inside = x[:, start:stop], length // size * size
            if inside:
                whole = slice(groups.start, groups.start + inside // size)
                split = part[:, :inside].view(tokens, -1, size).transpose(0, 1)
                sums = torch.bmm(split, codes[:inside].view(-1, size, m))
                sums.sub_(split.sum(-1, keepdim=True) * zeros[whole, None])
                out += (sums * scales[whole, None]).sum(0)
            if inside < length:
                rest = part[:, inside:]
                sums = rest @ codes[inside:] - rest.sum(-1, keepdim=True) * zeros[groups.stop - 1]
                out.addcmul_(sums, scales[groups.stop - 1])
    if bias is not None:
        out += bias.to(compute)
    return out


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """``[m, n]`` in ``dtype``."""
    m, n = packed.qweight.shape[1], packed.in_features
    out = packed.scales.new_empty(m, n, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    step = max(32, (_ELEMENTS_GPU if out.is_cuda else _ELEMENTS) // n // 32 * 32)
    for start in range(0, m, step):
        stop = min(start + step, m)
        out[start:stop] = dequantize_rows(packed, start, stop, compute).to(dtype)
    return out


def dequantize_rows(packed: Packed, start: int, stop: int, compute: torch.dtype) -> torch.Tensor:
    """Weights ``[stop - start, n]`` of the outputs from ``start`` on, a multiple of 32; outputs lie side by side, which
    torch copies into rows by blocks."""
    bits, size = packed.bits, packed.group_size
    columns = slice(start, stop)
    zeros = unpack(packed.qzeros[:, start * bits // 32 : stop * bits // 32].T, bits).T.contiguous()
    scales = packed.scales[:, columns].to(compute)
    codes = unpack(packed.qweight[:, columns], bits)
    if size is not None and packed.in_features % size == 0:
        codes = codes.view(-1, size, stop - start).sub_(zeros[:, None])
        return codes.to(compute).mul_(scales[:, None]).view(-1, stop - start).T
    group = packed.g_idx.long()
    return codes.sub_(zeros[group]).to(compute).mul_(scales[group]).T


def dequantize_inputs(packed: Packed, start: int, stop: int, compute: torch.dtype) -> torch.Tensor:
    """Weights ``[stop - start, m]`` of the inputs from ``start`` on, which begin and end with a unit."""
    group = packed.g_idx[start:stop].long()
    used, group = group.unique(return_inverse=True)
    zeros = unpack(packed.qzeros[used].T, packed.bits).T.contiguous()
    codes = unpack(packed.qweight[_words(packed.bits, start, stop)], packed.bits)
    return (codes - zeros[group]).to(compute).mul_(packed.scales[used].to(compute)[group])


def unpack(words: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """int32 ``[w, m]`` -> codes int32 ``[w * 32 / bits, m]``, into ``out`` if given. See the reference."""
    count, m = words.shape
    if out is None:
        out = words.new_empty(count * 32 // bits, m)
    if bits != 3:
        shift = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        torch.bitwise_right_shift(words[:, None], shift[:, None], out=out.view(count, -1, m))
        return out.bitwise_and_((1 << bits) - 1)
    words, units = words.reshape(-1, 3, m), out.view(-1, 32, m)
    bit = torch.arange(0, 96, 3, dtype=torch.int32, device=words.device)
    shift = bit % 32
    torch.index_select(words, 1, bit // 32, out=units).bitwise_right_shift_(shift[:, None])
    # Codes 10 and 21 begin with the last 2 bits and the last bit of a word.
    units.bitwise_and_(((1 << (32 - shift).clamp(max=3)) - 1)[:, None])
    units[:, 10] |= (words[:, 1] & 1) << 2
    units[:, 21] |= (words[:, 2] & 3) << 1
    return out


def _words(bits: int, start: int, stop: int) -> slice:
    """Which words hold the codes ``start`` to ``stop - 1``, both multiples of a unit."""
    return slice(start // UNIT_CODES[bits] * UNIT_WORDS[bits], stop // UNIT_CODES[bits] * UNIT_WORDS[bits])


def _stretches(n: int, m: int, multiple: int, cuda: bool) -> list[tuple[int, int]]:
    """Begin and end of stretches of inputs, of a multiple of so many."""
    step = max(1, (_ELEMENTS_GPU if cuda else _ELEMENTS) // max(1, m * multiple)) * multiple
    return [(start, min(start + step, n)) for start in range(0, n, step)]
