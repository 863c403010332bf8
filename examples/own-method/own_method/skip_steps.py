"""A step cache: only every n-th denoising step runs the network, the steps between take its last output again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.config import Config, setting
from hf_accel.method import Facts, Output, OutputCacheMethod, Step


@dataclass(frozen=True)
class SkipStepsConfig(Config):
    METHOD = "skip-steps"
    interval: int = setting(2, "of so many steps one runs", ge=1)
    first_steps: int = setting(1, "first steps that run in any case", ge=1)


class SkipSteps(OutputCacheMethod):
    name, paper, summary = "skip-steps", "none", "every second step takes the output of the one before"
    facts = Facts(
        sites=frozenset({"step cache: output"}),
        media=frozenset({"video", "image"}),
        hosts=frozenset({"transformer"}),
        full_budget={"interval": 1},
    )
    Config = SkipStepsConfig
    history = 1  # outputs of each guidance branch that are kept for this method

    def why_run(self, step: Step, kept: Sequence[Output], state: Any) -> str | None:
        """A text is the reason, which the report counts; None: the step does not run, see :meth:`forecast`."""
        if step.index < self.config.first_steps:
            return "first steps"
        if (step.index - self.config.first_steps + 1) % self.config.interval == 0:
            return "every n-th step"
        return None

    def forecast(self, step: Step, kept: Sequence[Output], state: Any) -> torch.Tensor:
        """The newest output again, as in the base class; a method that knows better extrapolates here."""
        return kept[-1].value
