"""The training loop: one model, one trainable method on it, LoRA or all weights, checkpoints and a loss curve."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel import api
from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.hosts import adapters
from hf_accel.hosts.flow_matching import LATENTS, Forward, forward_for
from hf_accel.hosts.seam import SeamContext
from hf_accel.train import checkpoint as checkpoints
from hf_accel.train.checkpoint import Checkpoint
from hf_accel.train.config import FinetuneConfig
from hf_accel.train.data import Batch, Batches, Data, moved
from hf_accel.train.history import History
from hf_accel.train.noise import generator_for, mix, noise_levels
from hf_accel.train.rcd_config import RCDTrainingConfig
from hf_accel.train.teacher import teacher
from hf_accel.trained import ADAPTER, trained_model

BETAS = (0.9, 0.999)


class Finetuner:
    """Trains a method's own parameters together with the model's weights, or with LoRA on its projections.

    Apply the method first. What is trained: ``method.trainable_parameters()``, and the LoRA adapter that is added here
    (name ``"hf_accel"``), or with ``lora_rank=None`` every weight. With LoRA the dense teacher of ``loss="distill"`` is
    the model itself with adapter and method switched off; else it is a frozen copy taken now.

    Args:
        target: pipeline or model with exactly one trainable method on it.
        config: see :class:`FinetuneConfig`.
        out: folder of checkpoints, ``loss.json`` and ``loss.png``.
        component: which model of a pipeline, if several carry a trainable method.
        forward: ``(model, noisy, sigma, conditions) -> velocity`` for models that
            :mod:`hf_accel.hosts.flow_matching` does not know.
        resume: ``"latest"`` or a checkpoint folder; also finds that there is none.

    Raises:
        NotApplicable: nothing trainable, a method without a backward, or an unknown model without ``forward``.
        InvalidSetting: settings of the method that cannot be trained with.
        WeightsMismatch, PresetError: a checkpoint of other settings, or none.
    """

    def __init__(
        self,
        target: Any,
        config: FinetuneConfig | None = None,
        *,
        out: str | Path,
        component: str | None = None,
        forward: Forward | None = None,
        resume: str | Path | None = None,
    ):
        self.config = config if config is not None else FinetuneConfig()
        self.out = Path(out).expanduser()
        found, installation = trained_model(target, component)
        self.method, self.model = installation.method, found.module
        self._check_method()
        self.forward = forward if forward is not None else forward_for(self.model)
        self.accelerator = accelerator_for(self.model)
        self._teacher = None if self.config.lora_rank is not None else self._frozen_copy()
        shared = isinstance(installation.handle, SeamContext)
        if self.config.lora_rank is not None:
            if not shared and self.config.loss == "distill":
                self._teacher = self._frozen_copy()
            self._add_lora()
        self.parameters = self._choose()
        self._own = self.method.trainable_parameters().keys()
        self.optimizer = self._make_optimizer()
        self.averages = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if self.config.ema_decay else {}
        )
        self.step = 0
        self.history = History(about={"method": self.method.config.to_dict(), "training": self.config.to_dict()})
        self._random: dict[str, Any] | None = None
        if resume is not None:
            self._restore(checkpoints.find(self.out, resume))

    # -- what is trained -------------------------------------------------------------------------------------------

    def _check_method(self) -> None:
        if not self.method.facts.backward:
            raise NotApplicable(f"{self.method.name} has no backward, so it cannot be trained.")
        if getattr(self.method.config, "on_slow", "keep") != "keep":
            raise InvalidSetting(self.method.name, "on_slow", "dense", "'keep' while it is trained")

    def _frozen_copy(self) -> torch.nn.Module | None:
        if self.config.loss != "distill":
            return None
        twin = copy.deepcopy(self.model)
        api.revert(twin)
        return twin.requires_grad_(False).eval()

    def _add_lora(self) -> None:
        rank = self.config.lora_rank
        if rank is None or ADAPTER in adapters.active_and_inactive(self.model):
            return  # an adapter loaded with load_trained goes on being trained
        targets = [name.strip() for name in self.config.lora_targets.split(",")]
        own = {name.split(".")[-2] for name in self.method.trainable_parameters()}
        if taken := own & set(targets):
            raise InvalidSetting("finetune", "lora_targets", self.config.lora_targets, f"without {', '.join(taken)}")
        alpha = self.config.lora_alpha or rank
        adapters.add_lora(self.model, ADAPTER, rank=rank, alpha=alpha, targets=targets, seed=self.config.seed)

    def _choose(self) -> dict[str, torch.nn.Parameter]:
        own = self.method.trainable_parameters()
        if self.config.lora_rank is not None:
            return {**adapters.lora_parameters(self.model, ADAPTER), **own}
        return {name: p for name, p in self.model.named_parameters() if p.is_floating_point()}

    def _make_optimizer(self) -> torch.optim.AdamW:
        config = self.config
        base = [p for name, p in self.parameters.items() if name not in self._own]
        own = [p for name, p in self.parameters.items() if name in self._own]
        groups = [
            {"params": base, "lr": config.lr, "peak": config.lr},
            {"params": own, "lr": config.method_lr or config.lr, "peak": config.method_lr or config.lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS, weight_decay=config.weight_decay)

    # -- the loop --------------------------------------------------------------------------------------------------

    def fit(self, data: Data, validation: Iterable[Batch] | None = None, seconds: float | None = None) -> History:
        """Train up to ``config.steps`` steps in all, resumed ones included.

        Args:
            data: batches, dicts with ``latents`` (the normalised x_0, as the model takes it) and the other arguments of
                the model's forward; see :class:`~hf_accel.train.data.Batches` for what may be given.
            validation: batches that are not trained on; all are kept. Their noise is the same at every validation.
            seconds: stop earlier, after so much time; the run can be resumed.

        Returns:
            History: also written to ``out``. The model carries the trained weights (their average, with EMA) and is
            otherwise as before.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        batches, held_out = Batches(data, self.config.batch_size, self.config.seed), list(validation or ())
        start, before = time.monotonic(), self.history.seconds
        network = self.accelerator.prepare_model(self.model) if self.accelerator.num_processes > 1 else self.model
        with self._training(), self._bar() as bar:
            if held_out and not self.history.validation:
                self._validate(held_out)
            while self.step < self.config.steps:
                loss, lr = self._train_step(network, batches)
                self.step += 1
                self.history.train.append({"step": self.step, "loss": loss, "lr": lr})
                self.history.seconds = before + time.monotonic() - start
                late = seconds is not None and time.monotonic() - start >= seconds
                last = late or self.step == self.config.steps
                if held_out and (last or self.step % self.config.validate_every == 0):
                    self._validate(held_out)
                if last or self.step % self.config.checkpoint_every == 0:
                    self._save()
                bar.set_postfix(loss=f"{loss:.4g}", **self._latest_validation(), refresh=False)
                bar.update()
                if last:
                    break
        if self.averages:
            self._swap_averages()
        return self.history

    def _train_step(self, network: Any, batches: Batches) -> tuple[float, float]:
        config, accelerator = self.config, self.accelerator
        factor = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=accelerator.device)
        for turn in range(config.accumulate):
            number = (self.step * config.accumulate + turn) * accelerator.num_processes + accelerator.process_index
            last = turn + 1 == config.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(network):
                loss = self.loss(batches[number], ("train", number), network) / config.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.optimizer.step()
        self._average()
        return float(accelerator.reduce(total, "mean")), self.optimizer.param_groups[0]["lr"]

    def loss(self, batch: Batch, key: tuple[str, int], network: Any = None) -> torch.Tensor:
        """Mean squared error of the velocity on one batch; noise and noise levels depend on (seed, key) alone."""
        device = self.accelerator.device
        conditions = {name: moved(value, device) for name, value in batch.items() if name != LATENTS}
        if LATENTS not in batch:
            raise InvalidSetting("finetune", "batch", sorted(batch), f"a mapping with {LATENTS!r}")
        latents = batch[LATENTS].to(device).float()
        generator = generator_for(self.config.seed, *key)
        sigma = noise_levels(len(latents), self.config, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        noisy = mix(latents, sigma, noise)
        if self.config.precision == "fp32":
            noisy = noisy.to(getattr(self.model, "dtype", next(self.model.parameters()).dtype))
        network = network if network is not None else self.model
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if self.config.loss == "diffusion":
                wanted = noise - latents
            else:
                wanted = self._teach(noisy, sigma, conditions)
            velocity = self.forward(network, noisy, sigma, conditions)
        return F.mse_loss(velocity.float(), wanted.float())

    def _teach(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Any) -> torch.Tensor:
        """The dense model's velocity. Before the student's forward, so that checkpointing repeats the student's."""
        if self._teacher is not None:
            with torch.no_grad():
                return self.forward(self._teacher, noisy, sigma, conditions)
        with teacher(self.model):
            return self.forward(self.model, noisy, sigma, conditions)

    def _validate(self, held_out: list[Batch]) -> None:
        if self.averages:
            self._swap_averages()
        # A method with dense first steps would run dense without gradients; it is judged as it is trained.
        gated = bool(getattr(self.method.config, "dense_steps", 0))
        with torch.set_grad_enabled(gated):
            losses = [float(self.loss(batch, ("validation", i)).detach()) for i, batch in enumerate(held_out)]
        if self.averages:
            self._swap_averages()
        self.history.validation.append({"step": self.step, "loss": sum(losses) / len(losses)})
        if self.accelerator.is_main_process:
            self.history.write(self.out)

    # -- averages, checkpoints, modes ------------------------------------------------------------------------------

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
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

    @torch.no_grad()
    def _restore(self, folder: Path) -> None:
        found = Checkpoint.read(folder)
        found.check(self.history.about, self.parameters, folder)
        for name, parameter in self.parameters.items():
            parameter.copy_(found.parameters[name])
        for name, average in self.averages.items():
            average.copy_(found.averages[name])
        self.optimizer.load_state_dict(found.optimizer)
        self.step, self._random = found.step, found.random
        self.history = found.history
        self.history.about["training"] = self.config.to_dict()

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode, gradients for what is trained only, a random state of our own; all put back at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        repeats = getattr(self.model, "is_gradient_checkpointing", False)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                self.model.requires_grad_(False)
                for parameter in self.parameters.values():
                    parameter.requires_grad_(True)
                self.model.train()
                if self.config.gradient_checkpointing and not repeats:
                    self.model.enable_gradient_checkpointing()  # type: ignore[operator]
                if self._random is not None:
                    checkpoints.set_random_state(self._random)
                else:
                    torch.manual_seed(self.config.seed)
                yield
            finally:
                if self.config.gradient_checkpointing and not repeats:
                    self.model.disable_gradient_checkpointing()  # type: ignore[operator]
                for module, mode in modes:
                    module.training = mode
                for parameter, flag in wanted:
                    parameter.requires_grad_(flag)
                self.optimizer.zero_grad(set_to_none=True)

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        off = not self.config.progress or not self.accelerator.is_main_process
        return tqdm(total=self.config.steps, initial=self.step, desc=f"fine-tuning {self.method.name}", disable=off)

    def _latest_validation(self) -> dict[str, str]:
        return {"validation": f"{self.history.validation[-1]['loss']:.4g}"} if self.history.validation else {}


def learning_rate_factor(step: int, config: FinetuneConfig | RCDTrainingConfig) -> float:
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
