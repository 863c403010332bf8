"""QWHA adapters for peft, and peft's own adapters on packed linears of ours.

Importing this module registers QWHA for peft, transformers and diffusers alike, and lets LoRA and some others of
peft's tuners take packed linears as they take other libraries' (:mod:`hf_accel.sites.adapter.peft.seam`).

>>> import hf_accel.peft
>>> from peft import get_peft_model
>>> model = get_peft_model(model, hf_accel.peft.QWHAConfig(r=64, target_modules="all-linear"))
"""

from hf_accel.sites.adapter.peft import PackedLoraLinear, QWHAConfig, QWHALinear, QWHAModel, merge_into_dense

__all__ = ["PackedLoraLinear", "QWHAConfig", "QWHALinear", "QWHAModel", "merge_into_dense"]
