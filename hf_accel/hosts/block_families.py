"""Families of block-diffusion language models, found by structure, since most of these models are remote code: how the
arguments of a forward are read, and which modules' forwards tell where a block stands."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.hosts.target import is_a


@dataclass(frozen=True, slots=True)
class ForwardRead:
    """The arguments of one forward, as a family reads them.

    Attributes:
        tokens: ids of the positions computed, int64 ``[B, n]``; None if embeddings were passed instead.
        shape: ``(B, n)``.
        cache: the object that holds the frozen K/V, or None.
        prefix: positions in it that this forward's queries find frozen.
        stores: whether the forward adds its own K/V to the cache.
        conditioned: whether it is given the prediction of an earlier step.
    """

    tokens: torch.Tensor | None
    shape: tuple[int, int]
    cache: Any
    prefix: int
    stores: bool
    conditioned: bool = False


Reader = Callable[[Mapping[str, Any]], ForwardRead]


@dataclass(frozen=True)
class BlockFamily:
    """A family of block-diffusion models.

    Attributes:
        name: for people.
        frozen_prefix: finished blocks keep their K/V, so that a prefix can be cached exactly.
        masked: open positions hold a mask token; else random tokens that are drawn anew (DiffusionGemma).
        final: a token once committed stays in its block.
        read: arguments of a forward of the whole model -> :class:`ForwardRead`.
        suits: whether a model is of this family, by its structure.
        watched: the modules whose forwards tell where a block stands, and how to read each.
    """

    name: str
    frozen_prefix: bool
    masked: bool
    final: bool
    read: Reader
    suits: Callable[[torch.nn.Module], bool]
    watched: Callable[[Any], list[tuple[torch.nn.Module, Reader]]]


def family_of(module: torch.nn.Module) -> BlockFamily | None:
    """The family of block-diffusion models that ``module`` (the causal-LM class, not a part) belongs to, or None."""
    return next((family for family in FAMILIES if family.suits(module)), None)


def mask_token_of(module: torch.nn.Module) -> int | None:
    """The mask token's id as the model's configuration (or generation configuration) tells it, or None."""
    for config in (getattr(module, "config", None), getattr(module, "generation_config", None)):
        for name in ("mask_token_id", "mask_id"):
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    return None


def cache_length(cache: Any) -> int:
    """Positions in a transformers cache; waits for the device where a static cache counts there."""
    return 0 if cache is None else int(cache.get_seq_length())


def arguments_of(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and named arguments of a forward as one mapping."""
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


# -- families ------------------------------------------------------------------------------------------------------


def _tokens_and_shape(arguments: Mapping[str, Any], ids: str) -> tuple[torch.Tensor | None, tuple[int, int]]:
    tokens = arguments.get(ids)
    shaped = tokens if tokens is not None else arguments.get("inputs_embeds")
    return tokens, ((shaped.shape[0], shaped.shape[1]) if shaped is not None else (0, 0))  # the model will complain


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The K/V cache under either of its names; None for older forms than transformers' cache classes."""
    cache = arguments.get("past_key_values")
    cache = arguments.get("past_key_value") if cache is None else cache
    return cache if hasattr(cache, "get_seq_length") else None


def _read_sdar(arguments: Mapping[str, Any]) -> ForwardRead:
    """``store_kv=True`` writes; a forward with a cache and without it only reads."""
    tokens, shape = _tokens_and_shape(arguments, "input_ids")
    cache = cache_of(arguments)
    return ForwardRead(tokens, shape, cache, cache_length(cache), bool(arguments.get("store_kv", False)))


def _read_decoder(arguments: Mapping[str, Any]) -> ForwardRead:
    """DiffusionGemma's decoder never writes."""
    tokens, shape = _tokens_and_shape(arguments, "decoder_input_ids")
    cache = cache_of(arguments)
    conditioned = arguments.get("self_conditioning_logits") is not None
    return ForwardRead(tokens, shape, cache, cache_length(cache), False, conditioned)


