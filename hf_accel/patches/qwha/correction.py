"""QWHA on one layer: budgets, places and values of a sparse F that answers for an error of the weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hf_accel.errors import QuantizationError
from hf_accel.kernels.hadamard import hadamard

DAMPING = 1e-4
_ELEMENTS = 1 << 24  # of the systems that are solved at once
_JITTERS = (0.0, 1e-10, 1e-8, 1e-6)


def spectral_gram(gram: torch.Tensor, block: int) -> torch.Tensor:
    """``G = H C H^T / block^2``, fp64 ``[n, n]``, of a Gram matrix ``C``. Layers with one input share it."""
    half = hadamard(gram.double(), scale=1 / block, blocks=block)
    return hadamard(half.T.contiguous(), scale=1 / block, blocks=block)


def allocate(errors: torch.Tensor, count: int, most: int, temperature: float = 1.0) -> torch.Tensor:
    """AdaAlloc: coefficients for each output, int64 ``[m]``, at most ``most`` each, ``count`` together.

    Args:
        errors: ``[m]``, not negative.
        count: p, at most ``m * most``.
        temperature: exponent; 0 is an even division.
    """
    m = len(errors)
    if not 0 <= count <= m * most:
        raise QuantizationError(f"AdaAlloc: {count} coefficients do not fit {m} outputs of at most {most}.")
    shares = (errors.double() / errors.double().max().clamp(min=1e-300)) ** temperature
    if not float(shares.sum()) > 0:
        shares = torch.ones_like(shares)
    budgets = (count * (shares / shares.sum())).floor().long().clamp(max=most)
    while (left := count - int(budgets.sum())) != 0:
        if left < 0:  # a share was rounded up to a whole number
            budgets[budgets.argmax()] -= 1
            continue
        free = budgets < most
        even = left // int(free.sum())
        if even:
            budgets = torch.where(free, (budgets + even).clamp(max=most), budgets)
        else:
            fewest = torch.where(free, budgets, most + 1).argsort(stable=True)[:left]
            budgets[fewest] += 1
    return budgets


def select(scores: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """bool ``[m, n]``: of row i the ``budgets[i]`` largest ``scores``; of equal ones the first."""
    m, n = scores.shape
    kept = torch.zeros(m, n, dtype=torch.bool, device=scores.device)
    ranks = torch.arange(n, device=scores.device)
    step = max(1, _ELEMENTS // n)
    for start in range(0, m, step):
        order = scores[start : start + step].argsort(dim=1, descending=True, stable=True)
        within = ranks < budgets[start : start + step, None].to(ranks.device)
        kept[start : start + step] = torch.zeros_like(within).scatter_(1, order, within)
    return kept


class Fit(NamedTuple):
    """What :func:`fit` finds: values at the kept places, row by row, columns ascending, fp64 ``[p]``; the squared error
    in the output that is left of each row, fp64 ``[m]``; how many rows could not be solved and were only cut."""

    values: torch.Tensor
    errors: torch.Tensor
    unsolved: int


def fit(
    dense: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    *,
    product: torch.Tensor | None = None,
    refine: bool = True,
    damping: float = 0.0,
) -> Fit:
    """Least squares on the kept coefficients of every row: c with the least ``(d - c) G (d - c)^T``.

    Args:
        dense: D, fp64 ``[m, n]``.
        gram: G, fp64 ``[n, n]``.
        kept: bool ``[m, n]``.
        product: ``D G``, where it is known.
        refine: False: the dense coefficients, cut.
        damping: added to the diagonal of G for the solution, not for the errors.
    """
    counts = kept.sum(1)
    starts = counts.cumsum(0) - counts
    values = dense[kept]
    product = dense @ gram if product is None else product
    errors = (product * dense).sum(1)
    unsolved = 0
    for rows in _batches(counts):
        slots = torch.arange(int(counts[rows].max()), device=dense.device)
        valid = slots < counts[rows, None]
        places = starts[rows, None] + slots
        columns = torch.zeros_like(places)
        columns[valid] = kept[rows].nonzero()[:, 1]
        system = gram[columns[:, :, None], columns[:, None, :]]
        system.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), 0)
        right = product[rows].gather(1, columns).masked_fill(~valid, 0)
        found = dense[rows].gather(1, columns).masked_fill(~valid, 0)
        if refine:
            solution, failed = _solve(system, right + damping * found, valid, damping)
            found = torch.where(failed[:, None], found, solution)
            unsolved += int(failed.sum())
            values[places[valid]] = found[valid]
        own = (system @ found[:, :, None])[:, :, 0]
        errors[rows] += (found * (own - 2 * right)).sum(1)
    return Fit(values, errors.clamp(min=0), unsolved)


def _batches(counts: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows that keep something, those with like numbers together, as many as may be solved at once."""
    order = counts.argsort(descending=True)
    order = order[counts[order] > 0]
    while len(order):
        width = int(counts[order[0]])
        step = max(1, _ELEMENTS // width**2)
        yield order[:step].sort().values
        order = order[step:]


def _solve(
    system: torch.Tensor, right: torch.Tensor, valid: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solutions ``[b, k]`` by Cholesky, zero where not ``valid``, and which systems have none.

    Inputs that depend on one another make a system singular without damping; it gets a little.
    """
    diagonal = torch.where(valid, damping, 1.0).to(system)
    mean = system.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    solution = torch.zeros_like(right)
    open_ = torch.arange(len(system), device=system.device)
    for jitter in _JITTERS:
        added = diagonal[open_] + jitter * mean[open_] * valid[open_]
        root, info = torch.linalg.cholesky_ex(system[open_] + torch.diag_embed(added))
        good = info == 0
        solution[open_[good]] = torch.cholesky_solve(right[open_[good], :, None], root[good])[:, :, 0]
        open_ = open_[~good]
        if not len(open_):
            break
    failed = torch.zeros(len(system), dtype=torch.bool, device=system.device)
    failed[open_] = True
    return solution, failed


class Correction(NamedTuple):
    """A sparse F ``[m, n]`` that answers for an error of the weight.

    Attributes:
        kept: bool ``[m, n]``, its places.
        values: fp64 ``[p]``, row by row, columns ascending; ``dW = F H / block``.
        before: squared error in the output, summed over outputs, without F.
        after: with it.
        unsolved: outputs whose least squares had no solution.
    """

    kept: torch.Tensor
    values: torch.Tensor
    before: float
    after: float
    unsolved: int = 0


def sparse_correction(
    error: torch.Tensor,
    gram: torch.Tensor,
    count: int,
    block: int,
    *,
    allocation: str = "paper",
    selection: str = "paper",
    temperature: float = 1.0,
    refine: bool = True,
    damping: float = DAMPING,
) -> Correction:
    """The paper's start for one layer.

    Args:
        error: ``E = W - W_Q`` ``[m, n]``.
        gram: G of the layer's inputs, from :func:`spectral_gram`.
        count: p.
        block: length of the transform.
        allocation, selection: "paper" or "code", see the module's docstring.
        temperature: of :func:`allocate`.
        refine: least squares on what was selected.
        damping: as a share of the mean diagonal.
    """
    if not bool(torch.isfinite(error).all()):
        raise QuantizationError("qwha: the weight or its quantised form holds NaN or infinity.")
    dense = hadamard(error.to(gram), blocks=block)
    product = dense @ gram
    energy = (product * dense).sum(1).clamp(min=0)
    added = damping * float(gram.diagonal().mean())
    errors = energy.sqrt() if allocation == "paper" else dense.norm(dim=1)
    scores = dense.abs() if selection == "paper" else dense.square() * (gram.diagonal() + added)
    kept = select(scores, allocate(errors, count, dense.shape[1], temperature))
    found = fit(dense, gram, kept, product=product, refine=refine, damping=added)
    return Correction(kept, found.values, float(energy.sum()), float(found.errors.sum()), found.unsolved)
