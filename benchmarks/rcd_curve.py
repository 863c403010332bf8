"""RCD on mini-rcd: accuracy against tokens per step, beside the same model trained equally long without residuals.

    python benchmarks/rcd_curve.py --json benchmarks/results/rcd_curve.json --picture docs/img/rcd-curve.png

Held-out items, the same for all rows, decoded greedily by ``hf_accel.generate_blocks`` with the dynamic rule at commit
thresholds from 0.5 to 1.0 (at 1.0 a step commits one token) and read by the tasks' own checker. Rows:

* ``seqd``: sequential denoising, the plain masked objective, with the training of both RCD stages in steps;
* ``rcd``: the RCD weights with residuals;
* ``rcd, residual off``: the RCD weights without, which shows what of the gain is the residual's.

Tokens per step are new tokens over the denoising steps that each row of a batch needed, compared at equal accuracy.

The overhead is measured apart: 16 denoising steps of a block that is filled one token at a time, with the residual and
without, in turn, on the same weights and tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # (finds the checkout)
import torch

import hf_accel
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.tables import align
from hf_accel.sites.attention.break_even import wait_for
from hf_accel_zoo.training.mini_sdar import tasks

ZOO = common.ROOT / "hf_accel" / "zoo"
SEQD, RCD, OFF = "seqd", "rcd", "rcd, residual off"


@dataclass
class Point:
    """One row at one threshold."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        every = [answer for answers in self.right.values() for answer in answers]
        return {
            "accuracy": sum(every) / len(every),
            "by_task": {task: sum(answers) / len(answers) for task, answers in self.right.items()},
            "items": len(every),
            "tokens_per_step": self.tokens / self.steps,
            "tokens": self.tokens,
            "steps": self.steps,
        }


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def decode(model: Any, items: list[tasks.Item], threshold: float, point: Point) -> None:
    """Answer a batch of items whose prompts have one length, and count."""
    device = next(model.parameters()).device
    prompts = torch.tensor([item.prompt for item in items], device=device)
    out = hf_accel.generate_blocks(
        model, prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, threshold=threshold,
        return_dict=True,
    )  # fmt: skip
    for item, row in zip(items, out.sequences[:, prompts.shape[1] :].tolist(), strict=True):
        point.right[item.task].append(tasks.check(item, row))
    point.tokens += sum(out.lengths)
    point.steps += sum(out.denoising_steps)


