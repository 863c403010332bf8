"""The sparse F ``[m, n]`` by rows: row i owns ``values[indptr[i]:indptr[i + 1]]`` and as many columns."""

from __future__ import annotations

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unsigned_columns(columns: torch.Tensor) -> torch.Tensor:
    """int64 column numbers; int16 holds those of n up to 65,536 as unsigned bits."""
    return columns.long() & 0xFFFF if columns.dtype == torch.int16 else columns.long()


def row_of(indptr: torch.Tensor, count: int) -> torch.Tensor:
    """int64 ``[p]``: the row of every coefficient, of which there are ``count`` (known, so no wait for a GPU)."""
    rows = torch.arange(len(indptr) - 1, device=indptr.device)
    return rows.repeat_interleave(indptr.diff(), output_size=count)


def check_coefficients(
    op: str, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, n: int, m: int | None = None
) -> None:
    """Raise :class:`UnsupportedByKernel` for a sparse matrix that cannot be; offsets and columns only on a CPU."""
    checks.expect(op, "indptr", indptr, {"m + 1": None if m is None else m + 1}, torch.int32)
    if not len(indptr):
        raise UnsupportedByKernel(f"{op}: indptr must hold at least the 0 it begins with; it is empty.")
    checks.expect(op, "values", values, {"p": None})
    if values.dtype not in VALUE_DTYPES:
        raise UnsupportedByKernel(f"{op}: values must be float32, float16, bfloat16 or float64; got {values.dtype}.")
    checks.expect(op, "columns", columns, {"p": len(values)})
    if columns.dtype not in (torch.int16, torch.int32):
        raise UnsupportedByKernel(f"{op}: columns must be int16 (unsigned bits) or int32; got {columns.dtype}.")
    if columns.dtype == torch.int16 and n > 1 << 16:
        raise UnsupportedByKernel(f"{op}: int16 columns reach 65,536 inputs; there are {n}. Use int32.")
    checks.expect_one_device(op, indptr=indptr, columns=columns, values=values)
    if indptr.is_cuda or torch.compiler.is_compiling():
        return
    if indptr[0] != 0 or indptr[-1] != len(values) or (indptr.diff() < 0).any():
        raise UnsupportedByKernel(f"{op}: indptr must rise from 0 to the {len(values)} values.")
    if len(columns):
        # int16 as it is where its sign cannot be a bit of the number: converting a million costs more than a product.
        found = unsigned_columns(columns) if columns.dtype == torch.int16 and n > 1 << 15 else columns
        low, high = map(int, found.aminmax())
        if low < 0 or high >= n:
            raise UnsupportedByKernel(f"{op}: columns must lie in 0..{n - 1}; got {low}..{high}.")
