"""What a check is given, and how checks are listed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from hf_accel import registry
from hf_accel.base import Method
from hf_accel.facts import Facts
from hf_accel.testing.outcome import BrokenPromise


@dataclass(frozen=True)
class Case:
    """A method on a family of models.

    Attributes:
        method: name in the registry.
        family: name of the family.
        settings: of the method in checks that do not ask for its full budget; they make it do something on tiny models
            and save time, nothing else.
        build: makes a new model of the family in eval mode from a seed; the same seed gives the same weights.
    """

    method: str
    family: str
    settings: Mapping[str, Any]
    build: Callable[[int], torch.nn.Module]

    @property
    def cls(self) -> type[Method]:
        return registry.get(self.method)

    @property
    def facts(self) -> Facts:
        return self.cls.facts

    @property
    def full_budget(self) -> dict[str, Any]:
        """The settings at which the method equals the unpatched model."""
        return {**self.settings, **self.facts.full_budget}

    @property
    def small_budget(self) -> dict[str, Any]:
        """Two bits where the method has bits; else the settings of the case."""
        known = {field.name for field in dataclasses.fields(self.cls.Config)}
        return self.full_budget | {"bits": 2} if "bits" in known else dict(self.settings)


@dataclass(frozen=True)
class Check:
    """A promise as a function of a :class:`Case`, asked of the families ``on`` alone if there are any."""

    name: str
    run: Callable[[Case], None]
    on: tuple[str, ...] = ()


@dataclass
class Checks:
    """The promises of one kind of methods, in the order in which they are written."""

    listed: list[Check] = field(default_factory=list)

    def promise(self, on: tuple[str, ...] = (), **variants: tuple[Any, ...]) -> Callable[[Any], Any]:
        """Decorator: a promise by the name of the function, one for every combination of the variants."""

        def note(function: Callable[..., None]) -> Callable[..., None]:
            for values in itertools.product(*variants.values()):
                name = "-".join([function.__name__, *(str(value).removeprefix("torch.") for value in values)])
                given = dict(zip(variants, values, strict=True))
                self.listed.append(Check(name, functools.partial(function, **given) if given else function, on))
            return function

        return note


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """Without the warning that weights were not trained for rcd: here they are random."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*RCD", UserWarning)
        yield


class LateError(RuntimeError):
    """What an installation raises that fails when everything is in place."""


@contextlib.contextmanager
def fails_at_the_end(method: str) -> Iterator[None]:
    """Meanwhile the method's installation is done whole, and then raises; the block has to try it.

    Raises:
        BrokenPromise: the block ended without the error.
    """
    cls = registry.get(method)
    install = cls.install

    def install_and_raise(self: Method, *args: Any, **kwargs: Any) -> None:
        install(self, *args, **kwargs)
        raise LateError("when everything was in place")

    with mock.patch.object(cls, "install", install_and_raise):
        try:
            yield
        except LateError:
            return
    raise BrokenPromise(f"apply() swallowed the error of an installation of {method} that failed.")
