"""The definition of a sparse update in a Hadamard basis: the whole F, the whole transform."""

from __future__ import annotations

import torch

from hf_accel.kernels.hadamard import reference
from hf_accel.kernels.qwha_weight.layout import row_of, unsigned_columns


def scatter(indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """F ``[m, n]`` of the coefficients; those at one place add up."""
    dense = values.new_zeros(len(indptr) - 1, n)
    return dense.index_put((row_of(indptr, len(values)), unsigned_columns(columns)), values, accumulate=True)


def qwha_weight(
    base: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    blocks: int | None = None,
) -> torch.Tensor:
    """``base + scale * F H / n`` ``[m, n]``, in fp32 (fp64 if the values are)."""
    dense = scatter(indptr, columns, values, base.shape[1])
    update = reference.hadamard(dense, inverse=True, scale=scale, blocks=blocks)
    return base.to(update.dtype) + update


def qwha_activation(
    x: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    blocks: int | None = None,
) -> torch.Tensor:
    """``scale * (x H^T / n) F^T``, which is x times the transpose of what :func:`qwha_weight` adds."""
    n = x.shape[-1]
    spectrum = reference.hadamard(x, scale=scale / (blocks or n), blocks=blocks)
    dense = scatter(indptr, columns, values, n)
    return spectrum @ dense.to(spectrum.dtype).T
