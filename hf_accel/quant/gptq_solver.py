"""GPTQ on one matrix: round column by column, and let the columns that are left make up for each error.

Paper: "GPTQ: Accurate Post-training Compression for Generative Pretrained Transformers", arXiv 2210.17323.

Minimises ``tr((W - Q) H (W - Q)^T)``, ``H`` the Gram matrix of the inputs, over ``Q`` on a grid. If column ``i`` is
rounded with an error ``w_i - q_i``, the best answer of the columns after it is a shift by that error times
``-U_ij / U_ii``, with ``U`` upper triangular and ``U^T U = H^-1``. Rows do not see each other.

Decisions where paper and released code differ, are silent, or could be better:

* ``U`` is ``R^-1`` with ``H = R R^T``, ``R`` upper triangular: one Cholesky factorisation of ``H`` in reversed order
  and one triangular inverse. The code factorises ``H``, inverts, and factorises the inverse; the result is the same.
* Groups whose grid is found on the way (``static_groups=False``) see every correction made before them, whatever the
  block size: blocks end where groups begin. The code fits a group that begins inside of a block to a weight that lacks
  the corrections of that block.
* Damping is a share of the mean diagonal over inputs that were seen. In the code dead inputs count with 1, so that
  with small activations they set the damping. Dead inputs are zero before the grid is found.
* ``H`` that is not positive definite is damped ten times as much, three times over; then the matrix is rounded to
  nearest, and :attr:`Solution.rounding` says so. The code raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import QuantizationError
from hf_accel.quant.grid import Grid, Scheme, ShrinkSearch, codes_of, encode, fit_grid, group_index, values_of

RETRIES = 3  # of the factorisation, each with ten times the damping


@dataclass(frozen=True)
class Solution:
    """A matrix on its grid.

    Attributes:
        codes: uint8 ``[m, n]``.
        grid: scale and zero ``[m, groups]``.
        g_idx: int32 ``[n]``: the group of every column.
        loss: ``[m]``: of every row ``1/2 (w - q) H (w - q)^T`` with the damped ``H``, as the sum of what each column
            cost; where rows were rounded to nearest the same without damping; NaN where there was no Gram matrix.
        rounding: ``"gptq"``, or ``"nearest"`` if ``H`` could not be factorised.
        damping: share of the mean diagonal that was added, 0 for ``"nearest"``.
        retries: how often the damping was raised.
        dead: inputs that were never seen; their columns are zero.
    """

    codes: torch.Tensor
    grid: Grid
    g_idx: torch.Tensor
    loss: torch.Tensor
    rounding: str
    damping: float = 0.0
    retries: int = 0
    dead: int = 0

    def weight(self, scheme: Scheme) -> torch.Tensor:
        """``Q`` ``[m, n]`` in the grid's dtype."""
        return values_by_group(self.codes, self.grid, self.g_idx, scheme)


