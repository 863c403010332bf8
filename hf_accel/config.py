"""Settings of a method: frozen, checked, versioned, round-tripping through JSON and YAML."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from hf_accel.errors import InvalidSetting, PresetError


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] | None = None,
    share: bool = False,
) -> Any:
    """A field of a :class:`Config` with its range.

    Args:
        default: the value if the user gives none.
        help: one sentence; shown in docs and error messages.
        ge, gt, le: bounds of a number.
        choices: the only values allowed.
        share: the field is a count (``int >= 0``) or a fraction (``float`` in 0..1), like ``dense_steps``.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "choices": choices, "share": share, "help": help}
    return dataclasses.field(default=default, metadata=rules)


@dataclass(frozen=True)
class Config:
    """Base of every method's settings. Subclasses declare fields with :func:`setting`.

    ``METHOD`` names the method in error messages and files; ``VERSION`` rises when a field changes meaning.
    A field annotated as a tuple takes a list, which is how YAML and JSON have tuples, and one annotated as a float a
    whole number; both also inside of other types (:func:`as_meant`).

    huggingface_hub's ``strict`` decorator cannot be used here: it checks in ``__setattr__``, which the
    constructor of a *frozen* dataclass bypasses. Its type checker is used directly instead.
    """

    METHOD: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        cls: Any = type(self)
        expected = _types_of(cls)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            value = self._checked(field, expected[field.name], given)
            if value is not given:
                object.__setattr__(self, field.name, value)

    def _checked(self, field: dataclasses.Field, expected: Any, given: Any) -> Any:
        """The value as its annotation means it.

        Raises:
            InvalidSetting: it is of another type or out of range. Shows what was given.
        """
        value = as_meant(given, expected)
        ok = _fits(value, expected)
        rules = field.metadata
        if ok and isinstance(value, int | float) and not isinstance(value, bool):
            ok = math.isfinite(value)
            ok &= rules.get("ge") is None or value >= rules["ge"]
            ok &= rules.get("gt") is None or value > rules["gt"]
            ok &= rules.get("le") is None or value <= rules["le"]
            if rules.get("share"):
                ok &= value >= 0 and (isinstance(value, int) or value <= 1)
        if rules.get("choices") is not None:
            ok &= value in rules["choices"]
        if not ok:
            raise InvalidSetting(self.METHOD, field.name, given, describe_allowed(field, expected))
        return value

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """From keywords; an unknown name is an :class:`InvalidSetting` that lists the known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise InvalidSetting(cls.METHOD, name, settings[name], f"one of {', '.join(known)}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """``{"method", "version", "settings"}``: what goes into a preset."""
        return {"method": self.METHOD, "version": self.VERSION, "settings": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`. Refuses unknown keys and settings written by a newer version."""
        unknown = set(data) - {"method", "version", "settings"}
        if unknown:
            raise PresetError(f"{cls.METHOD}: unknown key {sorted(unknown)[0]!r}; expected method, version, settings.")
        if data.get("method", cls.METHOD) != cls.METHOD:
            raise PresetError(f"Settings of method {data['method']!r} were given to {cls.METHOD!r}.")
        version = data.get("version", cls.VERSION)
        if type(version) is not int or not 1 <= version <= cls.VERSION:
            raise PresetError(
                f"{cls.METHOD}: settings have version {version!r}; this hf_accel knows 1 to {cls.VERSION}. "
                "Upgrade hf_accel or export the preset again."
            )
        settings = data.get("settings", {})
        if settings is None:  # a YAML key without a value
            settings = {}
        if not isinstance(settings, Mapping):
            raise PresetError(f"{cls.METHOD}: 'settings' must be a mapping; got {type(settings).__name__}.")
        return cls.build(cls.upgraded(settings, version))

    @classmethod
    def upgraded(cls, settings: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        """Settings of an older ``version`` so that they mean today what they meant then. A class whose ``VERSION`` rose
        overrides this."""
        return settings

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like any other."""
        return type(self).build({**dataclasses.asdict(self), **changes})


def as_meant(value: Any, expected: Any) -> Any:
    """A value from YAML or JSON as its annotation means it: a list as a tuple where one is expected, a whole number as
    a float, likewise inside of tuples, lists, dictionaries and unions. What already is what is expected, or cannot
    become it, comes back as it is.
    """
    origin, parts = typing.get_origin(expected) or expected, typing.get_args(expected)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return value
    if origin in (typing.Union, types.UnionType):
        if _fits(value, expected):
            return value
        candidates = ((as_meant(value, part), part) for part in parts)
        return next((candidate for candidate, part in candidates if _fits(candidate, part)), value)
    new = value
    if origin is tuple and isinstance(value, list | tuple):
        of_each = parts if parts[1:] != (...,) else parts[:1] * len(value)
        if not parts:
            of_each = (Any,) * len(value)
        if len(of_each) != len(value):
            return value
        new = tuple(map(as_meant, value, of_each))
    elif origin is list and parts and isinstance(value, list):
        new = [as_meant(item, parts[0]) for item in value]
    elif origin is dict and parts and isinstance(value, dict):
        new = {as_meant(key, parts[0]): as_meant(item, parts[1]) for key, item in value.items()}
    return value if type(new) is type(value) and _same_items(new, value) else new


def _same_items(new: Any, old: Any) -> bool:
    if isinstance(old, dict):
        new, old = [*new, *new.values()], [*old, *old.values()]
    return new is old or (isinstance(old, list | tuple) and all(a is b for a, b in zip(new, old, strict=True)))


def _fits(value: Any, expected: Any) -> bool:
    # Here, because it loads an HTTP client, which whoever only lists the methods can do without.
    from huggingface_hub.dataclasses import type_validator

    try:
        type_validator("", value, expected)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _types_of(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe_allowed(field: dataclasses.Field, expected: Any) -> str:
    """The range of a setting in words, as errors and docs show it."""
    rules = field.metadata
    if rules.get("choices") is not None:
        return "one of " + ", ".join(map(repr, rules["choices"]))
    if rules.get("share"):
        return "a count (int >= 0) or a fraction (float in 0..1)"
    name = getattr(expected, "__name__", str(expected))
    if name == "Optional" or not isinstance(expected, type):
        name = str(expected)
    bounds = [
        f"{sign} {rules[key]}" for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<=")) if rules.get(key) is not None
    ]
    return " ".join([name, " and ".join(bounds)]).strip()
