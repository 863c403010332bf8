"""Settings at which a method reaches a density: a search along the one setting that dials it (``Facts.budget``)."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_accel.base import Method

TOLERANCE = 0.01
TRIES = 14
# When and where a method runs is not a budget: while its density is searched it runs, at once.
UNGATED: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, "break_even": "off"}
_WIDE = 1e4  # how far a number without an upper bound is followed


@dataclass(frozen=True)
class Reached:
    """The nearest density found and its settings; ``tries`` counts the measurements made for it."""

    settings: dict[str, Any]
    density: float
    tries: int

    def near(self, wanted: float, tolerance: float = 2 * TOLERANCE) -> bool:
        """Whether the density is the one wanted; a method need not reach every density at every grid."""
        return abs(self.density - wanted) <= tolerance


def ungated(method: type[Method]) -> dict[str, Any]:
    """:data:`UNGATED`, as far as the method has these settings."""
    known = {field.name for field in dataclasses.fields(method.Config)}
    return {name: value for name, value in UNGATED.items() if name in known}


class Dial:
    """The budget setting of a method, turned until a measured density is the wanted one.

    What was measured for one density is used for the next. Density must rise or fall with the setting; which of the
    two is found out.

    Args:
        method: with ``facts.budget``, or none: then only the given settings can be measured.
        measure: density at settings; called once per value.
        settings: everything else, kept as it is.
    """

    def __init__(self, method: type[Method], measure: Callable[[dict[str, Any]], float], settings: dict[str, Any]):
        self.method, self.settings = method, settings
        self._measure = measure
        self._known: dict[Any, float] = {}
        self._tries = 0

    def reach(self, density: float) -> Reached:
        """The settings whose density is nearest to ``density``, within :data:`TRIES` measurements."""
        self._tries = 0
        name = self.method.facts.budget
        if name is None:
            measured = self._measure(self.settings)
            return Reached(dict(self.settings), measured, 1)
        field = next(field for field in dataclasses.fields(self.method.Config) if field.name == name)
        choices = field.metadata.get("choices")
        if choices is not None:
            for choice in choices:
                self._density(choice)
        else:
            self._bisect(density, *_range(self.method, field))
        best = min(self._known, key=lambda value: abs(self._known[value] - density))
        return Reached({**self.settings, name: best}, self._known[best], self._tries)

    def _density(self, value: Any) -> float:
        if value not in self._known:
            self._tries += 1
            self._known[value] = self._measure({**self.settings, str(self.method.facts.budget): value})
        return self._known[value]

    def _bisect(self, density: float, low: float, high: float, whole: bool) -> None:
        """Measure between the two nearest known values around ``density`` until one is near enough."""
        if low <= density <= high and not whole:
            self._density(density)  # many budgets are a density, and then this is it
        ends = self._density(low), self._density(high)
        rising = ends[1] >= ends[0]
        plateaus = 0  # whole blocks: many values have one density, and what lies between two steps is out of reach
        while self._tries < TRIES:
            below = [v for v, d in self._known.items() if (d < density) == rising and d != density]
            above = [v for v, d in self._known.items() if (d < density) != rising and d != density]
            if not below or not above or min(abs(d - density) for d in self._known.values()) <= TOLERANCE:
                return  # reached, or out of reach: the nearest end is the answer
            left, right = max(below), min(above)
            middle = _between(left, right, whole)
            if middle in (left, right) or left >= right:
                return
            plateaus += self._density(middle) in (self._known[left], self._known[right])
            if plateaus == 4:
                return


def _range(method: type[Method], field: dataclasses.Field) -> tuple[float, float, bool]:
    """Least and greatest value of a setting, and whether it is a whole number."""
    rules = field.metadata
    kind = typing.get_type_hints(method.Config)[field.name]
    whole = kind is int
    bounds = {name: value for name in ("ge", "gt", "le") if (value := rules.get(name)) is not None}
    low, high = bounds.get("ge", 0.0), bounds.get("le", _WIDE)
    if "gt" in bounds:
        low = bounds["gt"] + (1 if whole else 1e-3)
    return (int(low), int(high), True) if whole else (float(low), float(high), False)


def _between(left: float, right: float, whole: bool) -> float:
    """Half way; half way by ratio where the ends are far apart, since a wide range is one of scales."""
    if left > 0 and right > 16 * left:
        middle = math.sqrt(left * right)
    elif left == 0 and right > 16:
        middle = math.sqrt(right)
    else:
        middle = (left + right) / 2
    return int(middle) if whole else middle
