"""The self-conditioning of transformers' DiffusionGemma, whose decoder embeds what it predicted one step before.

In the middle of its forward the decoder computes ``matmul(logits.softmax(-1, fp32).to(dtype), weight)``, then scales
it, masks it and passes it through an MLP. Only that product is replaced: ``forward`` is overridden on the instance, and
hands the model's own code, in place of the logits, an object that puts the softmax off until it is multiplied. What the
model does before and after is its own code still.

``torch.compile`` traces all of it. Unlike a hook, an overridden ``forward`` is also seen by what was compiled before.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, Protocol

import torch

from hf_accel.errors import NothingPatched
from hf_accel.hosts.patching.forward_override import override_forward
from hf_accel.hosts.target import Model, kind
from hf_accel.kernels.common import kernel_log
from hf_accel.kernels.common.dispatch import Choice
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import PerRequest, Request, by_key
from hf_accel.sites.embedding.statistics import SelfConditioningStatistics

_ATTRIBUTE = "_hf_accel_self_conditioning"
# Names in the code of a decoder that computes its self-conditioning as described above.
_SPELLED = frozenset({"self_conditioning", "softmax", "matmul", "embed_tokens"})
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SoftEmbedder(Protocol):
    """What is put into the site."""

    def embed(self, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``softmax(logits) @ weight``: ``[B, S, V]`` and ``[V, D]`` -> ``[B, S, D]`` in ``weight``'s dtype."""

    def choice(self, weight: torch.Tensor) -> Choice:
        """Which implementation would run on ``weight``, and why. Asked in compiled models, where no log can be open."""


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no self-conditioning that can be reached, in words; None if it has."""
    name = type(module).__name__
    decoder = _decoder_of(module)
    if decoder is None:
        return (
            f"{name} is a {kind(module)} without DiffusionGemma's self-conditioning (model.decoder.self_conditioning)"
        )
    code = getattr(inspect.unwrap(type(decoder).forward), "__code__", None)
    if code is None or not set(code.co_names) >= _SPELLED:
        return f"{type(decoder).__name__} of this version of transformers computes its self-conditioning another way"
    if _ATTRIBUTE in decoder.__dict__:
        return f"the self-conditioning of this {name} is already taken by another hf_accel method"
    own = decoder.__dict__.get("forward")
    if own is not None and "_old_forward" not in decoder.__dict__:
        return (
            f"the forward of its {type(decoder).__name__} was replaced by another library ({type(own).__name__}); take "
            "that off first, or apply hf_accel before it"
        )
    return None


def install(model: Model, core: SoftEmbedder, ledger: Ledger, report: MethodReport) -> SelfConditioningSeams:
    """Let ``core`` compute the expected embeddings of ``model``'s self-conditioning.

    Raises:
        NothingPatched: it has none that can be reached.
    """
    reason = why_not(model.module)
    decoder = _decoder_of(model.module)
    if reason is not None or decoder is None:
        raise NothingPatched(f"{model.class_name}: {reason}.")
    names = tuple(name for name in inspect.signature(type(decoder).forward).parameters if name != "self")
    seams = SelfConditioningSeams(SelfConditioningSeam(core, names))
    report.run = seams
    ledger.set(decoder, _ATTRIBUTE, seams)
    override_forward(ledger, decoder, types.MethodType(_forward, decoder))
    report.patched.append(Patched(model.name, "model.decoder", "expected embedding of the self-conditioning"))
    return seams


def _decoder_of(module: torch.nn.Module) -> torch.nn.Module | None:
    decoder = getattr(getattr(module, "model", None), "decoder", None)
    parts = ("self_conditioning", "embed_tokens")
    return decoder if isinstance(decoder, torch.nn.Module) and all(hasattr(decoder, p) for p in parts) else None


class SelfConditioningSeam:
    """What one request does at the site on one model; nothing is kept from step to step.

    Args:
        core: computes the embeddings.
        names: the arguments of the decoder's forward, in order.
    """

    def __init__(self, core: SoftEmbedder, names: tuple[str, ...]):
        self.core, self.names, self.run = core, names, SelfConditioningStatistics()

    def fork(self, request: Request) -> SelfConditioningSeam:
        return SelfConditioningSeam(self.core, self.names)

    def record(self, tokens: torch.Tensor, verdict: str) -> None:
        """Count one forward over ``tokens`` ``[B, S]``; ``verdict`` as :func:`_verdict` gives it."""
        run = self.run
        run.forwards += 1
        if verdict == FIRST:
            run.first_steps += 1
        elif verdict != EMBED:
            run.dense_calls[verdict] += 1
        else:
            run.calls += 1
            run.rows += tokens.numel()

    def embed(self, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the core embeds, ``[B, S, V]`` and ``[V, D]`` -> ``[B, S, D]``; the kernels that ran are noted."""
        if torch.compiler.is_compiling():
            return self.core.embed(logits, weight)
        with kernel_log.logging_to(self.run.kernels):
            return self.core.embed(logits, weight)


