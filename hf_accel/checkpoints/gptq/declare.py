"""Saying of a model in memory that its linears are packed, so that ``save_pretrained`` writes what can be loaded."""

from __future__ import annotations

import torch

from hf_accel.checkpoints.gptq.layout import settings_of
from hf_accel.hosts.target import is_a
from hf_accel.ledger import Ledger


def declare(
    model: torch.nn.Module,
    ledger: Ledger,
    *,
    desc_act: bool = False,
    sym: bool = False,
    damp_percent: float = 0.01,
    true_sequential: bool = False,
    static_groups: bool = False,
) -> None:
    """Say of a model whose linears were packed that they are, so that ``save_pretrained`` writes what can be loaded.

    Sets what a loaded quantised model has (``hf_quantizer``, ``is_quantized``, ``quantization_method`` and the entry in
    its config), with what follows: the Trainer trains it with adapters only, and ``.to(dtype)`` is refused by the host.
    A model of neither transformers nor diffusers has no ``save_pretrained`` and is left alone.

    Args:
        model: holds :class:`PackedLinear`.
        ledger: of the model; undo takes the declaration back.
        desc_act: see :class:`GPTQSettings`.
        sym: zeros are all in the middle.
        damp_percent: a record.
        true_sequential: a record.
        static_groups: a record.

    Raises:
        QuantizationError: nothing in it is packed.
    """
    settings = settings_of(
        model, desc_act=desc_act, sym=sym, damp_percent=damp_percent, true_sequential=true_sequential,
        static_groups=static_groups,
    )  # fmt: skip
    if is_a(model, "transformers", "PreTrainedModel"):
        from hf_accel.checkpoints.gptq import transformers as host
    elif is_a(model, "diffusers", "ModelMixin"):
        from hf_accel.checkpoints.gptq import diffusers as host  # type: ignore[no-redef]
    else:
        return
    quantizer = host.declare_config(model, settings, ledger)
    ledger.set(model, "hf_quantizer", quantizer)
    ledger.set(model, "is_quantized", True)
    ledger.set(model, "quantization_method", quantizer.quantization_config.quant_method)
