"""Checkpoints of a training: everything the next step depends on, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_accel.errors import PresetError, WeightsMismatch
from hf_accel.train.loop.history import History

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\Z")

# A resumed run may differ in these: none of them moves the loss curve.
FREE_ON_RESUME = ("steps", "validate_every", "checkpoint_every", "keep_checkpoints", "progress")


@dataclass
class Checkpoint:
    """What the next step depends on.

    Attributes:
        step: optimizer steps done.
        parameters: the trained ones by name; likewise ``averages``, empty without EMA.
        optimizer: its state dict, which holds the learning rates too.
        random: state of torch's CPU generator (dropout), and those of the CUDA devices.
    """

    step: int
    parameters: Mapping[str, torch.Tensor]
    averages: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: dict[str, Any]
    history: History

    def write(self, out: Path, keep: int) -> Path:
        """Write ``out/checkpoints/step-N`` and remove all but the newest ``keep``."""
        folder = out / FOLDER / f"step-{self.step:06d}"
        beside = folder.with_suffix(".part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(_on_cpu(self.parameters), beside / "parameters.safetensors")
        if self.averages:
            save_file(_on_cpu(self.averages), beside / "averages.safetensors")
        torch.save({"optimizer": self.optimizer, "random": self.random}, beside / "state.pt")
        (beside / "step.json").write_text(json.dumps({"step": self.step, **vars(self.history)}))
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        for old in all_of(out)[:-keep]:
            shutil.rmtree(old)
        return folder

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises PresetError for a folder that is no checkpoint."""
        try:
            told = json.loads((folder / "step.json").read_text())
            state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
            parameters = load_file(folder / "parameters.safetensors")
        except FileNotFoundError as error:
            raise PresetError(f"{folder} is no checkpoint of a fine-tuning: {error.filename} is missing.") from error
        averages = folder / "averages.safetensors"
        return cls(
            told.pop("step"),
            parameters,
            load_file(averages) if averages.is_file() else {},
            state["optimizer"],
            state["random"],
            History(**told),
        )

    def check(self, about: Mapping[str, Any], names: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Refuse to go on with other settings or parameters than the checkpoint was written with."""
        for owner in ("method", "training"):
            before, now = (
                {"method": told[owner]["method"], **told[owner]["settings"]} for told in (self.history.about, about)
            )
            free = set(FREE_ON_RESUME) - ({"steps"} if now.get("schedule") == "cosine" else set())
            # Where weights came from at the start does not matter: the checkpoint brings its own.
            free |= {"weights"} if owner == "method" else set()
            other = [key for key in now if key not in free and before.get(key) != now[key]]
            if other:
                key = other[0]
                raise WeightsMismatch(
                    f"{folder} was written with {key}={before.get(key)!r}; this run has {now[key]!r} ({owner}). "
                    "Resume with the same settings, or start a new run in another folder."
                )
        if odd := sorted(set(names) ^ set(self.parameters)):
            raise WeightsMismatch(f"{folder}: {odd[0]!r} is trained in only one of checkpoint and model.")


def all_of(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (out / FOLDER).glob("step-*") if _NAME.search(path.name))


def find(out: Path, which: str | Path) -> Path:
    """A checkpoint: ``"latest"`` of the run in ``out``, or a folder.

    Raises:
        PresetError: there is none.
    """
    if str(which) != "latest":
        return Path(which)
    found = all_of(out)
    if not found:
        raise PresetError(f"No checkpoint under {out / FOLDER}: nothing to resume. Start without resume=.")
    return found[-1]


def random_state() -> dict[str, Any]:
    """States of torch's generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
