"""``hf_accel.compare``: what a method costs in quality and brings in time, against the unpatched model, same seeds."""

from __future__ import annotations

import inspect
import json
import math
import statistics
import warnings
from collections import Counter
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
from hf_accel.measure.sampling import Sample, attention_runs, generate, generate_with
from hf_accel.measure.tables import align, mebibytes, times
from hf_accel.report import Report

DENSE = "dense"
WARMUP_STEPS = 2
PSNR_LIMIT = 200.0  # dB; equal outputs have infinitely many, of which no mean can be taken
_GATES = ("dense_steps", "start_step")  # settings that say from which step on a method does something
_OURS = ("generator", "output_type", "return_dict", "prompt")

Request = str | Config | Mapping[str, Mapping[str, Any]] | Sequence[Any]


@dataclass(frozen=True)
class Figures:
    """One method on one prompt, beside the unpatched run of the same prompt and seed.

    Attributes:
        psnr_db, ssim: against the unpatched output; PSNR at most 200 dB, which means equal.
        density: mean share of query-key pairs computed in the sparse calls; None if the method patches no attention.
        mac_share: MACs of the model as a share of those of a run without step cache; None without one, or unknown.
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
    density: float | None
    mac_share: float | None
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
    density: float | None
    mac_share: float | None
    sparse_share: float | None
    attention_time_ratio: float | None
    whole_time_ratio: float
    peak_bytes: int | None


@dataclass
class Comparison:
    """What :func:`compare` found. Prints as a table; :meth:`save` writes it with a picture.

    Attributes:
        pipeline: class name.
        call: arguments of the pipeline calls.
        figures: per method and prompt. Where attention methods are compared, the method ``dense`` is the model's own
            attention through the seam: its whole-time ratio is what the seam costs, its PSNR how far two dense runs are
            apart.
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
        """Of the methods compared, in order; ``dense`` comes first if it is there."""
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
            "call": {name: plain(value) for name, value in self.call.items()},
            "machine": self.machine,
            "memory": self.memory,
            "summary": [asdict(entry) for entry in self.summary()],
            "baselines": [asdict(entry) for entry in self.baselines],
            "figures": [asdict(entry) for entry in self.figures],
            "reports": {label: report.to_dict() for label, report in self.reports.items()},
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.json`` and ``side_by_side.gif`` (of a video) or ``.png`` (of an image) into a folder.

        A row of the picture is ``unpatched | method | difference x 4``, from the first prompt.
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
        summary = self.summary()
        columns = _columns(summary)
        rows = [[cell(entry) for _, cell in columns] for entry in summary]
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
                align([name for name, _ in columns], rows),
                *_legend(summary),
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
    attention time; only if some method patches attention), once with each method, in this order; before the first, two
    steps of each to warm up. Methods are applied and reverted one after the other; the pipeline is left as it was
    found, also after an exception.

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
    attentive = False
    for _, request in requests:
        with apply(pipe, request) as applied:  # a mistake is found before minutes of dense runs
            attentive = attentive or bool(attention_runs(applied.report()))
    runs = [(DENSE, DENSE), *requests] if attentive else requests
    device = execution_device(pipe)
    result = Comparison(type(pipe).__name__, dict(call), memory=how_measured(device), machine=describe_machine(device))
    say = announce if announce is not None else (lambda words: None)
    say("warm-up")
    _warm_up(pipe, [request for _, request in runs], texts[0], call)
    for number, (text, noise) in enumerate(zip(texts, numbers, strict=True)):
        where = f", prompt {number + 1} of {len(texts)}" if len(texts) > 1 else ""
        say(f"unpatched{where}")
        plain = generate(pipe, text, noise, **call)
        result.baselines.append(Baseline(text, noise, plain.seconds, plain.peak_bytes))
        if not number:
            result.pictures["unpatched"] = _bytes(plain.frames)
        attention = None
        for label, request in runs:
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

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hf_accel: ")  # of so few steps; what holds for the runs comes again
        generate(pipe, prompt, 0, **brief())
        for request in requests:
            with apply(pipe, request) as applied:
                gates = [entry.settings.get(name) for entry in applied.report() for name in _GATES]
                generate(pipe, prompt, 0, **brief(max((gate for gate in gates if isinstance(gate, int)), default=0)))


