"""Patched models in pickles: what goes to a file or to another process is the model without seams, and what to put on.

Seams are overridden forwards, private entries in registries and classes made at run time, none of which can be pickled.
So a patched model hands a twin to pickle: the same weights, not copied, with the methods taken off that only change how
it computes. They are put on again where it is unpickled, with the same settings and what they had learned. Methods on
linears and adapters have put modules of their own into the model, which are pickled as they are.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.ledger import MARK

REDUCE = "__reduce_ex__"
# Sites whose methods are part of the weights.
_IN_THE_WEIGHTS = ("linear", "adapter")


@dataclass(frozen=True)
class PutOn:
    """One method as it is written into a pickle: its settings, where they are from, and what it had learned."""

    config: Any
    origin: str
    learned: dict[str, torch.Tensor]


class Reducer:
    """Stands as ``__reduce_ex__`` in the ``__dict__`` of a patched model, where pickle and copy look first.

    Args:
        model: the network.
        take_off: ``(twin, installations)``, takes these methods off.
        put_on: ``(model, plan)``, puts them on again and returns the model; found by its name in another process.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        take_off: Callable[[torch.nn.Module, list[Any]], None],
        put_on: Callable[[torch.nn.Module, list[PutOn]], torch.nn.Module],
    ):
        self._model = weakref.ref(model)  # or a model that is dropped would wait for the collection of cycles
        self.take_off, self.put_on = take_off, put_on

    @property
    def model(self) -> torch.nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this Reducer is gone")
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Reducer:
        return Reducer(memo.get(id(self.model), self.model), self.take_off, self.put_on)

    def __reduce__(self) -> Any:
        return Reducer, (self.model, self.take_off, self.put_on)

    def __call__(self, protocol: Any) -> Any:
        asked_by = sys._getframe(1).f_globals.get("__name__")
        standing = [i for i in self.model.__dict__.get(MARK, ()) if not _is_in_the_weights(i)]
        if asked_by == "copy" or not standing:
            return object.__reduce_ex__(self.model, protocol)
        twin = _twin(self.model)
        self.take_off(twin, [i for i in twin.__dict__[MARK] if not _is_in_the_weights(i)])
        plan = [
            PutOn(i.method.config, i.report.origin, {n: p.detach() for n, p in i.method.trainable_parameters().items()})
            for i in standing
        ]
        return self.put_on, (twin, plan)


def _is_in_the_weights(installation: Any) -> bool:
    return any(place.partition(":")[0] in _IN_THE_WEIGHTS for place in installation.method.facts.sites)


def _twin(model: torch.nn.Module) -> Any:
    """A copy of a model that shares every tensor with it."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
