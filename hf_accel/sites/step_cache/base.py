"""Methods that decide how much of the model each denoising step computes: the base classes.

A model has two slots, and a method in each can stand at once. *Inside*, a :class:`StepCacheMethod` begins a forward
from a hidden state that an earlier step kept; the networks that can be cut are U-Nets. At the *output*, an
:class:`OutputCacheMethod` does not run a forward at all and forecasts what it would have given; any denoiser has that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_accel.attention.call import Step
from hf_accel.base import Method
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.step_cache import output, seam
from hf_accel.sites.step_cache.output import Output


class StepCacheMethod(Method):
    """A method on the inside slot: :meth:`why_full` decides which steps are computed in full. The others begin from the
    hidden state that was kept at a skip connection.

    Attributes:
        branch: the skip connection at which a U-Net is cut; see ``sites/step_cache/unet_views.py``.
        reads_timestep: :meth:`why_full` needs the noise level, which waits for the device.
    """

    branch: int
    reads_timestep: bool = False

    @abstractmethod
    def why_full(self, step: Step, kept: Step, state: Any) -> str | None:
        """Why ``step`` is computed in full though the hidden state of step ``kept`` is there; None if that is reused.
        ``state`` is what :meth:`new_state` made for this generation."""

    def new_state(self, step: Step) -> Any:
        """State of one generation, which begins at ``step``. May raise if it cannot be scheduled."""
        return None

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward with these arguments, by raising."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return seam.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        return seam.install(model, self, ledger, report, clock)


class OutputCacheMethod(Method):
    """A method on the output slot: :meth:`why_run` decides which steps run, :meth:`forecast` gives the output of the
    others.

    Attributes:
        history: how many outputs of a guidance branch are kept for it.
        reads_timestep: it needs the noise level, which waits for the device.
    """

    history: int = 1
    reads_timestep: bool = False

    @abstractmethod
    def why_run(self, step: Step, kept: Sequence[Output], state: Any) -> str | None:
        """Why ``step`` runs though outputs of its branch are ``kept``, newest last; None if its output is forecast.
        ``state`` is what :meth:`new_state` made for this generation."""

    def forecast(self, step: Step, kept: Sequence[Output], state: Any) -> torch.Tensor:
        """The output of a forward that is not run, of the shape and dtype of those kept. Here: the newest again."""
        return kept[-1].value

    def new_state(self, step: Step) -> Any:
        """State of one generation, which begins at ``step``. May raise if it cannot be scheduled."""
        return None

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return output.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        return output.install(model, self, ledger, report, clock)
