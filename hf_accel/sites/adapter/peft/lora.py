"""LoRA adapters of one name on a loaded model: added, switched off for a while, saved and loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import Conflict, NotApplicable

FILE = "adapter.safetensors"


def add_lora(
    model: torch.nn.Module,
    name: str,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    seed: int = 0,
) -> None:
    """Add a LoRA adapter beside the active ones, its parameters in fp32. The global random state does not move.

    Args:
        targets: names of linear layers, as suffixes.

    Raises:
        Conflict: the model has an adapter of that name.
        NotApplicable: the model takes no adapters, or no layer is called like a target.
    """
    from peft import LoraConfig

    adapted: Any = model
    if not hasattr(model, "add_adapter"):
        raise NotApplicable(f"{type(model).__name__} takes no adapters (it has no add_adapter). Train without LoRA.")
    if name in active_and_inactive(model):
        raise Conflict(f"{type(model).__name__} has an adapter {name!r} already. Delete it: delete_adapters({name!r}).")
    others = active(model)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), bias="none")
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        try:
            adapted.add_adapter(config, name)
        except ValueError as error:
            raise NotApplicable(f"LoRA on {', '.join(targets)} of {type(model).__name__}: {error}") from error
    if others:
        adapted.set_adapter([*others, name])
    for parameter in lora_parameters(model, name).values():
        parameter.data = parameter.data.float()


def lora_parameters(model: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter by dotted name."""
    return {key: p for key, p in model.named_parameters() if f".{name}." in key and "lora_" in key}


def active_and_inactive(model: torch.nn.Module) -> set[str]:
    """Names of all adapters on the model."""
    return set(getattr(model, "peft_config", {}))


def active(model: torch.nn.Module) -> list[str]:
    """Names of the adapters that take part in a forward, in order."""
    names: dict[str, None] = {}
    for layer in _layers(model):
        if not layer.disable_adapters:
            names.update(dict.fromkeys(layer.active_adapters))
    return list(names)


@contextlib.contextmanager
def without(model: torch.nn.Module, name: str) -> Iterator[None]:
    """The adapter ``name`` takes no part in forwards inside the block; others do. ``requires_grad`` is not touched.

    peft's own switches set ``requires_grad`` as well, which would end a training.
    """
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in _layers(model)]
    try:
        for layer, names, disabled in before:
            rest = [other for other in ([names] if isinstance(names, str) else names) if other != name]
            layer._active_adapter, layer._disable_adapters = rest, disabled or not rest
        yield
    finally:
        for layer, names, disabled in before:
            layer._active_adapter, layer._disable_adapters = names, disabled


def save(model: Any, folder: Path, name: str) -> Path:
    """Write one adapter with its configuration as :data:`FILE`; diffusers loads it with ``load_lora_adapter``.

    As the model's own ``save_lora_adapter`` does, which also calls ``model.to()`` and warns of modules kept in fp32.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[name].to_dict().items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True)}
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / FILE, metadata=metadata)
    return folder / FILE


def load(model: Any, folder: Path, name: str) -> None:
    """Load what :func:`save` wrote, as an adapter ``name`` beside the active ones."""
    if name in active_and_inactive(model):
        raise Conflict(f"{type(model).__name__} has an adapter {name!r} already. Delete it: delete_adapters({name!r}).")
    others = active(model)
    model.load_lora_adapter(str(folder), adapter_name=name, weight_name=FILE, prefix=None)
    model.set_adapter([*others, name])


def _layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
