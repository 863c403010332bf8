"""What a step cache did since it was applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol


class MacCounter(Protocol):
    """Counts the multiply-accumulates of forwards, per shape of their arguments."""

    def of(self, shape: Any) -> tuple[float, float] | None:
        """(full, partial) forward in MACs, or None if they cannot be counted."""


@dataclass
class StepCacheStatistics:
    """What a step cache did since it was applied."""

    forwards: int = 0
    generations: int = 0
    partial_steps: int = 0
    full_steps: Counter[str] = field(default_factory=Counter)  # by reason
    dense_calls: Counter[str] = field(default_factory=Counter)  # forwards in which the method had no say, by reason
    kept_bytes: int = 0
    schedule: list[int] = field(default_factory=list)  # full steps of the last generation
    macs: MacCounter | None = None
    _shapes: Counter[tuple[Any, bool]] = field(default_factory=Counter)

    def record(self, step: int, why_full: str | None, shape: Any, kept_bytes: int) -> None:
        """Count one forward: partial, or full for a reason."""
        self.forwards += 1
        self.kept_bytes = max(self.kept_bytes, kept_bytes)
        self._shapes[shape, why_full is None] += 1
        if why_full is None:
            self.partial_steps += 1
            return
        self.full_steps[why_full] += 1
        if step == 0:
            self.schedule = []
        if step not in self.schedule:
            self.schedule.append(step)

    def merge(self, other: StepCacheStatistics) -> None:
        """Add what another request did. The schedule is that of the other's last generation, if it had any."""
        self.forwards += other.forwards
        self.generations += other.generations
        self.partial_steps += other.partial_steps
        self.full_steps.update(dict(other.full_steps))
        self.dense_calls.update(dict(other.dense_calls))
        self.kept_bytes = max(self.kept_bytes, other.kept_bytes)
        self.schedule = list(other.schedule) or self.schedule
        self._shapes.update(dict(other._shapes))

    @property
    def mac_share(self) -> float | None:
        """MACs of the forwards so far as a share of those of as many full ones; None before the first, or unknown."""
        done = whole = 0.0
        for (shape, partial), times in self._shapes.items():
            macs = self.macs.of(shape) if self.macs is not None else None
            if macs is None:
                return None
            whole += times * macs[0]
            done += times * macs[partial]
        return done / whole if whole else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards,
            "generations": self.generations,
            "full_steps": dict(self.full_steps),
            "partial_steps": self.partial_steps,
            "dense_calls": dict(self.dense_calls),
            "mac_share": self.mac_share,
            "kept_bytes": self.kept_bytes,
            "schedule": list(self.schedule),
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        share = self.mac_share
        full = sum(self.full_steps.values())
        macs = f"; {share:.1%} of the MACs" if share is not None else ""
        lines = [
            f"  ran       {self.forwards} forwards in {self.generations} generations; {full} full, "
            f"{self.partial_steps} partial{macs}",
            f"  kept      {self.kept_bytes} bytes at most",
        ]
        lines += [f"  full      {n} x {reason}" for reason, n in self.full_steps.most_common()]
        return lines + [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
