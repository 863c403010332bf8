"""Another ``forward`` on one module, in place of its own and inside what offloading has put around that."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.ledger import MISSING, Ledger, describe_attribute, own_attribute


def override_forward(ledger: Ledger, module: torch.nn.Module, forward: types.MethodType) -> None:
    """Run ``forward`` in place of the module's own, inside hooks that accelerate has put around that."""
    change = ForwardChange(module, MISSING, forward)
    change.redo()
    ledger.record(change)


@dataclass
class ForwardChange:
    """``module.forward`` was overridden on the instance.

    accelerate's hooks (offloading) move whatever forward they find to ``_old_forward`` and back, and leave a bound
    method behind; the override stands in either place, and is looked for in both.
    """

    module: torch.nn.Module
    old: Any
    new: Any

    def _place(self) -> str | None:
        places = ("forward", "_old_forward")
        return next((name for name in places if own_attribute(self.module, name) is self.new), None)

    def blocked(self) -> str | None:
        if self._place() is not None:
            return None
        found = own_attribute(self.module, "forward")
        what = "removed" if found is MISSING else f"replaced by a {type(found).__name__}"
        return f"{describe_attribute(self.module, 'forward')} was {what} after hf_accel set it"

    def undo(self) -> None:
        place = self._place()
        if place == "_old_forward":  # the hook around it calls this name
            old = self.old if self.old is not MISSING else types.MethodType(type(self.module).forward, self.module)
            self.module.__dict__[place] = old
        elif self.old is MISSING:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.old

    def redo(self) -> None:
        place = "_old_forward" if "_old_forward" in self.module.__dict__ else "forward"
        self.old = own_attribute(self.module, place)
        self.module.__dict__[place] = self.new
