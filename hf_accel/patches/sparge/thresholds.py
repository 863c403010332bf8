"""Thresholds of single heads: the table in the settings, and one layer of it as the map is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.errors import InvalidSetting

# Bounds of the per-head thresholds; None: true or false.
THRESHOLDS: dict[str, tuple[float, float] | None] = {
    "topk": (0, 1),
    "cdfthreshd": (0, 1),
    "simthreshd1": (-1, 1),
    "pvthreshd": (0, float("inf")),
    "is_sparse": None,
}


@dataclass(frozen=True)
class HeadSettings:
    """How one call's blocks are chosen: by ``rule`` (``"topk"`` or ``"cdf"``, with ``amount``, or ``"density"``), those
    less alike than ``bar`` whole; numbers, or tensors ``[H, 1, 1]``. ``dense`` names heads that stay dense."""

    rule: str
    amount: float | torch.Tensor
    bar: float | torch.Tensor
    margin: float | None
    dense: torch.Tensor | None = None


def read_thresholds(path: str) -> dict[str, Any]:
    """The table in a YAML or JSON file: bare, or the ``sparge`` entry of a preset as ``calibrate`` writes it."""
    import yaml  # takes its time to load, and few settings name a file

    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSetting("sparge", "thresholds", path, f"a table or a readable file ({error})") from error
    if isinstance(content, dict) and "apply" in content:
        entries = [e for e in content["apply"] if isinstance(e, dict) and e.get("method") == "sparge"]
        content = (entries[0].get("settings") or {}).get("thresholds") if entries else None
    if not isinstance(content, dict):
        raise InvalidSetting("sparge", "thresholds", path, "a table, or a file that holds one")
    return content


def check_thresholds(table: Mapping[str, Any], budget: str) -> None:
    """Refuse a table with unknown or missing names, rows of different lengths, or values out of range.

    ``budget`` is the setting that the mode goes by: ``"topk"`` or ``"cdfthreshd"``.
    """

    def fail(what: str, allowed: str) -> None:
        raise InvalidSetting("sparge", "thresholds", what, allowed)

    for name in table:
        if name not in THRESHOLDS:
            fail(name, f"a table with {', '.join(THRESHOLDS)}")
    for name in (budget, "is_sparse"):
        if name not in table:
            fail(", ".join(table) or "an empty table", f"a table with at least {budget} (by the mode) and is_sparse")
    shapes = {}
    for name, rows in table.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            fail(f"{name}: {str(rows)[:60]}", "a list per layer, each with a value per head")
        shapes[name] = [len(row) for row in rows]
        bounds = THRESHOLDS[name]
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good = isinstance(value, bool) if bounds is None else number and bounds[0] <= value <= bounds[1]
                if not good:
                    words = "true or false" if bounds is None else f"a number from {bounds[0]} to {bounds[1]}"
                    fail(f"{value!r} at {name}[{layer}][{head}]", words)
    first, *others = shapes
    size = shape_in_words(shapes[first])
    for name in others:
        if shapes[name] != shapes[first]:
            fail(f"{name} with {shape_in_words(shapes[name])}", f"as large as {first}, which has {size}")


def shape_in_words(heads: list[int]) -> str:
    kinds = sorted(set(heads))
    return f"{len(heads)} layers of {' or '.join(map(str, kinds))} heads"


def read_heads(
    table: Mapping[str, Any], rule: str, call: AttentionCall, bar: float, margin: float | None
) -> HeadSettings:
    """One layer of a table of thresholds; ``bar`` and ``margin`` stand in for what it leaves out."""
    layer, heads, device = call.layer.index, call.query.shape[1], call.query.device
    row = {name: rows[layer] for name, rows in table.items()}
    if len(row["is_sparse"]) != heads:
        raise InvalidSetting(
            "sparge", "thresholds", f"{len(row['is_sparse'])} heads in layer {layer}",
            f"for the {heads} heads of {call.layer.name}; calibrate on this model",
        )  # fmt: skip

    def column(values: list) -> torch.Tensor:
        return torch.tensor(values, device=device).view(heads, 1, 1)

    return HeadSettings(
        rule,
        amount=column(row["cdfthreshd" if rule == "cdf" else "topk"]).float(),
        bar=column(row["simthreshd1"]).float() if "simthreshd1" in row else bar,
        # One margin per launch: the widest of the layer's heads skips least.
        margin=max(map(float, row["pvthreshd"])) if "pvthreshd" in row else margin,
        dense=~column(row["is_sparse"]),
    )
