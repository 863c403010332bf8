"""Timing several things fairly: in turn, so that a machine that gets busy slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.sites.attention.break_even import wait_for


@dataclass(frozen=True)
class Timing:
    """Quantiles over ``rounds`` timed calls, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


def in_turn(
    parts: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time every part once per round, after ``warmup`` rounds that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(warmup + rounds):
        for name, run in parts.items():
            wait_for(device)
            begin = time.perf_counter()
            run()
            wait_for(device)
            if turn >= warmup:
                found[name].append((time.perf_counter() - begin) * 1e3)
    return {name: _quantiles(sorted(values)) for name, values in found.items()}


def _quantiles(values: list[float]) -> Timing:
    count = len(values)
    low, middle, high = (values[min(count - 1, int(share * count))] for share in (0.2, 0.5, 0.8))
    return Timing(low, middle, high, count)
