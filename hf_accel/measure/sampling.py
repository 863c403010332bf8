"""Generating one video with a pipeline and keeping what the measurement needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.api import apply
from hf_accel.report import Report, RunStatistics


@dataclass(frozen=True)
class Sample:
    """One generation.

    Attributes:
        frames: ``[F, H, W, 3]`` fp32 in 0..1 on the CPU.
        seconds: wall time of the pipeline call.
        attention_seconds: time inside the patched attentions, None for an unpatched run.
        density: mean share of query-key pairs computed in the sparse calls; 1.0 for an unpatched run.
        report: of the method, None for an unpatched run.
    """

    frames: torch.Tensor
    seconds: float
    attention_seconds: float | None = None
    density: float = 1.0
    report: Report | None = None

    @property
    def run(self) -> RunStatistics | None:
        """Counters of the first patched model."""
        return self.report.entries[0].run if self.report is not None else None


def generate(pipe: Any, prompt: str, seed: int, **call: Any) -> Sample:
    """Call an unpatched (or already patched) pipeline with a CPU generator seeded with ``seed``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    _synchronise()
    begin = time.perf_counter()
    frames = pipe(prompt, generator=generator, output_type="pt", **call).frames
    _synchronise()
    seconds = time.perf_counter() - begin
    video = frames[0].float().cpu()
    return Sample(video.permute(0, 2, 3, 1).contiguous(), seconds)


def generate_with(
    pipe: Any, method: Any, prompt: str, seed: int, settings: dict[str, Any] | None = None, **call: Any
) -> Sample:
    """Apply a method, generate, revert. Attention is timed."""
    with apply(pipe, method, **(settings or {})) as applied:
        applied.time_attention()
        plain = generate(pipe, prompt, seed, **call)
        report = applied.report()
    runs = [entry.run for entry in report if entry.run is not None]
    densities = [run.mean_density for run in runs if run.mean_density is not None]
    density = sum(densities) / len(densities) if densities else 1.0
    return Sample(plain.frames, plain.seconds, sum(run.stopwatch.seconds for run in runs), density, report)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
