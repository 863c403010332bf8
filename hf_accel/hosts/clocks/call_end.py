"""Hearing that a pipeline call is over.

Pipelines call ``_reset_stateful_cache()`` at their end on every component that has it. One instance override of that
name stands on a model, however many methods listen, so that they can be taken off in any order.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from hf_accel.requests import PerRequest

NAME = "_reset_stateful_cache"
_LISTENERS = "_hf_accel_call_end"


class CallEnd:
    """A lease for a ledger: the listener of a request is told of the end of its pipeline calls while it is held.

    Not called by diffusers when a pipeline raises, nor by modular pipelines, so listeners need other signs too.
    """

    def __init__(self, module: torch.nn.Module, listener: PerRequest[Any]):
        self.module, self.listener = module, listener
        listeners = module.__dict__.get(_LISTENERS)
        if listeners is None:
            listeners = module.__dict__[_LISTENERS] = []
            module.__dict__[NAME] = types.MethodType(_finish, module)
        listeners.append(listener)

    @property
    def release(self) -> Callable[[], None]:
        return self._release

    def renew(self) -> CallEnd:
        return CallEnd(self.module, self.listener)

    def _release(self) -> None:
        listeners = self.module.__dict__[_LISTENERS]
        listeners[:] = [other for other in listeners if other is not self.listener]
        if not listeners:
            del self.module.__dict__[_LISTENERS], self.module.__dict__[NAME]


def _finish(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    for listener in self.__dict__[_LISTENERS]:
        listener.now().finish()
    native = getattr(type(self), NAME, None)
    if native is not None:
        native(self, *args, **kwargs)
