"""The definition of the transform: a product with the whole matrix."""

from __future__ import annotations

import torch

from hf_accel.kernels.hadamard.orders import hadamard_matrix


def hadamard(x: torch.Tensor, *, inverse: bool = False, scale: float = 1.0, blocks: int | None = None) -> torch.Tensor:
    """``scale * H v`` of every row v of ``x`` ``[..., n]``, or ``scale * H^T v / block``; fp32 (fp64 if given fp64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    block = blocks or x.shape[-1]
    matrix = hadamard_matrix(block, dtype, x.device)
    parts = x.to(dtype).unflatten(-1, (-1, block))
    out = parts @ matrix / block if inverse else parts @ matrix.T
    return scale * out.flatten(-2)
