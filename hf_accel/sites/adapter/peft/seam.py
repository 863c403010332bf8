"""The questions that peft asks about a base layer, answered for packed linears of ours too.

peft knows quantised linears by closed lists of other libraries' classes; its one open seam is private and per
configuration (``LoraConfig._register_custom_module``), which a user would have to know. So some of its functions get a
stand-in that answers for :class:`~hf_accel.quant.packed_linear.PackedLinear` and leaves everything else to peft's own:

====================================  =================================================================================
``dispatch_gptq``                     which layer LoRA puts around it: :class:`.packed_lora.PackedLoraLinear`
``resolve_quantization_backend``      how BOFT, MiSS, OFT, SHiRA and VeRA know it: by ``PackedBackend``
``dequantize_module_weight``          what its weight is, for DoRA: ``PackedLinear.weight`` has no numbers
``BaseTunerLayer.get_base_weight``    likewise for layers that stood there before the weight was packed
``_maybe_include_all_linear_layers``  whether ``target_modules="all-linear"`` means it: yes
``BaseTuner._check_merge_allowed``    whether a model can be merged: no, said before any layer is
``check_adapters_to_merge``           whether a layer can be merged: no; ``weight.data`` would take it, to no effect
====================================  =================================================================================

Tuners that take ``nn.Linear`` only (IA3, LoHa, LoKr, AdaLoRA, FourierFT, ...) go on refusing packed linears, as they
refuse bitsandbytes'. Where peft lacks one of these, none is replaced and a warning says so.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES

from hf_accel.errors import NotApplicable
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.adapter.peft.backends import ALTERNATIVES, PackedBackend
from hf_accel.sites.adapter.peft.packed_lora import PackedLoraLinear

Function = Callable[..., Any]


def extend_peft() -> None:
    """Put the stand-ins in their places. Twice is as once."""
    homes = {name: _module(path) for name, (path, _) in _FUNCTIONS.items()}
    missing = [f"{_FUNCTIONS[name][0]}.{name}" for name, home in homes.items() if not hasattr(home, name)]
    missing += [f"{owner.__name__}.{name}" for name, (owner, _) in _METHODS.items() if not hasattr(owner, name)]
    if missing:
        warnings.warn(
            f"hf_accel: peft {peft.__version__} has no {', '.join(missing)}; its adapters will not go on packed "
            "linears (QWHA's do). This hf_accel was tested with peft 0.21.2.",
            stacklevel=2,
        )
        return
    for name, (_, make) in _FUNCTIONS.items():
        theirs = getattr(homes[name], name)
        _replace(_holders(name, theirs), name, theirs, make)
    for name, (owner, make) in _METHODS.items():
        _replace([owner], name, getattr(owner, name), make)


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return None


def _holders(name: str, function: Function) -> list[Any]:
    """The modules of peft that hold a function: importing one by name copies it."""
    return [
        module
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == "peft" and vars(module).get(name) is function
    ]


def _replace(holders: list[Any], name: str, theirs: Function, make: Callable[[Function], Function]) -> None:
    if hasattr(theirs, "_hf_accel_stands_for"):
        return
    ours: Any = functools.wraps(theirs)(make(theirs))
    ours._hf_accel_stands_for = theirs
    for holder in holders:
        setattr(holder, name, ours)


def _dispatching(theirs: Function) -> Function:
    def dispatch(target: torch.nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> torch.nn.Module | None:
        if isinstance(_base(target), PackedLinear):
            kwargs.pop("parameter_name", None)
            return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
        return theirs(target, adapter_name, config=config, **kwargs)

    return dispatch


def _resolving(theirs: Function) -> Function:
    def resolve(base_layer: torch.nn.Module, **kwargs: Any) -> Any:
        return PackedBackend() if isinstance(base_layer, PackedLinear) else theirs(base_layer, **kwargs)

    return resolve


def _dequantising(theirs: Function) -> Function:
    def dequantize(module: torch.nn.Module) -> torch.Tensor:
        return module.dequantize_weight() if isinstance(module, PackedLinear) else theirs(module)

    return dequantize


def _reading(theirs: Function) -> Function:
    def get_base_weight(self: BaseTunerLayer) -> torch.Tensor:
        base = self.get_base_layer()
        return base.dequantize_weight() if isinstance(base, PackedLinear) else theirs(self)

    return get_base_weight


def _including(theirs: Function) -> Function:
    def include(peft_config: Any, model: torch.nn.Module) -> Any:
        targets = getattr(peft_config, "target_modules", None)
        found = theirs(peft_config, model)
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            found.target_modules |= _packed_targets(model, found.task_type)
        return found

    return include


def _packed_targets(model: torch.nn.Module, task_type: Any) -> set[str]:
    """Packed linears that are no heads, by name; those that have adapters count by their adapter, which peft sees."""
    heads = {getattr(model, "get_output_embeddings", lambda: None)()}
    if task_type == peft.TaskType.SEQ_CLS:
        heads |= {getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES}
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and module not in heads and not name.startswith(adapted)
    }


def _checking_models(theirs: Function) -> Function:
    def check(self: BaseTuner) -> None:
        layers = ((n, m) for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer))
        packed = [name for name, layer in layers if isinstance(layer.get_base_layer(), PackedLinear)]
        if packed:
            raise _unmergeable(f"{packed[0]}{f' and {len(packed) - 1} more' if packed[1:] else ''}")
        theirs(self)

    return check


def _checking_layers(theirs: Function) -> Function:
    def check(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
        if isinstance(module.get_base_layer(), PackedLinear):
            raise _unmergeable(f"a {type(module).__name__}")
        return theirs(module, adapter_names)

    return check


def _unmergeable(what: str) -> NotApplicable:
    return NotApplicable(f"The base of {what} is packed; nothing can be merged into it. {ALTERNATIVES}.")


def _base(target: Any) -> torch.nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


_FUNCTIONS: dict[str, tuple[str, Callable[[Function], Function]]] = {
    "dispatch_gptq": ("peft.tuners.lora.gptq", _dispatching),
    "resolve_quantization_backend": ("peft.utils.quantization_utils", _resolving),
    "dequantize_module_weight": ("peft.utils.integrations", _dequantising),
    "_maybe_include_all_linear_layers": ("peft.tuners.tuners_utils", _including),
    "check_adapters_to_merge": ("peft.tuners.tuners_utils", _checking_layers),
}
_METHODS: dict[str, tuple[type, Callable[[Function], Function]]] = {
    "_check_merge_allowed": (BaseTuner, _checking_models),
    "get_base_weight": (BaseTunerLayer, _reading),
}

__all__ = ["extend_peft"]
