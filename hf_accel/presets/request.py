"""From what the caller of ``apply`` asked for to methods with settings for each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hf_accel import registry
from hf_accel.base import Method
from hf_accel.config import Config
from hf_accel.errors import (
    Conflict,
    InvalidSetting,
    NotApplicable,
    UnknownMethod,
)
from hf_accel.hosts.target import Target
from hf_accel.presets import families, loading
from hf_accel.presets.preset import Wanted

Request = str | Config | Mapping[str, Mapping[str, Any]] | Iterable[Any] | None
PerModel = dict[str, Wanted]  # component name -> what is wanted on it


def wanted_by(target: Target, request: Request, revision: str | None, settings: dict[str, Any]) -> dict[str, PerModel]:
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
    if loading.is_reference(item):
        loaded = loading.load(item, revision)
    elif not registry.has(item) and item in families.shipped_presets():
        loaded = families.shipped_presets()[item]
    else:
        if revision is not None:
            raise InvalidSetting("apply", "revision", revision, "given with a Hub preset 'owner/name'")
        _check_is_method(item)
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


def _check_is_method(name: str) -> None:
    """
    Raises:
        UnknownMethod: it is none.
        Conflict: it is one of an outsider, and a shipped preset too.
    """
    if not registry.has(name):
        raise registry.unknown(name, also_known=tuple(families.shipped_presets()))
    where = registry.get(name).__module__
    # That none of ours has the name of a preset is tested, so that nobody waits for all presets to be read.
    if where.partition(".")[0] != "hf_accel" and name in families.shipped_presets():
        raise Conflict(
            f"{name!r} is a shipped preset and a method of {where}. For the method pass its Config; for the preset "
            f"copy it to a file and give the path. The author of {where} should rename the method."
        )


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


def hand_over(wanted: dict[str, PerModel], given: dict[str, Any]) -> dict[str, PerModel]:
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


def wanted_types(per_models: Iterable[PerModel]) -> list[type[Method]]:
    """The methods in a request, in order."""
    return [registry.get(next(iter(per_model.values())).method) for per_model in per_models]
