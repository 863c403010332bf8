"""Sparse coefficients by rows (CSR), as adapters hold them: ``indptr`` int32 ``[m + 1]``, ``columns`` ``[p]``, values.

Columns are int16 where n is at most 65,536, as unsigned bits, and int32 beyond; within a row they ascend.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_accel.errors import WeightsMismatch
from hf_accel.kernels.qwha_weight.layout import row_of, unsigned_columns


class Coefficients(NamedTuple):
    """F ``[m, n]``: row i owns ``values[indptr[i]:indptr[i + 1]]`` and as many columns."""

    indptr: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 rows and columns ``[p]``."""
        return row_of(self.indptr, len(self.values)), unsigned_columns(self.columns)


def stored_columns(columns: torch.Tensor, n: int) -> torch.Tensor:
    """Column numbers in the dtype in which they are kept."""
    return columns.to(torch.int16) if n <= 1 << 16 else columns.to(torch.int32)


def from_places(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, m: int, n: int) -> Coefficients:
    """By rows, columns ascending, from int64 places ``[p]`` in any order, no two alike."""
    order = (rows * n + columns).argsort()
    counts = torch.bincount(rows, minlength=m)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return Coefficients(indptr, stored_columns(columns[order], n), values[order])


def spread(m: int, n: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``indptr`` and ``columns`` of ``count`` places, spread over ``[m, n]`` at random and evenly.

    Row i takes its columns from one random order of all n, beginning at an offset that moves on from row to row: no
    column is used much more often than another, so F has full rank if its values are in general position, and the cost
    is that of writing the places down.
    """
    order = torch.randperm(n, generator=generator)
    counts = torch.full((m,), count // m)
    counts[torch.randperm(m, generator=generator)[: count % m]] += 1
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    rows = row_of(indptr, count)
    within = torch.arange(count) - indptr.long()[rows]
    columns = order[(rows * n // m + within) % n]
    return indptr, stored_columns((rows * n + columns).sort().values % n, n)


def combine(parts: Sequence[Coefficients]) -> Coefficients:
    """The sum of several F: the rows of each behind those of the former. Places that several have stand several times,
    which kernels add up. Differentiable with respect to the values."""
    if len(parts) == 1:
        return parts[0]
    indptr = torch.stack([part.indptr for part in parts]).sum(0, dtype=torch.int32)
    count = sum(len(part.values) for part in parts)
    columns = parts[0].columns.new_empty(count)
    dtype = functools.reduce(torch.promote_types, (part.values.dtype for part in parts))
    values = parts[0].values.new_zeros(count, dtype=dtype)
    begin = indptr[:-1].long()
    for part in parts:
        own = torch.arange(len(part.values), device=indptr.device)
        rows = row_of(part.indptr, len(part.values))
        places = own + (begin - part.indptr[:-1])[rows]
        columns = columns.index_copy(0, places, part.columns)
        values = values.index_copy(0, places, part.values.to(dtype))
        begin = begin + part.indptr.diff()
    return Coefficients(indptr, columns, values)


def add_up(parts: Sequence[Coefficients], n: int) -> Coefficients:
    """The sum of several F, each place once."""
    whole = combine(parts)
    rows, columns = whole.places
    keys, inverse = (rows * n + columns).unique(return_inverse=True)
    values = whole.values.new_zeros(len(keys)).index_add_(0, inverse, whole.values)
    return from_places(keys // n, keys % n, values, len(whole.indptr) - 1, n)


def check_positions(owner: str, indptr: torch.Tensor, columns: torch.Tensor, m: int, n: int) -> None:
    """Raise :class:`WeightsMismatch` unless these are positions of a sparse ``[m, n]``, ascending within rows."""
    wrong = None
    if tuple(indptr.shape) != (m + 1,):
        wrong = f"there are offsets for {len(indptr) - 1} outputs, the layer has {m}"
    elif indptr[0] != 0 or indptr[-1] != len(columns) or bool((indptr.diff() < 0).any()):
        wrong = f"the offsets do not rise from 0 to the {len(columns)} coefficients"
    elif len(columns):
        found = unsigned_columns(columns)
        rows = row_of(indptr, len(columns))
        if int(found.min()) < 0 or int(found.max()) >= n:
            wrong = f"columns reach from {int(found.min())} to {int(found.max())}, the layer has {n} inputs"
        elif bool(((found.diff() <= 0) & (rows.diff() == 0)).any()):
            wrong = "columns do not ascend within a row"
    if wrong is not None:
        raise WeightsMismatch(
            f"{owner}: positions of the adapter are not those of a [{m}, {n}] layer: {wrong}. Load an adapter of this "
            "model, or save the adapter again; positions cannot be guessed."
        )
