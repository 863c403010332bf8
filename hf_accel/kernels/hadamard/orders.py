"""Hadamard matrices of the orders that transforms of any length ``K * 2^m`` need, built from their constructions.

A Hadamard matrix H of order n has entries +1 and -1 and ``H H^T = n I``. Orders 2^m are Sylvester's. The orders K of
QWHA (arXiv 2509.17428) come from quadratic residues (Paley), from four circulants in the array of Goethals and Seidel
(Williamson's rows, widened by T-matrices for 156), and by doubling. A matrix of a given order is not unique, and the
paper does not say which it takes: coefficients of a released adapter whose n is not a power of two belong to the
tables of that release, not to these matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from hf_accel.errors import UnsupportedByKernel

# QWHA's order of trial. No two of them but 40 and 20 fit one n.
ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)

_PALEY_FIRST = {12: 11, 20: 19, 60: 59, 108: 107, 140: 139}
_PALEY_SECOND = {28: 13, 36: 17}

# Williamson's symmetric rows, +1 at place 0 and one sign per coset of a subgroup of the units, in the order of the
# powers of a generator: (prime, generator) -> four rows. Found by exhaustive search over such rows.
_WILLIAMSON = {
    13: (2, ("++++--", "+-+--+", "+--+++", "--++-+")),
    43: (3, ("++++---", "-+-+++-", "-++--+-", "--++-++")),
}


def factor(n: int) -> tuple[int, int] | None:
    """``n = K * 2^m`` as ``(K, 2^m)``, K 1 or one of :data:`ORDERS`; None if n has no such form (block-diagonal then,
    see :func:`block_size`)."""
    if n < 1:
        return None
    if n & (n - 1) == 0:
        return 1, n
    for order in ORDERS:
        rest, over = divmod(n, order)
        if not over and rest & (rest - 1) == 0:
            return order, rest
    return None


def block_size(n: int) -> int:
    """Length of the blocks of a block-diagonal transform of ``n``: n itself where it has a transform, else its
    largest divisor that has one (4864 = 19 * 256: 256). Our extension of QWHA, which refuses such n.

    The more a block spans, the more outputs one coefficient reaches; an odd n with no better divisor has blocks of 1,
    where the transform is the identity.
    """
    if n < 1:
        raise UnsupportedByKernel(f"block_size: a length is at least 1; got {n}.")
    return next(n // parts for parts in range(1, n + 1) if n % parts == 0 and factor(n // parts))


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
    """``H`` ``[n, n]`` of the transform: ``H_K (x) H_{2^m}``, the Sylvester part symmetric, the other not in general.

    Raises:
        UnsupportedByKernel: n that is not ``K * 2^m``.
    """
    parts = require_factor("hadamard_matrix", n)
    order, rest = parts
    matrix = torch.kron(order_matrix(order), sylvester(rest)) if order > 1 else sylvester(rest)
    return matrix.to(device=device, dtype=dtype, copy=True)


def require_factor(op: str, n: int) -> tuple[int, int]:
    parts = factor(n)
    if parts is None:
        raise UnsupportedByKernel(
            f"{op}: {n} is not K * 2^m with K = 1 or one of {', '.join(map(str, sorted(ORDERS)))}: no transform of "
            f"that length. Use the block-diagonal one, blocks={block_size(n) if n > 0 else 'block_size(n)'}."
        )
    return parts


@lru_cache(maxsize=64)
def order_matrix(order: int) -> torch.Tensor:
    """The stored matrix of order K, int8 ``[K, K]``. Not to be written to."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order in _PALEY_FIRST:
        return _paley_first(_PALEY_FIRST[order])
    if order in _PALEY_SECOND:
        return _paley_second(_PALEY_SECOND[order])
    if order == 52:
        return _goethals_seidel([_circulant(row) for row in _williamson(13)], _reversal(13))
    if order == 156:
        return _goethals_seidel(_widened(_williamson(13), 3), torch.kron(_reversal(3), _reversal(13)))
    if order == 172:
        return _goethals_seidel([_circulant(row) for row in _williamson(43)], _reversal(43))
    if order == 40:
        return torch.kron(sylvester(2), order_matrix(20))
    raise UnsupportedByKernel(f"order_matrix: no matrix of order {order}; there are 1, {', '.join(map(str, ORDERS))}.")


@lru_cache(maxsize=32)
def sylvester(n: int) -> torch.Tensor:
    """Of order n = 2^m in natural order, int8 ``[n, n]``: ``(-1)^popcount(i & j)``. Not to be written to."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(matrix) < n:
        matrix = torch.kron(step, matrix)
    return matrix


def _residues(q: int) -> torch.Tensor:
    """Jacobsthal's matrix ``[q, q]`` of a prime q: the quadratic character of ``i - j``."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    place = torch.arange(q)
    return character[(place[:, None] - place) % q]


def _bordered(core: torch.Tensor, left: int) -> torch.Tensor:
    """A zero corner, a first row of +1 and a first column of ``left`` around ``core``."""
    q = len(core)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, left, core
    return matrix


def _paley_first(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q = 3 mod 4: the skew conference matrix plus the identity."""
    return _bordered(_residues(q), -1) + torch.eye(q + 1, dtype=torch.int8)


def _paley_second(q: int) -> torch.Tensor:
    """Order 2 (q + 1) for a prime q = 1 mod 4: each entry of the symmetric conference matrix becomes 2 x 2."""
    entry = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(_bordered(_residues(q), 1), entry) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _williamson(p: int) -> list[torch.Tensor]:
    """Four symmetric rows of length p whose circulants satisfy ``A A^T + B B^T + C C^T + D D^T = 4 p I``."""
    generator, signs = _WILLIAMSON[p]
    rows = []
    for row_signs in signs:
        row = torch.ones(p, dtype=torch.int8)
        power = 1
        for exponent in range(p - 1):
            row[power] = 1 if row_signs[exponent % len(row_signs)] == "+" else -1
            power = power * generator % p
        rows.append(row)
    return rows


def _circulant(row: torch.Tensor) -> torch.Tensor:
    place = torch.arange(len(row))
    return row[(place - place[:, None]) % len(row)]


def _widened(rows: Sequence[torch.Tensor], t: int) -> list[torch.Tensor]:
    """Four matrices of order ``t * len(row)`` fit for the array, from Williamson's rows and the T-matrices that are
    the first three cyclic shifts of order t = 3 (Cooper and Wallis; their products cancel by the symmetry of rows)."""
    a, b, c, d = map(_circulant, rows)
    shifts = [_circulant(torch.eye(t, dtype=torch.int8)[i]) for i in range(t)]
    patterns = [(a, b, c), (-b, a, d), (-c, -d, a), (-d, c, -b)]
    return [
        torch.stack([torch.kron(t_i, w_i) for t_i, w_i in zip(shifts, pattern, strict=True)]).sum(0, dtype=torch.int8)
        for pattern in patterns
    ]


def _reversal(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.int8).flip(1)


def _goethals_seidel(blocks: Sequence[torch.Tensor], reversal: torch.Tensor) -> torch.Tensor:
    """Order 4n from four matrices of order n that commute, are group-circulant and whose ``X X^T`` add up to 4n I."""
    a, b, c, d = blocks
    b_r, c_r, d_r = (x @ reversal for x in (b, c, d))
    bt_r, ct_r, dt_r = (x.T @ reversal for x in (b, c, d))
    rows = [[a, b_r, c_r, d_r], [-b_r, a, dt_r, -ct_r], [-c_r, -dt_r, a, bt_r], [-d_r, ct_r, -bt_r, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])
