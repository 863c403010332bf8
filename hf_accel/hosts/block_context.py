"""Where block diffusion stands: which block, which denoising step of it, what is frozen in front of it.

A block-diffusion language model writes block after block. The K/V of finished blocks are frozen in a cache; the active
block runs again at every denoising step. Methods on such a model need to know which forward is a *prefill* (prompt
blocks enter the cache), a *denoise* step (reads the cache, never writes it) or a *commit* (the clean tokens of a
finished block enter the cache), and when what they remember is void: at a new block, a new request, or an exception.

A :class:`BlockContext` learns all this from the arguments of the model's forwards (hooks on its root); samplers, ours
or foreign, need not know of it. How the arguments are read differs per family of models and is found by structure
(:func:`family_of`), since most of these models are remote code.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_accel.hosts.target import is_a

Phase = Literal["prefill", "denoise", "commit", "whole"]


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What a forward of a block-diffusion model is.

    Attributes:
        phase: ``"prefill"``, ``"denoise"``, ``"commit"``, or ``"whole"``: no cache is involved (training, scoring).
        generation: number of the request; nothing is remembered from one to the next.
        block: number of the block in this request, from 0.
        index: denoising step within the block, from 0.
        prefix: frozen positions in front of the block, padding included.
        length: positions of this forward.
    """

    phase: Phase
    generation: int
    block: int
    index: int
    prefix: int
    length: int


@dataclass(frozen=True, slots=True)
class ForwardRead:
    """The arguments of one forward, as a family reads them.

    Attributes:
        tokens: ids of the positions computed, int64 ``[B, n]``; None if embeddings were passed instead.
        shape: ``(B, n)``.
        cache: the object that holds the frozen K/V, or None.
        prefix: positions in it that this forward's queries find frozen.
        stores: whether the forward adds its own K/V to the cache.
    """

    tokens: torch.Tensor | None
    shape: tuple[int, int]
    cache: Any
    prefix: int
    stores: bool


@dataclass(frozen=True)
class BlockFamily:
    """A family of block-diffusion models.

    Attributes:
        name: for people.
        frozen_prefix: finished blocks keep their K/V, so that a prefix can be cached exactly.
        masked: open positions hold a mask token; else random tokens that are drawn anew (DiffusionGemma).
        final: a token once committed stays in its block.
        read: arguments of a forward -> :class:`ForwardRead`.
        suits: whether a model is of this family, by its structure.
    """

    name: str
    frozen_prefix: bool
    masked: bool
    final: bool
    read: Callable[[Mapping[str, Any]], ForwardRead]
    suits: Callable[[torch.nn.Module], bool]


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


