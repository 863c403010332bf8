"""Judges mini-sdar by what it writes: held-out items, real block decoding with a prefix cache.

::

    python -m hf_accel.zoo.training.mini_sdar.judge report --model hf_accel/zoo/mini-sdar --out docs/data/mini-sdar.json
    python -m hf_accel.zoo.training.mini_sdar.judge state --model DIR/state.pt --items 16
    python -m hf_accel.zoo.training.mini_sdar.judge picture --log DIR/log.jsonl --picture docs/img/mini-sdar.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_accel.zoo.sdar import SDARForCausalLM

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
    return {str(length): {task: accuracy(model, task, length, items) for task in names} for length in lengths}


def picture(logs: Sequence[Path], points: Sequence[Path], out: Path) -> None:
    """Loss per task over the minutes of training, and below it the accuracies of `judge state` calls over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    begun = 0.0
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
        for index, task in enumerate(tasks.TASKS):
            axes[0].plot(
                [begun + line["minutes"] for line in lines],
                [line[task] for line in lines],
                color=f"C{index}",
                label=task if log == logs[0] else None,
                linewidth=1,
            )
        begun += lines[-1]["minutes"]
        axes[0].axvline(begun, color="0.8", linewidth=0.8)
    axes[0].set(yscale="log", ylabel="masked cross-entropy, nats", title="mini-sdar: training")
    axes[0].legend(ncols=5, fontsize=8)
    held = sorted(
        (json.loads(line) for file in points for line in file.read_text().splitlines()), key=lambda p: p["at"]
    )
    for index, task in enumerate(tasks.TASKS):
        for length, style in (("256", "-"), ("1024", "--"), ("2048", ":")):
            chosen = [(p["at"], p["table"][length][task]["accuracy"]) for p in held if length in p["table"]]
            if chosen:
                label = f"{task}, {length}" if index == 0 else None
                axes[1].plot(*zip(*chosen, strict=True), style, marker=".", color=f"C{index}", label=label)
    axes[1].set(xlabel="minutes", ylabel="held-out accuracy", ylim=(-0.02, 1.02))
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


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
    ask.add_argument("--points", type=Path, nargs="*", default=[])
    ask.add_argument("--picture", type=Path)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--threads", type=int, default=1)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "picture":
        picture(given.log, given.points, given.picture)
        return
    found = table(load(given.model, given.kept), given.lengths, given.items, given.tasks)
    for length, row in found.items():
        print(length, {task: round(cell["accuracy"], 3) for task, cell in row.items()}, flush=True)
    if given.out and given.what == "report":
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"model": given.model.name, "items": given.items, "table": found}, indent=1))
    elif given.out:
        with open(given.out, "a") as file:
            print(json.dumps({"at": given.at, "table": found}), file=file)


if __name__ == "__main__":
    main()
