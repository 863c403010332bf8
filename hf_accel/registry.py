"""Names to methods. A file in ``hf_accel/patches/`` is found by itself; other packages use an entry point.

Outside packages declare, in their ``pyproject.toml``::

    [project.entry-points."hf_accel.methods"]
    my-method = "my_package.my_module:MyMethod"

One that cannot be imported, or whose declarations are refused, is left out with a warning that names its distribution;
everything else works.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import threading
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from hf_accel.base import Method
from hf_accel.declared import check
from hf_accel.errors import HFAccelError, UnknownMethod

ENTRY_POINT_GROUP = "hf_accel.methods"
M = TypeVar("M", bound=type[Method])

_METHODS: dict[str, type[Method]] = {}
_loaded: list[bool] = []
# Plug-ins that were left out: the name of the entry point -> what happened, in words.
_left_out: dict[str, str] = {}


class _Loading(threading.local):
    """Whether this thread is loading methods: a plug-in may ask for them while it is imported."""

    running = False


_LOADING = _Loading()
# Never held during an import: two threads would wait for each other, one for this lock, one for that of a module.
_NOTING = threading.Lock()


def register(cls: M) -> M:
    """Class decorator: add a method under ``cls.name``.

    Raises:
        HFAccelError: the name is taken by another class, or a declaration is missing, unknown or at odds with another.
    """
    check(cls)
    other = _METHODS.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise HFAccelError(
            f"The name {cls.name!r} is taken by {other.__module__}.{other.__qualname__}; rename "
            f"{cls.__module__}.{cls.__qualname__}."
        )
    _METHODS[cls.name] = cls
    return cls


def methods() -> dict[str, type[Method]]:
    """All methods by name: ours and those of installed packages.

    The first call imports them, each thread for itself until one is through: modules are imported once whoever asks,
    and Python's own locks on modules know when two threads wait for each other. A plug-in that asks while it is being
    imported gets what is there by then.
    """
    if not _loaded and not _LOADING.running:
        _LOADING.running = True
        try:
            _load()
        finally:
            _LOADING.running = False
    return dict(sorted(_METHODS.copy().items()))


def has(name: str) -> bool:
    """Whether there is a method of that name. Of ours, imports that one alone."""
    return _ours(name) or name in methods()


def get(name: str) -> type[Method]:
    """The method of that name. Of ours, imports that one alone: whoever puts one on a model need not wait for all.

    Raises:
        UnknownMethod: with the nearest names; of a plug-in that was left out, why.
    """
    if _ours(name):
        return _METHODS[name]
    known = methods()
    if name not in known:
        raise unknown(name)
    return known[name]


def unknown(name: str, also_known: Iterable[str] = ()) -> UnknownMethod:
    """What to raise of a name that is no method, with the nearest names among methods and ``also_known``."""
    alike = (words for broken, words in _left_out.items() if _plainly(broken) == _plainly(name))
    return UnknownMethod(name, [*methods(), *also_known], next(alike, ""))


def _ours(name: str) -> bool:
    """Whether a method is registered already or has a file of ours, which is imported."""
    stem = name.replace("-", "_")
    if name not in _METHODS and stem.isidentifier():
        module = f"hf_accel.patches.{stem}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return name in _METHODS


def _load() -> None:
    patches = importlib.import_module("hf_accel.patches")
    for module in pkgutil.iter_modules(patches.__path__):
        importlib.import_module(f"{patches.__name__}.{module.name}")
    if all([_add(entry) for entry in entry_points(group=ENTRY_POINT_GROUP)]):
        _loaded.append(True)


def _add(entry: EntryPoint) -> bool:
    """Register a plug-in, or leave it out with a warning. False if its import is under way and it is to be asked for
    again."""
    before = _METHODS.copy()
    try:
        register(entry.load())
    except Exception as error:  # noqa: BLE001 (whatever an outsider's code raises, everybody else's methods work)
        if _being_imported(entry.module):
            return False
        for name, cls in _METHODS.copy().items():
            # A module whose import failed is gone, but its decorators have run.
            if name not in before and cls.__module__ not in sys.modules:
                _METHODS.pop(name, None)
        _leave_out(entry, error)
    return True


def _being_imported(module: str) -> bool:
    """Whether a module, or a package around it, is half-way through its import, in this thread or in another."""
    parts = module.split(".")
    around = (sys.modules.get(".".join(parts[:depth])) for depth in range(1, len(parts) + 1))
    return any(getattr(getattr(one, "__spec__", None), "_initializing", False) for one in around)


def _leave_out(entry: EntryPoint, error: Exception) -> None:
    dist = entry.dist
    package = f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"
    words = (
        f"The plug-in {entry.name!r} = {entry.value!r} of {package} cannot be used: {type(error).__name__}: {error} "
        f"Mend, upgrade or uninstall {dist.name if dist is not None else 'it'}."
    )
    with _NOTING:
        told = _left_out.get(entry.name) == words
        _left_out[entry.name] = words
    if not told:
        warnings.warn(f"hf_accel: {words} All other methods work.", RuntimeWarning, stacklevel=2)


def _plainly(name: str) -> str:
    return name.lower().replace("_", "-")
