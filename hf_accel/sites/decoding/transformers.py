"""Drafters and gates inside plain ``model.generate(...)``, by transformers' own assisted decoding.

Two entries stand in the model's ``__dict__`` while a method does: ``generate``, which sees whether this call can be
assisted and if so brings a decoding loop of ours (``custom_generate``, which is called when all inputs are prepared),
and ``_get_candidate_generator``, by which transformers' ``_assisted_decoding`` comes to the drafter. What it verifies,
how it samples and how caches are cropped is transformers' own code.
"""

from __future__ import annotations

import contextvars
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode

from hf_accel.errors import HFAccelError
from hf_accel.hosts.target import Model, is_a, kind
from hf_accel.ledger import Ledger, describe_replacement
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import Counters, PerRequest
from hf_accel.sites.decoding.draft import Draft
from hf_accel.sites.decoding.statistics import DecodingStatistics

_SEAM = "_hf_accel_decoding"
_ENTRIES = ("generate", "_get_candidate_generator")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no decoding site, in words; None if it has."""
    name = type(module).__name__
    if not is_a(module, "transformers", "PreTrainedModel") or not isinstance(module, GenerationMixin):
        return f"{name} is a {kind(module)} without transformers' generate()"
    if type(module).generate is not GenerationMixin.generate:
        return f"{name} has a generate() of its own, which takes no drafts"
    config: Any = module.config
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder, whose prompt a drafter does not see"
    if module._is_stateful:
        return f"{name} keeps a state that cannot go back to before a rejected draft"
    if _SEAM not in module.__dict__ and any(entry in module.__dict__ for entry in _ENTRIES):
        return f"generate() of this {name} was replaced on the instance; take that off first"
    return None


def install(model: Model, method: Any, roles: tuple[str, ...], ledger: Ledger, report: MethodReport) -> DecodingSeam:
    """Let ``method`` draft, or say when to, in every ``generate`` of this model."""
    part = Part(method, PerRequest(Counters(DecodingStatistics())), roles)
    report.run = part.runs
    change = RoleChange(model.module, part)
    change.redo()
    ledger.record(change)
    report.patched += [Patched(model.name, "generate", role) for role in roles]
    return model.module.__dict__[_SEAM]


@dataclass
class Part:
    """One method at the decoding site of one model."""

    method: Any
    runs: PerRequest[Counters]
    roles: tuple[str, ...]

    @property
    def run(self) -> DecodingStatistics:
        """Of the request that runs."""
        return self.runs.now().run


@dataclass
class DecodingSeam:
    """What stands at the decoding site of one model; there while anything does."""

    parts: list[Part] = field(default_factory=list)
    entries: dict[str, types.MethodType] = field(default_factory=dict)

    def holder(self, role: str) -> Part | None:
        return next((part for part in self.parts if role in part.roles), None)


@dataclass
class RoleChange:
    """A method takes its part. Parts share the entries in the model, so that they come off in any order."""

    module: Any
    part: Part
    seam: DecodingSeam | None = None  # the very same comes back if this is undone and done again

    def redo(self) -> None:
        own = self.module.__dict__
        if _SEAM not in own:
            if self.seam is None:
                functions = {"generate": _generate, "_get_candidate_generator": _get_candidate_generator}
                entries = {name: types.MethodType(function, self.module) for name, function in functions.items()}
                self.seam = DecodingSeam(entries=entries)
            own[_SEAM] = self.seam
            own.update(self.seam.entries)
        self.seam = own[_SEAM]
        own[_SEAM].parts.append(self.part)

    def blocked(self) -> str | None:
        own = self.module.__dict__
        for name, entry in own[_SEAM].entries.items():
            if own.get(name, entry) is not entry:
                return describe_replacement(self.module, name, own[name])
        return None

    def undo(self) -> None:
        own = self.module.__dict__
        seam = own[_SEAM]
        seam.parts[:] = [part for part in seam.parts if part is not self.part]
        if not seam.parts:
            del own[_SEAM]
            for name, entry in seam.entries.items():
                if own.get(name) is entry:
                    del own[name]


# -- in place of functions of the model ----------------------------------------------------------------------------


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model's class, assisted where that can be."""
    own = type(self).generate
    seam: DecodingSeam | None = self.__dict__.get(_SEAM)
    if seam is None:  # undone by force, while somebody's wrapper still calls this
        return own(self, *args, **kwargs)
    given = inspect.signature(own).bind(self, *args, **kwargs).arguments
    reason = _why_plain(self, seam, given)
    if reason is not None:
        _count_plain(seam, reason)
        return own(self, *args, **kwargs)
    # transformers hands these to no loop but its own.
    passed = {name: given[name] for name in ("streamer",) if given.get(name) is not None}

    def decode(model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
               generation_config: Any, **model_kwargs: Any) -> Any:  # fmt: skip
        arguments = {
            "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
            "generation_config": generation_config, **passed, **model_kwargs,
        }  # fmt: skip
        reason = _why_plain_now(input_ids, model_kwargs)
        if reason is not None:
            _count_plain(seam, reason)
            return type(model)._sample(model, input_ids, **arguments)
        for part in seam.parts:
            part.run.generations += 1
        token = _CANDIDATES.set(Candidates(model, seam, generation_config))
        try:
            return type(model)._assisted_decoding(model, input_ids, **arguments)
        finally:
            _CANDIDATES.reset(token)

    return own(self, *args, **kwargs, custom_generate=decode)


