"""Generating one video or picture with a pipeline and keeping what the measurement needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.api import apply
from hf_accel.errors import NotApplicable
from hf_accel.hosts.target import execution_device
from hf_accel.measure.memory import PeakMemory
from hf_accel.report import Report
from hf_accel.sites.attention.statistics import AttentionStatistics
from hf_accel.sites.step_cache.statistics import StepCacheStatistics


@dataclass(frozen=True)
class Sample:
    """One generation.

    Attributes:
        frames: ``[F, H, W, 3]`` fp32 in 0..1 on the CPU; of an image pipeline the images.
        seconds: wall time of the pipeline call.
        attention_seconds: time inside the patched attentions, None if none is patched.
        density: mean share of query-key pairs computed in the sparse calls, 1.0 if there were none; None if no
            attention is patched.
        mac_share: MACs of the model as a share of those of a run without step cache; None without one, or where they
            cannot be counted.
        report: of the method, None for an unpatched run.
        peak_bytes: see :class:`~hf_accel.measure.memory.PeakMemory`; None where it cannot be measured.
    """

    frames: torch.Tensor
    seconds: float
    attention_seconds: float | None = None
    density: float | None = None
    mac_share: float | None = None
    report: Report | None = None
    peak_bytes: int | None = None

    @property
    def attention_runs(self) -> list[AttentionStatistics]:
        """Counters of every attention method on every model."""
        return attention_runs(self.report)

    @property
    def step_runs(self) -> list[StepCacheStatistics]:
        """Counters of every step cache on every model."""
        return [entry.run for entry in self.report or () if isinstance(entry.run, StepCacheStatistics)]


def attention_runs(report: Report | None) -> list[AttentionStatistics]:
    """Counters of the attention methods in a report."""
    return [entry.run for entry in report or () if isinstance(entry.run, AttentionStatistics)]


def generate(pipe: Any, prompt: str, seed: int, **call: Any) -> Sample:
    """Call an unpatched (or already patched) pipeline with a CPU generator seeded with ``seed``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with PeakMemory(execution_device(pipe)) as peak:
        _synchronise()
        begin = time.perf_counter()
        output = pipe(prompt=prompt, generator=generator, output_type="pt", **call)
        _synchronise()
        seconds = time.perf_counter() - begin
    return Sample(_frames(pipe, output), seconds, peak_bytes=peak.bytes)


def generate_with(
    pipe: Any, method: Any, prompt: str, seed: int, settings: dict[str, Any] | None = None, **call: Any
) -> Sample:
    """Apply a method, generate, revert. Attention is timed."""
    with apply(pipe, method, **(settings or {})) as applied:
        applied.time_attention()
        plain = generate(pipe, prompt, seed, **call)
        found = replace(plain, report=applied.report())
    runs = found.attention_runs
    densities = [run.mean_density for run in runs if run.mean_density is not None]
    density = (sum(densities) / len(densities) if densities else 1.0) if runs else None
    attention_seconds = sum(run.stopwatch.seconds for run in runs) if runs else None
    shares = [run.mac_share for run in found.step_runs if run.mac_share is not None]
    mac_share = sum(shares) / len(shares) if shares else None
    return replace(found, attention_seconds=attention_seconds, density=density, mac_share=mac_share)


def _frames(pipe: Any, output: Any) -> torch.Tensor:
    """``[F, H, W, 3]`` of what a pipeline returned: all frames of all its videos, or all its images."""
    found = getattr(output, "frames", None)
    if found is None:
        found = getattr(output, "images", None)
    if not isinstance(found, torch.Tensor) or found.ndim not in (4, 5):
        raise NotApplicable(
            f"{type(pipe).__name__} returned neither frames [B, F, 3, H, W] nor images [B, 3, H, W] for "
            f"output_type='pt', but {type(output).__name__} with {type(found).__name__}; it cannot be measured."
        )
    pictures = found.flatten(0, 1) if found.ndim == 5 else found
    return pictures.float().cpu().permute(0, 2, 3, 1).contiguous()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
