"""Sampling from block-causal diffusion language models that come without a loop of their own (SDAR class: SDAR, TraDo).

The text is written block by block (SDAR, arXiv 2510.06303). Finished blocks are frozen in a K/V cache, which is exact
because later blocks are invisible to them; the active block starts as mask tokens and runs again at every denoising
step, in which a commit rule (:mod:`hf_accel.generation.block_diffusion.commit_rules`) turns some of them into text.

Decisions where the released sampler leaves none (it serves one prompt at a time):

* Rows of a batch count their blocks from their own first token. They are laid out so that the *active* blocks align:
  whole blocks of padding go in front of shorter prefixes, and what is left of a prompt (its last, partial block) stands
  at the head of the first active block. So a batch computes what its rows compute one by one.
* A row that is finished leaves the batch, and the cache, before the next block: that copies the rows that stay once,
  where an idle row would have its whole prefix read again at every step to come. Within a block it idles, and it goes
  along when the block is written to the cache: methods on the model know that forward by its rows.
* The last block is denoised at full length, as trained, and cut. A row stops as soon as all that is wanted of its block
  is committed, tokens before a committed stop token included: committed tokens are final, so this changes nothing.
* `temperature=0` is the most probable token (the released sampler divides by it), and the mask token is never drawn.

The model is only ever called: whatever is put on it works here. Nothing is kept on it, so an exception or an interrupt
leaves nothing behind.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.generation.block_diffusion.canvas import Canvas, Prompt
from hf_accel.generation.block_diffusion.commit_rules import (
    DEFAULT_THRESHOLD,
    RULES,
    commit,
    even_split,
    propose,
)
from hf_accel.hosts.block_families import DIFFUSION_GEMMA, FULL, LLADA2, SDAR, family_of, mask_token_of
from hf_accel.hosts.caches import new_dynamic_cache
from hf_accel.hosts.target import kind, unwrap
from hf_accel.requests import its_own_request

if TYPE_CHECKING:
    from transformers import LogitsProcessorList
    from transformers.generation.streamers import BaseStreamer

OWNER = "generate_blocks"


@dataclass(frozen=True)
class BlockGeneration:
    """What :func:`generate_blocks` did.

    Attributes:
        sequences: int64 ``[B, L + n]``: the prompts as given, then the new tokens; padding behind a row's end.
        lengths: new tokens of each row, its stop token included.
        denoising_steps: denoising forwards each row needed, as if it had been alone.
        steps_per_block: denoising forwards of each block of the batch.
        forwards: all calls of the model: prefill, denoising, and the one that writes a finished block to the cache.
    """

    sequences: Tensor
    lengths: list[int]
    denoising_steps: list[int]
    steps_per_block: list[int]
    forwards: int

    @property
    def blocks(self) -> int:
        """Blocks that were denoised."""
        return len(self.steps_per_block)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoising forward of a row. What a stop token or ``max_new_tokens`` cut off is not counted."""
        return sum(self.lengths) / sum(self.denoising_steps)


