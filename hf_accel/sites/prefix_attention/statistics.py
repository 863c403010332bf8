"""What patched prefix attention did since it was applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hf_accel.report import Stopwatch


@dataclass
class PrefixAttentionStatistics:
    """What a method on the attention of a block-diffusion model did since it was applied. Sums stay on their device."""

    forwards: Counter[str] = field(default_factory=Counter)  # by phase
    generations: int = 0
    blocks: int = 0
    calls: int = 0
    first_calls: int = 0  # of them in the first step of a block
    exact_calls: Counter[str] = field(default_factory=Counter)  # of them those that settings exclude, by reason
    dense_calls: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _sums: dict[str, Any] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def begin(self, step: Any) -> None:
        """Count one forward: a ``BlockStep``."""
        self.forwards[step.phase] += 1
        if step.phase == "denoise" and step.index == 0:
            self.blocks += 1
        self.generations = max(self.generations, step.generation + 1)

    def merge(self, other: PrefixAttentionStatistics) -> None:
        """Add what another request did."""
        self.generations += other.generations
        self.blocks += other.blocks
        self.calls += other.calls
        self.first_calls += other.first_calls
        for name in ("forwards", "exact_calls", "dense_calls", "_counts"):
            getattr(self, name).update(dict(getattr(other, name)))
        self.kernels.update(dict(other.kernels))
        self.stopwatch.merge(other.stopwatch)
        for name, value in dict(other._sums).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def record(self, layer: int, step: int, notes: dict[str, Any]) -> None:
        """Take over the notes of one attention call: ``density``, ``active`` and ``pages`` as floats or 0-d tensors."""
        self.kernels.update(notes.get("kernels", {}))
        if notes.get("fallback") is not None:
            self.dense_calls[notes["fallback"]] += 1
            return
        self.calls += 1
        self.first_calls += step == 0
        if notes.get("exact") is not None:
            self.exact_calls[notes["exact"]] += 1
        for name in ("density", "active", "pages"):
            if name in notes:
                for key in (name, f"later_{name}") if step > 0 else (name,):
                    self._sums[key] = self._sums.get(key, 0.0) + notes[name]
                    self._counts[key] += 1

    def mean(self, name: str) -> float | None:
        """Mean of a note over the calls that had it: ``density``, ``active``, ``pages``; with ``later_`` in front, only
        over steps after the first of a block. Waits for the device."""
        return float(self._sums[name]) / self._counts[name] if self._counts[name] else None

    def to_dict(self) -> dict[str, Any]:
        means = {name: self.mean(name) for name in ("density", "active", "pages")}
        later = {f"later_{name}": self.mean(f"later_{name}") for name in ("density", "active", "pages")}
        return {
            "forwards": dict(self.forwards),
            "generations": self.generations,
            "blocks": self.blocks,
            "attention_calls": self.calls,
            "first_calls": self.first_calls,
            "exact_calls": dict(self.exact_calls),
            "dense_calls": dict(self.dense_calls),
            **means,
            **later,
            "kernels": {op: {"backend": b, "reason": r} for op, (b, r) in self.kernels.items()},
            "attention_seconds": self.stopwatch.seconds,
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        phases = ", ".join(f"{n} {phase}" for phase, n in self.forwards.most_common())
        lines = [
            f"  ran       {self.forwards.total()} forwards ({phases or 'none'}) in {self.generations} generations "
            f"and {self.blocks} blocks; {self.calls} attention calls by {method}"
        ]
        density, later = self.mean("density"), self.mean("later_density")
        if density is not None:
            after = f", {later:.3f} after the first step of a block" if later is not None else ""
            lines.append(f"  prefix    density {density:.3f} of its keys read{after}")
        active, pages = self.mean("later_active"), self.mean("later_pages")
        if active is not None and pages is not None:
            lines.append(f"  later     {active:.3f} of the rows active, {pages:.1f} pages read per KV head")
        lines += [f"  exact     {n} x {reason}" for reason, n in self.exact_calls.most_common()]
        lines += [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
        return lines + [f"  kernel    {op}: {backend} ({why})" for op, (backend, why) in sorted(self.kernels.items())]