@torch.no_grad()
def overhead(model: Any, settings: dict[str, Any], length: int, rows: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a denoising step without and with the residual, medians over ``repeats`` blocks each."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    block, mask = model.config.block_size, model.config.mask_token_id
    prompts = torch.tensor([tasks.heldout("recall", length, seed).prompt for seed in range(rows)], device=device)
    cache = DynamicCache()
    model(prompts[:, : length // block * block], past_key_values=cache, store_kv=True, use_cache=True)
    fillings = []
    for filled in range(block):
        tokens = torch.full((rows, block), mask, device=device)
        tokens[:, :filled] = prompts[:, :filled]
        fillings.append(tokens)

    def a_block() -> float:
        wait_for(device)
        begin = time.perf_counter()
        for tokens in fillings:
            model(tokens, past_key_values=cache, store_kv=False, use_cache=True)
        wait_for(device)
        return (time.perf_counter() - begin) / block * 1e3

    def with_residual() -> float:
        with hf_accel.apply(model, "rcd", **settings):
            return a_block()

    ways: tuple[Callable[[], float], ...] = (a_block, with_residual)
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for number in (0, 1) if turn % 2 else (1, 0):
            taken = ways[number]()
            if turn:  # the first is warm-up
                found[number].append(taken)
    plain, ours = (statistics.median(times) for times in found)
    ratio = statistics.median(b / a for a, b in zip(*found, strict=True))
    return {
        "prefix": length // block * block, "rows": rows, "block": block, "repeats": repeats,
        "plain_ms": plain, "rcd_ms": ours, "overhead_ms": ours - plain, "overhead": ratio - 1,
    }  # fmt: skip


def tokens_at(curve: dict[str, dict], goal: float) -> float | None:
    """Most tokens per step at which a curve has the accuracy ``goal``, between its points by straight lines."""
    found = sorted(((p["tokens_per_step"], p["accuracy"]) for p in curve.values()), reverse=True)
    if found[0][1] >= goal:
        return found[0][0]
    for (many, low), (few, high) in itertools.pairwise(found):
        if high >= goal:
            return many + (few - many) * (goal - low) / (high - low)
    return None


def at_equal_accuracy(curves: dict[str, dict[str, dict]]) -> list[dict[str, Any]]:
    """Tokens per step of every row at seqd's best accuracy and at those that lie 1, 2, 5 and 10 points below it."""
    best = max(point["accuracy"] for point in curves[SEQD].values())
    goals = [best - points / 100 for points in (0, 1, 2, 5, 10)]
    return [{"accuracy": g, **{label: tokens_at(curve, g) for label, curve in curves.items()}} for g in goals]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rcd", type=Path, default=ZOO / "mini-rcd")
    parser.add_argument("--seqd", type=Path, default=ZOO / "mini-seqd")
    parser.add_argument("--reference", type=Path, help="for --init warm")
    parser.add_argument("--init", default="cold", choices=("cold", "warm", "self", "dirichlet"))
    parser.add_argument("--t-res", type=float, default=1.0)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256])
    parser.add_argument("--items", type=int, default=128, help="per task and length")
    parser.add_argument("--first", type=int, default=10_000, help="number of the first held-out item")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0])
    parser.add_argument("--repeats", type=int, default=15, help="blocks timed for the overhead, each way")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    settings: dict[str, Any] = {"init": options.init, "t_res": options.t_res}
    if options.reference:
        settings["reference"] = str(options.reference)
    seqd, plain, patched = load(options.seqd), load(options.rcd), load(options.rcd)
    applied = hf_accel.apply(patched, "rcd", **settings)
    models = {SEQD: seqd, RCD: patched, OFF: plain}
    points: dict[str, dict[float, Point]] = {label: {t: Point() for t in options.thresholds} for label in models}
    begin = time.perf_counter()
    for task in options.tasks:
        for length in options.lengths:
            for start in range(options.first, options.first + options.items, options.batch):
                end = min(start + options.batch, options.first + options.items)
                items = [tasks.heldout(task, length, seed) for seed in range(start, end)]
                for threshold in options.thresholds:
                    for label, model in models.items():
                        decode(model, items, threshold, points[label][threshold])
            print(f"{time.perf_counter() - begin:6.0f} s  {task} {length}", flush=True)
    statistics_of_run = applied.report().entries[0].run
    curves = {label: {str(t): p.to_dict() for t, p in row.items()} for label, row in points.items()}
    data = {
        "machine": describe_machine(next(plain.parameters()).device),
        "settings": settings,
        "tasks": options.tasks,
        "lengths": options.lengths,
        "items_per_task": options.items * len(options.lengths),
        "rule": "dynamic",
        "dtype": "float32",
        "curves": curves,
        "equal_accuracy": at_equal_accuracy(curves),
        "mean_weight": statistics_of_run.mean_weight,
        "overhead": [
            overhead(plain, settings, options.lengths[-1], rows, options.repeats) for rows in (1, options.batch)
        ],
    }
    print(report(data))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.picture:
        draw(data, options.picture)
    return 0


def report(data: dict[str, Any]) -> str:
    """The curves, the steps at equal accuracy and the overhead, for the terminal."""
    labels = list(data["curves"])
    head = ["threshold", *(f"{label}: {what}" for label in labels for what in ("accuracy", "tokens/step"))]
    lines = []
    for threshold in data["curves"][labels[0]]:
        row = [data["curves"][label][threshold] for label in labels]
        lines.append([threshold, *(w for p in row for w in (f"{p['accuracy']:.3f}", f"{p['tokens_per_step']:.2f}"))])
    equal = [
        [f"{e['accuracy']:.3f}", *(f"{e[label]:.2f}" if e[label] is not None else "not reached" for label in labels)]
        for e in data["equal_accuracy"]
    ]
    costs = [
        f"a step of {o['rows']} rows behind {o['prefix']} tokens: {o['plain_ms']:.2f} ms, with residual "
        f"{o['rcd_ms']:.2f} ms ({o['overhead']:+.1%})"
        for o in data["overhead"]
    ]
    return "\n".join([align(head, lines), "", align(["at accuracy", *labels], equal), *costs])


def draw(data: dict[str, Any], out: Path) -> None:
    """Accuracy against tokens per step: all tasks together, then each."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    panels = ["all tasks", *data["tasks"]]
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = {SEQD: ("tab:gray", "o"), RCD: ("tab:blue", "s"), OFF: ("tab:orange", "^")}
    for axis, panel in zip(axes, panels, strict=False):
        for label, curve in data["curves"].items():
            found = sorted(curve.values(), key=lambda point: point["tokens_per_step"])
            heights = [p["accuracy"] if panel == "all tasks" else p["by_task"][panel] for p in found]
            colour, marker = styles[label]
            axis.plot(
                [p["tokens_per_step"] for p in found], heights, color=colour, marker=marker, markersize=4, label=label
            )
        axis.set(title=panel, xlabel="tokens per step", ylabel="held-out accuracy", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
