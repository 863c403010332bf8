"""Judges mini-sdar by what it writes: held-out items, real block decoding with a prefix cache.

::

    python -m hf_accel_zoo.training.mini_sdar.judge report --model zoo/src/hf_accel_zoo/mini-sdar --out REPORT.json
    python -m hf_accel_zoo.training.mini_sdar.judge state --model DIR/state.pt --items 16
    python -m hf_accel_zoo.training.mini_sdar.judge picture --log DIR/log.jsonl --report REPORT.json --picture OUT.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_accel_zoo.sdar import SDARForCausalLM

from . import tasks


@torch.no_grad()
def decode(
    model: SDARForCausalLM, prompts: Tensor, *, most: int = 64, steps: int = 16, threshold: float | None = None
) -> tuple[Tensor, int]:
    """Greedy block decoding of prompts of one length, `[B, P]`; the new ids `[B, n]` and the denoising forwards taken.

    Low-confidence static rule: the surest `block / steps` masked positions a step; with a `threshold` the dynamic
    one: all that are surer than it, and at least as many as the static rule would. A row that has written `<eos>` goes
    on with the others; `most` is rounded up to whole blocks.
    """
    block, mask = model.config.block_size, model.config.mask_token_id
    rows, length = prompts.shape
    start = length // block * block
    cache = DynamicCache(config=model.config)
    if start:
        model(prompts[:, :start], past_key_values=cache, store_kv=True, logits_to_keep=1)
    ids, forwards = prompts, 0
    while ids.shape[1] < length + most:
        active = torch.full((rows, block), mask)
        active[:, : length - start] = ids[:, start:length] if start < length else active[:, :0]
        least = -(-block // steps)
        while bool((active == mask).any()):
            logits = model(active, past_key_values=cache, store_kv=False).logits.float()
            logits[..., mask] = -torch.inf
            sure, token = logits.softmax(-1).max(-1)
            sure = sure.masked_fill(active != mask, -1.0)
            rank = sure.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            take = rank < least
            if threshold is not None:
                take |= sure > threshold
            active = torch.where(take & (sure >= 0), token, active)
            forwards += 1
        model(active, past_key_values=cache, store_kv=True, logits_to_keep=1)
        ids = torch.cat((ids[:, :start], active), dim=1)
        start += block
        if bool((ids[:, length:] == tasks.EOS).any(-1).all()):
            break
    return ids[:, length:], forwards


def accuracy(
    model: SDARForCausalLM,
    task: str,
    length: int,
    items: int,
    *,
    first: int = 0,
    steps: int = 16,
    threshold: float | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Share of held-out items answered right, and the denoising forwards per block of 16."""
    right, forwards, blocks = 0, 0, 0
    for start in range(first, first + items, batch):
        group = [tasks.heldout(task, length, seed) for seed in range(start, min(start + batch, first + items))]
        ids, taken = decode(model, torch.tensor([item.prompt for item in group]), steps=steps, threshold=threshold)
        right += sum(tasks.check(item, row) for item, row in zip(group, ids.tolist(), strict=True))
        forwards += taken
        blocks += -(-(length % tasks.BLOCK + ids.shape[1]) // tasks.BLOCK)
    return {"accuracy": right / items, "items": items, "steps_per_block": round(forwards / blocks, 2)}


def load(path: Path, kept: str = "average") -> SDARForCausalLM:
    """A folder of `from_pretrained`, or a `state.pt` of the training: its `average` or its latest `model`."""
    if path.is_dir():
        return SDARForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    from .train import config

    model = SDARForCausalLM(config())
    model.load_state_dict(torch.load(path, weights_only=True)[kept])
    return model.eval()


def table(model: SDARForCausalLM, lengths: Sequence[int], items: int, names: Sequence[str] = tasks.TASKS) -> dict:
    found: dict[str, dict] = {}
    for length in lengths:
        row = found[str(length)] = {}
        for task in names:
            row[task] = accuracy(model, task, length, items)
            print(length, task, row[task], flush=True)
    return found


def picture(logs: Sequence[Path], report: Path, out: Path) -> None:
    """Loss of each task over the steps of the runs one after another, and the accuracies of `report`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, bars) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 2))
    begun = 0
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        # A line stands for 15 s; where the machine stood still that is a step or two, and mostly noise.
        lines = [line for line, last in zip(lines[1:], lines, strict=False) if line["step"] - last["step"] > 5]
        for index, task in enumerate(tasks.TASKS):
            label = task if log == logs[0] else None
            steps, values = [begun + line["step"] for line in lines], [line[task] for line in lines]
            losses.plot(steps, values, color=f"C{index}", label=label, linewidth=1)
        begun += lines[-1]["step"]
        losses.axvline(begun, color="0.7", linewidth=0.8)
    losses.set(yscale="log", ylim=(0.003, 8), xlabel="step", ylabel="masked cross-entropy, nats", title="training")
    losses.legend(ncols=5, fontsize=8)
    table = json.loads(report.read_text())["table"]
    lengths = sorted(table, key=int)
    for index, length in enumerate(lengths):
        heights = [table[length][task]["accuracy"] for task in tasks.TASKS]
        places = [place + (index - 1) * 0.27 for place in range(len(tasks.TASKS))]
        bars.bar(places, heights, width=0.25, color=str(0.75 - 0.25 * index), label=f"{length} tokens")
    bars.set_xticks(range(len(tasks.TASKS)), tasks.TASKS)
    bars.set(ylim=(0, 1.15), title="held-out accuracy, block decoding")
    bars.legend(ncols=3, fontsize=8, loc="upper center")
    for axis in (losses, bars):
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("what", choices=("report", "state", "picture"))
    ask.add_argument("--model", type=Path)
    ask.add_argument("--kept", default="average", choices=("average", "model"))
    ask.add_argument("--items", type=int, default=64)
    ask.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    ask.add_argument("--tasks", nargs="+", default=list(tasks.TASKS))
    ask.add_argument("--at", type=float, help="state: minutes of training, to append the table to --out")
    ask.add_argument("--log", type=Path, nargs="+")
    ask.add_argument("--report", type=Path)
    ask.add_argument("--picture", type=Path)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--threads", type=int, default=1)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "picture":
        picture(given.log, given.report, given.picture)
        return
    found = table(load(given.model, given.kept), given.lengths, given.items, given.tasks)
    if given.out and given.what == "report":
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"model": given.model.name, "items": given.items, "table": found}, indent=1))
    elif given.out:
        with open(given.out, "a") as file:
            print(json.dumps({"at": given.at, "table": found}), file=file)


if __name__ == "__main__":
    main()
