"""QWHA as a tuner of peft: which modules get an adapter, several adapters made one, packed weights made dense."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.hosts.target import unwrap
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.adapter.peft.backends import backend_of
from hf_accel.sites.adapter.peft.qwha.batches import names_for_layers
from hf_accel.sites.adapter.peft.qwha.coefficients import Coefficients, add_up
from hf_accel.sites.adapter.peft.qwha.layer import PARTS, QWHALinear, factor_bits, why_unsupported

# The paper adapts every projection of a block.
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_MODULES: dict[str, Any] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _PROJECTIONS),
}


class QWHAModel(BaseTuner):
    """QWHA adapters (arXiv 2509.17428) on a model; made by ``peft.get_peft_model(model, QWHAConfig(...))``."""

    prefix = "qwha_"
    tuner_layer_cls = QWHALinear
    target_module_mapping = TARGET_MODULES

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, QWHALinear):
            target.update_layer(adapter_name, peft_config)
            return
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        options = get_quantization_kwargs(self.model)
        reason = why_unsupported(base, backend_of(base, **options))
        if reason is not None:
            # The first words are peft's, which tools match.
            raise NotApplicable(
                f"Target module {type(base).__name__} is not supported. {current_key} cannot have a QWHA adapter: "
                f"{reason}. Adapters go on nn.Linear, Conv1D, PackedLinear and quantised linears that peft knows; "
                "leave it out of target_modules."
            )
        wrapped = QWHALinear(target, adapter_name, peft_config, current_key, **options)
        if adapter_name not in self.active_adapters:
            wrapped.requires_grad_(False)
        self._replace_module(parent, target_name, wrapped, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What ``PeftModel`` enters around ``forward`` and ``generate``: an adapter for each sample, where the call has
        ``adapter_names``. Without this peft would drop that argument and give all samples the active adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        known = {name for _, layer in self._layers() for name in layer.qwha_values}
        beams = kwargs.get("num_beams")
        with names_for_layers(self, names, known, beams if isinstance(beams, int) else 1):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Also keep every dW where the file was saved under another ``alpha`` or ``scale``: values times old over new
        factor. Equal factors leave values as they are, bit by bit. Layers learn which parts the file has of them, to
        tell a damaged file from ``ignore_mismatched_sizes=True``."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        here = {name: module for name, module in model.named_modules() if isinstance(module, QWHALinear)}
        for name, module in here.items():
            at = {part: f"{name}.{part}.{adapter_name}" for part in PARTS}
            module.offered[adapter_name] = {part for part, key in at.items() if key in state_dict}
            needed = {"qwha_factor", "qwha_values"}
            if adapter_name not in module.qwha_factor or not needed <= module.offered[adapter_name]:
                continue
            saved, wanted = state_dict[at["qwha_factor"]].cpu(), module.qwha_factor[adapter_name].cpu()
            if saved.shape != wanted.shape or saved.dtype != wanted.dtype or torch.equal(saved, wanted):
                continue
            values = state_dict[at["qwha_values"]]
            ratio = saved.view(torch.float32).double() / wanted.view(torch.float32).double()
            state_dict[at["qwha_values"]] = (values.double() * ratio.to(values.device)).to(values.dtype)
            state_dict[at["qwha_factor"]] = wanted.to(state_dict[at["qwha_factor"]].device)
        return state_dict

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter whose update is the weighted sum of those of others, exactly. It is not active yet.

        Args:
            adapters: names of adapters on this model.
            weights: a factor for each.
            adapter_name: of the new one; an adapter of that name must not exist.
            combination_type: "cat" takes all positions, each once, so the new one may have as many coefficients as all
                together. "linear" adds coefficient by coefficient and keeps the budget, which needs adapters with the
                same positions: those trained from one initialisation.

        Raises:
            InvalidSetting: unknown or too many names, or "linear" for adapters with other positions.
        """
        owner = "add_weighted_adapter"
        unknown = [name for name in adapters if name not in self.peft_config]
        if not adapters or unknown:
            # "Adapter ... does not exist" and "Invalid combination_type" are peft's, which tools match.
            told = "".join(f" (Adapter {name} does not exist)" for name in unknown[:1])
            among = f"among {', '.join(self.peft_config)}{told}"
            raise InvalidSetting(owner, "adapters", unknown or list(adapters), among)
        if len(weights) != len(adapters):
            raise InvalidSetting(owner, "weights", list(weights), f"{len(adapters)} numbers, one per adapter")
        if adapter_name in self.peft_config:
            raise InvalidSetting(owner, "adapter_name", adapter_name, "a new name; delete_adapter frees one")
        if combination_type not in ("cat", "linear"):
            allowed = f"'cat' or 'linear' (Invalid combination_type: {combination_type})"
            raise InvalidSetting(owner, "combination_type", combination_type, allowed)
        sums: dict[str, Coefficients] = {}
        for name, layer in self._layers():
            here = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.qwha_values]
            if here:
                sums[name] = _weighted(name, layer, here, combination_type)
        config: Any = copy.deepcopy(self.peft_config[adapters[0]])
        config.coefficients_pattern = {re.escape(name): len(found.values) for name, found in sums.items()}
        config.target_modules, config.exclude_modules = set(sums), None
        config.layers_to_transform = config.layers_pattern = None
        config.init_weights = True
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, layer in self._layers():
            if name in sums:
                layer.set_coefficients(adapter_name, sums[name])

    def _layers(self) -> list[tuple[str, QWHALinear]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, QWHALinear)]


