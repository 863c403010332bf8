"""sparge on mini-wan with one budget for all heads against budgets per head from `calibrate`, at equal densities.

    python benchmarks/sparge_calibration.py --json benchmarks/results/sparge_calibration.json

Calibrated on held-out prompts that the quality is not measured on; no dense steps or layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)
import torch

from hf_accel.measure.calibrate import calibrate
from hf_accel.measure.compare import DENSE, compare
from hf_accel.measure.demo import native_call
from hf_accel.zoo import heldout, path

BLOCKS = {"block_q": 64, "block_k": 64, "dense_steps": 0, "dense_layers": 0, "break_even": "off"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--calibration-prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.15])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(path("mini-wan"), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    items, call = heldout("mini-wan"), {**native_call(), "num_inference_steps": options.steps}
    others = [item["prompt"] for item in items[options.prompts :][: options.calibration_prompts]]
    requests: list[tuple[str, Any]] = []
    seconds = {}
    for density in options.densities:
        requests.append((f"equal {density}", {"sparge": {**BLOCKS, "density": density}}))
        found = calibrate(pipe, "sparge", prompts=others, density=density, settings=BLOCKS, **call)
        seconds[f"calibrated {density}"] = found.evidence["seconds"]
        requests.append((f"calibrated {density}", found.config))
        print(found, flush=True)
    chosen = items[: options.prompts]
    prompts, seeds = [item["prompt"] for item in chosen], [item["seed"] for item in chosen]
    result = compare(pipe, requests, prompts=prompts, seeds=seeds, **call)
    print(result)
    if options.json:
        data = result.to_dict()
        del data["reports"]
        data["summary"] = [row for row in data["summary"] if row["label"] != DENSE]
        data |= {"calibration_seconds": seconds, "calibration_prompts": len(others)}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