def _read_encoder(arguments: Mapping[str, Any]) -> ForwardRead:
    """DiffusionGemma's encoder writes all that it is given."""
    tokens, shape = _tokens_and_shape(arguments, "input_ids")
    cache = cache_of(arguments)
    return ForwardRead(tokens, shape, cache, cache_length(cache), True)


def _read_diffusion_gemma(arguments: Mapping[str, Any]) -> ForwardRead:
    """The whole model: prompt tokens in the same call enter the cache before the decoder reads it."""
    read = _read_decoder(arguments)
    prompt = arguments.get("input_ids")
    if prompt is None:
        return read
    shape = read.shape if read.tokens is not None else (prompt.shape[0], 0)  # the model draws a canvas
    return replace(read, shape=shape, prefix=read.prefix + prompt.shape[1])


def _read_uncached(arguments: Mapping[str, Any]) -> ForwardRead:
    tokens, shape = _tokens_and_shape(arguments, "input_ids")
    return ForwardRead(tokens, shape, None, 0, False)


def _mentions(function: Any, word: str) -> bool:
    """Whether the code of a function knows a word: a name, an argument or a string in it."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    return word in code.co_names or word in code.co_varnames or word in code.co_consts


def sdar_attentions(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Attentions that write the cache when told ``store_kv``, and have the projections and norms of Qwen3."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "layer_idx", "head_dim")
    return [
        (name, sub)
        for name, sub in module.named_modules()
        if all(hasattr(sub, part) for part in parts)
        and _mentions(type(sub).forward, "store_kv")
        and hasattr(sys.modules[type(sub).__module__], "apply_rotary_pos_emb")
    ]


def _is_sdar(module: torch.nn.Module) -> bool:
    return is_a(module, "transformers", "PreTrainedModel") and bool(sdar_attentions(module))


def _is_diffusion_gemma(module: torch.nn.Module) -> bool:
    """transformers' own: an encoder that fills the cache and a decoder that only reads it."""
    decoder = getattr(getattr(module, "model", None), "decoder", None)
    parameters = inspect.signature(type(module).forward).parameters
    return decoder is not None and {"decoder_input_ids", "self_conditioning_logits"} <= parameters.keys()


def _is_llada2(module: torch.nn.Module) -> bool:
    name = type(module).__name__
    inner = getattr(module, "model", None)
    return name.startswith("LLaDA2") and hasattr(inner, "word_embeddings")


def _is_full(module: torch.nn.Module) -> bool:
    """LLaDA and Dream: attention over the whole sequence, both ways, at every step."""
    name = type(module).__name__
    return name in ("LLaDAModelLM", "DreamModel", "DreamForCausalLM") or (
        name.startswith("LLaDA") and not _is_llada2(module) and is_a(module, "transformers", "PreTrainedModel")
    )


def _whole(read: Reader) -> Callable[[Any], list[tuple[torch.nn.Module, Reader]]]:
    """The network without its head, which also runs where somebody calls ``model.forward`` past the model's hooks."""
    return lambda module: [(module.base_model, read)]


def _watched_diffusion_gemma(module: Any) -> list[tuple[torch.nn.Module, Reader]]:
    """Its two halves: ``generate()`` calls the encoder by itself, and ``model.forward`` past the model's hooks."""
    return [(module.model.encoder, _read_encoder), (module.model.decoder, _read_decoder)]


SDAR = BlockFamily("SDAR class", True, True, True, _read_sdar, _is_sdar, _whole(_read_sdar))
DIFFUSION_GEMMA = BlockFamily(
    "DiffusionGemma", True, False, False, _read_diffusion_gemma, _is_diffusion_gemma, _watched_diffusion_gemma
)
LLADA2 = BlockFamily("LLaDA2", True, True, False, _read_uncached, _is_llada2, _whole(_read_uncached))
FULL = BlockFamily(
    "full bidirectional (LLaDA, Dream)", False, True, False, _read_uncached, _is_full, _whole(_read_uncached)
)
FAMILIES = (SDAR, DIFFUSION_GEMMA, LLADA2, FULL)
