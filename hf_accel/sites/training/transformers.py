"""Recipes on transformers' ``Trainer``, by entries in the instance and in its list of callbacks.

What the Trainer makes itself when a training begins (the DDP around the model, the optimizer) is followed by a callback
of ours, :class:`Watch`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from hf_accel.errors import HFAccelError
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched, Skipped
from hf_accel.sites.training.ddp import ddp_in
from hf_accel.sites.training.losses import PlainLoss
from hf_accel.sites.training.seam import KINDS, ONE_PROCESS, ListEntry, Order, RecipeSeam, Rest

if TYPE_CHECKING:
    from hf_accel.sites.training.base import Recipe


def why_not(trainer: Any, hooks: frozenset[str]) -> str | None:
    """Why a recipe that overrides ``hooks`` does not fit this Trainer, in words; None if it does."""
    sharded = next((n for n in ("deepspeed", "fsdp") if getattr(trainer, f"is_{n}_enabled", False)), None)
    if sharded is not None and (wide := hooks & {"comm_hook", "encode_state", "schedule"}):
        return f"this Trainer runs under {sharded}, which has its own {', '.join(sorted(wide))}; use DDP"
    if "schedule" in hooks and trainer.lr_scheduler is not None and not trainer._created_lr_scheduler:
        return (
            f"this Trainer was given a {type(trainer.lr_scheduler).__name__}, and the recipe has a schedule; make the "
            "Trainer with optimizers=(optimizer, None)"
        )
    if hooks & {"sampler", "batch_sampler"} and not hasattr(trainer.train_dataset, "__len__"):
        return (
            f"the recipe chooses examples by number, and the train_dataset is a {type(trainer.train_dataset).__name__} "
            "without a length; give a map-style dataset"
        )
    if hooks == {"comm_hook"} and not _exchanges(trainer):
        return ONE_PROCESS
    return None


def install(trainer: Any, recipe: Recipe, ledger: Ledger, report: MethodReport) -> TrainerSeam:
    """Put a recipe on a Trainer.

    Raises:
        Conflict: a training is under way, or the DDP has a communication hook of somebody else.
    """
    rest = Rest(trainer, under_way)
    rest.check(recipe.name)
    seam = TrainerSeam(recipe, trainer)
    report.run = seam.run
    ledger.record(rest)
    callbacks = trainer.callback_handler.callbacks
    _add(ledger, ListEntry(callbacks, Watch(seam)))

    def patched(place: str, hook: str) -> None:
        report.patched.append(Patched("trainer", place, KINDS[hook]))

    if seam.has("comm_hook"):
        if _exchanges(trainer):
            ledger.record(seam.exchange)
            if (ddp := ddp_in(trainer.model_wrapped)) is not None:
                seam.exchange.attach(ddp)
            patched("model_wrapped", "comm_hook")
        else:
            report.skipped.append(Skipped("trainer", "model_wrapped", ONE_PROCESS))
    if seam.has("sampler"):
        ledger.set(trainer, "_get_train_sampler", seam.sampler)
        patched("_get_train_sampler", "sampler")
    if seam.has("batch_sampler"):
        ledger.set(trainer, "get_train_dataloader", seam.loader)
        patched("get_train_dataloader", "batch_sampler")
    if seam.has("schedule"):
        ledger.record(SchedulerChange(seam))
        ledger.set(trainer, "create_scheduler", seam.create_scheduler)
        patched("create_scheduler", "schedule")
        report.notes.append(f"lr_scheduler_type ({trainer.args.lr_scheduler_type}) and warm-up of the arguments rest")
    if seam.has("loss"):
        ledger.set(trainer, "compute_loss", seam.compute_loss)
        patched("compute_loss", "loss")
    if seam.has("encode_state"):
        ledger.record(seam.coder)
        patched("optimizer", "encode_state")
    if seam.has("callback"):
        _add(ledger, ListEntry(callbacks, recipe.callback()))
        patched("callback_handler", "callback")
    return seam


def under_way(trainer: Any) -> bool:
    """Whether ``trainer.train()`` runs now, in any thread.

    The Trainer's own flag ``is_in_train`` stays up when an exception ends a training, so the calls that are being
    executed are asked.
    """
    if not trainer.is_in_train:
        return False
    for frame in sys._current_frames().values():
        call: Any = frame
        while call is not None:
            if call.f_code.co_name in _TRAINING and call.f_locals.get("self") is trainer:
                return True
            call = call.f_back
    return False


_TRAINING = ("train", "_inner_training_loop")


class TrainerSeam(RecipeSeam):
    """One recipe on one Trainer."""

    def __init__(self, recipe: Recipe, trainer: Any):
        super().__init__(recipe)
        self.trainer = trainer
        self.plain_loss = trainer.compute_loss
        self.scheduler: Any = None

    # -- in place of functions of the Trainer ----------------------------------------------------------------------

    def sampler(self, train_dataset: Any = None) -> Order:
        dataset = train_dataset if train_dataset is not None else self.trainer.train_dataset
        return Order(self, dataset, self.trainer._train_batch_size, _data_seed(self.trainer))

    def loader(self) -> Any:
        """As ``Trainer.get_train_dataloader``, with batches from the recipe: transformers takes a sampler of batches
        from nobody but itself."""
        trainer, args = self.trainer, self.trainer.args
        dataset, collate = trainer.train_dataset, trainer.data_collator
        if type(dataset).__module__.partition(".")[0] == "datasets":
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="training")
        order = Order(self, dataset, trainer._train_batch_size, _data_seed(trainer))
        loader: Any = DataLoader(
            dataset, batch_sampler=order, collate_fn=collate, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory, persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )  # fmt: skip
        return trainer.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer = self.trainer
        if trainer.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else trainer.optimizer

            # A function, because a scheduler saves the attributes of any other callable in checkpoints.
            def factor(step: int) -> float:
                # After the last step the scheduler asks once more, for a step that is never taken.
                return self.factor(min(step, num_training_steps - 1), num_training_steps)

            self.scheduler = trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return self.plain_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )  # evaluations stay comparable
        seen: list[Any] = []

        def plain(given: Mapping[str, Any]) -> PlainLoss:
            # A copy, because the Trainer takes the labels out of what it is given.
            loss, outputs = self.plain_loss(
                model, dict(given), return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            seen.append(outputs)
            return PlainLoss(loss, outputs)

        scale = 1 / self.trainer.current_gradient_accumulation_steps if self._adds_up(num_items_in_batch) else 1.0
        loss = self.loss(model, inputs, plain, self.trainer.state.global_step, scale)
        if not return_outputs:
            return loss
        if not seen:
            raise HFAccelError(
                f"{self.recipe.name}: {type(self.trainer).__name__} wants the network's output beside the loss; the "
                "recipe's loss() must compute it by call.plain(inputs)."
            )
        return loss, seen[-1]

    def _adds_up(self, num_items: Any) -> bool:
        """Whether the Trainer adds up the losses of a step as they are, as ``Trainer.training_step`` decides."""
        trainer = self.trainer
        told = getattr(trainer, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None


class SchedulerChange:
    """The scheduler that a training made from a recipe; undo puts back the one that was there before."""

    def __init__(self, seam: TrainerSeam):
        self.seam = seam
        self.redo()

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        trainer, ours = self.seam.trainer, self.seam.scheduler
        if ours is not None and trainer.lr_scheduler is ours:
            trainer.lr_scheduler, trainer._created_lr_scheduler = self.old, self.made
        if ours is not None and trainer.callback_handler.lr_scheduler is ours:
            trainer.callback_handler.lr_scheduler = self.known
        self.seam.scheduler = None

    def redo(self) -> None:
        trainer = self.seam.trainer
        self.old, self.made = trainer.lr_scheduler, trainer._created_lr_scheduler
        self.known = trainer.callback_handler.lr_scheduler


class Watch(TrainerCallback):
    """Tells a seam what its Trainer does."""

    def __init__(self, seam: TrainerSeam):
        self.seam = seam

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.seam.trainer.optimizer
        # accelerate's wrapper has no hooks of its own; torch's, of the optimizer inside, are those that run.
        self.seam.attach(self.seam.trainer.model_wrapped, getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seam.run.steps += 1


class LoopEvents:
    """Runs a callback of transformers in a training loop of ours: the same events, state and control."""

    def __init__(self, callback: TrainerCallback, total: int, step: int):
        self.callback, self.control = callback, TrainerControl()
        self.state = TrainerState(max_steps=total, global_step=step)

    def tell(self, event: str, settings: Any, step: int, **kwargs: Any) -> Any:
        """Call the event; returns the control, whose wishes last until the next step begins."""
        self.state.global_step = step
        if event == "on_step_begin":
            self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        result = getattr(self.callback, event)(settings, self.state, self.control, **kwargs)
        self.control = result if result is not None else self.control
        return self.control


def _add(ledger: Ledger, entry: ListEntry) -> None:
    entry.redo()
    ledger.record(entry)


def _exchanges(trainer: Any) -> bool:
    """Whether gradients are exchanged between replicas: by a DDP that is there, or by one that a training will make."""
    return ddp_in(trainer.model_wrapped) is not None or trainer.accelerator.num_processes > 1


def _data_seed(trainer: Any) -> int:
    args = trainer.args
    return int(args.data_seed if args.data_seed is not None else args.seed)
