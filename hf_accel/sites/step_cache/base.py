"""Methods that decide how much of the model each denoising step computes: the base class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from hf_accel.attention.call import Step
from hf_accel.base import Method
from hf_accel.hosts.clocks.steps import Clock
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.step_cache import seam as step_cache_host


class StepCacheMethod(Method):
    """A method that decides how much of the model each denoising step computes.

    Attributes:
        branch: the skip connection at which a U-Net is cut; see ``sites/step_cache/unet_views.py``.
        reads_timestep: :meth:`why_full` needs the noise level, which waits for the device.
    """

    branch: int
    reads_timestep: bool = False

    @abstractmethod
    def why_full(self, step: Step, kept: Step) -> str | None:
        """Why ``step`` is computed in full though the state of step ``kept`` is there; None if that is reused."""

    def begin(self, step: Step) -> None:
        """A generation begins at ``step``. May raise if it cannot be scheduled."""

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward with these arguments, by raising."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return step_cache_host.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clock) -> Any:
        return step_cache_host.install(model, self, ledger, report, clock)
