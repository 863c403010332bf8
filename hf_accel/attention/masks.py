"""Attention masks as what they hide.

What a mask is follows from every entry of it, never from one of its rows: rows differ where texts are packed, where a
window slides, where images stand inside a text. A mask that is nothing known here is for dense attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Entries of a mask that are looked at together: what is computed of them takes a few times their memory.
_AT_ONCE = 1 << 26


class MaskMemo:
    """What masks are, found once for all layers and forwards that are handed the same mask, unchanged."""

    def __init__(self) -> None:
        self._forward = 0
        self._known: dict[Hashable, tuple[weakref.ref[torch.Tensor], tuple[str, int], Any]] = {}

    def begin_forward(self) -> None:
        self._forward += 1

    def get(self, mask: torch.Tensor, find: Callable[[], T], question: Hashable = None) -> T:
        """What ``find()`` says of this very tensor, asked once for each ``question``."""
        # Nobody counts the changes of tensors of inference mode; within a forward there are none.
        version = ("forward", self._forward) if mask.is_inference() else ("version", mask._version)
        key = id(mask), question
        known = self._known.get(key)
        if known is None or known[0]() is not mask or known[1] != version:
            if len(self._known) >= 8:  # kinds of layers of a few requests
                self._known.clear()
            known = weakref.ref(mask), version, find()
            self._known[key] = known
        return known[2]

    def __deepcopy__(self, memo: dict) -> MaskMemo:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


def split_causal(mask: torch.Tensor) -> tuple[int, torch.Tensor | None] | None:
    """A mask as "causal, and these keys are hidden", or None if it is something else.

    Args:
        mask: ``[B, 1, Sq, Sk]``, bool (True = attend) or additive (0 = attend, the dtype's lowest or -inf = hidden).

    Returns:
        ``keys``, the number of leading keys with which the last query is aligned (a static cache is longer), and the
        visible ones among them ``[B, keys]`` bool, or None if all are. Waits for the device.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or not mask.numel():
        return None
    batch, _, queries, slots = mask.shape
    offset = _furthest(mask)
    keys = queries + offset
    if offset < 0 or keys > slots:
        return None
    query, key = torch.arange(queries, device=mask.device), torch.arange(slots, device=mask.device)
    valid = torch.zeros(batch, slots, dtype=torch.bool, device=mask.device)
    valid[:, offset:keys] = _seen(mask[:, 0, query, query + offset])
    for rows in _rows(mask):
        valid[:, :offset] |= _seen(mask[:, 0, rows, :offset]).any(1)
    right = []
    for rows in _rows(mask):
        seen = _seen(mask[:, 0, rows])
        expected = valid[:, None] & (key <= query[rows, None] + offset)
        right += [(seen == expected).all(), _is_no_bias(mask[:, 0, rows], seen)]
    if not bool(torch.stack(right).all()):
        return None
    valid = valid[:, :keys]
    return keys, (None if bool(valid.all()) else valid)


def hidden_keys(mask: torch.Tensor, outer: bool = False) -> torch.Tensor | None:
    """A mask that hides the same keys from every query as ``[B, 1, 1, Sk]``, or None if it is something else.

    Args:
        mask: bool ``[B, 1, Sq, Sk]``, True = attend.
        outer: the mask may also be the outer product of the tokens that count, ``valid_i & valid_j``: what hidden
            queries compute is not read.

    Returns:
        bool. Waits for the device.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool or not mask.numel():
        return None
    queries, keys = mask.shape[2:]
    first = mask[:, 0, :1]
    if _all(mask, lambda rows: (mask[:, 0, rows] == first).all()):
        return mask[:, :, :1]
    if not outer or queries != keys:
        return None
    valid = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    if _all(mask, lambda rows: (mask[:, 0, rows] == (valid[:, rows, None] & valid[:, None])).all()):
        return valid[:, None, None]
    return None


def _all(mask: torch.Tensor, holds: Callable[[slice], torch.Tensor]) -> bool:
    return bool(torch.stack([holds(rows) for rows in _rows(mask)]).all())


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_no_bias(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Whether an additive mask adds nothing where it hides nothing."""
    return seen.new_ones(()) if mask.dtype == torch.bool else ((mask == 0) | ~seen).all()


def _rows(mask: torch.Tensor) -> list[slice]:
    queries = mask.shape[2]
    step = max(1, _AT_ONCE * queries // mask.numel())
    return [slice(start, start + step) for start in range(0, queries, step)]


def _furthest(mask: torch.Tensor) -> int:
    """The largest ``key - query`` of a pair that is not hidden; -1 if there is none above."""
    queries, slots = mask.shape[2:]
    key = torch.arange(slots, device=mask.device, dtype=torch.int32)
    query = torch.arange(queries, device=mask.device, dtype=torch.int32)
    ahead = [torch.where(_seen(mask[:, 0, rows]), key - query[rows, None], -1).amax() for rows in _rows(mask)]
    return int(torch.stack(ahead).amax())
