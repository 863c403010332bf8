"""The transform in plain torch, as small products along one axis after another. Right on any device."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_accel.kernels.hadamard.orders import order_matrix, require_factor, sylvester

# So many elements are transformed at a time, so that every axis after the first finds them in the cache.
_ELEMENTS = 1 << 17
_ELEMENTS_GPU = 1 << 26
# The largest Sylvester factor. A pass over the cache costs about as much as the products of 16: three axes of 16 took
# half the time of two of 64, and a quarter of that of 12 rounds of additions.
_LARGEST_FACTOR = 32


def transform(x: torch.Tensor, transposed: bool, scale: float, block: int) -> torch.Tensor:
    """See :func:`hf_accel.kernels.hadamard._transform`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, flat = x.reshape(-1, block), out.view(-1, block)
    elements = _ELEMENTS_GPU if x.is_cuda else _ELEMENTS
    step = min(len(rows), max(1, elements // block))
    buffers = scratch(step, block, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
    for start in range(0, len(rows), max(1, step)):
        part = rows[start : start + step]
        flat[start : start + step] = transform_rows(part, transposed, scale, buffers[:, : len(part)])
    return out


def scratch(count: int, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What :func:`transform_rows` works in. Made once for many stretches: memory handed back to the system after each
    would be mapped and cleared page by page for the next, which can take longer than the transform."""
    return torch.empty(2, count, n, dtype=dtype, device=device)


def transform_rows(rows: torch.Tensor, transposed: bool, scale: float, buffers: torch.Tensor) -> torch.Tensor:
    """``scale * H v`` or ``scale * H^T v`` of all rows ``[R, n]`` at once, n a length with a transform; in the dtype of
    ``buffers`` ``[2, R, n]``, one of which is returned. The first may be ``rows`` themselves."""
    order, length = require_factor("hadamard", rows.shape[1])
    axes = [(1, size, inner) for size, inner in _strides(length)] + [(order, order, length)] * (order > 1)
    first, second = buffers
    y = rows if rows.dtype == first.dtype and rows.is_contiguous() else first.copy_(rows)
    if not axes:
        return first.copy_(y).mul_(scale)
    for kind, size, inner in axes:
        matrix = _constant(kind, size, first.dtype, rows.device)
        _along(y, matrix.T if transposed else matrix, size, inner, scale, second)
        y, first, second = second, second, first
        scale = 1.0
    return y


def _strides(length: int) -> list[tuple[int, int]]:
    """Size and stride of every axis of a length."""
    found, inner = [], 1
    for size in factors(length):
        found.append((size, inner))
        inner *= size
    return found


def factors(length: int) -> list[int]:
    """``length`` = 2^m as the fewest factors of at most 32, as even as they can be, smallest first."""
    m = length.bit_length() - 1
    largest = _LARGEST_FACTOR.bit_length() - 1
    count = -(-m // largest)
    return [1 << ((m + i) // count) for i in range(count)]


def _along(y: torch.Tensor, matrix: torch.Tensor, size: int, inner: int, scale: float, out: torch.Tensor) -> None:
    """``scale * matrix`` applied to the axis of ``size`` elements that lie ``inner`` apart, into ``out``."""
    none = y.new_empty(1)
    if inner == 1:
        torch.addmm(none, y.view(-1, size), matrix.T, beta=0, alpha=scale, out=out.view(-1, size))
        return
    y = y.view(-1, size, inner)
    torch.baddbmm(none, matrix.expand(len(y), size, size), y, beta=0, alpha=scale, out=out.view(-1, size, inner))


@lru_cache(maxsize=64)
def _constant(order: int, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    matrix = order_matrix(order) if order > 1 else sylvester(length)
    return matrix.to(device=device, dtype=dtype)
