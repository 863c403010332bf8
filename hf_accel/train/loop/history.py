"""The loss curve: kept while training, written as JSON and drawn."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_FILE, PICTURE_FILE = "loss.json", "loss.png"


@dataclass
class History:
    """What happened at each step.

    Attributes:
        about: settings of method and training, for whoever reads the file.
        train: ``{"step", "loss", "lr"}`` per optimizer step; the loss is the mean over its batches.
        validation: ``{"step", "loss"}``, beginning with step 0, before anything was trained.
        seconds: wall time of all training steps so far, validation included.
    """

    about: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def read(cls, file: Path) -> History:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """Write ``loss.json`` and, where matplotlib is installed, ``loss.png``."""
        (folder / JSON_FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            self._draw(folder / PICTURE_FILE)

    def _draw(self, file: Path) -> None:
        from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        steps, losses = [e["step"] for e in self.train], [e["loss"] for e in self.train]
        axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.4, label="running mean")
        if self.validation:
            axes.plot(
                [e["step"] for e in self.validation], [e["loss"] for e in self.validation],
                color="tab:orange", marker="o", markersize=3, label="validation",
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        figure.savefig(file, dpi=130)


def smoothed(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential running mean without a bias towards the start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out.append(mean / weight)
    return out
