"""Perplexity of mini-llama with weights of 8, 4, 3 and 2 bits, by rounding to nearest and by gptq.

    python benchmarks/gptq_quality.py --calibration 64 --json benchmarks/results/gptq_quality.json

At 4, 3 and 2 bits one row more has grids the other way round than ``gptq`` by default, fitted on the way or fixed
beforehand: what that default rests on. ``--rows`` measures some rows; ``--update`` puts them into a file that has
others, with the commit and the date of their own measurement.

Windows of held-out files, calibration on windows of training files, groups of 64, all linears inside of blocks. Every
row is applied to the same model by ``hf_accel.apply`` and taken off again; after the last one the full-precision
perplexity is measured once more and must be the same number, or the exit code is 1. ``output error`` is the mean over
layers of ``|(W - Q) X| / |W X|`` on the calibration tokens. ``seconds`` are those of ``apply``: of this machine as it
was, not a claim.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import save

import hf_accel
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.tables import align
from hf_accel.zoo import llama

NEAREST: dict[str, Any] = {"rounding": "nearest"}
ORDERED: dict[str, Any] = {"act_order": True}
SWEPT: dict[str, Any] = {"magr": True, "coordinate_descent": 1}
ON_THE_WAY: dict[str, Any] = {"static_groups": False}
AT_TWO_BITS: dict[str, dict[str, Any]] = {
    "gptq, grids on the way, act order": {"act_order": True, "static_groups": False},
    "gptq, sequential, act order": {"true_sequential": True, **ORDERED},
    "gptq, grids on the way, search": {"search": True, **ON_THE_WAY},
    "gptq, search, act order": {"search": True, **ORDERED},
    "gptq, search, act order + descent, inflation 0.1": {
        "search": True,
        "coordinate_descent": 30,
        "descent_inflation": 0.1,
        **ORDERED,
    },
    "gptq, grids on the way + descent": {"coordinate_descent": 30, **ON_THE_WAY},
    "gptq, act order + descent, inflation 0.1": {"coordinate_descent": 30, "descent_inflation": 0.1, **ORDERED},
    "magr + gptq, grids on the way": {"magr": True, **ON_THE_WAY},
    "magr, alpha 1e-4 + gptq, grids on the way": {"magr": True, "magr_alpha": 1e-4, **ON_THE_WAY},
    "magr + gptq, grids on the way + descent": {"magr": True, "coordinate_descent": 30, **ON_THE_WAY},
    "magr + gptq, act order + descent": {"magr": True, "coordinate_descent": 30, **ORDERED},
}
GRIDS: dict[int, dict[str, dict[str, Any]]] = {
    4: {"gptq, grids beforehand": {"static_groups": True}},
    3: {"gptq, grids beforehand": {"static_groups": True}},
    2: {"gptq, grids on the way": ON_THE_WAY},
}


def rows(bits: int) -> dict[str, dict[str, Any]]:
    """Name of a row to settings of gptq."""
    every: dict[str, dict[str, Any]] = {
        "nearest": NEAREST,
        "gptq": {},
        **GRIDS.get(bits, {}),
        "gptq, act order": ORDERED,
    }
    return every | (AT_TWO_BITS if bits == 2 else {"magr + gptq + descent": SWEPT})


def measure(model: Any, windows: torch.Tensor, calibration: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    given = {} if settings.get("rounding") == "nearest" else {"calibration": calibration}
    start = time.perf_counter()
    applied = hf_accel.apply(model, "gptq", group_size=64, progress=False, **settings, **given)
    seconds = time.perf_counter() - start
    run: Any = applied.report().entries[0].run
    errors = [layer.output_error for layer in run.layers]
    record = {
        "perplexity": llama.perplexity(model, windows),
        "bits_per_weight": run.bits_per_weight,
        "output_error": None if given == {} else sum(errors) / len(errors),
        "layers": len(run.layers),
        "rounded_to_nearest": sum(bool(layer.why_nearest) for layer in run.layers),
        "seconds": round(seconds, 1),
    }
    applied.revert()
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--calibration", type=int, default=128, help="windows of training text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", help="only these rows: NAME or 'BITS NAME', with semicolons between them")
    parser.add_argument("--update", action="store_true", help="keep the rows of the file that are not measured now")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = llama.load()
    model.to(device)
    windows = llama.windows(tokenizer, "heldout", options.windows, options.length).to(device)
    calibration = llama.windows(tokenizer, "train", options.calibration, options.length)
    told = {"windows": list(windows.shape), "calibration": list(calibration.shape), "group_size": 64}
    dense = llama.perplexity(model, windows)
    records: list[dict[str, Any]] = [{"row": "fp32", "bits": 32, "perplexity": dense, **told}]
    there = others_of(Path(options.json), records[0]) if options.update else None
    print(f"fp32: {dense:.4f}", flush=True)
    for bits in map(int, options.bits.split(",")):
        for name, settings in rows(bits).items():
            if options.rows and not {name, f"{bits} {name}"} & set(options.rows.split(";")):
                continue
            found = measure(model, windows, calibration, {"bits": bits, **settings})
            records.append({"row": name, "bits": bits, "settings": settings, **found, **told})
            print(f"{bits} bits, {name}: {found['perplexity']:.4f} ({found['seconds']} s)", flush=True)
    machine = describe_machine(device)
    if there is not None:
        records = merged(there, machine, records)
        machine = there["machine"]
    save(options.json, machine, records)
    print(table(records))
    again = llama.perplexity(model, windows)
    if again != dense:
        print(f"WRONG: {again} after undoing, {dense} before")
    return 0 if again == dense else 1


def others_of(file: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """What the file has, whose rows stay beside those of now.

    Raises:
        SystemExit: its model, windows or calibration are others.
    """
    there = json.loads(file.read_text())
    first = there["records"][0]
    same = all(first[key] == dense[key] for key in ("windows", "calibration", "group_size"))
    if not same or not math.isclose(first["perplexity"], dense["perplexity"], rel_tol=1e-5):
        sys.exit(
            f"{file} begins with {first}; measured now: {dense}. Give the same --windows, --calibration, --length."
        )
    return there


def merged(there: dict[str, Any], machine: dict[str, Any], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file with those that were measured now, in the order of :func:`rows`."""
    own = {"commit": machine["commit"], "date": machine["date"]}
    found = {(r["bits"], r["row"]): r for r in there["records"]} | {(r["bits"], r["row"]): r | own for r in new[1:]}
    order = [(32, "fp32"), *((bits, name) for bits in (8, 4, 3, 2) for name in rows(bits))]
    return [found[place] for place in order if place in found]


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        error = record.get("output_error")
        lines.append(
            [
                f"{record['bits']} bits, {record['row']}" if record["bits"] < 32 else record["row"],
                f"{record['perplexity']:.3f}",
                f"{record['perplexity'] / records[0]['perplexity']:.3f}",
                "-" if error is None else f"{error:.3f}",
                f"{record.get('bits_per_weight', 32):.2f}",
            ]
        )
    return align(["weights", "perplexity", "of fp32", "output error", "bits, all told"], lines)


if __name__ == "__main__":
    sys.exit(main())
