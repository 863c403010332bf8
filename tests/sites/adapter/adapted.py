"""Tiny models of three classes with something to run on each, and packed linears by plain rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.ledger import Ledger
from hf_accel.peft import QWHAConfig
from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, encode, fit_grid
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.linear.places import find_linears, replace
from hf_accel.testing.models import tiny


@dataclass(frozen=True)
class Family:
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module], dict[str, Any]]
    targets: tuple[str, ...]


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=101, max_position_embeddings=128))


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=101, max_position_embeddings=64))


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=101, n_positions=64))


def wan() -> torch.nn.Module:
    return tiny.build("wan")


def token_ids(_: torch.nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(0, 101, (2, 9), generator=generator)}


def latents(model: torch.nn.Module) -> dict[str, Any]:
    return {**tiny.TINY["wan"].inputs(model, timestep=500.0, seed=5), "return_dict": False}


FAMILIES = {
    "llama": Family(llama, token_ids, ("q_proj", "v_proj", "down_proj")),
    "bert": Family(bert, token_ids, ("query", "output.dense")),  # with biases; 76 inputs have blocks of 4
    "wan": Family(wan, latents, ("to_q", "to_v", "ffn.net.2")),
}


def build(family: str) -> torch.nn.Module:
    """The model, always with the same weights, in eval mode."""
    torch.manual_seed(0)
    builder = gpt2 if family == "gpt2" else FAMILIES[family].build
    return builder().eval()


def run(model: torch.nn.Module, family: str) -> torch.Tensor:
    """One forward: the first output."""
    plain = getattr(model, "get_base_model", lambda: model)()
    inputs = token_ids(plain) if family == "gpt2" else FAMILIES[family].inputs(plain)
    return model(**inputs)[0]


def config(family: str, **settings: Any) -> QWHAConfig:
    """An adapter that has an effect from the start."""
    chosen = {"r": 3, "init_weights": False, "alpha": 0.1, "target_modules": list(FAMILIES[family].targets)}
    return QWHAConfig(**{**chosen, **settings})


def pack(model: torch.nn.Module, bits: int = 2, group_size: int = 16) -> Ledger:
    """Round every linear in the blocks to nearest, in place."""
    ledger = Ledger()
    for site in find_linears(model):
        scheme = Scheme.grouped(format_of(f"int{bits}"), group_size)
        weight = site.weight.float()
        grid = fit_grid(weight, scheme, scale_dtype=torch.float32)
        codes = encode(weight, grid, scheme)
        parts = codes, grid.scale, grid.zero, None, bits, group_size, site.bias
        replace(site, PackedLinear.from_codes(*parts, dtype=torch.float32), ledger)
    return ledger


def packed_llama() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The full model, and the same at 2 bits."""
    full = build("llama")
    model = copy.deepcopy(full)
    pack(model)
    return full, model
