"""From a checkpoint of :mod:`train` to a folder that `WanPipeline.from_pretrained` loads.

Weights are stored in fp16 to keep the folder below 10 MB. diffusers and transformers load them in fp32 unless
told otherwise, so a CPU user does nothing special::

    pipe = WanPipeline.from_pretrained(folder)                              # fp32
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)  # GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..write import write_pipeline
from . import model as parts
from .grammar import SPECIAL, vocabulary


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar, lower case, `</s>` at the end; a word it does not know is `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def part_of(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it, in float32."""
    return {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}


def assemble(checkpoint: Path, size: parts.Size) -> Any:
    """The pipeline of a checkpoint folder, in fp32 on the CPU."""
    weights = load_file(checkpoint / "model.safetensors")
    transformer, text_encoder = parts.build_transformer(size), parts.build_text_encoder(size)
    transformer.load_state_dict(part_of(weights, "transformer."))
    text_encoder.load_state_dict(part_of(weights, "text."))

    weights = part_of(load_file(checkpoint / "vae.safetensors"), "")
    vae = parts.build_vae(size)
    vae.register_to_config(
        latents_mean=weights.pop("centre").flatten().tolist(),
        latents_std=weights.pop("spread").flatten().tolist(),
    )
    vae.load_state_dict(weights)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=parts.FLOW_SHIFT,
    )
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="replaced if it exists")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    write_pipeline(assemble(args.checkpoint, parts.TOY if args.toy else parts.FULL), args.out)


if __name__ == "__main__":
    main()
