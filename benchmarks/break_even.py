"""Measure the break-even table of this machine and put it into the package's ``break_even.json``.

    python benchmarks/break_even.py                      # shapes that suit the machine, all methods
    python benchmarks/break_even.py --shapes 4x16x16,9x16x16 --heads 4 --head-dims 32,64 --methods svg2

Per method, length and density: how many times faster than the best dense attention of this machine, selection
included, warm state, on synthetic tokens. Rows of the methods measured take the place of this machine's old ones for
these methods; other machines' rows stay. Run it on a quiet machine: what stands in the table is what users are told.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)
import torch

from hf_accel import registry
from hf_accel.errors import HFAccelError
from hf_accel.measure.bench import AttentionBench, Row, bench_attention
from hf_accel.measure.machine import describe_machine
from hf_accel.sites.attention import break_even

SHAPES = {
    "cpu": ["4x16x16", "9x16x16", "16x16x16", "8x32x32"],
    "cuda": ["2x30x52", "5x30x52", "11x30x52", "21x30x52", "21x45x80"],
}
# The densest row is the one at which a method that is slow at full budget is told from one that is slow anyway.
DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.15, 0.08)


def settings_for(tokens: int) -> dict[str, dict[str, Any]]:
    """Settings other than the budget, where the defaults are made for one length only.

    svg2's clusters hold 250 queries and 75 keys, as 300 and 1000 do at Wan 720p.
    """
    return {
        "svg2": {
            "num_q_centroids": max(24, tokens // 250),
            "num_k_centroids": max(64, tokens // 75),
            "min_kc_ratio": 0.0,
        }
    }


def as_row(row: Row, bench: AttentionBench) -> dict[str, Any]:
    """One row of the table."""
    budget = registry.get(row.method).facts.budget
    return {
        "method": row.method,
        "budget": row.settings[budget] if budget is not None else None,
        "settings": row.settings,
        **{name: bench.shape[name] for name in ("tokens", "heads", "head_dim", "dtype")},
        "density": round(row.density, 4),
        "ratio": round(row.ratio, 4),
        "relative_error": round(row.relative_l1, 4),
    }


def merge(table: dict[str, Any], device: str, machine: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table with this device's rows of the methods measured exchanged for ``rows``."""
    measured = {(row["method"], row["dtype"]) for row in rows}
    old = table["devices"].get(device, {"rows": []})["rows"]
    kept = [row for row in old if (row["method"], row["dtype"]) not in measured]
    devices = {**table["devices"], device: {"machine": machine, "rows": kept + rows}}
    return {"schema": break_even.SCHEMA, "devices": devices}


def write(table: dict[str, Any], file: Path) -> None:
    """One row per line, so that a new measurement is a readable change."""
    lines = [f'{{"schema": {table["schema"]}, "devices": {{']
    for number, (name, device) in enumerate(sorted(table["devices"].items())):
        rows = ",\n".join("    " + json.dumps(row) for row in device["rows"])
        end = "," if number + 1 < len(table["devices"]) else ""
        lines.append(
            f'  {json.dumps(name)}: {{"machine": {json.dumps(device["machine"])}, "rows": [\n{rows}\n  ]}}{end}'
        )
    file.write_text("\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="token grids, FxHxW,...")
    parser.add_argument("--heads", type=int, help="default: 12 on a GPU, 4 on a CPU")
    parser.add_argument("--head-dims", help="default: 64,128 on a GPU, 32,64 on a CPU")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", type=Path, default=break_even.TABLE)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    shapes = (options.shapes or ",".join(SHAPES[device.type])).split(",")
    head_dims = [int(d) for d in (options.head_dims or ("64,128" if gpu else "32,64")).split(",")]
    rows = []
    for head_dim in head_dims:
        for shape in shapes:
            frames, height, width = map(int, shape.split("x"))
            found = bench_attention(
                grid=(frames, height, width),
                heads=options.heads or (12 if gpu else 4),
                head_dim=head_dim,
                device=device,
                methods=options.methods,
                densities=tuple(map(float, options.densities.split(","))),
                settings=settings_for(frames * height * width),
                rounds=options.rounds,
            )
            print(found, end="\n\n", flush=True)
            rows += [as_row(row, found) for row in found.rows if row.method != "dense"]
    if not rows:
        raise HFAccelError("No method ran at any of the shapes; the table is as it was.")
    table = json.loads(options.table.read_text()) if options.table.exists() else {"devices": {}}
    # The table goes to users: what was changed in somebody's checkout does not.
    machine = {name: value for name, value in describe_machine(device).items() if name != "changed_files"}
    write(merge(table, break_even.device_name(device), machine, rows), options.table)
    print(f"{len(rows)} rows for {break_even.device_name(device)} in {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
