"""What hf_accel costs before it does anything: CPU seconds of the first use, and the time of ``apply`` and ``revert``.

    python benchmarks/first_use.py --json benchmarks/results/first_use_cpu.json
    python benchmarks/first_use.py --checkout ../older   # the same figures of another checkout

First use: fresh processes, in which torch is loaded, or torch and diffusers with a small Wan, since whoever applies a
method has loaded a model. Process time of ``import hf_accel; hf_accel.methods()``, and of the first ``apply``, after a
collection of garbage, so that what others left behind is not collected on our account. Bytecode is there already.

Apply: a Wan of 40 layers, as many as the 14B has, and narrow, since nothing here depends on widths.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, describe_machine, save

METHODS = ("svg", "svg2", "radial", "grat", "sparge", "sla", "dense")

WAN = """
from diffusers import WanTransformer3DModel

def wan(layers):
    return WanTransformer3DModel(
        num_layers=layers, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16,
    )
"""

LISTED = """
import gc, json, time
import torch
gc.collect()
start = time.process_time()
import hf_accel
hf_accel.methods()
print(json.dumps({"methods_s": time.process_time() - start}))
"""

FIRST = (
    WAN
    + """
import gc, json, sys, time, warnings
import torch
warnings.simplefilter("ignore")
model = wan(2)
gc.collect()
start = time.process_time()
import hf_accel
hf_accel.methods()
listed = time.process_time()
hf_accel.apply(model, sys.argv[1])
print(json.dumps({"methods_s": listed - start, "apply_s": time.process_time() - listed}))
"""
)

REPEATED = (
    WAN
    + """
import json, sys, time, warnings
import torch
import hf_accel
warnings.simplefilter("ignore")
model, found = wan(40), {}
for name in sys.argv[2:]:
    times = []
    for _ in range(int(sys.argv[1]) + 2):
        wall, cpu = time.perf_counter(), time.process_time()
        applied = hf_accel.apply(model, name)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        start = time.perf_counter()
        applied.revert()
        times.append([wall, cpu, time.perf_counter() - start])
    found[name] = times[2:]
print(json.dumps(found))
"""
)


def child(checkout: Path, cache: str, code: str, *arguments: str) -> Any:
    """What a fresh process prints that finds hf_accel in ``checkout``."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env = inherited | {"PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}


def quantiles(times: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(times)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, q * len(ordered) // 100)] * 1e3, 2) for q in (20, 50, 80)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="where hf_accel is")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes for each figure")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of apply")
    parser.add_argument("--first", default="svg2", help="method of the first apply")
    parser.add_argument("--json")
    options = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ.get("PYTHONPYCACHEPREFIX", folder)
        for what, code, arguments in (
            ("methods, beside torch", LISTED, ()),
            (f"methods and {options.first}, beside torch and diffusers", FIRST, (options.first,)),
        ):
            child(options.checkout, cache, code, *arguments)  # writes the bytecode
            runs = [child(options.checkout, cache, code, *arguments) for _ in range(options.processes)]
            found = median_of(runs)
            total = round(statistics.median(sum(run.values()) for run in runs), 4)
            records.append({"first_use": what, **found, "total_s": total, "processes": options.processes})
            print(
                f"{what}: " + ", ".join(f"{key} {value:.3f}" for key, value in records[-1].items() if key[-2:] == "_s")
            )
        repeated = child(options.checkout, cache, REPEATED, str(options.repeats), *METHODS)
    for name, times in repeated.items():
        wall, cpu, back = (list(column) for column in zip(*times, strict=True))
        record = {"apply": name, "layers": 40, "repeats": options.repeats, **quantiles(wall)}
        record |= {"cpu_ms": quantiles(cpu)["p50_ms"], "revert_ms": quantiles(back)["p50_ms"]}
        records.append(record)
        print(
            f"apply {name:<7} p50 {record['p50_ms']:.1f} ms, CPU {record['cpu_ms']:.1f}, "
            f"revert {record['revert_ms']:.1f}"
        )
    save(options.json, machine, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
