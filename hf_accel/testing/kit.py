"""What a method promises on a family of models, as callables that anyone's tests can run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_accel import registry
from hf_accel.errors import HFAccelError
from hf_accel.hosts.target import Model
from hf_accel.testing.case import Case, Check, untrained
from hf_accel.testing.claims import FAMILIES, Family, claims, family_named, loop_of
from hf_accel.testing.outcome import Skipped

# Of our own methods. Settings that make them do something on tiny models, and save time there.
TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "grat": {"group_size": (2, 2, 3)},  # default tiles are larger than tiny grids
    "svg2": {"kmeans_iter_init": 2, "num_q_centroids": 6, "num_k_centroids": 9},
    "losa": {"budget": 8, "page_size": 8, "min_prefix": 0},
    "quest": {"budget": 8, "page_size": 8, "min_prefix": 0},
}
EXCUSED: dict[str, dict[str, str]] = {
    "svg2": {"guidance_branches_do_not_see_each_other": "its centroids are shared by branches, as in the authors' code"}
}


@dataclass(frozen=True)
class Promise:
    """One promise of one method on one family. Calling it checks it.

    Attributes:
        method: name in the registry.
        family: name of the family; None for what a method promises by itself.
        name: of the promise, the same for every method and family.
        excuse: why the method does not keep it; None if it is to.

    Raises:
        BrokenPromise: when called, if it does not hold.
        Skipped: when called, if it cannot be asked here, or is excused. ``unittest`` and pytest count that as skipped.
    """

    method: str
    family: str | None
    name: str
    excuse: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    check: Check | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return "-".join(part for part in (self.method, self.family, self.name) if part is not None)

    def __call__(self) -> None:
        if self.check is None:
            raise Skipped(f"{self} is a name without a check")
        if self.excuse is not None:
            raise Skipped(f"excused: {self.excuse}")
        if self.family is None:
            self.check.run(Case(self.method, "", self.settings, lambda seed: _no_model(self)))
            return
        build = family_named(self.family).build
        if (refusal := registry.get(self.method).why_not(Model("model", build(0)))) is not None:
            raise Skipped(f"{self.method} refuses the tiny model of {self.family}: {refusal}")
        with untrained():
            self.check.run(Case(self.method, self.family, self.settings, build))


def _no_model(promise: Promise) -> Any:
    raise Skipped(f"{promise} is asked of no model")


def families(method: str) -> list[str]:
    """The families of the kit that a method claims by its facts, in the kit's order. Builds no model.

    Raises:
        UnknownMethod: no method has that name.
    """
    facts = registry.get(method).facts
    return [name for name, one in FAMILIES.items() if claims(facts, one)]


def promises(
    method: str,
    family: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    excused: Mapping[str, str] | None = None,
) -> list[Promise]:
    """What ``method`` promises on ``family``, each as a callable that raises where it does not hold.

    Args:
        method: name of a registered method.
        family: name of a family, one of :func:`families`; None: what the method promises by itself, and then what it
            promises on every family that it claims.
        settings: with which the method does something on tiny models (a few hundred tokens, hidden size 32), and saves
            time there. Checks of its full budget add ``Facts.full_budget`` to them.
        excused: names of promises that the method does not keep, each with the reason; they are skipped with it.

    Returns:
        The promises, in a fixed order; none if the method does not claim the family. No model is built before one is
        called.

    Raises:
        UnknownMethod: no method has that name.
        HFAccelError: the kit has no such family, or no promise has a name that is excused.
    """
    settings = TINY_SETTINGS.get(method, {}) if settings is None else settings
    excused = EXCUSED.get(method, {}) if excused is None else excused
    out = list(_of_itself(method, settings, excused)) if family is None else []
    for name in families(method) if family is None else [family]:
        out += _on(method, family_named(name), settings, excused)
    _refuse_unknown(excused, method)
    return out


def _of_itself(method: str, settings: Mapping[str, Any], excused: Mapping[str, str]) -> Iterable[Promise]:
    from hf_accel.testing.checks.declarations import CHECKS

    registry.get(method)
    return (Promise(method, None, c.name, excused.get(c.name), settings, c) for c in CHECKS.listed)


def _on(method: str, on: Family, settings: Mapping[str, Any], excused: Mapping[str, str]) -> Iterable[Promise]:
    if not claims(registry.get(method).facts, on):
        return ()
    checks = (check for check in _checks(method) if not check.on or on.name in check.on)
    return (Promise(method, on.name, c.name, excused.get(c.name), settings, c) for c in checks)


def _checks(method: str) -> list[Check]:
    loop = loop_of(registry.get(method).facts)
    if loop == "encoder":
        from hf_accel.testing.checks.linears import CHECKS as checks
    elif loop == "blocks":
        from hf_accel.testing.checks.blocks import CHECKS as checks
    elif loop == "text":
        from hf_accel.testing.checks.text import CHECKS as checks
    elif loop == "forward":
        from hf_accel.testing.checks.forwards import CHECKS as checks
    else:
        return []
    return checks.listed


def _refuse_unknown(excused: Mapping[str, str], method: str) -> None:
    from hf_accel.testing.checks.declarations import CHECKS

    known = {check.name for check in (*CHECKS.listed, *_checks(method))}
    if unknown := sorted(excused.keys() - known):
        raise HFAccelError(
            f"Excused are {', '.join(unknown)}; the promises of {method} are {', '.join(sorted(known))}."
        )
