"""What goes together: pairs of methods, and methods with what others put on a model.

Everything is derived from declared facts; nothing here knows a method by name. The page of the documentation is written
by ``docs/make/compatibility.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel import registry
from hf_accel.base import Method
from hf_accel.facts import HOSTS_OF, Host, Medium, overlap, place_in_words
from hf_accel.hosts.denoisers import describe
from hf_accel.hosts.foreign import FOREIGN, Foreign
from hf_accel.hosts.networks import host_of
from hf_accel.hosts.target import Model

Party = type[Method] | Foreign


def apart(a: Party, b: Party) -> str | None:
    """Why the two never meet, no model taking both; None if one does. Symmetric."""
    first, second = sorted((a, b), key=lambda party: party.name)
    families = [party.facts.families for party in (first, second) if not isinstance(party, Foreign)]
    strangers = len(families) == 2 and all(families) and not families[0] & families[1]
    if _places(first) & _places(second) and not strangers:
        return None
    words = (f"{party.name} is for {hosts_in_words(party)}" for party in (first, second))
    return f"no model takes both: {'; '.join(words)}"


def conflict(a: Party, b: Party) -> str | None:
    """Why two methods, or a method and something foreign, cannot be on one model together, or None. Symmetric.

    None also where they never meet (:func:`apart`).
    """
    if type(a) is type(b) and a.name == b.name:
        return None  # applying a method again replaces it
    if apart(a, b) is not None:
        return None
    first, second = sorted((a, b), key=lambda party: party.name)
    if (place := overlap(sites_of(first), sites_of(second))) is not None:
        return f"{first.name} and {second.name} both own the {place_in_words(place)} of a model; only one can"
    for method, other in ((first, second), (second, first)):
        # A step cache inside the model runs its own forward in parts.
        if "step cache: inside" in sites_of(method) and isinstance(other, Foreign) and other.replaces_forward:
            return f"{method.name} runs parts of the model's forward, and {other.name} has replaced that forward"
    return None


def takes(cls: type[Method], module: torch.nn.Module) -> bool:
    """Whether a method is meant for this kind of network, by its facts alone."""
    if cls.facts.kind == "recipe" and not cls.facts.hosts:
        return True
    spec, host = describe(module), host_of(module)
    if spec is None and host == "unet" and "attention" in cls.facts.sites:
        return False  # nobody reads its tokens
    shown = {spec.medium} if spec is not None else set(HOSTS_OF)
    return any(place == host and medium in shown for place, medium in cls.facts.places)


def misplaced(cls: type[Method], model: Model) -> str | None:
    """Why a method of this kind cannot be put on this part of a target, in words; None if it can.

    A patch belongs on a network, a recipe on a training, and a surgery on nothing.
    """
    kind = cls.facts.kind
    if kind == "surgery":
        return f"it is a surgery, which gives back a new model: hf_accel.convert(model, {cls.name!r})"
    if kind == "recipe" and model.trainer is None:
        return (
            f"it is a recipe of a training, and a {model.class_name} is none: pass what trains it, a transformers "
            f"Trainer or hf_accel's Finetuner or RCDTrainer: hf_accel.apply(trainer, {cls.name!r})"
        )
    if kind == "patch" and model.trainer is not None:
        return "it is a patch, which goes on the network that is trained"
    return None


def why_not(cls: type[Method], model: Model) -> str | None:
    """Why a method cannot be put on this part of a target, by its kind or by its own word; None if it can."""
    return misplaced(cls, model) or cls.why_not(model)


def sites_of(party: Party) -> frozenset[str]:
    """The places that a method, or something foreign, takes."""
    if isinstance(party, Foreign):
        return frozenset({party.site} if party.site is not None else ())
    return party.facts.sites


def _places(party: Party) -> frozenset[tuple[Host, Medium]]:
    if isinstance(party, Foreign):
        return frozenset((host, medium) for host in party.hosts for medium in HOSTS_OF)
    return party.facts.places


def hosts_in_words(party: Party) -> str:
    """The kinds of networks of a method, or of something foreign, for people."""
    if not isinstance(party, Foreign) and party.facts.kind == "recipe" and not party.facts.hosts:
        return "any training"
    if isinstance(party, Foreign):
        return ", ".join(sorted(party.hosts)) or "none that a method takes"
    media: dict[Host, list[str]] = {}
    for host, medium in sorted(party.facts.places):
        media.setdefault(host, []).append(medium)
    words = ", ".join(f"{host} ({', '.join(shown)})" for host, shown in media.items())
    return f"{words}: {', '.join(sorted(party.facts.families))}" if party.facts.families else words


@dataclass(frozen=True)
class Pair:
    """Whether two methods, or a method and something else on the model, work together, and why (not)."""

    first: str
    second: str
    works: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.first} + {self.second}: {'works' if self.works else 'no'}: {self.reason}"


def pair(a: Party, b: Party) -> Pair:
    """The verdict on two methods, or on a method and something foreign, that a model takes both."""
    reason = conflict(a, b)
    if reason is not None:
        return Pair(a.name, b.name, False, reason)
    foreign = b if isinstance(b, Foreign) else a
    if isinstance(foreign, Foreign):
        return Pair(a.name, b.name, True, foreign.note or "they do not touch the same things")
    return Pair(a.name, b.name, True, "they take different sites of the model")


@dataclass(frozen=True)
class Verdict:
    """Whether a method applies to a target, and why not; the recommended settings if the configs have them."""

    method: str
    applies: bool
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method:<16} {'applies' if self.applies else 'does not apply'}: {self.reason}"


class Explanation(list[Verdict]):
    """A list of verdicts that prints as a table, followed by what goes together.

    Attributes:
        pairs: every two methods that this target takes, and every such method with what stands on it.
        standing: what stands on the target now, ``(component, name)``: methods and foreign things.
    """

    def __init__(self, verdicts: Iterable[Verdict] = ()):
        super().__init__(verdicts)
        self.pairs: list[Pair] = []
        self.standing: list[tuple[str, str]] = []

    def __str__(self) -> str:
        lines = [*map(str, self)]
        if self.standing:
            lines.append(f"{'on the model':<16} " + ", ".join(f"{name} ({model})" for model, name in self.standing))
        if self.pairs:
            lines.append(f"{'together':<16} {self._together()}")
        return "\n".join(lines)

    def _together(self) -> str:
        """Refusals, those with one reason gathered, and a word on the rest."""
        groups: dict[str, list[str]] = {}
        single: list[str] = []
        for item in self.pairs:
            if item.works:
                continue
            site = shared_site(item)
            if site is None:
                single.append(f"{item.first} + {item.second}: {item.reason}")
            else:
                groups.setdefault(site, []).extend((item.first, item.second))
        words = [
            f"one of {', '.join(sorted(set(names)))} ({place_in_words(site)})" for site, names in sorted(groups.items())
        ]
        words += [f"not {text}" for text in single]
        if not words:
            return "all pairs work"
        return "; ".join(words) + ("; all other pairs work" if any(item.works for item in self.pairs) else "")


def shared_site(item: Pair) -> str | None:
    """The site that both of a refused pair own, if that is why it is refused."""
    parties = _parties()
    both = [sites_of(parties[name]) for name in (item.first, item.second) if name in parties]
    return overlap(*both) if len(both) == 2 else None


def _parties() -> dict[str, Party]:
    return {**{entry.name: entry for entry in FOREIGN}, **registry.methods()}


def pairs_among(methods: Sequence[type[Method]], foreign: Sequence[Foreign]) -> list[Pair]:
    """All pairs among methods that one model takes, and of these with the foreign things that stand on it."""
    among = [pair(a, b) for a, b in itertools.combinations(methods, 2)]
    return among + [pair(cls, entry) for cls in methods for entry in foreign]
