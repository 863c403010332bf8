"""The learning-rate schedule WSD of MiniCPM (arXiv 2404.06395): a linear warm-up, a plateau, a linear decay."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel.config import Config, setting
from hf_accel.method import Facts, Recipe


@dataclass(frozen=True)
class WSDConfig(Config):
    METHOD = "wsd"
    warmup: float = setting(0.05, "share of the steps in which the rate rises", ge=0, le=1)
    decay: float = setting(0.2, "share of the steps, at the end, in which it falls", ge=0, le=1)
    floor: float = setting(0.1, "factor at the last step", ge=0, le=1)


class WarmupStableDecay(Recipe):
    name, paper, summary = "wsd", "MiniCPM (arXiv 2404.06395)", "learning rate: warm-up, plateau, decay"
    # The slots of what the class overrides: two recipes with a schedule exclude each other.
    facts = Facts(sites=frozenset({"training: schedule"}), kind="recipe")
    Config = WSDConfig

    def schedule(self, step: int, total: int) -> float:
        config = self.config
        rising, falling = round(config.warmup * total), round(config.decay * total)
        if step < rising:
            return (step + 1) / (rising + 1)
        left = total - 1 - step
        if left < falling:
            return config.floor + (1 - config.floor) * left / falling
        return 1.0
