"""What recipes on transformers' Trainer and on our own loop have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from hf_accel.errors import Conflict, HFAccelError, RevertRefused
from hf_accel.sites.training.ddp import ExchangeChange, ddp_in
from hf_accel.sites.training.losses import LossCall, PlainLoss
from hf_accel.sites.training.optimizer import StateCoder
from hf_accel.sites.training.statistics import RecipeStatistics

if TYPE_CHECKING:
    from hf_accel.sites.training.base import Recipe

# What each function of a recipe changes, for reports.
KINDS = {
    "comm_hook": "communication hook of DDP",
    "sampler": "order of examples",
    "batch_sampler": "order of batches",
    "schedule": "schedule of the learning rate",
    "loss": "loss",
    "encode_state": "moments kept as codes",
    "callback": "callback",
}
ONE_PROCESS = (
    "this training runs in one process, without DDP, so no gradients are exchanged; start it in several (torchrun, "
    "accelerate launch)"
)


class RecipeSeam:
    """One recipe on one training: counts what it does, and follows the objects that a training makes."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.run = recipe, RecipeStatistics()
        self.hooks = recipe.hooks()
        self.exchange = ExchangeChange(recipe, self.run)
        self.coder = StateCoder(recipe, self.run)

    def has(self, *hooks: str) -> bool:
        return any(hook in self.hooks for hook in hooks)

    def attach(self, network: Any, optimizer: torch.optim.Optimizer) -> None:
        """A training begins with these: its network, wrapped or not, and its optimizer."""
        self.run.trainings += 1
        if self.has("comm_hook"):
            ddp = ddp_in(network)
            if ddp is None:
                self.run.idle[f"no DDP in this training ({type(network).__name__}), so nothing to exchange"] += 1
            else:
                self.exchange.attach(ddp)
        if self.has("encode_state"):
            self.coder.attach(optimizer)

    def factor(self, step: int, total: int) -> float:
        """The recipe's factor on the learning rates.

        Raises:
            HFAccelError: it is negative or no finite number.
        """
        factor = float(self.recipe.schedule(step, total))
        if not (math.isfinite(factor) and factor >= 0):
            raise HFAccelError(
                f"{self.recipe.name}: schedule({step}, {total}) gave {factor}; expected a finite factor >= 0."
            )
        self.run.record_factor(factor)
        return factor

    def order(self, dataset: Any, batch_size: int, epoch: int, seed: int) -> Sequence[Any]:
        """One epoch: indices in order, or batches of them from a recipe with ``batch_sampler``."""
        self.run.orders += 1
        if self.has("batch_sampler"):
            return [list(batch) for batch in self.recipe.batch_sampler(dataset, batch_size, epoch, seed)]
        return list(self.recipe.sampler(dataset, batch_size, epoch, seed))

    def loss(
        self,
        network: torch.nn.Module,
        inputs: Mapping[str, Any],
        plain: Callable[[Mapping[str, Any]], PlainLoss],
        step: int,
        scale: float,
    ) -> torch.Tensor:
        self.run.losses += 1
        return self.recipe.loss(LossCall(network, inputs, plain, step, scale))


class Order(Sampler[Any]):
    """The order of a recipe as a sampler of torch: of examples or of batches, new in every epoch.

    A training tells the epoch by ``set_epoch``, also when it is resumed.
    """

    def __init__(self, seam: RecipeSeam, dataset: Any, batch_size: int, seed: int):
        self.seam, self.dataset, self.batch_size, self.seed = seam, dataset, batch_size, seed
        self.epoch, self._known = 0, -1
        self._entries: Sequence[Any] = ()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._of_epoch())

    def __len__(self) -> int:
        return len(self._of_epoch())

    def _of_epoch(self) -> Sequence[Any]:
        if self._known != self.epoch:
            self._entries = self.seam.order(self.dataset, self.batch_size, self.epoch, self.seed)
            self._known = self.epoch
        return self._entries


@dataclass
class ListEntry:
    """An object of ours in a list of the host, among others' that come and go."""

    entries: list[Any]
    entry: Any

    def blocked(self) -> str | None:
        return None  # one that is gone already needs no undo

    def undo(self) -> None:
        self.entries[:] = [other for other in self.entries if other is not self.entry]

    def redo(self) -> None:
        self.entries.append(self.entry)


@dataclass
class Rest:
    """A training that is under way cannot be undone: half of its steps would have been another training's."""

    trainer: Any
    under_way: Callable[[Any], bool]

    def check(self, recipe: str) -> None:
        """Raise :class:`Conflict` if it is under way: a recipe joins no training in its middle."""
        if self.under_way(self.trainer):
            raise Conflict(
                f"A training of this {type(self.trainer).__name__} is under way, and {recipe} cannot join it in the "
                "middle. Apply it before the training begins, or after its end."
            )

    def blocked(self) -> str | None:
        # Raised here and not told: the ledger's advice to set an attribute back would be wrong.
        if self.under_way(self.trainer):
            raise RevertRefused(
                f"A training of this {type(self.trainer).__name__} is under way. Undo its recipes when it has ended: "
                "wait for its end, or end it (control.should_training_stop, or an exception). Nothing was changed."
            )
        return None

    def undo(self) -> None:
        """Nothing was changed."""

    def redo(self) -> None:
        """Nothing is changed."""
