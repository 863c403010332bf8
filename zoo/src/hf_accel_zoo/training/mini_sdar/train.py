"""Trains mini-sdar on two CPU cores in about an hour, by the clock.

::

    python -m hf_accel_zoo.training.mini_sdar.train --out DIR --minutes 60 --stages 0:48x24,.4:128x14+512x4,...

A step is one batch of documents of :mod:`tasks`. As in SDAR, the sequence is doubled: behind the clean document stand
noisy copies, here only of the blocks that hold answers and several of each at different noise levels, so that a long
context is paid for once. A noisy block sees itself and the clean blocks strictly before it; the clean half is
block-causal. Masked cross-entropy, weighted 1/t. Matrices are trained by Muon, the rest by AdamW; the average of the
weights over time (EMA) is what is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, repeat_kv

from hf_accel.patches.rcd import residual_embeddings
from hf_accel_zoo.sdar import SDARConfig, SDARDecoderLayer, SDARForCausalLM, block_causal_mask

from ..steps import Optimizers, follow, save
from . import tasks

COPIES = 2
FILL_WEIGHT = 0.1
LEAST_NOISE = 0.2
REACH = 2500
# Five pairs of 16 turn fast enough to tell neighbours apart; the others, 128 times slower than usual, turn so little
# over 2,500 tokens that what they hold can be compared at any distance.
ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "low_freq_factor": 1.05,
    "high_freq_factor": 1.8,
    "original_max_position_embeddings": 128,
}


def config() -> SDARConfig:
    return SDARConfig(
        vocab_size=len(tasks.VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters=ROTARY,
        block_size=tasks.BLOCK,
        mask_token_id=tasks.MASK,
        eos_token_id=tasks.EOS,
        pad_token_id=None,
        tie_word_embeddings=False,
        attention_bias=True,
    )


def fresh() -> SDARForCausalLM:
    """New weights, drawn so that looking up is easily found.

    Tokens start larger than what layers add to them, the head starts as the embedding's transpose (copying a token
    needs no more than attention to it), and queries and keys start with random biases: a head of fixed distance, the
    first half of every look-up, needs a part of both that does not depend on the token.
    """
    model = SDARForCausalLM(config())
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_(std=0.7)
        model.lm_head.weight.copy_(embedding * 0.15)
        for layer in model.model.layers:
            attention = layer.self_attn
            for bias in (attention.q_proj.bias, attention.k_proj.bias):
                bias.normal_(std=0.3)
            attention.q_norm.weight.fill_(1.5)
    return model


@dataclass
class Batch:
    """`clean` ids and their `place` (position), `[B, S]`; of each noisy slot its `block` `[B, N]` and, `[B, N, 16]`,
    `truth`, `noisy` ids, `weight` in the loss (0 where nothing is masked) and `task` (-1: no answer)."""

    clean: Tensor
    place: Tensor
    block: Tensor
    truth: Tensor
    noisy: Tensor
    weight: Tensor
    task: Tensor

    @property
    def positions(self) -> Tensor:
        size = tasks.BLOCK
        inside = self.block[..., None] * size + torch.arange(size)
        return torch.cat((self.place, self.place.gather(1, inside.flatten(1))), dim=1)

    @property
    def visible(self) -> Tensor:
        """`[B, 1, N * 16, S + N * 16]`: what each noisy position sees."""
        size = tasks.BLOCK
        count, slots = self.block.shape
        before = torch.arange(self.clean.shape[1]) // size < self.block[..., None]
        before = before[:, :, None].expand(-1, -1, size, -1).flatten(1, 2)
        own = torch.eye(slots, dtype=torch.bool).repeat_interleave(size, 0).repeat_interleave(size, 1)
        return torch.cat((before, own.expand(count, -1, -1)), dim=-1).unsqueeze(1)


def batch(
    rng: np.random.Generator, context: int, size: int, *, full: float, high: float = 0.0, skip: float = 0.0
) -> Batch:
    """`size` documents with contexts of 0.5 to 1 x `context` tokens. `full`: share of blocks that are all masks.

    A share `skip` of the documents jumps over positions at three places of its context, to end anywhere below
    `REACH`: short documents then train the distances of long ones (as PoSE, arXiv 2309.10400). `high` moves the other
    noise levels up: 0 draws them from U(0, 1), 1 from U(0.5, 1).
    """
    tail = 96 if context <= 64 else 192 if context <= 128 else 256 if context <= 256 else 384
    words = tasks.PASSAGE if context > 128 else (context // 8, context // 4)
    total, slots = context + tail, tail // tasks.BLOCK
    drawn = [tasks.document(rng, int(context * rng.uniform(0.5, 1.0)), total, words=words) for _ in range(size)]
    ids, roles, kinds = (np.stack(part).reshape(size, -1, tasks.BLOCK) for part in zip(*drawn, strict=True))
    chosen = np.argsort(~(roles > 0).any(-1), axis=1, kind="stable")[:, :slots].repeat(COPIES, axis=1)
    row = np.arange(size)[:, None]
    truth, role, kind = ids[row, chosen], roles[row, chosen], kinds[row, chosen]
    level = (rng.random(chosen.shape) + np.arange(slots * COPIES) % COPIES) / COPIES
    level = 1 - (1 - level) * (1 - high / 2)
    level = np.where(rng.random(chosen.shape) < full, 1.0, np.maximum(level, 0.05))
    masked = (rng.random(truth.shape) < level[..., None]) & (role > 0)
    weight = masked / np.maximum(level, LEAST_NOISE)[..., None] * np.where(role == 2, FILL_WEIGHT, 1.0)
    jumps = np.zeros((size, total), dtype=np.int64)
    for index in np.flatnonzero(rng.random(size) < skip):
        parts = rng.dirichlet(np.ones(3)) * rng.uniform(0, max(REACH - total, 0))
        jumps[index, rng.integers(1, context // 2, 3)] += parts.astype(np.int64)
    return Batch(
        clean=torch.from_numpy(ids.reshape(size, -1)),
        place=torch.from_numpy(np.arange(total) + jumps.cumsum(1)),
        block=torch.from_numpy(chosen),
        truth=torch.from_numpy(truth),
        noisy=torch.from_numpy(np.where(masked, tasks.MASK, truth)),
        weight=torch.from_numpy(weight.astype(np.float32)),
        task=torch.from_numpy(np.where(role == 1, kind, -1)),
    )


def _layer(
    layer: SDARDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, causal: Tensor, visible: Tensor, last: bool
) -> Tensor:
    clean = causal.shape[-1]
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(states).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(states).view(shape)).transpose(1, 2)
    value = attention.v_proj(states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    query = query.to(value.dtype)
    key = repeat_kv(key.to(value.dtype), attention.num_key_value_groups)
    value = repeat_kv(value, attention.num_key_value_groups)
    out = F.scaled_dot_product_attention(query[:, :, clean:], key, value, attn_mask=visible)
    if last:
        hidden = hidden[:, clean:]
    else:
        old = F.scaled_dot_product_attention(
            query[:, :, :clean], key[:, :, :clean], value[:, :, :clean], attn_mask=causal
        )
        out = torch.cat((old, out), dim=2)
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def noisy_hidden(model: SDARForCausalLM, inputs: Tensor, data: Batch, layer: Callable[..., Tensor] = _layer) -> Tensor:
    """Last hidden states `[B, N * 16, hidden]` of the noisy part of the doubled sequence `[B, S + N * 16, hidden]`.

    Equal to the model under the mask of the doubled sequence, at less cost: no clean query meets a noisy key. `layer`:
    one layer, compiled or not.
    """
    inner = model.model
    cos, sin = inner.rotary_emb(inputs, data.positions)
    causal = block_causal_mask(data.clean.shape[1], model.config.block_size)
    visible = data.visible
    hidden = inputs
    for index, block in enumerate(inner.layers):
        hidden = layer(block, hidden, cos, sin, causal, visible, index + 1 == len(inner.layers))
    return inner.norm(hidden)


def plain(model: SDARForCausalLM, data: Batch) -> Tensor:
    """Input embeddings of the doubled sequence."""
    return model.model.embed_tokens(torch.cat((data.clean, data.noisy.flatten(1)), dim=1))


def with_residuals(
    model: SDARForCausalLM, reference: SDARForCausalLM, data: Batch, layer: Callable[..., Tensor] = _layer
) -> Tensor:
    """Input embeddings of the doubled sequence for RCD: at masks of the noisy half the residual of what `reference`
    predicts there, formed with the model's own embeddings."""
    embedding = model.model.embed_tokens
    with torch.no_grad():
        logits = reference.lm_head(noisy_hidden(reference, plain(reference, data), data, layer)).float()
    noisy = residual_embeddings(embedding, data.noisy.flatten(1), logits, tasks.MASK)
    return torch.cat((embedding(data.clean), noisy), dim=1)


