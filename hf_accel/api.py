"""apply, revert, explain, methods: what users call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel import registry
from hf_accel.composition import Explanation, Pair, Verdict, pairs_among
from hf_accel.config import Config
from hf_accel.errors import (
    Conflict,
    HFAccelError,
    InvalidSetting,
    NotApplicable,
    RevertRefused,
    UnknownMethod,
)
from hf_accel.hosts.clocks.steps import Clock
from hf_accel.hosts.foreign import standing
from hf_accel.hosts.target import Model, Target, resolve
from hf_accel.ledger import MARK, Change, Ledger
from hf_accel.method import SITE_ORDER, Given, Method, Party, conflict, takes
from hf_accel.presets import families, preset
from hf_accel.presets.preset import Wanted
from hf_accel.report import MethodReport, Report
from hf_accel.sites.attention.seam import SeamContext
from hf_accel.sites.prefix_attention.install import BlockSeam


@dataclass
class Installation:
    """One method on one model: what is needed to report it and to undo it."""

    method: Method
    ledger: Ledger
    report: MethodReport
    handle: Any = None


class Applied:
    """Methods that stand on a model. Also a context manager that reverts at its end.

    Returned by :func:`apply`. Holds the models, so keep it only as long as you need them.
    """

    def __init__(self, target: Target, installed: list[tuple[Model, Installation]]):
        self._target = target
        self._installed = installed

    @property
    def active(self) -> bool:
        """Whether any of it still stands."""
        return bool(self._standing())

    def report(self) -> Report:
        """What was patched, what was skipped and why, which kernel runs, what it did so far."""
        return Report([installation.report for _, installation in self._installed])

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by component name (``"transformer"``, ...) and method: calls, fallbacks, density per head.

        Reads device tensors, so it waits for the device.
        """
        out: dict[str, dict[str, Any]] = {}
        for model, installation in self._installed:
            run = installation.report.run
            out.setdefault(model.name, {})[installation.method.name] = run.to_dict() if run is not None else {}
        return out

    def time_attention(self, on: bool = True) -> None:
        """Measure the time inside patched attentions from now on (``attention_seconds`` in :meth:`stats`)."""
        for _, installation in self._installed:
            if isinstance(installation.handle, SeamContext | BlockSeam):
                installation.handle.timed = on

    def revert(self) -> None:
        """Undo these methods exactly. A second call does nothing.

        Raises:
            RevertRefused: somebody changed the same attribute later; nothing was undone.
        """
        _undo(self._standing())

    def _standing(self) -> list[tuple[Model, Installation]]:
        return [(m, i) for m, i in self._installed if any(i is other for other in _marks(m.module))]

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(i.method.name for _, i in self._installed))
        return f"<Applied {names} on {self._target.description}{'' if self.active else ', reverted'}>"


Request = str | Config | Mapping[str, Mapping[str, Any]] | Iterable[Any] | None


def apply(target: Any, method: Request = None, /, *, revision: str | None = None, **settings: Any) -> Applied:
    """Put one or more methods on a loaded model.

    Args:
        target: a diffusers pipeline, a diffusers or transformers model, or a ``PeftModel``.
        method: a method's name; a shipped preset's name; a preset file; ``"owner/name"`` of a preset on the Hub;
            a :class:`~hf_accel.config.Config`; ``{name: settings}``; or a list of these. None takes what the
            shipped ``configs/`` recommend for this very model.
        revision: branch, tag or commit of a Hub preset.
        **settings: settings of a single named method. They change the settings that ``configs/`` has for this
            model and method, or else the method's defaults. Also what methods take beside settings (calibration
            texts, a tokenizer, ...), which goes to every method asked for that takes it.

    Returns:
        Applied: handle with ``report()``, ``stats()``, ``revert()``; a context manager.

    Raises:
        UnknownMethod: no such method or preset; names the nearest.
        InvalidSetting: a setting of the wrong type or range.
        PresetError: a preset that cannot be read.
        NotApplicable: no model in ``target`` suits a method.
        NothingPatched: a suitable model in which nothing could be patched.
        Conflict: the methods exclude each other, or one already on the model.

    A failure leaves the model as it was. Applying a method that is already there replaces it.
    """
    found = resolve(target)
    known = registry.methods()
    # With a single method its own words count: another's input may be a setting of this one.
    takers = [known[method]] if isinstance(method, str) and method in known else list(known.values())
    inputs = {name for cls in takers for name in cls.inputs}
    given = {name: settings.pop(name) for name in list(settings) if name in inputs}
    wanted = _hand_over(_wanted(found, method, revision, settings), given)
    _check_each_other(wanted_types(wanted.values()))
    plan: list[tuple[Model, Wanted]] = []
    refusals: list[str] = []
    for name, per_model in wanted.items():
        fits, reasons = _fitting(found, per_model, wanted.keys())
        if not fits:
            refusals.append(f"{name}: " + "; ".join(reasons))
        plan += fits
    if refusals:
        fitting = [n for n, cls in registry.methods().items() if any(cls.why_not(m) is None for m in found.models)]
        instead = f"Methods that fit: {', '.join(fitting)}. " if fitting else ""
        raise NotApplicable(
            f"{found.description} suits no method asked for. {' | '.join(refusals)}. {instead}"
            "See hf_accel.explain(...)."
        )
    plan.sort(key=lambda item: SITE_ORDER.index(registry.get(item[1].method).facts.site))
    _check_present(plan)
    return Applied(found, _install(found, plan))


