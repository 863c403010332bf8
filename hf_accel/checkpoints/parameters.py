"""Trained parameters of a method as one safetensors file: what was trained, with which settings it was trained.

The file stands beside the model's own weights, never in them, so that the model loads without hf_accel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import WeightsMismatch

BY_THE_WAY = ("weights", "backend", "break_even", "on_slow")  # settings that change no number of a training
HEADER = "hf_accel"  # key of the safetensors metadata
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*?)(@(?P<revision>[\w./-]+))?\Z")


def file_name(method: str) -> str:
    """Name of the file with a method's parameters, in a folder or at the root of a Hub repo."""
    return f"hf_accel_{method}.safetensors"


def save(
    file: Path, parameters: Mapping[str, torch.Tensor], settings: Mapping[str, Any], together_with: str | None = None
) -> Path:
    """Write parameters as they are (dtype included), with the method's ``{"method", "version", "settings"}``.

    ``together_with`` names a file beside this one with weights of the model that were trained in the same run.
    """
    from safetensors.torch import save_file

    settings = {**settings, "together_with": together_with}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in parameters.items()}
    save_file(tensors, file, metadata={HEADER: json.dumps(settings)})
    return file


def locate(place: str, method: str) -> Path:
    """The file that ``place`` names: a safetensors file, a folder, or ``"owner/name"`` (``@revision``) on the Hub.

    Raises:
        WeightsMismatch: there is none.
    """
    path = Path(place).expanduser()
    file = path / file_name(method) if path.is_dir() else path
    if file.is_file():
        return file
    hub = _HUB.match(place)
    if path.exists() or hub is None:
        raise WeightsMismatch(
            f"{method}: no weights at {place!r}. Give a folder with {file_name(method)}, such a file, or 'owner/name' "
            "of a Hub repo that has one."
        )
    # Here, because they load an HTTP client, which applying a method without files can do without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as RepoNotFound
    from huggingface_hub.errors import RevisionNotFoundError as RevisionNotFound

    try:
        return Path(hf_hub_download(hub["repo"], file_name(method), revision=hub["revision"]))
    except (EntryNotFoundError, RepoNotFound, RevisionNotFound, LocalEntryNotFoundError, HFValidationError) as error:
        raise WeightsMismatch(
            f"{method}: no local path {place!r}, and no {file_name(method)} in a Hub repo of that name: {error}"
        ) from error


def load(
    place: str,
    method: str,
    parameters: Mapping[str, torch.nn.Parameter],
    settings: Mapping[str, Any],
    must_match: Iterable[str],
) -> list[str]:
    """Read the file at ``place`` into ``parameters``, all or nothing; returns notes for the report.

    Args:
        place: see :func:`locate`.
        method: name of the method; a file of another one is refused.
        parameters: by dotted name in the model.
        settings: of the method as it is applied now.
        must_match: settings to which the parameters are bound.

    Raises:
        WeightsMismatch: another method, other settings, layers or shapes. Names both sides.
    """
    from safetensors import SafetensorError, safe_open

    file = locate(place, method)
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise WeightsMismatch(f"{file}: cannot be read as weights of {method}: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("settings"), dict):
        raise WeightsMismatch(f"{file}: not written by hf_accel: its metadata has no {HEADER!r} entry with settings.")
    if header.get("method") != method:
        raise WeightsMismatch(f"{file}: weights of {header.get('method')!r} were given to {method!r}.")
    trained = header["settings"]
    other = [name for name in must_match if trained.get(name) != settings[name]]
    if other:
        raise WeightsMismatch(
            f"{file}: trained with {_words(trained, other)}; {method} is being applied with {_words(settings, other)}. "
            "Apply it with the settings of the training, or train again."
        )
    _check_names(file, set(tensors), set(parameters))
    wrong = [name for name, tensor in tensors.items() if tensor.shape != parameters[name].shape]
    if wrong:
        raise WeightsMismatch(
            f"{file}: {wrong[0]} is {list(tensors[wrong[0]].shape)}, in this model {list(parameters[wrong[0]].shape)}. "
            "The weights are of a model with another head dim."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    changed = [
        name for name in settings if name in trained and name not in BY_THE_WAY and trained[name] != settings[name]
    ]
    notes = [f"weights from {place}, trained with {_words(trained, changed)}" if changed else f"weights from {place}"]
    if header.get("together_with"):
        notes.append(f"they were trained together with {header['together_with']}: hf_accel.load_trained loads both")
    return notes


def _check_names(file: Path, found: set[str], expected: set[str]) -> None:
    if found == expected:
        return
    odd = sorted(found ^ expected)[0]
    side = "the file" if odd in found else "this model"
    raise WeightsMismatch(
        f"{file}: holds {len(found)} tensors, this model takes {len(expected)}; {odd!r} is only in {side}. The weights "
        "are of a model with other layers."
    )


def _words(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={settings.get(name)!r}" for name in names)
