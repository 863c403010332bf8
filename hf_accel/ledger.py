"""The single way to change a model: every change is written down, and undone in reverse.

A ledger belongs to one model. It holds plain references, no closures, so that ``copy.deepcopy(model)`` carries a
ledger that speaks of the copy, and the copy can be reverted on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.errors import Conflict, RevertRefused


class _Missing:
    """Marks "this attribute was not there". One object per process, also through copies and pickles."""

    def __copy__(self) -> _Missing:
        return self

    def __deepcopy__(self, memo: dict) -> _Missing:
        return self

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()

# Instance attribute of a patched model: a list of what is installed on it, each with its ``ledger``. So undo finds
# them, also on a deep copy.
MARK = "_hf_accel"


class Change(Protocol):
    """One change of a model."""

    def blocked(self) -> str | None:
        """What somebody else did to the same thing since, in words that begin with its name; None if nobody did, or if
        it is as it was before the change.

        Raises:
            RevertRefused: it cannot be undone for a reason of its own, which nobody may pass over.
        """
        ...

    def undo(self) -> None:
        """Bring back what was there before. What :meth:`blocked` speaks of stays as it is."""
        ...

    def redo(self) -> None:
        """Make the change, on a model that is as it was before it."""
        ...


def own_attribute(target: Any, name: str) -> Any:
    """The instance's own attribute, never the class's; MISSING if it has none."""
    if isinstance(target, torch.nn.Module):
        for store in ("_parameters", "_buffers", "_modules"):
            if name in target.__dict__.get(store, {}):
                return target.__dict__[store][name]
    return target.__dict__.get(name, MISSING)


def describe_attribute(target: Any, name: str) -> str:
    return f"{type(target).__name__}.{name}"


def describe_replacement(target: Any, name: str, found: Any) -> str:
    """What somebody made of an attribute: ``found``, or MISSING."""
    what = "removed" if found is MISSING else f"replaced by a {type(found).__name__}"
    return f"{describe_attribute(target, name)} was {what}"


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of an attribute are one. Texts and numbers have no identity that anybody could rely on."""
    return one is other or (type(one) is type(other) and isinstance(one, str | int | float) and one == other)


def in_few_words(causes: Iterable[str], room: int, each: int = 120) -> str:
    """Every cause once, with how often it came and the most frequent first, in about ``room`` characters. What finds no
    room is counted."""
    counted = Counter(shortened(cause, each) for cause in causes).most_common()
    shown: list[str] = []
    for cause, count in counted:
        words = f"{cause} ({count} x)" if count > 1 else cause
        if shown and len("; ".join([*shown, words])) > room:
            break
        shown.append(words)
    more = sum(count for _, count in counted[len(shown) :])
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def shortened(words: str, room: int) -> str:
    return words if len(words) <= room else words[: room - 3] + "..."


def refusal(causes: Iterable[str], what: str = "") -> RevertRefused:
    """The error that tells why ``what`` cannot be undone, in at most 400 characters whatever the model is."""
    name = f" {shortened(what, 80)}" if what else ""
    return RevertRefused(
        f"Cannot undo{name}: {in_few_words(causes, 120)} after hf_accel set it. Nothing was changed. Undo that change "
        "first, or leave it as it is and take off the rest: hf_accel.revert(model, force=True)"
    )


@dataclass
class AttributeChange:
    """``target.name`` was ``old`` (or absent) and became ``new``."""

    target: Any
    name: str
    old: Any
    new: Any

    def is_of(self, target: Any, name: str) -> bool:
        return self.target is target and self.name == name

    def restores(self, earlier: Change) -> bool:
        """Whether undoing this change brings back what ``earlier`` had set."""
        if not isinstance(earlier, AttributeChange) or not self.is_of(earlier.target, earlier.name):
            return False
        return self.old is earlier.new

    def blocked(self) -> str | None:
        current = own_attribute(self.target, self.name)
        if is_same(current, self.new) or is_same(current, self.old):
            return None
        return describe_replacement(self.target, self.name, current)

    def undo(self) -> None:
        if not is_same(own_attribute(self.target, self.name), self.new):
            return
        if self.old is MISSING:
            delattr(self.target, self.name)
        else:
            setattr(self.target, self.name, self.old)

    def redo(self) -> None:
        setattr(self.target, self.name, self.new)


