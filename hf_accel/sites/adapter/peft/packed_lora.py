"""peft's LoRA on a packed linear of ours: its own layer, less what would read or write the base's weight."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.lora.variants import QALoraLinearVariant

from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.quant.packed_linear import PackedLinear

# Of the starts that peft has, those that need no weight. Others take a part out of the base and leave a residual in its
# place (PiSSA, OLoRA, CorDA, LoRA-GA), round the base themselves (LoftQ), or look at its singular vectors (MiCA).
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class PackedLoraLinear(Linear):
    """``lora.Linear`` around a :class:`~hf_accel.quant.packed_linear.PackedLinear`.

    DoRA is possible, because peft gets the dequantised weight (:mod:`hf_accel.sites.adapter.peft.seam`), at the price
    of a dense weight per forward; so is QA-LoRA, which peft has for GPTQ layers only.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """peft's, but those that write into the base, or that their start is refused for."""
        return {key: cls for key, cls in super().lora_variants.items() if key not in (("kasa_config",), ("mica",))}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if not config.use_qalora:
            return variant
        if variant is not None:
            raise InvalidSetting(
                "LoraConfig", "use_qalora", True, f"off where {type(variant).__name__} is asked for: peft has not both"
            )
        return GroupedLora()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            InvalidSetting: a start that needs the full weight.
            NotApplicable: biases are to be trained, and this one is packed with its weight.
        """
        base = self.get_base_layer()
        if isinstance(base, PackedLinear):
            _check(config, kwargs.get("target_name", ""), base)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """dW of one adapter, ``[out, in]``, in the adapter's dtype."""
        variant = self.lora_variant.get(adapter)
        return (
            variant.get_delta_weight(self, adapter)
            if isinstance(variant, GroupedLora)
            else super().get_delta_weight(adapter)
        )


class GroupedLora(QALoraLinearVariant):
    """QA-LoRA (arXiv 2309.14717) as peft computes it, with the dense update that it does not say.

    A is ``[r, in / g]`` and sees the mean of every group of inputs, times the number of groups: an input's column of dW
    is that of its group, ``B A[:, i // g] (in / g) / g``. The paper then moves the update into the groups' zeros. Ours
    are whole numbers, which cannot take it; merging needs a dense base, as for any LoRA.
    """

    @staticmethod
    def get_delta_weight(module: Any, active_adapter: str) -> torch.Tensor:
        size = module.qalora_group_size[active_adapter]
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        factor = module.scaling[active_adapter] * (module.in_features // size) / size
        return (b @ a).repeat_interleave(size, dim=1) * factor

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _check(config: LoraConfig, name: str, base: PackedLinear) -> None:
    """Refuse what needs another base; ``name`` is the layer's."""
    start: Any = config.init_lora_weights
    if start not in _STARTS:
        raise InvalidSetting(
            "LoraConfig", "init_lora_weights", start,
            f"one of {', '.join(map(repr, _STARTS))} on packed linears ({name}): others compute the start from the "
            "full weight, and change it. For a start that repairs the rounding take hf_accel.QWHAConfig and "
            "hf_accel.initialize_qwha; to load an adapter that was saved with this setting on a base of its own, load "
            "that base, or write true here (adapter_config.json) if the base is this one",
        )  # fmt: skip
    if config.kasa_config is not None:
        raise InvalidSetting("LoraConfig", "kasa_config", config.kasa_config, f"None on packed linears ({name}): "
                             "KaSA cuts singular values off the base weight")  # fmt: skip
    if config.bias != "none" and base.bias is not None:
        raise NotApplicable(
            f"bias={config.bias!r}: the bias of {name} is packed with its weight and not trained. lora_bias=True gives "
            "the adapter one; other modules' biases can be trained with modules_to_save."
        )


__all__ = ["GroupedLora", "PackedLoraLinear"]
