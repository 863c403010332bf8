"""Published acceleration methods on models you have already loaded: one line on, exact undo, proof of what it did.

>>> import hf_accel
>>> applied = hf_accel.apply(pipe, "svg2")      # pipe: any loaded diffusers pipeline the method suits
>>> print(applied.report())
>>> applied.revert()

Importing this package changes nothing in torch, diffusers, transformers or peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_accel.api import Applied, apply, explain, methods, request, revert
    from hf_accel.checkpoints.gptq.loading import load_quantized, register_quantizers, unregister_quantizers
    from hf_accel.converting import Converted, convert
    from hf_accel.generation.block_diffusion.blocks import generate_blocks
    from hf_accel.measure.calibrate import calibrate
    from hf_accel.measure.compare import compare
    from hf_accel.patches.qwha import initialize_qwha
    from hf_accel.registry import register
    from hf_accel.requests import Request
    from hf_accel.sites.adapter.peft import QWHAConfig
    from hf_accel.train.finetune.finetuner import Finetuner
    from hf_accel.train.saving import load_trained, save_trained

_LAZY = {
    "Applied": "api", "apply": "api", "explain": "api", "methods": "api", "request": "api",
    "revert": "api",
    "Request": "requests",
    "Converted": "converting", "convert": "converting",
    "calibrate": "measure.calibrate", "compare": "measure.compare", "register": "registry",
    "generate_blocks": "generation.block_diffusion.blocks",
    "load_quantized": "checkpoints.gptq.loading", "register_quantizers": "checkpoints.gptq.loading",
    "unregister_quantizers": "checkpoints.gptq.loading",
    "QWHAConfig": "sites.adapter.peft", "initialize_qwha": "patches.qwha",
    "Finetuner": "train.finetune.finetuner", "load_trained": "train.saving", "save_trained": "train.saving",
}  # fmt: skip

__all__ = [
    "Applied", "Converted", "Finetuner", "QWHAConfig", "Request", "__version__", "apply", "calibrate", "compare",
    "convert", "explain", "generate_blocks", "initialize_qwha", "load_quantized", "load_trained", "methods", "register",
    "register_quantizers", "request", "revert", "save_trained", "unregister_quantizers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"hf_accel.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'hf_accel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
