"""Families of language models that write by denoising: a model, and a generation that yields what a sampler reads.

Importing this builds no model and imports no library but torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.testing.outcome import Skipped

ONE, OTHER, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)
TOKENS = 96  # ids below it are ordinary tokens of every family but those of 60


@dataclass(frozen=True)
class BlockFamily:
    """``build(seed)`` makes the model; ``generate(model, rows, seed)`` the logits of every step of a deterministic
    generation for those rows of two prompts; ``step(model)`` the logits of one denoising step behind a prefix, with
    gradients. ``reads_as`` is the family's name in :data:`hf_accel.hosts.block_families.FAMILIES`.
    """

    reads_as: str
    build: Callable[[int], torch.nn.Module]
    generate: Callable[[Any, slice, int], list[torch.Tensor]]
    step: Callable[[Any], torch.Tensor]


def _prompt(tokens: int, rows: slice, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, TOKENS, (2, tokens), generator=generator)[rows]


def _sdar(seed: int, **fields: Any) -> torch.nn.Module:
    if importlib.util.find_spec("hf_accel_zoo") is None:
        raise Skipped("the tiny model of the SDAR class needs the distribution hf-accel-zoo")
    from hf_accel.testing.models.sdar import sdar

    return sdar(seed, **fields)


def _steps_of_sdar(model: Any, rows: slice, seed: int) -> list[torch.Tensor]:
    from hf_accel.testing.models.sdar import denoise

    return denoise(model, _prompt(64, rows, seed))[0]


def _one_of_sdar(model: Any) -> torch.Tensor:
    from transformers import DynamicCache

    from hf_accel.testing.models.sdar import MASK

    cache = DynamicCache()
    with torch.no_grad():
        model(_prompt(8, ONE, 0), past_key_values=cache, store_kv=True)
    return model(torch.full((1, 4), MASK), past_key_values=cache, store_kv=False).logits


def _gemma(seed: int) -> torch.nn.Module:
    from hf_accel.testing.models.gemma import diffusion_gemma

    return diffusion_gemma(seed=seed)


@torch.no_grad()
def _steps_of_gemma(model: Any, rows: slice, seed: int) -> list[torch.Tensor]:
    """Two canvases of three steps. Predictions are not fed back but given: in these weights rounding would grow."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    tokens, out = _prompt(125, rows, seed), []
    before = torch.randn(1, 8, 97, generator=torch.Generator().manual_seed(seed)).expand(len(tokens), -1, -1)
    for block in range(2):
        model.model.encoder(tokens, past_key_values=cache)
        canvas = _prompt(8, rows, seed + 10 + block)
        for step in range(3):
            given = {"past_key_values": cache, "decoder_input_ids": canvas}
            logits = model(**given, self_conditioning_logits=before if step else None).logits
            out.append(logits)
            canvas = canvas.clone()
            canvas[:, : 3 * step + 3] = logits.argmax(-1)[:, : 3 * step + 3]
        tokens = out[-1].argmax(-1)
    return out


def _one_of_gemma(model: Any) -> torch.Tensor:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model.encoder(_prompt(9, ONE, 0), past_key_values=cache)
    before = torch.randn(1, 8, 97, generator=torch.Generator().manual_seed(0))
    canvas = _prompt(8, ONE, 1)
    return model(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=before).logits


def _llada2(seed: int) -> torch.nn.Module:
    from hf_accel.testing.models import llada2, llada2_pipeline

    return llada2.build(seed, mask_token_id=llada2_pipeline.MASK)


def _steps_of_llada2(model: Any, rows: slice, seed: int) -> list[torch.Tensor]:
    """Through diffusers' pipeline."""
    from hf_accel.testing.models import llada2_pipeline

    return llada2_pipeline.generate(llada2_pipeline.pipeline(model), _prompt(21, rows, seed) % 60)[1]


def _llada(seed: int) -> torch.nn.Module:
    from hf_accel.testing.models import llada

    return llada.build(seed)


def _dream(seed: int) -> torch.nn.Module:
    from hf_accel.testing.models import dream

    return dream.build(seed)


@torch.no_grad()
def _steps_of_whole(model: Any, rows: slice, seed: int, shift: int = 0) -> list[torch.Tensor]:
    """Greedy over the whole sequence, one token a step; ``shift`` 1: logits at a position are of the next."""
    mask = model.config.mask_token_id
    ids = _prompt(8, rows, seed) % mask
    ids = torch.cat([ids, torch.full((len(ids), 6), mask)], dim=1)
    out = []
    for _ in range(6):
        logits = model(ids).logits.float()
        out.append(logits)
        best, token = logits.roll(shift, dims=1).softmax(-1)[..., :mask].max(-1)
        place = best.masked_fill(ids != mask, -1).argmax(-1)
        ids = ids.scatter(1, place[:, None], token.gather(1, place[:, None]))
    return out


def _one_of_whole(model: Any) -> torch.Tensor:
    return model(_prompt(16, ONE, 0) % 60).logits


_WHOLE = "full bidirectional (LLaDA, Dream)"

FAMILIES: dict[str, BlockFamily] = {
    "sdar": BlockFamily("SDAR class", _sdar, _steps_of_sdar, _one_of_sdar),
    "sdar-mha": BlockFamily(
        "SDAR class", lambda seed: _sdar(seed, num_key_value_heads=4), _steps_of_sdar, _one_of_sdar
    ),
    "diffusion-gemma": BlockFamily("DiffusionGemma", _gemma, _steps_of_gemma, _one_of_gemma),
    "llada2": BlockFamily("LLaDA2", _llada2, _steps_of_llada2, _one_of_whole),
    "llada": BlockFamily(_WHOLE, _llada, _steps_of_whole, _one_of_whole),
    "dream": BlockFamily(
        _WHOLE, _dream, lambda model, rows, seed: _steps_of_whole(model, rows, seed, shift=1), _one_of_whole
    ),
}


def generate(model: torch.nn.Module, family: str, rows: slice = ONE, seed: int = 1) -> list[torch.Tensor]:
    """The logits of every step of one generation."""
    return FAMILIES[family].generate(model, rows, seed)
