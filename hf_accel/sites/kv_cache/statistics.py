"""What methods on the K/V cache did since they were applied."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class KVCacheStatistics:
    """What a prefix cache did since it was applied. A row is one position of the batch that goes through the model."""

    forwards: int = 0
    generations: int = 0
    cached_forwards: int = 0
    verified: int = 0  # forwards run both ways and found equal
    prefills: Counter[str] = field(default_factory=Counter)  # by reason
    dense_calls: Counter[str] = field(default_factory=Counter)  # the model's own forwards, by reason
    rows_computed: int = 0
    rows_native: int = 0  # that the unpatched model would have computed
    kept_bytes: int = 0

    def merge(self, other: KVCacheStatistics) -> None:
        """Add what another request did."""
        self.forwards += other.forwards
        self.generations += other.generations
        self.cached_forwards += other.cached_forwards
        self.verified += other.verified
        self.prefills.update(dict(other.prefills))
        self.dense_calls.update(dict(other.dense_calls))
        self.rows_computed += other.rows_computed
        self.rows_native += other.rows_native
        self.kept_bytes = max(self.kept_bytes, other.kept_bytes)

    @property
    def row_share(self) -> float | None:
        """Rows computed as a share of what the unpatched model computes; None before the first forward."""
        return self.rows_computed / self.rows_native if self.rows_native else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards,
            "generations": self.generations,
            "cached_forwards": self.cached_forwards,
            "verified": self.verified,
            "prefills": dict(self.prefills),
            "dense_calls": dict(self.dense_calls),
            "rows_computed": self.rows_computed,
            "rows_native": self.rows_native,
            "row_share": self.row_share,
            "kept_bytes": self.kept_bytes,
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        share = self.row_share
        rows = f"; {share:.1%} of the rows" if share is not None else ""
        lines = [
            f"  ran       {self.forwards} forwards in {self.generations} generations; {self.cached_forwards} against "
            f"the cache, {self.verified} verified{rows}",
            f"  kept      {self.kept_bytes} bytes at most",
        ]
        lines += [f"  prefill   {n} x {reason}" for reason, n in self.prefills.most_common()]
        return lines + [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]


@dataclass
class CacheStatistics:
    """What the codec or policy of a K/V cache did since it was applied.

    Attributes:
        caches: fresh caches that were taken.
        plain_layers: layers of theirs that stayed as they were, by class.
        dense_calls: forwards in which the method had no say, by reason.
    """

    forwards: int = 0
    caches: int = 0
    plain_layers: Counter[str] = field(default_factory=Counter)
    dense_calls: Counter[str] = field(default_factory=Counter)
    _last: Any = None  # a weak reference: statistics keep no cache alive

    def follow(self, cache: Any) -> None:
        """Bytes are told of this cache from now on."""
        self._last = weakref.ref(cache)

    def merge(self, other: CacheStatistics) -> None:
        """Add what another request did. Bytes are told of the other's last cache, if that is there."""
        self.forwards += other.forwards
        self.caches += other.caches
        self.plain_layers.update(dict(other.plain_layers))
        self.dense_calls.update(dict(other.dense_calls))
        if other._last is not None and other._last() is not None:
            self._last = other._last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __deepcopy__(self, memo: dict) -> CacheStatistics:
        return CacheStatistics(self.forwards, self.caches, Counter(self.plain_layers), Counter(self.dense_calls))

    def _bytes(self) -> tuple[int, int]:
        cache = self._last() if self._last is not None else None
        layers = [layer for layer in cache.layers if hasattr(layer, "plain_nbytes")] if cache is not None else []
        return sum(layer.nbytes for layer in layers), sum(layer.plain_nbytes for layer in layers)

    def to_dict(self) -> dict[str, Any]:
        held, plain = self._bytes()
        return {
            "forwards": self.forwards,
            "caches": self.caches,
            "plain_layers": dict(self.plain_layers),
            "dense_calls": dict(self.dense_calls),
            "held_bytes": held,
            "plain_bytes": plain,
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        held, plain = self._bytes()
        share = f"; the last holds {held} bytes, {held / plain:.3f} of a plain cache" if plain else ""
        lines = [f"  ran       {self.forwards} forwards with {self.caches} caches by {method}{share}"]
        lines += [f"  plain     {n} x {layer}" for layer, n in self.plain_layers.most_common()]
        return lines + [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
