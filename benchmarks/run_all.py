"""Run every benchmark that suits this machine and store its JSON under ``benchmarks/results/``.

    python benchmarks/run_all.py            # what this machine can do: GPU shapes on a GPU, CPU shapes elsewhere
    python benchmarks/run_all.py --quality  # and the quality curves of mini-wan and mini-sd (slow on a CPU)

Then ``python docs/make/tables.py`` writes ``docs/results.md`` from the JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def commands(gpu: bool, quality: bool) -> list[list[str]]:
    where = "gpu" if gpu else "cpu"
    shapes, flex = ("wan720,wan480", ["--flex"]) if gpu else ("cpu8k", [])
    runs = [
        [
            "attention.py",
            "--op",
            "variable",
            "--shape",
            shapes,
            *flex,
            "--json",
            f"variable_block_attention_{where}.json",
        ],
        ["attention.py", "--op", "block", "--shape", shapes, *flex, "--json", f"block_sparse_attention_{where}.json"],
        ["kmeans.py", "--shape", shapes, "--json", f"kmeans_{where}.json"],
        ["svg2_attention.py", "--shape", shapes if gpu else "mini-wan,cpu8k", "--json", f"svg2_attention_{where}.json"],
    ]
    grid = ["21", "45", "80"] if gpu else ["8", "32", "32"]
    heads = ["40", "128"] if gpu else ["4", "64"]
    bench = ["-m", "hf_accel.cli", "bench", "attention", "--grid", *grid, "--heads", heads[0], "--head-dim", heads[1]]
    runs.append([*bench, "--json", f"attention_methods_{where}.json", "--picture", f"attention_methods_{where}.png"])
    runs.append(["losa_step.py", "--json", f"losa_step_{where}.json"])
    for name, on_gpu, on_cpu in (
        ("quantized_linear", "llama-4096,llama-14336", "cpu-2048"),
        ("hadamard", "llama", "cpu"),
        ("qwha_weight", "llama-4096,llama-up,llama-down", "cpu-1024"),
        ("qwha_step", "llama3b", "cpu512"),
    ):
        runs.append([f"{name}.py", "--shape", on_gpu if gpu else on_cpu, "--json", f"{name}_{where}.json"])
    runs.append(["break_even.py"])
    if not gpu:
        runs.append(["first_use.py", "--json", "first_use_cpu.json"])
    if gpu:
        runs.append(["deepcache_gpu.py", "--json", "deepcache_gpu.json"])
    if quality:
        pictures = str(HERE.parent / "docs" / "img" / "sparse-quality")
        runs.append(["sparse_quality.py", "--json", "sparse_quality.json", "--picture", pictures])
        runs.append(["svg2_quality.py", "--json", "svg2_quality.json", "--plot", "svg2_quality.png"])
        caches = str(HERE.parent / "docs" / "img" / "deepcache.png")
        runs.append(["deepcache.py", "--json", "deepcache.json", "--picture", caches])
        runs.append(["losa_quality.py", "--json", "losa_quality.json"])
        runs.append(["gptq_quality.py", "--json", "gptq_quality.json"])
        adapters = str(HERE.parent / "docs" / "img" / "qwha-quality.png")
        runs.append(["qwha_quality.py", "--again", "--json", "qwha_quality.json", "--picture", adapters])
        curve = str(HERE.parent / "docs" / "img" / "rcd-curve.png")
        runs.append(["rcd_curve.py", "--json", "rcd_curve.json", "--picture", curve])
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    failed = []
    for run in commands(torch.cuda.is_available(), options.quality):
        script, *rest = run
        rest = [str(HERE / "results" / word) if word.endswith((".json", ".png")) else word for word in rest]
        program = script if script == "-m" else str(HERE / script)
        print("$", "python", program, *rest, flush=True)
        if subprocess.run([sys.executable, program, *rest], check=False, cwd=HERE.parent).returncode:
            failed.append(script)
    print("failed: " + ", ".join(failed) if failed else "all benchmarks ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
