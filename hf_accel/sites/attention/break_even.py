"""Whether a sparse method pays at a shape: from a shipped table of measured devices, or measured on the spot.

The table, ``break_even.json``, is made by ``benchmarks/break_even.py``. A row is one method at one budget and one
length: how many times faster than the best dense attention it was there, with the density and the error it had. The
key is the budget *setting*, not the density, because the density of a method like top-p is known only after the
device has run, and asking for it would make every first call wait.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("break_even.json")
SCHEMA = 1


@dataclass(frozen=True)
class Shape:
    """One attention call as the table knows it. Heads and batch are left out: both scale dense and sparse alike."""

    device: str
    tokens: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, query: torch.Tensor) -> Shape:
        """Of a query ``[B, H, S, D]``."""
        dtype = str(query.dtype).removeprefix("torch.")
        return cls(device_name(query.device), query.shape[2], query.shape[3], dtype)


@dataclass(frozen=True)
class Verdict:
    """What is known of a method at a shape.

    Attributes:
        ratio: time of dense over time of the method, so that below 1 the method is slower; None if not known.
        words: for the report.
    """

    ratio: float | None
    words: str

    @property
    def slower(self) -> bool:
        return self.ratio is not None and self.ratio < 1


def verdict_of(method: str, tokens: int, ratio: float, source: str) -> Verdict:
    """A verdict whose words name the ratio, the length and where the ratio is from."""
    end = ": slower" if ratio < 1 else ""
    return Verdict(ratio, f"{method} is {ratio:.2f}x dense at {tokens} tokens ({source}){end}")


def look_up(method: str, settings: Mapping[str, Any], budget: str | None, shape: Shape) -> Verdict:
    """What the table says. Nothing is extrapolated: outside of what was measured the ratio is not known.

    Between measured budgets the method's time in units of dense time is taken as linear (a fixed part plus a part
    that grows with the density), between lengths as linear in the logarithm of the token count.

    Args:
        method, settings: what is about to run.
        budget: name of the setting that dials the density; None: rows with equal settings count.
        shape: of the call.
    """
    unknown = functools.partial(_unknown, method, shape)
    device = table()["devices"].get(shape.device)
    if device is None:
        return unknown(f"not measured on this device ({shape.device})")
    rows = [row for row in device["rows"] if row["method"] == method and row["dtype"] == shape.dtype]
    if not rows:
        return unknown(f"not measured on this device in {shape.dtype}")
    nearest = min((abs(math.log(row["head_dim"] / shape.head_dim)), row["head_dim"]) for row in rows)[1]
    rows = [row for row in rows if row["head_dim"] == nearest]
    wanted = settings.get(budget) if budget is not None else None
    if budget is None:  # there is nothing to interpolate along
        rows = [row for row in rows if not _different(settings, row["settings"], None)]
    costs = _costs_by_length(rows, wanted)
    if not costs:
        return unknown(f"not measured at {budget}={wanted}" if budget is not None else "not measured at these settings")
    cost = _interpolate([(math.log(tokens), cost) for tokens, cost in costs], math.log(shape.tokens))
    if cost is None:
        return unknown(f"measured only between {costs[0][0]} and {costs[-1][0]} tokens")
    source = "table" + (f", {budget}={wanted}" if budget is not None else "")
    changed = _different(settings, min(rows, key=lambda row: abs(row["tokens"] - shape.tokens))["settings"], budget)
    if changed:
        source += "; measured with " + ", ".join(changed)
    return verdict_of(method, shape.tokens, 1 / cost, source)


def measure(dense: Callable[[], Any], method: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Time of ``dense`` over time of ``method``: one untimed call of each, then medians of calls in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, seconds in zip((dense, method), times, strict=True):
            wait_for(device)
            begin = time.perf_counter()
            run()
            wait_for(device)
            if turn:
                seconds.append(time.perf_counter() - begin)
    return statistics.median(times[0]) / max(statistics.median(times[1]), 1e-9)


def wait_for(device: torch.device) -> None:
    """Until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def table() -> dict[str, Any]:
    """The shipped table: ``{"schema", "devices": {name: {"machine", "rows": [...]}}}``."""
    return json.loads(TABLE.read_text())


@functools.cache
def device_name(device: torch.device) -> str:
    """The product name of a GPU or CPU: the key of the table."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _unknown(method: str, shape: Shape, why: str) -> Verdict:
    return Verdict(None, f"{method} against dense at {shape.tokens} tokens: {why}")


def _costs_by_length(rows: Sequence[Mapping[str, Any]], wanted: Any) -> list[tuple[int, float]]:
    """(tokens, time in units of dense time) at the wanted budget, by length; lengths that do not cover it are out."""
    lengths: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        lengths[row["tokens"]].append(row)
    out = []
    for tokens, group in sorted(lengths.items()):
        if _is_number(wanted):
            points = [(float(row["budget"]), 1 / row["ratio"]) for row in group if _is_number(row["budget"])]
            cost = _interpolate(points, float(wanted))
        else:
            equal = [1 / row["ratio"] for row in group if row["budget"] == wanted]
            cost = equal[0] if equal else None
        if cost is not None:
            out.append((tokens, cost))
    return out


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Linear between the two neighbours of ``x``; None outside of the points."""
    points = sorted(points)
    slack = 1e-9 * max(1.0, abs(x))
    for (left, low), (right, high) in itertools.pairwise(points):
        if left - slack <= x <= right + slack:
            share = (x - left) / (right - left) if right > left else 0.0
            return low + min(max(share, 0.0), 1.0) * (high - low)
    return points[0][1] if len(points) == 1 and abs(points[0][0] - x) <= slack else None


# Settings that say when and on what the method runs, not how long one call takes.
_NO_COST = frozenset({"dense_steps", "dense_layers", "on_slow", "break_even", "backend"})


def _different(settings: Mapping[str, Any], measured: Mapping[str, Any], budget: str | None) -> list[str]:
    names = [name for name in measured if name != budget and name not in _NO_COST]
    return [f"{name}={measured[name]}" for name in names if name in settings and settings[name] != measured[name]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