def revert(target: Any) -> None:
    """Take every hf_accel method off a pipeline or model (also off a deep copy of a patched one).

    Raises:
        RevertRefused: somebody changed the same attribute later; nothing was undone.
        NotApplicable: ``target`` is no pipeline or model.
    """
    _undo([(model, i) for model in resolve(target).models for i in _marks(model.module)])


def applied_methods(target: Any) -> list[tuple[str, str]]:
    """What stands on a pipeline or model: (component name, method), in order of installation.

    Raises:
        NotApplicable: ``target`` is no pipeline or model.
    """
    return [(model.name, i.method.name) for model in resolve(target).models for i in _marks(model.module)]


def methods() -> dict[str, dict[str, str]]:
    """The registry: name -> site, summary, paper."""
    return {
        name: {"site": cls.facts.site, "summary": cls.summary, "paper": cls.paper}
        for name, cls in registry.methods().items()
    }


def explain(target: Any) -> Explanation:
    """Every method: does it apply to this model, and the reason; and which of them go together, also with what stands
    on the model already. Changes nothing.

    Raises:
        NotApplicable: ``target`` is no pipeline or model.
    """
    found = resolve(target)
    out = Explanation(_verdict(found, name, cls) for name, cls in registry.methods().items())
    pairs: dict[tuple[str, str], Pair] = {}
    for model in found.models:
        there = [type(i.method) for i in _marks(model.module)]
        foreign = standing(model.module)
        out.standing += [(model.name, owner.name) for owner, _ in _owners(model)]
        takers = [
            cls
            for cls in registry.methods().values()
            if cls in there or cls.why_not(model) is None or _taken_by_other(model, cls)
        ]
        for pair in pairs_among(takers, foreign):
            pairs.setdefault((pair.first, pair.second), pair)
    out.pairs = list(pairs.values())
    return out


def _verdict(target: Target, name: str, cls: type[Method]) -> Verdict:
    reasons = {m.name: _why_not_now(m, cls) for m in target.models}
    fitting = [m for m in target.models if reasons[m.name] is None]
    if not fitting:
        return Verdict(name, False, "; ".join(dict.fromkeys(r for r in reasons.values() if r)))
    known = next((w for m in fitting if (w := families.settings_for(m, name)) is not None), None)
    where = ", ".join(f"{m.name} ({m.class_name})" for m in fitting)
    origin = known.origin if known is not None else "the method's defaults; no tuned settings for this model"
    settings = known.config.to_dict()["settings"] if known is not None else {}
    again = any(cls is type(i.method) for m in fitting for i in _marks(m.module))
    stands = "; it is there already and would be replaced" if again else ""
    return Verdict(name, True, f"on {where}; settings from {origin}{stands}", settings)


# -- what is wanted ------------------------------------------------------------------------------------------------

PerModel = dict[str, Wanted]  # component name -> what is wanted on it


def _wanted(target: Target, request: Request, revision: str | None, settings: dict[str, Any]) -> dict[str, PerModel]:
    """Method name -> model name -> what is wanted there, after reading presets and configs."""
    if request is None:
        if settings:
            raise InvalidSetting(
                "apply", next(iter(settings)), next(iter(settings.values())), "given with a method's name"
            )
        return _recommended(target)
    items = [request] if isinstance(request, str | Config | Mapping) else list(request)
    if not items:
        raise UnknownMethod("", registry.methods())
    if settings and (len(items) != 1 or not isinstance(items[0], str)):
        raise InvalidSetting(
            "apply", next(iter(settings)), next(iter(settings.values())), "given for a single named method; "
            "for several pass {'name': {...}, ...}",
        )  # fmt: skip
    out: dict[str, PerModel] = {}
    for item in items:
        for name, per_model in _read(target, item, revision, settings):
            if name in out:
                raise Conflict(f"{name!r} was asked for twice in one apply().")
            out[name] = per_model
    return out


