"""Collect fine-tunings of sla on mini-wan: figures as JSON, validation loss against minutes as a picture.

    python -m hf_accel_zoo.training.mini_wan.finetune_sla --out RUN15 --topk 0.15 --minutes 10    # one per budget
    python benchmarks/sla_finetune.py RUN15 RUN30 RUN50 --json benchmarks/results/sla_finetune.json \
        --picture docs/img/sla-finetune.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)

from hf_accel.measure.machine import describe_machine

KEPT = (
    "topk",
    "steps",
    "minutes",
    "validation_loss_before",
    "validation_loss_after",
    "psnr_db_before",
    "psnr_db_after",
)


def collect(folder: Path) -> dict[str, Any]:
    """What one run reported, with its curves: ``[step, loss]`` of training (every tenth) and of validation."""
    report, curve = (json.loads((folder / name).read_text()) for name in ("report.json", "loss.json"))
    arguments = {k: report["arguments"][k] for k in ("loss", "lora_rank", "method_lr", "clips", "precision", "average")}
    return {
        **{name: report[name] for name in KEPT},
        "prompts": len(report["prompts"]),
        "arguments": arguments,
        "train": [[row["step"], row["loss"]] for row in curve["train"][9::10]],
        "validation": [[row["step"], row["loss"]] for row in curve["validation"]],
    }


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        (line,) = axes.plot(*zip(*run["validation"], strict=True), marker="o", label=f"topk {run['topk']}, validation")
        axes.plot(*zip(*run["train"], strict=True), color=line.get_color(), alpha=0.35, linewidth=0.8)
    axes.set(xlabel="step", ylabel="velocity MSE to the dense model", yscale="log", title="sla on mini-wan, distilled")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    runs = [collect(folder) for folder in options.runs]
    options.json.write_text(json.dumps({"machine": describe_machine(), "runs": runs}, indent=1) + "\n")
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
