"""Methods that make a new model of an old one: the base class, and the check that the old one is as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.errors import HFAccelError, NotApplicable
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport


class Surgery(Method):
    """A method that returns a new model. One function: :meth:`convert`; facts have ``kind="surgery"``.

    It promises that full budget is dense (``facts.full_budget``: the new model computes what the old one does), and a
    report. There is nothing to undo: the old model is not touched, which is checked after every conversion.
    """

    @abstractmethod
    def convert(self, model: Model, report: MethodReport) -> torch.nn.Module:
        """The new network.

        Args:
            model: ``model.module`` is the old network. Not to be changed, and no tensor of it goes into the new one
                as it is: train one, and the other would change.
            report: ``patched`` takes what was exchanged, ``skipped`` what was left alone and why, ``notes`` the rest,
                ``run`` any statistics.

        Returns:
            torch.nn.Module: another object, which ``save_pretrained`` writes if the old one has that.
        """

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        """A surgery stands on no model.

        Raises:
            NotApplicable: always.
        """
        raise NotApplicable(f"{self.name} is a surgery: hf_accel.convert(model, {self.name!r}) gives back a new model.")


class Fingerprint:
    """What a network is now: its modules, what each holds, and every byte of its tensors."""

    def __init__(self, network: torch.nn.Module):
        self._facts = dict(_facts(network))

    def changes(self, network: torch.nn.Module) -> list[str]:
        """What is different about the network now, by dotted names; empty if it is as it was."""
        now = dict(_facts(network))
        return sorted(
            name for name in self._facts.keys() | now.keys() if self._facts.get(name, _NONE) != now.get(name, _NONE)
        )


_NONE = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _facts(network: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in network.named_modules():
        name = path or type(network).__name__
        own = {key: id(value) for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        yield name, (id(module), type(module), module.training, own, [list(getattr(module, h)) for h in _HOOKS])
    config: Any = getattr(network, "config", None)
    if config is not None:
        yield "config", repr(config)
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        yield f"{name} (values)", (id(tensor), tensor.requires_grad, tensor.shape, tensor.dtype, _checksum(tensor))


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of the bytes; two sums, the second by place, so that neither a changed nor a moved value goes unseen."""
    if tensor.is_meta:
        return ()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).reshape(-1)
    total, moved = 0, 0
    for number, piece in enumerate(data.split(1 << 22)):  # in pieces: int64 needs eight times the bytes
        wide = piece.to(torch.int64)
        places = torch.arange(1, len(wide) + 1, device=wide.device)
        total += int(wide.sum())
        moved += int((wide * (places % 8191)).sum()) * (number + 1)
    return total, moved


def check_conversion(name: str, old: torch.nn.Module, new: Any, before: Fingerprint) -> None:
    """Hold a surgery to its promise.

    Raises:
        HFAccelError: it returned no other module, changed the old one, or put tensors of it into the new one.
    """
    if not isinstance(new, torch.nn.Module) or new is old:
        what = "the old model itself" if new is old else f"a {type(new).__name__}"
        raise HFAccelError(f"{name}: convert() must return a new torch.nn.Module; it returned {what}.")
    if changed := before.changes(old):
        raise HFAccelError(
            f"{name} changed the model that it converts: {_some(changed)}. A surgery works on a copy; load the model "
            "anew."
        )
    theirs = {_storage(tensor): key for key, tensor in _tensors(old) if _storage(tensor) != 0}
    if shared := [f"{key} (of the old {theirs[_storage(t)]})" for key, t in _tensors(new) if _storage(t) in theirs]:
        raise HFAccelError(
            f"{name}: the new model shares memory with the old one: {_some(shared)}. Whoever trains one would "
            "change the other; copy these."
        )


def _tensors(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _storage(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
