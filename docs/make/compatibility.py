"""``docs/compatibility.md``: what goes together, from what methods declare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hf_accel import registry
from hf_accel.base import Method
from hf_accel.composition import Pair, Party, apart, conflict, hosts_in_words, shared_site
from hf_accel.facts import place_in_words
from hf_accel.hosts.foreign import FOREIGN

COMMAND = "python docs/make/compatibility.py > docs/compatibility.md"
_YES, _NO, _APART = "yes", "**no**", "-"


def page() -> str:
    """``docs/compatibility.md``: methods by methods, methods by foreign things, and the reasons."""
    methods = [cls for cls in registry.methods().values() if cls.facts.kind != "surgery"]
    surgeries = [cls for cls in registry.methods().values() if cls.facts.kind == "surgery"]
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
        *(f"| `{cls.name}` | {cls.facts.sites_in_words} | {hosts_in_words(cls)} |" for cls in methods),
        "",
        "Methods of different components of a pipeline never meet. Applying a method again replaces it.",
        "",
        *_surgeries(surgeries),
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


def _surgeries(methods: Sequence[type[Method]]) -> list[str]:
    """Methods that stand on nothing, so that they meet no other."""
    if not methods:
        return []
    names = ", ".join(f"`{cls.name}`" for cls in methods)
    return [f"Surgeries ({names}) give back a new model, on which any method goes that suits it.", ""]


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
        site = shared_site(Pair(a.name, b.name, False, reason))
        if site is not None:
            sites.setdefault(site, []).extend((a.name, b.name))
        else:
            others.append(f"- {reason}.")
    shared = [
        f"- One of {', '.join(sorted(set(names)))}: each owns the {place_in_words(site)}."
        for site, names in sorted(sites.items())
    ]
    return shared + others


if __name__ == "__main__":
    print(page(), end="")
