"""Tiny SDAR-class models, and a denoising loop written out by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

MASK = 96
BLOCK = 4
SDAR: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "block_size": BLOCK, "mask_token_id": MASK,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip


def sdar(seed: int = 0, cls: type = SDARForCausalLM, **fields: Any) -> torch.nn.Module:
    """In eval mode, with weights large enough that tokens depend on what is computed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(SDARConfig(**(SDAR | fields))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8.0)
    return model


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, MASK, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(model, ids, blocks=2, padding=None, cache=None, form="4-D", size=BLOCK, rest=()):
    """Greedy block diffusion, one token a step: the logits of all steps, and the tokens.

    Args:
        ids: int64 ``[B, P]``, whole blocks.
        padding: bool ``[B, P]``, False on the left; whole blocks of it.
        form: how masks of denoising steps are given: ``None``, ``"2-D"``, ``"3-D"``, ``"4-D"``, ``"additive"``.
        rest: tokens of the prompt behind its whole blocks, with which the first block begins.
    """
    cache = DynamicCache() if cache is None else cache
    rows = torch.arange(ids.shape[0])
    seen = torch.ones(ids.shape, dtype=torch.bool) if padding is None else padding
    if ids.numel():
        given = {} if padding is None else {"attention_mask": seen}
        model(ids, past_key_values=cache, use_cache=True, store_kv=True, **given)
    logits, tokens = [], ids
    for number in range(blocks):
        block = torch.full((ids.shape[0], size), MASK)
        if number == 0 and rest:
            block[:, : len(rest)] = torch.tensor(rest)
        seen = torch.cat([seen, torch.ones(len(rows), size, dtype=torch.bool)], dim=1)
        positions = (seen.long().cumsum(-1) - 1)[:, -size:]
        given = {"past_key_values": cache, "use_cache": True, "position_ids": positions}
        given["attention_mask"] = None if padding is None and form is None else shaped(seen, size, form)
        for _ in range(size - (len(rest) if number == 0 else 0)):
            out = model(block, store_kv=False, **given).logits.float()
            logits.append(out)
            best, token = out.softmax(-1)[..., :MASK].max(-1)
            place = best.masked_fill(block != MASK, -1).argmax(-1)
            block = block.clone()
            block[rows, place] = token[rows, place]
        model(block, store_kv=True, **given)
        tokens = torch.cat([tokens, block], dim=1)
    return logits, tokens


def shaped(seen, size, form):
    """A mask over ``[B, P + b]`` of one block's forward, in one of the forms that samplers pass."""
    if form == "2-D":
        return seen
    mask = seen[:, None].expand(-1, size, -1)
    if form == "3-D":
        return mask
    if form == "additive":
        zeros = torch.zeros(mask.shape)
        return zeros.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    return mask[:, None]


class Graphs:
    """A backend of torch.compile that runs graphs as they are and knows what they call."""

    def __init__(self) -> None:
        self.called: set[str] = set()

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.called |= {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
        return module.forward
