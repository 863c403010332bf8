"""A tiny SDAR-class model for rcd, and a sampler written out by hand."""

from __future__ import annotations

import torch
from transformers import DynamicCache

import hf_accel
from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

MASK, BLOCK = 63, 4


def sdar(seed=0, hidden=32, **fields):
    """An SDAR-class model whose tokens depend on what it is given."""
    settings = {
        "vocab_size": 64, "hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "block_size": BLOCK,
        "mask_token_id": MASK, "initializer_range": 0.25, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SDARForCausalLM(SDARConfig(**(settings | fields))).eval()


def prompt(rows=1, length=8, seed=0):
    return torch.randint(0, MASK - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def put(model, **settings):
    return hf_accel.apply(model, "rcd", trained=True, **settings)


def commit(tokens, logits, count=1):
    """The most confident ``count`` open positions of every row, greedily."""
    p, best = logits.softmax(-1)[..., :MASK].max(-1)
    p = p.masked_fill(tokens != MASK, -1)
    chosen = p.topk(count, 1).indices
    keep = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, chosen, True) & (tokens == MASK)
    return torch.where(keep, best, tokens)


@torch.no_grad()
def sample(model, ids, blocks=2, forward=None):
    """Two blocks behind a prompt of whole blocks; the logits of every step, and the tokens."""
    cache, steps = DynamicCache(), []
    model(input_ids=ids, past_key_values=cache, use_cache=True, store_kv=True)
    out = [ids]
    for _ in range(blocks):
        tokens = torch.full((len(ids), BLOCK), MASK)
        while (tokens == MASK).any():
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=False).logits
            steps.append(logits)
            tokens = commit(tokens, logits)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=True)
        out.append(tokens)
    return steps, torch.cat(out, 1)


def close(ours, theirs, limit=2e-5):
    assert len(ours) == len(theirs)
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))