def figures_of(label: str, prompt: str, seed: int, sample: Sample, plain: Sample, attention: float | None) -> Figures:
    """A run beside the unpatched run ``plain``; ``attention``: seconds in the model's own attention."""
    ours = sample.attention_seconds
    dense_calls: Counter[str] = Counter()
    for run in sample.attention_runs:
        dense_calls.update(run.dense_calls)
    return Figures(
        label=label,
        prompt=prompt,
        seed=seed,
        psnr_db=min(psnr(sample.frames, plain.frames), PSNR_LIMIT),
        ssim=ssim(sample.frames, plain.frames),
        density=sample.density,
        mac_share=sample.mac_share,
        sparse_calls=sum(run.sparse_calls for run in sample.attention_runs),
        dense_calls=dict(dense_calls),
        attention_time_ratio=attention / ours if attention and ours else None,
        whole_time_ratio=plain.seconds / sample.seconds,
        seconds=sample.seconds,
        attention_seconds=ours,
        peak_bytes=sample.peak_bytes,
    )


def _summarise(label: str, rows: list[Figures]) -> Summary:
    def known(name: str) -> list[Any]:
        return [value for row in rows if (value := getattr(row, name)) is not None]

    ratios, densities, shares = known("attention_time_ratio"), known("density"), known("mac_share")
    sparse = sum(row.sparse_calls for row in rows)
    calls = sparse + sum(sum(row.dense_calls.values()) for row in rows)
    return Summary(
        label=label,
        prompts=len(rows),
        psnr_mean=statistics.mean(row.psnr_db for row in rows),
        psnr_worst=min(row.psnr_db for row in rows),
        ssim_mean=statistics.mean(row.ssim for row in rows),
        ssim_worst=min(row.ssim for row in rows),
        density=statistics.mean(densities) if densities else None,
        mac_share=statistics.mean(shares) if shares else None,
        sparse_share=sparse / calls if calls else None,
        attention_time_ratio=statistics.median(ratios) if ratios else None,
        whole_time_ratio=statistics.median(row.whole_time_ratio for row in rows),
        peak_bytes=max(known("peak_bytes"), default=None),
    )


def _columns(rows: list[Summary]) -> list[tuple[str, Callable[[Summary], str]]]:
    """Head and cell of every column that some row has something for."""
    quality: list[tuple[str, Callable[[Summary], str]]] = [
        ("method", lambda row: row.label),
        ("PSNR dB", lambda row: _decibels(row.psnr_mean)),
        ("worst", lambda row: _decibels(row.psnr_worst)),
        ("SSIM", lambda row: f"{row.ssim_mean:.4f}"),
        ("worst", lambda row: f"{row.ssim_worst:.4f}"),
    ]
    attention: list[tuple[str, Callable[[Summary], str]]] = [
        ("density", lambda row: _share(row.density, ".3f")),
        ("sparse", lambda row: _share(row.sparse_share, ".0%")),
        ("attention", lambda row: times(row.attention_time_ratio)),
    ]
    cached: list[tuple[str, Callable[[Summary], str]]] = [
        ("MACs", lambda row: _share(row.mac_share, ".1%")),
        ("by MACs", lambda row: times(1 / row.mac_share if row.mac_share else None)),
    ]
    return [
        *quality,
        *(attention if _any(rows, "density") else ()),
        *(cached if _any(rows, "mac_share") else ()),
        ("whole", lambda row: times(row.whole_time_ratio)),
        ("memory", lambda row: mebibytes(row.peak_bytes)),
    ]


def _legend(rows: list[Summary]) -> list[str]:
    """What the columns mean, below the table."""
    lines = ["quality against the unpatched run of the same seed"]
    if _any(rows, "density"):
        lines[0] += "; density in the sparse calls, and the share of calls that they are"
    if _any(rows, "mac_share"):
        lines.append(
            "MACs of the cached model, of those without cache; by MACs: one over that, its ratio if time followed MACs"
        )
    return lines


def _any(rows: list[Summary], name: str) -> bool:
    return any(getattr(row, name) is not None for row in rows)


def _share(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bytes(frames: torch.Tensor) -> torch.Tensor:
    return (frames.clamp(0, 1) * 255).round().byte()


def _decibels(value: float) -> str:
    return "equal" if value >= PSNR_LIMIT or math.isinf(value) else f"{value:.2f}"


def plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return type(value).__name__
