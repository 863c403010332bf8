"""deepcache against the authors' package (PyPI `DeepCache`) on mini-sd: time, memory, difference of the results.

    pip install 'hf_accel[peers]'
    python benchmarks/deepcache_peer.py --json benchmarks/results/deepcache_peer.json

Every round makes the same pictures with the plain pipeline, ours and the package's, in an order that rotates; ratios
are medians of rounds. Putting on and taking off is not timed. CPU seconds stand beside: they are steadier where other
work runs. *Held* is the memory behind the tensors that each keeps at the end of a call: the package's until it is taken
off, ours within the call only. *Peak* is measured in rounds of its own, since measuring it takes time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch

import hf_accel
from hf_accel import zoo
from hf_accel.hosts.target import execution_device
from hf_accel.measure.demo import MINI_SD
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.memory import PeakMemory
from hf_accel.measure.tables import align, times
from hf_accel.sites.attention.break_even import wait_for

PLAIN, OURS, PACKAGE = "plain", "hf_accel", "DeepCache 0.1.1"
PROMPT = "a big red square"

Held = Callable[[], int]  # bytes kept since the way of sampling was put on


@contextlib.contextmanager
def standing(pipe: Any, who: str, interval: int, branch: int) -> Iterator[Held]:
    """The pipeline as it is, under deepcache, or under the authors' package."""
    if who == PLAIN:
        yield lambda: 0
    elif who == OURS:
        with hf_accel.apply(pipe, "deepcache", cache_interval=interval, cache_branch_id=branch) as applied:
            (entry,) = applied.report().entries
            yield lambda: entry.to_dict()["run"]["kept_bytes"]
    else:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        try:
            yield lambda: storage_bytes(helper.cached_output)
        finally:
            helper.disable()


def storage_bytes(value: Any) -> int:
    """Bytes of all memory that a nest of tensors keeps alive, shared memory once."""
    storages: dict[int, int] = {}
    nest = [value]
    while nest:
        item = nest.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            nest.extend(item.values())
        elif isinstance(item, (tuple, list)):
            nest.extend(item)
    return sum(storages.values())


def compare(pipe: Any, interval: int, branch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the three ways of sampling at one interval and branch."""
    device = execution_device(pipe)
    ways = [PLAIN, OURS, PACKAGE]
    seconds: dict[str, list[float]] = {who: [] for who in ways}
    cpu_seconds: dict[str, list[float]] = {who: [] for who in ways}
    peaks: dict[str, list[int]] = {who: [] for who in ways}
    held: dict[str, int] = {}
    latents: dict[str, torch.Tensor] = {}

    def sample() -> torch.Tensor:
        return pipe(
            [PROMPT] * options.batch, num_inference_steps=options.steps, output_type="latent", return_dict=False,
            generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    for turn in range(options.rounds + 1):
        for who in ways[turn % 3 :] + ways[: turn % 3]:
            with standing(pipe, who, interval, branch) as now:
                wait_for(device)
                begin, cpu = time.perf_counter(), time.process_time()
                latents[who] = sample()
                wait_for(device)
                if turn:  # the first round warms up
                    seconds[who].append(time.perf_counter() - begin)
                    cpu_seconds[who].append(time.process_time() - cpu)
                held[who] = now()
    for turn in range(options.memory_rounds):
        for who in ways[turn % 3 :] + ways[: turn % 3]:
            with standing(pipe, who, interval, branch), PeakMemory(device) as memory:
                sample()
            if memory.bytes is not None:
                peaks[who].append(memory.bytes)
    ratios = sorted(theirs / ours for theirs, ours in zip(seconds[PACKAGE], seconds[OURS], strict=True))
    return {
        "interval": interval,
        "branch": branch,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "package_by_ours": statistics.median(ratios),
        "package_by_ours_range": [ratios[0], ratios[-1]],
        "package_by_ours_cpu": statistics.median(cpu_seconds[PACKAGE]) / statistics.median(cpu_seconds[OURS]),
        "plain_by": {
            who: statistics.median(a / b for a, b in zip(seconds[PLAIN], seconds[who], strict=True)) for who in ways
        },
        "held_bytes": held,
        "peak_bytes": {who: min(values) if values else None for who, values in peaks.items()},
        "peak_how": memory.how,
        "max_difference": (latents[OURS] - latents[PACKAGE]).abs().max().item(),
    }


def report(rows: list[dict[str, Any]]) -> str:
    head = ["interval branch", "ours", "package", "package/ours", "CPU", "held by ours", "held by package"]
    head += ["peak, ours / package", "difference"]
    lines = []
    for row in rows:
        peaks = [row["peak_bytes"][who] for who in (OURS, PACKAGE)]
        lines.append(
            [
                f"{row['interval']} {row['branch']}",
                *(times(row["plain_by"][who]) for who in (OURS, PACKAGE)),
                f"{row['package_by_ours']:.3f}",
                f"{row['package_by_ours_cpu']:.3f}",
                *(f"{row['held_bytes'][who] / 1024:.0f} KiB" for who in (OURS, PACKAGE)),
                "-" if None in peaks else " / ".join(f"{peak / 2**20:.1f}" for peak in peaks) + " MiB",
                f"{row['max_difference']:.1e}",
            ]
        )
    return align(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--branches", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    import diffusers

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(zoo.path(MINI_SD.name), dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    machine = describe_machine(execution_device(pipe))
    rows = []
    for interval in options.intervals:
        for branch in options.branches:
            rows.append(compare(pipe, interval, branch, options))
            print(f"interval {interval}, branch {branch}: {rows[-1]['package_by_ours']:.3f}", flush=True)
    print(report(rows))
    shared = {"batch": options.batch, "steps": options.steps, "rounds": options.rounds, "dtype": "float32"}
    common.save(options.json, machine | shared, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
