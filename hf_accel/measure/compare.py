"""``hf_accel.compare``: what a method costs in quality and brings in time, against the unpatched model, same seeds."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_accel.api import applied_methods, apply
from hf_accel.config import Config
from hf_accel.errors import Conflict, InvalidSetting, NotApplicable
from hf_accel.hosts.target import execution_device
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.memory import how_measured
from hf_accel.measure.pictures import write_side_by_side
from hf_accel.measure.quality import psnr, ssim
from hf_accel.measure.sampling import Sample, generate, generate_with
from hf_accel.measure.tables import align, mebibytes, times
from hf_accel.report import Report

DENSE = "dense"
WARMUP_STEPS = 2
PSNR_LIMIT = 200.0  # dB; equal outputs have infinitely many, of which no mean can be taken
_OURS = ("generator", "output_type", "return_dict", "prompt")

Request = str | Config | Mapping[str, Mapping[str, Any]] | Sequence[Any]


@dataclass(frozen=True)
class Figures:
    """One method on one prompt, beside the unpatched run of the same prompt and seed.

    Attributes:
        psnr_db, ssim: against the unpatched output; PSNR at most 200 dB, which means equal.
        density: mean share of query-key pairs computed in the sparse calls.
        sparse_calls, dense_calls: attention calls by the method, and others by reason.
        attention_time_ratio: time in the patched attentions, dense over method, selection included; None if the
            method patches no attention.
        whole_time_ratio: wall time of the pipeline call, unpatched over method.
        peak_bytes: of the pipeline call; :attr:`Comparison.memory` says how measured.
    """

    label: str
    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    density: float
    sparse_calls: int
    dense_calls: dict[str, int]
    attention_time_ratio: float | None
    whole_time_ratio: float
    seconds: float
    attention_seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Baseline:
    """The unpatched run of one prompt: what every ratio is against."""

    prompt: str
    seed: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Summary:
    """One method over all prompts. Worst is lowest quality; ratios are medians, memory is the highest."""

    label: str
    prompts: int
    psnr_mean: float
    psnr_worst: float
    ssim_mean: float
    ssim_worst: float
    density: float
    sparse_share: float
    attention_time_ratio: float | None
    whole_time_ratio: float
    peak_bytes: int | None


@dataclass
class Comparison:
    """What :func:`compare` found. Prints as a table; :meth:`save` writes it with a picture.

    Attributes:
        pipeline: class name.
        call: arguments of the pipeline calls.
        figures: per method and prompt. The method ``dense`` is the model's own attention through the seam: its
            whole-time ratio is what the seam costs, its PSNR how far two dense runs are apart.
        baselines: the unpatched runs, one per prompt.
        reports: label -> report of the method's run on the first prompt.
        pictures: label -> ``[F, H, W, 3]`` uint8 of the first prompt; ``unpatched`` is there too.
        memory: how peak memory was measured.
        machine: on what.
    """

    pipeline: str
    call: dict[str, Any]
    figures: list[Figures] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    memory: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Of the methods compared, in order; ``dense`` comes first."""
        return list(dict.fromkeys(entry.label for entry in self.figures))

    def of(self, label: str) -> list[Figures]:
        """The figures of one method, one per prompt."""
        return [entry for entry in self.figures if entry.label == label]

    def summary(self) -> list[Summary]:
        """Mean and worst over prompts, per method."""
        return [_summarise(label, self.of(label)) for label in self.labels]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "pipeline": self.pipeline,
            "call": {name: _plain(value) for name, value in self.call.items()},
            "machine": self.machine,
            "memory": self.memory,
            "summary": [asdict(entry) for entry in self.summary()],
            "baselines": [asdict(entry) for entry in self.baselines],
            "figures": [asdict(entry) for entry in self.figures],
            "reports": {label: report.to_dict() for label, report in self.reports.items()},
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.json`` and ``side_by_side.gif`` (of a video) or ``.png`` (of an image) into a folder.

        A row of the picture is ``dense | method | difference x 4``, from the first prompt.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        figures = folder / "comparison.json"
        figures.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        rows = {label: self.pictures[label] for label in self.labels if label != DENSE}
        return [figures, write_side_by_side(folder, self.pictures["unpatched"], rows)] if rows else [figures]

    def __str__(self) -> str:
        seconds = statistics.median(entry.seconds for entry in self.baselines)
        prompts = len(self.baselines)
        head = ["method", "PSNR dB", "worst", "SSIM", "worst", "density", "sparse", "attention", "whole", "memory"]
        rows = [
            [
                entry.label,
                _decibels(entry.psnr_mean),
                _decibels(entry.psnr_worst),
                f"{entry.ssim_mean:.4f}",
                f"{entry.ssim_worst:.4f}",
                f"{entry.density:.3f}",
                f"{entry.sparse_share:.0%}",
                times(entry.attention_time_ratio),
                times(entry.whole_time_ratio),
                mebibytes(entry.peak_bytes),
            ]
            for entry in self.summary()
        ]
        device = ", ".join(
            str(part)
            for part in (self.machine["device"], self.machine.get("threads") and f"{self.machine['threads']} threads")
            if part
        )
        base = mebibytes(max((e.peak_bytes for e in self.baselines if e.peak_bytes is not None), default=None))
        return "\n".join(
            [
                f"{self.pipeline}, {prompts} prompt{'s' if prompts > 1 else ''}, {device}; unpatched: {seconds:.2f} s, "
                f"{base}",
                align(head, rows),
                "quality against the unpatched run of the same seed; density in the sparse calls, and the share of "
                "calls that they are;",
                f"times are unpatched / method; memory: {self.memory}",
            ]
        )


