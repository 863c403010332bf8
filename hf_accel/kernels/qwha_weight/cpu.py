"""Sparse updates in a Hadamard basis in plain torch, some rows at a time. Right on any device.

The scattered rows, their transform and the base that is added to them stay in the cache: F is never stored whole.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_accel.kernels.hadamard import cpu as hadamard
from hf_accel.kernels.quantized_linear import Packed
from hf_accel.kernels.quantized_linear import cpu as quantized
from hf_accel.kernels.qwha_weight.layout import row_of, unsigned_columns

_ELEMENTS = 1 << 17
_ELEMENTS_GPU = 1 << 26


def qwha_weight(
    base: torch.Tensor | None,
    packed: Packed | None,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    block: int,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.qwha_weight._qwha_weight`."""
    m = len(indptr) - 1
    out = values.new_empty(m, n, dtype=dtype)
    precise = torch.float64 if torch.float64 in (values.dtype, dtype) else torch.float32
    places = row_of(indptr, len(values)) * n + unsigned_columns(columns)
    values = values.to(precise)
    rows = _rows_at_once(n, values.is_cuda)
    if packed is not None:
        # Columns of packed words in whole units and cache lines.
        rows = max(32, rows // 32 * 32)
    # One wait for the device, none per stretch.
    bounds = [*indptr[::rows].tolist(), len(values)]
    buffers = hadamard.scratch(min(rows, m) * (n // block), block, precise, values.device)
    for index, start in enumerate(range(0, m, rows)):
        stop = min(start + rows, m)
        own = slice(bounds[index], bounds[index + 1])
        stretch = buffers[:, : (stop - start) * (n // block)]
        dense = stretch[0].zero_()
        dense.view(-1).index_add_(0, places[own] - start * n, values[own])
        update = hadamard.transform_rows(dense, True, scale / block, stretch).view(-1, n)
        if base is not None:
            update.add_(base[start:stop])
        elif packed is not None:
            update.add_(quantized.dequantize_rows(packed, start, stop, precise))
        out[start:stop] = update
    return out


def qwha_gradient(
    grad: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, scale: float, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.qwha_weight._qwha_gradient`."""
    m, n = grad.shape
    count = len(columns)
    out = grad.new_empty(count, dtype=dtype)
    places = row_of(indptr, count) * n + unsigned_columns(columns)
    rows = _rows_at_once(n, grad.is_cuda)
    bounds = [*indptr[::rows].tolist(), count]
    precise = torch.float64 if grad.dtype == torch.float64 else torch.float32
    buffers = hadamard.scratch(min(rows, m) * (n // block), block, precise, grad.device)
    for index, start in enumerate(range(0, m, rows)):
        own = slice(bounds[index], bounds[index + 1])
        stretch = grad[start : start + rows].reshape(-1, block)
        spectrum = hadamard.transform_rows(stretch, False, scale / block, buffers[:, : len(stretch)])
        out[own] = spectrum.flatten()[places[own] - start * n].to(dtype)
    return out


def sparse_product(
    spectrum: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``spectrum F^T``: ``[T, n]`` -> ``[T, m]`` in the dtype of ``spectrum``."""
    return _bags(spectrum, unsigned_columns(columns), indptr.long(), values)


def sparse_product_backward(
    grad: torch.Tensor,
    spectrum: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``spectrum`` and of ``values``; an empty tensor for one that is not needed."""
    grad_spectrum, grad_values = spectrum.new_empty(0), values.new_empty(0)
    rows, places = row_of(indptr, len(values)), unsigned_columns(columns)
    if needs[0]:
        # F as a matrix by columns: the same arrays, put into the order of the columns.
        order = places.argsort(stable=True)
        counts = torch.bincount(places, minlength=spectrum.shape[1])
        pointer = F.pad(counts.cumsum(0), (1, 0))
        grad_spectrum = _bags(grad, rows[order], pointer, values[order])
    if needs[1]:
        left, right = grad.T.contiguous(), spectrum.T.contiguous()
        grad_values = torch.empty_like(values)
        step = max(1, (_ELEMENTS_GPU if grad.is_cuda else _ELEMENTS) // max(1, len(grad)))
        for start in range(0, len(values), step):
            own = slice(start, start + step)
            grad_values[own] = (left[rows[own]] * right[places[own]]).sum(1)
    return grad_spectrum, grad_values


def _bags(x: torch.Tensor, columns: torch.Tensor, pointer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``x M^T`` for M by rows, ``[T, n]`` -> ``[T, m]``: every row of M is a weighted bag of columns of x."""
    table = x.T.contiguous()
    bags = F.embedding_bag(
        columns, table, pointer, mode="sum", per_sample_weights=values.to(x.dtype), include_last_offset=True
    )
    return bags.T.contiguous()


def _rows_at_once(n: int, cuda: bool) -> int:
    return max(1, (_ELEMENTS_GPU if cuda else _ELEMENTS) // n)