SelfConditioningSeams = PerRequest[SelfConditioningSeam]

EMBED, FIRST = "embed", "first step"


def _verdict(logits: torch.Tensor | None, weight: torch.Tensor) -> str:
    """``EMBED``, ``FIRST`` where there is nothing to embed, or why the model's own code must run."""
    if logits is None:
        return FIRST
    if torch.is_grad_enabled() and logits.requires_grad:
        return "the logits want a gradient"
    if torch.is_autocast_enabled(logits.device.type):
        return "autocast is on"
    if logits.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"dtypes {logits.dtype} and {weight.dtype}".replace("torch.", "")
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"the embeddings are a {type(weight).__name__}"
    if logits.shape[-1] != weight.shape[0]:
        return "logits over another vocabulary"  # the model says what it thinks of that
    return EMBED


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward, with the product of probabilities and embeddings put off."""
    seams: SelfConditioningSeams | None = getattr(self, _ATTRIBUTE, None)
    if seams is None:  # undone by force, while somebody's wrapper still calls this
        return type(self).forward(self, *args, **kwargs)
    context = seams.shared if torch.compiler.is_compiling() else seams.now()
    arguments = {**dict(zip(context.names, args, strict=False)), **kwargs}
    logits, weight = arguments.get("self_conditioning_logits"), self.embed_tokens.weight
    verdict = _verdict(logits, weight)
    tokens = arguments["decoder_input_ids"]
    if torch.compiler.is_compiling():
        arguments["decoder_input_ids"] = torch.ops.hf_accel.count_self_conditioning(tokens, weight, verdict, seams.key)
    else:
        context.record(tokens, verdict)
    if logits is not None and verdict == EMBED:
        arguments["self_conditioning_logits"] = PendingLogits(logits, context)
    return type(self).forward(self, **arguments)


class PendingLogits:
    """Logits that can do one thing, as the decoder writes it: ``softmax(dim=-1, dtype=torch.float32)``."""

    def __init__(self, logits: torch.Tensor, context: SelfConditioningSeam):
        self.logits, self.context = logits, context

    def softmax(self, dim: int, dtype: torch.dtype) -> PendingProbabilities:
        return PendingProbabilities(self.logits, self.context)


class PendingProbabilities:
    """Probabilities of which nothing but their product with the embeddings will be made."""

    def __init__(self, logits: torch.Tensor, context: SelfConditioningSeam):
        self.logits, self.context = logits, context

    def to(self, dtype: torch.dtype) -> PendingProbabilities:
        return self  # the embeddings' dtype, to which the core rounds by itself

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not torch.matmul or kwargs or not isinstance(args[0], cls):
            return NotImplemented
        pending, weight = args
        return pending.context.embed(pending.logits, weight)


@torch.library.custom_op("hf_accel::count_self_conditioning", mutates_args=())
def _count(tokens: torch.Tensor, weight: torch.Tensor, verdict: str, key: int) -> torch.Tensor:
    """Tell the seam of ``key`` of a compiled forward. Returns a copy of ``tokens``, on which the forward depends."""
    seams = by_key(key)
    if seams is not None:
        context = seams.now()
        context.record(tokens, verdict)
        if verdict == EMBED:
            # The product runs inside the graph, where no log can be opened around it.
            choice = context.core.choice(weight)
            context.run.kernels["soft_embed"] = choice.backend, choice.reason
    return tokens.clone()


@_count.register_fake
def _(tokens, weight, verdict, key):
    return torch.empty_like(tokens)