def compare(
    pipe: Any,
    methods: Request,
    *,
    prompt: str | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    announce: Callable[[str], Any] | None = None,
    **call: Any,
) -> Comparison:
    """Generate with the unpatched pipeline and with each method, same prompts and seeds, and set them side by side.

    Per prompt: once unpatched (for whole time and quality), once with the model's own attention through the seam (for
    attention time), once with each method, in this order; before the first, two steps of each to warm up. Methods are
    applied and reverted one after the other; the pipeline is left as it was found, also after an exception.

    Args:
        pipe: a loaded diffusers pipeline that makes videos or images from a prompt, without methods on it.
        methods: anything that :func:`hf_accel.apply` takes as its method, or a list of such things, each compared for
            itself. An entry may be a pair ``(label, method)``; a list within the list is applied together.
        prompt, prompts: one text, or several, generated one after the other.
        seed, seeds: of the noise; ``seed`` for all prompts, or one of ``seeds`` for each.
        announce: called with words before every run, for a progress display.
        **call: arguments of the pipeline call, e.g. ``num_inference_steps=30, height=480``.

    Returns:
        Comparison: ``print`` it, ``to_dict()``, ``save(folder)``.

    Raises:
        NotApplicable: ``pipe`` is no pipeline, makes no pictures, or suits no method asked for.
        Conflict: a method stands on the pipeline already.
        InvalidSetting: no prompt, or seeds that do not match the prompts, or an argument that compare sets itself.
    """
    texts, numbers = _prompts(prompt, prompts, seed, seeds)
    for name in _OURS:
        if name in call:
            raise InvalidSetting("compare", name, call[name], "left to compare, which sets it itself")
    _check_pipeline(pipe)
    requests = _labelled(methods)
    for _, request in requests:
        apply(pipe, request).revert()  # a mistake is found before minutes of dense runs
    device = execution_device(pipe)
    result = Comparison(type(pipe).__name__, dict(call), memory=how_measured(device), machine=describe_machine(device))
    say = announce if announce is not None else (lambda words: None)
    say("warm-up")
    _warm_up(pipe, [DENSE, *(request for _, request in requests)], texts[0], call)
    for number, (text, noise) in enumerate(zip(texts, numbers, strict=True)):
        where = f", prompt {number + 1} of {len(texts)}" if len(texts) > 1 else ""
        say(f"unpatched{where}")
        plain = generate(pipe, text, noise, **call)
        result.baselines.append(Baseline(text, noise, plain.seconds, plain.peak_bytes))
        if not number:
            result.pictures["unpatched"] = _bytes(plain.frames)
        attention = None
        for label, request in [(DENSE, DENSE), *requests]:
            say(f"{label}{where}")
            sample = generate_with(pipe, request, text, noise, **call)
            if label == DENSE:
                attention = sample.attention_seconds
            result.figures.append(figures_of(label, text, noise, sample, plain, attention))
            if not number:
                result.pictures[label] = _bytes(sample.frames)
                if sample.report is not None:
                    result.reports[label] = sample.report
    return result


