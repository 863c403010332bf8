"""Saving what fine-tuning changed, in a folder that ``apply`` and the Hub understand, and loading it back.

Files: ``hf_accel.yaml`` (a preset: method and settings, ``weights: .``), ``hf_accel_METHOD.safetensors`` (the method's
own parameters), and, where they were trained, ``adapter.safetensors`` (LoRA) or ``hf_accel_base.safetensors``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_accel import api
from hf_accel.checkpoints import parameters
from hf_accel.errors import Conflict, NotApplicable, WeightsMismatch
from hf_accel.hosts.target import Model, resolve
from hf_accel.installing import Installation, installed
from hf_accel.presets import files, loading
from hf_accel.presets.preset import Match, Preset, Wanted
from hf_accel.sites.adapter.peft import lora as adapters

ADAPTER = "hf_accel"  # name of the adapter that hf_accel trains
BASE_FILE = "hf_accel_base.safetensors"


def trained_model(target: Any, component: str | None = None) -> tuple[Model, Installation]:
    """The one model in ``target`` that carries a method with trainable parameters, and that method.

    Raises:
        NotApplicable: none does, or several do and ``component`` does not say which.
    """
    models = resolve(target).models
    found = [(m, i) for m in models for i in installed(m.carrier) if i.method.trainable_parameters()]
    found = [(m, i) for m, i in found if component is None or m.name == component]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{i.method.name} on {m.name}" for m, i in found) or "none"
    raise NotApplicable(
        f"Expected one model with a method that learns ({component or 'any component'}); found {names}. Apply one "
        'first, e.g. hf_accel.apply(pipe, "sla"), or name the component=.'
    )


def save_trained(
    target: Any, folder: str | Path, *, component: str | None = None, base_weights: bool = False, description: str = ""
) -> Path:
    """Write a method's trained parameters and settings into ``folder``, and the LoRA adapter trained with them.

    Args:
        target: pipeline or model that carries the method.
        folder: made if absent; files of an earlier save are replaced.
        component: which model of a pipeline, if several carry a method that learns.
        base_weights: also write every other parameter of the model (after fine-tuning without LoRA).
        description: a sentence for the preset.

    Returns:
        Path: the folder. ``apply(pipe, folder)`` takes method and parameters from it, :func:`load_trained` all.

    Raises:
        NotApplicable: no such method on ``target``.
        Conflict: base weights beside an adapter.
    """
    model, installation = trained_model(target, component)
    method, folder = installation.method, Path(folder).expanduser()
    adapted = ADAPTER in adapters.active_and_inactive(model.module)
    if adapted and base_weights:
        raise Conflict(f"The adapter {ADAPTER!r} was trained, not the base weights. Leave base_weights out.")
    folder.mkdir(parents=True, exist_ok=True)
    own = method.trainable_parameters()
    for stale in (adapters.FILE, BASE_FILE):
        (folder / stale).unlink(missing_ok=True)
    together_with = BASE_FILE if base_weights else adapters.FILE if adapted else None
    parameters.save(folder / parameters.file_name(method.name), own, method.config.to_dict(), together_with)
    if adapted:
        adapters.save(model.module, folder, ADAPTER)
    if base_weights:
        base = {n: p.detach().cpu().contiguous() for n, p in model.module.named_parameters() if n not in own}
        save_file(base, folder / BASE_FILE)
    config = method.config.replace(weights=".")
    what = Preset(
        name=f"{method.name}-trained",
        wanted=(Wanted(method.name, config, "trained"),),
        models=(Match(model.class_name),),
        description=description,
    )
    files.dump(what, folder)
    return folder


def load_trained(target: Any, folder: str | Path, **settings: Any) -> api.Applied:
    """Load all that :func:`save_trained` wrote, and apply the method with the settings it was trained with.

    Adapter and base weights stay on the model when the method is reverted.

    Args:
        target: pipeline or model.
        folder: a local folder.
        **settings: changed against the training, e.g. ``topk``.

    Raises:
        WeightsMismatch, PresetError, NotApplicable: files that do not belong to this model.
    """
    folder = Path(folder).expanduser()
    wanted = loading.load(str(folder)).wanted[0]
    wanted = replace(wanted, config=wanted.config.replace(**settings))
    applied = api.apply(target, wanted.config)
    try:
        model, _ = trained_model(target)
        if (folder / BASE_FILE).is_file():
            _load_base(model, folder / BASE_FILE)
        if (folder / adapters.FILE).is_file():
            adapters.load(model.module, folder, ADAPTER)
    except (WeightsMismatch, NotApplicable, Conflict):
        applied.revert()
        raise
    return applied


def _load_base(model: Model, file: Path) -> None:
    own = dict(model.module.named_parameters())
    tensors = load_file(file)
    odd = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if odd:
        raise WeightsMismatch(f"{file}: {odd[0]!r} is not in this {model.class_name}, or has another shape there.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