def gptq_solve(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scheme: Scheme,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    search: ShrinkSearch | None = None,
    shrink: float = 1.0,
    scale_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> Solution:
    """Quantise a matrix so that its output changes little on the inputs behind ``gram``.

    Args:
        weight: ``[m, n]``, finite. Computed in fp32, in fp64 if it is fp64. Not written to.
        gram: ``[n, n]``, second moments of the inputs in any scale, fp32 or fp64; factorised in its own dtype. Not
            written to.
        scheme: format and blocks of ``1 x g`` columns (:meth:`Scheme.grouped`, :meth:`Scheme.per_row`).
        act_order: columns by falling diagonal of ``gram``, the most active first.
        static_groups: grids of all groups from ``weight`` beforehand, in the order of the inputs, so that groups are
            neighbours also under ``act_order``. Else each when its first column is reached, from the corrected weight.
        damping: share of the mean diagonal that is added to it.
        block_size: columns after which the rest is brought up to date by one product. Speed only.
        search: for smaller ranges with less error.
        shrink: factor of every range.
        scale_dtype: what scales will be stored in; codes are made with scales rounded to it.
        name: of the layer, for the words of errors.

    Raises:
        QuantizationError: shapes that do not fit, blocks of several rows, NaN or infinity in ``weight`` or ``gram``.
    """
    weight, gram = _checked(weight, gram, scheme, name)
    m, n = weight.shape
    group_size = scheme.block(weight.shape)[1]
    fit: dict[str, Any] = {"search": search, "shrink": shrink, "scale_dtype": scale_dtype}

    dead = gram.diagonal() == 0
    seen = gram.diagonal()[~dead]
    gram.diagonal()[dead] = seen.mean() if seen.numel() else 1.0
    weight[:, dead] = 0
    order = torch.arange(n, device=weight.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor, used, retries = _factorised(gram[order][:, order] if act_order else gram, damping)
    if factor is None:
        return round_to_nearest(weight, scheme, gram=gram, retries=retries, dead=int(dead.sum()), **fit)
    factor = factor.to(weight.dtype)
    pivots = factor.diagonal().tolist()
    static = static_groups or group_size >= n
    if static:
        grid = fit_grid(weight, scheme, **fit)
        g_idx = group_index(n, group_size, weight.device)
    else:
        row = Scheme.per_row(scheme.format, symmetric=scheme.symmetric, scale_rule=scheme.scale_rule)
        empty = weight.new_empty(scheme.grid_shape(weight.shape))
        grid = Grid(empty, None if scheme.format.is_float else torch.empty_like(empty))
        g_idx = torch.empty(n, dtype=torch.int32, device=weight.device)
        g_idx[order] = group_index(n, group_size, weight.device)

    # Columns as rows: what one step touches then lies together in memory.
    left = weight[:, order].t().contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8, device=weight.device)
    scale, zero = grid.scale.t(), None if grid.zero is None else grid.zero.t()
    groups = g_idx[order].tolist()
    loss = weight.new_zeros(m)
    for start, stop in _blocks(n, block_size, None if static else group_size):
        if not static and start % group_size == 0:
            found = fit_grid(left[start : start + group_size].t(), row, **fit)
            scale[groups[start]] = found.scale[:, 0]
            if zero is not None and found.zero is not None:
                zero[groups[start]] = found.zero[:, 0]
        block, errors = left[start:stop], torch.empty_like(left[start:stop])
        for i in range(start, stop):
            at, s, z = i - start, scale[groups[i]], None if zero is None else zero[groups[i]]
            codes[i] = codes_of(block[at], s, z, scheme.format)
            torch.div(block[at] - values_of(codes[i], s, z, scheme.format), pivots[i], out=errors[at])
            block[at + 1 :].addr_(factor[i, i + 1 : stop], errors[at], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.square().sum(0) / 2
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    codes = unordered.t().contiguous()
    return Solution(codes, grid, g_idx, loss, "gptq", used, retries, int(dead.sum()))


def round_to_nearest(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    gram: torch.Tensor | None = None,
    search: ShrinkSearch | None = None,
    shrink: float = 1.0,
    scale_dtype: torch.dtype | None = None,
    retries: int = 0,
    dead: int = 0,
) -> Solution:
    """Every weight for itself: the baseline of the paper's tables, and what is left where nothing was calibrated."""
    grid = fit_grid(weight, scheme, search, shrink=shrink, scale_dtype=scale_dtype)
    codes = encode(weight, grid, scheme)
    g_idx = group_index(weight.shape[1], scheme.block(weight.shape)[1], weight.device)
    loss = grid.scale.new_full((len(weight),), float("nan"))
    if gram is not None:
        loss = output_error(weight - values_by_group(codes, grid, g_idx, scheme), gram) / 2
    return Solution(codes, grid, g_idx, loss, "nearest", retries=retries, dead=dead)


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper triangular ``U`` with ``U^T U = (gram + damping * mean(diagonal) * I)^-1``, ``[n, n]``.

    None if that is not positive definite, to the precision of ``gram``'s dtype.
    """
    damped = gram.flip(0, 1).clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor if bool(torch.isfinite(factor).all()) else None


def values_by_group(codes: torch.Tensor, grid: Grid, g_idx: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Values ``[m, n]`` of codes whose columns belong to the groups ``g_idx`` ``[n]``, in any order."""
    at = g_idx.long()
    zero = None if grid.zero is None else grid.zero[:, at]
    return values_of(codes, grid.scale[:, at], zero, scheme.format)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``d G d^T`` ``[m]`` of the rows of ``difference`` ``[m, n]``: what they do to the outputs on the inputs behind
    ``gram``."""
    difference = difference.to(gram.dtype)
    return (difference @ gram).mul_(difference).sum(1)


def _factorised(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float, int]:
    """The factor, the damping that it took, and how often that was raised."""
    for retries in range(RETRIES + 1):
        used = max(damping, 1e-4) * 10**retries if retries else damping
        factor = inverse_factor(gram, used)
        if factor is not None:
            return factor, used, retries
    return None, 0.0, RETRIES


def _blocks(n: int, block_size: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """Runs of at most ``block_size`` columns, none across the beginning of a group."""
    start = 0
    while start < n:
        stop = min(start + block_size, n)
        if group_size is not None:
            stop = min(stop, (start // group_size + 1) * group_size)
        yield start, stop
        start = stop


def _checked(weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies to write to."""
    if weight.dim() != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise QuantizationError(
            f"gptq: {name} must be [m, n] and its gram [n, n]; got {list(weight.shape)} and {list(gram.shape)}."
        )
    if scheme.rows != 1:
        raise QuantizationError(f"gptq: rows of {name} are rounded apart; a grid for {scheme.rows} of them has no use.")
    for what, tensor in (("weight", weight), ("Gram matrix", gram)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise QuantizationError(
                f"gptq: {bad} of {tensor.numel()} elements of the {what} of {name} are NaN or infinite. "
                "Calibrate in bfloat16 or float32, or leave this layer out (exclude=)."
            )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gram_dtype = torch.promote_types(gram.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True), gram.detach().to(weight.device, gram_dtype, copy=True)


__all__ = [
    "RETRIES", "Solution", "gptq_solve", "inverse_factor", "output_error", "round_to_nearest", "values_by_group",
]  # fmt: skip
