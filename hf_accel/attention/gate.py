"""Budgets that are a count or a share: ``dense_steps`` and ``dense_layers`` mean the same in every method."""

from __future__ import annotations

import math

from hf_accel.errors import InvalidSetting


def resolve_share(value: int | float, total: int, *, owner: str, field: str) -> int:
    """How many of ``total`` a budget means.

    An int is a count (more than ``total`` means all). A float is a share: ``floor(value * total)``, so 1.0
    means all, where 1 means one. Products that only rounding keeps below a whole number count as that number:
    0.29 of 100 is 29.

    Args:
        value: the setting.
        total: number of steps or layers.
        owner, field: method and setting, for the words of the error.

    Raises:
        InvalidSetting: a negative count, a share outside ``[0, 1]``, or something that is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidSetting(owner, field, value, "a count (int) or a share (float between 0 and 1)")
    if isinstance(value, int):
        if value < 0:
            raise InvalidSetting(owner, field, value, "0 or more as a count")
        return min(value, total)
    if not 0 <= value <= 1:
        raise InvalidSetting(owner, field, value, "between 0 and 1 as a share (a float); a count must be an int")
    return math.floor(value * total + 1e-9 * total)
