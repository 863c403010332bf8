"""Names to methods. A file in ``hf_accel/patches/`` is found by itself; other packages use an entry point.

Outside packages declare, in their ``pyproject.toml``::

    [project.entry-points."hf_accel.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TypeVar

from hf_accel.base import Method
from hf_accel.errors import HFAccelError, UnknownMethod

ENTRY_POINT_GROUP = "hf_accel.methods"
M = TypeVar("M", bound=type[Method])

_METHODS: dict[str, type[Method]] = {}
_loaded: list[bool] = []


def register(cls: M) -> M:
    """Class decorator: add a method under ``cls.name``.

    Raises:
        HFAccelError: the name is taken by another class, a declaration is missing, or an input is called as a setting.
    """
    for attribute in ("name", "paper", "summary", "facts", "Config"):
        if not hasattr(cls, attribute):
            raise HFAccelError(f"Method {cls.__name__} declares no {attribute!r}.")
    if both := {field.name for field in dataclasses.fields(cls.Config)}.intersection(cls.inputs):
        raise HFAccelError(f"Method {cls.__name__}: {', '.join(sorted(both))} can be a setting or an input, not both.")
    other = _METHODS.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise HFAccelError(
            f"The name {cls.name!r} is taken by {other.__module__}.{other.__qualname__}; rename "
            f"{cls.__module__}.{cls.__qualname__}."
        )
    _METHODS[cls.name] = cls
    return cls


def methods() -> dict[str, type[Method]]:
    """All methods by name: ours and those of installed packages."""
    if not _loaded:
        patches = importlib.import_module("hf_accel.patches")
        for module in pkgutil.iter_modules(patches.__path__):
            importlib.import_module(f"{patches.__name__}.{module.name}")
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            register(entry.load())
        _loaded.append(True)
    return dict(sorted(_METHODS.items()))


def get(name: str, also_known: tuple[str, ...] = ()) -> type[Method]:
    """The method of that name.

    Raises:
        UnknownMethod: with the nearest names among methods and ``also_known``.
    """
    known = methods()
    if name not in known:
        raise UnknownMethod(name, [*known, *also_known])
    return known[name]
