"""Methods on decoding: the base classes of drafters and of gates.

A drafter guesses the next tokens, the model verifies them in one forward, and what it would have written itself is
kept: the text is the model's own, token for token under greedy decoding (up to rounding: a forward of several tokens
adds in another order), and of its distribution under sampling. A gate says when a guess is worth its price. The two can
be different methods, so that any gate goes with any drafter; a class that derives from both is both.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.errors import HFAccelError
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.decoding.draft import Draft


class DecodingPart(Method):
    """What drafters and gates have in common. Derive from :class:`DecodingMethod` or :class:`GateMethod`."""

    def new_state(self) -> Any:
        """State of one call of ``generate``; dropped at its end."""
        return None

    def verified(self, state: Any, tokens: torch.Tensor, draft: Draft, accepted: int) -> None:
        """A round is over.

        Args:
            state: of this call of ``generate``.
            tokens: the text so far, ``[1, S]``, int64, with what the round added.
            draft: what was verified; empty if nothing was.
            accepted: how many of its tokens the model kept. It adds one of its own, unless the text ends.
        """

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        from hf_accel.sites.decoding import transformers as host  # an author's module need not load transformers

        return host.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        """Make ``model.generate`` ask this method.

        Raises:
            HFAccelError: the facts do not say whether the class is a drafter, a gate or both.
        """
        from hf_accel.sites.decoding import transformers as host

        roles = self.roles()
        declared = {place.partition(": ")[2] for place in self.facts.sites if place.startswith("decoding: ")}
        if self.facts.sites != {"decoding"} and declared != set(roles):
            raise HFAccelError(
                f"{type(self).__name__} is {' and '.join(roles)}, so its facts must have "
                f"sites={{{', '.join(repr(f'decoding: {role}') for role in roles)}}}; they have "
                f"{sorted(self.facts.sites)}."
            )
        return host.install(model, self, roles, ledger, report)

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """The slots of the decoding site that this class can fill."""
        return tuple(
            role for role, base in (("drafter", DecodingMethod), ("gate", GateMethod)) if issubclass(cls, base)
        )


class DecodingMethod(DecodingPart):
    """A drafter: guesses the tokens that come next. One function: :meth:`draft`. Slot ``"decoding: drafter"``."""

    @abstractmethod
    def draft(self, state: Any, tokens: torch.Tensor) -> Draft:
        """What may come next.

        Args:
            state: what :meth:`new_state` made for this call of ``generate``.
            tokens: the text so far, prompt included: ``[1, S]``, int64, on the model's device. Not to be changed.

        Returns:
            Draft: on any device; :meth:`Draft.nothing` for no guess. What is beyond the wanted length is cut.
        """


class GateMethod(DecodingPart):
    """A gate: whether to draft now. One function: :meth:`worth_drafting`. Slot ``"decoding: gate"``."""

    @abstractmethod
    def worth_drafting(self, state: Any, tokens: torch.Tensor) -> bool:
        """Whether a draft pays in this round; the arguments are those of :meth:`DecodingMethod.draft`."""
