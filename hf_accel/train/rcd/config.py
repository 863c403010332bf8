"""Settings of the training of residual context diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.config import Config, setting


@dataclass(frozen=True)
class RCDTrainingConfig(Config):
    """Settings of :class:`~hf_accel.train.rcd.RCDTrainer`. Optimizer defaults are the paper's for SDAR."""

    METHOD = "rcd-training"

    stage: int = setting(2, "1: plain masked objective; 2: with residuals of a frozen reference", choices=(1, 2))
    layout: str = setting(
        "auto",
        "doubled: [x_t ; x_0], for block-causal models; whole: x_t, for full bidirectional ones; auto: by the model",
        choices=("auto", "doubled", "whole"),
    )
    block_length: int | None = setting(None, "tokens per block (doubled); None: the model's block_size", ge=1)
    noise: str = setting("sequence", "one noise level per sequence, or per block", choices=("sequence", "block"))
    level_min: float = setting(1e-3, "lowest noise level", gt=0, le=1)
    detach_residual: bool = setting(False, "no gradient through Delta; the paper is silent")
    steps: int = setting(1000, "optimizer steps", ge=1)
    batch_size: int = setting(1, "examples per batch where data are a torch Dataset", ge=1)
    accumulate: int = setting(1, "batches per optimizer step", ge=1)
    lr: float = setting(1e-5, "peak learning rate", gt=0)
    beta2: float = setting(0.999, "of AdamW, beside 0.9", gt=0, le=1)
    weight_decay: float = setting(0.0, "of AdamW", ge=0)
    max_grad_norm: float | None = setting(1.0, "clip the norm of all gradients; None: no clipping", gt=0)
    warmup_steps: int = setting(0, "steps of linear warm-up (paper: 3 % of all)", ge=0)
    schedule: str = setting("constant", "learning rate after the warm-up", choices=("constant", "cosine"))
    precision: str = setting("fp32", "of the forwards: bf16 means autocast", choices=("fp32", "bf16"))
    gradient_checkpointing: bool = setting(False, "compute activations twice, keep few")
    validate_every: int = setting(100, "steps between validations", ge=1)
    checkpoint_every: int = setting(500, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(2, "the newest ones", ge=1)
    seed: int = setting(0, "of noise, noise levels, order of a Dataset and dropout", ge=0)
    progress: bool = setting(True, "show a progress bar")
