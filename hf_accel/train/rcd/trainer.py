"""Training of residual context diffusion (arXiv 2601.22954, Sec. 3.3), both stages.

::

    from hf_accel.train.rcd import RCDTrainer, RCDTrainingConfig

    RCDTrainer(reference, RCDTrainingConfig(stage=1, steps=...), out="stage-1").fit(batches)
    tuner = RCDTrainer(model, RCDTrainingConfig(stage=2, steps=...), out="stage-2", reference=reference)
    tuner.fit(batches, validation=held_out)
    tuner.save("my-rcd-model")

Stage 1 is the plain masked objective. Stage 2 starts from the base model again: a *frozen* reference predicts the
masked tokens of the same noisy sequence (one forward, no gradient), and the target learns with residuals made of that
prediction and of its **own** embeddings, so that nothing is propagated back through steps. The two models share a
vocabulary, not a width.

Block-causal models learn on the doubled sequence ``[x_t ; x_0]`` (:func:`~hf_accel.train.masked.doubled`), with the
residual in its noisy half only (INFERRED; the clean half has no masks anyway); full bidirectional models on ``x_t``.

What is trained is whatever requires a gradient: all weights, or LoRA from peft, with the embeddings or without.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hf_accel.checkpoints.declaration import declare
from hf_accel.errors import InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.hosts.block_families import family_of, mask_token_of
from hf_accel.hosts.target import unwrap
from hf_accel.patches.rcd import RCDConfig, residual_embeddings
from hf_accel.sites.embedding.start import align_logits, logit_shift_of
from hf_accel.train.loop.data import Batch, Data, moved
from hf_accel.train.loop.history import History
from hf_accel.train.loop.random import generator_for
from hf_accel.train.loop.training_loop import TrainingLoop, accelerator_for
from hf_accel.train.masked import answer_tokens, denoising_loss, doubled, mask_tokens
from hf_accel.train.rcd.config import RCDTrainingConfig

INPUT_IDS, LABELS, ATTENTION_MASK = "input_ids", "labels", "attention_mask"
Callback = Callable[["RCDTrainer"], Any]


class RCDTrainer(TrainingLoop):
    """Trains a masked diffusion language model for residual context diffusion, or (stage 1) its reference.

    Args:
        target: the model, a PeftModel around it, or one with transformers' ``add_adapter``.
        config: see :class:`RCDTrainingConfig`.
        out: folder of checkpoints, ``loss.json`` and ``loss.png``.
        reference: the frozen model of stage 2; another, smaller one as a rule. It stays as it is.
        residual: how residuals are formed: ``t_res``, ``alpha_mode``, ``alpha``, ``alpha_scale``, ``temper_delta``,
            ``top_k``; ``mask_token_id`` and ``logit_shift`` where the model's configuration does not tell.
        resume: ``"latest"`` or a checkpoint folder.

    Raises:
        NotApplicable: no mask token, nothing that requires a gradient, stage 2 without a reference.
        WeightsMismatch: a reference of another vocabulary or mask token, or a checkpoint of other settings.
        InvalidSetting: no block length, or a layout that the model cannot have.
        PresetError: no such checkpoint.
    """

    def __init__(
        self,
        target: torch.nn.Module,
        config: RCDTrainingConfig | None = None,
        *,
        out: str | Path,
        reference: torch.nn.Module | None = None,
        residual: RCDConfig | None = None,
        resume: str | Path | None = None,
    ):
        self.config = config if config is not None else RCDTrainingConfig()
        self.residual = residual if residual is not None else RCDConfig()
        self.target, self.model = target, unwrap(target)
        self.reference = unwrap(reference) if reference is not None and self.config.stage == 2 else None
        self.mask_token_id = self._mask_token()
        self.block_length = self._block_length()
        self._check_reference()
        parameters = self._choose()
        betas = (0.9, self.config.beta2)
        groups = [{"params": list(parameters.values()), "lr": self.config.lr, "peak": self.config.lr}]
        super().__init__(
            self.model, parameters, torch.optim.AdamW(groups, betas=betas, weight_decay=self.config.weight_decay),
            self.config, out=out, accelerator=accelerator_for(self.model), title=f"rcd stage {self.config.stage}",
            about={"method": self.residual.to_dict(), "training": self.config.to_dict()},
        )  # fmt: skip
        if resume is not None:
            self.resume(resume)

    # -- what is trained, and on what ------------------------------------------------------------------------------

    def _mask_token(self) -> int:
        token = self.residual.mask_token_id
        token = token if token is not None else mask_token_of(self.model)
        if token is None:
            raise NotApplicable(
                f"{type(self.model).__name__} has no mask token (config.mask_token_id): residual context diffusion "
                "is for masked diffusion models. If it has one, say so: residual=RCDConfig(mask_token_id=...)."
            )
        return token

    def _block_length(self) -> int | None:
        """Tokens per block of the doubled sequence; None: not doubled."""
        family, layout = family_of(self.model), self.config.layout
        told = getattr(getattr(self.model, "config", None), "block_size", None)
        if layout == "whole" or (layout == "auto" and family is not None and not family.frozen_prefix):
            return None
        length = self.config.block_length or told
        if length is None:
            raise InvalidSetting(
                self.config.METHOD, "block_length", None, f"an int: the config of {type(self.model).__name__} has no "
                "block_size. For a full bidirectional model set layout='whole'",
            )  # fmt: skip
        return int(length)

    def _check_reference(self) -> None:
        if self.config.stage == 1:
            return
        if self.reference is None:
            raise NotApplicable(
                "Stage 2 needs reference=, the frozen model whose predictions become residuals: one trained with "
                "stage=1 on the same data, or any masked diffusion model with this vocabulary."
            )
        if self.reference is self.model:
            raise NotApplicable(
                "The reference is the target itself, which changes while it is trained: pass a copy of it."
            )
        sizes = [_vocabulary(m) for m in (self.model, self.reference)]
        if sizes[0] != sizes[1]:
            raise WeightsMismatch(
                f"The reference {type(self.reference).__name__} has {sizes[1]} tokens, the target "
                f"{type(self.model).__name__} {sizes[0]}. They may differ in width, not in vocabulary."
            )
        other = mask_token_of(self.reference)
        if other is not None and other != self.mask_token_id:
            raise WeightsMismatch(f"The reference's mask token is {other}, the target's is {self.mask_token_id}.")

    def _choose(self) -> dict[str, torch.nn.Parameter]:
        chosen = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not chosen:
            raise NotApplicable(
                f"Nothing of {type(self.model).__name__} requires a gradient. Call model.requires_grad_(True), or add "
                "LoRA with peft."
            )
        low = {str(p.dtype).removeprefix("torch.") for p in chosen.values() if p.dtype.itemsize < 4}
        if low:
            warnings.warn(
                f"hf_accel: rcd training of weights in {', '.join(sorted(low))}: steps of lr={self.config.lr:g} are "
                "lost to rounding. Load the model in float32 and use precision='bf16'.",
                stacklevel=3,
            )
        return chosen

    # -- the objective ---------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, key: tuple[str, int] = ("loss", 0), network: Any = None) -> torch.Tensor:
        """The objective on one batch; noise depends on (seed, key) alone.

        Args:
            batch: ``input_ids`` ``[B, S]``; ``labels``, -100 where nothing is asked; ``attention_mask`` ``[B, S]``.
            key: of the noise.
            network: the wrapped model of a distributed run.
        """
        if INPUT_IDS not in batch:
            raise InvalidSetting(self.config.METHOD, "batch", sorted(batch), f"a mapping with {INPUT_IDS!r}")
        batch = moved(dict(batch), self.accelerator.device)
        ids, valid = batch[INPUT_IDS], batch.get(ATTENTION_MASK)
        answer = answer_tokens(ids, batch.get(LABELS), valid)
        block = (self.block_length or 1) if self.config.noise == "block" else None
        generator = generator_for(self.config.seed, *key)
        noisy = mask_tokens(ids, answer, self.mask_token_id, generator, level_min=self.config.level_min, block=block)
        network = network if network is not None else self.model
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if self.config.stage == 1:
                logits = self._predict(network, ids, valid, noisy.ids)
            else:
                logits = self._predict(network, ids, valid, noisy.ids, self._teach(ids, valid, noisy.ids))
        return denoising_loss(logits, ids, noisy, answer)

    @torch.no_grad()
    def _teach(self, ids: torch.Tensor, valid: torch.Tensor | None, noisy: torch.Tensor) -> torch.Tensor:
        """The reference's logits ``[B, S, V]`` on the noisy sequence, without dropout."""
        reference: Any = self.reference
        modes = [(module, module.training) for module in reference.modules()]
        reference.eval()
        try:
            return self._predict(reference, ids, valid, noisy)
        finally:
            for module, mode in modes:
                module.training = mode

    def _predict(
        self,
        network: Any,
        ids: torch.Tensor,
        valid: torch.Tensor | None,
        noisy: torch.Tensor,
        residual_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[B, S, V]`` of the noisy tokens, in place."""
        length = ids.shape[1]
        arguments: dict[str, Any] = {"use_cache": False}
        if residual_logits is None:
            inputs, clean = noisy, ids
        else:
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            inputs = residual_embeddings(
                embedding, noisy, residual_logits, self.mask_token_id, self.residual,
                detach_residual=self.config.detach_residual,
            )  # fmt: skip
            clean = embedding(ids) if self.block_length is not None else ids
        if self.block_length is not None:
            layout = doubled(length, self.block_length, valid, ids.device)
            inputs = torch.cat([inputs, clean], 1)
            arguments |= layout._asdict()
            if "logits_to_keep" in inspect.signature(type(unwrap(network)).forward).parameters:
                arguments["logits_to_keep"] = torch.arange(length, device=ids.device)
        elif valid is not None:
            arguments[ATTENTION_MASK] = valid
        arguments[INPUT_IDS if residual_logits is None else "inputs_embeds"] = inputs
        logits = network(**arguments).logits[:, :length]
        shift = self.residual.logit_shift
        return align_logits(logits, logit_shift_of(unwrap(network)) if shift is None else shift)

    # -- the weights -----------------------------------------------------------------------------------------------

    def fit(
        self,
        data: Data,
        validation: Iterable[Batch] | None = None,
        seconds: float | None = None,
        callback: Callback | None = None,
    ) -> History:
        """As :meth:`TrainingLoop.fit`; also declares the weights."""
        history = super().fit(data, validation, seconds, callback)
        declare(self.model, "rcd", self.declaration)
        return history

    @property
    def declaration(self) -> dict[str, Any]:
        """What is written into the model's configuration: the stage, the reference, how residuals were formed."""
        told: dict[str, Any] = {"stage": self.config.stage, "mask_token_id": self.mask_token_id}
        if self.reference is None:
            return told
        source = getattr(getattr(self.reference, "config", None), "_name_or_path", "")
        formed = ("alpha_mode", "alpha", "alpha_scale", "t_res", "temper_delta", "top_k")
        return {**told, "reference": str(source), **{name: getattr(self.residual, name) for name in formed}}

    def save(self, folder: str | Path) -> Path:
        """Declare the weights and ``save_pretrained`` the target (the adapter alone, if it has one)."""
        declare(self.model, "rcd", self.declaration)
        self.target.save_pretrained(folder)  # type: ignore[operator]
        return Path(folder)

    def validation_loss(self, batch: Batch, key: tuple[str, int]) -> float:
        self.model.eval()
        try:
            return super().validation_loss(batch, key)
        finally:
            self.model.train()


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


__all__ = ["RCDTrainer", "RCDTrainingConfig", "residual_embeddings"]
