"""The transform in plain torch, as small products along one axis after another. Right on any device."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_accel.kernels.hadamard.orders import factor, order_matrix, sylvester

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
    step = max(1, elements // block)
    for start in range(0, len(rows), step):
        flat[start : start + step] = transform_rows(rows[start : start + step], transposed, scale)
    return out


def transform_rows(rows: torch.Tensor, transposed: bool, scale: float) -> torch.Tensor:
    """``scale * H v`` or ``scale * H^T v`` of all rows ``[R, n]`` at once, n a length with a transform; in fp32, or
    fp64 if given fp64."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    count, n = rows.shape
    parts = factor(n)
    if parts is None or not count:
        return rows.to(dtype)
    order, length = parts
    y = rows.to(dtype)
    inner = 1
    for size in factors(length):
        matrix = _constant(1, size, dtype, rows.device)
        y = _along(y, matrix, size, inner, scale)
        inner *= size
        scale = 1.0
    if order > 1:
        matrix = _constant(order, 1, dtype, rows.device)
        y = _along(y, matrix.T if transposed else matrix, order, inner, scale)
        scale = 1.0
    return (y if scale == 1 else y * scale).view(count, n)


def factors(length: int) -> list[int]:
    """``length`` = 2^m as the fewest factors of at most 32, as even as they can be, smallest first."""
    m = length.bit_length() - 1
    largest = _LARGEST_FACTOR.bit_length() - 1
    count = -(-m // largest)
    return [1 << ((m + i) // count) for i in range(count)]


def _along(y: torch.Tensor, matrix: torch.Tensor, size: int, inner: int, scale: float) -> torch.Tensor:
    """``scale * matrix`` applied to the axis of ``size`` elements that lie ``inner`` apart."""
    if inner == 1:
        y = y.reshape(-1, size)
        return torch.addmm(y.new_empty(1), y, matrix.T, beta=0, alpha=scale)
    y = y.reshape(-1, size, inner)
    return torch.baddbmm(y.new_empty(1), matrix.expand(len(y), size, size), y, beta=0, alpha=scale)


@lru_cache(maxsize=64)
def _constant(order: int, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    matrix = order_matrix(order) if order > 1 else sylvester(length)
    return matrix.to(device=device, dtype=dtype)