def losses(
    model: SDARForCausalLM, data: Batch, inputs: Tensor, layer: Callable[..., Tensor] = _layer
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and weight of each masked position; both `[M]`."""
    hidden = noisy_hidden(model, inputs, data, layer)
    chosen = (data.weight > 0).flatten()
    logits = model.lm_head(hidden.flatten(0, 1)[chosen])
    error = F.cross_entropy(logits.float(), data.truth.flatten()[chosen], reduction="none")
    return error, data.weight.flatten()[chosen]


def stages(text: str) -> list[tuple[float, list[tuple[int, int]]]]:
    """`0:128x16,.5:128x16+256x8` to [(start as a share of the time, [(context, batch), ...]), ...]."""
    found = []
    for part in text.split(","):
        start, sizes = part.split(":")
        found.append((float(start), [(int(a), int(b)) for a, b in (size.split("x") for size in sizes.split("+"))]))
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--minutes", type=float, default=60.0)
    ask.add_argument("--stages", default="0:128x16")
    ask.add_argument("--steps", type=int, help="end after so many steps, instead of --minutes")
    ask.add_argument("--start", type=Path, help="a state.pt: begin anew with its averaged weights")
    ask.add_argument("--reference", type=Path, help="a state.pt: RCD's second stage with these weights as reference")
    ask.add_argument("--high", type=float, default=0.0, help="more of the high noise levels, 0 to 1")
    ask.add_argument("--lr", type=float, default=2e-3)
    ask.add_argument("--warm", type=int, default=50, help="steps of warm-up")
    ask.add_argument("--end", type=float, default=0.05, help="learning rate at the end, as a share of --lr")
    ask.add_argument("--full", type=float, default=0.2)
    ask.add_argument("--skip", type=float, default=0.0, help="share of documents that jump over positions")
    ask.add_argument("--average", type=float, default=0.995)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--compile", action="store_true")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)

    model = fresh()
    if given.start:
        model.load_state_dict(torch.load(given.start, weights_only=True)["average"])
    reference = None
    if given.reference:
        reference = fresh().requires_grad_(False).eval()
        reference.load_state_dict(torch.load(given.reference, weights_only=True)["average"])
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizers = Optimizers(model)
    state_file = given.out / "state.pt"
    spent, step = 0.0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average, spent, step = state["average"], state["spent"], state["step"]
        for part, held in zip(optimizers.parts, state.get("optimizers", ()), strict="optimizers" in state):
            part.load_state_dict(held)
    rng = np.random.default_rng([given.seed, step])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    torch._dynamo.config.recompile_limit = 64
    layer = torch.compile(_layer, dynamic=False) if given.compile else _layer
    table = stages(given.stages)
    begun = time.monotonic() - spent
    saved = logged = time.monotonic()
    sums, counts, seen = np.zeros(len(tasks.TASKS)), np.zeros(len(tasks.TASKS)), 0
    by_context: dict[int, list[float]] = {}
    while True:
        spent = time.monotonic() - begun
        share = step / given.steps if given.steps else spent / (given.minutes * 60)
        if share >= 1:
            break
        sizes = [sizes for start, sizes in table if start <= share][-1]
        context, size = sizes[int(rng.integers(len(sizes)))]
        lr = given.lr * min(1.0, (step + 1) / given.warm)
        lr *= given.end + (1 - given.end) * (1 + math.cos(math.pi * share)) / 2
        data = batch(rng, context, size, full=given.full, skip=given.skip, high=given.high)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = plain(model, data) if reference is None else with_residuals(model, reference, data, layer)
            error, weight = losses(model, data, inputs, layer)
        ((error * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(lr)
        step += 1
        follow(average, model, min(given.average, step / (step + 10)))
        kind = data.task.flatten()[(data.weight > 0).flatten()].numpy()
        for index in range(len(tasks.TASKS)):
            counts[index] += (kind == index).sum()
            sums[index] += error.detach().numpy()[kind == index].sum()
        by_context.setdefault(context, []).append(float(error.detach().numpy()[(kind == 0) | (kind == 2)].mean()))
        seen += data.clean.numel() + data.noisy.numel()

        now = time.monotonic()
        if now - logged > 15:
            line = dict(zip(tasks.TASKS, (sums / np.maximum(counts, 1)).round(4).tolist(), strict=True))
            line |= {"step": step, "minutes": round(spent / 60, 2), "lr": round(lr, 6)}
            line["look_up"] = {str(size): round(float(np.mean(held)), 3) for size, held in sorted(by_context.items())}
            by_context.clear()
            line["tokens_per_s"] = round(seen / (now - logged))
            with open(given.out / "log.jsonl", "a") as file:
                print(json.dumps(line), file=file)
            print(json.dumps(line), flush=True)
            sums[:], counts[:], seen, logged = 0, 0, 0, now
        if now - saved > 120:
            save(state_file, model, average, optimizers, spent, step)
            saved = now
    save(state_file, model, average, optimizers, spent, step)


if __name__ == "__main__":
    main()
