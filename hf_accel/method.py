"""What authors of methods import: the base class of every site, the words in which a method declares itself, and the
types of what the functions of a method are handed.

>>> from hf_accel.method import AttentionMethod, Facts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
    from hf_accel.base import Given, Method
    from hf_accel.composition import apart, conflict
    from hf_accel.facts import SITES, Facts, Need, Site
    from hf_accel.hosts.target import Model
    from hf_accel.report import MethodReport, Patched, Skipped
    from hf_accel.sites.adapter.base import AdapterMethod
    from hf_accel.sites.attention.base import AttentionMethod, AttentionRunner, SparseAttentionConfig
    from hf_accel.sites.decoding.base import DecodingMethod, GateMethod
    from hf_accel.sites.decoding.draft import Draft
    from hf_accel.sites.embedding.base import EmbeddingMethod, ResidualMethod, SoftEmbeddingMethod
    from hf_accel.sites.embedding.table import EmbeddingTable
    from hf_accel.sites.kv_cache.base import CodecMethod, KVCacheMethod, PolicyMethod, PrefixCacheMethod
    from hf_accel.sites.linear.base import LinearMethod
    from hf_accel.sites.linear.places import LinearSite
    from hf_accel.sites.prefix_attention.base import PrefixAttentionConfig, PrefixAttentionMethod
    from hf_accel.sites.prefix_attention.call import PrefixCall
    from hf_accel.sites.step_cache.base import OutputCacheMethod, StepCacheMethod
    from hf_accel.sites.step_cache.output import Output
    from hf_accel.sites.surgery.base import Surgery
    from hf_accel.sites.training.base import LossCall, PlainLoss, Recipe

_HOMES = {
    "attention.call": ("AttentionCall", "Layer", "Step", "TokenGrid"),
    "base": ("Given", "Method"),
    "composition": ("apart", "conflict"),
    "facts": ("SITES", "Facts", "Need", "Site"),
    "hosts.target": ("Model",),
    "report": ("MethodReport", "Patched", "Skipped"),
    "sites.adapter.base": ("AdapterMethod",),
    "sites.attention.base": ("AttentionMethod", "AttentionRunner", "SparseAttentionConfig"),
    "sites.decoding.base": ("DecodingMethod", "GateMethod"),
    "sites.decoding.draft": ("Draft",),
    "sites.embedding.base": ("EmbeddingMethod", "ResidualMethod", "SoftEmbeddingMethod"),
    "sites.embedding.table": ("EmbeddingTable",),
    "sites.kv_cache.base": ("CodecMethod", "KVCacheMethod", "PolicyMethod", "PrefixCacheMethod"),
    "sites.linear.base": ("LinearMethod",),
    "sites.linear.places": ("LinearSite",),
    "sites.prefix_attention.base": ("PrefixAttentionConfig", "PrefixAttentionMethod"),
    "sites.prefix_attention.call": ("PrefixCall",),
    "sites.step_cache.base": ("OutputCacheMethod", "StepCacheMethod"),
    "sites.step_cache.output": ("Output",),
    "sites.surgery.base": ("Surgery",),
    "sites.training.base": ("LossCall", "PlainLoss", "Recipe"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SITES", "AdapterMethod", "AttentionCall", "AttentionMethod", "AttentionRunner", "CodecMethod",
    "DecodingMethod", "Draft", "EmbeddingMethod", "EmbeddingTable", "Facts", "GateMethod", "Given",
    "KVCacheMethod", "Layer", "LinearMethod", "LinearSite", "LossCall", "Method", "MethodReport", "Model", "Need",
    "Output", "OutputCacheMethod", "Patched", "PlainLoss", "PolicyMethod", "PrefixAttentionConfig",
    "PrefixAttentionMethod", "PrefixCacheMethod", "PrefixCall", "Recipe", "ResidualMethod", "Site", "Skipped",
    "SoftEmbeddingMethod", "SparseAttentionConfig", "Step", "StepCacheMethod", "Surgery", "TokenGrid", "apart",
    "conflict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazily: an author's module wants one base class, and each knows the libraries of its site.
    if name in _HOME_OF:
        import importlib

        return getattr(importlib.import_module(f"hf_accel.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'hf_accel.method' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
