"""What stands below an adapter, and what may be done with it: dense, ours and packed, or another library's."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend

from hf_accel.errors import NotApplicable
from hf_accel.kernels.quantized_linear import Packed
from hf_accel.quant.packed_linear import PackedLinear

ALTERNATIVES = (
    "Keep the adapter beside the packed weight (it costs its values and int16 positions), or leave the few bits: "
    "hf_accel.peft.merge_into_dense(model, dtype=torch.bfloat16) gives the model with dense merged weights"
)


class PackedBackend(QuantizationBackend):
    """peft's view of :class:`~hf_accel.quant.packed_linear.PackedLinear`: read, never written."""

    layer_type = "linear"
    supports_merge = False
    backend_name = "hf_accel packed"

    def get_base_weight(self, base_layer: Any) -> torch.Tensor:
        return base_layer.dequantize_weight()

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        raise NotApplicable(
            f"A merged weight cannot be put into {peft_layer.get_base_layer().bits} bits without rounding it again, "
            f"which would undo what the adapter repairs. {ALTERNATIVES}."
        )


def backend_of(layer: torch.nn.Module, **options: Any) -> QuantizationBackend | None:
    """peft's backend of a quantised layer, ours included; None for a layer that is not quantised."""
    if isinstance(layer, PackedLinear):
        return PackedBackend()
    return resolve_quantization_backend(layer, **options)


def packed_parts(layer: PackedLinear) -> Packed:
    """What kernels take for the weight of a packed layer."""
    scales = layer.scales.float() if layer.scales.dtype == torch.float64 else layer.scales
    return Packed(layer.qweight, scales, layer.qzeros, layer.g_idx, layer.bits, layer.run_length())


__all__ = ["ALTERNATIVES", "PackedBackend", "backend_of", "packed_parts"]
