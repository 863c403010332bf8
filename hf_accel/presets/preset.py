"""Presets: what to apply with which settings, as one YAML file, on disk or on the Hub.

The format is described in ``docs/configs.md``. Reading is strict: what is not understood is an error that names the
file and the key, because a setting that is dropped in silence is a measurement that nobody can repeat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_accel.config import Config
from hf_accel.hosts.target import Model


@dataclass(frozen=True)
class Wanted:
    """One method to apply: its name, its settings, and in words where they come from (for the report).

    ``given`` holds what the caller handed over beside settings (:attr:`hf_accel.method.Method.inputs`).
    """

    method: str
    config: Config
    origin: str
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """Which models something is meant for.

    Attributes:
        model_class: class name of the model, or of a class it derives from.
        config: configuration fields and the values they must have; null also matches an absent field.
        source: case-blind regular expression searched in the Hub id or folder the model was loaded from; checkpoints
            that share one configuration differ in nothing else. Empty: any.
    """

    model_class: str
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def why_not(self, model: Model) -> str | None:
        """What is different about this model, in words; None if it matches."""
        if self.model_class not in (cls.__name__ for cls in type(model.module).__mro__):
            return f"class is {model.class_name}, not {self.model_class}"
        config = model.config
        for name, expected in self.config.items():
            if plain(config.get(name)) != expected:
                return f"{name} is {config.get(name)!r}, not {expected!r}"
        if self.source and not re.search(self.source, model.source, re.IGNORECASE):
            return f"loaded from {model.source or 'an unknown place'!r}, which does not contain {self.source!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"class": self.model_class}
        if self.config:
            out["config"] = dict(self.config)
        if self.source:
            out["source"] = self.source
        return out


@dataclass(frozen=True)
class Preset:
    """What to apply with which settings.

    Attributes:
        name: of the preset.
        wanted: the methods, in the file's order.
        models: the models it is meant for; empty: no restriction.
        evidence: where it was measured and what came out, kept as it stands in the file.
        origin: where it was read, in words.
        requires: hf_accel versions it works with, e.g. ``">=0.1"``; empty: any that reads the file.
        description: one or two sentences for people.
    """

    name: str
    wanted: tuple[Wanted, ...]
    models: tuple[Match, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    requires: str = ""
    description: str = ""

    def why_not(self, model: Model) -> str | None:
        """Why the preset is not meant for this model, in words; None if it is."""
        reasons = [match.why_not(model) for match in self.models]
        if not reasons or None in reasons:
            return None
        return f"preset {self.name!r} is meant for other models: " + "; ".join(str(r) for r in reasons)


# -- the Hub -------------------------------------------------------------------------------------------------------


# -- reading, strictly ---------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tuples as lists, mappings as dicts, kinds of numbers and text as plain ones: as a file would have them."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    for kind in (str, float, int):  # NumPy's float64 is a float that YAML does not know
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value
