"""``hf_accel.calibrate``: from a budget to the thresholds of every head, on what the model really attends to.

A few dense generations run with a probe in every attention. The probe computes what the method asks for on the spot and
keeps only that, so that memory does not grow with the model or with the length. Then the method turns what its probes
saw, and the budget, into settings; they are stored as a preset.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from hf_accel import registry
from hf_accel.api import applied_methods
from hf_accel.attention.call import AttentionCall
from hf_accel.attention.gate import resolve_share
from hf_accel.config import Config
from hf_accel.errors import Conflict, HFAccelError, InvalidSetting, NotApplicable
from hf_accel.hosts.clocks.steps import Clocks, clocks
from hf_accel.hosts.target import Model, resolve
from hf_accel.ledger import Ledger
from hf_accel.measure.machine import describe_machine
from hf_accel.presets import families, files
from hf_accel.presets.preset import Match, Preset, Wanted
from hf_accel.report import MethodReport
from hf_accel.sites.attention import diffusers as attention_host

# Fields of a model's configuration by which a preset knows the model again; those that are there count.
IDENTITY = (
    "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels",
    "num_hidden_layers", "num_key_value_heads", "hidden_size",
)  # fmt: skip


@runtime_checkable
class Calibratable(Protocol):
    """What an attention method has if it can be calibrated. ``config`` holds the settings that stay as they are."""

    config: Any

    def probe(self, call: AttentionCall) -> Any | None:
        """What calibration needs to know of one call, small and on the CPU; None if the method runs it dense."""

    @classmethod
    def calibrate(
        cls, records: Mapping[int, Sequence[Any]], heads: Sequence[int], *, l1: float | None, density: float | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings to change, and evidence for them, from the records of every layer.

        ``heads`` has the number of heads of every layer; a layer without records is to stay dense. One of ``l1``
        (relative L1 error of a head's output) and ``density`` (mean over the heads) is given. The evidence has at
        least ``density``, the one to be expected.
        """


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        config: the settings, ready for ``apply(pipe, result.config)``.
        preset: the same as a preset, with the evidence.
        evidence: what was asked for, what was measured on, what is to be expected.
        path: the file it was written to, or None.
    """

    config: Config
    preset: Preset
    evidence: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __str__(self) -> str:
        found = {f"asked {name}": value for name, value in self.evidence["asked"].items()} | self.evidence["found"]
        lines = [f"{self.config.METHOD} calibrated in {self.evidence['seconds']:.0f} s"]
        lines += [f"  {k:<14} {v:.4g}" if isinstance(v, float) else f"  {k:<14} {v}" for k, v in found.items()]
        return "\n".join([*lines, f"  {'preset':<14} {self.path or 'not written (out=None)'}"])


class Probe:
    """An attention core that runs everything dense and shows chosen calls to a method."""

    differentiable = False

    def __init__(self, method: Calibratable, samples: int):
        self.method, self.samples = method, samples
        self.records: dict[int, list[Any]] = {}
        self.heads: dict[int, int] = {}
        self.refused: Counter[str] = Counter()
        self._taken: dict[tuple[int, int], set[int]] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.heads[call.layer.index] = call.query.shape[1]
        if self._wanted(call):
            record = self.method.probe(call)
            if record is None:
                self.refused["calls that the method runs dense"] += 1
            else:
                self.records.setdefault(call.layer.index, []).append(record)
        return call.dense()

    def reset(self) -> None:
        """Records outlive generations."""

    def fork(self) -> Probe:
        return self  # one record of all requests

    def _wanted(self, call: AttentionCall) -> bool:
        """One forward of each chosen step: spread evenly over the steps that are not dense by the settings."""
        settings = self.method.config
        layer, step = call.layer.index, call.step
        if layer < resolve_share(
            getattr(settings, "dense_layers", 0), call.layer.count, owner="calibrate", field="dense_layers"
        ):
            return False
        taken = self._taken.setdefault((step.generation, layer), set())
        if step.index in taken:
            return False
        if step.count is None:
            wanted = len(taken) < self.samples
        else:
            first = resolve_share(
                getattr(settings, "dense_steps", 0), step.count, owner="calibrate", field="dense_steps"
            )
            left = step.count - first
            count = min(self.samples, left)
            wanted = step.index in {first + (2 * i + 1) * left // (2 * count) for i in range(count)}
        if wanted:
            taken.add(step.index)
        return wanted


def calibrate(
    pipe: Any,
    method: str = "sparge",
    /,
    *,
    prompts: Sequence[Any] | None = None,
    density: float | None = None,
    l1: float | None = None,
    steps: int | None = None,
    samples: int = 5,
    seed: int = 0,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    run: Callable[..., Any] | None = None,
    **call: Any,
) -> Calibration:
    """Fit a method's thresholds to a budget on this model, and store them as a preset.

    Args:
        pipe: a pipeline or model without methods on it.
        method: one that can be calibrated.
        prompts: at least one; each is generated once, dense. Five are what the authors of ``sparge`` used.
        density: mean share of query-key pairs to compute, or
        l1: relative L1 error ``sum|O - O'| / sum|O|`` that no head may exceed on any sample. One of the two.
        steps: ``num_inference_steps`` of the pipeline.
        samples: calls of every layer that are probed, over all prompts, spread over the steps.
        seed: of the first prompt; the next ones count on.
        out: file for the preset, or None.
        settings: settings of the method that stay fixed, over those that ``configs/`` has for the model.
        run: called as ``run(prompt, **call)`` instead of the pipeline; needed where ``pipe`` is a bare model.
        **call: further arguments of the pipeline call (``height=480, ...``).

    Returns:
        Calibration: ``apply(pipe, result.config)``, or ``apply(pipe, "preset.yaml")``.

    Raises:
        InvalidSetting: no prompts; not exactly one of ``density`` and ``l1``; a value out of range.
        NotApplicable: the method cannot be calibrated or does not suit the model.
        Conflict: a method stands on the model.
        HFAccelError: no attention call could be probed.
    """
    prompts = _check(prompts, density, l1, samples)
    cls: Any = registry.get(method)
    if not (hasattr(cls, "probe") and hasattr(cls, "calibrate")):
        able = [name for name, other in registry.methods().items() if hasattr(other, "probe")]
        raise NotApplicable(f"{method!r} has nothing to calibrate. Methods that have: {', '.join(able) or 'none'}.")
    if standing := applied_methods(pipe):
        raise Conflict(f"{standing[0][1]} stands on {standing[0][0]}; call hf_accel.revert(...) before calibrating.")
    target = resolve(pipe)
    if run is None:
        if target.pipeline is None:
            raise NotApplicable(
                f"{target.description} is a bare model: say how it runs on a prompt with run=, e.g. "
                "run=lambda prompt: model(**tokenizer(prompt, return_tensors='pt'))."
            )
        run = _generate(pipe, steps, seed)
    reasons = {model.name: cls.why_not(model) for model in target.models}
    usable = [model for model in target.models if reasons[model.name] is None]
    if not usable:
        raise NotApplicable(f"{method}: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))

    config = _base(cls, usable[0], settings or {})
    begin = time.perf_counter()
    probes = _probe(usable, clocks(target.pipeline), cls(config), -(-samples // len(prompts)), prompts, run, call)
    records, heads = _together(usable, probes)
    if not records:
        reasons_dense = Counter(reason for probe in probes for reason in probe.refused.elements())
        raise HFAccelError(
            f"No attention call of {target.description} could be probed in {len(prompts)} runs"
            + "".join(f"; {count} x {reason}" for reason, count in reasons_dense.items())
            + ". Check that the run really calls the model, and that dense_steps and dense_layers leave something."
        )
    changes, found = cls.calibrate(records, heads, l1=l1, density=density)
    evidence = {
        "asked": {"density": density} if density is not None else {"l1": l1},
        "found": found,
        "samples_per_layer": min(map(len, records.values())),
        "prompts": len(prompts),
        "call": {name: value for name, value in call.items() if isinstance(value, int | float | str)}
        | ({"num_inference_steps": steps} if steps is not None else {}),
        "seconds": time.perf_counter() - begin,
        "machine": describe_machine(),
    }
    _say_if_missed(method, density, found)
    return _store(config.replace(**changes), usable, evidence, out)


def _check(prompts: Any, density: float | None, l1: float | None, samples: int) -> list[Any]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise InvalidSetting(
            "calibrate", "prompts", prompts, "at least one prompt: thresholds are fitted to what the model attends to"
        )
    if (density is None) == (l1 is None):
        raise InvalidSetting("calibrate", "density, l1", (density, l1), "one of the two, density=0.3 or l1=0.06")
    if density is not None and not 0 < density <= 1:
        raise InvalidSetting("calibrate", "density", density, "above 0 and at most 1")
    if l1 is not None and not l1 >= 0:
        raise InvalidSetting("calibrate", "l1", l1, "0 or more")
    if samples < 1:
        raise InvalidSetting("calibrate", "samples", samples, "at least 1")
    return list(prompts)


def _base(cls: Any, model: Model, settings: Mapping[str, Any]) -> Config:
    known = families.settings_for(model, cls.name)
    return known.config.replace(**settings) if known is not None else cls.Config.build(settings)


def _generate(pipe: Any, steps: int | None, seed: int) -> Callable[..., Any]:
    """Calls the pipeline; counts seeds on from prompt to prompt; stops before the VAE where the pipeline can."""
    known = inspect.signature(pipe.__call__).parameters
    count = 0

    def run(prompt: Any, **call: Any) -> None:
        nonlocal count
        defaults: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed + count)}
        defaults["output_type"] = "latent"
        if steps is not None:
            defaults["num_inference_steps"] = steps
        count += 1
        pipe(prompt=prompt, **{k: v for k, v in defaults.items() if k in known and k not in call}, **call)

    return run


def _probe(
    models: Sequence[Model],
    clock: Clocks,
    method: Any,
    samples: int,
    prompts: Sequence[Any],
    run: Callable[..., Any],
    call: Mapping[str, Any],
) -> list[Probe]:
    """Run the prompts with a probe in every attention of every model, and take the probes out again."""
    ledger = Ledger()
    probes = [Probe(method, samples) for _ in models]
    try:
        for model, probe in zip(models, probes, strict=True):
            report = MethodReport("calibrate", {}, model.name, model.class_name)
            attention_host.install(model, probe, ledger, report, clock)
        with torch.no_grad():
            for prompt in prompts:
                run(prompt, **call)
    finally:
        ledger.undo()
    return probes


def _together(models: Sequence[Model], probes: Sequence[Probe]) -> tuple[dict[int, list[Any]], list[int]]:
    """Records by layer and heads by layer, of several models of one shape (the two experts of Wan 2.2) as of one."""
    heads = [[probe.heads[i] for i in sorted(probe.heads)] for probe in probes if probe.heads]
    if any(other != heads[0] for other in heads):
        shapes = ", ".join(f"{m.name} has {len(h)} layers" for m, h in zip(models, heads, strict=False))
        raise NotApplicable(
            f"The models differ in layers or heads ({shapes}) and need a calibration each: pass one of them with run=."
        )
    records: dict[int, list[Any]] = {}
    for probe in probes:
        for layer, found in probe.records.items():
            records.setdefault(layer, []).extend(found)
    return dict(sorted(records.items())), heads[0] if heads else []


def _say_if_missed(method: str, density: float | None, found: Mapping[str, Any]) -> None:
    reached = found["density"]
    if density is not None and reached > density * 1.05:
        warnings.warn(
            f"hf_accel: {method} cannot get below density {reached:.3f} on this model at these settings "
            f"(asked for {density}); smaller blocks may help.",
            stacklevel=3,
        )
    elif reached > 0.99 and (density is None or density < 0.99):
        warnings.warn(f"hf_accel: no head can be sparse within the error asked for; {method} runs dense.", stacklevel=3)


def _store(config: Config, models: Sequence[Model], evidence: dict[str, Any], out: str | Path | None) -> Calibration:
    matches = []
    for model in models:
        known = {name: model.config[name] for name in IDENTITY if isinstance(model.config.get(name), int)}
        match = Match(model.class_name, known)
        matches += [match] if match not in matches else []
    name = Path(out).stem if out is not None else config.METHOD
    made = Preset(
        name=name,
        wanted=(Wanted(config.METHOD, config, "hf_accel.calibrate"),),
        models=tuple(matches),
        evidence=evidence,
        description=f"{config.METHOD} with the thresholds of every head, fitted by hf_accel.calibrate.",
    )
    path = files.dump(made, out) if out is not None else None
    return Calibration(config, made, evidence, path)
