"""diffusers' quantizer mapping: models whose linears are packed in the GPTQ layout, read and written."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from hf_accel.checkpoints.gptq.layout import (
    QUANT_METHOD,
    GPTQSettings,
    Header,
    check_complete,
    checkpoint_state,
    dequantize,
    finish,
    packed_parts,
    put_packed,
    read_headers,
    read_settings,
)
from hf_accel.errors import NotApplicable
from hf_accel.hosts.patching.registration import replace_entries
from hf_accel.ledger import Ledger
from hf_accel.quant.packed_linear import PackedLinear


class Method(StrEnum):
    """diffusers reads ``.value``, and its own list has no gptq."""

    GPTQ = QUANT_METHOD


class PackedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` as it stands in the file."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)
        self.quant_method: Any = Method.GPTQ

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"quant_method": QUANT_METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """For ``repr``."""
        return self.to_dict()


class PackedQuantizer(DiffusersQuantizer):
    """Puts empty packed linears where the checkpoint has packed ones, before its tensors are loaded into the model."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._parts: dict[str, dict[str, Header]] = {}
        self._keys: list[str] = []
        self._layers: dict[str, PackedLinear] = {}
        self._stored: dict[str, torch.Tensor] = {}

    @property
    def settings(self) -> GPTQSettings:
        return read_settings(self.quantization_config.to_dict())

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise NotApplicable(
                "This checkpoint is not quantised. Load it without quantization_config, then "
                "hf_accel.apply(model, 'gptq', ...)."
            )
        _ = self.settings

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._parts, self._keys = packed_parts(read_headers(checkpoint_files)), loaded_keys
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._layers = {name: put_packed(model, name, parts, self.settings) for name, parts in self._parts.items()}
        check_complete(model, self._keys, {})

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # What comes next is rounded to the model's dtype, scales too: they are kept as they are in the file.
        self._stored.update({key: tensor for key, tensor in state_dict.items() if self._is_packed(key)})
        return state_dict

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return self._is_packed(param_name)

    def create_quantized_param(  # type: ignore[override]
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        owner, _, leaf = param_name.rpartition(".")
        setattr(self._layers[owner], leaf, self._stored.pop(param_name).to(target_device))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        had_groups = {name: "g_idx" in parts for name, parts in self._parts.items()}
        finish(self._layers, had_groups, self.settings.checkpoint_format)
        self._layers, self._parts, self._keys, self._stored = {}, {}, [], {}
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return checkpoint_state(state_dict, self.settings.checkpoint_format), {}

    def _dequantize(self, model: Any) -> Any:
        dequantize(model)
        return model

    def _is_packed(self, key: str) -> bool:
        owner, _, leaf = key.rpartition(".")
        return leaf in self._parts.get(owner, ())

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


def declare_config(model: Any, settings: GPTQSettings, ledger: Ledger) -> PackedQuantizer:
    """Put the settings into the model's config; the quantizer that goes with it."""
    config = PackedConfig(**settings.to_dict())
    ledger.set(model, "_internal_dict", FrozenDict({**model._internal_dict, "quantization_config": config}))
    return PackedQuantizer(config, pre_quantized=True)


def register() -> Callable[[], None]:
    """Our reader among those of diffusers, which has none for gptq; returns the removal."""
    return replace_entries(
        QUANT_METHOD,
        (auto.AUTO_QUANTIZER_MAPPING, PackedQuantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
    )
