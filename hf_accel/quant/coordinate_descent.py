"""Re-round a quantised matrix, one input at a time, to the best code given all others.

In the manner of COMQ ("COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization", arXiv 2403.07134), as
the base models of QWHA (arXiv 2509.17428) have it after MagR and GPTQ: 30 sweeps at 2 bits, one at 3 and 4.

The error ``tr((Q - W) S (Q - W)^T)`` with ``S`` the Gram matrix is a parabola in one column of ``Q`` while the others
stand still. So the code next to its lowest point is the best there is, and no step raises the error. The released code
adds 0.75 of the mean to the diagonal of ``S``: then it is the error for that ``S`` that never rises, which keeps ``Q``
nearer to ``W`` than the calibration inputs alone would. Where the card is silent: the addition is part of the whole
``S``, in the slope as in the curvature; grids stay as they are.
"""

from __future__ import annotations

import torch

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.formats import Format
from hf_accel.quant.grid import Grid, codes_of, values_of


def sweep(
    weight: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    gram: torch.Tensor,
    sweeps: int,
    *,
    format: Format,
    g_idx: torch.Tensor,
    inflation: float = 0.75,
    block_size: int = 128,
) -> torch.Tensor:
    """Better codes uint8 ``[m, n]``.

    Args:
        weight: ``[m, n]``, what ``Q`` should be.
        codes: uint8 ``[m, n]``, where to begin.
        grid: scale and zero ``[m, groups]``.
        gram: ``[n, n]``, second moments of the inputs in any scale.
        sweeps: times over all columns; ends early when one changes nothing.
        format: of the codes.
        g_idx: integers ``[n]``, the group of every column (:func:`hf_accel.quant.grid.group_index`).
        inflation: share of the mean diagonal added to the diagonal.
        block_size: columns after which the rest is brought up to date by one product: speed only.
    """
    if sweeps < 0:
        raise InvalidSetting("coordinate_descent", "sweeps", sweeps, "0 or more")
    if inflation < 0:
        raise InvalidSetting("coordinate_descent", "inflation", inflation, "0 or more")
    m, n = weight.shape
    if codes.shape != weight.shape or gram.shape != (n, n) or g_idx.shape != (n,):
        raise QuantizationError(
            f"coordinate_descent: codes must be {[m, n]} like weight, gram {[n, n]} and g_idx {[n]}; got "
            f"{list(codes.shape)}, {list(gram.shape)} and {list(g_idx.shape)}."
        )
    # Columns as rows: what one step touches then lies together in memory.
    dtype = grid.scale.dtype
    target, moments = weight.detach().to(dtype).t(), gram.to(dtype, copy=True)
    moments.diagonal().add_(inflation * moments.diagonal().mean())
    curvature = moments.diagonal().tolist()
    group = g_idx.long()
    scale = grid.scale.t()[group]
    zero = None if grid.zero is None else grid.zero.t()[group]
    codes = codes.t().contiguous()
    values = values_of(codes, scale, zero, format)
    for _ in range(sweeps):
        before = codes.clone()
        slope = moments @ (values - target)
        for start in range(0, n, block_size):
            stop = min(start + block_size, n)
            old = values[start:stop].clone()
            for j in range(start, stop):
                if curvature[j] <= 0:  # an input that was never seen: all codes are as good
                    continue
                zero_j = None if zero is None else zero[j]
                codes[j] = codes_of(values[j] - slope[j] / curvature[j], scale[j], zero_j, format)
                new = values_of(codes[j], scale[j], zero_j, format)
                slope[j + 1 : stop].addr_(moments[j, j + 1 : stop], new - values[j])
                values[j] = new
            slope[stop:].addmm_(moments[stop:, start:stop], values[start:stop] - old)
        if torch.equal(codes, before):
            break
    return codes.t().contiguous()
