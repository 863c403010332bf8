"""What others put on the models that our methods stand on: diffusers' caches, adapters, offloading, compilation.

Each is one entry of :data:`FOREIGN`: how it is recognised, which site it takes, how it comes off. Whether it goes
together with a method is decided where that is decided for two methods: ``method.conflict``.

diffusers keeps its hooks in a registry on every module, under names of its own; a cache is known by those names, since
``enable_cache`` leaves its configuration on the model, but ``apply_first_block_cache`` and its like do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.facts import HOSTS, Host
from hf_accel.hosts.target import is_a
from hf_accel.hosts.walk import modules

_REGISTRY = "_diffusers_hook"


@dataclass(frozen=True)
class Foreign:
    """Something that shares a model with our methods.

    Attributes:
        name: as its users know it.
        what: one line for the reader of the compatibility page.
        site: the site of ``method.Site`` that it takes, or None if it takes none.
        hosts: kinds of networks it is found on, of those that a method takes.
        off: what the user writes to take it off.
        seen: ``module -> bool``, whether it stands on this one submodule.
        trace: attribute of a submodule's own without which it does not stand there; empty: the submodule's class tells.
        hooks: names of its diffusers hooks.
        replaces_forward: it overrides the ``forward`` of the whole model.
        reads_places: it computes on where tokens stand, so that they must stand in raster order.
        note: what a user of an attention method should know who has both.
    """

    name: str
    what: str
    site: str | None
    hosts: frozenset[Host]
    off: str
    seen: Callable[[Any], bool]
    trace: str
    hooks: tuple[str, ...] = ()
    replaces_forward: bool = False
    reads_places: bool = False
    note: str = ""

    def how_to_remove(self, module: torch.nn.Module, name: str) -> str:
        """What the user writes to take it off this model, which is called ``name``."""
        if self.off.endswith(".disable_cache()") and not hasattr(module, "disable_cache"):
            registry = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize({name})"
            return "; ".join(f"{registry}.remove_hook({hook!r}, recurse=True)" for hook in self.hooks)
        return self.off.replace("model.", f"{name}.").replace("(model)", f"({name})")


def standing(module: torch.nn.Module) -> list[Foreign]:
    """What of :data:`FOREIGN` stands on a model (or anywhere inside it), in the order of the table."""
    found: set[str] = set()
    classes: set[type] = set()
    for sub in modules(module):
        own, cls = sub.__dict__, type(sub)
        for trace, entries in _BY_TRACE.items():
            if trace in own:
                found.update(entry.name for entry in entries if entry.seen(sub))
        if cls not in classes:
            classes.add(cls)
            found.update(entry.name for entry in _BY_CLASS if entry.seen(sub))
    return [entry for entry in FOREIGN if entry.name in found]


def reader_of_places(module: torch.nn.Module) -> str | None:
    """Name of something on the whole model that computes on where tokens stand; None if there is nothing."""
    registry = getattr(module, _REGISTRY, None)
    if registry is not None:
        for entry in _READERS:
            if any(hook in registry.hooks for hook in entry.hooks):
                return entry.name
    return None


def hooks_on(module: torch.nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers on this very module, by name."""
    registry = module.__dict__.get(_REGISTRY)
    return registry.hooks if registry is not None else {}


def _hooked(*names: str) -> Callable[[Any], bool]:
    def seen(module: Any) -> bool:
        return any(name in hooks_on(module) for name in names)

    return seen


def _cache(
    name: str, what: str, hooks: tuple[str, ...], hosts: tuple[Host, ...], note: str = "", **facts: Any
) -> Foreign:
    return Foreign(
        name,
        what,
        facts.pop("site", "step cache"),
        frozenset(hosts),
        "model.disable_cache()",
        _hooked(*hooks),
        _REGISTRY,
        hooks,
        note=note or "attention that it skips is neither computed nor counted",
        **facts,
    )


def _deepcache_package(module: Any) -> bool:
    """Its helper puts closures in place of forwards; they say which package they are from."""
    own = module.__dict__.get("forward")
    origin = getattr(inspect.unwrap(own), "__module__", None) if callable(own) else None
    return str(origin).partition(".")[0] == "DeepCache"


