"""The training loop that all trainings share: one model, chosen parameters, AdamW, checkpoints, a loss curve."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_accel.errors import NotApplicable
from hf_accel.sites.training.loop import LoopSeam
from hf_accel.train.loop import checkpoint as checkpoints
from hf_accel.train.loop.checkpoint import Checkpoint
from hf_accel.train.loop.data import Batch, Batches, Data
from hf_accel.train.loop.history import History


class LoopConfig(Protocol):
    """What the loop asks of a training's settings."""

    steps: int
    batch_size: int
    accumulate: int
    warmup_steps: int
    schedule: str
    max_grad_norm: float | None
    gradient_checkpointing: bool
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    seed: int
    progress: bool

    def to_dict(self) -> dict[str, Any]: ...


class TrainingLoop(ABC):
    """Trains chosen parameters of a model; a training says what is trained, and its loss.

    Args:
        model: everything but ``parameters`` stays as it is, modes and flags of gradients included.
        parameters: what is trained, by name.
        groups: parameter groups of AdamW, each with ``peak``, the learning rate after the warm-up.
        about: settings, for ``loss.json``.
        ema_decay: of an average of the weights that is validated and is left on the model; 0: none.
        title: of the progress bar.
    """

    config: Any

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        *,
        out: str | Path,
        about: Mapping[str, Any],
        accelerator: Any,
        title: str,
        ema_decay: float = 0.0,
    ):
        self.model, self.parameters, self.optimizer = model, dict(parameters), optimizer
        self.config, self.out, self.accelerator = config, Path(out).expanduser(), accelerator
        self.ema_decay, self.title = ema_decay, title
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if ema_decay else {}
        self.step = 0
        self.recipes: list[LoopSeam] = []  # what apply(trainer, ...) put here; asked at every step
        self.running = False
        self.history = History(about=dict(about))
        self._random: dict[str, Any] | None = None

    @abstractmethod
    def loss(self, batch: Batch, key: tuple[str, int], network: Any = None) -> torch.Tensor:
        """The objective on one batch, a scalar; its noise depends on (seed, key) alone."""

    def validation_loss(self, batch: Batch, key: tuple[str, int]) -> float:
        """The objective on a batch that is not trained on."""
        with torch.no_grad():
            return float(self.loss(batch, key))

    def fit(
        self,
        data: Data,
        validation: Iterable[Batch] | None = None,
        seconds: float | None = None,
        callback: Callable[[Any], Any] | None = None,
    ) -> History:
        """Train up to ``config.steps`` steps in all, resumed ones included.

        Args:
            data: batches as :meth:`loss` takes them; see :class:`~.data.Batches` for what may be
                given.
            validation: batches that are not trained on; all are kept. Their noise is the same at every validation.
            seconds: stop earlier, after so much time; the run can be resumed.
            callback: called with the trainer after every step; ends the training by returning True.

        Returns:
            History: also written to ``out``. The model carries the trained weights (their average, with EMA) and is
            otherwise as before.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        ordering = self._recipe("sampler", "batch_sampler")
        order = ordering.batches if ordering is not None else None
        batches, held_out = Batches(data, self.config.batch_size, self.config.seed, order), list(validation or ())
        start, before = time.monotonic(), self.history.seconds
        network = self.accelerator.prepare_model(self.model) if self.accelerator.num_processes > 1 else self.model
        with self._running(network), self.training(), self._bar() as bar:
            if held_out and not self.history.validation:
                self._validate(held_out)
            while self.step < self.config.steps:
                self._tell("on_step_begin")
                loss, lr = self.train_step(network, batches)
                self.step += 1
                wishes = self._tell("on_step_end")
                self.history.train.append({"step": self.step, "loss": loss, "lr": lr})
                self.history.seconds = before + time.monotonic() - start
                late = seconds is not None and time.monotonic() - start >= seconds
                stop = callback is not None and callback(self) is True
                stop = stop or any(wish.should_training_stop for wish in wishes)
                last = late or stop or self.step == self.config.steps
                validate = any(wish.should_evaluate for wish in wishes) or self.step % self.config.validate_every == 0
                if held_out and (last or validate):
                    self._validate(held_out)
                save = any(wish.should_save for wish in wishes) or self.step % self.config.checkpoint_every == 0
                if last or save:
                    self._save()
                bar.set_postfix(loss=f"{loss:.4g}", **self._latest_validation(), refresh=False)
                bar.update()
                if last:
                    break
            self._tell("on_train_end")
        if self.averages:
            self._swap_averages()
        return self.history

    def train_step(self, network: Any, batches: Batches) -> tuple[float, float]:
        """One optimizer step: the mean loss of its batches over all processes, and the learning rate."""
        config, accelerator = self.config, self.accelerator
        schedule = self._recipe("schedule")
        steps = self.step, config.steps
        factor = schedule.factor(*steps) if schedule is not None else learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=accelerator.device)
        for turn in range(config.accumulate):
            number = (self.step * config.accumulate + turn) * accelerator.num_processes + accelerator.process_index
            last = turn + 1 == config.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(network):
                loss = self._loss(batches[number], ("train", number), network) / config.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self._tell("on_pre_optimizer_step")
        self.optimizer.step()
        self._tell("on_optimizer_step")
        self._average()
        return float(accelerator.reduce(total, "mean")), self.optimizer.param_groups[0]["lr"]

    # -- recipes ---------------------------------------------------------------------------------------------------

    def _recipe(self, *hooks: str) -> LoopSeam | None:
        """The recipe that has one of these functions, if any; of each there is one, or apply would have refused."""
        return next((seam for seam in self.recipes if seam.has(*hooks)), None)

    def _loss(self, batch: Batch, key: tuple[str, int], network: Any) -> torch.Tensor:
        recipe = self._recipe("loss")
        if recipe is None:
            return self.loss(batch, key, network)
        return recipe.loss_on(network, batch, lambda given: self.loss(given, key, network))

    def _tell(self, event: str) -> list[Any]:
        """An event for the callbacks of recipes; returns their wishes."""
        return [wish for seam in self.recipes if (wish := seam.tell(event)) is not None]

    @contextlib.contextmanager
    def _running(self, network: Any) -> Iterator[None]:
        """While this lasts, recipes are neither put on nor taken off."""
        self.running = True
        try:
            for seam in self.recipes:
                seam.begin(network)
            yield
        finally:
            self.running = False

    def _validate(self, held_out: list[Batch]) -> None:
        if self.averages:
            self._swap_averages()
        losses = [self.validation_loss(batch, ("validation", i)) for i, batch in enumerate(held_out)]
        if self.averages:
            self._swap_averages()
        self.history.validation.append({"step": self.step, "loss": sum(losses) / len(losses)})
        if self.accelerator.is_main_process:
            self.history.write(self.out)

    # -- averages, checkpoints, modes ------------------------------------------------------------------------------

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Exchange the weights with their averages; twice is nothing."""
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = self.optimizer.state_dict(), checkpoints.random_state(), self.history
        now = Checkpoint(self.step, self.parameters, self.averages, *state)
        now.write(self.out, self.config.keep_checkpoints)
        self.history.write(self.out)

    def resume(self, which: str | Path) -> None:
        """Go on from ``"latest"`` or a checkpoint folder.

        Raises:
            PresetError: there is none.
            WeightsMismatch: it was written with other settings or parameters.
        """
        folder = checkpoints.find(self.out, which)
        found = Checkpoint.read(folder)
        found.check(self.history.about, self.parameters, folder)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.parameters[name])
            for name, average in self.averages.items():
                average.copy_(found.averages[name])
        self.optimizer.load_state_dict(found.optimizer)
        self.step, self._random, self.history = found.step, found.random, found.history
        self.history.about["training"] = self.config.to_dict()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Training mode, gradients for what is trained only, a random state of our own; all put back at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        repeats = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                self.model.requires_grad_(False)
                for parameter in self.parameters.values():
                    parameter.requires_grad_(True)
                self.model.train()
                if self.config.gradient_checkpointing and not repeats:
                    _checkpointing(self.model, "enable")
                if self._random is not None:
                    checkpoints.set_random_state(self._random)
                else:
                    torch.manual_seed(self.config.seed)
                yield
            finally:
                if self.config.gradient_checkpointing and not repeats:
                    _checkpointing(self.model, "disable")
                for module, mode in modes:
                    module.training = mode
                for parameter, flag in wanted:
                    parameter.requires_grad_(flag)
                self.optimizer.zero_grad(set_to_none=True)

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        off = not self.config.progress or not self.accelerator.is_main_process
        return tqdm(total=self.config.steps, initial=self.step, desc=self.title, disable=off)

    def _latest_validation(self) -> dict[str, str]:
        return {"validation": f"{self.history.validation[-1]['loss']:.4g}"} if self.history.validation else {}


def _checkpointing(model: Any, which: str) -> None:
    """Recompute activations in the backward, or not. The three names are transformers' new and old one, diffusers'."""
    names = f"activation_checkpointing_{which}", f"gradient_checkpointing_{which}", f"{which}_gradient_checkpointing"
    found = next((name for name in names if hasattr(model, name)), None)
    if found is None:
        raise NotApplicable(f"{type(model).__name__} has no gradient checkpointing: set gradient_checkpointing=False.")
    getattr(model, found)()


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    rest = max(config.steps - config.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / rest, 1.0)))


def accelerator_for(model: torch.nn.Module) -> Any:
    """Where training runs: on the model's device. Precision is not Accelerate's business here, because it keeps one
    per process, and two trainings in a process may differ."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise NotApplicable("Fine-tuning needs the package accelerate: pip install 'hf_accel[train]'.") from error
    device = next(model.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if accelerator.num_processes == 1 and accelerator.device.type != device.type:
        raise NotApplicable(
            f"Accelerate runs on {accelerator.device} in this process, the model is on {device}. Move the model there."
        )
    return accelerator
