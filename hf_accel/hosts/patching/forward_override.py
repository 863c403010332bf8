"""Another ``forward`` on one module, in place of its own and inside what offloading has put around that.

Overrides stack: each may call what stood before it (:func:`below`), and they come off in any order.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.ledger import MISSING, Ledger, describe_attribute, own_attribute

_STACK = "_hf_accel_forwards"  # the changes on a module, from the inside out
_PLACES = ("forward", "_old_forward")


def override_forward(ledger: Ledger, module: torch.nn.Module, forward: types.MethodType, level: int = 0) -> None:
    """Run ``forward`` in place of the module's own, inside hooks that accelerate has put around that.

    Overrides of a higher ``level`` stand outside of those of a lower one, whichever came first.
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
    return None if own is MISSING or getattr(own, "__func__", None) is type(module).forward else own


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
        """Where the outermost override of ours stands; None if somebody put another forward there."""
        stack = self._stack()
        if not any(change is self for change in stack):
            return None
        top = stack[-1].new
        return next((name for name in _PLACES if own_attribute(self.module, name) is top), None)

    def blocked(self) -> str | None:
        if self._place() is not None:
            return None
        found = own_attribute(self.module, "forward")
        what = "removed" if found is MISSING else f"replaced by a {type(found).__name__}"
        return f"{describe_attribute(self.module, 'forward')} was {what} after hf_accel set it"

    def undo(self) -> None:
        stack, place = self._stack(), self._place()
        level = next(i for i, change in enumerate(stack) if change is self)
        if level + 1 < len(stack):  # the one above calls what this one called
            stack[level + 1].old = self.old
        elif place == "_old_forward":  # the hook around it calls this name
            old = self.old if self.old is not MISSING else types.MethodType(type(self.module).forward, self.module)
            self.module.__dict__[place] = old
        elif self.old is MISSING:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.old
        del stack[level]
        if not stack:
            del self.module.__dict__[_STACK]

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