class BlockContext:
    """State of the block clock on one model.

    Attributes:
        step: the forward that runs now; None outside of one.
        changed: bool ``[B, n]``, tokens that differ from those of the last denoising step of this block; None at a
            block's first step and where the tokens are unknown.
    """

    def __init__(self, family: BlockFamily, mask_token: int | None = None):
        self.family, self.mask_token = family, mask_token
        self.step: BlockStep | None = None
        self.changed: torch.Tensor | None = None
        self._last: BlockStep | None = None
        self._tokens: torch.Tensor | None = None
        self._cache: weakref.ref | None = None
        self._most_changed: int | None = None
        self._rows = 0

    def __deepcopy__(self, memo: dict) -> BlockContext:
        twin = type(self)(self.family, self.mask_token)
        memo[id(self)] = twin
        return twin  # the request that runs is the original's

    @property
    def most_changed(self) -> int:
        """The largest number of changed tokens in a row of the batch; 0 where unknown. Waits once per forward."""
        if self.changed is None:
            return 0
        if self._most_changed is None:
            self._most_changed = int(self.changed.sum(1).max()) if self.changed.numel() else 0
        return self._most_changed

    def begin(self, arguments: Mapping[str, Any]) -> BlockStep:
        """A forward with these arguments begins."""
        read = self.family.read(arguments)
        last = self._last
        same_cache = self._cache is not None and read.cache is not None and self._cache() is read.cache
        follows = last is not None and same_cache and read.shape[0] == self._rows and read.prefix >= last.prefix
        generation = last.generation if last is not None else -1
        block = last.block if last is not None else -1
        index, changed = 0, None
        if read.cache is None:
            phase: Phase = "whole"
        elif not read.stores:
            phase = "denoise"
        else:
            denoised = follows and last is not None and last.phase == "denoise" and last.prefix == read.prefix
            phase = "commit" if denoised else "prefill"
        if not follows:
            generation, block = generation + 1, -1
        if phase == "denoise":
            in_block = (
                follows
                and last is not None
                and last.phase == "denoise"
                and (last.prefix, last.length) == (read.prefix, read.shape[1])
            )
            if in_block:
                changed, void = self._compare(read.tokens)
                in_block = not void
            if in_block and last is not None:
                index = last.index + 1
            else:
                block, changed = block + 1, None
        self.step = BlockStep(phase, generation, block, index, read.prefix, read.shape[1])
        self.changed, self._most_changed = changed, None
        self._rows = read.shape[0]
        self._tokens = read.tokens.clone() if read.tokens is not None and phase == "denoise" else None
        self._cache = weakref.ref(read.cache) if read.cache is not None else None
        self._last = self.step
        return self.step

    def end(self, raised: bool) -> None:
        """The forward is over; after an exception nothing of its request is remembered."""
        self.step = None
        if raised:
            self.forget()

    def forget(self) -> None:
        """The next forward belongs to another request."""
        self._cache = self._tokens = self.changed = None

    def _compare(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
        """Which tokens changed since the last step, and whether they are those of another request."""
        if tokens is None or self._tokens is None or tokens.shape != self._tokens.shape:
            return None, False
        changed = tokens != self._tokens
        if not self.family.final or self.mask_token is None:
            return changed, False
        # Where committed tokens are final, a change of one means rows of other requests under the same cache.
        return changed, bool((changed & (self._tokens != self.mask_token)).any())


class BlockHook:
    """Forward pre-hook of the model: tells the context of every forward. Nothing under ``torch.compile``."""

    def __init__(self, context: BlockContext):
        self.context = context

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.context.begin(arguments_of(module, args, kwargs))


class BlockEndHook:
    """Forward hook of the model, called after exceptions too."""

    def __init__(self, context: BlockContext):
        self.context = context

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.context.end(raised=output is None)


def arguments_of(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and named arguments of a forward as one mapping."""
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


# -- families ------------------------------------------------------------------------------------------------------


def _tokens_and_shape(arguments: Mapping[str, Any], ids: str) -> tuple[torch.Tensor | None, tuple[int, int]]:
    tokens = arguments.get(ids)
    shaped = tokens if tokens is not None else arguments["inputs_embeds"]
    return tokens, (shaped.shape[0], shaped.shape[1])


def _read_sdar(arguments: Mapping[str, Any]) -> ForwardRead:
    """``store_kv=True`` writes; a forward with a cache and without it only reads."""
    tokens, shape = _tokens_and_shape(arguments, "input_ids")
    cache = arguments.get("past_key_values")
    return ForwardRead(tokens, shape, cache, cache_length(cache), bool(arguments.get("store_kv", False)))


def _read_diffusion_gemma(arguments: Mapping[str, Any]) -> ForwardRead:
    """The decoder never writes; prompt tokens in the same call enter the cache before it reads."""
    cache, prompt = arguments.get("past_key_values"), arguments.get("input_ids")
    canvas = arguments.get("decoder_input_ids")
    prefix = cache_length(cache) + (prompt.shape[1] if prompt is not None else 0)
    if canvas is None:  # the model draws one
        rows = prompt.shape[0] if prompt is not None else 0
        return ForwardRead(None, (rows, 0), cache, prefix, False)
    return ForwardRead(canvas, (canvas.shape[0], canvas.shape[1]), cache, prefix, False)


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
        if all(hasattr(sub, part) for part in parts) and _mentions(type(sub).forward, "store_kv")
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


SDAR = BlockFamily("SDAR class", True, True, True, _read_sdar, _is_sdar)
DIFFUSION_GEMMA = BlockFamily("DiffusionGemma", True, False, False, _read_diffusion_gemma, _is_diffusion_gemma)
LLADA2 = BlockFamily("LLaDA2", True, True, False, _read_uncached, _is_llada2)
FULL = BlockFamily("full bidirectional (LLaDA, Dream)", False, True, False, _read_uncached, _is_full)
FAMILIES = (SDAR, DIFFUSION_GEMMA, LLADA2, FULL)
