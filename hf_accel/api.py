"""apply, revert, explain, methods: what users call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from hf_accel import registry
from hf_accel.base import Method
from hf_accel.composition import Explanation, Pair, Party, Verdict, conflict, misplaced, pairs_among, takes, why_not
from hf_accel.errors import (
    Conflict,
    HFAccelError,
    NotApplicable,
    RevertRefused,
)
from hf_accel.hosts.foreign import Foreign, standing
from hf_accel.hosts.target import Model, Target, resolve
from hf_accel.installing import Installation, changed_since, install, marks_of, undo, undo_the_rest
from hf_accel.ledger import in_few_words
from hf_accel.presets import families
from hf_accel.presets.preset import Wanted
from hf_accel.presets.request import PerModel, Request, hand_over, wanted_by, wanted_types
from hf_accel.report import Report
from hf_accel.requests import PerRequest
from hf_accel.requests import Request as OneRequest


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

    def report(self, request: OneRequest | None = None) -> Report:
        """What was patched, what was skipped and why, which kernel runs, what it did so far: for all requests together,
        or for one (see :func:`request`)."""
        return Report([installation.report for _, installation in self._installed], request)

    def stats(self, request: OneRequest | None = None) -> dict[str, dict[str, Any]]:
        """Counters by component name (``"transformer"``, ...) and method: calls, fallbacks, density per head; for all
        requests together, or for one (see :func:`request`).

        Reads device tensors, so it waits for the device.
        """
        out: dict[str, dict[str, Any]] = {}
        for model, installation in self._installed:
            run = installation.report.of(request)
            out.setdefault(model.name, {})[installation.method.name] = run.to_dict() if run is not None else {}
        return out

    def time_attention(self, on: bool = True) -> None:
        """Measure the time inside patched attentions from now on (``attention_seconds`` in :meth:`stats`)."""
        for _, installation in self._installed:
            seams = installation.handle.all() if isinstance(installation.handle, PerRequest) else []
            for seam in seams:
                if hasattr(seam, "timed"):  # the seams of attention sites
                    seam.timed = on

    def revert(self, force: bool = False) -> tuple[str, ...]:
        """Undo these methods exactly. A second call does nothing.

        Args:
            force: see :func:`revert`.

        Returns:
            What was left as others made it, in words; empty without ``force``.

        Raises:
            RevertRefused: somebody changed the same attribute later, or as :func:`revert` says; nothing was undone.
        """
        return _take_off(self._standing(), force)

    def _standing(self) -> list[tuple[Model, Installation]]:
        return [(m, i) for m, i in self._installed if any(i is other for other in marks_of(m.carrier))]

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(i.method.name for _, i in self._installed))
        return f"<Applied {names} on {self._target.description}{'' if self.active else ', reverted'}>"


def apply(target: Any, method: Request = None, /, *, revision: str | None = None, **settings: Any) -> Applied:
    """Put one or more methods on a loaded model.

    Args:
        target: a diffusers pipeline, a diffusers or transformers model, or a ``PeftModel``; or a training, which is a
            transformers ``Trainer`` or one of ours: recipes stand on it, patches on the network it trains.
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
        NotApplicable: no model in ``target`` suits a method; a recipe without a training; a surgery, which
            :func:`~hf_accel.converting.convert` takes.
        NothingPatched: a suitable model in which nothing could be patched.
        Conflict: the methods exclude each other, or one already on the model.

    A failure leaves the model as it was. Applying a method that is already there replaces it.
    """
    found = resolve(target)
    # With a single method its own words count: another's input may be a setting of this one.
    single = isinstance(method, str) and registry.has(method)
    takers = [registry.get(str(method))] if single else list(registry.methods().values())
    inputs = {name for cls in takers for name in cls.inputs}
    given = {name: settings.pop(name) for name in list(settings) if name in inputs}
    wanted = hand_over(wanted_by(found, method, revision, settings), given)
    types = wanted_types(wanted.values())
    for cls in types:
        if cls.facts.kind == "surgery":
            raise NotApplicable(f"{cls.name} cannot be applied: {misplaced(cls, found.models[0])}.")
    _check_each_other(types)
    plan: list[tuple[Model, Wanted]] = []
    refusals: list[str] = []
    for name, per_model in wanted.items():
        fits, reasons = _fitting(found, per_model, wanted.keys())
        if not fits:
            refusals.append(f"{name}: " + "; ".join(reasons))
        plan += fits
    if refusals:
        fitting = [n for n, cls in registry.methods().items() if any(why_not(cls, m) is None for m in found.models)]
        instead = f"Methods that fit: {', '.join(fitting)}. " if fitting else ""
        raise NotApplicable(
            f"{found.description} suits no method asked for. {' | '.join(refusals)}. {instead}"
            "See hf_accel.explain(...)."
        )
    plan.sort(key=lambda item: registry.get(item[1].method).facts.order)
    _check_present(plan)
    return Applied(found, install(found, plan))


def revert(target: Any, force: bool = False) -> tuple[str, ...]:
    """Take every hf_accel method off a pipeline or model (also off a deep copy of a patched one), or off a training and
    its network.

    What somebody changed after hf_accel did is never overwritten. Where it is again what it was before ``apply``, and
    in modules that are not in the model any more, there is nothing to undo.

    Args:
        force: leave what others changed later as it is now, undo the rest, and warn of what was left. The model is free
            for other methods then. A ``forward`` that others wrapped around ours stays, and ours does in it what the
            class does. A training that is under way, full weights that were dropped, and another method of hf_accel
            that stands on top are refused all the same.

    Returns:
        What was left as others made it, in words, one entry for each; empty without ``force``.

    Raises:
        RevertRefused: somebody changed the same attribute later; or, also with ``force``, a training with a recipe is
            under way, or the full weights of linears were dropped. Nothing was undone.
        NotApplicable: ``target`` is no pipeline or model.
    """
    return _take_off([(model, i) for model in resolve(target).models for i in marks_of(model.carrier)], force)


def _take_off(standing: list[tuple[Model, Installation]], force: bool) -> tuple[str, ...]:
    if not force:
        undo(standing)
        return ()
    left = undo_the_rest(standing)
    if left:
        count = f"{len(left)} attributes left as they are" if len(left) > 1 else "1 attribute left as it is"
        names = (words.partition(" was ")[0] for words in left)
        warnings.warn(f"hf_accel: {count} now: {in_few_words(names, 240)}.", stacklevel=3)
    return left


def applied_methods(target: Any) -> list[tuple[str, str]]:
    """What stands on a pipeline, model or training: (component name, method), in order of installation.

    Raises:
        NotApplicable: ``target`` is no pipeline or model.
    """
    return [(model.name, i.method.name) for model in resolve(target).models for i in marks_of(model.carrier)]


def request(target: Any = None, *, name: str | None = None) -> OneRequest:
    """One caller's work on patched models: a picture, a text, a chat. To be entered around its forwards.

    Threads and asyncio tasks are told apart without it, and so are one pipeline call and the next. It is for loops of
    your own that take turns in one thread, or whose steps run in other threads each time::

        one, other = hf_accel.request(model), hf_accel.request(model)
        for step in range(steps):
            with one:
                ...   # a forward of the one
            with other:
                ...   # a forward of the other

    Args:
        target: the model or pipeline that is called, which is looked at only to see that it is one. Whatever patched
            model runs inside belongs to the request.
        name: for people, in reports.

    Returns:
        Request: a context manager that may be entered many times. What methods keep for it is dropped when nobody holds
        it any more; ``applied.stats(request)`` and ``applied.report(request)`` tell what they did for it.

    Raises:
        NotApplicable: ``target`` is no pipeline or model.
    """
    if target is not None:
        resolve(target)
    return OneRequest(name)


def methods() -> dict[str, dict[str, str]]:
    """The registry: name -> kind (patch, recipe or surgery), site (several: with commas), summary, paper."""
    return {
        name: {
            "kind": cls.facts.kind,
            "site": cls.facts.sites_in_words,
            "summary": cls.summary,
            "paper": cls.paper,
        }
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
        there = [type(i.method) for i in marks_of(model.carrier)]
        foreign = _foreign(model)
        out.standing += [(model.name, owner.name) for owner, _ in _owners(model)]
        takers = [
            cls
            for cls in registry.methods().values()
            if cls in there or why_not(cls, model) is None or _taken_by_other(model, cls)
        ]
        for pair in pairs_among(takers, foreign):
            pairs.setdefault((pair.first, pair.second), pair)
    out.pairs = list(pairs.values())
    return out


def _verdict(target: Target, name: str, cls: type[Method]) -> Verdict:
    if cls.facts.kind == "surgery":
        return _verdict_on_surgery(target, name, cls)
    places = [m for m in target.models if misplaced(cls, m) is None] or list(target.models)
    reasons = {m.name: _why_not_now(m, cls) for m in places}
    fitting = [m for m in places if reasons[m.name] is None]
    if not fitting:
        return Verdict(name, False, "; ".join(dict.fromkeys(r for r in reasons.values() if r)))
    known = next((w for m in fitting if (w := families.settings_for(m, name)) is not None), None)
    where = ", ".join(f"{m.name} ({m.class_name})" for m in fitting)
    origin = known.origin if known is not None else "the method's defaults; no tuned settings for this model"
    settings = known.config.to_dict()["settings"] if known is not None else {}
    again = any(cls is type(i.method) for m in fitting for i in marks_of(m.carrier))
    stands = "; it is there already and would be replaced" if again else ""
    return Verdict(name, True, f"on {where}; settings from {origin}{stands}", settings)


def _verdict_on_surgery(target: Target, name: str, cls: type[Method]) -> Verdict:
    """Not to be applied, and what it does say of the networks."""
    networks = [m for m in target.models if m.trainer is None]
    reasons = {m.name: cls.why_not(m) for m in networks}
    suited = [f"{m.name} ({m.class_name})" for m in networks if reasons[m.name] is None]
    if not suited:
        return Verdict(name, False, "; ".join(dict.fromkeys(r for r in reasons.values() if r)))
    words = f"{misplaced(cls, networks[0])}; it suits {', '.join(suited)}"
    return Verdict(name, False, words)


# -- what is wanted ------------------------------------------------------------------------------------------------


def _fitting(target: Target, per_model: PerModel, asked: Iterable[str]) -> tuple[list[tuple[Model, Wanted]], list[str]]:
    fits, reasons = [], []
    cls = registry.get(next(iter(per_model.values())).method)
    # On a training, patches look at its network and recipes at the training; if nothing is theirs, all say why.
    places = [model for model in target.models if misplaced(cls, model) is None] or list(target.models)
    for model in places:
        wanted = per_model.get(model.name)
        if wanted is None:
            continue
        # A method that stands there already does not stand in its own way: it will be replaced.
        standing = any(i.method.name == wanted.method for i in marks_of(model.carrier))
        reason = None if standing else why_not(cls, model)
        # What it stands on comes in the same request: asked again when that is there, see _put.
        if reason is None or _taken_by_other(model, cls) or cls.stands_on.intersection(asked):
            fits.append((model, wanted))
        else:
            reasons.append(f"{model.name}: {reason}")
    return fits, reasons


# -- conflicts -----------------------------------------------------------------------------------------------------


def _check_each_other(types: list[type[Method]]) -> None:
    for i, first in enumerate(types):
        for second in types[i + 1 :]:
            if (reason := conflict(first, second)) is not None:
                raise Conflict(f"{reason}. Apply one of them.")


def _owners(model: Model) -> list[tuple[Party, Callable[[], str]]]:
    """What stands on a model, ours and foreign, each with how to take it off."""
    ours: list[tuple[Party, Callable[[], str]]] = [
        (type(i.method), functools.partial(_how_to_revert, model, i)) for i in marks_of(model.carrier)
    ]
    return ours + [
        (entry, functools.partial(entry.how_to_remove, model.module, model.name)) for entry in _foreign(model)
    ]


def _foreign(model: Model) -> list[Foreign]:
    """What others put on a network; what they put on a training is not known by name."""
    return standing(model.module) if model.trainer is None else []


def _refusal(model: Model, cls: type[Method]) -> str | None:
    """Why a method cannot join what stands on a model, and what to do; None if it can."""
    if misplaced(cls, model) is not None or not takes(cls, model.module):
        return None
    for owner, off in _owners(model):
        if (reason := conflict(cls, owner)) is not None:
            return f"{reason}; {owner.name} is on {model.name} already. Take it off first: {off()}."
    return None


def _how_to_revert(model: Model, installation: Installation) -> str:
    try:
        blocked = changed_since([(model, installation)])
    except RevertRefused:
        blocked = []  # revert() tells what must come first
    return "hf_accel.revert(model, force=True)" if blocked else "hf_accel.revert(...)"


def _taken_by_other(model: Model, cls: type[Method]) -> bool:
    return _refusal(model, cls) is not None


def _why_not_now(model: Model, cls: type[Method]) -> str | None:
    """Why a method does not apply to a model with what stands on it; None if it does, or would replace itself."""
    refusal = _refusal(model, cls)
    if refusal is not None:
        return refusal.rstrip(".")
    if any(cls is type(i.method) for i in marks_of(model.carrier)):
        return None
    return why_not(cls, model)


def _check_present(plan: list[tuple[Model, Wanted]]) -> None:
    for model, wanted in plan:
        if (refusal := _refusal(model, registry.get(wanted.method))) is not None:
            raise Conflict(refusal)


# -- change and undo -----------------------------------------------------------------------------------------------


__all__ = [
    "Applied",
    "Explanation",
    "HFAccelError",
    "Pair",
    "Verdict",
    "apply",
    "explain",
    "methods",
    "request",
    "revert",
]
