"""QWHA adapters for peft, and peft's own adapters on packed linears of ours.

Importing this package registers QWHA for peft, transformers and diffusers alike, and lets LoRA and some others of
peft's tuners take packed linears as they take other libraries' (:mod:`hf_accel.sites.adapter.peft.seam`).

>>> import hf_accel.peft
>>> from peft import get_peft_model
>>> model = get_peft_model(model, hf_accel.peft.QWHAConfig(r=64, target_modules="all-linear"))
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from hf_accel.sites.adapter.peft.registration import add_peft_type

QWHA = add_peft_type("QWHA")

from hf_accel.sites.adapter.peft.packed_lora import PackedLoraLinear  # noqa: E402
from hf_accel.sites.adapter.peft.qwha.config import QWHAConfig  # noqa: E402 (a configuration names its type)
from hf_accel.sites.adapter.peft.qwha.layer import QWHALinear  # noqa: E402
from hf_accel.sites.adapter.peft.qwha.model import QWHAModel, merge_into_dense  # noqa: E402
from hf_accel.sites.adapter.peft.seam import extend_peft  # noqa: E402

if QWHA not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="qwha", config_cls=QWHAConfig, model_cls=QWHAModel)
extend_peft()

__all__ = ["PackedLoraLinear", "QWHAConfig", "QWHALinear", "QWHAModel", "merge_into_dense"]
