"""Time of ``LLaDA2Pipeline`` with and without ``prefix-cache``: whole calls on a stand-in of its remote code.

    python benchmarks/prefix_cache.py --prompt 512,2048 --json benchmarks/results/prefix_cache_cpu.json

Two blocks are generated behind a prompt, with a fixed number of steps each (nothing passes the threshold, no editing).
Calls alternate: one without, one with. What compares the logits (the first windows that a model sees) is over before.
Bound: the share of rows; rows in front of the block cost the projections and the head, and attention of their own.

The stand-in has random weights and the shape given: a few dense layers (no experts), so that a row costs what a row of
a model of that width costs. Logits of the same tokens are compared in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from common import relative_error, save
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

import hf_accel
from hf_accel.measure.machine import describe_machine
from hf_accel.testing.models import llada2

MASK = 1


def pipeline(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> LLaDA2Pipeline:
    """The pipeline around a stand-in that is block-causal under a 2-D mask."""
    heads = options.hidden // options.head_dim
    model = llada2.build(
        block_size=options.block,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        first_k_dense_replace=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=options.head_dim,
        vocab_size=options.vocabulary,
        initializer_range=options.hidden**-0.5,
    )
    pipe = LLaDA2Pipeline(model.to(device, dtype), BlockRefinementScheduler(block_length=options.block))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: LLaDA2Pipeline, prompt: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of whole calls, ours and without us in turn; rows, K/V kept, difference of the logits."""
    device = pipe.model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, options.vocabulary, (options.batch, prompt), generator=generator).to(device)
    read: list[torch.Tensor] = []
    native_step = pipe.scheduler.step

    def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(model_output)
        return native_step(model_output, *args, **kwargs)

    def generate() -> tuple[float, list[torch.Tensor], torch.Tensor]:
        read.clear()
        _wait(device)
        start = time.perf_counter()
        out = pipe(
            input_ids=ids, gen_length=2 * options.block, num_inference_steps=options.steps, mask_token_id=MASK,
            threshold=2.0, editing_threshold=None, sampling_method="greedy", output_type="seq", eos_early_stop=False,
        )  # fmt: skip
        _wait(device)
        return time.perf_counter() - start, list(read), out.sequences

    pipe.scheduler.step = step  # type: ignore[method-assign]
    times: dict[str, list[float]] = {"pipeline": [], "prefix-cache": []}
    errors, same = [], True
    applied = hf_accel.apply(pipe, "prefix-cache")
    generate()  # compares the logits
    first = applied.stats()["model"]["prefix-cache"]
    applied.revert()
    for _ in range(options.repeats):
        seconds, dense, tokens = generate()
        times["pipeline"].append(seconds)
        with hf_accel.apply(pipe, "prefix-cache") as applied:
            generate()
            before = applied.stats()["model"]["prefix-cache"]
            seconds, cached, ours = generate()
            after = applied.stats()["model"]["prefix-cache"]
        times["prefix-cache"].append(seconds)
        same &= torch.equal(ours, tokens)
        errors += [relative_error(a[:, -options.block :], b) for a, b in zip(cached, dense, strict=True)]
    pipe.scheduler.step = native_step  # type: ignore[method-assign]
    rows, native = (after[name] - before[name] for name in ("rows_computed", "rows_native"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "prompt": prompt,
        "forwards": after["forwards"] - before["forwards"],
        "seconds": times,
        "ratio": medians["pipeline"] / medians["prefix-cache"],
        "bound": native / rows,
        "row_share": rows / native,
        "row_share_of_the_first_call": first["row_share"],
        "kept_bytes": after["kept_bytes"],
        "relative_error": max(errors),
        "same_tokens": same,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="512,2048")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = pipeline(options, device, getattr(torch, options.dtype))
    settings = {name: value for name, value in vars(options).items() if name not in ("prompt", "json", "threads")}
    rows = []
    for prompt in map(int, options.prompt.split(",")):
        row = {**settings, **measure(pipe, prompt, options)}
        rows.append(row)
        medians = {name: statistics.median(values) for name, values in row["seconds"].items()}
        print(
            f"prompt {prompt:<6} {row['forwards']} forwards  pipeline {medians['pipeline']:.2f} s  prefix-cache "
            f"{medians['prefix-cache']:.2f} s  ratio {row['ratio']:.2f} (rows: {row['bound']:.2f})  kept "
            f"{row['kept_bytes'] / 2**20:.1f} MiB  error {row['relative_error']:.1e}  same tokens {row['same_tokens']}",
            flush=True,
        )
    save(options.json, describe_machine(device), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
