"""Parts of the results page that its sections share."""

from __future__ import annotations

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(environment: dict[str, Any]) -> str:
    versions = environment.get("versions", {})
    torch_version = versions.get("torch")
    parts = [environment["device"], f"torch {torch_version}", f"commit {environment.get('commit')}"]
    if environment.get("threads"):
        parts.insert(1, f"{environment['threads']} threads")
    if environment.get("load_average") is not None:
        parts.append(f"load average {environment['load_average']} at the start")
    return "Measured on " + ", ".join(parts) + "."
