"""Quality of svg2 against its budget on mini-wan, beside the oracles and random clusters.

    python benchmarks/svg2_quality.py --prompts 8 --json benchmarks/results/svg2_quality.json --plot curve.png

For every held-out prompt: dense, then svg2 at top_p 0.5 / 0.7 / 0.9 / 1.0, random clusters at the densities that svg2
reached; and for the first ``--oracle-prompts`` of them true top-p per token, per 64-token block and per svg2 cluster
(slow on a CPU: they build the attention map). Same seed everywhere; PSNR and SSIM against dense; mean and worst over
prompts. The dense run goes through the seam too, so that its attention is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from oracles import ClusterOracle, Oracle, RandomClusters

from hf_accel.hosts.target import Model
from hf_accel.measure.demo import native_call
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.quality import psnr, ssim
from hf_accel.measure.sampling import Sample, generate_with
from hf_accel.presets import families
from hf_accel.zoo import heldout, path

BUDGETS = (0.5, 0.7, 0.9, 1.0)
ORACLE_BUDGETS = (0.5, 0.7, 0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--oracle-prompts", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change svg2's settings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(path("mini-wan"), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {**native_call(), "num_inference_steps": options.steps}
    wanted = families.settings_for(Model("transformer", pipe.transformer), "svg2")
    if wanted is None:
        raise SystemExit("configs/ has no svg2 settings for mini-wan")
    changes = dict(pair.split("=", 1) for pair in options.set)
    base = wanted.config.replace(**{k: yaml.safe_load(v) for k, v in changes.items()}).to_dict()["settings"]
    gates = {name: base[name] for name in ("dense_steps", "dense_layers")}

    rows: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
    for number, item in enumerate(heldout("mini-wan")[: options.prompts]):
        prompt, seed = item["prompt"], item["seed"]
        dense = generate_with(pipe, "dense", prompt, seed, **call)
        print(f"{prompt!r} seed {seed}: dense {dense.seconds:.1f} s", flush=True)

        def measure(name: str, budget: float, method: Any, dense=dense, prompt=prompt, seed=seed) -> Sample:
            sample = generate_with(pipe, method, prompt, seed, **call)
            row = {
                "psnr_db": psnr(sample.frames, dense.frames),
                "ssim": ssim(sample.frames, dense.frames),
                "density": sample.density,
                "attention_time_ratio": (dense.attention_seconds or 0.0) / (sample.attention_seconds or 1.0),
                "whole_time_ratio": dense.seconds / sample.seconds,
                "max_difference": float((sample.frames - dense.frames).abs().max()),
            }
            rows[name, budget].append(row)
            print(f"  {name:<14} {budget:<5} PSNR {row['psnr_db']:6.2f}  density {row['density']:.3f}", flush=True)
            return sample

        for budget in BUDGETS:
            reached = measure("svg2", budget, {"svg2": {**base, "top_p": budget}})
            if budget < 1:
                density = min(1.0, max(reached.density, 1e-3))
                measure("random-clusters", budget, RandomClusters.Config.build({**base, "density": density}))
        if number < options.oracle_prompts:
            for budget in ORACLE_BUDGETS:
                measure("oracle-token", budget, Oracle.Config.build({"top_p": budget, **gates}))
                measure("oracle-block", budget, Oracle.Config.build({"top_p": budget, "block": 64, **gates}))
                measure("svg2-oracle", budget, ClusterOracle.Config.build({**base, "top_p": budget}))

    summary = [summarise(name, budget, values) for (name, budget), values in sorted(rows.items())]
    print(table(summary))
    result = {
        "machine": describe_machine(),
        "model": "mini-wan",
        "call": call,
        "svg2_settings": base,
        "prompts": options.prompts,
        "summary": summary,
        "rows": [{"method": n, "budget": b, **row} for (n, b), values in rows.items() for row in values],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plot(summary, options.plot)
    return 0


def summarise(name: str, budget: float, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and worst over prompts."""
    finite = [min(row["psnr_db"], 200.0) for row in rows]  # equal videos have infinite PSNR
    return {
        "method": name,
        "budget": budget,
        "prompts": len(rows),
        "density": statistics.mean(row["density"] for row in rows),
        "psnr_mean": statistics.mean(finite),
        "psnr_worst": min(finite),
        "ssim_mean": statistics.mean(row["ssim"] for row in rows),
        "ssim_worst": min(row["ssim"] for row in rows),
        "max_difference": max(row["max_difference"] for row in rows),
        "attention_time_ratio": statistics.median(row["attention_time_ratio"] for row in rows),
        "whole_time_ratio": statistics.median(row["whole_time_ratio"] for row in rows),
    }


def table(summary: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | top_p | density | PSNR mean | PSNR worst | SSIM mean | max diff | attention x | whole x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        lines.append(
            f"| {row['method']} | {row['budget']} | {row['density']:.3f} "
            f"| {row['psnr_mean']:.2f} | {row['psnr_worst']:.2f} | {row['ssim_mean']:.4f} "
            f"| {row['max_difference']:.1e} | {row['attention_time_ratio']:.2f} | {row['whole_time_ratio']:.2f} |"
        )
    return "\n".join(lines)


def plot(summary: list[dict[str, Any]], file: Path) -> None:
    """PSNR against density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name in dict.fromkeys(row["method"] for row in summary):
        points = sorted((r["density"], r["psnr_mean"]) for r in summary if r["method"] == name and r["density"] < 0.999)
        if points and all(math.isfinite(y) for _, y in points):
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("density of sparse calls")
    axes.set_ylabel("PSNR against dense, dB (mean)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
