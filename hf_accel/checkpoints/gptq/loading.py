"""Loading models whose linears are packed in the GPTQ layout, through the hosts' own ``from_pretrained``.

Reading is switched on by :func:`register_quantizers` for the process, or by :func:`load_quantized` for one call; saving
needs neither. A process without it meets an error of the host, never a model with random layers: transformers' own
reader asks for optimum and GPTQModel (with which it reads these files), diffusers says that it knows no gptq.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from hf_accel.checkpoints.gptq.layout import QUANT_METHOD
from hf_accel.errors import NotApplicable
from hf_accel.hosts.patching.registration import SharedRegistration

_STANDING: list[SharedRegistration] = []


def register_quantizers() -> None:
    """Let ``from_pretrained`` of transformers and diffusers read GPTQ checkpoints with our layers, in this process.

    Takes the place of transformers' own reader, which needs optimum and GPTQModel. Twice is as once. Undone by
    :func:`unregister_quantizers`. Saving needs no registration.
    """
    if not _STANDING:
        _STANDING.extend(_registrations())


def unregister_quantizers() -> None:
    """The hosts' own readers are back in their places."""
    while _STANDING:
        _STANDING.pop().release()


@contextlib.contextmanager
def reading_quantized() -> Iterator[None]:
    """:func:`register_quantizers` for the body of a ``with``."""
    held = _registrations()
    try:
        yield
    finally:
        for registration in held:
            registration.release()


def load_quantized(place: str | Path, cls: Any = None, **kwargs: Any) -> Any:
    """Load a model or pipeline whose linears are packed in the GPTQ layout, ours or anybody's.

    Args:
        place: a folder, or ``"owner/name"`` on the Hub.
        cls: whose ``from_pretrained`` is called; None: the class that the config names.
        **kwargs: of ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ``subfolder``, ...).

    Raises:
        NotApplicable: there is no config that names a class of transformers or diffusers.
        QuantizationError: a checkpoint that cannot be read, or is not of this model.
    """
    cls = cls or _class_of(str(place), kwargs)
    with reading_quantized():
        return cls.from_pretrained(str(place), **kwargs)


def _class_of(place: str, kwargs: Mapping[str, Any]) -> Any:
    for name, library, field_name in (
        ("model_index.json", "diffusers", "_class_name"),
        ("config.json", "diffusers", "_class_name"),
        ("config.json", "transformers", "architectures"),
    ):
        told = _read_json(place, name, kwargs).get(field_name)
        told = told[0] if isinstance(told, list) and told else told
        if isinstance(told, str) and importlib.util.find_spec(library):
            cls = getattr(importlib.import_module(library), told, None)
            if cls is not None:
                return cls
    raise NotApplicable(
        f"{place!r} names no class of transformers or diffusers (looked into model_index.json and config.json). Say "
        "which: load_quantized(place, AutoModelForCausalLM, trust_remote_code=True)."
    )


def _read_json(place: str, name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(place).expanduser()
    if folder.exists():
        file = folder / (kwargs.get("subfolder") or "") / name
    else:
        hub = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}
        try:
            file = Path(hf_hub_download(place, name, **hub))
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            return {}
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _registrations() -> list[SharedRegistration]:
    held = []
    for library in ("transformers", "diffusers"):
        if importlib.util.find_spec(library) is not None:
            module = importlib.import_module(f"hf_accel.checkpoints.gptq.{library}")
            register: Callable[[], Callable[[], None]] = module.register
            held.append(SharedRegistration(f"{library} reads {QUANT_METHOD}", register))
    return held
