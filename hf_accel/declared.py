"""What a method declares, checked when it is registered: a slip there would show much later, and far from its cause."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.config import Config
from hf_accel.errors import HFAccelError
from hf_accel.facts import HOSTS, SITES, Facts, Kind, Medium, Need, place_known

# What presets and `apply` can tell from a path, a file and a repo on the Hub.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
FILE_ENDINGS = (".yaml", ".yml")
NAME_IN_WORDS = "letters, digits, '.', '_' and '-', begins with a letter or digit"


def check(cls: Any) -> None:
    """Refuse a method whose declarations are missing, unknown, or at odds with each other.

    Raises:
        HFAccelError: names the class, what it declares, and what is expected.
    """
    if not isinstance(cls, type):
        raise HFAccelError(f"A method is a class derived from hf_accel.method.Method; got {cls!r}, a {_kind(cls)}.")
    for attribute in ("name", "paper", "summary", "facts", "Config"):
        if not hasattr(cls, attribute):
            raise HFAccelError(f"Method {cls.__name__} declares no {attribute!r}.")
    if not issubclass(cls, Method):
        raise HFAccelError(
            f"Method {cls.__name__} is not derived from hf_accel.method.Method, nor from a base class of a site there."
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise HFAccelError(f"Method {cls.__name__} does not define {missing}.")
    _check_name(cls)
    _check_settings(cls)
    _check_facts(cls, {field.name for field in dataclasses.fields(cls.Config)})


def _check_name(cls: type[Method]) -> None:
    name: Any = cls.name
    if not isinstance(name, str) or not NAME_PATTERN.match(name) or name.endswith(FILE_ENDINGS):
        raise HFAccelError(
            f"Method {cls.__name__}: name must be a text of {NAME_IN_WORDS}, and ends like no file "
            f"({', '.join(FILE_ENDINGS)}); got {name!r}."
        )
    for attribute in ("paper", "summary"):
        text: Any = getattr(cls, attribute)
        if not isinstance(text, str) or not text.strip():
            raise HFAccelError(f"Method {name!r}: {attribute} must be a text of one line; got {text!r}.")


def _check_settings(cls: type[Method]) -> None:
    config: Any = cls.Config
    if not isinstance(config, type) or not issubclass(config, Config):
        raise HFAccelError(
            f"Method {cls.name!r}: Config must be a class derived from hf_accel.config.Config; got {config!r}."
        )
    if not dataclasses.is_dataclass(config) or not _is_frozen(config):
        raise HFAccelError(
            f"Method {cls.name!r}: {config.__name__} must be a frozen dataclass. Write @dataclass(frozen=True) over it."
        )
    if cls.name != config.METHOD:
        raise HFAccelError(
            f"Method {cls.name!r}: {config.__name__}.METHOD must be the method's name; got {config.METHOD!r}."
        )
    known = {field.name for field in dataclasses.fields(config)}
    for name, expected in inspect.get_annotations(config).items():
        if name not in known and "ClassVar" not in str(expected):
            raise HFAccelError(
                f"Method {cls.name!r}: {config.__name__}.{name} is annotated and no setting, since the class itself is "
                "no dataclass. Write @dataclass(frozen=True) over it."
            )
    inputs = _texts(cls, "inputs", cls.inputs)
    if both := known & inputs:
        raise HFAccelError(f"Method {cls.__name__}: {_listed(both)} can be a setting or an input, not both.")
    if unknown := _texts(cls, "trained_with", cls.trained_with) - known:
        raise HFAccelError(
            f"Method {cls.name!r}: trained_with names {_listed(unknown)}, which {config.__name__} has not; it has "
            f"{_listed(known)}."
        )
    _texts(cls, "stands_on", cls.stands_on)


def _check_facts(cls: type[Method], settings: set[str]) -> None:
    facts: Any = cls.facts
    if not isinstance(facts, Facts):
        raise HFAccelError(
            f"Method {cls.name!r}: facts must be a hf_accel.method.Facts; got {facts!r}, a {_kind(facts)}."
        )
    if not facts.sites:
        raise HFAccelError(f"Method {cls.name!r}: facts name no site. Give site= one of {', '.join(SITES)}.")
    if unknown := {place for place in _texts(cls, "facts.sites", facts.sites) if not place_known(place)}:
        raise HFAccelError(f"Method {cls.name!r}: unknown site {_listed(unknown)}; there are {_places()}.")
    families: Iterable[str] = ()
    if facts.families:
        # Here, because only a few methods name any, and the families read models.
        from hf_accel.hosts.block_families import FAMILIES

        families = [family.name for family in FAMILIES]
    for name, known in (
        ("media", typing.get_args(Medium)),
        ("hosts", HOSTS),
        ("needs", typing.get_args(Need)),
        ("families", families),
    ):
        if unknown := _texts(cls, f"facts.{name}", getattr(facts, name)).difference(known):
            raise HFAccelError(f"Method {cls.name!r}: facts.{name} has {_listed(unknown)}; there are {_listed(known)}.")
    if not facts.media:
        raise HFAccelError(
            f"Method {cls.name!r}: facts.media is empty; give some of {_listed(typing.get_args(Medium))}."
        )
    if facts.kind not in typing.get_args(Kind):
        raise HFAccelError(
            f"Method {cls.name!r}: facts.kind must be one of {', '.join(typing.get_args(Kind))}; got {facts.kind!r}."
        )
    dialled = set(facts.full_budget) | ({facts.budget} if facts.budget is not None else set())
    if unknown := {str(name) for name in dialled} - settings:
        raise HFAccelError(
            f"Method {cls.name!r}: facts.full_budget and facts.budget name {_listed(unknown)}, which "
            f"{cls.Config.__name__} has not; it has {_listed(settings)}."
        )
    if wrong := {repr(dtype) for dtype in facts.dtypes if not isinstance(dtype, torch.dtype)}:
        raise HFAccelError(
            f"Method {cls.name!r}: facts.dtypes must be of torch's, as torch.float16; got {_listed(wrong)}."
        )


def _texts(cls: type[Method], what: str, given: Any) -> set[str]:
    """A set of texts that a method declares; a single text would be taken for its letters."""
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(item, str) for item in given):
        raise HFAccelError(f"Method {cls.name!r}: {what} must be a collection of texts; got {given!r}.")
    return set(given)


def _is_frozen(config: Any) -> bool:
    return bool(config.__dataclass_params__.frozen)


def _places() -> str:
    """Sites with their slots, as ``Facts`` takes them."""
    names = [
        name
        for site in SITES.values()
        for name in (site.name, *(f"{site.name}: {s}" for s in (*site.slots, *site.shared)))
    ]
    return ", ".join(names)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _kind(value: Any) -> str:
    return type(value).__name__
