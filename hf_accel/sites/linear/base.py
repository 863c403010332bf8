"""Methods that put something else in the place of linear layers: the base class."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import Any, ClassVar

import torch

from hf_accel.base import Method
from hf_accel.errors import NothingPatched
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched, Skipped
from hf_accel.sites.linear.places import LinearSite, convolutions, replace, survey, why_irreplaceable


class LinearMethod(Method):
    """A method that replaces linear layers. An easy one is one function: :meth:`replacement`.

    ``targets`` and ``exclude`` in its settings, where they are, choose the linears as everywhere: by role, name or
    pattern (:func:`~hf_accel.sites.linear.places.find_linears`). Hooks, ties, adapters around a linear and the exact
    undo are seen to. A method that looks at inputs before it replaces anything overrides :meth:`replace_all`.

    Attributes:
        verb: what it does to a linear, as a past participle, for messages.
        no_convolutions: why convolutions are left alone, for the report; empty: they are not spoken of.
    """

    verb: ClassVar[str] = "replaced"
    no_convolutions: ClassVar[str] = ""

    @abstractmethod
    def replacement(self, site: LinearSite) -> torch.nn.Module:
        """The module that takes the place of a linear: called with ``[..., in_features]``, it gives
        ``[..., out_features]``, and has both numbers as attributes.

        Args:
            site: has the linear's ``weight`` (``[out_features, in_features]``, the layer's own memory: not to be
                written to or kept), ``bias`` (``[out_features]`` or None), ``in_features``, ``out_features``, ``name``
                and ``role``.

        Returns:
            torch.nn.Module: on any device, without hooks; it is moved to the device of the linear. What it computes
            with are buffers, which no optimizer finds; what is trained are adapters. One with other sizes, or without
            these attributes, is refused (:class:`~hf_accel.errors.WeightsMismatch`).
        """

    @classmethod
    def why_not_linear(cls, site: LinearSite) -> str | None:
        """Why this linear stays as it is, in words; None if it can be replaced."""
        return why_irreplaceable(site)

    def kind_in_words(self, site: LinearSite) -> str:
        """What stands in its place, for the report."""
        return f"{site.role} linear, {self.verb}"

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        what = kind(model.module)
        if what == "autoencoder":
            return "an autoencoder, whose weights are convolutions"
        sites, skipped = survey(model.module)
        if any(cls.why_not_linear(site) is None for site in sites):
            return None
        reasons = Counter([cls.why_not_linear(site) for site in sites] + list(skipped.values()))
        if cls.no_convolutions:
            reasons.update([cls.no_convolutions] * len(convolutions(model.module)))
        told = "; ".join(f"{n} x {reason}" for reason, n in reasons.items())
        return f"a {what} without linears that could be {cls.verb}{f' ({told})' if told else ''}"

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        sites = self.sites(model, report)
        handle = self.replace_all(model, sites, ledger, report)
        report.patched += [Patched(model.name, site.name, self.kind_in_words(site)) for site in sites]
        return handle

    def replace_all(self, model: Model, sites: list[LinearSite], ledger: Ledger, report: MethodReport) -> Any:
        """Put replacements in the places of all ``sites``. Returns the handle of the installation."""
        for site in sites:
            replace(site, self.replacement(site), ledger)
        return None

    def sites(self, model: Model, report: MethodReport) -> list[LinearSite]:
        """The linears to replace; those that cannot be go into the report with the reason.

        Raises:
            NothingPatched: there are none.
        """
        targets, exclude = getattr(self.config, "targets", None), getattr(self.config, "exclude", ())
        found, skipped = survey(model.module, targets, exclude)
        reasons = dict(skipped)
        if targets is None and self.no_convolutions:
            reasons |= dict.fromkeys(convolutions(model.module), self.no_convolutions)
        sites = []
        for site in found:
            reason = self.why_not_linear(site)
            if reason is None:
                sites.append(site)
            else:
                reasons[site.name] = reason
        report.skipped += [Skipped(model.name, name, reason) for name, reason in reasons.items()]
        if not sites:
            told = "; ".join(f"{n} x {reason}" for reason, n in Counter(reasons.values()).items()) or "there are none"
            raise NothingPatched(
                f"{self.name} looked for linears in {model.class_name}, and none can be {self.verb}: {told}."
            )
        return sites
