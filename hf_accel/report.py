"""What happened: which modules were patched or skipped and why, which kernel runs, what it did so far."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Patched:
    """One module that a method changed, and how."""

    model: str
    module: str
    kind: str


@dataclass(frozen=True)
class Skipped:
    """One module (or a group of like modules) left alone, and why."""

    model: str
    module: str
    reason: str


@dataclass
class LayerDensity:
    """Density of one attention call: ``heads`` ``[H]`` on its device, mean over the batch."""

    layer: int
    step: int
    branch: str
    heads: torch.Tensor


class Stopwatch:
    """Sums the time of many short sections: host clock on a CPU, device events (read late, no waiting) on a GPU."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def section(self, device: torch.device) -> Iterator[None]:
        """Time the body of a ``with`` whose work runs on ``device``."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events = []
        return self._seconds

    def __deepcopy__(self, memo: dict) -> Stopwatch:
        return Stopwatch()  # events belong to the original's stream of work


@dataclass
class RunStatistics:
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

    def begin_generation(self) -> None:
        """Fold the details of the last generation into the totals."""
        self.generations += 1
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


class MacCounter(Protocol):
    """Counts the multiply-accumulates of forwards, per shape of their arguments."""

    def of(self, shape: Any) -> tuple[float, float] | None:
        """(full, partial) forward in MACs, or None if they cannot be counted."""


@dataclass
class StepStatistics:
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


@dataclass
class BlockStatistics:
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


@dataclass
class PrefixStatistics:
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


class Statistics(Protocol):
    """What a method did since it was applied."""

    def to_dict(self) -> dict[str, Any]: ...

    def lines(self, method: str) -> list[str]:
        """For the printed report."""


@dataclass
class MethodReport:
    """The report of one method on one model."""

    method: str
    settings: dict[str, Any]
    model: str
    model_class: str
    origin: str = "settings given by the caller"
    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run: Statistics | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "settings": self.settings,
            "model": self.model,
            "model_class": self.model_class,
            "origin": self.origin,
            "patched": [vars_of(p) for p in self.patched],
            "skipped": [vars_of(s) for s in self.skipped],
            "notes": list(self.notes),
            "run": self.run.to_dict() if self.run is not None else None,
        }

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={shorten(v)}" for k, v in self.settings.items())
        lines = [
            f"{self.method} on {self.model} ({self.model_class})",
            f"  settings  {settings}",
            f"  from      {self.origin}",
        ]
        kinds = Counter(p.kind for p in self.patched)
        lines.append("  patched   " + (", ".join(f"{n} x {kind}" for kind, n in kinds.items()) or "nothing"))
        reasons = Counter(s.reason for s in self.skipped)
        lines += [f"  skipped   {n} x {reason}" for reason, n in reasons.items()]
        if self.run is not None:
            lines += self.run.lines(self.method)
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines)


def shorten(value: Any, width: int = 60) -> str:
    """A setting as text; tables of thresholds would fill the page."""
    text = str(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def vars_of(record: Patched | Skipped) -> dict[str, str]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


@dataclass
class Report:
    """All methods of one ``apply`` call, one entry per method and model."""

    entries: list[MethodReport]

    def to_dict(self) -> dict[str, Any]:
        return {"entries": [entry.to_dict() for entry in self.entries]}

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries)) or "nothing applied"

    def __iter__(self):
        return iter(self.entries)
