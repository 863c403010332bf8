"""DeepCache: reuse of deep U-Net features between denoising steps.

*DeepCache: Accelerating Diffusion Models for Free*, Ma, Fang, Wang, CVPR 2024, arXiv 2312.00858.

The features below a skip connection change slowly from one step to the next. Of every N steps one runs the whole U-Net
and keeps **one** tensor, the hidden state ``F = U_{m+1}(.)`` that enters the up stage of skip branch ``m``; the other
N - 1 compute the shallow part only and put the kept tensor in its place (Eq. 4-5)::

    full step      D_0 .. D_last   mid   U_last ..... U_{m+1} -> F    U_m(concat(D_m, F)) .. U_0
    partial step   D_0 .. D_m                         F kept ----->   U_m(concat(D_m, F)) .. U_0

The time embedding is that of the step, always. Branches are counted per skip connection, from ``conv_in`` = 0, as in
the authors' package (the paper counts resolution levels from 1). ``sites/step_cache/unet_views.py`` cuts the network.

Which steps are full:

* uniform (Sec. 3.3): steps 0, N, 2N, ...;
* non-uniform (Sec. 3.4, Eq. 9): ``k = ceil(T / N)`` steps, dense around step ``center`` and sparse away from it, by
  mapping an even grid through a ``power``.

Decisions where paper and code differ or are silent:

* **Non-uniform lists** are the official code's, in which a negative number to the power ``1/p`` makes the grid a
  straight line in the complex plane, of which the real part is kept; the published figures used it. ``signed=True``
  takes the reading that the paper suggests, ``sign(x) |x|^(1/p)``, which clusters at ``center``.
* **Steps are counted**, not looked up by the value of the timestep as the package does, so that schedules that repeat a
  timestep work and the device is not waited for. An entry of the scheduler's list is a step; second-order samplers list
  their inner calls. Guidance in two forwards keeps one tensor per branch.
* **Phase**: step 0 is the first of *this* run, also for image-to-image at any strength and for refiners. With
  ``start_step`` the last step before it counts as step 0 of the schedule.
* ``start_step``, ``end_step`` and ``max_timestep_gap`` are ours, for samplers that suffer from caching: users of the
  package report strong changes with SDE and Karras schedules.
* **ControlNet** residuals change with every step and those of deep layers would come from the kept one: refused,
  unless ``controlnet="keep"`` accepts that (fresh residuals where the skip is computed, kept ones below). T2I-adapter
  residuals are the same at every step, so nothing is lost by keeping them.
"""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_accel.attention.call import Step
from hf_accel.attention.gate import resolve_share
from hf_accel.config import Config, setting
from hf_accel.errors import Conflict, InvalidSetting
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.step_cache.base import StepCacheMethod
from hf_accel.sites.step_cache.unet_views import deepest_branch

FEW_STEPS = 10  # distilled samplers; neighbouring steps of theirs are not alike


@dataclass(frozen=True)
class DeepCacheConfig(Config):
    """Settings of DeepCache; names of the authors' package where it has them."""

    METHOD = "deepcache"

    cache_interval: int = setting(3, "one step of so many is computed in full (N)", ge=1)
    cache_branch_id: int = setting(0, "skip connection up to which everything is computed at every step", ge=0)
    skip_mode: str = setting("uniform", "which steps are full", choices=("uniform", "non_uniform"))
    center: int = setting(15, "step around which full steps are dense (non_uniform)", ge=0)
    power: float = setting(1.4, "how strongly they gather there (non_uniform)", gt=1, le=10)
    signed: bool = setting(False, "non_uniform by a signed root, as the paper reads, not the official code's list")
    start_step: int | float = setting(0, "first steps that are all full", share=True)
    end_step: int | float = setting(1.0, "step from which on all are full again", share=True)
    max_timestep_gap: int | None = setting(
        None, "full where the timestep fell by more than this since the kept step; reads the timestep", ge=1
    )
    controlnet: str = setting(
        "refuse", "at ControlNet residuals: refuse, or keep the deep ones", choices=("refuse", "keep")
    )


@dataclass
class Schedule:
    """Which steps of one generation are full.

    Attributes:
        full: the steps of a non-uniform schedule; None: a uniform one.
        origin: the step that is step 0 of a uniform one.
    """

    full: frozenset[int] | None = None
    origin: int = 0


