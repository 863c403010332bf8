"""The K/V cache seam: layers of a fresh ``DynamicCache`` become layers that store what the method says.

A pre-hook on the model looks at the cache of every forward. One that is empty yet, made by ``generate``, by the caller
or (where none is given) here, has its plain layers exchanged in place; so it works from turn to turn, with beams, and
with assisted generation, which crops. Other layers (sliding windows, linear attention) stay as they are and are
counted, and so are forwards whose cache began before the method came.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hf_accel.errors import NotApplicable
from hf_accel.hosts.block_families import family_of
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import PerRequest, Request
from hf_accel.sites.kv_cache import transformers as host
from hf_accel.sites.kv_cache.statistics import CacheStatistics


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no K/V cache whose layers could be exchanged, in words; None if it has."""
    name = type(module).__name__
    if kind(module) != "language model":
        return f"{name} is a {kind(module)}, not a language model with a K/V cache"
    if family_of(module) is not None:
        return f"{name} writes by block diffusion; its sampler owns the cache"
    config: Any = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder, whose cache has a second half that no method here is written for"
    if "past_key_values" not in inspect.signature(type(module).forward).parameters:
        return f"the forward of {name} takes no past_key_values"
    return None


def install(model: Model, method: Any, ledger: Ledger, report: MethodReport) -> CacheSeams:
    """Let ``method`` store what caches of ``model`` hold. It fills the slots whose functions it has: ``encode`` and
    ``decode``, or ``keep``, or both.

    Raises:
        NotApplicable: the model has no such cache.
    """
    reason = why_not(model.module)
    if reason is not None:
        raise NotApplicable(f"{model.class_name}: {reason}.")
    seam = CacheSeam(method)
    seams = CacheSeams(seam)
    report.run = seams
    ledger.pre_hook(model.module, CacheHook(seams))
    slots = " and ".join(slot for slot, there in (("codec", seam.encodes), ("policy", seam.keeps)) if there)
    report.patched.append(Patched(model.name, "", f"{slots} of the K/V cache"))
    return seams


class CacheSeam:
    """What a method does to the caches of one request on one model. What is kept is in the caches."""

    def __init__(self, method: Any):
        self.method, self.run = method, CacheStatistics()
        self.encodes, self.keeps = hasattr(method, "encode"), hasattr(method, "keep")

    def fork(self, request: Request) -> CacheSeam:
        return CacheSeam(self.method)

    def take(self, cache: Any, arguments: dict[str, Any]) -> None:
        """One forward begins with this cache."""
        self.run.forwards += 1
        if not host.is_dynamic(cache):
            self.run.dense_calls[f"the cache is a {type(cache).__name__}, not a DynamicCache"] += 1
            return
        if self.keeps and host.is_padded(arguments.get("attention_mask")):
            raise NotApplicable(
                f"{self.method.name} drops tokens from the cache by their position, which padding moves; this batch is "
                "padded. Run prompts of one length together, or one by one."
            )
        if cache.get_seq_length() == 0:
            self.run.caches += 1
            self.run.plain_layers.update(host.exchange_layers(cache))
            self.run.follow(cache)
        elif not host.has_slots(cache):
            self.run.dense_calls["the cache began before the method was applied"] += 1
            return
        host.fill_slots(cache, self.method if self.encodes else None, self.method if self.keeps else None)


CacheSeams = PerRequest[CacheSeam]


class CacheHook:
    """Forward pre-hook of the language model: hands its cache to the seam, and makes one where the model would."""

    def __init__(self, seams: CacheSeams):
        self.seams = seams

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        uses = given.get("use_cache")
        if cache is None and not (module.config.use_cache if uses is None else uses):
            return args, kwargs
        if cache is None:
            cache = host.fresh_cache(module.config)
            given["past_key_values"] = cache
        run_eagerly(self._take, cache, given)
        return (), given

    def _take(self, cache: Any, given: dict[str, Any]) -> None:
        self.seams.now().take(cache, given)
