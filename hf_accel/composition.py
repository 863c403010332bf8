"""What goes together: pairs of methods, and methods with what others put on a model.

Everything is derived from declared facts (``method.conflict``, ``method.apart``); nothing here knows a method by name.
``python -m hf_accel.composition > docs/compatibility.md`` writes the page of the documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_accel import registry
from hf_accel.hosts.foreign import FOREIGN, Foreign
from hf_accel.method import EXCLUSIVE_SITES, Method, Party, apart, conflict, hosts_in_words, site_of

COMMAND = "python -m hf_accel.composition > docs/compatibility.md"


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
            site = _shared_site(item)
            if site is None:
                single.append(f"{item.first} + {item.second}: {item.reason}")
            else:
                groups.setdefault(site, []).extend((item.first, item.second))
        words = [f"one of {', '.join(sorted(set(names)))} ({site} site)" for site, names in sorted(groups.items())]
        words += [f"not {text}" for text in single]
        if not words:
            return "all pairs work"
        return "; ".join(words) + ("; all other pairs work" if any(item.works for item in self.pairs) else "")


def _shared_site(item: Pair) -> str | None:
    """The site that both of a refused pair own, if that is why it is refused."""
    parties = _parties()
    sites = {site_of(parties[name]) for name in (item.first, item.second) if name in parties}
    site = sites.pop() if len(sites) == 1 else None
    return site if site in EXCLUSIVE_SITES else None


def _parties() -> dict[str, Party]:
    return {**{entry.name: entry for entry in FOREIGN}, **registry.methods()}


def pairs_among(methods: Sequence[type[Method]], foreign: Sequence[Foreign]) -> list[Pair]:
    """All pairs among methods that one model takes, and of these with the foreign things that stand on it."""
    among = [pair(a, b) for a, b in itertools.combinations(methods, 2)]
    return among + [pair(cls, entry) for cls in methods for entry in foreign]


# -- the page of the documentation -----------------------------------------------------------------------------------

_YES, _NO, _APART = "yes", "**no**", "-"


def page() -> str:
    """``docs/compatibility.md``: methods by methods, methods by foreign things, and the reasons."""
    methods = list(registry.methods().values())
    lines = [
        "# What goes together",
        "",
        f"Written by `{COMMAND}` from what methods declare (`Facts`)",
        "and from `hosts/foreign.py`; tests hold both to what really happens on tiny models.",
        "`hf_accel.explain(pipe)` says the same of the pipeline at hand, with what stands on it.",
        "",
        f"{_YES}: in any order of applying, enabling and taking off. {_NO}: refused with `Conflict`; reasons below.",
        f"{_APART}: no model takes both.",
        "",
        "## Methods with methods",
        "",
        *_table(
            [cls.name for cls in methods], [(cls.name, [_cell(cls, other) for other in methods]) for cls in methods]
        ),
        "",
        "| method | site | works on |",
        "|---|---|---|",
        *(f"| `{cls.name}` | {cls.facts.site} | {hosts_in_words(cls)} |" for cls in methods),
        "",
        "Methods of different components of a pipeline never meet. Applying a method again replaces it.",
        "",
        *_refusals(list(itertools.combinations(methods, 2))),
        "",
        "## Methods with what others put on the model",
        "",
        *_table([cls.name for cls in methods], [(e.name, [_cell(cls, e) for cls in methods]) for e in FOREIGN]),
        "",
        "| | what it is | together with a method | taken off by |",
        "|---|---|---|---|",
        *(f"| {e.name} | {e.what} | {e.note or 'nothing to know'} | {e.off} |" for e in FOREIGN),
        "",
        *_refusals([(cls, entry) for cls in methods for entry in FOREIGN]),
        "",
        "`apply()` refuses a method whose site is taken. Enabling another library's cache *after* `apply()` cannot be",
        "refused by us: `explain()` shows it. Taking either off leaves the other at work.",
    ]
    return "\n".join(lines) + "\n"


def _cell(a: Party, b: Party) -> str:
    if a is b or apart(a, b) is not None:
        return _APART if a is not b else ""
    return _NO if conflict(a, b) is not None else _YES


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    head = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]


def _refusals(pairs: Sequence[tuple[Party, Party]]) -> list[str]:
    """Each reason once: shared sites as sets, the others as sentences."""
    sites: dict[str, list[str]] = {}
    others = []
    for a, b in pairs:
        reason = conflict(a, b)
        if reason is None:
            continue
        site = _shared_site(Pair(a.name, b.name, False, reason))
        if site is not None:
            sites.setdefault(site, []).extend((a.name, b.name))
        else:
            others.append(f"- {reason}.")
    shared = [
        f"- One of {', '.join(sorted(set(names)))}: each owns the {site} site." for site, names in sorted(sites.items())
    ]
    return shared + others


if __name__ == "__main__":
    print(page(), end="")
