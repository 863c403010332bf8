"""Every error a user of hf_accel can meet.

All derive from :class:`HFAccelError`, and each also derives from the built-in exception that a caller who
does not know this library would expect (``ValueError``, ``TypeError``, ``RuntimeError``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class HFAccelError(Exception):
    """Base class of all errors raised on purpose by hf_accel."""


class UnknownMethod(HFAccelError, KeyError):
    """A name that is neither a registered method nor a shipped preset; the message lists the nearest names.

    ``left_out`` says why a plug-in of that name cannot be used.
    """

    def __init__(self, name: str, known: Iterable[str], left_out: str = ""):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        told = f"{left_out} " if left_out else ""
        self.name, self.near = name, near
        super().__init__(
            f"{name!r} is neither a method nor a shipped preset. {told}{hint}Known: {', '.join(known) or 'none'}. "
            "A preset file needs a path with '/' or a '.yaml' ending; a Hub preset needs 'owner/name'."
        )

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class InvalidSetting(HFAccelError, ValueError):
    """A setting of the wrong type or outside its range. Names the field, the value and what is allowed."""

    def __init__(self, owner: str, field: str, value: Any, allowed: str):
        self.owner, self.field, self.value, self.allowed = owner, field, value, allowed
        super().__init__(f"{owner}: setting {field!r} must be {allowed}; got {value!r} ({type(value).__name__}).")


class NotApplicable(HFAccelError, TypeError):
    """The method cannot work on this model (wrong kind of object, no reader of its token grid, ...)."""


class NothingPatched(HFAccelError, RuntimeError):
    """The model was understood, but no module in it could be patched. Says what was looked for and found."""


class Conflict(HFAccelError, RuntimeError):
    """Two methods, or a method and the state of the model, exclude each other. Names both sides."""


class Interleaved(HFAccelError, RuntimeError):
    """Two requests take turns on one model and cannot be told apart. Says how to tell them apart."""


class RevertRefused(HFAccelError, RuntimeError):
    """Undo would destroy a change that somebody else made afterwards. Says which one, and the command to type next."""


class PresetError(HFAccelError, ValueError):
    """A preset or family file with an unknown key, a newer schema version, or a wrong value."""


class UnsupportedByKernel(HFAccelError, ValueError):
    """A kernel cannot do this shape, dtype or device; names what it can do."""


class WeightsMismatch(HFAccelError, ValueError):
    """Trained parameters of a method that do not belong to this model or these settings. Names both sides."""


class QuantizationError(HFAccelError, ValueError):
    """A weight, a grid, packed words or a Gram matrix that cannot be quantised, read or used. Names what came."""
