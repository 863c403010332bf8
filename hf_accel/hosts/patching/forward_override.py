"""Another ``forward`` on one module, in place of its own and inside what offloading has put around that.

Overrides stack: each may call what stood before it (:func:`below`), and they come off in any order.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.ledger import MISSING, Ledger, describe_replacement, own_attribute

_STACK = "_hf_accel_forwards"  # the changes on a module, from the inside out
_PLACES = ("forward", "_old_forward")


def override_forward(ledger: Ledger, module: torch.nn.Module, forward: types.MethodType, level: int = 0) -> None:
    """Run ``forward`` in place of the module's own, inside hooks that accelerate has put around that.

    Overrides of a higher ``level`` stand outside of those of a lower one, whichever came first. After a forced undo
    somebody's wrapper may still call ``forward``: where its state is gone, it does what the class does.
    """
    change = ForwardChange(module, MISSING, forward, level)
    change.redo()
    ledger.record(change)


def below(module: torch.nn.Module, override: Callable) -> Callable:
    """The forward that runs under ``override``, which is the function of a bound method that was put on ``module``:
    another override of ours, another library's, or that of the class; bound."""
    for change in module.__dict__.get(_STACK, ()):
        if change.new.__func__ is override and change.old is not MISSING:
            return change.old
    return types.MethodType(type(module).forward, module)


def replaced_forward(module: Any) -> Any:
    """The forward that somebody else put on this very module, under all of ours; None if nobody did. Libraries leave
    the bound method of the class behind when they take theirs off; that is none."""
    stack = module.__dict__.get(_STACK, ())
    own = stack[0].old if stack else own_attribute(module, "forward")
    return None if _is_of_the_class(module, own) else own


def _is_of_the_class(module: Any, own: Any) -> bool:
    """Whether an instance's forward, or none, is that of its class."""
    return own is MISSING or getattr(own, "__func__", None) is type(module).forward


@dataclass
class ForwardChange:
    """``module.forward`` was overridden on the instance.

    accelerate's hooks (offloading) move whatever forward they find to ``_old_forward`` and back, and leave a bound
    method behind; the override stands in either place, and is looked for in both.
    """

    module: torch.nn.Module
    old: Any
    new: Any
    level: int = 0

    def _stack(self) -> list[ForwardChange]:
        return self.module.__dict__.get(_STACK, [])

    def _place(self) -> str | None:
        """Where this very override stands; None if another does, of ours or somebody else's."""
        return next((name for name in _PLACES if own_attribute(self.module, name) is self.new), None)

    def _is_as_before(self) -> bool:
        """Whether somebody put back the forward that was there before this override, or before one below it."""
        stack = self._stack()
        below = stack[: 1 + next((i for i, change in enumerate(stack) if change is self), -1)]
        current = own_attribute(self.module, "_old_forward" if "_old_forward" in self.module.__dict__ else "forward")
        return any(
            current is change.old or (change.old is MISSING and _is_of_the_class(self.module, current))
            for change in below
        )

    def blocked(self) -> str | None:
        stack = self._stack()
        if not stack or stack[-1] is not self or self._place() is not None or self._is_as_before():
            return None  # under another of ours it is not seen from outside
        return describe_replacement(self.module, "forward", own_attribute(self.module, "forward"))

    def undo(self) -> None:
        stack, place = self._stack(), self._place()
        level = next((i for i, change in enumerate(stack) if change is self), None)
        if level is not None:
            if level + 1 < len(stack):  # the one above calls what this one called
                stack[level + 1].old = self.old
            del stack[level]
            if not stack:
                del self.module.__dict__[_STACK]
        if place == "_old_forward":  # the hook around it calls this name
            old = self.old if self.old is not MISSING else types.MethodType(type(self.module).forward, self.module)
            self.module.__dict__[place] = old
        elif place is not None and self.old is MISSING:
            del self.module.__dict__[place]
        elif place is not None:
            self.module.__dict__[place] = self.old

    def redo(self) -> None:
        stack = self.module.__dict__.setdefault(_STACK, [])
        index = next((i for i, change in enumerate(stack) if change.level > self.level), len(stack))
        if index < len(stack):  # under one of a higher level
            self.old, stack[index].old = stack[index].old, self.new
        else:
            place = "_old_forward" if "_old_forward" in self.module.__dict__ else "forward"
            self.old = own_attribute(self.module, place)
            self.module.__dict__[place] = self.new
        stack.insert(index, self)
