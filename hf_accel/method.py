"""What authors of methods import: the base class of every site, and the words in which a method declares itself.

>>> from hf_accel.method import AttentionMethod, Facts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_accel.base import Given, Method
    from hf_accel.composition import apart, conflict
    from hf_accel.facts import SITES, Facts, Need, Site
    from hf_accel.sites.adapter.base import AdapterMethod
    from hf_accel.sites.attention.base import AttentionMethod, AttentionRunner, SparseAttentionConfig
    from hf_accel.sites.decoding.base import DecodingMethod, GateMethod
    from hf_accel.sites.decoding.draft import Draft
    from hf_accel.sites.embedding.base import EmbeddingMethod, ResidualMethod, SoftEmbeddingMethod
    from hf_accel.sites.kv_cache.base import CodecMethod, KVCacheMethod, PolicyMethod, PrefixCacheMethod
    from hf_accel.sites.linear.base import LinearMethod
    from hf_accel.sites.prefix_attention.base import PrefixAttentionConfig, PrefixAttentionMethod
    from hf_accel.sites.step_cache.base import OutputCacheMethod, StepCacheMethod
    from hf_accel.sites.surgery.base import Surgery
    from hf_accel.sites.training.base import LossCall, PlainLoss, Recipe

_HOMES = {
    "base": ("Given", "Method"),
    "composition": ("apart", "conflict"),
    "facts": ("SITES", "Facts", "Need", "Site"),
    "sites.adapter.base": ("AdapterMethod",),
    "sites.attention.base": ("AttentionMethod", "AttentionRunner", "SparseAttentionConfig"),
    "sites.decoding.base": ("DecodingMethod", "GateMethod"),
    "sites.decoding.draft": ("Draft",),
    "sites.embedding.base": ("EmbeddingMethod", "ResidualMethod", "SoftEmbeddingMethod"),
    "sites.kv_cache.base": ("CodecMethod", "KVCacheMethod", "PolicyMethod", "PrefixCacheMethod"),
    "sites.linear.base": ("LinearMethod",),
    "sites.prefix_attention.base": ("PrefixAttentionConfig", "PrefixAttentionMethod"),
    "sites.step_cache.base": ("OutputCacheMethod", "StepCacheMethod"),
    "sites.surgery.base": ("Surgery",),
    "sites.training.base": ("LossCall", "PlainLoss", "Recipe"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SITES", "AdapterMethod", "AttentionMethod", "AttentionRunner", "CodecMethod", "DecodingMethod", "Draft",
    "EmbeddingMethod", "Facts", "GateMethod", "Given", "KVCacheMethod", "LinearMethod", "LossCall", "Method",
    "Need", "OutputCacheMethod", "PlainLoss", "PolicyMethod", "PrefixAttentionConfig", "PrefixAttentionMethod",
    "PrefixCacheMethod", "Recipe", "ResidualMethod", "Site", "SoftEmbeddingMethod", "SparseAttentionConfig",
    "StepCacheMethod", "Surgery", "apart", "conflict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazily: an author's module wants one base class, and each knows the libraries of its site.
    if name in _HOME_OF:
        import importlib

        return getattr(importlib.import_module(f"hf_accel.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'hf_accel.method' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