@register
class DeepCache(StepCacheMethod):
    """One tensor kept per interval; see the module's docstring."""

    name = "deepcache"
    paper = "DeepCache: Accelerating Diffusion Models for Free, arXiv 2312.00858"
    summary = "U-Nets: deep features are computed every N-th step and reused between"
    facts = Facts(
        site="step cache: inside",
        needs=frozenset({"step"}),
        media=frozenset({"image", "video"}),
        hosts=frozenset({"unet"}),
        full_budget={"cache_interval": 1},
    )
    Config = DeepCacheConfig
    config: DeepCacheConfig

    def __init__(self, config: DeepCacheConfig):
        super().__init__(config)
        self.branch = config.cache_branch_id
        self.reads_timestep = config.max_timestep_gap is not None

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        deepest = deepest_branch(model.module)
        if self.branch > deepest:
            raise InvalidSetting(self.name, "cache_branch_id", self.branch, f"in 0..{deepest} for {model.class_name}")
        return super().install(model, ledger, report, clock)

    def new_state(self, step: Step) -> Schedule:
        config = self.config
        if config.cache_interval == 1:
            return Schedule()
        if step.count is not None and step.count < FEW_STEPS:
            warnings.warn(
                f"hf_accel: deepcache with {step.count} steps: features of so distant steps differ, and little time is "
                f"to be saved. It is meant for {FEW_STEPS} steps and more.",
                stacklevel=2,
            )
        if config.skip_mode != "non_uniform":
            return Schedule()
        if step.count is None:
            raise InvalidSetting(
                self.name, "skip_mode", config.skip_mode, "'uniform' where the number of steps is unknown: loop over "
                "the scheduler's own timesteps, or call the model through its pipeline",
            )  # fmt: skip
        steps = non_uniform_steps(step.count, config.cache_interval, config.center, config.power, config.signed)
        return Schedule(frozenset(steps))

    def why_full(self, step: Step, kept: Step, state: Schedule) -> str | None:
        config = self.config
        start, end = (self._at(name, step) for name in ("start_step", "end_step"))
        if step.index < start:
            state.origin = step.index  # noted, since where steps are not counted ``start`` is known only when it comes
            return "before start_step"
        if step.index >= end:
            return "from end_step on"
        if config.max_timestep_gap is not None and abs(kept.timestep - step.timestep) > config.max_timestep_gap:
            return "the timestep fell by more than max_timestep_gap"
        if state.full is not None:
            return "schedule" if step.index in state.full else None
        return "schedule" if (step.index - state.origin) % config.cache_interval == 0 else None

    def _at(self, name: str, step: Step) -> float:
        """A setting that is a step or a share of the steps, as a step; beyond all steps where only shares are known."""
        value = getattr(self.config, name)
        if isinstance(value, int):
            return value
        if step.count is not None:
            return resolve_share(value, step.count, owner=self.name, field=name)
        if value == 1.0:
            return math.inf
        return step.index + 1 if step.progress < value else step.index

    def check(self, arguments: Mapping[str, Any]) -> None:
        config = self.config
        if config.controlnet == "refuse" and config.cache_interval > 1 and _controlled(arguments):
            raise Conflict(
                "deepcache: this forward has ControlNet residuals, which change at every step, and those of deep "
                "layers would come from the last full step. Take deepcache off, or accept that with controlnet='keep' "
                "and a small cache_interval."
            )


def _controlled(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("mid_block_additional_residual") is not None


def non_uniform_steps(count: int, interval: int, center: int, power: float, signed: bool = False) -> list[int]:
    """Full steps of ``count`` with ``k = ceil(count / interval)`` of them gathered around ``center`` (Eq. 9).

    ``k + 1`` even values from ``(-c)^(1/p)`` to ``(T - c)^(1/p)`` are raised to ``p`` and cut to whole numbers; without
    the first and the last, moved by ``c``, and 0 in front. Where numbers fall together ``p`` is lowered by 0.02 and the
    list made again.

    Raises:
        InvalidSetting: no power above 1 gives so many different steps.
    """
    number = -(-count // interval)
    if number == count:
        return list(range(count))
    p = power
    while p > 1:
        low, high = _root(-center, p, signed), _root(count - center, p, signed)
        grid = [low + (high - low) * i / number for i in range(number + 1)]
        values = sorted({int(_power(x, p, signed)) for x in grid})
        steps = [0, *(value + center for value in values[1:-1])]
        if len(set(steps)) == number and all(0 <= s < count for s in steps):
            return steps
        p -= 0.02
    raise InvalidSetting(
        "deepcache", "power", power, f"such that {number} of {count} steps around center={center} differ; none from "
        "there down to 1 does. Use a center inside the run, another cache_interval, or skip_mode='uniform'",
    )  # fmt: skip


def _root(x: float, p: float, signed: bool) -> complex:
    if signed:
        return complex(math.copysign(abs(x) ** (1 / p), x))
    return cmath.exp(cmath.log(x) / p) if x else 0j


def _power(x: complex, p: float, signed: bool) -> float:
    if signed:
        return math.copysign(abs(x.real) ** p, x.real)
    return (cmath.exp(cmath.log(x) * p) if x else 0j).real


__all__ = ["DeepCache", "DeepCacheConfig", "non_uniform_steps"]