def _adapter(module: Any) -> bool:
    return is_a(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def _compiled(module: Any) -> bool:
    return module.__dict__.get("_compiled_call_impl") is not None


def _offloaded(module: Any) -> bool:
    return "_hf_hook" in module.__dict__


def _offloaded_by_blocks(module: Any) -> bool:
    """Offloading by leaves hooks leaves only, and leaves the forwards of blocks alone."""
    return bool(module._modules) and _hooked("group_offloading")(module)


_SINGLE = (
    "attention that it skips is neither computed nor counted; in a compiled model, where it skips some attentions and "
    "not others, calls are counted for the wrong layers: leave the model eager, or cache all attentions alike"
)

FOREIGN: tuple[Foreign, ...] = (
    _cache(
        "FirstBlockCache",
        "diffusers: all blocks but the first are skipped while the first one's residual barely changes",
        ("fbc_leader_block_hook", "fbc_block_hook"),
        ("transformer",),
    ),
    _cache(
        "TaylorSeer",
        "diffusers: outputs of attentions, or of named modules, are extrapolated between full steps",
        ("taylorseer_cache",),
        ("transformer", "unet"),
        _SINGLE,
    ),
    _cache(
        "PyramidAttentionBroadcast",
        "diffusers: outputs of attentions are reused for some steps",
        ("pyramid_attention_broadcast",),
        ("transformer", "unet"),
        _SINGLE,
    ),
    _cache(
        "FasterCache",
        "diffusers: attentions and the unconditional half of a batch are approximated from earlier steps",
        ("faster_cache_denoiser", "faster_cache_block"),
        ("transformer", "unet"),
        _SINGLE + "; methods that move tokens leave them in place, since it takes spatial frequencies of the output",
        replaces_forward=True,
        reads_places=True,
    ),
    _cache(
        "MagCache",
        "diffusers: all blocks are skipped by a table of how much each step changes",
        ("mag_cache_leader_block_hook", "mag_cache_block_hook"),
        ("transformer",),
    ),
    _cache(
        "SeaCache",
        "diffusers: all blocks are skipped while the filtered latents barely change",
        ("sea_cache_root", "sea_cache_leader_block", "sea_cache_block", "sea_cache_post_norm"),
        ("transformer",),
        "attention that it skips is neither computed nor counted; methods that move tokens leave them in place, since "
        "it takes spatial frequencies of the latents",
        replaces_forward=True,
        reads_places=True,
    ),
    _cache(
        "TextKVCache",
        "diffusers: keys and values of the text, computed once (exact; NucleusMoE models only)",
        ("text_kv_cache_transformer", "text_kv_cache_block"),
        (),
        site="kv cache",
    ),
    Foreign(
        "DeepCacheSDHelper",
        "the DeepCache package: outputs of deep U-Net blocks are reused for some steps",
        "step cache",
        frozenset({"unet"}),
        "helper.disable()",
        _deepcache_package,
        "forward",
        replaces_forward=True,
        note="attention that it skips is neither computed nor counted",
    ),
    Foreign(
        "peft adapters",
        "LoRA and every other adapter that peft puts on a model's layers",
        "adapter",
        HOSTS,
        "model.delete_adapters(...)",
        _adapter,
        "",
    ),
    Foreign(
        "torch.compile",
        "model.compile(), compile_repeated_blocks() or torch.compile(model)",
        None,
        HOSTS,
        "not needed",
        _compiled,
        "_compiled_call_impl",
    ),
    Foreign(
        "CPU offload",
        "accelerate: enable_model_cpu_offload(), enable_sequential_cpu_offload()",
        None,
        HOSTS,
        "pipe.remove_all_hooks()",
        _offloaded,
        "_hf_hook",
    ),
    Foreign(
        "group offload",
        "diffusers: enable_group_offload(offload_type='block_level'); by leaves it touches nothing of ours",
        None,
        frozenset({"transformer", "unet"}),
        "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook('group_offloading')",
        _offloaded_by_blocks,
        _REGISTRY,
        replaces_forward=True,
    ),
)

# A model has a thousand modules, of which nearly all carry nothing of anybody's: they are asked for traces only.
_BY_CLASS = tuple(entry for entry in FOREIGN if not entry.trace)
_BY_TRACE = {
    trace: tuple(entry for entry in FOREIGN if entry.trace == trace)
    for trace in dict.fromkeys(entry.trace for entry in FOREIGN if entry.trace)
}
_READERS = tuple(entry for entry in FOREIGN if entry.reads_places)
