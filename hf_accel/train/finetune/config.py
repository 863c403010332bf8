"""Settings of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.config import Config, setting


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Settings of :class:`~hf_accel.train.Finetuner`.

    Noise levels are ``sigma = sigmoid(sigma_mean + sigma_std * n + log(sigma_shift))`` with normal ``n``: that is the
    logit-normal distribution, and also the log-normal one of EDM in units of ``t / (1 - t)``; a time shift only moves
    its mean. The defaults are those of TurboDiffusion for SLA. Its learning rate for all weights is 1e-5, which suits
    ``lora_rank=None``; it clips no gradients.
    """

    METHOD = "finetune"

    loss: str = setting("distill", "follow the dense model, or the data", choices=("distill", "diffusion"))
    steps: int = setting(2000, "optimizer steps", ge=1)
    batch_size: int = setting(1, "examples per batch where data are a torch Dataset", ge=1)
    accumulate: int = setting(1, "batches per optimizer step", ge=1)
    lr: float = setting(1e-4, "learning rate of the model's weights or of their LoRA", gt=0)
    method_lr: float | None = setting(None, "learning rate of the method's own parameters; None: lr", gt=0)
    weight_decay: float = setting(0.01, "of AdamW", ge=0)
    max_grad_norm: float | None = setting(None, "clip the norm of all gradients; None: no clipping", gt=0)
    warmup_steps: int = setting(0, "steps of linear warm-up", ge=0)
    schedule: str = setting("constant", "learning rate after the warm-up", choices=("constant", "cosine"))
    lora_rank: int | None = setting(16, "rank of LoRA on the projections; None: all weights are trained", ge=1)
    lora_alpha: int | None = setting(None, "None: the rank", ge=1)
    lora_targets: str = setting("to_q,to_k,to_v,to_out.0", "linear layers with LoRA: suffixes, by commas")
    precision: str = setting("fp32", "of the forward: bf16 means autocast", choices=("fp32", "bf16"))
    gradient_checkpointing: bool = setting(False, "compute activations twice, keep few")
    ema_decay: float = setting(0.0, "average of the trained weights, used for validation and at the end; 0: off", ge=0)
    sigma_mean: float = setting(1.5, "of the noise levels' logits")
    sigma_std: float = setting(1.6, "of the noise levels' logits", ge=0)
    sigma_shift: float = setting(1.0, "time shift of the noise levels, as schedulers have it", gt=0)
    validate_every: int = setting(100, "steps between validations", ge=1)
    checkpoint_every: int = setting(500, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(2, "the newest ones", ge=1)
    seed: int = setting(0, "of noise, noise levels, order of a Dataset and LoRA's start", ge=0)
    progress: bool = setting(True, "show a progress bar")