def _read(target: Target, item: Any, revision: str | None, settings: dict[str, Any]) -> list[tuple[str, PerModel]]:
    if isinstance(item, Config):
        wanted = Wanted(item.METHOD, item, "settings given by the caller")
        return [(item.METHOD, {m.name: wanted for m in target.models})]
    if isinstance(item, Mapping):
        return [(name, _named(target, name, dict(values or {}))) for name, values in item.items()]
    if not isinstance(item, str):
        raise NotApplicable(
            f"A method is given by name, as a Config, as {{name: settings}}, or as a list of these; got "
            f"{type(item).__name__}."
        )
    shipped = families.shipped_presets()
    if preset.is_reference(item):
        loaded = preset.load(item, revision)
    elif item in shipped and item not in registry.methods():
        loaded = shipped[item]
    else:
        if revision is not None:
            raise InvalidSetting("apply", "revision", revision, "given with a Hub preset 'owner/name'")
        registry.get(item, also_known=tuple(shipped))
        return [(item, _named(target, item, settings))]
    if settings:
        raise InvalidSetting(
            f"preset {item}", next(iter(settings)), next(iter(settings.values())),
            "absent: a preset brings its own settings; copy it and change the copy, or name the method",
        )  # fmt: skip
    reasons = {m.name: loaded.why_not(m) for m in target.models}
    suited = [m for m in target.models if reasons[m.name] is None]
    if not suited:
        raise NotApplicable(
            f"Preset {item} is not meant for {target.description}: "
            + "; ".join(f"{n}: {r}" for n, r in reasons.items())
        )
    return [(w.method, {m.name: w for m in suited}) for w in loaded.wanted]


def _named(target: Target, name: str, settings: dict[str, Any]) -> PerModel:
    """A method by name: the settings the configs have for each model, changed by the caller's."""
    cls = registry.get(name)
    given = {key: settings[key] for key in cls.inputs if key in settings}
    settings = {key: value for key, value in settings.items() if key not in given}
    out = {}
    for model in target.models:
        known = families.settings_for(model, name)
        if known is None:
            origin = (
                "settings given by the caller" if settings else "the method's defaults; none are known for this model"
            )
            out[model.name] = Wanted(name, cls.Config.build(settings), origin, given)
        else:
            changed = f", changed by the caller: {', '.join(settings)}" if settings else ""
            out[model.name] = Wanted(name, known.config.replace(**settings), known.origin + changed, given)
    return out


def _hand_over(wanted: dict[str, PerModel], given: dict[str, Any]) -> dict[str, PerModel]:
    """Each method with those of the caller's inputs that it takes; refuses one that nobody takes."""
    takers = {name: registry.get(next(iter(per_model.values())).method).inputs for name, per_model in wanted.items()}
    for key, value in given.items():
        if not any(key in inputs for inputs in takers.values()):
            raise InvalidSetting(
                ", ".join(wanted), key, type(value).__name__, "absent: no method asked for takes it"
            )  # fmt: skip
    return {
        name: {
            model: replace(w, given={**{key: given[key] for key in takers[name] if key in given}, **w.given})
            for model, w in per_model.items()
        }
        for name, per_model in wanted.items()
    }


def _recommended(target: Target) -> dict[str, PerModel]:
    out: dict[str, PerModel] = {}
    for model in target.models:
        for wanted in families.recommended(model):
            out.setdefault(wanted.method, {})[model.name] = wanted
    if not out:
        classes = ", ".join(m.class_name for m in target.models)
        raise NotApplicable(
            f"No shipped config recommends a method for {target.description} ({classes}). Name a method yourself; "
            "hf_accel.explain(...) lists those that apply."
        )
    return out


def _fitting(target: Target, per_model: PerModel, asked: Iterable[str]) -> tuple[list[tuple[Model, Wanted]], list[str]]:
    fits, reasons = [], []
    for model in target.models:
        wanted = per_model.get(model.name)
        if wanted is None:
            continue
        # A method that stands there already does not stand in its own way: it will be replaced.
        cls = registry.get(wanted.method)
        standing = any(i.method.name == wanted.method for i in _marks(model.module))
        reason = None if standing else cls.why_not(model)
        # What it stands on comes in the same request: asked again when that is there, see _put.
        if reason is None or _taken_by_other(model, cls) or cls.stands_on.intersection(asked):
            fits.append((model, wanted))
        else:
            reasons.append(f"{model.name}: {reason}")
    return fits, reasons


# -- conflicts -----------------------------------------------------------------------------------------------------


def wanted_types(per_models: Iterable[PerModel]) -> list[type[Method]]:
    """The methods in a request, in order."""
    return [registry.get(next(iter(per_model.values())).method) for per_model in per_models]


def _check_each_other(types: list[type[Method]]) -> None:
    for i, first in enumerate(types):
        for second in types[i + 1 :]:
            if (reason := conflict(first, second)) is not None:
                raise Conflict(f"{reason}. Apply one of them.")


