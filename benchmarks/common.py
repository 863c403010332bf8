"""What every benchmark needs: the machine in words, timings with quantiles, JSON.

Benchmarks run from a checkout on a machine where hf_accel need not be installed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
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


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and time: what a figure must be read with."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        record |= {"device": _cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        # A loaded machine spoils ratios, not only times: small calls wait for threads that are not running.
        record["load_average"] = round(os.getloadavg()[0], 2)
    return record


def save(path: str | None, environment: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write ``{"environment": ..., "records": [...]}``; nothing if ``path`` is None."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"environment": environment, "records": records}, indent=1) + "\n")


def as_record(timing: Timing) -> dict[str, Any]:
    return {key: round(value, 4) for key, value in asdict(timing).items()}


def _git(*arguments: str) -> str | None:
    """None where git or its directory is absent, as on a machine that got the files only."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
