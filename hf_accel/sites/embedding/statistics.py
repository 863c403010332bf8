"""What methods on the embeddings of open positions did since they were applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class ResidualStatistics:
    """What the site did since it was applied. Sums stay on their device."""

    forwards: Counter[str] = field(default_factory=Counter)  # by phase
    blocks: int = 0  # begun: first steps, of blocks or of whole sequences
    steps: int = 0  # denoising steps in which rows were replaced
    rows: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    _weights: Any = 0.0

    def record(self, weights: torch.Tensor) -> None:
        """Count one step whose rows had these weights of the residual."""
        self.steps += 1
        self.rows += len(weights)
        self._weights = self._weights + weights.detach().sum()

    def merge(self, other: ResidualStatistics) -> None:
        """Add what another request did."""
        self.forwards.update(dict(other.forwards))
        self.blocks += other.blocks
        self.steps += other.steps
        self.rows += other.rows
        self.dense_calls.update(dict(other.dense_calls))
        self.kernels.update(dict(other.kernels))
        self._weights = self._weights + other._weights

    @property
    def mean_weight(self) -> float | None:
        """Mean weight of the residual over all replaced rows; waits for the device."""
        return float(self._weights) / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": dict(self.forwards),
            "blocks": self.blocks,
            "residual_steps": self.steps,
            "residual_rows": self.rows,
            "mean_weight": self.mean_weight,
            "dense_calls": dict(self.dense_calls),
            "kernels": {op: {"backend": b, "reason": r} for op, (b, r) in self.kernels.items()},
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        phases = ", ".join(f"{n} {phase}" for phase, n in self.forwards.most_common())
        weight = f" with mean weight {self.mean_weight:.3f}" if self.rows else ""
        ran = f"{sum(self.forwards.values())} forwards ({phases or 'none'}) in {self.blocks} blocks"
        lines = [
            f"  ran       {ran}",
            f"  residual  {self.rows} rows in {self.steps} steps{weight}",
        ]
        lines += [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
        return lines + [f"  kernel    {op}: {backend} ({why})" for op, (backend, why) in sorted(self.kernels.items())]


@dataclass
class SelfConditioningStatistics:
    """What the site did since it was applied. A replayed CUDA graph does nothing in Python and is not counted."""

    forwards: int = 0
    first_steps: int = 0  # without a prediction of the step before
    calls: int = 0
    rows: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)

    def merge(self, other: SelfConditioningStatistics) -> None:
        """Add what another request did."""
        self.forwards += other.forwards
        self.first_steps += other.first_steps
        self.calls += other.calls
        self.rows += other.rows
        self.dense_calls.update(dict(other.dense_calls))
        self.kernels.update(dict(other.kernels))

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards,
            "first_steps": self.first_steps,
            "calls": self.calls,
            "rows": self.rows,
            "dense_calls": dict(self.dense_calls),
            "kernels": {op: {"backend": b, "reason": r} for op, (b, r) in self.kernels.items()},
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        lines = [
            f"  ran       {self.forwards} decoder forwards, {self.first_steps} of them first steps; {self.calls} "
            f"embedded by {method}, {self.rows} rows"
        ]
        lines += [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
        return lines + [f"  kernel    {op}: {backend} ({why})" for op, (backend, why) in sorted(self.kernels.items())]
