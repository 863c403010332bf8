"""Settings of a method: frozen, checked, versioned, round-tripping through JSON and YAML."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassFieldValidationError

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
    huggingface_hub's ``strict`` decorator cannot be used here: it checks in ``__setattr__``, which the
    constructor of a *frozen* dataclass bypasses. Its type checker is used directly instead.
    """

    METHOD: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        types = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self._check(field, types[field.name], value)
            if types[field.name] is float:
                object.__setattr__(self, field.name, float(value))

    def _check(self, field: dataclasses.Field, expected: Any, value: Any) -> None:
        allowed = describe_allowed(field, expected)
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            expected = int  # a whole number is a fine float
        try:
            type_validator(field.name, value, expected)
        except (TypeError, StrictDataclassFieldValidationError) as error:
            raise InvalidSetting(self.METHOD, field.name, value, allowed) from error
        rules = field.metadata
        ok = True
        if isinstance(value, int | float) and not isinstance(value, bool):
            ok = math.isfinite(value)
            ok &= rules.get("ge") is None or value >= rules["ge"]
            ok &= rules.get("gt") is None or value > rules["gt"]
            ok &= rules.get("le") is None or value <= rules["le"]
            if rules.get("share"):
                ok &= value >= 0 and (isinstance(value, int) or value <= 1)
        if rules.get("choices") is not None:
            ok &= value in rules["choices"]
        if not ok:
            raise InvalidSetting(self.METHOD, field.name, value, allowed)

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
        return cls.build(settings)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like any other."""
        return type(self).build({**dataclasses.asdict(self), **changes})


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
