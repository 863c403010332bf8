"""Where block diffusion stands: which block, which denoising step of it, what is frozen in front of it.

A block-diffusion language model writes block after block. The K/V of finished blocks are frozen in a cache; the active
block runs again at every denoising step. Methods on such a model need to know which forward is a *prefill* (prompt
blocks enter the cache), a *denoise* step (reads the cache, never writes it) or a *commit* (the clean tokens of a
finished block enter the cache), and when what they remember is void: at a new block, a new request, or an exception.

A :class:`BlockContext` learns all this from the arguments of the model's forwards (:func:`follow` puts the hooks);
samplers, ours or foreign, need not know of it. Where the hooks stand and how the arguments are read differs per family
of models and is found by structure (:func:`family_of`), since most of these models are remote code.

A context follows one request at a time, as a model with one cache does; a copy of the model has a clock of its own.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hf_accel.hosts.target import is_a
from hf_accel.ledger import Ledger

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


class BlockContext:
    """State of the block clock on one model.

    Args:
        family: of the model.
        mask_token: id of open positions, if the family has one.
        tokens: whether to compare the tokens of one step with those of the last. Needed by whoever keeps state between
            steps; waits for the device once per denoising step.

    Attributes:
        step: the forward that runs now; None outside of one.
        changed: bool ``[B, n]``, tokens that differ from those of the last denoising step of this block; None at a
            block's first step.
        most_changed: the largest number of changed tokens in a row of the batch; 0 where there is none to compare with.
    """

    def __init__(self, family: BlockFamily, mask_token: int | None = None, tokens: bool = True):
        self.family, self.mask_token, self.tokens = family, mask_token, tokens
        self.step: BlockStep | None = None
        self.changed: torch.Tensor | None = None
        self.most_changed = 0
        self._last: BlockStep | None = None
        self._tokens: torch.Tensor | None = None
        self._cache: weakref.ref | None = None
        self._conditioned = False
        self._rows = 0

    def __deepcopy__(self, memo: dict) -> BlockContext:
        twin = type(self)(self.family, self.mask_token, self.tokens)
        memo[id(self)] = twin
        return twin  # the request that runs is the original's

    def begin(self, arguments: Mapping[str, Any], read: Reader | None = None) -> BlockStep:
        """A forward with these arguments begins. ``read`` is the family's unless the module has one of its own."""
        given = (read or self.family.read)(arguments)
        phase, follows = self._phase(given)
        last = self._last
        generation, block, index = (last.generation, last.block, 0) if last is not None else (-1, -1, 0)
        self.changed, self.most_changed = None, 0
        if phase == "denoise" and follows and last is not None:
            same_block = last.phase == "denoise" and (last.prefix, last.length) == (given.prefix, given.shape[1])
            relation = self._relation(given) if same_block else "another block"
            follows = relation != "another request"
            if relation == "next step":
                index = last.index + 1
            else:
                self.changed, self.most_changed = None, 0
        if not follows:
            generation, block = generation + 1, -1
        if phase == "denoise" and index == 0:
            block += 1
        self.step = self._last = BlockStep(phase, generation, block, index, given.prefix, given.shape[1])
        self._rows, self._conditioned = given.shape[0], given.conditioned
        keep = self.tokens and phase == "denoise" and given.tokens is not None
        self._tokens = given.tokens.clone() if keep and given.tokens is not None else None
        self._cache = weakref.ref(given.cache) if given.cache is not None else None
        return self.step

    def end(self, raised: bool) -> None:
        """The forward is over; after an exception nothing of its request is remembered."""
        self.step = None
        if raised:
            self.forget()

    def forget(self) -> None:
        """The next forward belongs to another request."""
        self._cache = self._tokens = self.changed = None
        self.most_changed = 0

    def _phase(self, given: ForwardRead) -> tuple[Phase, bool]:
        """What this forward is, and whether it belongs to the request of the last one."""
        last = self._last
        if given.cache is None or last is None:
            return ("whole" if given.cache is None else "prefill" if given.stores else "denoise"), False
        same = self._cache is not None and self._cache() is given.cache
        follows = same and given.shape[0] == self._rows and given.prefix >= last.prefix
        if not given.stores:
            return "denoise", follows
        if follows and last.phase == "denoise" and last.prefix == given.prefix:
            return "commit", True
        return "prefill", follows and given.prefix > 0  # a cache that was emptied fills anew

    def _relation(self, given: ForwardRead) -> Literal["next step", "another block", "another request"]:
        """What two denoising forwards behind the same prefix are to each other; notes the changed tokens."""
        if self._conditioned and not given.conditioned:
            return "another block"  # which begins without the prediction of a step before it
        if not self.tokens:
            return "next step"
        if given.tokens is None or self._tokens is None:
            return "another block"  # nobody can tell
        self.changed = given.tokens != self._tokens
        most = self.changed.sum(1).max()
        if self.family.masked and self.mask_token is not None:
            # A committed position that is open again: rows of another request under the same cache.
            opened = (self.changed & (given.tokens == self.mask_token)).any()
            self.most_changed, again = torch.stack([most, opened.to(most.dtype)]).tolist()
            return "another request" if again else "next step"
        self.most_changed = int(most)
        return "next step"


class BlockHook:
    """Forward pre-hook of a watched module: tells the context of every forward. Nothing under ``torch.compile``."""

    def __init__(self, context: BlockContext, read: Reader | None = None):
        self.context, self.read = context, read

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.context.begin(arguments_of(module, args, kwargs), self.read)


class BlockEndHook:
    """Forward hook of a watched module, called after exceptions too."""

    def __init__(self, context: BlockContext):
        self.context = context

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.context.end(raised=output is None)


def follow(
    module: torch.nn.Module,
    context: BlockContext,
    ledger: Ledger,
    begin: Callable[[Reader], BlockHook] | None = None,
    end: BlockEndHook | None = None,
) -> None:
    """Put the hooks on a model of the context's family.

    Args:
        begin: makes the pre-hook of a watched module from its reader; None: a :class:`BlockHook`.
        end: hook after each; None: a :class:`BlockEndHook`.
    """
    for watched, read in context.family.watched(module):
        ledger.pre_hook(watched, BlockHook(context, read) if begin is None else begin(read))
        ledger.post_hook(watched, BlockEndHook(context) if end is None else end)


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
