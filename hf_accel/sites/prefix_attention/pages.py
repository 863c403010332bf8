"""Pages of a frozen prefix: bounds of the keys on each, and attention to the few pages that some queries need.

The page rule of QUEST, arXiv 2406.10774. A page is ``page_size`` consecutive keys; with their elementwise least and
greatest values, ``sum_c max(q_c kmin_c, q_c kmax_c)`` is never below the product of ``q`` with any key on the page. The
pages of highest bound are attended to, exactly, and no other page is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.kernels.paged_attention import (
    PageList,
    page_attention,
    page_minmax_into,
    page_score,
    select_pages,
)
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.split import prefix_attention


@dataclass
class PageBounds:
    """Bounds of the keys of one layer's prefix, page by page, with room for pages to come.

    Attributes:
        kmin, kmax: ``[B, Hkv, room, D]`` in the dtype of the keys; the first ``pages`` are filled.
        visible: bool ``[B, pages]``, whether a page holds a key that is not hidden; None: all do.
        keys: number of keys P that they bound, hidden ones included.
        page_size: keys on a page; the last may have fewer.
    """

    kmin: torch.Tensor
    kmax: torch.Tensor
    visible: torch.Tensor | None
    keys: int
    page_size: int

    @classmethod
    def empty(cls, key: torch.Tensor, page_size: int) -> PageBounds:
        """Room for none of the keys ``[B, Hkv, P, D]`` yet."""
        nothing = key.new_empty(*key.shape[:2], 0, key.shape[3])
        return cls(nothing, nothing, None, 0, page_size)

    @property
    def pages(self) -> int:
        return -(-self.keys // self.page_size)

    def bound(self, key: torch.Tensor, valid: torch.Tensor | None, backend: str = "auto") -> None:
        """Take in ``key`` ``[B, Hkv, P, D]``: what a longer prefix added, else everything anew.

        An unchanged length is no proof of unchanged keys: a static cache is all slots from the start, with those in
        use told by ``valid`` ``[B, P]`` alone.
        """
        grows = key.shape[2] > self.keys > 0
        first = self.keys // self.page_size if grows else 0  # the last page may have been a part of one
        self.keys = key.shape[2]
        if self.pages > self.kmin.shape[2]:
            self._make_room(key, first)
        page_minmax_into(key, self.page_size, self.kmin, self.kmax, first, valid, backend=backend)
        self.visible = None if valid is None else visible_pages(valid, self.page_size)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounds of the pages there are, views ``[B, Hkv, pages, D]``."""
        return self.kmin[:, :, : self.pages], self.kmax[:, :, : self.pages]

    def _make_room(self, key: torch.Tensor, keep: int) -> None:
        """A block adds a page or so: an eighth more than is needed now, so that few of them copy."""
        room = self.pages + max(8, self.pages // 8)
        # Written to again later, perhaps in another mode, which torch refuses for tensors of inference mode.
        with torch.inference_mode(False):
            wider = [key.new_empty(*key.shape[:2], room, key.shape[3]) for _ in range(2)]
        for new, old in zip(wider, (self.kmin, self.kmax), strict=True):
            new[:, :, :keep].copy_(old[:, :, :keep])
        self.kmin, self.kmax = wider


def visible_pages(valid: torch.Tensor, page_size: int) -> torch.Tensor:
    """Which pages hold a key that may be seen: bool ``[B, ceil(P / page_size)]`` from ``valid`` ``[B, P]``."""
    missing = -valid.shape[1] % page_size
    return torch.nn.functional.pad(valid, (0, missing)).unflatten(1, (-1, page_size)).any(-1)


class PagedPrefix:
    """Attention of a few rows of a block to the pages of the prefix that they need; bounds are kept per layer, for one
    request.

    Bounds outlive a block, since a commit only adds keys. They are void in another request and, as a whole, where the
    prefix did not grow from one block to the next. A copy keeps none.

    Args:
        budget: keys of the prefix per query and head, in whole pages.
        page_size: keys on a page.
        backend: of the kernels, ``"auto"``, ``"triton"`` or ``"torch"``.
    """

    def __init__(self, budget: int, page_size: int, backend: str = "auto"):
        self.budget, self.page_size, self.backend = budget, page_size, backend
        self._block: tuple[int, int] | None = None  # generation and number
        self._bounds: dict[int, PageBounds] = {}
        self._current: set[int] = set()  # layers whose bounds are those of this block

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedPrefix:
        twin = type(self)(self.budget, self.page_size, self.backend)
        memo[id(self)] = twin
        return twin  # the request that runs is the original's

    def attend(self, call: PrefixCall, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of ``query`` ``[B, Hq, A, D]`` to the union of the pages that its rows and the query heads of a
        KV head choose: a page that was loaded for one serves all.

        Returns:
            As :func:`~hf_accel.sites.prefix_attention.split.prefix_attention`. Noted in the call: pages read per KV
            head and their share of the keys that are not hidden, means over KV heads and batch.
        """
        pages = self.choose(call, query)
        if pages is None:
            return self.attend_all(call, query)
        counts = pages.counts.float()
        visible = call.prefix if call.prefix_valid is None else call.prefix_valid.sum(1, keepdim=True).clamp_min(1)
        call.notes |= {"density": (counts * self.page_size / visible).clamp_max(1).mean(), "pages": counts.mean()}
        key, value, valid = call.prefix_key, call.prefix_value, call.prefix_valid
        return page_attention(query, key, value, pages, self.page_size, call.scale, valid, backend=self.backend)

    def attend_all(self, call: PrefixCall, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`attend`, to the whole prefix."""
        call.notes |= {"density": 1.0, "pages": float(-(-call.prefix // self.page_size))}
        return prefix_attention(call, query, self.backend)

    def choose(self, call: PrefixCall, query: torch.Tensor) -> PageList | None:
        """The union of the best pages of each row and query head, per KV head; None if the budget holds them all."""
        each = math.ceil(self.budget / self.page_size)
        if each >= -(-call.prefix // self.page_size):
            return None
        bounds = self.bounds(call)
        kmin, kmax = bounds.filled()
        scores = page_score(query, kmin, kmax, bounds.visible, backend=self.backend)
        return select_pages(scores, each, kmin.shape[1], backend=self.backend)

    def bounds(self, call: PrefixCall) -> PageBounds:
        """The bounds of this layer's prefix, brought up to date at the first call of a block."""
        layer, key = call.layer.index, call.prefix_key
        if self._block is None or self._block[0] != call.generation:
            self._bounds = {}
        if self._block != (call.generation, call.block):  # the prefix may have grown
            self._block, self._current = (call.generation, call.block), set()
        kept = self._bounds.get(layer)
        if kept is None or not _alike(kept.kmin, key):
            kept = self._bounds[layer] = PageBounds.empty(key, self.page_size)
        if layer not in self._current or kept.keys != call.prefix:
            kept.bound(key, call.prefix_valid, self.backend)
            self._current.add(layer)
        return kept


def _alike(bounds: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether both are of the same rows, heads and kind, whatever their length."""
    shapes = [(*x.shape[:2], x.shape[3], x.dtype, x.device) for x in (bounds, key)]
    return shapes[0] == shapes[1]