@torch.no_grad()
def _weighted(name: str, layer: QWHALinear, parts: list[tuple[str, float]], kind: str) -> Coefficients:
    found = []
    for adapter, weight in parts:
        own = layer.coefficients([adapter])
        found.append(own._replace(values=own.values.double() * weight))
    if kind == "cat":
        return add_up(found, layer.in_features)
    first = found[0]
    for other in found[1:]:
        if not (torch.equal(first.indptr, other.indptr) and torch.equal(first.columns, other.columns)):
            raise InvalidSetting(
                "add_weighted_adapter",
                "combination_type",
                kind,
                f"'cat': the adapters have other positions in {name}, which 'linear' cannot add",
            )
    return first._replace(values=torch.stack([part.values for part in found]).sum(0))


@torch.no_grad()
def merge_into_dense(
    model: nn.Module, adapter_names: Sequence[str] | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Dequantise every packed linear of ours and merge the adapters, QWHA's and peft's: a dense model without adapters,
    changed in place.

    Base and update are added in fp32 and rounded once to ``dtype``. What is not packed keeps its dtype.

    Args:
        model: a PeftModel, or a model with injected adapters.
        adapter_names: None is the active ones.
        dtype: of the weights that were packed.

    Returns:
        The model that was wrapped.

    Raises:
        NotImplementedError: of peft, for adapters that are no change of a weight (aLoRA).
    """
    names = None if adapter_names is None else list(adapter_names)
    for parent in list(model.modules()):
        if isinstance(parent, BaseTunerLayer):
            continue
        for attribute, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, attribute, _merged(child, names, dtype))
            elif isinstance(child, AuxiliaryTrainingWrapper):
                plain = child.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=names)
                setattr(parent, attribute, plain)
            elif isinstance(child, PackedLinear):
                setattr(parent, attribute, _dense(child, child.dequantize_weight(dtype)))
    inner: Any = unwrap(model)
    for name in ("peft_config", "hf_quantizer"):
        inner.__dict__.pop(name, None)
    if getattr(inner, "_hf_peft_config_loaded", False):
        inner._hf_peft_config_loaded = False
    if getattr(getattr(inner, "config", None), "quantization_config", None) is not None:
        del inner.config.quantization_config
    if getattr(inner, "is_quantized", False):
        inner.is_quantized = False
    return inner


def _merged(layer: BaseTunerLayer, adapter_names: list[str] | None, dtype: torch.dtype) -> nn.Module:
    """The base of a layer with its adapters merged; of a layer around a layer, the inner one's first."""
    tuners: list[Any] = [layer]
    while isinstance(tuners[-1].base_layer, BaseTunerLayer):
        tuners.append(tuners[-1].base_layer)
    packed = tuners[-1].base_layer
    if isinstance(packed, PackedLinear):
        tuners[-1].base_layer = _dense(packed, packed.dequantize_weight(torch.float32))
        for tuner in tuners:
            tuner.quantization_backend = None
    for tuner in reversed(tuners):
        wanted = tuner.active_adapters if adapter_names is None else adapter_names
        if not set(tuner.merged_adapters) <= set(wanted):
            tuner.unmerge()
        if set(tuner.merged_adapters) != set(wanted):
            tuner.merge(adapter_names=wanted)
    base: Any = layer.get_base_layer()
    return base.to(dtype) if isinstance(packed, PackedLinear) else base


def _dense(packed: PackedLinear, weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(
        packed.in_features, packed.out_features, packed.bias is not None, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.to(weight.dtype), requires_grad=False)
    return linear.train(packed.training)


__all__ = ["TARGET_MODULES", "QWHAModel", "factor_bits", "merge_into_dense"]
