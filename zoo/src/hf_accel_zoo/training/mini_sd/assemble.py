"""From the files of :mod:`train` to a folder that `StableDiffusionPipeline.from_pretrained` loads.

Weights are stored in fp16 to keep the folder below 6 MB; diffusers and transformers load them in fp32 unless told
otherwise, so a CPU user does nothing special.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from ..write import write_pipeline
from . import model as parts
from .grammar import SPECIAL, TOKENS, vocabulary
from .train import SCALING

EMBEDDING = "embeddings.token_embedding.weight"


def byte_pairs() -> tuple[dict[str, int], Any]:
    """Vocabulary and merges with which CLIP's byte-pair encoding makes one token of each word of the grammar.

    The merges (pairs, though transformers types them as strings) are learned as usual, the most frequent pair first,
    until every word is whole; so applying them in order of rank takes the same way. Letters and the pieces on that way
    come after the words: other words end in them.
    """
    words = [word for word in vocabulary() if word not in SPECIAL]
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges: list[tuple[str, str]] = []
    pieces = {*letters, *(letter + "</w>" for letter in letters)}
    while any(len(word) > 1 for word in split):
        counts = Counter(pair for word in split for pair in pairwise(word))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        pieces.add("".join(pair))
        for word in split:
            while (at := next((i for i, p in enumerate(pairwise(word)) if p == pair), None)) is not None:
                word[at : at + 2] = ["".join(pair)]
    whole = {word if word in SPECIAL else word + "</w>": index for word, index in vocabulary().items()}
    others = sorted(pieces - set(whole))
    return whole | {piece: len(whole) + index for index, piece in enumerate(others)}, merges


def build_tokenizer() -> CLIPTokenizer:
    vocab, merges = byte_pairs()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def assemble(checkpoint: Path) -> Any:
    """The pipeline of a checkpoint folder, in fp32 on the CPU."""
    weights = load_file(checkpoint / "model.safetensors")
    unet, vae = parts.build_unet(), parts.build_vae()
    unet.load_state_dict(part_of(weights, "unet."))
    vae.load_state_dict(load_file(checkpoint / "vae.safetensors"))
    vae.register_to_config(scaling_factor=SCALING)

    # Pieces of words that training never saw embed to zero: what they say is nothing, rather than noise.
    tokenizer = build_tokenizer()
    text_encoder = parts.build_text_encoder(len(tokenizer))
    text = part_of(weights, "text.")
    name = next(name for name in text if name.endswith(EMBEDDING))
    text[name] = torch.cat([text[name], text[name].new_zeros(len(tokenizer) - len(text[name]), parts.TEXT_DIM)])
    text_encoder.load_state_dict(text)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=parts.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="replaced if it exists")
    args = parser.parse_args()
    write_pipeline(assemble(args.checkpoint), args.out)


if __name__ == "__main__":
    main()
