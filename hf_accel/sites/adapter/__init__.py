"""Trained layers beside frozen ones.

A method derives from :class:`.base.AdapterMethod` and writes ``places``, ``peft_config`` and ``layer``. ``peft/`` is
all that knows peft: the QWHA tuner, peft's own adapters on packed linears, LoRA for our trainings.
"""

from hf_accel.facts import SITES

SITE = SITES["adapter"]
