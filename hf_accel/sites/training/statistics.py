"""What a recipe did since it was applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RecipeStatistics:
    """What a recipe did since it was applied, in this process.

    Attributes:
        trainings: how many began.
        steps: optimizer steps.
        buckets, bucket_bytes: gradient buckets that went through the communication hook, and their bytes before it.
        orders: epochs whose examples were put in order.
        factors: the smallest and the largest factor on the learning rate, and the last one.
        losses: losses computed, one for each batch.
        encoded, dense_bytes, code_bytes: optimizer states encoded at the last step; their bytes, dense and as codes.
        idle: parts of the recipe that had nothing to do in a training, by reason.
    """

    trainings: int = 0
    steps: int = 0
    buckets: int = 0
    bucket_bytes: int = 0
    orders: int = 0
    factors: tuple[float, float, float] | None = None
    losses: int = 0
    encoded: int = 0
    dense_bytes: int = 0
    code_bytes: int = 0
    idle: Counter[str] = field(default_factory=Counter)

    def record_factor(self, factor: float) -> None:
        low, high, _ = self.factors or (factor, factor, factor)
        self.factors = min(low, factor), max(high, factor), factor

    def to_dict(self) -> dict[str, Any]:
        return {
            "trainings": self.trainings,
            "steps": self.steps,
            "buckets": self.buckets,
            "bucket_bytes": self.bucket_bytes,
            "orders": self.orders,
            "learning_rate_factors": list(self.factors) if self.factors is not None else None,
            "losses": self.losses,
            "encoded_states": self.encoded,
            "state_bytes": {"dense": self.dense_bytes, "codes": self.code_bytes},
            "idle": dict(self.idle),
        }

    def lines(self, method: str) -> list[str]:
        lines = [f"  trained   {self.steps} steps in {self.trainings} trainings"]
        if self.buckets:
            lines.append(f"  exchanged {self.buckets} buckets of gradients, {self.bucket_bytes / 2**20:.1f} MiB")
        if self.orders:
            lines.append(f"  data      {self.orders} epochs in the order of {method}")
        if self.factors is not None:
            low, high, last = self.factors
            lines.append(f"  schedule  learning rate x {low:.4g} .. {high:.4g}, now x {last:.4g}")
        if self.losses:
            lines.append(f"  loss      {self.losses} losses by {method}")
        if self.encoded:
            share = self.code_bytes / max(self.dense_bytes, 1)
            lines.append(f"  optimizer {self.encoded} states kept as codes, {share:.3f} of their bytes")
        return lines + [f"  idle      {n} x {reason}" for reason, n in self.idle.items()]
