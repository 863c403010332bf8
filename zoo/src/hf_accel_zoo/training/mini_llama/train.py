"""Trains mini-llama on one CPU core in about an hour, by the clock.

::

    python -m hf_accel_zoo.training.mini_llama.train --out DIR --minutes 60 --compile

A step is `--rows` windows of `--length` tokens: of the library's files, in a new order each time round, one behind the
other with `<eos>` between; a share of the rows are sessions of :mod:`task`'s related expressions. Matrices are trained
by Muon, the rest by AdamW; the average of the weights over time (EMA) is what is kept. The state is saved every three
minutes; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from ..steps import Optimizers, follow, save
from . import task, text
from .model import fresh, learn_tokens


def stream(tokens: Tokenizer, length: int, seed: int) -> Iterator[list[int]]:
    """Windows of `length + 1` ids without end: each time round the files in another order, cut and shuffled anew.

    Neighbouring windows share one id, the target of the one and the first input of the other.
    """
    ids = text.ids(tokens, "train")
    files = np.split(ids, np.flatnonzero(ids == text.end(tokens)) + 1)
    rng = np.random.default_rng(seed)
    while True:
        joined = np.concatenate([files[index] for index in rng.permutation(len(files))])
        starts = np.arange(rng.integers(length), len(joined) - length, length)
        for start in rng.permutation(starts):
            yield joined[start : start + length + 1].tolist()


def session(tokens: Tokenizer, rng: np.random.Generator, length: int) -> list[int]:
    """`length` ids of related expressions and their values, `<eos>` behind every one to six."""
    eos, found = text.end(tokens), list[int]()
    while len(found) < length:
        together = "".join(task.related(rng).text for _ in range(int(rng.integers(1, 7))))
        found += [*tokens.encode(together).ids, eos]
    return found[:length]


def batches(tokens: Tokenizer, rows: int, length: int, sessions: float, seed: int) -> Iterator[Tensor]:
    """`[rows, length + 1]` ids, without end; a share `sessions` of the rows are such."""
    files, rng = stream(tokens, length, seed), np.random.default_rng([seed, 1])
    while True:
        drawn = rng.random(rows) < sessions
        yield torch.tensor([session(tokens, rng, length + 1) if one else next(files) for one in drawn])


def _layer(layer: torch.nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return layer(hidden, position_embeddings=(cos, sin), attention_mask=None)


def loss(model: LlamaForCausalLM, ids: Tensor, layer: Callable[..., Tensor] = _layer) -> Tensor:
    """Mean cross-entropy in nats per token of `[B, L + 1]` ids, every row causal from its start."""
    inner = model.model
    hidden = inner.embed_tokens(ids[:, :-1])
    cos, sin = inner.rotary_emb(hidden, torch.arange(hidden.shape[1]).unsqueeze(0))
    for block in inner.layers:
        hidden = layer(block, hidden, cos, sin)
    logits = model.lm_head(inner.norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def judged(model: LlamaForCausalLM, average: dict[str, Tensor], ids: Tensor) -> float:
    """Loss of the averaged weights on `ids`."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(average)
    found = float(loss(model, ids))
    model.load_state_dict(own)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--minutes", type=float, default=60.0)
    ask.add_argument("--steps", type=int, help="end after so many steps, instead of --minutes")
    ask.add_argument("--rows", type=int, default=8)
    ask.add_argument("--length", type=int, default=512)
    ask.add_argument("--sessions", type=float, default=0.2, help="share of rows with related expressions")
    ask.add_argument("--lr", type=float, default=5e-3)
    ask.add_argument("--warm", type=int, default=100, help="steps of warm-up")
    ask.add_argument("--end", type=float, default=0.03, help="learning rate at the end, as a share of --lr")
    ask.add_argument("--average", type=float, default=0.99)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--compile", action="store_true")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)

    file = given.out / "tokenizer.json"
    if not file.exists():
        learn_tokens(text.documents("train").values()).save(str(file))
    tokens = Tokenizer.from_file(str(file))
    model = fresh()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizers = Optimizers(model, norms=1.0)
    state_file = given.out / "state.pt"
    spent, step = 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average, spent, step = state["average"], state["spent"], state["step"]
        for part, held in zip(optimizers.parts, state["optimizers"], strict=True):
            part.load_state_dict(held)
    source = batches(tokens, given.rows, given.length, given.sessions, given.seed + step)
    probe = torch.from_numpy(text.windows(text.ids(tokens, "heldout"), 24, given.length + 1))
    related = torch.tensor([session(tokens, np.random.default_rng([7, row]), given.length + 1) for row in range(8)])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    layer = torch.compile(_layer, dynamic=False) if given.compile else _layer
    begun = time.monotonic() - spent
    saved = logged = time.monotonic()
    sums, counted = 0.0, 0
    while True:
        spent = time.monotonic() - begun
        share = step / given.steps if given.steps else spent / (given.minutes * 60)
        if share >= 1:
            break
        lr = given.lr * min(1.0, (step + 1) / given.warm)
        lr *= given.end + (1 - given.end) * (1 + math.cos(math.pi * share)) / 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = loss(model, next(source), layer)
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(lr)
        step += 1
        follow(average, model, min(given.average, step / (step + 10)))
        sums, counted = sums + float(error.detach()), counted + 1

        now = time.monotonic()
        if now - logged > 15:
            line = {"step": step, "minutes": round(spent / 60, 2), "loss": round(sums / counted, 4), "lr": round(lr, 6)}
            line["tokens_per_s"] = round(counted * given.rows * given.length / (now - logged))
            if now - saved > 180:
                save(state_file, model, average, optimizers, spent, step)
                line["heldout"] = round(judged(model, average, probe), 4)
                line["sessions"] = round(judged(model, average, related), 4)
                now = saved = time.monotonic()
            with open(given.out / "log.jsonl", "a") as log:
                print(json.dumps(line), file=log)
            print(json.dumps(line), flush=True)
            sums, counted, logged = 0.0, 0, now
    save(state_file, model, average, optimizers, spent, step)
    print(f"held-out loss {judged(model, average, probe):.4f}")


if __name__ == "__main__":
    main()