@its_own_request
@torch.no_grad()  # not inference mode: what a method on the model remembers would be unusable outside of it
def generate_blocks(
    model: torch.nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    block_length: int | None = None,
    steps: int | None = None,
    rule: str = "dynamic",
    threshold: float | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    logits_processor: LogitsProcessorList | None = None,
    streamer: BaseStreamer | None = None,
    progress: bool = False,
    prefill_chunk: int = 2048,
    return_dict: bool = False,
) -> Tensor | BlockGeneration:
    """Generate with a block-causal diffusion language model of the SDAR class.

    Args:
        model: ``SDARForCausalLM`` (SDAR, TraDo, ``zoo/mini-sdar``), plain, patched, compiled, or in a PeftModel.
        input_ids: int64 ``[B, L]``, padded on the left if the prompts differ in length.
        attention_mask: ``[B, L]``, 0 at padding. Without it the pad tokens in front of a row are its padding, unless
            the pad token is also a stop or begin token.
        max_new_tokens: at most this many per row.
        block_length: tokens per block; the length the model was trained with (``config.block_size``) if not given.
        steps: at most this many denoising forwards per block, 1 to ``block_length``; as many as a block has tokens if
            not given. Every rule commits at least its even share of the block at each step.
        rule: ``"dynamic"``, ``"static"``, ``"sequential"``, ``"threshold"``, ``"entropy"``
            (:func:`hf_accel.generation.block_diffusion.commit_rules.commit`).
        threshold: of the rule: a probability in [0, 1] (0.85 for dynamic, 0.9 for threshold if not given), or for
            ``"entropy"`` nats >= 0 (0.1).
        temperature: 0 is greedy; above it tokens are drawn and ``generator`` is required.
        top_k, top_p: of what is drawn from; 0 and 1.0 leave out nothing.
        generator: one for all rows, or one per row: then a row draws the same whatever batch it is in. The global
            random state is not touched.
        mask_token_id, eos_token_id, pad_token_id: from the model's configuration if not given. Several stop tokens may
            be given; ``[]`` stops at none.
        logits_processor: transformers' list, called for all positions of the block at once: scores ``[B * b, V]``
            float32, with the row's tokens up to the end of the block (``pad_token_id`` in front, mask tokens where
            nothing is committed yet) as ``input_ids``. Processors that depend on the position of a token in the text
            have no meaning here.
        streamer: of transformers; gets the prompt, then the tokens of each finished block. One row only.
        progress: a bar over the blocks.
        prefill_chunk: prompt tokens per forward, in whole blocks; the mask of a chunk is ``[chunk, prefix + chunk]``.
        return_dict: return a :class:`BlockGeneration`.

    Returns:
        int64 ``[B, L + n]`` on the model's device, ``n`` the length of the longest row: prompts as given, new tokens,
        and padding behind a row's stop token. Or a :class:`BlockGeneration`.

    Raises:
        NotApplicable: the model cannot be sampled this way; says what to use instead.
        InvalidSetting: a setting, or the prompt, that does not fit.
    """
    base = _checked_model(model)
    block = _block_length(base, block_length)
    steps = block if steps is None else _integer("steps", steps, 1, block, f"from 1 to block_length ({block})")
    mask_token, stops, pad = _special_tokens(base, mask_token_id, eos_token_id, pad_token_id)
    sampling = _Sampling(
        rule=rule,
        threshold=_threshold(rule, threshold),
        shares=even_split(block, steps),
        mask_token=mask_token,
        temperature=_number("temperature", temperature, 0, math.inf),
        top_k=_integer("top_k", top_k, 0),
        top_p=_number("top_p", top_p, 0, 1),
        processors=logits_processor,
    )
    _integer("max_new_tokens", max_new_tokens, 1)
    _integer("prefill_chunk", prefill_chunk, 1)
    prompt = _prompt(base, input_ids, attention_mask, stops, pad, mask_token)
    batch = len(prompt.lengths)
    if streamer is not None and batch != 1:
        raise InvalidSetting(OWNER, "streamer", streamer, f"None for {batch} rows: a streamer follows one")
    device = _device(base, prompt.ids)
    streams = _streams(generator, temperature, batch, device)
    filler = pad if pad is not None else (stops[0] if stops else 0)
    canvas = Canvas(prompt, block, max_new_tokens, mask_token, filler, stops, device)
    _check_positions(base, canvas, prompt, block, max_new_tokens)
    if model.training:
        warnings.warn("generate_blocks: the model is in training mode; call model.eval() first.", stacklevel=3)

    network = _Network(model, base)
    chunk = max(prefill_chunk // block, 1) * block
    for low in range(0, canvas.start, chunk):
        network.store(*canvas.prefix(low, min(low + chunk, canvas.start)))
    if streamer is not None:
        streamer.put(prompt.ids.cpu())

    steps_of_rows, steps_per_block = [0] * batch, []
    with _bar(progress, canvas.blocks) as bar:
        for number in range(canvas.blocks):
            tokens, mask, positions = canvas.block(number)
            drawn_from = [streams[row] for row in canvas.rows] if streams else None
            tokens, stopped, taken = _denoise(network, canvas, number, tokens, mask, positions, sampling, drawn_from)
            canvas.write(number, tokens)
            for row, count in zip(canvas.rows, taken, strict=True):
                steps_of_rows[row] += count
            steps_per_block.append(max(taken))
            bar.update()
            if streamer is not None:
                streamer.put(canvas.new_tokens(number))
            kept = canvas.going_on(number, stopped)
            if not kept:
                break
            network.store(tokens, mask, positions)
            if len(kept) < len(canvas.rows):
                canvas.keep(kept)
                network.keep(kept)

    sequences, lengths = canvas.text()
    if streamer is not None:
        streamer.end()
    if not return_dict:
        return sequences
    return BlockGeneration(sequences, lengths, steps_of_rows, steps_per_block, network.forwards)


@dataclass(frozen=True)
class _Sampling:
    rule: str
    threshold: float
    shares: list[int]
    mask_token: int
    temperature: float
    top_k: int
    top_p: float
    processors: LogitsProcessorList | None


def _denoise(
    network: _Network,
    canvas: Canvas,
    number: int,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    sampling: _Sampling,
    streams: list[torch.Generator] | None,
) -> tuple[Tensor, list[bool], list[int]]:
    """Write one block: its tokens ``[B, b]``, which rows met a stop token, and how many steps each row took."""
    taken, stopped = [0] * len(tokens), [False] * len(tokens)
    unfinished = [True] * len(tokens)
    for share in sampling.shares:
        logits = network.denoise(tokens, mask, positions)
        if sampling.processors is not None:
            so_far: Any = canvas.so_far(number, tokens).repeat_interleave(tokens.shape[1], dim=0)
            scores: Any = logits.float().flatten(0, 1)
            logits = sampling.processors(so_far, scores).view_as(logits)
        proposal = propose(
            logits,
            banned=sampling.mask_token,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            # A row whose block is finished draws no more: its stream must not depend on how long others take.
            streams=[s if now else None for s, now in zip(streams, unfinished, strict=True)] if streams else (),
            entropy=sampling.rule == "entropy",
        )
        chosen = commit(
            sampling.rule,
            tokens == sampling.mask_token,
            proposal.confidence,
            count=share,
            threshold=sampling.threshold,
            entropy=proposal.entropy,
        )
        tokens = torch.where(chosen, proposal.token, tokens)
        taken = [count + now for count, now in zip(taken, unfinished, strict=True)]
        open_, stopped = canvas.look(number, tokens)  # the one wait of a step
        unfinished = [left > 0 for left in open_]
        if not any(unfinished):
            break
    return tokens, stopped, taken


class _Network:
    """Forwards of the model, with the cache of the frozen blocks."""

    def __init__(self, model: torch.nn.Module, base: torch.nn.Module):
        self._model = model
        self._cache = new_dynamic_cache()
        # Logits of a forward that only fills the cache are not read: the released models can leave most of them out.
        trims = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self._unread = {"logits_to_keep": 1} if trims else {}
        self.forwards = 0

    def _call(self, tokens: Tensor, mask: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        self.forwards += 1
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **kwargs,
        )
        return output.logits

    def denoise(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, b, V]`` of the active block; the cache is only read."""
        return self._call(tokens, mask, positions, store_kv=False).to(tokens.device)

    def store(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Freeze clean blocks: their K/V enter the cache."""
        self._call(tokens, mask, positions, store_kv=True, **self._unread)

    def keep(self, kept: list[int]) -> None:
        """Go on with these rows; indices on the CPU, since layers may lie on different devices."""
        self._cache.batch_select_indices(torch.tensor(kept))


# -- what was asked for --------------------------------------------------------------------------------------------


def _checked_model(model: Any) -> Any:
    """The network inside wrappers, if this sampler can serve it."""
    if not isinstance(model, torch.nn.Module):
        hint = "; pass the model itself (LLaDA2Pipeline has its own loop)" if hasattr(model, "components") else ""
        raise NotApplicable(f"generate_blocks needs a loaded language model; got {type(model).__name__}{hint}.")
    base = unwrap(model)
    name, family = type(base).__name__, family_of(base)
    if family is SDAR:
        if base.get_output_embeddings() is None:  # type: ignore[operator]
            raise NotApplicable(f"{name} has no language-model head; load it with AutoModelForCausalLM.")
        return base
    if family is DIFFUSION_GEMMA:
        reason = "it has a loop of its own and no mask token: call model.generate(...)"
    elif family is LLADA2:
        reason = "its sampler edits committed tokens: use LLaDA2Pipeline of diffusers"
    elif family is FULL:
        reason = (
            "it attends over the whole sequence both ways, so no block is ever final and no prefix can be cached "
            "exactly: use the sampler that comes with its code"
        )
    else:
        reason = (
            f"it is no block-diffusion model but a {kind(base)}, as far as its structure tells: looked for attentions "
            "that write the cache when told store_kv=True (SDARForCausalLM and its like)"
        )
    raise NotApplicable(f"generate_blocks cannot sample from {name}: {reason}.")


def _configured(base: Any, name: str) -> Any:
    """A token id as ``generate`` finds it: generation configuration first, then the model's."""
    for config in (getattr(base, "generation_config", None), base.config):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return None


def _block_length(base: Any, given: Any) -> int:
    trained = getattr(base.config, "block_size", None)
    if given is None:
        if trained is None:
            expected = "given: the model's configuration has no block_size"
            raise InvalidSetting(OWNER, "block_length", given, expected)
        return int(trained)
    if trained is None:
        return _integer("block_length", given, 1)
    expected = (
        f"from 1 to {trained}, the length of the blocks {type(base).__name__} was trained with (config.block_size; "
        "correct that if it is wrong)"
    )
    block = _integer("block_length", given, 1, trained, expected)
    if block < trained:
        warnings.warn(
            f"generate_blocks: block_length={block} is shorter than the {trained} the model was trained with; it never "
            "saw a prefix end inside a block, and quality may suffer.",
            stacklevel=4,
        )
    return block


def _special_tokens(
    base: Any, mask_token: Any, eos: int | Sequence[int] | None, pad: Any
) -> tuple[int, list[int], int | None]:
    size = base.get_input_embeddings().weight.shape[0]
    mask_token = mask_token_of(base) if mask_token is None else mask_token
    if mask_token is None:
        expected = "given: the model's configuration has no mask_token_id"
        raise InvalidSetting(OWNER, "mask_token_id", mask_token, expected)
    valid = f"a token id from 0 to {size - 1}"
    _integer("mask_token_id", mask_token, 0, size - 1, valid)
    eos = _configured(base, "eos_token_id") if eos is None else eos
    if isinstance(eos, Tensor):
        eos = eos.tolist()
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for token in stops:
        _integer("eos_token_id", token, 0, size - 1, f"{valid}, or several of them")
    if mask_token in stops:
        raise InvalidSetting(OWNER, "eos_token_id", mask_token, "other than the mask token, which is never drawn")
    pad = _configured(base, "pad_token_id") if pad is None else pad
    if pad is not None and pad != -1:  # some configurations say -1 for none
        return mask_token, stops, _integer("pad_token_id", pad, 0, size - 1, valid)
    return mask_token, stops, None


def _prompt(base: Any, ids: Any, mask: Any, stops: list[int], pad: int | None, mask_token: int) -> Prompt:
    found: Any
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidSetting(OWNER, "input_ids", found, "a tensor of token ids, int64 [B, L]")
    if ids.numel() == 0:
        raise InvalidSetting(OWNER, "input_ids", list(ids.shape), "[B, L] with at least one row and one token")
    if mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
        if pad is not None and pad not in stops and pad != _configured(base, "bos_token_id"):
            real = torch.ne(ids, pad).cumsum(-1) > 0
    elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidSetting(OWNER, "attention_mask", found, f"a tensor like input_ids, {list(ids.shape)}")
    else:
        real = mask.to(ids.device).bool()
    size = base.get_input_embeddings().weight.shape[0]
    holes = (real[:, 1:] < real[:, :-1]).any(-1)
    masked = ((ids == mask_token) & real).any(-1)
    foreign = (((ids < 0) | (ids >= size)) & real).any(-1)
    lengths, *wrong = torch.stack([real.sum(-1), holes, masked, foreign]).tolist()
    complaints = (
        ("attention_mask", "a 0 behind a 1", "1 from some place on: pad on the left (padding_side='left')"),
        ("input_ids", "the mask token", f"free of the mask token ({mask_token}), which marks what is to be written"),
        ("input_ids", "a foreign id", f"ids from 0 to {size - 1}, the rows of the model's embedding"),
    )
    for row, length in enumerate(lengths):
        if length == 0:
            raise InvalidSetting(OWNER, "input_ids", f"row {row}: only padding", "at least one token in every row")
        for (name, found, expected), rows in zip(complaints, wrong, strict=True):
            if rows[row]:
                raise InvalidSetting(OWNER, name, f"row {row}: {found}", expected)
    return Prompt(ids, lengths)


def _check_positions(base: Any, canvas: Canvas, prompt: Prompt, block: int, max_new_tokens: int) -> None:
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and canvas.positions_needed > positions:
        raise InvalidSetting(
            OWNER,
            "max_new_tokens",
            max_new_tokens,
            f"small enough for the {positions} positions of {type(base).__name__} (config.max_position_embeddings): "
            f"the longest prompt, of {max(prompt.lengths)} tokens, and the new ones need {canvas.positions_needed} "
            f"in whole blocks of {block}",
        )


def _threshold(rule: Any, given: Any) -> float:
    if rule not in RULES:
        raise InvalidSetting(OWNER, "rule", rule, f"one of {', '.join(RULES)}")
    if given is None:
        return DEFAULT_THRESHOLD.get(rule, 1.0)
    if rule == "entropy":
        return _number("threshold", given, 0, math.inf)
    return _number("threshold", given, 0, 1)


def _integer(name: str, value: Any, least: int, most: int | None = None, expected: str | None = None) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not good:
        raise InvalidSetting(OWNER, name, value, expected or f"a whole number of at least {least}")
    return value


def _number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    if not good or math.isinf(value):
        expected = f"a number in [{least}, {most}]" if math.isfinite(most) else f"a finite number of at least {least}"
        raise InvalidSetting(OWNER, name, value, expected)
    return float(value)


def _streams(generator: Any, temperature: float, batch: int, device: torch.device) -> list[torch.Generator]:
    """A random stream per row, on ``device``, seeded from what the user gave; none if greedy."""
    if temperature == 0:
        return []
    given = [generator] if isinstance(generator, torch.Generator) else generator
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in given):
        raise InvalidSetting(OWNER, "generator", generator, "a torch.Generator, or one per row, for temperature > 0")
    if len(given) not in (1, batch):
        raise InvalidSetting(OWNER, "generator", f"{len(given)} generators", f"one, or one per row ({batch})")
    each = batch // len(given)
    seeds = [torch.randint(2**63 - 1, (each,), generator=one, device=one.device).tolist() for one in given]
    return [torch.Generator(device).manual_seed(seed) for row in seeds for seed in row]


def _device(base: Any, ids: Tensor) -> torch.device:
    """Where the model takes its input; with its weights offloaded that is not where they lie."""
    device = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    device = torch.device(base.device if device is None else device)
    return ids.device if device.type == "meta" else device


def _bar(shown: bool, blocks: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=blocks, unit="block", disable=not shown)
