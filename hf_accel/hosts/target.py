"""From what the user holds (pipeline, model, PeftModel, compiled model, training) to what methods work on."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import NotApplicable
from hf_accel.hosts.walk import modules

# Names under which pipelines keep the network that runs once per denoising step.
DENOISER_COMPONENTS = ("transformer", "transformer_2", "transformer_3", "unet", "prior", "decoder", "dit", "model")


@dataclass(frozen=True)
class Model:
    """One network methods may be put on, or one training that recipes may be put on.

    Attributes:
        name: its component name in the pipeline; ``"model"`` outside one, ``"trainer"`` for a training.
        module: the network; of a training, the one that is trained.
        trainer: the training itself, a transformers ``Trainer`` or a loop of ours; None for a network.
    """

    name: str
    module: torch.nn.Module
    trainer: Any = None

    @property
    def carrier(self) -> Any:
        """What methods are put on, and what remembers those that stand on it: the training, else the network."""
        return self.module if self.trainer is None else self.trainer

    @property
    def class_name(self) -> str:
        return type(self.carrier).__name__

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration as a plain mapping (empty if it has none)."""
        config = getattr(self.module, "config", None)
        if config is None:
            return {}
        return dict(config.to_dict() if hasattr(config, "to_dict") else config)

    @property
    def source(self) -> str:
        """Hub id or folder it was loaded from, as the host library remembers it; empty if it does not."""
        config = getattr(self.module, "config", None)
        return str(getattr(config, "_name_or_path", "") or self.config.get("_name_or_path", "") or "")


@dataclass(frozen=True)
class Target:
    """What :func:`resolve` found. ``pipeline`` is weak: nothing of ours keeps a pipeline alive."""

    description: str
    models: tuple[Model, ...]
    pipeline: weakref.ref | None = None


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The network inside the wrappers of ``torch.compile``, DDP and peft: the instance that is really called."""
    inner: Any = module
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif is_a(inner, "peft", "PeftModel"):
            inner = inner.get_base_model()
        elif isinstance(inner, torch.nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner


def resolve(obj: Any) -> Target:
    """Find the networks in what the user handed over; in a training, its network and the training itself.

    Raises:
        NotApplicable: the object is no pipeline, model or training, or holds nothing that methods work on.
    """
    if isinstance(obj, torch.nn.Module):
        module = unwrap(obj)
        return Target(type(obj).__name__, (Model("model", module),))
    components = getattr(obj, "components", None)
    if isinstance(components, dict):
        models = tuple(
            Model(name, unwrap(components[name]))
            for name in DENOISER_COMPONENTS
            if isinstance(components.get(name), torch.nn.Module)
        )
        if not models:
            raise NotApplicable(
                f"{type(obj).__name__} has no component that hf_accel works on: looked for "
                f"{', '.join(DENOISER_COMPONENTS)}; found {', '.join(sorted(components)) or 'none'}."
            )
        return Target(type(obj).__name__, models, weakref.ref(obj))
    if is_training(obj):
        if not isinstance(obj.model, torch.nn.Module):
            raise NotApplicable(
                f"{type(obj).__name__} has no model yet, so there is nothing to train; got {type(obj.model).__name__}. "
                "Give it one first."
            )
        network = unwrap(obj.model)
        return Target(type(obj).__name__, (Model("model", network), Model("trainer", network, obj)))
    raise NotApplicable(
        f"Expected a diffusers pipeline, a diffusers or transformers model, a PeftModel, or a training (transformers' "
        f"Trainer, hf_accel's Finetuner or RCDTrainer); got "
        f"{type(obj).__module__}.{type(obj).__name__}. Load the model first and pass the object itself."
    )


def kind(module: torch.nn.Module) -> str:
    """What a network is, in words for error messages: denoiser, text encoder, autoencoder, language model, module."""
    name = type(module).__name__
    if is_a(module, "transformers", "PreTrainedModel"):
        generates = getattr(module, "can_generate", None)
        # Remote code often has a head without transformers' generate().
        head = hasattr(module, "lm_head") or (generates is not None and generates())
        return "language model" if head or _is_decoder(module) else "text encoder"
    if name.startswith("Autoencoder") or name.startswith("VQ"):
        return "autoencoder"
    if is_a(module, "diffusers", "ModelMixin"):
        return "denoiser"
    return "module"


def _is_decoder(module: torch.nn.Module) -> bool:
    """Whether a model of transformers without a head for tokens is a stack of causal layers (``LlamaModel``, a
    classifier on it)."""
    if getattr(module, "main_input_name", None) != "input_ids":
        return False  # of sounds, series, pictures
    found = [sub for sub in modules(module) if hasattr(sub, "is_causal") and hasattr(sub, "layer_idx")]
    return bool(found) and all(sub.is_causal for sub in found)


def is_training(obj: Any) -> bool:
    """Whether something is a training that recipes can be put on. Of the modules that define them, only those are
    asked that are loaded already: an object of theirs cannot exist before."""
    return is_transformers_trainer(obj) or is_a(obj, "hf_accel.train.loop.training_loop", "TrainingLoop")


def is_transformers_trainer(obj: Any) -> bool:
    """Whether something is a ``Trainer`` of transformers, or of a class derived from it."""
    return is_a(obj, "transformers.trainer", "Trainer")


def is_a(obj: Any, library: str, class_name: str) -> bool:
    """isinstance without importing a library that the user has not imported."""
    cls = getattr(sys.modules.get(library), class_name, None) if library in sys.modules else None
    return cls is not None and isinstance(obj, cls)


def execution_device(pipeline: Any) -> torch.device:
    """Where a pipeline computes; with offloading this is not where its weights lie."""
    device = getattr(pipeline, "_execution_device", None)
    if isinstance(device, torch.device):
        return device
    return next(
        (p.device for model in resolve(pipeline).models for p in model.module.parameters()), torch.device("cpu")
    )
