"""What drafting did since it was applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DecodingStatistics:
    """What drafting did since it was applied.

    Attributes:
        generations: calls of ``generate`` that were assisted.
        plain: calls that ran as without the method, by reason.
        rounds: forwards that verify and decode.
        gated: rounds in which the gate kept the drafter from drafting.
        empty: rounds in which the drafter had no guess, or no room for one.
        trees: drafts that were trees, of which transformers verified one path.
        tokens: decoded.
        drafted_at, accepted_at: drafted and accepted tokens by their place in the draft, from 0.
    """

    generations: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    gated: int = 0
    empty: int = 0
    trees: int = 0
    tokens: int = 0
    drafted_at: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)

    def merge(self, other: DecodingStatistics) -> None:
        """Add what another request did."""
        for name in ("generations", "rounds", "gated", "empty", "trees", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("plain", "drafted_at", "accepted_at"):
            getattr(self, name).update(dict(getattr(other, name)))

    def record_round(self, drafted: int, accepted: int, tokens: int) -> None:
        """One forward verified ``drafted`` tokens, accepted the first ``accepted``, and the text grew by ``tokens``."""
        self.rounds += 1
        self.tokens += tokens
        self.drafted_at.update(range(drafted))
        self.accepted_at.update(range(accepted))

    @property
    def drafted(self) -> int:
        return self.drafted_at.total()

    @property
    def accepted(self) -> int:
        return self.accepted_at.total()

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that one forward of the model gave; None before the first."""
        return self.tokens / self.rounds if self.rounds else None

    def to_dict(self) -> dict[str, Any]:
        places = range(len(self.drafted_at))
        return {
            "generations": self.generations,
            "plain_generations": dict(self.plain),
            "rounds": self.rounds,
            "gated_rounds": self.gated,
            "empty_rounds": self.empty,
            "tree_drafts": self.trees,
            "tokens": self.tokens,
            "tokens_per_round": self.tokens_per_round,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "drafted_by_position": [self.drafted_at[place] for place in places],
            "accepted_by_position": [self.accepted_at[place] for place in places],
        }

    def lines(self, method: str) -> list[str]:
        lines = [f"  generated {self.generations} texts with drafts"]
        if self.rounds:
            shares = ", ".join(
                f"{self.accepted_at[place] / self.drafted_at[place]:.2f}" for place in range(len(self.drafted_at))
            )
            lines.append(
                f"  drafted   {self.drafted} tokens in {self.rounds} rounds ({self.gated} gated, {self.empty} without "
                f"a guess), accepted {self.accepted}"
            )
            lines.append(f"  tokens    {self.tokens_per_round:.2f} for each forward")
            if shares:
                lines.append(f"  accepted  share by position: {shares}")
        if self.trees:
            lines.append(
                f"  trees     {self.trees} drafts cut to their first path, which is what transformers verifies"
            )
        return lines + [f"  plain     {n} x {reason}" for reason, n in self.plain.items()]
