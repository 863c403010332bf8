"""transformers' quantizer seam: GPTQ checkpoints read and written with our packed linears."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GPTQConfig

from hf_accel.checkpoints.gptq.layout import (
    QUANT_METHOD,
    GPTQSettings,
    check_complete,
    checkpoint_state,
    dequantize,
    finish,
    packed_parts,
    put_packed,
    read_headers,
    read_settings,
)
from hf_accel.errors import NotApplicable, QuantizationError
from hf_accel.hosts.layer_lists import is_linear
from hf_accel.hosts.patching.registration import replace_entries
from hf_accel.ledger import Ledger
from hf_accel.quant.packed_linear import PackedLinear


class PackedGPTQConfig(GPTQConfig):
    """transformers' own config of the method, with the fields of other tools that it would drop."""

    def __init__(self, **fields: Any):
        kept = {
            name: fields.pop(name) for name in ("dynamic", "lm_head", "pack_dtype", "static_groups") if name in fields
        }
        # The base class looks for optimum as soon as this one is given.
        names = fields.pop("modules_in_block_to_quantize", None)
        super().__init__(**{"act_group_aware": False} | fields)
        self.modules_in_block_to_quantize = names
        for name, value in kept.items():
            setattr(self, name, value)


# transformers compares the names of these classes when a config is handed to from_pretrained as well.
PackedGPTQConfig.__name__ = GPTQConfig.__name__


class PackedQuantizer(HfQuantizer):
    """Puts empty packed linears where the checkpoint has packed ones, before its tensors are loaded into the model."""

    requires_calibration = False
    quantization_config: PackedGPTQConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, PackedLinear] = {}
        self._had_groups: dict[str, bool] = {}
        self._twins: dict[str, str] = {}

    @property
    def settings(self) -> GPTQSettings:
        return read_settings(self.quantization_config.to_dict())

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise NotApplicable(
                "This checkpoint is not quantised. Load it without quantization_config, then "
                "hf_accel.apply(model, 'gptq', bits=..., calibration=..., tokenizer=...)."
            )
        _ = self.settings  # says what is wrong with them before anything is downloaded

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise QuantizationError(
                "A GPTQ checkpoint is read from its files, which say what is packed; from_pretrained got a state_dict."
            )
        plan = getattr(model.config, "distributed_config", None)
        if plan is not None:
            raise NotApplicable("Packed linears cannot be sharded over devices. Load with device_map, without tp_plan.")
        headers = read_headers(checkpoint_files)
        parts = packed_parts(headers)
        rename = Renaming(model)
        settings = self.settings
        tied: dict[str, str] = dict(model.all_tied_weights_keys)
        for owner, tensors in parts.items():
            name = rename.packed(owner)
            self._layers[name] = put_packed(model, name, tensors, settings)
            self._had_groups[name] = "g_idx" in tensors
        model.all_tied_weights_keys = self._tie(model, tied)
        check_complete(model, rename.keys(headers), tied)

    def _tie(self, model: Any, tied: Mapping[str, str]) -> dict[str, str]:
        """Clear the places of linears whose weight is that of a packed one, and note them; what else is tied."""
        others: dict[str, str] = {}
        for target, source in tied.items():
            ends = [key.removesuffix(".weight") for key in (target, source)]
            packed = [name for name in ends if name in self._layers]
            if not packed:
                others[target] = source
            elif len(packed) == 1:
                (name,) = set(ends) - set(packed)
                if is_linear(model.get_submodule(name)):  # a head may be packed while its embedding is not
                    self._twins[name] = packed[0]
        for name in self._twins:
            # transformers ties parameters only: nothing to load, nothing to miss
            _put(model, name, torch.nn.Identity())
        return others

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        finish(self._layers, self._had_groups, self.settings.checkpoint_format)
        for name, source in self._twins.items():
            _put(model, name, copy.copy(self._layers[source]))
        self._layers, self._had_groups, self._twins = {}, {}, {}
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return checkpoint_state(model.state_dict(), self.settings.checkpoint_format), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize(model, dtype)
        return model


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    holder, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(holder), attribute, module)


class Renaming:
    """Names in a checkpoint to names in a model, as transformers will rename them when it loads."""

    def __init__(self, model: Any):
        mapping = get_model_conversion_mapping(model, None, None)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._linears = {f"{name}.qweight": True for name, _ in model.named_modules(remove_duplicate=False)}
        self._state = model.state_dict()

    def packed(self, owner: str) -> str:
        """The module for a packed linear of the checkpoint."""
        key = f"{owner}.qweight"
        renamed, _ = rename_source_key(key, self._renamings, [], self._prefix, self._linears)
        return renamed.removesuffix(".qweight")

    def keys(self, keys: Any) -> set[str]:
        """All parameters that the checkpoint fills."""
        out = set()
        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        for key in keys:
            renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
            out |= {key, renamed}
            if pattern is not None:
                targets = by_pattern[pattern].target_patterns
                out |= {renamed.replace(targets[0], target) for target in targets}
        return out


def declare_config(model: Any, settings: GPTQSettings, ledger: Ledger) -> PackedQuantizer:
    """Put the settings into the model's config; the quantizer that goes with it."""
    config = PackedGPTQConfig(**settings.to_dict())
    ledger.set(model.config, "quantization_config", config)
    return PackedQuantizer(config, pre_quantized=True)


def register() -> Callable[[], None]:
    """Our reader in the place of transformers' own; returns what puts that back."""
    return replace_entries(
        QUANT_METHOD,
        (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedGPTQConfig),
    )
