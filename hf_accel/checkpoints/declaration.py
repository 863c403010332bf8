"""What weights say of themselves: a field of the model's configuration, and a file beside an adapter.

A field of the configuration lives through ``save_pretrained`` and ``from_pretrained``. peft drops unknown fields of an
adapter's configuration when it loads one, so there the declaration is a file of its own, which peft's and transformers'
``save_pretrained`` write from then on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import NotApplicable, WeightsMismatch


def file_name(method: str) -> str:
    """The file beside an adapter."""
    return f"hf_accel_{method}.json"


class DeclaringSave:
    """Stands on an adapter's configuration in the place of its ``save_pretrained``; writes the declaration too."""

    def __init__(self, config: Any, method: str, told: Mapping[str, Any]):
        self.config, self.method, self.told = config, method, dict(told)

    def __call__(self, save_directory: str, **kwargs: Any) -> None:
        type(self.config).save_pretrained(self.config, save_directory, **kwargs)
        text = json.dumps({self.method: self.told}, indent=2)
        (Path(save_directory) / file_name(self.method)).write_text(text + "\n", encoding="utf-8")


def declare(module: torch.nn.Module, method: str, told: Mapping[str, Any]) -> None:
    """Say of the weights of ``module`` that they were trained for ``method``: ``config.METHOD = told``.

    Adapters on the module say so too, in a file that is written when they are saved.

    Args:
        module: a transformers model (not the PeftModel around it).
        method: name of the method.
        told: plain data.

    Raises:
        NotApplicable: the model has no configuration.
    """
    config = getattr(module, "config", None)
    if config is None:
        raise NotApplicable(f"{type(module).__name__} has no config to declare that its weights are {method}'s.")
    setattr(config, method, dict(told))
    for adapter in getattr(module, "peft_config", {}).values():
        adapter.save_pretrained = DeclaringSave(adapter, method, told)


def declaration_of(module: torch.nn.Module, method: str) -> dict[str, Any] | None:
    """What the configuration of a model says of its weights, or None."""
    told = getattr(getattr(module, "config", None), method, None)
    return dict(told) if isinstance(told, Mapping) else None


def read_declaration(place: str, method: str) -> dict[str, Any]:
    """The declaration in a saved adapter or model.

    Args:
        place: a folder, or ``"owner/name"`` on the Hub.
        method: name of the method.

    Raises:
        WeightsMismatch: there is none.
    """
    # Here, because they load an HTTP client, which applying a method without files can do without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as RepoNotFound

    looked_for = (file_name(method), "config.json")
    for name in looked_for:
        file = Path(place).expanduser() / name
        if not file.is_file() and not Path(place).expanduser().exists():
            try:
                file = Path(hf_hub_download(place, name))
            except (EntryNotFoundError, RepoNotFound, LocalEntryNotFoundError, HFValidationError):
                continue
        if file.is_file():
            told = json.loads(file.read_text(encoding="utf-8")).get(method)
            if isinstance(told, Mapping):
                return dict(told)
    raise WeightsMismatch(
        f"{method}: {place!r} declares no {method} weights: looked for {looked_for[0]}, and {method!r} in config.json."
    )
