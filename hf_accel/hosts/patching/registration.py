"""Entries in registries of host libraries that several patched models share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

_HELD: dict[Any, tuple[int, Callable[[], None]]] = {}
_HELD_LOCK = threading.Lock()


class SharedRegistration:
    """An entry in a registry of diffusers that any number of patched models need: made by the first holder, removed
    with the last. A deep copy of a model holds it too; a model that is garbage-collected lets go.

    Args:
        key: what is shared.
        register: makes the entry and returns the function that removes it.
    """

    def __init__(self, key: Any, register: Callable[[], Callable[[], None]]):
        self.key, self.register = key, register
        with _HELD_LOCK:
            count, remove = _HELD[key] if key in _HELD else (0, register())
            _HELD[key] = (count + 1, remove)
        self.release = weakref.finalize(self, _let_go, key)

    def renew(self) -> SharedRegistration:
        return SharedRegistration(self.key, self.register)

    def __deepcopy__(self, memo: dict) -> SharedRegistration:
        return self.renew()


def _let_go(key: Any) -> None:
    with _HELD_LOCK:
        count, remove = _HELD.pop(key)
        _HELD[key] = (count - 1, remove)
        # A model may be collected while another is compiled, and dynamo guards on the place of what it read in a
        # registry. What is left over is removed with the next that goes, or taken by the next that comes.
        if torch._guards.CompileContext.current_compile_id() is None:
            for idle in [held for held, (holders, _) in _HELD.items() if not holders]:
                _HELD.pop(idle)[1]()


def replace_entries(key: str, *entries: tuple[dict[str, Any], Any]) -> Callable[[], None]:
    """Put ours under ``key`` into mappings of a host; returns what puts back what was there."""
    theirs = [(mapping, mapping.get(key)) for mapping, _ in entries]
    for mapping, ours in entries:
        mapping[key] = ours

    def put_back() -> None:
        for mapping, old in theirs:
            if old is None:
                del mapping[key]
            else:
                mapping[key] = old

    return put_back
