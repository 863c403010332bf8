"""What every benchmark needs: the machine in words, timings with quantiles, JSON.

Benchmarks run from a checkout on a machine where hf_accel need not be installed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Timing:
    """Quantiles over ``repeats`` timed calls after ``warmup`` untimed ones, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    warmup: int
    repeats: int


def time_call(
    call: Callable[[], Any],
    device: torch.device,
    *,
    budget_ms: float = 1500.0,
    warmup: int = 2,
    least: int = 5,
    most: int = 50,
) -> Timing:
    """Time ``call`` with device events (host clock on a CPU), as often as fits ``budget_ms``.

    The inputs should exceed the last-level cache: nothing is flushed between calls.
    """
    for _ in range(max(0, warmup - 1)):
        call()
    estimate = _one(call, device)
    repeats = max(least, min(most, int(budget_ms / max(estimate, 1e-3))))
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        times = sorted(start.elapsed_time(end) for start, end in events)
    else:
        times = sorted(_one(call, device) for _ in range(repeats))
    p20, p50, p80 = (times[min(repeats - 1, int(q * repeats))] for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, warmup, repeats)


def _one(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|`` in fp64; infinity where ``out`` is not finite."""
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if math.isfinite(difference.item()) else math.inf


def save(path: str | None, machine: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write ``{"machine": ..., "records": [...]}``; nothing if ``path`` is None."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")


def as_record(timing: Timing) -> dict[str, Any]:
    return {key: round(value, 4) for key, value in asdict(timing).items()}
