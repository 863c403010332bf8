"""The training loop: one model, one trainable method on it, LoRA or all weights, checkpoints and a loss curve."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel import api
from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.sites.adapter.peft import lora as adapters
from hf_accel.sites.attention.seam import AttentionSeam
from hf_accel.train.finetune.config import FinetuneConfig
from hf_accel.train.finetune.flow_matching import LATENTS, Forward, forward_for
from hf_accel.train.finetune.noise import mix, noise_levels
from hf_accel.train.finetune.teacher import teacher
from hf_accel.train.loop.data import Batch, moved
from hf_accel.train.loop.random import generator_for
from hf_accel.train.loop.training_loop import TrainingLoop, accelerator_for
from hf_accel.train.saving import ADAPTER, trained_model

BETAS = (0.9, 0.999)


class Finetuner(TrainingLoop):
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
            :mod:`hf_accel.train.finetune.flow_matching` does not know.
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
        found, installation = trained_model(target, component)
        self.method, self.model = installation.method, found.module
        self._check_method()
        self.forward = forward if forward is not None else forward_for(self.model)
        accelerator = accelerator_for(self.model)
        self._teacher = None if self.config.lora_rank is not None else self._frozen_copy()
        shared = isinstance(getattr(installation.handle, "shared", None), AttentionSeam)
        if self.config.lora_rank is not None:
            if not shared and self.config.loss == "distill":
                self._teacher = self._frozen_copy()
            self._add_lora()
        parameters = self._choose()
        super().__init__(
            self.model, parameters, self._make_optimizer(parameters), self.config, out=out, accelerator=accelerator,
            about={"method": self.method.config.to_dict(), "training": self.config.to_dict()},
            title=f"fine-tuning {self.method.name}", ema_decay=self.config.ema_decay,
        )  # fmt: skip
        if resume is not None:
            self.resume(resume)

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

    def _make_optimizer(self, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
        config, added = self.config, self.method.trainable_parameters()
        base = [p for name, p in parameters.items() if name not in added]
        own = [p for name, p in parameters.items() if name in added]
        groups = [
            {"params": base, "lr": config.lr, "peak": config.lr},
            {"params": own, "lr": config.method_lr or config.lr, "peak": config.method_lr or config.lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS, weight_decay=config.weight_decay)

    # -- the objective ---------------------------------------------------------------------------------------------

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

    def validation_loss(self, batch: Batch, key: tuple[str, int]) -> float:
        # A method with dense first steps would run dense without gradients; it is judged as it is trained.
        gated = bool(getattr(self.method.config, "dense_steps", 0))
        with torch.set_grad_enabled(gated):
            return float(self.loss(batch, key).detach())
