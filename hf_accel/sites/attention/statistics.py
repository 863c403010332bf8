"""What a patched attention site did since it was applied."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.report import Stopwatch


@dataclass
class LayerDensity:
    """Density of one attention call: ``heads`` ``[H]`` on its device, mean over the batch."""

    layer: int
    step: int
    branch: str
    heads: torch.Tensor


@dataclass
class AttentionStatistics:
    """What a patched attention site did since it was applied. Tensors stay on their device until asked for."""

    forwards: int = 0
    generations: int = 0
    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    densities: list[LayerDensity] = field(default_factory=list)
    break_even: list[str] = field(default_factory=list)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _past_density: float = 0.0
    _past_calls: int = 0

    def record(self, layer: int, step: int, branch: str, notes: dict[str, Any]) -> None:
        """Take over the notes of one attention call."""
        self.kernels.update(notes.get("kernels", {}))
        if "break_even" in notes:
            self.break_even.append(notes["break_even"])
        reason = notes.get("fallback")
        if reason is not None:
            self.dense_calls[reason] += 1
            return
        self.sparse_calls += 1
        density = notes.get("density")
        if density is not None:
            heads = density.float().mean(0) if density.ndim == 2 else density.float()
            self.densities.append(LayerDensity(layer, step, branch, heads))

    def merge(self, other: AttentionStatistics) -> None:
        """Add what another request did. Details of a generation are those of the other's last one, if it had any."""
        if densities := list(other.densities):  # the other may go on counting
            self.fold()
            self.densities = densities
        self.forwards += other.forwards
        self.generations += other.generations
        self.sparse_calls += other.sparse_calls
        self.dense_calls.update(dict(other.dense_calls))
        self.kernels.update(dict(other.kernels))
        self.break_even += [note for note in list(other.break_even) if note not in self.break_even]
        self.stopwatch.merge(other.stopwatch)
        self._past_density += other._past_density
        self._past_calls += other._past_calls

    def begin_generation(self) -> None:
        self.generations += 1
        self.fold()

    def fold(self) -> None:
        """Take the details of the last generation into the totals."""
        if self.densities:
            self._past_density += float(torch.stack([d.heads.mean() for d in self.densities]).sum())
            self._past_calls += len(self.densities)
            self.densities = []

    @property
    def mean_density(self) -> float | None:
        """Mean share of query-key pairs computed in sparse calls, or None before the first."""
        calls = self._past_calls + len(self.densities)
        if not calls:
            return None
        now = float(torch.stack([d.heads.mean() for d in self.densities]).sum()) if self.densities else 0.0
        return (self._past_density + now) / calls

    def density_by_layer_and_head(self) -> dict[int, list[float]]:
        """Layer index -> density of each head, mean over the calls of the last generation."""
        groups: dict[int, list[torch.Tensor]] = {}
        for entry in self.densities:
            groups.setdefault(entry.layer, []).append(entry.heads)
        return {layer: torch.stack(values).mean(0).tolist() for layer, values in sorted(groups.items())}

    def density_by_layer_and_step(self) -> dict[tuple[int, int], float]:
        """(layer, step) -> density of the last generation, mean over heads and branches."""
        groups: dict[tuple[int, int], list[torch.Tensor]] = {}
        for entry in self.densities:
            groups.setdefault((entry.layer, entry.step), []).append(entry.heads.mean())
        return {key: float(torch.stack(values).mean()) for key, values in sorted(groups.items())}

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards,
            "generations": self.generations,
            "sparse_calls": self.sparse_calls,
            "dense_calls": dict(self.dense_calls),
            "mean_density": self.mean_density,
            "density_by_layer_and_head": self.density_by_layer_and_head(),
            "kernels": {op: {"backend": b, "reason": r} for op, (b, r) in self.kernels.items()},
            "break_even": list(self.break_even),
            "attention_seconds": self.stopwatch.seconds,
        }

    def lines(self, method: str) -> list[str]:
        """What ran, for the printed report."""
        density = self.mean_density
        at = f" at mean density {density:.3f}" if density is not None else ""
        lines = [
            f"  ran       {self.forwards} forwards in {self.generations} generations; {self.sparse_calls} attention "
            f"calls by {method}{at}"
        ]
        lines += [f"  dense     {n} x {reason}" for reason, n in self.dense_calls.most_common()]
        lines += [f"  kernel    {op}: {backend} ({why})" for op, (backend, why) in sorted(self.kernels.items())]
        return lines + [f"  note      {note}" for note in self.break_even]
