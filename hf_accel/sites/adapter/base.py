"""Methods that add trained layers beside frozen ones: the base class.

An adapter put on by ``apply`` is a peft adapter: ``save_pretrained`` writes peft's files, ``PeftModel.from_pretrained``
and the Trainer take it, and ``revert`` takes it off again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from hf_accel.base import Method
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched


class Place(Protocol):
    """A module that an adapter goes around, such as :class:`~hf_accel.sites.linear.places.LinearSite`."""

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> torch.nn.Module: ...

    @property
    def attribute(self) -> str: ...

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def tied(self) -> Iterable[Any]:
        """Other places where the same module stands."""


@dataclass
class FrozenChange:
    """Parameters that were trainable, and are not while the adapter stands."""

    parameters: list[torch.nn.Parameter]

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def redo(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)


class AdapterMethod(Method):
    """A method that puts adapter layers around modules of a model: :meth:`places`, :meth:`layer`, :meth:`begin`.

    The base freezes what was trainable, exchanges the modules and writes the peft configuration where peft,
    transformers and diffusers look for it.

    Attributes:
        adapter_name: of the adapter in peft's books, unless the settings have a field ``adapter``.
    """

    adapter_name: ClassVar[str] = "default"

    @classmethod
    @abstractmethod
    def places(cls, module: torch.nn.Module) -> Sequence[Place]:
        """The modules that an adapter goes around."""

    @abstractmethod
    def peft_config(self, places: Sequence[Place]) -> Any:
        """The :class:`peft.PeftConfig` that describes the adapter, as ``from_pretrained`` will read it."""

    @abstractmethod
    def layer(self, place: Place, config: Any) -> torch.nn.Module:
        """The adapter layer around one module, with :meth:`peft_config`'s ``config``."""

    def begin(self, model: Model, report: MethodReport) -> None:
        """All layers are in place: give them the values they begin with, and tell the report."""

    @property
    def adapter(self) -> str:
        """Name of the adapter in peft's books."""
        return getattr(self.config, "adapter", self.adapter_name)

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        if getattr(model.module, "peft_config", None):
            return "it has adapters of peft already; take those off, or add this one to them with peft"
        return None if cls.places(model.module) else "it has no layers that this adapter goes around"

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        module = model.module
        places = self.places(module)
        config = self.peft_config(places)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        ledger.record(FrozenChange(trained))
        for place in places:
            layer = self.layer(place, config).train(place.module.training)
            for where in (place, *place.tied):
                ledger.set(where.parent, where.attribute, layer)
        ledger.set(module, "peft_config", {self.adapter: config})
        ledger.set(module, "_hf_peft_config_loaded", True)
        before = len(report.patched)
        self.begin(model, report)
        if len(report.patched) == before:
            report.patched += [Patched(model.name, place.name, f"{self.name} adapter") for place in places]
        return None
