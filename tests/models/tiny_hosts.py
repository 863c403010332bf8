"""Tiny random models of the classes whose linears we replace; sizes are multiples of 32, as packed layers need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tiny_sdar
from hf_accel.testing.models import gemma, tiny

_LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def _transformers(model: str, config: str, **fields: Any) -> torch.nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields))


def _bert() -> torch.nn.Module:
    return _transformers(
        "BertForMaskedLM", "BertConfig", vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip


def _clip() -> torch.nn.Module:
    return _transformers(
        "CLIPTextModel", "CLIPTextConfig", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip


def _t5(name: str = "T5", **fields: Any) -> torch.nn.Module:
    return _transformers(
        f"{name}EncoderModel", f"{name}Config", vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", **fields,
    )  # fmt: skip


def _opt() -> torch.nn.Module:
    return _transformers(
        "OPTForCausalLM", "OPTConfig", vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
    )  # fmt: skip


def _gpt2() -> torch.nn.Module:
    return _transformers(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_inner=96, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _mixtral() -> torch.nn.Module:
    return _transformers("MixtralForCausalLM", "MixtralConfig", **_LLAMA, num_local_experts=4, num_experts_per_tok=2)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: _transformers("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "qwen": lambda: _transformers("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA, tie_word_embeddings=True),
    "mistral": lambda: _transformers("MistralForCausalLM", "MistralConfig", **_LLAMA),
    "mixtral": _mixtral,
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": _bert,
    "clip": _clip,
    "t5": _t5,
    "umt5": lambda: _t5("UMT5"),
    "sdar": tiny_sdar.sdar,
    "gemma": gemma.diffusion_gemma,
    "wan": lambda: tiny.build("wan"),
    "flux": lambda: tiny.build("flux"),
    "sd3": lambda: tiny.build("sd3"),
    "unet": lambda: tiny.build("unet"),
}

DENOISERS = ("wan", "flux", "sd3", "unet")


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A model of a family in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[family]().eval()


@torch.no_grad()
def output(model: Any, family: str, seed: int = 1) -> torch.Tensor:
    """The main output of one forward on fixed random inputs."""
    if family in DENOISERS:
        return tiny.run(model, family)
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(seed))
    if family == "gemma":
        return model(input_ids=ids, decoder_input_ids=ids[:, :8]).logits
    return model(input_ids=ids)[0]
