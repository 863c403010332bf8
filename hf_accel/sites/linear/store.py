"""What was found for finished blocks, in a folder, so that an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import InvalidSetting
from hf_accel.sites.linear.places import LinearSite
from hf_accel.sites.linear.samples import Sample

_RUN = "run.json"


class LayerStore:
    """A folder with a file of tensors for each finished block, and what they depend on in ``run.json``.

    Args:
        folder: made if it is not there.
        run: everything that the results depend on, as JSON has it (:func:`describe_run`).
        owner: the method, for the words of errors.

    Raises:
        InvalidSetting: the folder holds another run; says in what they differ.
    """

    def __init__(self, folder: str | os.PathLike, run: Mapping[str, Any], owner: str):
        self.folder = Path(folder)
        run = json.loads(json.dumps(run))
        there = self._read_run(owner)
        if there is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / _RUN, json.dumps(run, indent=1).encode())
            return
        other = [f"{key} ({there.get(key)!r} there)" for key in run if there.get(key) != run[key]]
        if other:
            raise InvalidSetting(
                owner, "resume_dir", str(folder), f"empty, or of this very run; that one differs in {', '.join(other)}"
            )

    def read(self, block: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Tensors and notes of a finished block; None if it is not."""
        from safetensors import safe_open

        file = self._file(block)
        if not file.exists():
            return None
        with safe_open(str(file), framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
            return tensors, json.loads(opened.metadata()["notes"])

    def write(self, block: str, tensors: Mapping[str, torch.Tensor], notes: Any) -> None:
        """Store a block, whole or not at all; ``notes`` as JSON has it."""
        from safetensors.torch import save

        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write(self._file(block), save(on_cpu, metadata={"notes": json.dumps(notes)}))

    def _file(self, block: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', block)}.safetensors"

    def _read_run(self, owner: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / _RUN).read_text())
        except FileNotFoundError:
            files = list(self.folder.glob("*")) if self.folder.exists() else []
        except (OSError, json.JSONDecodeError) as error:
            raise InvalidSetting(owner, "resume_dir", str(self.folder), f"a readable folder ({error})") from error
        if files:
            raise InvalidSetting(
                owner, "resume_dir", str(self.folder), f"a folder of its own; this one holds {files[0].name}"
            )
        return None


def describe_run(
    settings: Mapping[str, Any], model: torch.nn.Module, sites: Iterable[LinearSite], samples: Iterable[Sample]
) -> dict[str, Any]:
    """What results depend on: the settings, the model's linears and a part of their numbers, the samples."""
    weights, inputs = hashlib.sha256(), hashlib.sha256()
    count = 0
    for site in sites:
        weight = site.weight
        few = weight.flatten()[:: max(1, weight.numel() // 1024)].double().cpu()
        weights.update(f"{site.name}{list(weight.shape)}{weight.dtype}".encode() + few.numpy().tobytes())
    for sample in samples:
        inputs.update(sample.digest().encode())
        count += 1
    told = {"model": type(model).__name__, "samples": f"{count}, {inputs.hexdigest()[:16]}"}
    return {**settings, **told, "weights": weights.hexdigest()[:16]}


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)


__all__ = ["LayerStore", "describe_run"]
