"""What every benchmark needs: the machine in words, timings with quantiles, JSON.

Benchmarks run from a checkout on a machine where hf_accel need not be installed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_accel.measure.machine import describe_machine  # noqa: E402

T = TypeVar("T")


@dataclass(frozen=True)
class LinearShape:
    """A linear layer and the numbers of tokens that it is timed with."""

    name: str
    inputs: int
    outputs: int
    tokens: tuple[int, ...]
    dtype: torch.dtype


def kernel_parser(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def numbers(text: str) -> list[int]:
    """Type of an option: ``"1,16"``."""
    return [int(part) for part in text.split(",")]


def grids(text: str) -> list[tuple[int, int]]:
    """Type of an option: ``"4:128,2:64"``, bits and group size."""
    return [(int(bits), int(group)) for bits, group in (part.split(":") for part in text.split(","))]


def parse(parser: argparse.ArgumentParser, shapes: Mapping[str, T]) -> tuple[argparse.Namespace, list[T], torch.device]:
    """Options with those that every benchmark of a kernel has, the shapes asked for, and where it runs, fp32 exact."""
    parser.add_argument("--shape", default="toy", help=f"comma-separated: {', '.join(shapes)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    names = options.shape.split(",")
    if unknown := [name for name in names if name not in shapes]:
        parser.error(f"no shape {', '.join(map(repr, unknown))}; there are {', '.join(shapes)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return options, [shapes[name] for name in names], device


def conclude(
    options: argparse.Namespace,
    device: torch.device,
    runs: Iterable[tuple[list[dict[str, Any]], bool]],
    **told: Any,
) -> int:
    """Do the runs, each records and whether all results were right; save; the exit code."""
    done = list(runs)
    save(options.json, {**describe_machine(device), **told}, [record for records, _ in done for record in records])
    return 0 if all(right for _, right in done) else 1


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


def time_and_memory(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """:func:`time_call` as a record; on a GPU with ``extra_bytes``, the most that was allocated beside what was."""
    found: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        found["extra_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return found | as_record(time_call(call, device))
