"""What a method is: declared facts, checked settings, and a way to put itself on a model.

Every site has a class of its own that derives from :class:`Method` and is what published methods derive from, in
``sites/SITE/base.py``. Composition is derived from the facts (:mod:`hf_accel.composition`), never from lists of
friends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hf_accel.config import Config as Settings  # in the class, Config is what a method declares
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport


class Given(dict[str, Any]):
    """What the caller handed over beside settings. Copies of a model share it, pickles leave it out: texts, models and
    functions are not ours to copy, and some cannot be."""

    def __deepcopy__(self, memo: dict) -> Given:
        return self

    def __reduce__(self) -> tuple[type[Given], tuple[()]]:
        return Given, ()


class Method(ABC):
    """A published method with its settings. Subclasses declare the class attributes and :meth:`install`.

    Attributes:
        name: registry name; the user types it.
        paper: title and arXiv number.
        summary: one line for ``methods()``.
        facts: see :class:`Facts`.
        Config: the settings class.
        trained_with: settings to which trained parameters are bound; weights trained with others are refused.
        inputs: what it takes beside settings, by keyword of ``apply``: data or objects, which no preset can hold
            (calibration texts, a tokenizer). In :meth:`install` those handed over are in ``self.given``.
        stands_on: methods without which it does not apply. In one request with one of them it is asked again when that
            one stands.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    facts: ClassVar[Facts]
    Config: ClassVar[type[Settings]]
    trained_with: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    stands_on: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Settings):
        self.config = config
        self.given = Given()

    @classmethod
    @abstractmethod
    def why_not(cls, model: Model) -> str | None:
        """Why the method does not apply to this model, in words; None if it does."""

    @abstractmethod
    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        """Change the model through the ledger and write into the report. May raise; the caller undoes."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the method added to the model, by dotted name there; empty if it learns nothing."""
        return {}

    def take_over(self, former: Any) -> None:  # noqa: B027 (a method that learns nothing takes nothing over)
        """Called before :meth:`install` when the same method stood on the model: keep what that one learned."""
