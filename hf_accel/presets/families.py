"""What ``configs/`` knows: for each model family its variants, and for each variant the settings of methods.

The format is described in ``docs/configs.md``. A family costs one YAML file; nothing here names a model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import hf_accel
from hf_accel.errors import PresetError
from hf_accel.hosts.target import Model
from hf_accel.presets.files import Node, read, read_match, read_method
from hf_accel.presets.preset import Match, Preset, Wanted

Status = Literal["published", "measured", "untuned"]
STATUSES: tuple[Status, ...] = ("published", "measured", "untuned")


@dataclass(frozen=True)
class Settings:
    """A method's settings for one variant.

    Attributes:
        method: its name.
        status: ``"published"`` if a paper or its code gives them for this very model, ``"measured"`` if we chose them
            among others by figures in ``benchmarks/results``, else ``"untuned"``.
        reason: where they come from.
    """

    method: str
    status: Status
    reason: str
    entries: Mapping[str, Node] = field(repr=False, compare=False)
    origin: str = field(repr=False, compare=False)

    @functools.cached_property
    def wanted(self) -> Wanted:
        """Method and settings, checked by its own Config when they are asked for: whoever puts one method on a model
        need not import all that the family has settings for.

        Raises:
            PresetError, InvalidSetting, UnknownMethod: with file and key named.
        """
        return read_method(self.entries, self.origin)


@dataclass(frozen=True)
class Variant:
    """A checkpoint of a family in one use.

    Attributes:
        name: also the name of a shipped preset with its first method.
        family: name of the family's file.
        match: how the model is recognised.
        meant_for: the use that the settings suit: resolution (height x width), frames, tokens, steps, guidance.
        methods: the first is the one ``apply(pipe)`` takes.
    """

    name: str
    family: str
    match: Match
    meant_for: Mapping[str, str | int | float]
    methods: tuple[Settings, ...]

    @property
    def specificity(self) -> tuple[bool, int]:
        """Sorts matching variants: a matched source weighs more than any number of configuration fields."""
        return bool(self.match.source), len(self.match.config)


def recommend(model: Model) -> Variant | None:
    """The variant that describes this model most closely; of equals, the first in its file. None if none does."""
    return next(iter(_matching(model)), None)


def settings_for(model: Model, method: str) -> Wanted | None:
    """The settings of a method for this model, from the closest variant that has some; None if none has."""
    for variant in _matching(model):
        for settings in variant.methods:
            if settings.method == method:
                return settings.wanted
    return None


def recommended(model: Model) -> list[Wanted]:
    """What ``apply(pipe)`` puts on this model: the closest variant's first method, or nothing."""
    variant = recommend(model)
    return [variant.methods[0].wanted] if variant is not None else []


@functools.cache
def shipped_presets() -> Mapping[str, Preset]:
    """Name -> preset, one for each variant: its first method, for every model of that class and configuration.

    A preset that the user names is not held to the checkpoint's name: checkpoints that differ in nothing else can
    take each other's settings.
    """
    return {
        variant.name: Preset(
            name=variant.name,
            wanted=(variant.methods[0].wanted,),
            models=(replace(variant.match, source=""),),
            origin=variant.methods[0].wanted.origin,
            description=f"{variant.methods[0].status}: {variant.methods[0].reason}",
        )
        for variant in variants()
    }


def folder() -> Path:
    """Where the shipped files are: in an installed package, or at the root of a checkout.

    Raises:
        PresetError: neither is there.
    """
    package = Path(hf_accel.__file__).parent
    for place in (package / "configs", package.parent / "configs"):
        if place.is_dir():
            return place
    raise PresetError(f"No configs/ in {package} nor beside it. Install hf_accel anew, or from the whole checkout.")


@functools.cache
def variants(classes: frozenset[str] | None = None) -> tuple[Variant, ...]:
    """Variants of the shipped files, in the order of file names: all, or at least those of the models named.

    Raises:
        PresetError: a file breaks the format, or two variants share a name.
    """
    out: list[Variant] = []
    for file_name, text in _texts().items():
        # Reading all families takes longer than applying a method; a file that never says a class has none of it.
        if classes is None or any(name in text for name in classes):
            out += _variants_in(file_name)
    owner: dict[str, str] = {}
    for variant in out:
        where = f"configs/{variant.family}.yaml"
        if variant.name in owner:
            raise PresetError(f"{where}: the name {variant.name!r} is taken by a variant of {owner[variant.name]}.")
        owner[variant.name] = where
    return tuple(out)


@functools.cache
def _texts() -> Mapping[str, str]:
    """The shipped files: name -> text."""
    files = sorted((f for f in folder().iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name: file.read_text(encoding="utf-8") for file in files}


@functools.cache
def _variants_in(file_name: str) -> tuple[Variant, ...]:
    return tuple(parse(_texts()[file_name], file_name))


def parse(text: str, file_name: str) -> list[Variant]:
    """The variants in a family file.

    Raises:
        PresetError, InvalidSetting, UnknownMethod: with file and key named.
    """
    label = f"configs/{file_name}"
    root = read(text, label)
    entries = root.mapping(required=("hf_accel", "family", "variants"))
    family = entries["family"].name()
    if f"{family}.yaml" != file_name:
        entries["family"].fail(f"the file's own name, {file_name.removesuffix('.yaml')!r}")
    return [_read_variant(node, family) for node in entries["variants"].items()]


def _matching(model: Model) -> list[Variant]:
    """Variants that describe the model, closest first (the sort is stable: file order breaks ties)."""
    classes = frozenset(cls.__name__ for cls in type(model.module).__mro__) - {"object", "Module"}
    found = [variant for variant in variants(classes) if variant.match.why_not(model) is None]
    return sorted(found, key=lambda variant: variant.specificity, reverse=True)


def _read_variant(node: Node, family: str) -> Variant:
    entries = node.mapping(required=("name", "match", "methods"), optional=("meant_for",))
    name = entries["name"].name()
    methods = tuple(_read_settings(item, f"{node.file}: {name}") for item in entries["methods"].items())
    names = [settings.method for settings in methods]
    if len(set(names)) != len(names):
        raise PresetError(f"{node.file} at {entries['methods'].path!r}: a method stands there twice; keep one.")
    meant_for = _read_use(entries["meant_for"]) if "meant_for" in entries else {}
    return Variant(name, family, read_match(entries["match"]), meant_for, methods)


def _read_settings(node: Node, origin: str) -> Settings:
    entries = node.mapping(required=("method", "version", "status", "reason"), optional=("settings",))
    status = cast(Status, entries["status"].text(choices=STATUSES))
    return Settings(entries["method"].text(), status, entries["reason"].text(), entries, f"{origin} ({status})")


def _read_use(node: Node) -> dict[str, str | int | float]:
    entries = node.mapping(optional=("resolution", "frames", "tokens", "steps", "guidance"))
    out: dict[str, Any] = {}
    for key, entry in entries.items():
        if key == "resolution":
            out[key] = entry.text()
        elif key == "guidance":
            if not isinstance(entry.value, int | float) or isinstance(entry.value, bool):
                entry.fail("a number")
            out[key] = entry.value
        else:
            out[key] = entry.integer()
    return out