def _owners(model: Model) -> list[tuple[Party, str]]:
    """What stands on a model, ours and foreign, each with how to take it off."""
    ours: list[tuple[Party, str]] = [(type(i.method), "hf_accel.revert(...)") for i in _marks(model.module)]
    return ours + [(entry, entry.how_to_remove(model.module, model.name)) for entry in standing(model.module)]


def _refusal(model: Model, cls: type[Method]) -> str | None:
    """Why a method cannot join what stands on a model, and what to do; None if it can."""
    if not takes(cls, model.module):
        return None
    for owner, off in _owners(model):
        if (reason := conflict(cls, owner)) is not None:
            return f"{reason}; {owner.name} is on {model.name} already. Take it off first: {off}."
    return None


def _taken_by_other(model: Model, cls: type[Method]) -> bool:
    return _refusal(model, cls) is not None


def _why_not_now(model: Model, cls: type[Method]) -> str | None:
    """Why a method does not apply to a model with what stands on it; None if it does, or would replace itself."""
    refusal = _refusal(model, cls)
    if refusal is not None:
        return refusal.rstrip(".")
    if any(cls is type(i.method) for i in _marks(model.module)):
        return None
    return cls.why_not(model)


def _check_present(plan: list[tuple[Model, Wanted]]) -> None:
    for model, wanted in plan:
        if (refusal := _refusal(model, registry.get(wanted.method))) is not None:
            raise Conflict(refusal)


# -- change and undo -----------------------------------------------------------------------------------------------


def installed(module: torch.nn.Module) -> tuple[Installation, ...]:
    """What stands on a model (not a pipeline), in the order of application."""
    return tuple(_marks(module))


def _marks(module: torch.nn.Module) -> list[Installation]:
    return module.__dict__.get(MARK, [])


def _install(target: Target, plan: list[tuple[Model, Wanted]]) -> list[tuple[Model, Installation]]:
    replaced = [
        (model, old) for model, wanted in plan for old in _marks(model.module) if old.method.name == wanted.method
    ]
    # Put back as they are, not made anew, if what replaces them fails: some took hours, or were trained since.
    standing = [(model, _marks(model.module), [*_marks(model.module)]) for model, _ in replaced]
    undone = _undo(replaced)
    # One clock per method, shared by the models of a pipeline: every installation accounts for every forward itself.
    clocks = {wanted.method: Clock(target.pipeline) for _, wanted in plan}
    former = {(model.name, old.method.name): old.method for model, old in replaced}
    done: list[tuple[Model, Installation]] = []
    try:
        for model, wanted in plan:
            earlier = former.get((model.name, wanted.method))
            done.append((model, _put(model, wanted, clocks[wanted.method], earlier)))
    except BaseException:
        _undo(done)
        for (_, old), changes in zip(replaced, undone, strict=True):
            old.ledger.redo(changes)
        for model, marks, before in standing:
            marks[:] = before
            model.module.__dict__[MARK] = marks
        raise
    return done


def _put(model: Model, wanted: Wanted, clock: Clock, former: Method | None = None) -> Installation:
    config = wanted.config
    method = registry.get(config.METHOD)(config)
    method.given = Given(wanted.given)
    if former is not None:
        method.take_over(former)
    settings = config.to_dict()["settings"]
    report = MethodReport(method.name, settings, model.name, model.class_name, wanted.origin)
    installation = Installation(method, Ledger(), report)
    if method.stands_on and former is None and (reason := method.why_not(model)) is not None:
        raise NotApplicable(f"{method.name} on {model.name} ({model.class_name}): {reason}.")
    try:
        installation.handle = method.install(model, installation.ledger, report, clock)
    except BaseException:
        installation.ledger.undo()
        raise
    report.notes += [f"{entry.name} on the model: {entry.note}" for entry in standing(model.module) if entry.note]
    model.module.__dict__.setdefault(MARK, []).append(installation)
    return installation


def _undo(installed: list[tuple[Model, Installation]]) -> list[list[Change]]:
    """Undo in reverse order, all or nothing. Returns what was undone of each."""
    reasons = []
    for place, (model, installation) in enumerate(installed):
        try:
            installation.ledger.check([later.ledger for _, later in installed[place + 1 :]])
        except RevertRefused as refused:
            reasons.append(f"{installation.method.name} on {model.name}: {refused}")
    if reasons:
        raise RevertRefused(" ".join(reasons))
    undone = []
    for model, installation in reversed(installed):
        undone.append(installation.ledger.undo())
        marks = _marks(model.module)
        marks[:] = [other for other in marks if other is not installation]
        if not marks:
            model.module.__dict__.pop(MARK, None)
    return undone[::-1]


__all__ = ["Applied", "Explanation", "HFAccelError", "Pair", "Verdict", "apply", "explain", "methods", "revert"]
