"""What happened: which modules were patched or skipped and why, which kernel runs, what it did so far."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hf_accel.requests import PerRequest, Request


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

    def merge(self, other: Stopwatch) -> None:
        """Add the sections of another; waits for the device."""
        self._seconds += other.seconds

    def __deepcopy__(self, memo: dict) -> Stopwatch:
        twin = Stopwatch()
        twin._seconds = self._seconds  # events belong to the original's stream of work
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_seconds": self._seconds, "_events": []}


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
    statistics: Statistics | PerRequest[Any] | None = None

    @property
    def run(self) -> Statistics | None:
        """What the method did so far, in all requests."""
        return self.of(None)

    @run.setter
    def run(self, statistics: Statistics | PerRequest[Any] | None) -> None:
        self.statistics = statistics

    def of(self, request: Request | None) -> Statistics | None:
        """What the method did for one request, None if that never ran here; without one, for all."""
        if not isinstance(self.statistics, PerRequest):
            return self.statistics
        if request is None:
            return self.statistics.total()
        part = self.statistics.of(request)
        return part.run if part is not None else None

    def to_dict(self, request: Request | None = None) -> dict[str, Any]:
        run = self.of(request)
        return {
            "method": self.method,
            "settings": self.settings,
            "model": self.model,
            "model_class": self.model_class,
            "origin": self.origin,
            "patched": [vars_of(p) for p in self.patched],
            "skipped": [vars_of(s) for s in self.skipped],
            "notes": list(self.notes),
            "run": run.to_dict() if run is not None else None,
        }

    def text(self, request: Request | None = None) -> str:
        """For people."""
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
        run = self.of(request)
        if request is not None:
            lines.append(f"  request   {request}" + (": it never ran here" if run is None else ""))
        if run is not None:
            lines += run.lines(self.method)
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def shorten(value: Any, width: int = 60) -> str:
    """A setting as text; tables of thresholds would fill the page."""
    text = str(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def vars_of(record: Patched | Skipped) -> dict[str, str]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


@dataclass
class Report:
    """All methods of one ``apply`` call, one entry per method and model; of one request, or of all together."""

    entries: list[MethodReport]
    request: Request | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"entries": [entry.to_dict(self.request) for entry in self.entries]}

    def __str__(self) -> str:
        return "\n".join(entry.text(self.request) for entry in self.entries) or "nothing applied"

    def __iter__(self):
        return iter(self.entries)
