"""deepcache on mini-sd: quality, caption accuracy, MACs and whole time for every interval and branch.

    python benchmarks/deepcache.py --json benchmarks/results/deepcache.json --picture docs/img/deepcache.png

Every batch of prompts is a round: the plain pipeline and all rows make it in turn, from the same noise, in an order
that rotates from round to round; time ratios are medians over rounds. Quality is against the plain pictures; caption
accuracy is the share of what prompts name that a classifier finds in the pictures (docs/zoo.md): no plain run needed.

What a user would try first stands in the same table: plain sampling with fewer steps. Their number is chosen before the
first round so that they take the time of deepcache at branch 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # noqa: F401 (finds hf_accel in the checkout)
import torch

import hf_accel
from hf_accel import zoo
from hf_accel.hosts.target import execution_device
from hf_accel.measure.compare import PSNR_LIMIT
from hf_accel.measure.demo import MINI_SD
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.quality import psnr, ssim
from hf_accel.measure.tables import align, times
from hf_accel.sites.attention.break_even import wait_for
from hf_accel_zoo.training.mini_sd import judge

PLAIN = "plain"
PROMPT_SEED = 505  # of the draw; training drew from others


@dataclass
class Row:
    """One way of sampling, and what it gave: a list entry per round."""

    label: str
    steps: int
    settings: dict[str, Any] | None = None  # of deepcache; None: the plain pipeline
    matches: str | None = None  # the row whose time the number of steps was chosen for
    seconds: list[float] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    run: Any = None  # deepcache's statistics of the last round

    def sample(self, pipe: Any, entries: Sequence[dict], guidance: float) -> tuple[torch.Tensor, float]:
        """Pictures ``[N, 3, 64, 64]`` in 0..1 of one batch, and seconds of the pipeline call."""
        wait_for(execution_device(pipe))
        begin = time.perf_counter()
        pictures = judge.sample(pipe, entries, self.steps, guidance, batch=len(entries))  # waits: they come to the CPU
        return pictures, time.perf_counter() - begin

    def round(self, pipe: Any, entries: Sequence[dict], guidance: float, *, keep: bool = True) -> float:
        if self.settings is None:
            pictures, seconds = self.sample(pipe, entries, guidance)
        else:
            with hf_accel.apply(pipe, "deepcache", **self.settings) as applied:
                pictures, seconds = self.sample(pipe, entries, guidance)
                self.run = applied.report().entries[0].run
        if keep:
            self.pictures.append(pictures)
            self.seconds.append(seconds)
        return seconds


def cached_rows(options: argparse.Namespace) -> list[Row]:
    settings = [
        (f"I={interval} B={branch}", {"cache_interval": interval, "cache_branch_id": branch, "skip_mode": "uniform"})
        for interval in options.intervals
        for branch in options.branches
    ]
    for interval in options.non_uniform:
        schedule = {"cache_interval": interval, "cache_branch_id": 0, "skip_mode": "non_uniform"}
        settings.append((f"I={interval} B=0 non-uniform", schedule | {"center": 15, "power": 1.4}))
        settings.append((f"I={interval} B=0 signed", schedule | {"center": 15, "power": 1.4, "signed": True}))
    return [Row(label, options.steps, values) for label, values in settings]


def fewer_steps(pipe: Any, plain: Row, cached: list[Row], entries: Sequence[dict], guidance: float) -> list[Row]:
    """Plain sampling in the time of each uniform row at branch 0: one row per number of steps."""
    tried = [plain]
    wanted = {"skip_mode": "uniform", "cache_branch_id": 0}
    tried += [row for row in cached if row.settings is not None and row.settings | wanted == row.settings]
    seconds = [[row.round(pipe, entries, guidance, keep=False) for row in tried] for _ in range(2)]
    out: dict[int, Row] = {}
    for place, row in enumerate(tried[1:], start=1):
        ratio = statistics.median(turn[0] / turn[place] for turn in seconds)
        steps = max(1, round(plain.steps / ratio))
        if steps < plain.steps:
            out.setdefault(steps, Row(f"plain, {steps} steps", steps, matches=row.label))
    return list(out.values())


def unet_share(pipe: Any, plain: Row, entries: Sequence[dict], guidance: float) -> float:
    """Share of the plain pipeline's time that its U-Net takes."""
    device = execution_device(pipe)
    begun: list[float] = []
    spent: list[float] = []

    def before(*_: Any) -> None:
        wait_for(device)
        begun.append(time.perf_counter())

    def after(*_: Any) -> None:
        wait_for(device)
        spent.append(time.perf_counter() - begun[-1])

    hooks = [pipe.unet.register_forward_pre_hook(before), pipe.unet.register_forward_hook(after)]
    try:
        whole = plain.round(pipe, entries, guidance, keep=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(spent) / whole


def figures(row: Row, plain: Row, batches: list[list[dict]]) -> dict[str, Any]:
    """What goes into the JSON of one row."""
    prompts = [[entry["prompt"] for entry in batch] for batch in batches]
    pictures, reference = (torch.cat(r.pictures).permute(0, 2, 3, 1) for r in (row, plain))
    apart = [min(psnr(a[None], b[None]), PSNR_LIMIT) for a, b in zip(pictures, reference, strict=True)]
    accuracy = judge.caption_accuracy(torch.cat(row.pictures), list(itertools.chain(*prompts)))
    by_batch = [
        judge.caption_accuracy(ours, texts)["all"] - judge.caption_accuracy(theirs, texts)["all"]
        for ours, theirs, texts in zip(row.pictures, plain.pictures, prompts, strict=True)
    ]
    error = statistics.stdev(by_batch) / len(by_batch) ** 0.5 if len(by_batch) > 1 else None
    ratios = sorted(base / ours for base, ours in zip(plain.seconds, row.seconds, strict=True))
    share = row.run.mac_share if row.run is not None else row.steps / plain.steps
    return {
        "label": row.label,
        "settings": row.settings,
        "steps": row.steps,
        "matches": row.matches,
        "full_steps": sum(row.run.full_steps.values()) if row.run is not None else row.steps,
        "psnr_mean": round(statistics.mean(apart), 3),
        "psnr_worst": round(min(apart), 3),
        "ssim_mean": round(ssim(pictures, reference), 5),
        "accuracy": judge.rounded(accuracy),
        "accuracy_gain_error": error,
        "mac_share": share,
        "by_macs": 1 / share,
        "seconds": row.seconds,
        "whole_time_ratio": statistics.median(ratios),
        "whole_time_ratio_range": [ratios[0], ratios[-1]],
        "kept_bytes": row.run.kept_bytes if row.run is not None else 0,
    }


def write_picture(file: Path, rows: dict[str, torch.Tensor], zoom: int = 2) -> None:
    """A line of pictures ``[N, 3, H, W]`` in 0..1 for every label."""
    from PIL import Image, ImageDraw

    margin = 96
    lines = [
        (images.clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy() for images in rows.values()
    ]
    height, width = lines[0].shape[0] * zoom, lines[0].shape[1] * zoom
    sheet = Image.new("RGB", (margin + width, (height + 2) * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (label, line) in enumerate(zip(rows, lines, strict=True)):
        top = place * (height + 2)
        sheet.paste(Image.fromarray(line).resize((width, height), Image.Resampling.LANCZOS), (margin, top))
        pen.text((4, top + height // 2 - 6), label, fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a pipeline like mini-sd (default: that of the zoo)")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=MINI_SD.steps)
    parser.add_argument("--guidance", type=float, default=MINI_SD.call["guidance_scale"])
    parser.add_argument("--scheduler", help="class of diffusers, made from the pipeline's own (DDIM)")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5, 10])
    parser.add_argument("--branches", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--non-uniform", type=int, nargs="*", default=[5], help="intervals of the non-uniform rows")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG: plain above intervals 3, 5 and 10 at the first branch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    import diffusers

    path = options.model if options.model is not None else zoo.path(MINI_SD.name)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    if options.scheduler:
        pipe.scheduler = getattr(diffusers, options.scheduler).from_config(pipe.scheduler.config)
    entries = judge.prompts(options.prompts, PROMPT_SEED)
    batches = [entries[first : first + options.batch] for first in range(0, len(entries), options.batch)]
    plain, cached = Row(PLAIN, options.steps), cached_rows(options)

    begin = time.perf_counter()

    def say(words: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {words}", flush=True)

    machine = describe_machine(execution_device(pipe))
    say("warm-up, and how many plain steps take equal time")
    plain.round(pipe, batches[0], options.guidance, keep=False)
    rows = [plain, *cached, *fewer_steps(pipe, plain, cached, batches[0], options.guidance)]
    share = unet_share(pipe, plain, batches[0], options.guidance)
    for number, batch in enumerate(batches):
        say(f"batch {number + 1} of {len(batches)}")
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            row.round(pipe, batch, options.guidance)
    say("judging")
    found = [figures(row, plain, batches) for row in rows]
    data = {
        "machine": machine,
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": len(entries),
        "prompt_seed": PROMPT_SEED,
        "batch": options.batch,
        "steps": options.steps,
        "guidance": options.guidance,
        "dtype": "float32",
        "unet_share_of_plain_time": share,
        "rows": found,
    }
    print(report(data))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.picture:
        shown = {PLAIN: plain} | {row.label: row for row in cached if row.label in ("I=3 B=0", "I=5 B=0", "I=10 B=0")}
        write_picture(options.picture, {label: row.pictures[0][:8] for label, row in shown.items()})
    return 0


def report(data: dict[str, Any]) -> str:
    """The rows as a table for the terminal."""
    plain = data["rows"][0]["accuracy"]["all"]
    head = ["sampling", "full", "PSNR dB", "worst", "SSIM", "accuracy", "points", "MACs", "by MACs", "whole"]
    lines = [
        [
            row["label"],
            str(row["full_steps"]),
            "equal" if row["psnr_mean"] >= PSNR_LIMIT else f"{row['psnr_mean']:.2f}",
            "equal" if row["psnr_worst"] >= PSNR_LIMIT else f"{row['psnr_worst']:.2f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['accuracy']['all']:.4f}",
            f"{100 * (row['accuracy']['all'] - plain):+.2f}",
            f"{row['mac_share']:.1%}",
            times(row["by_macs"]),
            times(row["whole_time_ratio"]),
        ]
        for row in data["rows"]
    ]
    words = f"U-Net: {data['unet_share_of_plain_time']:.0%} of the plain time"
    return "\n".join([align(head, lines), words])


if __name__ == "__main__":
    sys.exit(main())
