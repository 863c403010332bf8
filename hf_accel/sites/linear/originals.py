"""The full weights of linears that others have replaced: moved to the CPU, or given up for good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import RevertRefused
from hf_accel.ledger import Ledger
from hf_accel.sites.linear.places import LinearSite


@dataclass
class OffloadedWeights:
    """Full weights that lie on the CPU while others stand in their place."""

    devices: list[tuple[torch.Tensor, torch.device]]

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        for tensor, device in self.devices:
            tensor.data = tensor.data.to(device)

    def redo(self) -> None:
        for tensor, _ in self.devices:
            tensor.data = tensor.data.to("cpu")


@dataclass
class DroppedWeights:
    """Full weights that are gone: what was changed before cannot be undone any more."""

    count: int

    def blocked(self) -> str | None:
        # Raised and not told: no advice to set something back helps, and force would leave linears without weights.
        raise RevertRefused(
            f"Cannot undo: the full weights of {self.count} linears were dropped when they were quantised "
            "(original='drop'). Nothing was changed. To have them again, load the model again."
        )

    def undo(self) -> None:
        """Never comes to it."""

    def redo(self) -> None:
        """Never comes to it."""


def offload(sites: Iterable[LinearSite], ledger: Ledger) -> None:
    """Move what replaced linears held to the CPU; undo brings it back."""
    modules = (place.module for site in sites for place in (site, *site.tied))
    tensors = {id(tensor): tensor for module in modules for tensor in module.parameters()}
    change = OffloadedWeights([(tensor, tensor.device) for tensor in tensors.values()])
    ledger.record(change)
    change.redo()


def drop(sites: Iterable[LinearSite], ledger: Ledger) -> None:
    """Give up the weights of replaced linears. From here on the ledger refuses to undo, and says why."""
    modules: list[Any] = [place.module for site in sites for place in (site, *site.tied)]
    if not modules:
        return
    earlier = [change for change in ledger.changes if isinstance(change, DroppedWeights)]
    others = [change for change in ledger.changes if not isinstance(change, DroppedWeights)]
    count = sum(change.count for change in earlier) + len(modules)
    ledger.changes[:] = [*others, DroppedWeights(count)]  # before they go: never less told than done
    for module in modules:
        module.weight = None


def settle(ledger: Ledger) -> int:
    """After a failure: undo what came after the last :func:`drop`; what came before belongs to the model from now on.

    Returns:
        Of how many linears the weights were dropped. 0: none were, and the ledger is as it was and can be undone.
    """
    places = [i for i, change in enumerate(ledger.changes) if isinstance(change, DroppedWeights)]
    if not places:
        return 0
    dropped: Any = ledger.changes[places[-1]]
    later = Ledger()
    later.changes = ledger.changes[places[-1] + 1 :]
    later.undo()
    ledger.changes.clear()
    return dropped.count


__all__ = ["DroppedWeights", "OffloadedWeights", "drop", "offload", "settle"]
