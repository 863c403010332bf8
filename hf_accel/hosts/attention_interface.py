"""transformers' table of attention functions: ours in it, what stood there before, and who reads our names.

``AttentionInterface`` and ``AttentionMaskInterface`` are public. Entries of ours have a name made of a prefix and the
implementation that the model runs, and last as long as a patched model needs them
(:class:`~hf_accel.hosts.patching.registration.SharedRegistration`).

A model's configuration never holds such a name: users read it, copy it, save it and set other implementations. Only
the attention modules read one, from a view of the configuration (:func:`renamed`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_accel.ledger import Ledger

NATIVE = ("sdpa", "eager")  # implementations that our functions can stand in front of

# Arguments of an attention function that change what it computes: a method that does not know them must not run.
ALTERING = ("softcap", "s_aux", "position_bias", "cache", "indices")

_STANDING: set[str] = set()  # prefixes whose functions are registered


def register(prefix: str, function: Callable) -> Callable[[], None]:
    """Enter an attention function once for each implementation that it can stand in front of, under ``prefix`` and the
    implementation's name, which it is given first; returns what removes the entries."""
    from transformers import AttentionInterface

    for implementation in NATIVE:
        AttentionInterface.register(prefix + implementation, functools.partial(function, implementation))
    _STANDING.add(prefix)

    def remove() -> None:
        _STANDING.discard(prefix)
        for implementation in NATIVE:
            AttentionInterface._global_mapping.pop(prefix + implementation, None)

    return remove


def asks_for_its_name(cls: type) -> bool:
    """Whether a class of attention modules does different things under the names of :data:`NATIVE`, beside calling the
    function of that name. Under a name of ours it would do what it does for neither."""
    try:
        source = inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in|not in)\s[^\n]*(sdpa|eager)", source) is not None


def native_function(implementation: str, module: torch.nn.Module) -> Callable:
    """The attention function that ``module`` would have called."""
    if implementation == "eager":  # each modeling file has its own
        files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
        return next(found for file in files if (found := getattr(file, "eager_attention_forward", None)) is not None)
    from transformers import AttentionInterface

    return AttentionInterface()[implementation]


def read_renamed(attentions: Iterable[Any], prefix: str, ledger: Ledger) -> None:
    """Let attention modules read the name of their implementation with ``prefix`` in front of it."""
    views: dict[int, Any] = {}
    for attention in attentions:
        config = attention.config
        if id(config) not in views:
            views[id(config)] = renamed(config, prefix)
        ledger.set(attention, "config", views[id(config)])


def renamed(config: Any, prefix: str) -> Any:
    """A configuration in which the attention implementation has ``prefix`` in front of its name, for attention modules
    to read.

    It is a view: all else in it is the same as in ``config``, now and later. So ``model.set_attn_implementation(...)``
    and changes of the configuration reach the attention module as before. An implementation that is none of
    :data:`NATIVE` keeps its name, and so runs without ours; so do all once our functions are not registered any more,
    for the copy of a layer that outlives the method.
    """
    base: Any = type(config)

    def name(view: Any) -> str | None:
        implementation = view._attn_implementation_internal
        return prefix + implementation if implementation in NATIVE and prefix in _STANDING else implementation

    def set_name(view: Any, value: Any) -> None:
        config._attn_implementation = value

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_attn_implementation": property(name, set_name),
        # Copies of a layer have a view of the copied configuration; other copies are plain configurations.
        "__deepcopy__": lambda view, memo: renamed(copy.deepcopy(config, memo), prefix),
        "__copy__": lambda view: copy.copy(config),
        "__reduce_ex__": lambda view, protocol: config.__reduce_ex__(protocol),
    }
    view: Any = object.__new__(type(base.__name__, (base,), members))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view
