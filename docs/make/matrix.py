"""Print the page that shows what every method keeps on every family, from what ``make test-all`` recorded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hf_accel import registry
from hf_accel.testing import FAMILIES, promises

COMMAND = "python docs/make/matrix.py > docs/matrix.md"
RESULTS = Path(__file__).parents[2] / "tests" / "results" / "matrix.json"
Row = dict[str, Any]


def page() -> str:
    """The page, in Markdown."""
    recorded: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    rows = {(row["method"], row["family"]): row for row in recorded}
    promised = Counter((p.method, p.family) for method in registry.methods() for p in promises(method))
    methods = [m for m in registry.methods() if any((m, family) in promised for family in FAMILIES)]
    table = [
        f"| {f} | " + " | ".join(_cell(rows.get((m, f)), promised[m, f]) for m in methods) + " |" for f in FAMILIES
    ]
    asked = sum(_asked(row) for place, row in rows.items() if place in promised)
    lines = [
        "# What is kept where",
        "",
        f"Written by `{COMMAND}` from `tests/results/matrix.json`, which `make test-all` records.",
        "A row is a family of tiny models, a column a method, a cell the number of promises that were kept there.",
        "What each promise says is in `hf_accel/testing/checks/`; [testing](testing.md) tells how to ask them.",
        "",
        "**n broken**: named below. s: skipped, with the reason below. *?*: not asked yet. -: the method does not",
        f"claim the family. Asked so far: {asked} of {sum(promised.values())} promises, at {_commits(rows.values())}.",
        "",
        f"| | {' | '.join(methods)} |",
        "|---" * (len(methods) + 1) + "|",
        *table,
        "",
        *_named("Broken", "broken", rows),
        *_named("Skipped", "skipped", rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _asked(row: Row) -> int:
    return row["kept"] + len(row["skipped"]) + len(row["broken"])


def _cell(row: Row | None, promised: int) -> str:
    if not promised:
        return "-"
    if row is None:
        return "*?*"
    parts = [str(row["kept"])] if row["kept"] else []
    parts += [f"**{len(row['broken'])} broken**"] if row["broken"] else []
    parts += [f"{len(row['skipped'])} s"] if row["skipped"] else []
    parts += [f"{promised - _asked(row)} *?*"] if _asked(row) < promised else []
    return ", ".join(parts)


def _commits(rows: Any) -> str:
    found = sorted({f"version {row['version']}, commit {row['commit']}" for row in rows})
    return "; ".join(found) or "no commit"


def _named(title: str, outcome: str, rows: dict[Any, Row]) -> list[str]:
    """Each reason once, with where it was given."""
    places: dict[tuple[str, str], list[str]] = {}
    for (method, family), row in rows.items():
        for promise, reason in row[outcome].items():
            places.setdefault((promise, reason), []).append(f"{method} on {family}" if family else method)
    if not places:
        return []
    listed = [f"- `{promise}`: {reason} ({_few(where)})" for (promise, reason), where in sorted(places.items())]
    return [f"## {title}", "", *listed, ""]


def _few(where: list[str]) -> str:
    return ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")


if __name__ == "__main__":
    print(page(), end="")
