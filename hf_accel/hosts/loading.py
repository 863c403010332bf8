"""Loading what is asked for beside a model that is there: a second language model, a pipeline to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import NotApplicable


def load_language_model(place: str, like: torch.nn.Module) -> torch.nn.Module:
    """``AutoModelForCausalLM`` from a folder or the Hub, in eval mode, with dtype and device of ``like``.

    Remote code is not run: load such a model yourself.

    Raises:
        NotApplicable: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    first: Any = next(like.parameters())
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=first.dtype)
    except (OSError, ValueError) as error:
        raise NotApplicable(f"The reference {place!r} cannot be loaded: {error}") from error
    return model.to(first.device).eval().requires_grad_(False)


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers pipeline of whatever class its folder names."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=dtype)