def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Our drafter for the call of ``generate`` that is being assisted, else what the class has."""
    candidates = _CANDIDATES.get()
    if candidates is not None and candidates.model is self:
        return candidates
    return type(self)._get_candidate_generator(self, *args, **kwargs)


def _why_plain(model: Any, seam: DecodingSeam, given: Mapping[str, Any]) -> str | None:
    """Why transformers cannot assist this call, by its arguments; None if nothing in them speaks against it."""
    more = dict(given.get("kwargs", {}))
    if seam.holder("drafter") is None:
        return "no drafter on the model"
    if given.get("custom_generate") is not None:
        return "custom_generate was given"
    if more.get("inputs_embeds") is not None:
        return "the prompt was given as inputs_embeds"
    if more.get("cache_implementation") == "paged":
        return "cache_implementation='paged'"
    for name in ("tokenizer", "assistant_tokenizer", "trust_remote_code"):
        more.pop(name, None)
    config, _ = model._prepare_generation_config(given.get("generation_config"), **more)
    if given.get("assistant_model") is not None or any(getattr(config, name, None) for name in _OWN_ASSISTANTS):
        return "transformers' own assistant was asked for"
    mode = config.get_generation_mode(None)
    if getattr(config, "dola_layers", None) is not None or mode not in _MODES:
        return f"generation mode {mode.value}"
    if config.num_return_sequences not in (None, 1):
        return "several texts for one prompt"
    # Looked at after every round, not after every token, they would let a text go on.
    if given.get("stopping_criteria") or config.stop_strings is not None or config.max_time is not None:
        return "stopping criteria beside length and end of text"
    if config.guidance_scale not in (None, 1) or config.watermarking_config is not None:
        return "a logits processor with a state of its own (guidance_scale, watermarking_config)"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r}"
    if config.token_healing:
        return "token_healing"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    if given.get("synced_gpus") or _in_step(model):
        return "processes that generate in step (synced_gpus)"
    return None


_OWN_ASSISTANTS = ("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")


def _why_plain_now(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> str | None:
    """Why this call cannot be assisted, now that batch and cache are known."""
    if input_ids.shape[0] > 1:
        return "batch > 1"
    if input_ids.shape[1] == 0:
        return "a prompt without tokens"
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache") or cache is None:
        return "no key-value cache (use_cache=False)"
    if type(cache) is not DynamicCache:
        return f"a {type(cache).__name__}, which may not go back to before a rejected draft"
    return None


def _in_step(model: Any) -> bool:
    """Whether transformers would keep the processes of this model together, as ``generate`` decides by itself."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    return torch.distributed.get_world_size() > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def _count_plain(seam: DecodingSeam, reason: str) -> None:
    for part in seam.parts:
        part.run.plain[reason] += 1


# -- one call of generate ------------------------------------------------------------------------------------------


class Candidates(CandidateGenerator):
    """The drafter of one call of ``generate``, as transformers asks for it: round by round."""

    def __init__(self, model: Any, seam: DecodingSeam, config: Any):
        self.model, self.max_length = model, config.max_length
        self.parts = list(seam.parts)
        self.states = [part.method.new_state() for part in self.parts]
        self.vocabulary = model.config.get_text_config().vocab_size
        self.samples = bool(config.do_sample)
        self.length, self.draft = 0, Draft.nothing()

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]  # logits may lack, says its own docstring
        self.length, self.draft = input_ids.shape[1], self._drafted(input_ids)
        if not len(self.draft):
            return input_ids, None
        tokens = self.draft.tokens.to(input_ids.device)[None]
        logits = self.draft.logits[None] if self.draft.logits is not None and self.samples else None
        return torch.cat([input_ids, tokens], 1), logits

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        added = input_ids[0, self.length :]
        both = min(len(added), len(self.draft))
        equal = added[:both] == self.draft.tokens[:both].to(added.device)
        accepted = int(equal.long().cumprod(0).sum())
        for part, state in zip(self.parts, self.states, strict=True):
            part.run.record_round(len(self.draft), accepted, len(added))
            part.method.verified(state, input_ids, self.draft, accepted)

    def _drafted(self, tokens: torch.Tensor) -> Draft:
        # The model adds a token of its own to what it accepts.
        room = self.max_length - tokens.shape[1] - 1
        for part, state in zip(self.parts, self.states, strict=True):
            if "gate" in part.roles and room > 0 and not part.method.worth_drafting(state, tokens):
                self._count("gated")
                return Draft.nothing()
        drafter, state = next(
            (part.method, state) for part, state in zip(self.parts, self.states, strict=True) if "drafter" in part.roles
        )
        draft = drafter.draft(state, tokens) if room > 0 else Draft.nothing()
        if draft.parents is not None:
            self._count("trees")
        draft = draft.first_path().shortened(max(room, 0))
        if not len(draft):
            self._count("empty")
        elif int(draft.tokens.min()) < 0 or int(draft.tokens.max()) >= self.vocabulary:
            raise HFAccelError(
                f"{drafter.name} drafted {draft.tokens.tolist()}; expected ids of 0..{self.vocabulary - 1}, the "
                f"vocabulary of {type(self.model).__name__}."
            )
        return draft

    def _count(self, what: str) -> None:
        for part in self.parts:
            setattr(part.run, what, getattr(part.run, what) + 1)


# One for every call in every thread: two texts generated on one model at once do not meet.
_CANDIDATES: contextvars.ContextVar[Candidates | None] = contextvars.ContextVar("hf_accel_candidates", default=None)
