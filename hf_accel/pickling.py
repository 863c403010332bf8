"""Patched models in pickles: what goes to a file or to another process is the model without seams, and what to put on.

Seams are overridden forwards, private enum members and classes made at run time, none of which can be pickled. So a
patched model hands a twin to pickle: the same weights, not copied, with the methods taken off that only change how it
computes. They are put on again where it is unpickled, with the same settings and what they had learned. Methods on
linears and adapters have put modules of their own into the model, which are pickled as they are.

While a model of a class is patched, the class has an entry in ``copyreg.dispatch_table``, where pickle looks first. For
copies, and for models that are not patched, it does what would be done without.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import HFAccelError
from hf_accel.hosts.patching.registration import SharedRegistration
from hf_accel.ledger import MARK

# Sites whose methods are part of the weights.
_IN_THE_WEIGHTS = ("linear", "adapter")


@dataclass(frozen=True)
class PutOn:
    """One method as it is written into a pickle: its settings, where they are from, and the parameters that it added,
    by dotted name in the model."""

    config: Any
    origin: str
    learned: dict[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Hands:
    """What takes methods off and puts them on: ``take_off(model, installations)`` and ``put_on(model, plan)``, which
    returns the model. Functions of a module, so that another process finds them."""

    take_off: Callable[[torch.nn.Module, list[Any]], None]
    put_on: Callable[[torch.nn.Module, list[PutOn]], torch.nn.Module]


def picklable(cls: type, hands: Hands) -> SharedRegistration:
    """A lease for a ledger: while it is held, patched models of this very class can be pickled."""
    return SharedRegistration(("pickle", cls), functools.partial(_register, cls, hands))


def _register(cls: type, hands: Hands) -> Callable[[], None]:
    earlier = copyreg.dispatch_table.get(cls)
    copyreg.pickle(cls, functools.partial(_reduce, hands, earlier))

    def remove() -> None:
        if earlier is None:
            del copyreg.dispatch_table[cls]
        else:
            copyreg.dispatch_table[cls] = earlier

    return remove


def _reduce(hands: Hands, earlier: Any, model: torch.nn.Module) -> Any:
    asked_by = sys._getframe(1).f_globals.get("__name__")
    standing = [i for i in model.__dict__.get(MARK, ()) if not _is_in_the_weights(i)]
    if asked_by == "copy" or not standing:
        return model.__reduce_ex__(4) if earlier is None else earlier(model)
    if any(installation.carrier is not model for installation in standing):
        raise HFAccelError(
            f"This {type(model).__name__} is a shallow copy of a patched model, which cannot be pickled: it shares the "
            "original's seams. Pickle the original, or a deep copy, or take the methods off first."
        )
    twin = _twin(model)
    hands.take_off(twin, [i for i in twin.__dict__[MARK] if not _is_in_the_weights(i)])
    plan = [PutOn(i.method.config, i.report.origin, i.method.trainable_parameters()) for i in standing]
    return hands.put_on, (twin, plan)


def _is_in_the_weights(installation: Any) -> bool:
    return any(place.partition(":")[0] in _IN_THE_WEIGHTS for place in installation.method.facts.sites)


def _twin(model: torch.nn.Module) -> Any:
    """A copy of a model that shares every tensor with it."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in module.__dict__.values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
