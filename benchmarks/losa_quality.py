"""LoSA on mini-sdar: answers, density and time of dense, prefix-split, quest and losa at equal budgets.

    python benchmarks/losa_quality.py --json benchmarks/results/losa_quality.json

Held-out items of every task, the same for all rows, decoded by ``hf_accel.generate_blocks`` and read by the tasks' own
checker. Every method runs on every batch before the next batch begins, so that a machine that gets busy slows all of
them alike; ratios are medians over batches, against ``dense`` in the same run, which is the model's own attention (K/V
concatenated, then SDPA) through the same seam. Attention time is that of denoising steps; the whole is the call of
``generate_blocks``, prefill included.

``quest sparse-first`` reads few pages in the first step of a block too, as Quest does in decoding; ``quest`` starts
dense, as losa does, so that the two differ in one thing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)
import torch

import hf_accel
from hf_accel.config import Config
from hf_accel.facts import Facts
from hf_accel.measure.machine import describe_machine
from hf_accel.sites.prefix_attention.base import PrefixAttentionMethod
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel_zoo.training.mini_sdar import tasks


@dataclass(frozen=True)
class OwnConfig(Config):
    """No settings."""

    METHOD = "own-block-attention"


@hf_accel.register
class Own(PrefixAttentionMethod):
    """The model's own attention through the seam, counted and timed."""

    name = "own-block-attention"
    paper = "none"
    summary = "the model's own attention of denoising steps: the baseline of this benchmark"
    facts = Facts(
        site="attention",
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        exact=True,
        max_head_dim=2**31,
    )
    Config = OwnConfig

    def attend(self, call: PrefixCall, state: Any) -> torch.Tensor:
        call.notes["density"] = 1.0
        return call.dense()


def rows_of(budgets: list[int], page_size: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> method and settings; dense first."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {"dense": (Own.name, {}), "prefix-split": ("prefix-split", {})}
    for budget in budgets:
        same = {"budget": budget, "page_size": page_size, "min_prefix": 0}
        rows[f"quest sparse-first {budget}"] = "quest", {**same, "dense_first": False}
        rows[f"quest {budget}"] = "quest", same
        rows[f"losa prev {budget}"] = "losa", {**same, "reference": "prev"}
        rows[f"losa anchor {budget}"] = "losa", {**same, "reference": "anchor"}
    return rows


@dataclass
class Tally:
    """What one row did so far."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    same_answer: list[bool] = field(default_factory=list)
    sums: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    attention: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    steps: int = 0
    blocks: int = 0

    def add(self, run: dict[str, Any], whole: float) -> None:
        later = run["attention_calls"] - run["first_calls"]
        for name in ("density", "pages", "active"):
            for key, weight in ((name, run["attention_calls"]), (f"later_{name}", later)):
                if run[key] is not None:
                    self.sums[key].append((run[key], weight))
        self.attention.append(run["attention_seconds"])
        self.whole.append(whole)
        self.steps += run["forwards"].get("denoise", 0)
        self.blocks += run["blocks"]

    def mean(self, key: str) -> float | None:
        pairs = self.sums[key]
        return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else None

    def as_dict(self, dense: Tally) -> dict[str, Any]:
        by_task = {task: statistics.mean(right) for task, right in self.right.items()}
        means = {key: self.mean(key) for key in ("density", "later_density", "later_pages", "later_active")}
        return {
            "accuracy": {**by_task, "all": statistics.mean(by_task.values())},
            "same_answer_as_dense": statistics.mean(self.same_answer),
            **means,
            "steps_per_block": self.steps / max(1, self.blocks),
            "attention_seconds": sum(self.attention),
            "whole_seconds": sum(self.whole),
            "attention_ratio": statistics.median(d / s for d, s in zip(dense.attention, self.attention, strict=True)),
            "whole_ratio": statistics.median(d / s for d, s in zip(dense.whole, self.whole, strict=True)),
        }


def run_batch(
    model: Any, prompts: torch.Tensor, row: tuple[str, dict[str, Any]], call: dict[str, Any]
) -> tuple[list[list[int]], dict[str, Any], float]:
    """New tokens, statistics, seconds. The seam's closer look at its first call is in the seconds of every row."""
    method, settings = row
    with hf_accel.apply(model, method, **settings) as applied:
        applied.time_attention()
        begin = time.perf_counter()
        out = hf_accel.generate_blocks(model, prompts, **call)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        run = applied.report().entries[0].run
    return out[:, prompts.shape[1] :].tolist(), run.to_dict() if run is not None else {}, seconds


def cut(ids: list[int]) -> list[int]:
    return ids[: ids.index(tasks.EOS)] if tasks.EOS in ids else ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder; default: the zoo's mini-sdar")
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--budget", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS))
    parser.add_argument("--items", type=int, default=32, help="of each task and prefix")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rule", default="static")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps per block of 16")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from hf_accel_zoo.sdar import SDARForCausalLM

    folder = options.model or hf_accel.zoo.path("mini-sdar")
    model = SDARForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    call = {
        "max_new_tokens": options.new_tokens, "steps": options.steps, "rule": options.rule,
        "eos_token_id": tasks.EOS, "pad_token_id": tasks.EOS,
    }  # fmt: skip
    rows = rows_of(options.budget, options.page_size)
    machine = describe_machine()
    records: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for prefix in options.prefix:
        tallies = {label: Tally() for label in rows}
        for task in options.tasks:
            items = [tasks.heldout(task, prefix, seed) for seed in range(options.items)]
            for start in range(0, len(items), options.batch):
                batch = items[start : start + options.batch]
                prompts = torch.tensor([item.prompt for item in batch], device=model.device)
                answers: dict[str, list[list[int]]] = {}
                for label, row in rows.items():
                    answers[label], run, seconds = run_batch(model, prompts, row, call)
                    tally = tallies[label]
                    tally.add(run, seconds)
                    tally.right[task] += [tasks.check(i, ids) for i, ids in zip(batch, answers[label], strict=True)]
                    pairs = zip(answers["dense"], answers[label], strict=True)
                    tally.same_answer += [cut(a) == cut(b) for a, b in pairs]
            print(f"{time.perf_counter() - begin:7.0f} s  prefix {prefix}  {task}", flush=True)
        for label, (method, settings) in rows.items():
            entry = tallies[label].as_dict(tallies["dense"])
            records.append({"prefix": prefix, "row": label, "method": method, "settings": settings, **entry})
            later, all_ = entry["later_density"], entry["accuracy"]["all"]
            print(
                f"  {label:<24} accuracy {all_:.3f}  density {entry['density']:.3f} later {later:.3f}  attention "
                f"x{entry['attention_ratio']:.2f}  whole x{entry['whole_ratio']:.2f}",
                flush=True,
            )
    data = {
        "machine": machine, "items": options.items, "batch": options.batch, "budgets": options.budget,
        "page_size": options.page_size, "tasks": options.tasks, "call": call, "records": records,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
