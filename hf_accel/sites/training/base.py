"""What a training takes: the base class of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.base import Method
from hf_accel.errors import HFAccelError
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model, is_transformers_trainer
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.training import loop
from hf_accel.sites.training.losses import LossCall, PlainLoss

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import TrainerCallback

# What a recipe can override, each with the slot of the training site that it takes.
SLOT_OF = {
    "comm_hook": "communication",
    "sampler": "data",
    "batch_sampler": "data",
    "schedule": "schedule",
    "loss": "loss",
    "encode_state": "optimizer",
    "callback": "callback",
}


class Recipe(Method):
    """A method on a training: on transformers' ``Trainer``, on :class:`~hf_accel.train.finetune.finetuner.Finetuner`
    or on :class:`~hf_accel.train.rcd.trainer.RCDTrainer`.

    A subclass overrides any of the functions below; the others are never called. Its facts have ``kind="recipe"`` and
    as ``sites`` the slots of what it overrides (``"training: schedule"``; :data:`SLOT_OF`), by which two recipes on one
    training are found to exclude each other. The slot ``callback`` is shared.

    Undo: the training's objects (callbacks, sampler, scheduler, loss, hooks of the optimizer) are the same as before.
    Trained weights stay, and moments of the optimizer stay as they were decoded last. A DDP hook, which torch cannot
    unregister, becomes plain all-reduce. Undo in the middle of a training is refused.
    """

    def comm_hook(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Exchange one bucket of gradients between the processes of a DDP training.

        Args:
            group: the processes that hold replicas.
            bucket: ``bucket.buffer()`` is ``[N]``, this process's gradients, *not* divided by the number of processes.

        Returns:
            Future: of ``[N]``, same dtype and device, the gradients to step with: the mean over processes, or what the
            method has in place of it. See ``torch.nn.parallel.DistributedDataParallel.register_comm_hook``.
        """
        raise NotImplementedError

    def callback(self) -> TrainerCallback:
        """A callback of transformers for this training. Called once, when the recipe is applied.

        A loop of ours tells it of the begin and end of a training and of every step, with its own settings as ``args``,
        and heeds ``should_training_stop``, ``should_evaluate`` and ``should_save``.
        """
        raise NotImplementedError

    def sampler(self, dataset: Any, batch_size: int, epoch: int, seed: int) -> Sequence[int]:
        """The examples of one epoch in their order, as indices of ``dataset``; some may lack or come twice.

        Args:
            dataset: has a length.
            batch_size: examples per forward of one process.
            epoch: from 0. The order must depend on ``epoch`` and ``seed`` alone, so that a resumed training and every
                process see the same.
            seed: of the training's data.
        """
        raise NotImplementedError

    def batch_sampler(self, dataset: Any, batch_size: int, epoch: int, seed: int) -> Sequence[Sequence[int]]:
        """The batches of one epoch in their order, each as indices of ``dataset``; they may differ in size. In place of
        :meth:`sampler`, with the same arguments. Every epoch must have as many batches as the first."""
        raise NotImplementedError

    def schedule(self, step: int, total: int) -> float:
        """The factor (>= 0) on the peak learning rates at optimizer step ``step`` of ``total``, from 0. It is in place
        of the training's own schedule, its warm-up included."""
        raise NotImplementedError

    def loss(self, call: LossCall) -> torch.Tensor:
        """The loss on one batch, a scalar with a gradient. Evaluations keep the training's own loss."""
        raise NotImplementedError

    def encode_state(self, key: str, value: torch.Tensor) -> Any:
        """What is kept of one of the optimizer's moments between two steps, in place of it.

        Args:
            key: its name in the optimizer (``"exp_avg"``, ``"exp_avg_sq"``, ...).
            value: floating point, of its parameter's shape. Only such states are handed over.

        Returns:
            Any: tensors, in tuples, lists or dicts if there are several. Checkpoints hold decoded moments, so
            they can be read without the recipe.
        """
        raise NotImplementedError

    def decode_state(self, key: str, code: Any) -> torch.Tensor:
        """The moment again from what :meth:`encode_state` kept: same shape, dtype and device."""
        raise NotImplementedError

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """Names of :data:`SLOT_OF` that this class overrides."""
        return frozenset(name for name in SLOT_OF if getattr(cls, name) is not getattr(Recipe, name))

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        if model.trainer is None:
            return f"a {model.class_name} is no training"
        return _host(model.trainer).why_not(model.trainer, cls.hooks())

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        """Put every overridden function on the training.

        Raises:
            HFAccelError: the facts do not say what the class overrides.
            Conflict: a training is under way, or somebody else's communication hook is in place.
        """
        self._check_facts()
        return _host(model.trainer).install(model.trainer, self, ledger, report)

    def _check_facts(self) -> None:
        """Whether two recipes exclude each other is derived from facts, so these must be true."""
        name, hooks = type(self).__name__, self.hooks()
        slots = {SLOT_OF[hook] for hook in hooks}
        declared = {place.partition(": ")[2] for place in self.facts.sites if place.startswith("training: ")}
        if not hooks:
            raise HFAccelError(f"Recipe {name} overrides none of {', '.join(SLOT_OF)}; a recipe is made of these.")
        if self.facts.kind != "recipe":
            raise HFAccelError(f"Recipe {name}: Facts(kind={self.facts.kind!r}); write kind='recipe'.")
        if self.facts.sites != {"training"} and slots != declared:
            raise HFAccelError(
                f"Recipe {name} overrides {', '.join(sorted(hooks))}, so its facts must have "
                f"sites={{{', '.join(repr(f'training: {slot}') for slot in sorted(slots))}}}; they have "
                f"{sorted(self.facts.sites)}."
            )
        if {"sampler", "batch_sampler"} <= hooks:
            raise HFAccelError(f"Recipe {name} overrides sampler and batch_sampler; keep one of them.")
        if (type(self).decode_state is Recipe.decode_state) == ("encode_state" in hooks):
            raise HFAccelError(f"Recipe {name}: encode_state and decode_state go together; override both.")


def _host(trainer: Any) -> Any:
    if is_transformers_trainer(trainer):
        from hf_accel.sites.training import transformers as host  # an author's module need not load transformers

        return host
    return loop


__all__ = ["SLOT_OF", "LossCall", "PlainLoss", "Recipe"]
