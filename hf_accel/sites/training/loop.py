"""Recipes on the training loop of ours (``hf_accel.train``), which asks its recipes at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched, Skipped
from hf_accel.sites.training.losses import PlainLoss
from hf_accel.sites.training.seam import KINDS, ONE_PROCESS, ListEntry, RecipeSeam, Rest

if TYPE_CHECKING:
    from hf_accel.sites.training.base import Recipe


def why_not(loop: Any, hooks: frozenset[str]) -> str | None:
    """Why a recipe that overrides ``hooks`` does not fit this loop, in words; None if it does."""
    if hooks == {"comm_hook"} and not _exchanges(loop):
        return ONE_PROCESS
    return None


def install(loop: Any, recipe: Recipe, ledger: Ledger, report: MethodReport) -> LoopSeam:
    """Put a recipe on a loop.

    Raises:
        Conflict: its training is under way.
    """
    rest = Rest(loop, under_way)
    rest.check(recipe.name)
    seam = LoopSeam(recipe, loop)
    report.run = seam.run
    ledger.record(rest)
    entry = ListEntry(loop.recipes, seam)
    entry.redo()
    ledger.record(entry)
    ledger.record(seam.exchange)
    ledger.record(seam.coder)
    for hook in sorted(seam.hooks):
        if hook == "comm_hook" and not _exchanges(loop):
            report.skipped.append(Skipped("trainer", "recipes", ONE_PROCESS))
        else:
            report.patched.append(Patched("trainer", "recipes", KINDS[hook]))
    return seam


def under_way(loop: Any) -> bool:
    """Whether the loop trains now."""
    return bool(loop.running)


class LoopSeam(RecipeSeam):
    """One recipe on one loop. The loop calls every function here."""

    def __init__(self, recipe: Recipe, loop: Any):
        super().__init__(recipe)
        self.loop = loop
        self._callback = recipe.callback() if self.has("callback") else None
        self._events: Any = None

    def begin(self, network: torch.nn.Module) -> None:
        """The loop begins, or goes on after a resume."""
        self.attach(network, self.loop.optimizer)
        if self._callback is not None:
            from hf_accel.sites.training.transformers import LoopEvents

            self._events = LoopEvents(self._callback, self.loop.config.steps, self.loop.step)
        self.tell("on_train_begin")

    def tell(self, event: str) -> Any:
        """An event for the recipe's callback; returns transformers' ``TrainerControl``, None without a callback."""
        if event == "on_step_end":
            self.run.steps += 1
        if self._events is None:
            return None
        loop = self.loop
        return self._events.tell(event, loop.config, loop.step, model=loop.model, optimizer=loop.optimizer)

    def batches(self, dataset: Any, batch_size: int, seed: int) -> Callable[[int], Sequence[Sequence[int]]]:
        """``epoch -> batches``; the last, ragged one of a recipe that orders examples is left out."""

        def of_epoch(epoch: int) -> Sequence[Sequence[int]]:
            entries = self.order(dataset, batch_size, epoch, seed)
            if self.has("batch_sampler"):
                return entries
            whole = len(entries) // batch_size * batch_size
            return [entries[start : start + batch_size] for start in range(0, whole, batch_size)]

        return of_epoch

    def loss_on(
        self, network: torch.nn.Module, batch: Mapping[str, Any], plain: Callable[[Mapping[str, Any]], torch.Tensor]
    ) -> torch.Tensor:
        """The recipe's loss; the loop divides it by the batches of a step."""
        return self.loss(network, batch, lambda given: PlainLoss(plain(given), None), self.loop.step, 1.0)


def _exchanges(loop: Any) -> bool:
    return loop.accelerator.num_processes > 1
