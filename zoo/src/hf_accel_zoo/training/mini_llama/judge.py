"""Judges mini-llama: held-out perplexity beside that of counts, what it writes, and what rounding its weights costs.

::

    python -m hf_accel_zoo.training.mini_llama.judge report --model zoo/src/hf_accel_zoo/mini-llama --out REPORT.json
    python -m hf_accel_zoo.training.mini_llama.judge picture --log DIR/log.jsonl --report REPORT.json --picture OUT.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, fit_grid, round_to_grid

from ...llama import perplexity
from . import task, text


class Counts:
    """Unigram and bigram of the training files: what a language model must beat.

    The bigram is that of Witten and Bell: a token seen `n` times with `k` different successors leaves `k / (n + k)` to
    the unigram, which itself starts from one count for every token.
    """

    def __init__(self, ids: np.ndarray, vocabulary: int) -> None:
        self.unigram = np.bincount(ids, minlength=vocabulary) + 1.0
        self.unigram /= self.unigram.sum()
        self.pairs = np.zeros((vocabulary, vocabulary), dtype=np.int32)
        np.add.at(self.pairs, (ids[:-1], ids[1:]), 1)
        self.seen = self.pairs.sum(1)
        self.different = (self.pairs > 0).sum(1)

    def perplexity(self, ids: Tensor) -> tuple[float, float]:
        """Unigram's and bigram's, of the tokens that :func:`perplexity` counts."""
        before, after = ids[:, :-1].flatten().numpy(), ids[:, 1:].flatten().numpy()
        alone = self.unigram[after]
        n, k = self.seen[before], self.different[before]
        both = (self.pairs[before, after] + k * alone) / np.maximum(n + k, 1)
        both = np.where(n > 0, both, alone)
        return tuple(float(np.exp(-np.log(share).mean())) for share in (alone, both))  # type: ignore[return-value]


def write(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], most: int = 32
) -> list[str]:
    """What the model writes behind each prompt, greedily, up to and with the first newline or `most` tokens."""
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    found = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):  # rows of one length: no pads, so no mask to trust
        rows = [index for index, ids in enumerate(encoded) if len(ids) == length]
        for index, new in zip(rows, _greedy(model, tokenizer, [encoded[row] for row in rows], most), strict=True):
            found[index] = "".join(str(tokenizer.decode(new)).partition("\n")[:2])
    return found


@torch.no_grad()
def _greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], most: int
) -> list[list[int]]:
    ids, cache = torch.tensor(prompts), None
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    new: list[Tensor] = []
    ends = torch.tensor([index for index in range(len(tokenizer)) if "\n" in tokenizer.decode([index])])
    while len(new) < most and not bool(ended.all()):
        out = model(ids if cache is None else new[-1][:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        new.append(out.logits[:, -1].argmax(-1))
        ended |= torch.isin(new[-1], ends)
    return torch.stack(new, dim=1).tolist()


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Sequence[task.Item]
) -> dict[str, float]:
    """Share of `items` answered exactly, by task and in `all`."""
    written = write(model, tokenizer, [item.prompt for item in items])
    right: dict[str, list[bool]] = {}
    for item, line in zip(items, written, strict=True):
        right.setdefault(item.task, []).append(task.check(item, line))
    found = {name: float(np.mean(held)) for name, held in right.items()}
    return found | {"all": float(np.mean([one for held in right.values() for one in held]))}


@torch.no_grad()
def round_linears(model: LlamaForCausalLM, bits: int, group_size: int | None = 64) -> LlamaForCausalLM:
    """Round the linears inside the layers to the nearest of `bits` per group, in place; embeddings and head stay."""
    format = format_of(f"int{bits}")
    scheme = Scheme.per_row(format) if group_size is None else Scheme.grouped(format, group_size)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.float()
            module.weight.copy_(round_to_grid(weight, fit_grid(weight, scheme), scheme))
    return model


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, most: int, seed: int = 0) -> str:
    """Text drawn at temperature 0.7 from the 40 likeliest tokens, `prompt` included."""
    drawn, cache = torch.Generator().manual_seed(seed), None
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    while ids.shape[1] < most and ids[0, -1] != tokenizer.eos_token_id:
        out = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        top, index = (out.logits[0, -1].float() / 0.7).topk(40)
        ids = torch.cat((ids, index[torch.multinomial(top.softmax(-1), 1, generator=drawn)][None]), dim=1)
    return str(tokenizer.decode(ids[0]))


def report(folder: Path, count: int, items: int) -> dict:
    """Everything that `docs/zoo.md` says of the model in numbers."""
    model, tokenizer = load(folder)
    seen, unseen = (text.ids(tokenizer.backend_tokenizer, split) for split in text.SPLITS)
    ids = torch.from_numpy(text.windows(unseen, count, 512))
    unigram, bigram = Counts(seen, len(tokenizer)).perplexity(ids)
    found: dict = {"model": folder.name, "tokens": ids[:, 1:].numel(), "unigram": unigram, "bigram": bigram}
    found["perplexity"] = perplexity(model, ids)
    found["train_perplexity"] = perplexity(model, torch.from_numpy(text.windows(seen, count, 512)))
    characters = sum(len(tokenizer.decode(row)) for row in ids[:, 1:])
    found["bits_per_character"] = math.log2(found["perplexity"]) * found["tokens"] / characters
    found["rounded"] = {}
    for bits in (8, 4, 3, 2):
        rounded, _ = load(folder)
        found["rounded"][str(bits)] = perplexity(round_linears(rounded, bits), ids)
    related = [task.related(np.random.default_rng([11, index])) for index in range(items)]
    found["related"] = accuracy(model, tokenizer, related)
    found["tasks"] = accuracy(model, tokenizer, task.items("heldout", items))
    return found


def picture(log: Path, told: Path, out: Path) -> None:
    """Loss over the minutes of the training beside the counts, and perplexity against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines, found = [json.loads(line) for line in log.read_text().splitlines()], json.loads(told.read_text())
    # what a stopped training did after its last save was done again
    lines = [one for at, one in enumerate(lines) if all(one["step"] < later["step"] for later in lines[at + 1 :])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    left.plot([one["minutes"] for one in lines], [one["loss"] for one in lines], linewidth=0.8, label="training")
    held = [one for one in lines if "heldout" in one]
    left.plot([one["minutes"] for one in held], [one["heldout"] for one in held], "o-", markersize=3, label="held-out")
    for name in ("unigram", "bigram"):
        left.axhline(math.log(found[name]), color="0.6", linewidth=0.8)
        left.text(held[-1]["minutes"], math.log(found[name]), name, ha="right", va="bottom", fontsize=8)
    left.set(ylim=(1.5, 7), xlabel="minutes", ylabel="cross-entropy, nats per token", title="training")
    left.legend(fontsize=8)
    rounded = {"fp32": found["perplexity"], **{f"int{bits}": value for bits, value in found["rounded"].items()}}
    right.bar_label(right.bar(list(rounded), list(rounded.values()), color="0.5"), fmt="{:.2f}", fontsize=8)
    right.set(ylabel="held-out perplexity", title="rounded to nearest, groups of 64")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("what", choices=("report", "picture", "sample"))
    ask.add_argument("--model", type=Path)
    ask.add_argument("--windows", type=int, default=128)
    ask.add_argument("--items", type=int, default=600)
    ask.add_argument("--prompt", default="class ")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--log", type=Path)
    ask.add_argument("--report", type=Path)
    ask.add_argument("--picture", type=Path)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--threads", type=int, default=1)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "picture":
        picture(given.log, given.report, given.picture)
    elif given.what == "sample":
        print(sample(*load(given.model), given.prompt, 200, given.seed))
    else:
        found = report(given.model, given.windows, given.items)
        print(json.dumps(found, indent=1))
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
