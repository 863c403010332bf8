"""Communication hooks of DistributedDataParallel.

torch registers one hook for the life of a DDP and has no way back. So ours is registered once, and asks at every bucket
who exchanges the gradients: a recipe, or nobody, which is plain all-reduce, the mean over processes as DDP computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.errors import Conflict
from hf_accel.sites.training.statistics import RecipeStatistics

if TYPE_CHECKING:
    from hf_accel.sites.training.base import Recipe


@dataclass
class Exchange:
    """The state of our hook on one DDP: the recipe that exchanges its gradients now, if any."""

    group: Any
    recipe: Recipe | None = None
    run: RecipeStatistics | None = None


# Without annotations, because torch compares them with the types themselves.
def exchange(state, bucket):
    """The hook that torch knows: of the recipe, or plain all-reduce."""
    if state.recipe is None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        return allreduce_hook(state.group, bucket)
    buffer = bucket.buffer()
    state.run.buckets += 1
    state.run.bucket_bytes += buffer.numel() * buffer.element_size()
    return state.recipe.comm_hook(state.group, bucket)


def ddp_in(network: Any) -> Any:
    """The DDP that is ``network`` or is inside what ``torch.compile`` made of it; None if there is none."""
    network = getattr(network, "_orig_mod", network)
    return network if isinstance(network, torch.nn.parallel.DistributedDataParallel) else None


def other_hook(ddp: Any) -> str | None:
    """The name of a hook that somebody else registered on a DDP; None if there is none that it lists."""
    return next((hook.__qualname__ for hook, _ in ddp._comm_hooks if hook is not exchange), None)


@dataclass
class ExchangeChange:
    """A recipe exchanges the gradients of whatever DDP the training makes.

    Recorded when the recipe is applied; :meth:`attach` is called for the DDP that the training then has.
    """

    recipe: Recipe
    run: RecipeStatistics
    state: Exchange | None = None

    def attach(self, ddp: Any) -> None:
        """Exchange the gradients of this DDP from now on, and of no other.

        Raises:
            Conflict: it has a hook of somebody else.
        """
        if (name := other_hook(ddp)) is not None:
            raise _taken(self.recipe.name, name)
        state = next((state for hook, state in ddp._comm_hooks if hook is exchange), None)
        if state is None:
            state = Exchange(ddp.process_group)
            try:
                ddp.register_comm_hook(state, exchange)
            except RuntimeError as error:  # a built-in hook, which torch does not list
                raise _taken(self.recipe.name, "one of torch's built-in hooks") from error
        self.undo()
        state.recipe, state.run = self.recipe, self.run
        self.state = state

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        if self.state is not None and self.state.recipe is self.recipe:
            self.state.recipe = self.state.run = None

    def redo(self) -> None:
        if self.state is not None:
            self.state.recipe, self.state.run = self.recipe, self.run


def _taken(recipe: str, hook: str) -> Conflict:
    return Conflict(
        f"{recipe} exchanges the gradients of this DDP, and {hook} is registered there already; torch takes one hook "
        "and cannot take it off. Make the DDP without it (accelerate: DistributedDataParallelKwargs without comm_hook)."
    )
