"""The single way to change a model: every change is written down, and undone in reverse.

A ledger belongs to one model. It holds plain references, no closures, so that ``copy.deepcopy(model)`` carries a
ledger that speaks of the copy, and the copy can be reverted on its own.
"""

from __future__ import annotations

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
    """One change of a model. ``blocked()`` tells in words why it cannot be undone now, or None."""

    def blocked(self) -> str | None: ...

    def undo(self) -> None: ...

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
        if current is self.new:
            return None
        found = "removed" if current is MISSING else f"replaced by a {type(current).__name__}"
        return f"{describe_attribute(self.target, self.name)} was {found} after hf_accel set it"

    def undo(self) -> None:
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

    def check(self, first: Sequence[Ledger] = ()) -> None:
        """Raise :class:`RevertRefused` if undo would destroy somebody else's later change.

        ``first`` are ledgers that are undone before this one: what they changed on top is no hindrance.
        """
        on_top = [change for ledger in first for change in ledger.changes if isinstance(change, AttributeChange)]
        reasons = [
            reason
            for change in self.changes
            if (reason := change.blocked()) and not any(other.restores(change) for other in on_top)
        ]
        if reasons:
            raise RevertRefused(
                f"Cannot undo: {'; '.join(reasons)}. Undo that later change first (or set the attribute back), "
                "then call revert() again. Nothing was changed."
            )

    def undo(self) -> list[Change]:
        """Undo everything in reverse order, or raise :class:`RevertRefused` and undo nothing.

        Returns:
            What was undone, for :meth:`redo`.
        """
        self.check()
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