@dataclass
class HookChange:
    """A hook object stands in one of a module's hook dictionaries (``_forward_pre_hooks``, ...)."""

    module: torch.nn.Module
    store: str
    hook: Any
    key: int = -1

    def redo(self) -> None:
        if self.store == "_forward_pre_hooks":
            handle = self.module.register_forward_pre_hook(self.hook, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(self.hook, with_kwargs=True, always_call=True)
        self.key = handle.id

    def blocked(self) -> str | None:
        return None  # hooks commute: one that is gone already needs no undo

    def undo(self) -> None:
        hooks = getattr(self.module, self.store)
        if hooks.get(self.key) is self.hook:
            del hooks[self.key]
            for flags in ("_with_kwargs", "_always_called"):
                getattr(self.module, self.store + flags, {}).pop(self.key, None)


class Lease(Protocol):
    """A registration in another library that is given back; see :meth:`Ledger.hold`."""

    @property
    def release(self) -> Callable[[], Any]: ...

    def renew(self) -> Lease:
        """The same registration once more, after it was given back."""
        ...


@dataclass
class LeaseChange:
    """A registration in another library, held while the change stands."""

    lease: Lease

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        self.lease.release()

    def redo(self) -> None:
        self.lease = self.lease.renew()


class Ledger:
    """Changes made to one model, in order."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """``setattr(target, name, value)`` on this instance only, written down."""
        earlier = next((c for c in self.changes if isinstance(c, AttributeChange) and c.is_of(target, name)), None)
        change = earlier or AttributeChange(target, name, own_attribute(target, name), value)
        setattr(target, name, value)
        change.new = value
        if earlier is None:
            self.changes.append(change)

    def record(self, change: Change) -> None:
        """Write down a change that was just made."""
        self.changes.append(change)

    def submodule(self, parent: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
        """Register ``module`` as ``parent.name``: in the state dict while it stands, gone after undo.

        Raises:
            Conflict: ``parent`` has something of that name.
        """
        if hasattr(parent, name):
            found, ours = type(getattr(parent, name)).__name__, type(module).__name__
            place = describe_attribute(parent, name)
            raise Conflict(f"{place} exists already, a {found}; a {ours} belongs there. Take it off.")
        self.set(parent, name, module)

    def pre_hook(self, module: torch.nn.Module, hook: Any) -> None:
        """Register a forward pre-hook ``hook(module, args, kwargs)``. ``hook`` must be an object, not a closure."""
        self.redo([HookChange(module, "_forward_pre_hooks", hook)])

    def post_hook(self, module: torch.nn.Module, hook: Any) -> None:
        """Register a forward hook ``hook(module, args, kwargs, output)`` that also runs after an exception."""
        self.redo([HookChange(module, "_forward_hooks", hook)])

    def hold(self, lease: Lease) -> None:
        """Keep a registration in another library until undo."""
        self.changes.append(LeaseChange(lease))

    def blocked(self, first: Sequence[Ledger] = ()) -> list[tuple[Change, str]]:
        """The changes that somebody else changed later, each with what they did.

        ``first`` are ledgers that are undone before this one: what they changed on top is no hindrance.

        Raises:
            RevertRefused: one of the changes cannot be undone for a reason of its own.
        """
        found = [(change, words) for change in self.changes if (words := change.blocked())]
        return [(change, words) for change, words in found if not any(ledger.restores(change) for ledger in first)]

    def restores(self, earlier: Change) -> bool:
        """Whether undoing this ledger brings back what ``earlier``, a change of another, had set."""
        return any(isinstance(change, AttributeChange) and change.restores(earlier) for change in self.changes)

    def undo(self, force: bool = False) -> list[Change]:
        """Undo everything in reverse order, or raise :class:`RevertRefused` and undo nothing.

        Args:
            force: leave what somebody else changed later as it is, and undo the rest.

        Returns:
            What was undone, for :meth:`redo`.
        """
        if not force and (found := self.blocked()):
            raise refusal(words for _, words in found)
        undone = []
        while self.changes:
            undone.append(self.changes.pop())
            undone[-1].undo()
        return undone[::-1]

    def redo(self, changes: Iterable[Change]) -> None:
        """Make changes and write them down; those that :meth:`undo` gave back, on the model as that left it."""
        for change in changes:
            change.redo()
            self.changes.append(change)

    def __len__(self) -> int:
        return len(self.changes)


def changes_on(model: torch.nn.Module) -> list[Change]:
    """Every change that is written down on a patched model, oldest first."""
    return [change for installed in model.__dict__.get(MARK, []) for change in installed.ledger.changes]