def _prompts(
    prompt: str | None, prompts: Sequence[str] | None, seed: int, seeds: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    if (prompt is None) == (prompts is None) or isinstance(prompts, str):
        raise InvalidSetting(
            "compare", "prompt", prompts if prompt is None else prompt, "one prompt=, or prompts=[...]"
        )
    texts = [prompt] if prompt is not None else list(prompts or ())
    if not texts:
        raise InvalidSetting("compare", "prompts", prompts, "at least one prompt")
    numbers = list(seeds) if seeds is not None else [seed] * len(texts)
    if len(numbers) != len(texts):
        raise InvalidSetting("compare", "seeds", seeds, f"as many as there are prompts, {len(texts)}")
    return texts, numbers


def _check_pipeline(pipe: Any) -> None:
    standing = applied_methods(pipe)  # refuses what is neither a pipeline nor a model
    if isinstance(pipe, torch.nn.Module) or not callable(pipe):
        raise NotApplicable(
            f"compare needs a whole pipeline, which makes pictures from a prompt; got {type(pipe).__name__}. Pass the "
            "pipeline that holds the model."
        )
    if standing:
        names = ", ".join(f"{method} on {model}" for model, method in standing)
        raise Conflict(
            f"compare starts from an unpatched pipeline; here stands {names}. Call hf_accel.revert(...) first."
        )


def _labelled(methods: Request) -> list[tuple[str, Any]]:
    items: Iterable[Any] = [methods] if isinstance(methods, str | Config | Mapping) else list(methods)
    out: list[tuple[str, Any]] = []
    for item in items:
        pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        label, request = item if pair else (_label(item), item)
        taken = [name for name, _ in out if name == label or name.startswith(f"{label} #")]
        out.append((f"{label} #{len(taken) + 1}" if taken or label == DENSE else label, request))
    if not out:
        raise InvalidSetting("compare", "methods", methods, "at least one method")
    return out


def _label(request: Any) -> str:
    if isinstance(request, Config):
        default = type(request)()
        settings = {k: v for k, v in asdict(request).items() if v != getattr(default, k)}
        return _label({request.METHOD: settings})
    if isinstance(request, Mapping):
        return " + ".join(
            " ".join([name, *(f"{k}={v}" for k, v in (values or {}).items())]) for name, values in request.items()
        )
    if isinstance(request, list | tuple):
        return " + ".join(map(_label, request))
    return str(request)


def _warm_up(pipe: Any, requests: list[Any], prompt: str, call: dict[str, Any]) -> None:
    """Compile kernels and fill caches: two steps past those that a method leaves dense, where the steps can be told."""
    countable = "num_inference_steps" in inspect.signature(type(pipe).__call__).parameters
    wanted = call.get("num_inference_steps", math.inf)

    def brief(dense: int = 0) -> dict[str, Any]:
        return {**call, "num_inference_steps": int(min(wanted, dense + WARMUP_STEPS))} if countable else call

    generate(pipe, prompt, 0, **brief())
    for request in requests:
        with apply(pipe, request) as applied:
            gates = [entry.settings.get("dense_steps") for entry in applied.report()]
            generate(pipe, prompt, 0, **brief(max((gate for gate in gates if isinstance(gate, int)), default=0)))


def figures_of(label: str, prompt: str, seed: int, sample: Sample, plain: Sample, attention: float | None) -> Figures:
    """A run beside the unpatched run ``plain``; ``attention``: seconds in the model's own attention."""
    ours = sample.attention_seconds
    dense_calls: dict[str, int] = {}
    for run in sample.runs:
        for reason, count in run.dense_calls.items():
            dense_calls[reason] = dense_calls.get(reason, 0) + count
    return Figures(
        label,
        prompt,
        seed,
        min(psnr(sample.frames, plain.frames), PSNR_LIMIT),
        ssim(sample.frames, plain.frames),
        sample.density,
        sum(run.sparse_calls for run in sample.runs),
        dense_calls,
        attention / ours if attention and ours else None,
        plain.seconds / sample.seconds,
        sample.seconds,
        ours,
        sample.peak_bytes,
    )


def _summarise(label: str, rows: list[Figures]) -> Summary:
    ratios = [row.attention_time_ratio for row in rows if row.attention_time_ratio is not None]
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    sparse = sum(row.sparse_calls for row in rows)
    calls = sparse + sum(sum(row.dense_calls.values()) for row in rows)
    return Summary(
        label,
        len(rows),
        statistics.mean(row.psnr_db for row in rows),
        min(row.psnr_db for row in rows),
        statistics.mean(row.ssim for row in rows),
        min(row.ssim for row in rows),
        statistics.mean(row.density for row in rows),
        sparse / calls if calls else 0.0,
        statistics.median(ratios) if ratios else None,
        statistics.median(row.whole_time_ratio for row in rows),
        max(peaks, default=None),
    )


def _bytes(frames: torch.Tensor) -> torch.Tensor:
    return (frames.clamp(0, 1) * 255).round().byte()


def _decibels(value: float) -> str:
    return "equal" if value >= PSNR_LIMIT or math.isinf(value) else f"{value:.2f}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return type(value).__name__
